"""The drift ledger along a fine-tune: which term leaves its null first?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.drift.ledger import HEADLINE, DriftLedger
from analyses.drift.terms import TERMS
from analyses.figures import legend_below, name_ticks
from probes import figures
from probes.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SERIES = (*TERMS, "headline")


@dataclass(frozen=True)
class DriftCourse(Result):
    """Terms and headline at every step of a fine-tune, in units of their nulls."""

    reference: str
    steps: tuple[str, ...]
    value: Float[Tensor, "step series"]
    """In the order of `SERIES`."""
    low: Float[Tensor, "step series"]
    high: Float[Tensor, "step series"]

    @classmethod
    def of(cls, ledger: DriftLedger, steps: Sequence[str]) -> "DriftCourse":
        """The steps are labels of the ledger, in the order of training."""
        unknown = [s for s in steps if s not in ledger.labels]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is not in the ledger, which holds {', '.join(ledger.labels)}"
            )
        rows = [ledger.labels.index(s) for s in steps]
        heads = torch.tensor([ledger.headline(s) for s in steps], dtype=torch.float64)
        parts = (ledger.value, ledger.low, ledger.high)
        joined = [torch.cat([p[rows], heads[:, [k]]], 1) for k, p in enumerate(parts)]
        return cls(ledger.reference, tuple(steps), *joined, record=ledger.record)

    def first(self, term: str) -> str | None:
        """The first step from which on the term's interval excludes its null's 95th percentile at
        this step and all later ones; None if it never stays outside."""
        outside = (self.low[:, SERIES.index(term)] > 1).tolist()
        inside = [i for i, out in enumerate(outside) if not out]
        start = inside[-1] + 1 if inside else 0
        return self.steps[start] if start < len(self.steps) else None

    @property
    def order(self) -> tuple[tuple[str, str | None], ...]:
        """Terms with their first step outside the null, the earliest first; at one step the term
        that is further out comes first."""
        firsts = [(term, self.first(term)) for term in TERMS]

        def rank(item: tuple[str, str | None]) -> tuple[int, float]:
            if item[1] is None:
                return len(self.steps), 0.0
            i = self.steps.index(item[1])
            return i, -float(self.low[i, SERIES.index(item[0])])

        return tuple(sorted(firsts, key=rank))

    def frame(self) -> "pd.DataFrame":
        """One row per step and series."""
        import pandas as pd

        rows = [
            {
                "step": step,
                "term": term,
                "value": float(self.value[i, k]),
                "low": float(self.low[i, k]),
                "high": float(self.high[i, k]),
            }
            for i, step in enumerate(self.steps)
            for k, term in enumerate(SERIES)
        ]
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Every term against the step, with its interval; shaded: inside the null."""
        ax = figures.axes(ax, 5.6, 4.2)
        x = range(len(self.steps))
        with figures.theme():
            ax.axhspan(0, 1, color=figures.PALETTE[7], alpha=0.18, lw=0, label="inside the null")
            for k, term in enumerate(SERIES):
                look = figures.style(k) if k < len(TERMS) else HEADLINE
                low, high = self.low[:, k].numpy(), self.high[:, k].numpy()
                ax.fill_between(x, low, high, alpha=0.12, lw=0, color=look["color"])
                ax.plot(x, self.value[:, k].numpy(), label=term, **look)
            ax.set_yscale("symlog", linthresh=1.0)
            ax.set_ylim(bottom=-0.05)
            lines = name_ticks(ax, self.steps)
            ax.set(
                ylabel="95th percentiles of the term's own null",
                title=f"Drift from {self.reference}, step by step",
            )
            legend_below(ax, "term, 95 % interval", lines)
        return ax

    def __str__(self) -> str:
        said = [f"{term} {'never' if step is None else 'at ' + step}" for term, step in self.order]
        return f"beyond its null first: {', '.join(said)}"
