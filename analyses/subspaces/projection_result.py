"""What `projection_energy` finds: shares of an update in three kinds of subspace, with nulls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.subspaces import bases
from analyses.subspaces.grouping import By, grouped, layers_of, ratio_over
from analyses.subspaces.projections import SUBSPACES, Subspace
from probes import figures
from probes.results import Result
from probes.scores import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ProjectionEnergy(Result):
    """Squared norms of an update U and of its parts in three kinds of subspace, by weight.

    Shares are formed of sums over weights, as in the released code, never as means of shares. Every
    weight where U or V differs from zero is in the sums; where one of them is zero there is no
    subspace, and nothing of U is kept.
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
    """Dimension k of the subspace of each weight; 0 stands for the projection onto V itself, or for
    none where U or V is zero."""
    squares: Float[Tensor, "three tensor"]
    """||U||^2, ||V||^2 and <U, V> of each weight, float64."""
    kept: Float[Tensor, "subspace fraction tensor"]
    """||P||^2 for top-k, and its exact mean over draws for random-k and random, float64."""
    variance: Float[Tensor, "subspace fraction tensor"]
    """Variance of ||P||^2 over draws, exactly; 0 for top-k. NaN for random-k where V's
    decomposition is a certified one, which leaves it unknown."""
    skipped: int
    """Weights without a subspace, because U or V is zero there."""
    capped: int
    """Weights where some fraction asks for more directions than V has, and got those it has."""
    certified: int = 0
    """Decompositions of V that were randomised and certified; all others are exact."""
    notes: tuple[str, ...] = ()

    @property
    def elsewhere(self) -> float:
        """Share of ||U||^2 in weights where V is zero, 0 to 1: alignment never touched them."""
        return self._elsewhere(range(len(self.tensors)))

    def share(
        self, subspace: Subspace, fraction: float, rows: Sequence[int] | None = None
    ) -> Interval:
        """E = sum of ||P||^2 / sum of ||U||^2, 0 to 1, of all weights or of some of them.

        For the random subspaces the value is the mean, and the limits hold 95 % of draws; for top-k
        they are BCa limits over the layers that U changes (NaN with fewer than two), as if they
        were a sample.
        """
        at = self._changed(rows)
        s, f = SUBSPACES.index(subspace), self._at(fraction)
        if not at:
            return Interval(0.0, 0.0, 0.0)
        kept, total = self.kept[s, f, at], self.squares[0, at]
        if subspace != "top-k":
            value = float(kept.sum() / total.sum())
            sd = float(self.variance[s, f, at].sum().sqrt() / total.sum())
            return Interval(value, *(bases.beta_quantile(value, sd, p) for p in (0.025, 0.975)))
        return ratio_over(kept, total, layers_of([self.tensors[i] for i in at]))

    def null(self, fraction: float, rows: Sequence[int] | None = None) -> bases.Null:
        """E of uniformly random subspaces of the same dimensions: mean, deviation, percentile."""
        at, f = self._changed(rows), self._at(fraction)
        if not at:
            return bases.Null(0.0, 0.0, 0.0)
        total = float(self.squares[0, at].sum())
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
        ("kind"), or of each weight ("tensor"). Groups that U leaves as they are have none."""
        import pandas as pd

        rows = []
        for group, members in grouped(self.tensors, by).items():
            UU, VV, UV = self.squares[:, members].sum(1).tolist()
            if not UU:
                continue
            for subspace in SUBSPACES:
                for fraction in self.fractions:
                    E = self.share(subspace, fraction, members)
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
                            "cosine_alignment": UV / math.sqrt(UU * VV) if VV else 0.0,
                            "elsewhere": self._elsewhere(members),
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
        if not bool(((self.squares[0] > 0) & (self.squares[1] > 0)).any()):
            return (
                f"projection of {self.update} onto {self.alignment}: nothing differs in any weight "
                f"that both changed ({self.skipped} weights changed by one or none)"
            )
        fraction = self.fractions[len(self.fractions) // 2]
        E, null = self.share("top-k", fraction), self.null(fraction)
        verdict = "above" if self.claimed(fraction) else "not above"
        return (
            f"projection of {self.update} onto {self.alignment}: at fraction {fraction:g} top-k "
            f"holds {E.value:.1%} [{E.low:.1%}, {E.high:.1%}] of the update, random subspaces "
            f"{null.mean:.1%} (95 % below {null.high:.1%}): {verdict} chance; cosine with V "
            f"{self.cosine_alignment:+.3f}; {self.elsewhere:.1%} of the update lies in weights that "
            "alignment left as they were"
        )

    def _changed(self, rows: Sequence[int] | None) -> list[int]:
        """Those of the weights where U differs from zero; the others add to none of its sums."""
        given = range(len(self.tensors)) if rows is None else rows
        return [i for i in given if self.squares[0, i] > 0]

    def _elsewhere(self, rows: Sequence[int]) -> float:
        UU, VV, _ = self.squares[:, list(rows)]
        total = float(UU.sum())
        return float(UU[VV == 0].sum()) / total if total else 0.0

    def _at(self, fraction: float) -> int:
        if fraction not in self.fractions:
            raise ValueError(
                f"fraction {fraction} was not measured: choose one of "
                f"{', '.join(map(str, self.fractions))}"
            )
        return self.fractions.index(fraction)
