"""How far apart the two classes lie in each layer, and whether checkpoints part them alike.

The direction of a layer is the difference of class means on training topics; everything shown is
measured on test topics. Where nothing below a layer was changed, activations must be equal bit for
bit, and the result says in which layers they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.figures import broken, legend_below
from probes import figures
from probes.results import Result
from probes.scores import bca

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Separation(Result):
    """Class separation by layer, cosines between checkpoints, and how much activations moved."""

    models: tuple[str, ...]
    reference: str
    """The checkpoint the cosines and changes refer to."""
    distance: Float[Tensor, "model layer"]
    """Difference of the classes' mean projections over their pooled standard deviation (d'), on
    test topics along the training direction."""
    distance_low: Float[Tensor, "model layer"]
    distance_high: Float[Tensor, "model layer"]
    shuffled: Float[Tensor, "model layer"]
    """95th percentile of d' when labels are swapped within topics at random, training included."""
    cosine: Float[Tensor, "model layer"]
    """Cosine of each model's direction with the reference's, from the same training topics and
    without what chance adds to both (see `_cosine`)."""
    cosine_low: Float[Tensor, "model layer"]
    cosine_high: Float[Tensor, "model layer"]
    halves: Float[Tensor, " layer"]
    """Mean cosine of the reference's directions from two random halves of the topics: what
    sampling alone leaves of a cosine of 1."""
    change: Float[Tensor, "model layer"]
    """Mean over test prompts of ||a - a_reference|| / ||a_reference||."""
    unchanged: Bool[Tensor, "model layer"]
    """Whether every activation equals the reference's bit for bit."""

    def first_changed(self, model: str) -> int | None:
        """The first layer whose output differs from the reference's; None if none does."""
        moved = (~self.unchanged[self.models.index(model)]).nonzero().flatten()
        return int(moved[0]) if len(moved) else None

    def frame(self) -> "pd.DataFrame":
        """One row per model and layer."""
        import pandas as pd

        rows = []
        for m, model in enumerate(self.models):
            for layer in range(self.distance.shape[1]):
                row = {"model": model, "layer": layer}
                for name in [
                    "distance",
                    "distance_low",
                    "distance_high",
                    "shuffled",
                    "cosine",
                    "cosine_low",
                    "cosine_high",
                    "change",
                    "unchanged",
                ]:
                    row[name] = getattr(self, name)[m, layer].item()
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """d' by layer, one curve a model, with intervals and the shuffled-label null."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        layers = range(self.distance.shape[1])
        with figures.theme():
            for m, model in enumerate(self.models):
                look = figures.style(m)
                low, high = self.distance_low[m].numpy(), self.distance_high[m].numpy()
                ax.fill_between(layers, low, high, alpha=0.12, lw=0, color=look["color"])
                ax.plot(layers, self.distance[m].numpy(), label=model, markevery=3, **look)
            null = self.shuffled.amax(0).numpy()
            ax.plot(layers, null, ls=":", color=figures.PALETTE[6], label="shuffled labels, 95 %")
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel="separation d' (standard deviations)",
                title="How far apart the classes lie",
            )
            legend_below(ax, "checkpoint, 95 % interval")
        return ax

    def plot_cosine(self, ax: "Axes | None" = None) -> "Axes":
        """Cosine of the directions with the reference's by layer."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        layers = range(self.cosine.shape[1])
        with figures.theme():
            for m, model in enumerate(self.models):
                if model == self.reference:
                    continue
                look = figures.style(m)
                low, high = self.cosine_low[m].numpy(), self.cosine_high[m].numpy()
                ax.fill_between(layers, low, high, alpha=0.12, lw=0, color=look["color"])
                ax.plot(layers, self.cosine[m].numpy(), label=model, markevery=3, **look)
            ax.plot(
                layers,
                self.halves.numpy(),
                ls="--",
                color=figures.PALETTE[7],
                label=f"{self.reference}, half against half",
            )
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel=broken(f"cosine with the direction of {self.reference}", 40),
                title="Is it the same direction?",
            )
            legend_below(ax, "checkpoint, 95 % interval")
        return ax

    def plot_change(self, ax: "Axes | None" = None) -> "Axes":
        """Relative change of activations by layer; a line marks where nothing may change."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        layers = range(self.change.shape[1])
        with figures.theme():
            for m, model in enumerate(self.models):
                if model != self.reference:
                    ax.plot(
                        layers,
                        100 * self.change[m].numpy(),
                        label=model,
                        markevery=3,
                        **figures.style(m),
                    )
            known = [self.first_changed(model) for model in self.models]
            firsts = [first for first in known if first is not None]
            if firsts and min(firsts) > 0:
                ax.axvline(min(firsts) - 0.5, ls="--", color=figures.PALETTE[6], lw=1)
                ax.annotate(
                    "left of this line\nnothing changed,\nbit for bit",
                    (min(firsts) - 0.7, 0.6),
                    xycoords=("data", "axes fraction"),
                    ha="right",
                    fontsize=8,
                )
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel="mean change of the activation (%)",
                title=broken(f"Distance from {self.reference}"),
            )
            legend_below(ax, "checkpoint")
        return ax

    def __str__(self) -> str:
        at = self.distance.argmax(1)
        said = [
            f"{model} d' {self.distance[m, at[m]]:.2f} at layer {int(at[m])}"
            for m, model in enumerate(self.models)
        ]
        return "separation: " + "; ".join(said)


def measure_separation(
    activations: Mapping[str, Float[Tensor, "layer prompt d_model"]],
    labels: Bool[Tensor, " prompt"],
    topics: Sequence[str],
    *,
    train: Int[Tensor, " train"],
    test: Int[Tensor, " test"],
    reference: str,
    resamples: int = 500,
    seed: int = 0,
) -> Separation:
    """Separation, cosines and changes from the activations of each model on the same prompts.

    Topics must be twin pairs: exactly one prompt of each class in every topic.
    """
    models = tuple(activations)
    generator = torch.Generator().manual_seed(seed)
    trained = _pairs(labels, topics, train)
    tested = _pairs(labels, topics, test)
    boot = _weights(len(tested), resamples, generator)
    boot_train = _weights(len(trained), resamples, generator)
    flips = _flips(resamples, len(trained), generator)
    flips_test = _flips(resamples, len(tested), generator)
    half = torch.rand(20, len(trained), generator=generator).argsort(1) < len(trained) // 2

    n_layers = activations[reference].shape[0]
    columns: dict[str, list[list[float]]] = {name: [[] for _ in models] for name in _COLUMNS}
    halves: list[float] = []
    for layer in range(n_layers):
        origin = activations[reference][layer].double()
        own = {m: activations[m][layer].double() for m in models}
        differences = {m: own[m][trained[:, 0]] - own[m][trained[:, 1]] for m in models}
        directions = {m: d.mean(0) for m, d in differences.items()}
        parts = [_unit(x.double() @ differences[reference]) for x in (half, ~half)]
        halves.append((parts[0] * parts[1]).sum(1).mean().item())
        for i, m in enumerate(models):
            projections = own[m][tested] @ directions[m]
            value, drawn, left = _distances(projections, boot)
            limits = bca(value, drawn, left)
            shuffled = own[m][tested] @ (flips @ differences[m] / len(trained)).T
            null = _null(shuffled, flips_test)
            cosine, low, high = _cosine(differences[m], differences[reference], boot_train)
            moved = (own[m][test] - origin[test]).norm(dim=1) / origin[test].norm(dim=1)
            same = torch.equal(activations[m][layer], activations[reference][layer])
            found = (value, limits.low, limits.high, null, cosine, low, high, moved.mean(), same)
            for name, number in zip(_COLUMNS, found, strict=True):
                columns[name][i].append(float(number))
    tensors = {name: torch.tensor(rows, dtype=torch.float32) for name, rows in columns.items()}
    return Separation(
        models=models,
        reference=reference,
        halves=torch.tensor(halves, dtype=torch.float32),
        distance=tensors["distance"],
        distance_low=tensors["distance_low"],
        distance_high=tensors["distance_high"],
        shuffled=tensors["shuffled"],
        cosine=tensors["cosine"],
        cosine_low=tensors["cosine_low"],
        cosine_high=tensors["cosine_high"],
        change=tensors["change"],
        unchanged=tensors["unchanged"].bool(),
    )


_COLUMNS = [
    "distance",
    "distance_low",
    "distance_high",
    "shuffled",
    "cosine",
    "cosine_low",
    "cosine_high",
    "change",
    "unchanged",
]


def _pairs(labels: Tensor, topics: Sequence[str], rows: Tensor) -> Int[Tensor, "topic 2"]:
    """Row of the positive and of the negative prompt of every topic."""
    found: dict[str, list[int]] = {}
    for row in map(int, rows):
        found.setdefault(topics[row], [-1, -1])[0 if labels[row] else 1] = row
    pairs = torch.tensor(list(found.values()))
    if (pairs < 0).any() or 2 * len(pairs) != len(rows):
        raise ValueError("every topic needs one positive and one negative prompt in each part")
    return pairs


def _weights(n: int, resamples: int, generator: torch.Generator) -> Float[Tensor, "resample n"]:
    drawn = torch.randint(n, (resamples, n), generator=generator)
    ones = torch.ones(resamples, n, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)


def _flips(resamples: int, n: int, generator: torch.Generator) -> Float[Tensor, "resample n"]:
    """1 or -1 for each topic: whether a shuffle leaves its labels or swaps them."""
    return torch.randint(2, (resamples, n), generator=generator).double() * 2 - 1


def _distances(p: Float[Tensor, "topic 2"], boot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d' of the sample, of its resamples and with each topic left out."""

    def of(weights: Tensor) -> Tensor:
        n = weights.sum(-1, keepdim=True)
        mean = weights @ p / n
        variance = (weights @ p.square() / n - mean.square()).clamp(min=0) * n / (n - 1)
        return (mean[..., 0] - mean[..., 1]) / variance.mean(-1).sqrt().clamp(min=1e-12)

    n = len(p)
    everyone = torch.ones(n, dtype=torch.float64)
    return of(everyone), of(boot), of(1 - torch.eye(n, dtype=torch.float64))


