"""What `selectivity` finds: behaviour of edited models, with intervals and contrasts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.subspaces.grouping import ratio_over
from analyses.subspaces.projections import Part, Subspace
from probes.results import Result
from probes.scores import Interval, wilson

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

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
        """Mean over prompts (and draws) with its 95 % interval: Wilson's where every prompt is a
        topic of its own and the values are 0 or 1, else BCa over topics."""
        values, groups = self._of(rows, behaviour)
        single = isinstance(rows, int) or len(rows) == 1
        if (
            single
            and len(set(groups)) == len(groups)
            and bool(((values == 0) | (values == 1)).all())
        ):
            return wilson(int(values.sum()), len(values))
        return _bootstrap(values, groups)

    def change(
        self, rows: int | Sequence[int], behaviour: str, other: int | Sequence[int] = 0
    ) -> Interval:
        """Mean minus that of other rows (the aligned model) on the same prompts, with its paired
        BCa interval over topics."""
        values, groups = self._of(rows, behaviour)
        return _bootstrap(values - self._of(other, behaviour)[0], groups)

    def selective(
        self, fraction: float, part: Part = "parallel", *, matched: bool = True
    ) -> dict[str, Interval]:
        """For each behaviour, top-k minus random subspaces of the same dimension, paired.

        A selective subspace shows a difference in harmful behaviour that useful behaviour lacks.
        """
        top, random = (self.rows(s, fraction, part, matched) for s in ("top-k", "random"))
        return {name: self.change(top, name, random) for name in self.behaviours}

    def frame(self) -> "pd.DataFrame":
        """One row per cell and behaviour, the ends first; draws are averaged."""
        import pandas as pd

        found, rows = {("aligned",): [0], ("tuned",): [1]}, []
        for i, cell in enumerate(self.cells):
            key = tuple(cell[k] for k in ("part", "subspace", "fraction", "matched"))
            found.setdefault(key, []).append(i + 2)
        for key, members in found.items():
            part, subspace, fraction, matched = (*key, None, None, None)[:4]
            for name in self.behaviours:
                value, change = self.value(members, name), self.change(members, name)
                rows.append(
                    {
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
                )
        return pd.DataFrame(rows)

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
            for name, d in self.selective(fraction, part, matched=matched).items()
        ]
        return (
            f"selectivity of {self.alignment} for {self.update}: top-k minus random at fraction "
            f"{fraction:g} ({part}{', norm-matched' if matched else ''}; {self.draws} draws): "
            f"{'; '.join(said)}"
        )

    def _of(self, rows: int | Sequence[int], behaviour: str) -> tuple[Tensor, tuple[str, ...]]:
        """Mean over the rows of each prompt's value, and the prompts' topics."""
        if behaviour not in self.behaviours:
            raise ValueError(
                f"unknown behaviour {behaviour!r}: measured were {', '.join(self.behaviours)}"
            )
        b = self.behaviours.index(behaviour)
        start = sum(len(g) for g in self.groups[:b])
        chosen = [rows] if isinstance(rows, int) else list(rows)
        values = self.values[chosen, start : start + len(self.groups[b])].double().mean(0)
        return values, self.groups[b]


def _bootstrap(values: Tensor, groups: Sequence[str]) -> Interval:
    return ratio_over(values, torch.ones_like(values), groups)
