"""Strength, site, operation and vector against effect and cost, every cell beside its null.

Each cell is compared with the unsteered model prompt by prompt. A sweep with a folder may be
killed at any instant and run again: what is finished stays.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from probes.model import HookedModel
from probes.progress import progress as bar
from probes.prompts import prompts_hash
from probes.results import Record, check_finite
from steering import costs as known_costs
from steering import effects as known_effects
from steering.applied import Steering
from steering.cells import Cells
from steering.effects import Measure
from steering.grid import Cell, Grid
from steering.intervals import change_interval
from steering.plan import Plan
from steering.sweep_result import SteeringSweep

RATES = (known_effects.refusals, known_costs.benign_refusals, known_costs.mistakes)
"""Measures that give 0 or 1, also where all of them are 0."""


def sweep(
    model: HookedModel,
    grid: Grid,
    effects: Mapping[str, Measure],
    costs: Mapping[str, Measure] | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    null_costs: bool = False,
    folder: Path | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> SteeringSweep:
    """Measure every cell of the grid, its nulls and the unsteered model.

    `effects` and `costs` are measures by name (`steering.effects`, `steering.costs`, or your own
    function). A measure of your own that gives 0 or 1 says so by an attribute `rate = True`: an
    interval of zeros alone is then that of a rate. `groups` gives topics for a measure's prompts,
    by its name; without them every prompt is its own group. Nulls are run on the effects, with
    `null_costs` on the costs too. The model must be unsteered: no edits in force.

    With a folder every finished measurement is kept in `cells/` by its content, and only missing
    ones are run; equal inputs then give equal bytes however often the run was killed.
    """
    costs = costs or {}
    plan = Plan.of(model, grid, effects, costs, null_costs, folder is not None)
    groups = groups or {}
    if unknown := [name for name in groups if name not in plan.measures]:
        raise ValueError(
            f"groups are given for {', '.join(map(repr, unknown))} and the measures are "
            f"{', '.join(map(repr, plan.measures))}: name each by its measure"
        )
    kept, jobs = Cells(folder), plan.jobs()
    missing = [key for key in jobs if kept.get(key) is None]
    with bar(len(missing), "sweep", progress) as advance:
        for key in missing:
            what, name = jobs[key]
            found = plan.measures[name](model, what)
            check_finite(found, f"{name} of {what or 'the unsteered model'}")
            if found.ndim != 1:
                raise ValueError(
                    f"{name} gave values of shape {tuple(found.shape)}: a measure gives one "
                    "number a prompt"
                )
            kept.put(key, found.double().cpu(), measure=name, applied=str(what or "nothing"))
            advance(1)

    def held(what: Steering | None, name: str) -> Float[Tensor, " prompt"]:
        values = kept.get(plan.key(what, name))
        assert values is not None
        return values

    cells, names, n_null = grid.cells, [*plan.measures], len(grid.kinds)
    shape = (len(cells), len(names))
    value, change, low, high = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
    null = torch.full((*shape, n_null), torch.nan, dtype=torch.float64)
    base: list[Tensor] = []
    for m, name in enumerate(names):
        before = held(None, name)
        base.append(before)
        after = []
        for c, cell in enumerate(cells):
            after.append(_paired(held(grid.steering(cell), name), before, name, cell))
            if name in effects or null_costs:
                for k, what in enumerate(grid.null(cell)):
                    moved = _paired(held(what, name), before, name, cell) - before
                    null[c, m, k] = moved.mean()
        found = torch.stack(after, 1)
        limits = change_interval(
            found, before, groups.get(name), resamples=resamples, seed=seed,
            rate=_is_rate(plan.measures[name]),
        )  # fmt: skip
        value[:, m], change[:, m] = found.mean(0), limits.value
        low[:, m], high[:, m] = limits.low, limits.high
        still = torch.tensor([cell.strength == 0 for cell in cells])
        low[still, m] = high[still, m] = 0.0
    return SteeringSweep(
        vectors=tuple(cell.vector for cell in cells),
        sites=tuple(cell.site for cell in cells),
        operations=tuple(cell.operation for cell in cells),
        strengths=torch.tensor([cell.strength for cell in cells], dtype=torch.float64),
        unit=grid.unit,
        effects=tuple(effects),
        costs=tuple(costs),
        unsteered=torch.stack([before.mean() for before in base]),
        value=value,
        change=change,
        low=low,
        high=high,
        null=null,
        kinds=grid.kinds,
        n_prompts=tuple(len(before) for before in base),
        n_groups=tuple(
            len(set(groups.get(name, range(len(before)))))
            for name, before in zip(names, base, strict=True)
        ),
        keys=tuple(plan.seen[name] for name in names),
        record=Record(
            models=(model.name,),
            fingerprints=(model.fingerprint,),
            template_hash=model.template.hash,
            prompts_hash=_asked(model, plan.measures[names[0]]),
            seeds=(seed,),
            dtype=str(model.dtype).removeprefix("torch."),
            engine=model.engine.name,
            settings={
                "resamples": resamples,
                "schedule": str(grid.schedule),
                "condition": str(grid.condition),
                "prompts": {name: _asked(model, m) for name, m in plan.measures.items()},
            },
        ),
    )


def _paired(
    values: Float[Tensor, " one"], before: Float[Tensor, " other"], name: str, cell: Cell
) -> Float[Tensor, " one"]:
    if values.shape != before.shape:
        raise ValueError(
            f"{name} gave {len(values)} values at {cell} and {len(before)} unsteered: a measure "
            "gives the same prompts in the same order whatever is applied"
        )
    return values


def _is_rate(measure: Measure) -> bool:
    while isinstance(measure, functools.partial):
        measure = measure.func
    return getattr(measure, "rate", measure in RATES)


def _asked(model: HookedModel, measure: Measure) -> str:
    """Hash of the prompts put into a measure with `partial`; empty where they cannot be seen."""
    held = getattr(measure, "keywords", {})
    if isinstance(reference := held.get("reference"), known_costs.Reference):
        return reference.key
    return prompts_hash(model.template.render_all(held["prompts"])) if held.get("prompts") else ""