def _cosine(
    a: Float[Tensor, "topic d_model"], b: Float[Tensor, "topic d_model"], boot: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine of two mean differences with its 95 % limits, without what chance adds to both.

    A plain cosine is pulled to 0 by noise that each direction has for itself and to 1 by noise
    they share, and its resamples, being noisier, even further: simulated, percentile limits held
    the truth in 0 to 70 % of cases. Products of *different* topics carry no such noise (a
    U-statistic), and BCa limits of their ratio held it in 93 to 100 %. Where chance explains the
    whole length of a direction nothing is known: the plain cosine with limits -1 and 1.
    """
    plain = (_unit(a.mean(0)) * _unit(b.mean(0))).sum()
    if torch.equal(a, b):
        return plain, plain, plain
    products = [a @ b.T, a @ a.T, b @ b.T]

    def of(weights: Tensor) -> Tensor:
        both, own, other = (
            ((weights @ g) * weights).sum(-1) - weights.square() @ g.diagonal() for g in products
        )
        length = own.clamp(min=0).sqrt() * other.clamp(min=0).sqrt()
        return torch.where(length > 0, both / length, both.sign()).clamp(-1, 1)

    n = len(a)
    ones = torch.ones(n, dtype=torch.float64)
    if any(float(g.sum() - g.trace()) <= 0 for g in products[1:]):
        return plain, -torch.ones_like(plain), torch.ones_like(plain)
    limits = bca(of(ones), of(boot), of(1 - torch.eye(n, dtype=torch.float64)))
    return limits.value, limits.low, limits.high


def _null(p: Float[Tensor, "topic 2 shuffle"], flips: Float[Tensor, "shuffle topic"]) -> Tensor:
    """95th percentile of d' over shuffles of the test labels within topics."""
    turned = torch.where(flips.T[:, None] > 0, p, p.flip(1))
    mean, spread = turned.mean(0), turned.var(0).mean(0).sqrt().clamp(min=1e-12)
    return ((mean[0] - mean[1]) / spread).quantile(0.95)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)
