"""What a sweep found: effect and cost of every cell against the unsteered model and the nulls."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.results import Result
from steering.edits import ADDING
from steering.grid import Cell

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ENOUGH = 20
"""Null vectors of one kind without which nothing is claimed."""


@dataclass(frozen=True)
class SteeringSweep(Result):
    """Effects and costs of every cell as changes against the unsteered model, with their nulls."""

    vectors: tuple[str, ...]
    sites: tuple[str, ...]
    operations: tuple[str, ...]
    strengths: Float[Tensor, " cell"]
    unit: str
    """Of the strengths of operations that add; those of the others are shares."""
    effects: tuple[str, ...]
    costs: tuple[str, ...]
    """Measures are the effects, then the costs."""
    unsteered: Float[Tensor, " measure"]
    value: Float[Tensor, "cell measure"]
    """Mean over prompts when steered."""
    change: Float[Tensor, "cell measure"]
    """Mean over prompts of steered less unsteered."""
    low: Float[Tensor, "cell measure"]
    """95 % limits of the change: BCa bootstrap over groups, paired with the unsteered run."""
    high: Float[Tensor, "cell measure"]
    null: Float[Tensor, "cell measure null"]
    """The same change under each null vector; NaN for measures the nulls were not run on."""
    kinds: tuple[str, ...]
    """Kind of each null vector."""
    n_prompts: tuple[int, ...]
    n_groups: tuple[int, ...]
    keys: tuple[str, ...]
    """Hash of each measure with its prompts; empty where its content cannot be seen."""

    @property
    def measures(self) -> tuple[str, ...]:
        return (*self.effects, *self.costs)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        rows = zip(self.vectors, self.sites, self.operations, self.strengths.tolist(), strict=True)
        return tuple(Cell(*row) for row in rows)

    @cached_property
    def band(self) -> tuple[Float[Tensor, "cell measure"], Float[Tensor, "cell measure"]]:
        """5th and 95th percentile of the null; the outermost over kinds, each by itself, so that
        neither many easy nulls hide a hard one nor a single control is drowned. NaN without."""
        bottom = torch.full_like(self.change, torch.nan)
        top = bottom.clone()
        for kind in dict.fromkeys(self.kinds):
            own = self.null[..., [k == kind for k in self.kinds]]
            bottom = torch.fmin(bottom, own.quantile(0.05, dim=-1))
            top = torch.fmax(top, own.quantile(0.95, dim=-1))
        return bottom, top

    @property
    def claimed(self) -> Bool[Tensor, "cell measure"]:
        """Where the interval of the change lies beyond the null's 95th percentile, or for a fall
        below its 5th, with at least 20 null vectors of one kind: a percentile is taken over each
        kind by itself, and few vectors have none."""
        bottom, top = self.band
        beyond = (self.low > top.clamp(min=0)) | (self.high < bottom.clamp(max=0))
        return beyond & (max(Counter(self.kinds).values(), default=0) >= ENOUGH)

    def index(self, measure: str) -> int:
        """Column of a measure."""
        if measure not in self.measures:
            raise KeyError(f"no measure {measure!r}: there are {', '.join(self.measures)}")
        return self.measures.index(measure)

    def best(
        self,
        effect: str | None = None,
        *,
        within: Mapping[str, float] | None = None,
        sign: Literal[1, -1] = 1,
    ) -> Cell:
        """The cell with the largest change of an effect (`sign=-1`: the largest fall) among those
        whose costs rise by no more than `within` says; the weakest strength of several.

        It is chosen, so its own numbers flatter it: choose on validation prompts, run the cell
        again on test prompts, and report `at` of that sweep.
        """
        column = self.index(self.effects[0] if effect is None else effect)
        allowed = torch.ones(len(self.strengths), dtype=torch.bool)
        for cost, most in (within or {}).items():
            allowed &= self.change[:, self.index(cost)] <= most
        if not bool(allowed.any()):
            bounds = ", ".join(f"{cost} {most:g}" for cost, most in (within or {}).items())
            raise ValueError(
                f"no cell stays within {bounds}: sweep weaker strengths, or allow a larger cost"
            )
        rows = [i for i, ok in enumerate(allowed.tolist()) if ok]
        gain = sign * self.change[:, column]
        return self.cells[max(rows, key=lambda i: (float(gain[i]), -abs(self.strengths[i])))]

    def at(self, cell: Cell, *, chosen_on: "SteeringSweep | None" = None) -> "pd.DataFrame":
        """The rows of one cell; refused if it was chosen on the very prompts of this sweep."""
        if chosen_on is not None:
            both = {k for k in self.keys if k} & {k for k in chosen_on.keys if k}
            if both:
                names = [m for m, k in zip(self.measures, self.keys, strict=True) if k in both]
                raise ValueError(
                    f"{', '.join(names)} is measured here on the prompts the cell was chosen on: "
                    "report on a sweep over other prompts"
                )
        if cell not in self.cells:
            raise KeyError(f"this sweep has no cell {cell}")
        frame = self.frame()
        row = self.cells.index(cell)
        n = len(self.measures)
        return frame.iloc[row * n : (row + 1) * n].reset_index(drop=True)

    def frame(self) -> "pd.DataFrame":
        """One row for each cell and measure."""
        import pandas as pd

        bottom, top = self.band
        rows = []
        for c, cell in enumerate(self.cells):
            for m, measure in enumerate(self.measures):
                rows.append(
                    {
                        "vector": cell.vector,
                        "site": cell.site,
                        "operation": cell.operation,
                        "strength": cell.strength,
                        "unit": self.unit if cell.operation in ADDING else "share",
                        "measure": measure,
                        "role": "effect" if measure in self.effects else "cost",
                        "unsteered": float(self.unsteered[m]),
                        "steered": float(self.value[c, m]),
                        "change": float(self.change[c, m]),
                        "low": float(self.low[c, m]),
                        "high": float(self.high[c, m]),
                        "null_05": float(bottom[c, m]),
                        "null_95": float(top[c, m]),
                        "claimed": bool(self.claimed[c, m]),
                        "n": self.n_prompts[m],
                    }
                )
        return pd.DataFrame(rows)

    def plot(
        self,
        ax: "Axes | None" = None,
        kind: str = "pareto",
        *,
        effect: str | None = None,
        cost: str | None = None,
    ) -> "Axes":
        """`pareto`: effect against cost. `strength`: effect against strength with the null's
        band. `layer`: effect by layer and strength."""
        from steering.sweep_figure import layer, pareto, strength

        shown = self.effects[0] if effect is None else effect
        if kind == "pareto":
            if not self.costs:
                raise ValueError("this sweep has no cost: plot kind='strength', or sweep costs too")
            return pareto(self, shown, self.costs[0] if cost is None else cost, ax)
        if kind not in ("strength", "layer"):
            raise ValueError(f"unknown plot {kind!r}: choose pareto, strength or layer")
        return (strength if kind == "strength" else layer)(self, shown, ax)

    def __str__(self) -> str:
        own = [self.index(e) for e in self.effects]
        n = int(self.claimed[:, own].any(1).sum())
        return (
            f"sweep of {len(self.cells)} cells, {', '.join(self.measures)}; in {n} an effect is "
            f"beyond its null ({len(self.kinds)} vectors)"
        )
