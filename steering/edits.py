"""From an operation at a site to an edit of the model: strength, schedule and condition put in."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probes.engines import Edit, Where
from probes.model import HookedModel
from probes.results import check_finite
from probes.sites import HEADED, READ_ONLY, Site, Unsupported
from steering import ops
from steering.schedule import Condition, Gate, Schedule

ADDING = ("add", "add_keep_norm")
"""Operations whose strength multiplies a vector and has a unit."""

MIXING = ("ablate", "clamp", "affine", "rotate", "rotate_toward")
"""Operations whose strength is the share of the full operation, 0 to 1."""

OPERATIONS = (*ADDING, *MIXING)

VALUED = ("clamp", "affine", "rotate", "rotate_toward")
"""Operations that take a value beside the vector."""

Function = Callable[[Tensor, "float | Tensor"], Tensor]
"""`(h, strength) -> h`, strength a number or one per token."""


@dataclass(frozen=True)
class Scale:
    """What a strength at a site can be measured in; None where it was not measured."""

    sigma: float | None = None
    """Standard deviation, within classes, of projections on the vector's unit. Head offsets of ITI
    and PAS carry that of all rows together, as their papers do."""
    norm: float | None = None
    """Mean norm of the site's activations."""


def check_operation(operation: str, site: Site, vector: Tensor, value: Tensor | None) -> None:
    """Refuse a vector or a value of a shape that the operation does not take."""
    rows, width = (1 if vector.ndim == 1 else len(vector)), vector.shape[-1]
    if operation in ADDING and vector.ndim != 1:
        raise ValueError(
            f"{operation} takes one vector a site, {site} has {rows}: a subspace can be ablated, "
            "clamped or set, not added"
        )
    if operation.startswith("rotate") and rows != 2:
        raise ValueError(f"{operation} takes a plane, two rows; {site} has {rows}")
    if operation not in VALUED:
        return
    if value is None:
        raise ValueError(
            f"{operation} needs a value at every site: give `values`, at {site} there is none"
        )
    check_finite(value, f"the value of {operation} at {site}")
    wanted = {"clamp": f"one number a row, [{rows}]", "affine": f"a mean, [{width}]"}
    fits = {"clamp": value.shape == (rows,), "affine": value.shape == (width,)}
    if not fits.get(operation, value.numel() == 1):
        raise ValueError(
            f"the value of {operation} at {site} has shape {list(value.shape)}, expected "
            f"{wanted.get(operation, 'one angle in degrees')}"
        )


def check_strength(operation: str, strength: float) -> None:
    """Refuse, for an operation that mixes, what is no share of it (NaN is none either)."""
    if operation in MIXING and not 0 <= strength <= 1:
        raise ValueError(
            f"strength {strength:g} of {operation}: expected the share of the full operation, 0 to "
            "1; to go further along a vector use 'add'"
        )


def check_width(model: HookedModel, site: Site, vector: Tensor) -> None:
    """Refuse a vector that is not as wide as the model is at the site; width 1 would broadcast."""
    width = model.layout.width(site)
    if vector.shape[-1] != width and site.part not in READ_ONLY:  # those are refused by the engine
        raise ValueError(
            f"the vector at {site} has width {vector.shape[-1]}, {model.name} has {width} there: "
            "give a vector of that width"
        )


def multiplier(unit: str, vector: Tensor, scale: Scale, site: Site) -> float:
    """What the raw vector is multiplied by for strength 1 in this unit.

    raw: 1. unit: the vector gets norm 1. fraction: the mean norm of the site's activations.
    sigma: the spread of projections within classes.
    """
    if unit == "raw":
        return 1.0
    target = {"unit": 1.0, "fraction": scale.norm, "sigma": scale.sigma}.get(unit, -1.0)
    if target == -1.0:
        raise ValueError(f"unknown unit of strength {unit!r}: choose raw, unit, fraction or sigma")
    if not target:
        missing = "mean norm of the activations" if unit == "fraction" else "sigma of projections"
        raise ValueError(
            f"strength in {unit!r} needs the {missing} at {site}, which this vector does not "
            "carry: make it with a recipe that measures it, or use unit='raw' or 'unit'"
        )
    return target / float(vector.double().norm())


def function_of(operation: str, vector: Tensor, value: Tensor | None) -> Function:
    """The operation with its vector (or basis) and value put in, cast once per dtype and device."""
    if operation in ADDING:
        adding, added = getattr(ops, operation), _cast_once(vector)
        return lambda h, strength: adding(h, added(h), strength)
    basis = ops.orthonormal(vector)
    Q = _cast_once(basis)
    if operation == "ablate":
        return lambda h, strength: ops.ablate(h, Q(h), strength)
    if value is None:
        raise ValueError(f"{operation} needs a value at every site: give `values`")
    if operation in ("clamp", "affine"):
        # `ops.affine` is a clamp to the mean's coordinates, found here once and in float32
        goal = _cast_once(value if operation == "clamp" else basis @ value.to(basis))
        return lambda h, strength: ops.clamp(h, Q(h), goal(h), strength)
    degrees, toward = float(value), operation == "rotate_toward"
    return lambda h, strength: ops.rotate(h, Q(h), degrees, strength, toward=toward)


def _cast_once(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    made: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(h: Tensor) -> Tensor:
        key = (h.dtype, h.device)
        if key not in made:
            made[key] = tensor.to(h)
        return made[key]

    return like


def edit_of(
    site: Site, function: Function, strength: float, schedule: Schedule, gate: Gate | None
) -> Edit:
    """The edit that does it: at the schedule's tokens, where the gate is open."""
    if not math.isfinite(strength):
        raise ValueError(f"the strength at {site} is {strength}: give a finite number")
    if gate is None and schedule.everywhere:
        return Edit(site, lambda h, _where: function(h, strength), schedule.scope)

    def weighted(h: Tensor, where: Where) -> Tensor:
        weight = strength * schedule.weight(where).to(h.device)
        if gate is not None:
            weight = weight * gate.open.to(h.device)
        if h.ndim == 4:  # a whole part with heads
            weight = weight[:, :, None]
        # where nothing acts nothing may change, not even by rounding
        return torch.where(weight[..., None] != 0, function(h, weight), h)

    return Edit(site, weighted, schedule.scope)


def gated(
    model: HookedModel, condition: Condition | None, sites: Sequence[Site]
) -> tuple[Gate | None, list[Edit]]:
    """The gate of a condition and the edit by which it listens; both empty without a condition.

    A condition is read in the pass that it decides on, so it stands at the first of the edits'
    sites or before it. For ablation at every write that leaves `0.resid_pre` alone.
    """
    if condition is None:
        return None, []
    site = condition.site.resolve(model.n_layers)
    condition = replace(condition, site=site)
    model.layout.check(site)
    if site.part in READ_ONLY:
        raise Unsupported(f"a condition cannot be read at {site}: choose a part of the stream")
    if site.part in HEADED and site.head is None:
        raise ValueError(
            f"the condition is read at {site}, which has several heads: name one, for example "
            f"{site}.0"
        )
    width = model.layout.width(site)
    if len(condition.unit) != width:
        raise ValueError(
            f"the condition's vector has width {len(condition.unit)}, {condition.site} of "
            f"{model.name} has {width}"
        )
    late = [s for s in sites if model.layout.order(s) < model.layout.order(condition.site)]
    if late:
        raise ValueError(
            f"the condition is read at {condition.site}, after the edit at {late[0]} that it "
            "decides on: put the condition at the same site or an earlier one"
        )
    gate = Gate(condition)
    return gate, [Edit(condition.site, gate.listen)]
