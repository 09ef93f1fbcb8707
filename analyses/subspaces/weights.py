"""Do two updates of the weights live in the same subspaces? Mode subspace overlap, beside chance.

For each weight the left singular vectors that hold a share eta of each update's energy are
compared (arXiv 2505.14185, experiment 3). "Left" is the output side; of the embedding it is the
vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.subspaces import bases
from analyses.subspaces.deltas import Deltas, changes, record_of, together
from analyses.subspaces.grouping import By, grouped, layers_of, notes_of, places, ratio_over
from analyses.subspaces.projections import square
from analyses.subspaces.svd import LeftSvd, Method, Uncertified, left_svd
from probes import figures
from probes.progress import progress as show
from probes.results import Result
from probes.scores import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ENERGIES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


@dataclass(frozen=True)
class WeightOverlap(Result):
    """Mode subspace overlap of two updates X and Y, by weight and energy share.

    Figures are means over weights, whatever their size. Weights where X or Y is zero are left out:
    their subspaces would be arbitrary. `compared` says how much of each update that leaves.
    """

    first: str
    """What X is, "tuned - aligned"."""
    second: str
    """What Y is."""
    energies: tuple[float, ...]
    tensors: tuple[str, ...]
    overlap: Float[Tensor, "energy tensor"]
    """||Q_x^T Q_y||_F^2 / min(k_x, k_y), 0 to 1."""
    null: Float[Tensor, "energy tensor"]
    """Its mean between uniformly random subspaces of these dimensions, max(k_x, k_y) / rows."""
    null_sd: Float[Tensor, "energy tensor"]
    """Standard deviation of the same."""
    k_first: Int[Tensor, "energy tensor"]
    """Left singular vectors of X that hold this share of its energy."""
    k_second: Int[Tensor, "energy tensor"]
    skipped: int
    """Weights left out because X or Y is zero there."""
    certified: int
    """Decompositions that were randomised and certified; all others are exact."""
    compared: tuple[float, float] = (1.0, 1.0)
    """Share of ||X||^2, and of ||Y||^2, in the weights that are compared, 0 to 1; the rest lies
    where the other update is zero, and no overlap speaks of it."""
    notes: tuple[str, ...] = ()

    def mean(self, energy: float, rows: Sequence[int] | None = None) -> Interval:
        """Mean overlap over weights with its BCa interval over layers, as if these were a sample
        (NaN limits with fewer than two layers)."""
        return self._interval(self.overlap[self._at(energy)], rows)

    def excess(self, energy: float, rows: Sequence[int] | None = None) -> Interval:
        """Mean of overlap minus its null's mean, with its BCa interval over layers."""
        e = self._at(energy)
        return self._interval(self.overlap[e] - self.null[e], rows)

    def chance(self, energy: float, rows: Sequence[int] | None = None) -> bases.Null:
        """The mean overlap of independent random subspaces over the same weights."""
        if not self.tensors:
            return bases.Null(0.0, 0.0, 0.0)
        e, at = self._at(energy), list(range(len(self.tensors)) if rows is None else rows)
        mean = float(self.null[e, at].double().mean())
        sd = float(self.null_sd[e, at].double().square().sum().sqrt()) / len(at)
        return bases.Null(mean, sd, bases.beta_quantile(mean, sd))

    def claimed(self, energy: float) -> bool:
        """Whether the interval of the mean lies above the 95th percentile of chance."""
        return self.mean(energy).low > self.chance(energy).high

    def frame(self, by: By = "tensor") -> "pd.DataFrame":
        """One row per energy and weight, or per energy and group of weights: each layer, each
        module type ("kind"), or everything."""
        import pandas as pd

        rows = []
        for group, members in grouped(self.tensors, by).items():
            for e, energy in enumerate(self.energies):
                mean, chance = self.mean(energy, members), self.chance(energy, members)
                rows.append(
                    {
                        by: group,
                        "energy": energy,
                        "overlap": mean.value,
                        "low": mean.low,
                        "high": mean.high,
                        "null": chance.mean,
                        "null_95": chance.high,
                        "excess": mean.value - chance.mean,
                        "k_first": self.k_first[e, members].double().mean().item(),
                        "k_second": self.k_second[e, members].double().mean().item(),
                        "weights": len(members),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Mean overlap against the energy share, with chance."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        x = list(self.energies)
        means, chances = [self.mean(e) for e in x], [self.chance(e) for e in x]
        with figures.theme():
            look = figures.style(0)
            low, high = [m.low for m in means], [m.high for m in means]
            ax.fill_between(x, low, high, alpha=0.15, lw=0, color=look["color"])
            ax.plot(x, [m.value for m in means], label="overlap (95 % over layers)", **look)
            grey = figures.PALETTE[6]
            ax.plot(x, [c.mean for c in chances], ls=":", color=grey, label="random subspaces")
            ax.plot(
                x, [c.high for c in chances], ls="--", lw=1, color=grey, label="random, 95 % below"
            )
            ax.set(
                xlabel="share of each update's energy (eta)",
                ylabel="mode subspace overlap, mean of weights",
                title=broken(f"{self.first} and {self.second}"),
                ylim=(-0.03, 1.03),
            )
            legend_below(ax)
        return ax

    def plot_layers(self, energy: float = 0.9, ax: "Axes | None" = None) -> "Axes":
        """Map of overlap minus its null's mean: module types by layers."""
        e = self._at(energy)
        where = places(self.tensors)
        layers = sorted({layer for _, layer, _ in where if layer is not None})
        kinds = list(dict.fromkeys(kind for _, layer, kind in where if layer is not None))
        if not layers:
            raise ValueError(
                f"no weight of {self.first} belongs to a numbered layer, so there is no map: use "
                "frame('tensor')"
            )
        values = torch.full((len(kinds), len(layers)), math.nan)
        for i, (_, layer, kind) in enumerate(where):
            if layer is not None:
                difference = self.overlap[e, i] - self.null[e, i]
                values[kinds.index(kind), layers.index(layer)] = difference
        ax = figures.axes(ax, 6.4, 1.6 + 0.32 * len(kinds))
        with figures.theme():
            image = ax.imshow(values.numpy(), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
            ax.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
            ax.set_yticks(range(len(kinds)), kinds)
            ax.grid(False)
            ax.set(
                xlabel="layer (0 is the first block)",
                title=broken(
                    f"{self.first} and {self.second}: overlap above chance at {energy:.0%} energy",
                    60,
                ),
            )
            ax.figure.colorbar(image, ax=ax, label="overlap - null")
        return ax

    def __str__(self) -> str:
        pair = f"overlap of {self.first} and {self.second}"
        if not self.tensors:
            return f"{pair}: no weight differs in both ({self.skipped} left out), so exactly zero"
        energy = min(self.energies, key=lambda e: abs(e - 0.9))
        mean, chance = self.mean(energy), self.chance(energy)
        verdict = "above" if self.claimed(energy) else "not above"
        return (
            f"{pair}: {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}] at {energy:.0%} energy, "
            f"random subspaces {chance.mean:.3f} (95 % below {chance.high:.3f}): {verdict} chance; "
            f"{len(self.tensors)} weights, with {self.compared[0]:.1%} and {self.compared[1]:.1%} "
            "of the updates"
        )

    def _at(self, energy: float) -> int:
        if energy not in self.energies:
            raise ValueError(
                f"energy {energy} was not measured: choose one of "
                f"{', '.join(map(str, self.energies))}"
            )
        return self.energies.index(energy)

    def _interval(self, values: Tensor, rows: Sequence[int] | None) -> Interval:
        at = list(range(len(self.tensors)) if rows is None else rows)
        if not at:
            return Interval(0.0, 0.0, 0.0)
        chosen = values[at]
        layers = layers_of([self.tensors[i] for i in at])
        return ratio_over(chosen, torch.ones_like(chosen), layers)


def weight_overlap(
    X: Deltas,
    Y: Deltas,
    energies: Sequence[float] = ENERGIES,
    *,
    method: Method = "auto",
    progress: bool = True,
) -> WeightOverlap:
    """Mode subspace overlap of two updates at several energy shares, weight by weight.

    Vectors count as one column, so theirs is the squared cosine; trailing axes of other tensors are
    flattened. `method` says how large matrices are decomposed (`svd.left_svd`).

    Overlap has no sign: a tuning that undoes V = aligned - base overlaps with it as one that goes
    on, and another seed minus aligned holds -V by construction. Chance here is that of uniformly
    random subspaces, which is mild: any two trainings of one model share directions, so hold an
    unrelated update beside them.
    """
    if not energies or not all(0 < e <= 1 for e in energies):
        raise ValueError(
            f"energy shares {tuple(energies)} were asked: give some above 0, at most 1"
        )
    names, skipped, certified = together(X, Y), 0, 0
    kept: list[str] = []
    sizes, inside = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    rows: list[list[tuple[float, float, float, int, int]]] = []
    with show(len(names), f"overlap of {X} and {Y}", progress) as done:
        for name, (x, y) in changes(names, X, Y):
            done(1)
            XX, YY = square(x), square(y)
            sizes += torch.tensor([XX, YY], dtype=torch.float64)
            if not XX or not YY:
                skipped += 1
                continue
            inside += torch.tensor([XX, YY], dtype=torch.float64)
            try:
                svds = [left_svd(change, method=method, energy=max(energies)) for change in (x, y)]
                rows.append([_compared(svds[0], svds[1], energy) for energy in energies])
            except Uncertified as error:
                raise Uncertified(f"{name}: {error}") from error
            certified += sum(svd.method == "certified" for svd in svds)
            kept.append(name)
    numbers = torch.tensor(rows, dtype=torch.float64).reshape(len(kept), len(energies), 5)
    overlap, null, sd, k_x, k_y = numbers.permute(2, 1, 0).contiguous()
    shares = (inside / sizes).nan_to_num(0.0).tolist()
    return WeightOverlap(
        first=str(X),
        second=str(Y),
        energies=tuple(float(e) for e in energies),
        tensors=tuple(kept),
        overlap=overlap.float(),
        null=null.float(),
        null_sd=sd.float(),
        k_first=k_x.long(),
        k_second=k_y.long(),
        skipped=skipped,
        certified=certified,
        compared=(shares[0], shares[1]),
        notes=notes_of(kept, X.notes, Y.notes),
        record=record_of(X, Y, method=method),
    )


def _compared(x: LeftSvd, y: LeftSvd, energy: float) -> tuple[float, float, float, int, int]:
    """Overlap, mean and deviation of its null, and both dimensions."""
    k_x, k_y = x.rank(energy), y.rank(energy)
    Q_x, Q_y = x.vectors[:, :k_x], y.vectors[:, :k_y]
    null = bases.overlap_null(k_x, k_y, len(Q_x))
    return bases.mode_overlap(Q_x, Q_y), null.mean, null.sd, k_x, k_y
