"""`HeadRanking`: how well each attention head tells two classes apart, beside its null."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes import figures
from probes.model import HookedModel
from probes.results import Result
from probes.scores import Intervals, wilson
from steering.artefact import Origin
from steering.edits import Scale
from steering.intervals import mean_interval
from steering.offsets import HeadOffsets

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


ENOUGH = 200
"""Permutations without which nothing is claimed."""


@dataclass(frozen=True)
class HeadRanking(Result):
    """Held-out balanced accuracy of a probe at every query head; 0.5 is chance.

    NaN: the layer has no heads, or the head gives the same output to every prompt.
    """

    accuracy: Float[Tensor, "layer head"]
    """Share of rows on their own side, the mean over both classes, each row scored by the probe
    that did not see its topic."""
    low: Float[Tensor, "layer head"]
    """95 % limits, BCa bootstrap over topics."""
    high: Float[Tensor, "layer head"]
    null: Float[Tensor, "permutation layer head"]
    """Accuracy with shuffled labels, fitted and scored anew; the same shuffles at every head."""
    loss: Float[Tensor, "layer head"]
    """Held-out log-loss in nats: which of several heads of one accuracy comes first."""
    unit: Float[Tensor, "layer head head_dim"]
    """Unit direction of each head, from all rows; the positive class projects higher."""
    sigma: Float[Tensor, "layer head"]
    """Standard deviation (divisor n - 1) of all rows' projections on it, both classes together, as
    in the paper: where the classes lie far apart it is wider than the spread inside each."""
    direction: str
    n: int
    """Rows."""
    n_groups: int
    """Topics."""
    n_folds: int
    contrast: str = ""
    positions: str = ""

    def __str__(self) -> str:
        layer, head = self.top(1)[0]
        null = f", best of shuffled labels 95 % {self.null_best:.3f}" if len(self.null) else ""
        return (
            f"{self.contrast}: of {int(self.accuracy.isfinite().sum())} heads layer {layer} head "
            f"{head} reads best, accuracy {self.accuracy[layer, head]:.3f} "
            f"[{self.low[layer, head]:.3f}, {self.high[layer, head]:.3f}]{null}, {self.n} rows of "
            f"{self.n_groups} topics, {self.n_folds} folds"
        )

    @cached_property
    def order(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) by held-out accuracy, then held-out loss, then depth."""
        found = (self.accuracy.isfinite() & self.unit.isfinite().all(-1)).nonzero().tolist()
        pairs = [(int(layer), int(head)) for layer, head in found]
        return tuple(sorted(pairs, key=lambda p: (-self.accuracy[p], self.loss[p], p)))

    def top(self, n: int) -> tuple[tuple[int, int], ...]:
        """The n heads that read best."""
        if not self.order:
            raise ValueError(
                "no head has a direction: the classes' mean outputs are equal at every head, as "
                "when the same prompts carry both labels"
            )
        if not 1 <= n <= len(self.order):
            raise ValueError(
                f"{n} heads were asked for: choose 1 to {len(self.order)}, the heads that have a "
                "direction"
            )
        return self.order[:n]

    @cached_property
    def null_95(self) -> Float[Tensor, "layer head"]:
        """95th percentile of each head's own null."""
        self._need_null()
        return self.null.double().quantile(0.95, dim=0).float()

    @cached_property
    def null_best(self) -> float:
        """95th percentile of the *best* head's accuracy under shuffled labels: what a head chosen
        among all of them must beat."""
        self._need_null()
        best = self.null.nan_to_num(-1.0).flatten(1).amax(1)
        return float(best.double().quantile(0.95))

    @property
    def claimed(self) -> Bool[Tensor, "layer head"]:
        """Heads whose interval excludes the null of the best head; none below 200 permutations."""
        return (self.low > self.null_best) & (len(self.null) >= ENOUGH)

    def offsets(self, model: HookedModel, n_heads: int = 48) -> HeadOffsets:
        """The unit directions of the best heads with their sigmas, to be applied in sigmas.

        `steer(model, offsets, alpha, unit="sigma")` adds alpha * sigma * direction to each head's
        output; folded into the bias of the output projection it costs nothing.
        """
        if self.accuracy.shape[0] != model.n_layers:
            raise ValueError(
                f"the ranking is of {self.accuracy.shape[0]} layers, {model.name} has "
                f"{model.n_layers}: rank the heads of this model or of a checkpoint of it"
            )
        chosen = self.top(n_heads)
        origin = Origin.of(
            model,
            estimator=f"ITI {self.direction}",
            data_hash=self.record.prompts_hash,
            positions=self.positions,
        )
        return HeadOffsets(
            {pair: self.unit[pair] for pair in chosen},
            origin,
            {pair: Scale(sigma=float(self.sigma[pair])) for pair in chosen},
        )

    def frame(self) -> "pd.DataFrame":
        """One row a head, best first; `p` is the permutation p-value of that head alone."""
        import pandas as pd

        rows = []
        for rank, pair in enumerate(self.order, 1):
            own = self.null[:, pair[0], pair[1]]
            rows.append(
                {
                    "rank": rank,
                    "layer": pair[0],
                    "head": pair[1],
                    "accuracy": float(self.accuracy[pair]),
                    "low": float(self.low[pair]),
                    "high": float(self.high[pair]),
                    "null_95": float(self.null_95[pair]) if len(own) else float("nan"),
                    "p": (1 + int((own >= self.accuracy[pair]).sum())) / (1 + len(own)),
                    "claimed": bool(self.claimed[pair]) if len(own) else False,
                    "loss": float(self.loss[pair]),
                    "sigma": float(self.sigma[pair]),
                }
            )
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Map of accuracy, layers upwards, heads to the right; dots beat the best-head null."""
        ax = figures.axes(ax)
        far = float((self.accuracy - 0.5).abs().nan_to_num(0.0).max().clamp_min(0.05))
        with figures.theme():
            image = ax.imshow(
                self.accuracy.numpy(),
                cmap="RdBu_r",
                vmin=0.5 - far,
                vmax=0.5 + far,
                origin="lower",
                aspect="auto",
            )
            ax.grid(visible=False)
            ax.figure.colorbar(
                image, ax=ax, label="balanced accuracy (held-out topics), 0.5 is chance"
            )
            if len(self.null):
                layers, heads = self.claimed.nonzero().T.numpy()
                ax.plot(
                    heads,
                    layers,
                    marker=".",
                    ls="",
                    color=figures.PALETTE[6],
                    label=f"interval above {self.null_best:.2f}, 95 % of the best shuffled head",
                )
                ax.legend(loc="upper left", bbox_to_anchor=(0, -0.15))
            ax.set(xlabel="head", ylabel="layer", title=f"head probes, {self.contrast}")
        return ax

    def _need_null(self) -> None:
        if not len(self.null):
            raise ValueError(
                "this ranking was made without shuffled labels: make it with "
                "rank_heads(..., permutations=200)"
            )


def shares(
    right: Float[Tensor, "example layer head"], topics: Sequence[str], seed: int
) -> Intervals:
    """Means of weighted right rows with BCa limits over topics; NaN at heads not scored.

    At 0 and 1, where every resample is the same, the limits are Wilson's with topics for trials.
    """
    flat, k = right.flatten(1), len(set(topics))
    known = flat.isfinite().all(0)
    found = mean_interval(flat[:, known], topics, seed=seed)
    limits = torch.full((3, flat.shape[1]), torch.nan, dtype=torch.float64)
    limits[:, known] = torch.stack(list(found))
    for i in ((limits[0] - 0.5).abs() > 0.5 - 1e-9).nonzero().flatten().tolist():
        bound = wilson(k if limits[0, i] > 0.5 else 0, k)
        limits[1:, i] = torch.tensor([bound.low, bound.high], dtype=torch.float64)
    return Intervals(*limits.reshape(3, *right.shape[1:]))
