"""Two-dimensional maps of one layer's activations: PCA, which keeps distances, and UMAP."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.figures import broken, legend_below
from probes import figures
from probes.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

NEIGHBOURS = 15


@dataclass(frozen=True)
class Maps(Result):
    """Coordinates of the same prompts under PCA and UMAP."""

    pca: Float[Tensor, "prompt 2"]
    explained: tuple[float, ...]
    """Share of variance of the two principal components."""
    umap: Float[Tensor, "prompt 2"]
    positive: Bool[Tensor, " prompt"]
    classes: tuple[str, str]
    """Names of the positive and of the negative class."""
    site: str
    model: str

    def frame(self) -> "pd.DataFrame":
        """One row a prompt."""
        import pandas as pd

        return pd.DataFrame(
            {
                "class": [self.classes[0 if p else 1] for p in self.positive.tolist()],
                "pca_1": self.pca[:, 0],
                "pca_2": self.pca[:, 1],
                "umap_1": self.umap[:, 0],
                "umap_2": self.umap[:, 1],
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The PCA map."""
        labels = [
            f"component {i + 1} ({share:.0%} of variance)" for i, share in enumerate(self.explained)
        ]
        return self._scatter(ax, self.pca, labels, f"PCA, {self.model}, {self.site}")

    def plot_umap(self, ax: "Axes | None" = None) -> "Axes":
        """The UMAP map; its axes have no units and distances between groups mean little."""
        labels = ["UMAP 1 (no unit)", "UMAP 2 (no unit)"]
        return self._scatter(ax, self.umap, labels, f"UMAP, {self.model}, {self.site}")

    def _scatter(self, ax: "Axes | None", at: Tensor, labels: list[str], title: str) -> "Axes":
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        with figures.theme():
            for i, own in enumerate((self.positive, ~self.positive)):
                look = figures.style(i)  # the positive class first, as in the other panels
                ax.scatter(
                    at[own, 0],
                    at[own, 1],
                    s=14,
                    alpha=0.75,
                    linewidths=0,
                    color=look["color"],
                    marker=look["marker"],
                    label=f"{self.classes[i]} (n = {int(own.sum())})",
                )
            ax.set(xlabel=labels[0], ylabel=labels[1], title=broken(title))
            legend_below(ax)
        return ax

    def __str__(self) -> str:
        return f"maps of {len(self.pca)} prompts at {self.site} of {self.model}"


def map_activations(
    x: Float[Tensor, "prompt d_model"],
    positive: Bool[Tensor, " prompt"],
    *,
    classes: tuple[str, str],
    site: str,
    model: str,
    seed: int = 0,
) -> Maps:
    """PCA (exact) and UMAP (one thread, fixed seed) of the activations of one site."""
    centred = x.double() - x.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    share = s.square() / s.square().sum()
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numba and umap announce their own settings
            from umap import UMAP

            fitted = UMAP(
                n_neighbors=min(NEIGHBOURS, len(x) - 1), random_state=seed, n_jobs=1
            ).fit_transform(centred.float().numpy())
    finally:
        torch.set_num_threads(threads)  # numba sets OpenMP's number, which is torch's too
    return Maps(
        pca=(u[:, :2] * s[:2]).float(),
        explained=(float(share[0]), float(share[1])),
        umap=torch.as_tensor(fitted, dtype=torch.float32),
        positive=positive,
        classes=classes,
        site=site,
        model=model,
    )
