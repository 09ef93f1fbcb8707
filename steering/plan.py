"""What a sweep has to measure: every cell, its nulls and the unsteered model, each once."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from probes.model import HookedModel
from steering.applied import Steering
from steering.cells import Cells, key_of, measure_key, refuse_edits
from steering.effects import Measure
from steering.grid import Grid


class Plan(NamedTuple):
    """Which measurements a sweep needs, by key; equal ones are made once."""

    model: HookedModel
    grid: Grid
    measures: Mapping[str, Measure]
    null_measures: frozenset[str]
    seen: Mapping[str, str]

    @classmethod
    def of(
        cls,
        model: HookedModel,
        grid: Grid,
        effects: Mapping[str, Measure],
        costs: Mapping[str, Measure],
        null_costs: bool,
        resumable: bool,
    ) -> "Plan":
        refuse_edits(model, "a sweep")
        if not effects:
            raise ValueError("no effect was given: name at least one measure of what should change")
        if both := set(effects) & set(costs):
            raise ValueError(f"{', '.join(sorted(both))} is effect and cost: use two names")
        measures = {**effects, **costs}
        seen = {}
        for name, measure in measures.items():
            try:
                seen[name] = measure_key(measure)
            except ValueError:  # only a folder needs to tell measures of two runs apart
                if resumable:
                    raise
                seen[name] = ""
        for cell in grid.cells:  # wrong sites, units and values are said before anything is run
            for what in (grid.steering(cell), *grid.null(cell)):
                what.edits(model)
        null = frozenset(measures if null_costs else effects)
        return cls(model, grid, measures, null, seen)

    def key(self, what: Steering | None, name: str) -> str:
        return key_of(self.model, what, f"{name} {self.seen[name]}")

    def jobs(self) -> dict[str, tuple[Steering | None, str]]:
        """Unsteered first, then cell by cell with its nulls behind it."""
        found: dict[str, tuple[Steering | None, str]] = {}
        for name in self.measures:
            found[self.key(None, name)] = None, name
        for cell in self.grid.cells:
            steered, nulls = self.grid.steering(cell), self.grid.null(cell)
            for name in self.measures:
                for what in (steered, *(nulls if name in self.null_measures else ())):
                    if what.strength:
                        found.setdefault(self.key(what, name), (what, name))
        return found


class Passes(NamedTuple):
    """How often a sweep measures the model, and how often it already has."""

    total: int
    done: int


def passes(
    model: HookedModel,
    grid: Grid,
    effects: Mapping[str, Measure],
    costs: Mapping[str, Measure] | None = None,
    *,
    null_costs: bool = False,
    folder: Path | str | None = None,
) -> Passes:
    """What `sweep` with these arguments would run: measures applied to a whole prompt set."""
    plan = Plan.of(model, grid, effects, costs or {}, null_costs, folder is not None)
    kept = Cells(folder)
    jobs = plan.jobs()
    return Passes(len(jobs), sum(kept.get(key) is not None for key in jobs))
