"""What `selectivity` finds: behaviour of edited models, with intervals and contrasts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from analyses.subspaces.projections import Part, Subspace
from analyses.subspaces.selectivity_intervals import difference, mean
from probes.results import Result
from probes.scores import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

DRAWS = 20
"""Random subspaces that a claim needs."""

ENDS = ("aligned", "tuned")
"""The first two rows of every result: nothing added, and the whole update added."""


@dataclass(frozen=True)
class Selectivity(Result):
    """Behaviour of the aligned model with parts of an update, by subspace and fraction."""

    alignment: str
    update: str
    fractions: tuple[float, ...]
    of: str
    behaviours: tuple[str, ...]
    harmful: tuple[bool, ...]
    """Whether each behaviour is one on harmful requests."""
    groups: tuple[tuple[str, ...], ...]
    """`groups[behaviour][prompt]`."""
    cells: tuple[dict[str, Any], ...]
    """What was applied in each row after those of `ENDS` (the fields of `Projected`)."""
    energy: Float[Tensor, " row"]
    """Squared norm of what was added over that of the whole update."""
    values: Float[Tensor, "row prompt"]
    """One number a prompt, those of all behaviours one after the other."""
    draws: int
    """Random subspaces drawn for each cell of the two random kinds."""
    notes: tuple[str, ...] = ()

    def rows(self, subspace: Subspace, fraction: float, part: Part, matched: bool) -> list[int]:
        """Rows of one cell: one, or as many as there are draws."""
        wanted = {"subspace": subspace, "fraction": fraction, "part": part, "matched": matched}
        found = [i + 2 for i, c in enumerate(self.cells) if wanted.items() <= c.items()]
        if not found:
            raise ValueError(
                f"{part} {subspace} at {fraction:g}{' matched' if matched else ''} was not "
                "measured: see frame() for what was"
            )
        return found

    def value(self, rows: int | Sequence[int], behaviour: str) -> Interval:
        """Mean over prompts (and draws) with its 95 % interval over topics
        (`selectivity_intervals.mean`)."""
        return mean(*self._of(rows, behaviour))

    def change(
        self, rows: int | Sequence[int], behaviour: str, other: int | Sequence[int] = 0
    ) -> Interval:
        """Mean minus that of other rows (the aligned model) on the same prompts, with its paired
        95 % interval over topics (`selectivity_intervals.difference`); exactly 0 for one model."""
        values, groups = self._of(rows, behaviour)
        rest = self._of(other, behaviour)[0]
        same = _list(rows) == _list(other) or not self.energy[_list(rows) + _list(other)].any()
        return Interval(0.0, 0.0, 0.0) if same else difference(values, rest, groups)

    def selective(
        self, fraction: float, part: Part = "parallel", *, matched: bool = True
    ) -> dict[str, Interval]:
        """For each behaviour, top-k minus random subspaces of the same dimension, paired.

        A selective subspace shows a difference in harmful behaviour that useful behaviour lacks.
        """
        top, random = (self.rows(s, fraction, part, matched) for s in ("top-k", "random"))
        return {name: self.change(top, name, random) for name in self.behaviours}

    def spread(
        self, behaviour: str, fraction: float, part: Part = "parallel", *, matched: bool = True
    ) -> float:
        """95th percentile of how far one random subspace lies from the mean of the others, either
        way: what top-k minus random is where top-k is nothing special. NaN with one draw."""
        values, _ = self._of(self.rows("random", fraction, part, matched), behaviour)
        each = values.mean(1)
        n = len(each)
        if n < 2:
            return math.nan
        # from the mean of the others: n / (n - 1) times as far as from that of all
        return float(((each - each.mean()) * n / (n - 1)).abs().quantile(0.95))

    def claimed(
        self, behaviour: str, fraction: float, part: Part = "parallel", *, matched: bool = True
    ) -> bool:
        """Whether top-k differs from random subspaces: the interval of top-k minus random lies
        beyond `spread`, on either side. Never with fewer than 20 draws; a note says so."""
        if len(self.rows("random", fraction, part, matched)) < DRAWS:
            return False
        found = self.selective(fraction, part, matched=matched)[behaviour]
        beyond = self.spread(behaviour, fraction, part, matched=matched)
        return found.low > beyond or found.high < -beyond

    def frame(self) -> "pd.DataFrame":
        """One row per cell and behaviour, the ends first; draws are averaged. Rows of top-k have
        top-k minus random, and whether it is claimed, where both were measured."""
        import pandas as pd

        ends = [(name, None, None, None, [row]) for row, name in enumerate(ENDS)]
        cells = dict.fromkeys(
            (c["part"], c["subspace"], c["fraction"], c["matched"]) for c in self.cells
        )
        found = [(*key, self.rows(key[1], key[2], key[0], key[3])) for key in cells]
        rows = []
        for part, subspace, fraction, matched, members in [*ends, *found]:
            contrasted = subspace == "top-k" and (part, "random", fraction, matched) in cells
            for name in self.behaviours:
                value, change = self.value(members, name), self.change(members, name)
                row = {
                    "applied": part,
                    "subspace": subspace,
                    "fraction": fraction,
                    "matched": matched,
                    "energy": float(self.energy[members].mean()),
                    "behaviour": name,
                    "value": value.value,
                    "low": value.low,
                    "high": value.high,
                    "change": change.value,
                    "change_low": change.low,
                    "change_high": change.high,
                    "draws": len(members),
                }
                if contrasted:
                    row |= self._contrast(name, fraction, part, matched)
                rows.append(row)
        return pd.DataFrame(rows)

    def _contrast(self, name: str, fraction: float, part: Part, matched: bool) -> dict[str, Any]:
        d = self.selective(fraction, part, matched=matched)[name]
        return {
            "minus_random": d.value,
            "minus_random_low": d.low,
            "minus_random_high": d.high,
            "random_95": self.spread(name, fraction, part, matched=matched),
            "claimed": self.claimed(name, fraction, part, matched=matched),
        }

    def plot(
        self,
        ax: "Axes | None" = None,
        *,
        behaviour: str | None = None,
        part: Part = "parallel",
        matched: bool = False,
    ) -> "Axes":
        """One behaviour against the fraction, one line a subspace."""
        from analyses.subspaces.selectivity_figure import draw

        return draw(self, behaviour or self.behaviours[0], part, matched, ax)

    def __str__(self) -> str:
        if bool((self.values[0] == self.values[1]).all()):
            return (
                f"selectivity of {self.alignment} for {self.update}: the whole update changes "
                "no measured value, so every change is exactly zero"
            )
        known = {cell["subspace"] for cell in self.cells}
        if not {"top-k", "random"} <= known:
            return (
                f"selectivity of {self.alignment} for {self.update}: {len(self.cells)} cells of "
                f"{', '.join(sorted(known))}; without top-k and random there is no contrast"
            )
        fraction = self.fractions[len(self.fractions) // 2]
        kinds = {(c["part"], c["matched"]) for c in self.cells}
        part, matched = max(kinds, key=lambda kind: (kind[0] == "parallel", kind[1]))
        said = [
            f"{name} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
            + (" (claimed)" if self.claimed(name, fraction, part, matched=matched) else "")
            for name, d in self.selective(fraction, part, matched=matched).items()
        ]
        return (
            f"selectivity of {self.alignment} for {self.update}: top-k minus random at fraction "
            f"{fraction:g} ({part}{', norm-matched' if matched else ''}; {self.draws} draws): "
            f"{'; '.join(said)}"
        )

    def _of(
        self, rows: int | Sequence[int], behaviour: str
    ) -> tuple[Float[Tensor, "row prompt"], tuple[str, ...]]:
        """The values of each prompt in the rows, and the prompts' topics."""
        if behaviour not in self.behaviours:
            raise ValueError(
                f"unknown behaviour {behaviour!r}: measured were {', '.join(self.behaviours)}"
            )
        b = self.behaviours.index(behaviour)
        start = sum(len(g) for g in self.groups[:b])
        values = self.values[_list(rows), start : start + len(self.groups[b])].double()
        return values, self.groups[b]


def _list(rows: int | Sequence[int]) -> list[int]:
    return [rows] if isinstance(rows, int) else list(rows)
