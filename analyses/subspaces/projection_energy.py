"""How much of an update lies in the subspace alignment wrote to, beside random subspaces."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.subspaces import bases
from analyses.subspaces.deltas import Change, Deltas, changes, together
from analyses.subspaces.grouping import By, grouped, layers_of, notes_of, ratio_over
from analyses.subspaces.projections import (
    SUBSPACES,
    Of,
    Subspace,
    along,
    fourth,
    inner,
    is_scalar,
    square,
    width,
)
from analyses.subspaces.svd import left_svd
from probes import figures
from probes.progress import progress as show
from probes.results import Result
from probes.scores import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FRACTIONS = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True)
class ProjectionEnergy(Result):
    """Squared norms of an update U and of its parts in three kinds of subspace, by weight.

    Shares are formed of sums over weights, as in the released code, never as means of shares. Only
    weights where both U and V differ from zero are counted.
    """

    alignment: str
    """What V is, "aligned - base"."""
    update: str
    """What U is, "tuned - aligned"."""
    fractions: tuple[float, ...]
    of: str
    """What the fractions are of: "size", min(m, n) of each weight, or "rank", that of V."""
    tensors: tuple[str, ...]
    ranks: Int[Tensor, "fraction tensor"]
    """Dimension k of the subspace of each weight; 0 stands for the projection onto V itself."""
    squares: Float[Tensor, "three tensor"]
    """||U||^2, ||V||^2 and <U, V> of each weight, float64."""
    kept: Float[Tensor, "subspace fraction tensor"]
    """||P||^2 for top-k, and its exact mean over draws for random-k and random, float64."""
    variance: Float[Tensor, "subspace fraction tensor"]
    """Variance of ||P||^2 over draws, exactly; 0 for top-k."""
    skipped: int
    """Weights left out because U or V is zero there."""
    elsewhere: float
    """Share of ||U||^2 in weights left out because V is zero, 0 to 1: alignment never touched
    them."""
    capped: int
    """Weights where some fraction asks for more directions than V has, and got those it has."""
    notes: tuple[str, ...] = ()

    def share(
        self, subspace: Subspace, fraction: float, rows: Sequence[int] | None = None
    ) -> Interval:
        """E = sum of ||P||^2 / sum of ||U||^2, 0 to 1, of all weights or of some of them.

        For the random subspaces the value is the mean, and the limits hold 95 % of draws; for top-k
        they are BCa limits over layers (NaN with fewer than two), as if the layers were a sample.
        """
        at = list(range(len(self.tensors))) if rows is None else list(rows)
        s, f = SUBSPACES.index(subspace), self._at(fraction)
        total = self.squares[0, at].sum()
        if not total:
            return Interval(0.0, 0.0, 0.0)
        kept = self.kept[s, f]
        value = float(kept[at].sum() / total)
        if subspace != "top-k":
            sd = float(self.variance[s, f, at].sum().sqrt() / total)
            return Interval(value, *(bases.beta_quantile(value, sd, p) for p in (0.025, 0.975)))
        layers = layers_of([self.tensors[i] for i in at])
        return ratio_over(kept[at], self.squares[0, at], layers)

    def null(self, fraction: float, rows: Sequence[int] | None = None) -> bases.Null:
        """E of uniformly random subspaces of the same dimensions: mean, deviation, percentile."""
        at = list(range(len(self.tensors))) if rows is None else list(rows)
        f, total = self._at(fraction), float(self.squares[0, at].sum())
        if not total:
            return bases.Null(0.0, 0.0, 0.0)
        mean = float(self.kept[2, f, at].sum()) / total
        sd = math.sqrt(float(self.variance[2, f, at].sum())) / total
        return bases.Null(mean, sd, bases.beta_quantile(mean, sd))

    def claimed(self, fraction: float) -> bool:
        """Whether the interval of top-k lies above the 95th percentile of random subspaces."""
        return self.share("top-k", fraction).low > self.null(fraction).high

    def cosine(self, subspace: Subspace, fraction: float) -> float:
        """Cosine of U and P over all weights: the square root of E, P being a projection of U."""
        return math.sqrt(self.share(subspace, fraction).value)

    @property
    def cosine_alignment(self) -> float:
        """Cosine of U and V over all weights, -1 to 1: sum <U, V> / sqrt(sum ||U||^2 sum ||V||^2).

        The released code has sqrt(sum <U, V>) where the norm of U belongs.
        """
        UU, VV, UV = self.squares.sum(1).tolist()
        return UV / math.sqrt(UU * VV) if UU and VV else 0.0

    def frame(self, by: By = "everything") -> "pd.DataFrame":
        """One row per subspace and fraction; of all weights, of each layer, of each module type
        ("kind"), or of each weight ("tensor")."""
        import pandas as pd

        rows = []
        for group, members in grouped(self.tensors, by).items():
            UU, VV, UV = self.squares[:, members].sum(1).tolist()
            for subspace in SUBSPACES:
                for fraction in self.fractions:
                    E = self.share(subspace, fraction, None if by == "everything" else members)
                    null = self.null(fraction, members)
                    rows.append(
                        {
                            by: group,
                            "subspace": subspace,
                            "fraction": fraction,
                            "energy": E.value,
                            "low": E.low,
                            "high": E.high,
                            "null": null.mean,
                            "null_95": null.high,
                            "cosine_projection": math.sqrt(E.value),
                            "cosine_alignment": UV / math.sqrt(UU * VV) if UU and VV else 0.0,
                            "weights": len(members),
                        }
                    )
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Share of the update's energy against the fraction, one line a subspace."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        labels = ("top-k (95 % over layers)", "random-k of V (95 % of draws)", "random (95 %)")
        with figures.theme():
            for i, subspace in enumerate(SUBSPACES):
                shares = [self.share(subspace, f) for f in self.fractions]
                look = figures.style(i)
                x = list(self.fractions)
                low, high = [s.low for s in shares], [s.high for s in shares]
                ax.fill_between(x, low, high, alpha=0.15, lw=0, color=look["color"])
                ax.plot(x, [s.value for s in shares], label=labels[i], **look)
            whole = "the smaller side" if self.of == "size" else "its rank"
            ax.set(
                xlabel=f"directions of V, as a fraction of {whole}",
                ylabel="share of the squared norm of U",
                title=broken(f"What of {self.update} lies where {self.alignment} wrote"),
                ylim=(-0.03, 1.03),
            )
            legend_below(ax, "subspace")
        return ax

    def __str__(self) -> str:
        if not self.tensors:
            return (
                f"projection of {self.update} onto {self.alignment}: nothing differs in any weight "
                f"that both changed ({self.skipped} weights left out)"
            )
        fraction = self.fractions[len(self.fractions) // 2]
        E, null = self.share("top-k", fraction), self.null(fraction)
        verdict = "above" if self.claimed(fraction) else "not above"
        return (
            f"projection of {self.update} onto {self.alignment}: at fraction {fraction:g} top-k "
            f"holds {E.value:.1%} [{E.low:.1%}, {E.high:.1%}] of the update, random subspaces "
            f"{null.mean:.1%} (95 % below {null.high:.1%}): {verdict} chance; cosine with V "
            f"{self.cosine_alignment:+.3f}"
        )

    def _at(self, fraction: float) -> int:
        if fraction not in self.fractions:
            raise ValueError(
                f"fraction {fraction} was not measured: choose one of "
                f"{', '.join(map(str, self.fractions))}"
            )
        return self.fractions.index(fraction)


def projection_energy(
    V: Deltas,
    U: Deltas,
    fractions: Sequence[float] = FRACTIONS,
    *,
    of: Of = "size",
    progress: bool = True,
) -> ProjectionEnergy:
    """Measure what of the update U = tuned - aligned lies where V = aligned - base wrote.

    Random subspaces are not sampled: mean and variance over all draws are known in closed form
    (`bases.energy_null`, and drawing without replacement for random-k). One weight at a time is in
    memory; each costs one exact SVD of V.

    `tuned` must have been trained from `aligned`. The difference to a checkpoint that was not, another
    seed say, holds -V by construction and so a large share whatever it learnt: compare the two
    alignment matrices with `weight_overlap` instead. Uniformly random subspaces are a mild null,
    for any two trainings of one model share directions: hold an unrelated update beside it.
    """
    if not fractions:
        raise ValueError("no fractions were given: give some between 0 and 1")
    names, skipped, inside, outside, capped = together(V, U), 0, 0.0, 0.0, 0
    columns: list[tuple[str, tuple[float, ...], list[int], Tensor]] = []
    with show(len(names), f"projections of {U}", progress) as done:
        for name, (v, u) in changes(names, V, U):
            UU, VV = square(u), square(v)
            inside, outside = inside + UU, outside + (UU if not VV else 0.0)
            done(1)
            if not UU or not VV:
                skipped += 1
                continue
            squares = (UU, VV, inner(u, v))
            ks, moments, cut = _weight(v, u, squares, fractions, of)
            capped += cut
            columns.append((name, squares, ks, moments))
    n, f = len(columns), len(fractions)
    moments = torch.zeros(2, len(SUBSPACES), f, n, dtype=torch.float64)
    for i, (*_, found) in enumerate(columns):
        moments[..., i] = found
    return ProjectionEnergy(
        alignment=str(V),
        update=str(U),
        fractions=tuple(float(x) for x in fractions),
        of=of,
        tensors=tuple(name for name, *_ in columns),
        ranks=torch.tensor([ks for _, _, ks, _ in columns]).reshape(n, f).T.contiguous().long(),
        squares=torch.tensor([s for _, s, _, _ in columns], dtype=torch.float64).reshape(n, 3).T,
        kept=moments[0],
        variance=moments[1],
        skipped=skipped,
        elsewhere=outside / inside if inside else 0.0,
        capped=capped,
        notes=notes_of([name for name, *_ in columns], V.notes, U.notes),
    )


def _weight(
    v: Change, u: Change, squares: tuple[float, ...], fractions: Sequence[float], of: Of
) -> tuple[list[int], Float[Tensor, "moment subspace fraction"], bool]:
    """Dimension at each fraction, mean and variance of ||P||^2, and whether V ran out of
    directions."""
    UU, VV, UV = squares
    found = torch.zeros(2, len(SUBSPACES), len(fractions), dtype=torch.float64)
    ks, cut = [], False
    svd = held = spread = None
    for f, fraction in enumerate(fractions):
        if is_scalar(v, fraction):
            ks.append(0)
            found[0, :2, f] = UV * UV / VV
            n = torch.Size(v.shape).numel()
            found[0, 2, f], found[1, 2, f] = bases.energy_null(UU, UU * UU, 1, n)
            continue
        if svd is None or held is None or spread is None:
            svd = left_svd(v, method="exact")
            held, spread = along(svd.vectors, u), fourth(u)
        k, r = width(fraction, svd, tuple(v.shape), of), svd.vectors.shape[1]
        cut |= of == "size" and k < round(fraction * min(v.shape))
        ks.append(k)
        found[0, 0, f] = held[:k].sum()
        # k of r directions, drawn without replacement
        found[0, 1, f] = k * held.mean()
        found[1, 1, f] = k * (1 - k / r) * held.var() if r > 1 else 0.0
        found[0, 2, f], found[1, 2, f] = bases.energy_null(UU, spread, k, v.shape[0])
    return ks, found, cut
