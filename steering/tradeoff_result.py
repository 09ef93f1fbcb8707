"""`Tradeoff`: what `steering.tradeoff` measured and fitted, with its tables and its figure."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.scores import Interval
from steering.tradeoff_law import QUARTER, SPAN, AlignmentFit, HelpfulnessFit
from steering.tradeoff_measure import GAPS, Measured

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ALIGNMENT = ("a", "b0", "a_fixed", "b0_fixed", "slope_B")
HELPFULNESS = tuple(
    f"{name}{suffix}"
    for suffix in ("", "4")
    for name in ("odds", "b", "odds_fixed", "b_fixed", "slope_P")
)
ASSUMPTIONS = ("slope_change", "slope_sd")
JOINT = ("optimum", "small_optimum")
ESTIMATES = (*ALIGNMENT, *HELPFULNESS, *ASSUMPTIONS, *JOINT)
"""Free and fixed (to the measured values at r = 0) parameters of the laws; log-log slopes; norms
of the largest net benefit on the fitted curves and by the closed form. `4` marks the four-choice
read."""
LAWS = ("constant", "linear", "quadratic", "full")
"""What is compared in the window by AIC."""


@dataclass(frozen=True)
class Tradeoff(Measured):
    """The measurements, with fits, slopes, optimum and null. Intervals are 95 %.

    Limits are BCa over prompts (by topic) and items, each resampled on its own, with every fit
    made again; those of rates of plus and minus one labels are Wilson's.
    """

    B: Float[Tensor, "strength 3"]
    """Alignment B(r) = mean label, -1 to 1: value, low, high."""
    P: Float[Tensor, "strength 3"]
    """P(correct) over the full vocabulary: value, low, high."""
    P4: Float[Tensor, "strength 3"]
    """P(correct) renormalised over the four candidates: value, low, high."""
    estimates: Float[Tensor, "estimate 3"]
    """Value, low, high of each of `ESTIMATES`; NaN where it does not exist."""
    criteria: Float[Tensor, "quantity law"]
    """AIC in the window: rows B, P, P4; columns constant, linear, quadratic, full."""
    support: Float[Tensor, "quantity law"]
    """Share of resamples in which each law has the lowest AIC; a law is decided for by 0.95."""
    window: tuple[float, float]
    """Strengths on one side of 0 in which slopes and criteria were asked for."""
    weight: float
    """w of the net benefit `w B(r) + P(r)`."""
    read: str
    """Which P stands in the net benefit: full or four."""
    chosen: float | None
    """Norm chosen on validation prompts and items; None: none was."""
    gain: Float[Tensor, " 3"]
    """`w (B(r) - B(0)) + P(r) - P(0)` at the chosen norm: value, low, high."""
    null_strengths: Float[Tensor, " null"]
    null_B: Float[Tensor, "direction null"]
    """B of the random directions, same prompts."""
    null_P: Float[Tensor, "direction null"]
    null_P4: Float[Tensor, "direction null"]

    def __getitem__(self, name: str) -> Interval:
        """One of `ESTIMATES`: value, low, high."""
        if name not in ESTIMATES:
            raise KeyError(f"no estimate {name!r}: choose one of {', '.join(ESTIMATES)}")
        return Interval(*self.estimates[ESTIMATES.index(name)].tolist())

    @property
    def alignment_fit(self) -> AlignmentFit:
        """The law of B with both parameters free."""
        return AlignmentFit(self["a"].value, self["b0"].value)

    def helpfulness_fit(self, read: str | None = None) -> HelpfulnessFit:
        """The law of P (`full`) or P4 (`four`) with both parameters free."""
        four = (read or self.read) == "four"
        a, b = (self[name + "4" * four].value for name in ("odds", "b"))
        return HelpfulnessFit(a, b, *((QUARTER, SPAN) if four else (0.0, 1.0)))

    @property
    def null_gain(self) -> Float[Tensor, " direction"]:
        """The gain of every random direction at the chosen norm; empty if not measured there."""
        nothing = torch.zeros(0, dtype=torch.float64)
        if self.chosen is None:
            return nothing
        at = (self.null_strengths == self.chosen).nonzero().flatten()
        if not len(at):
            return nothing
        P, null = (self.P4, self.null_P4) if self.read == "four" else (self.P, self.null_P)
        i = int(at[0])
        rise = self.null_B[:, i] - self.B[self.zero, 0]
        return self.weight * rise + null[:, i] - P[self.zero, 0]

    @property
    def claimed(self) -> bool | None:
        """Whether the gain's interval excludes the 95th percentile of at least 20 random
        directions; None where that was not measured."""
        if len(self.null_gain) < 20:
            return None
        return bool(self.gain[1] > self.null_gain.quantile(0.95))

    @property
    def beneficial(self) -> tuple[float, float] | None:
        """Norms around the optimum at which the fitted net benefit is above that at 0."""
        best = self["optimum"].value
        if not math.isfinite(best) or best == 0:
            return None
        r = torch.linspace(*self.strengths[[0, -1]].tolist(), 4001, dtype=torch.float64)  # pyright: ignore
        zero = torch.zeros(1, dtype=torch.float64)
        above = self.net(r) > self.net(zero) + 1e-12
        place = int((r - best).abs().argmin())
        left, right = place, place
        while left > 0 and above[left - 1]:
            left -= 1
        while right < len(r) - 1 and above[right + 1]:
            right += 1
        return float(r[left]), float(r[right])

    def net(self, r: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The fitted net benefit `w B(r) + P(r)`."""
        return self.weight * self.alignment_fit.at(r) + self.helpfulness_fit().at(r)

    def best_law(self, quantity: str) -> str:
        """The law of lowest AIC for "B", "P" or "P4"."""
        row = self.criteria[("B", "P", "P4").index(quantity)]
        return LAWS[int(row.argmin())]

    def frame(self) -> "pd.DataFrame":
        """One row a strength: means with limits, fitted values, what the laws assume, the null."""
        import pandas as pd

        columns: dict[str, Any] = {"strength": self.strengths.tolist()}
        fits = (self.alignment_fit, self.helpfulness_fit("full"), self.helpfulness_fit("four"))
        for name, curve in zip(("B", "P", "P4"), fits, strict=True):
            table = getattr(self, name)
            for i, end in enumerate(("", "_low", "_high")):
                columns[name + end] = table[:, i].tolist()
            columns[name + "_fit"] = curve.at(self.strengths).tolist()
        columns["change_norm"] = self.change.mean(1).tolist()
        for i, shape in enumerate(GAPS):
            columns[f"gap_{shape}"] = self.gaps[:, :, i].mean(1).tolist()
        for name in ("B", "P", "P4"):
            null, zero = getattr(self, f"null_{name}"), getattr(self, name)[self.zero, 0]
            found = dict(
                zip(
                    self.null_strengths.tolist(),
                    (null - zero).abs().quantile(0.95, 0).tolist() if len(null) else [],
                    strict=bool(len(null)),
                )
            )
            columns[f"null_change_{name}_95"] = [found.get(r) for r in columns["strength"]]
        return pd.DataFrame(columns)

    def laws(self) -> "pd.DataFrame":
        """One row an estimate: value, low, high."""
        import pandas as pd

        table = pd.DataFrame(self.estimates.tolist(), columns=["value", "low", "high"])
        table.insert(0, "estimate", ESTIMATES)
        return table

    def comparison(self) -> "pd.DataFrame":
        """One row for B, P and P4: AIC above the best law's, in the window, and the share of
        resamples in which each law is the best."""
        import pandas as pd

        above = self.criteria - self.criteria.amin(1, keepdim=True)
        columns = [*LAWS, *(f"share_{name}" for name in LAWS)]
        rows = torch.cat([above, self.support], 1).tolist()
        return pd.DataFrame(rows, columns=columns, index=["B", "P", "P4"])

    def plot(self, ax: "Axes | None" = None, panel: str = "alignment") -> "Axes":
        """Four panels: B(r) and P(r) stacked with fits and the beneficial region, B against P with
        r beside the points, log-log slopes. On given axes one of them: `alignment`, `helpfulness`,
        `pareto` or `slopes`."""
        from steering.tradeoff_figure import draw

        return draw(self, ax, panel)

    def __str__(self) -> str:
        said = f"B slope {_said(self['slope_B'])}, P slope {_said(self['slope_P'])} in "
        said += f"|r| {min(map(abs, self.window)):g} to {max(map(abs, self.window)):g}"
        if self.chosen is not None:
            said += f"; chosen r = {self.chosen:g}, gain {_said(Interval(*self.gain.tolist()))}"
            if len(self.null_gain):
                said += (
                    f", null 95 % {self.null_gain.quantile(0.95):.3f} of "
                    f"{len(self.null_gain)} random directions"
                )
        return f"trade-off at {', '.join(self.sites)}: {said}"


def _said(found: Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
