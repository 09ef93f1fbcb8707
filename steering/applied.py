"""Apply steering: `with steer(model, vector, 4, unit="sigma"): ...`"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from probes.engines import Edit
from probes.model import HookedModel
from steering.offsets import HeadOffsets
from steering.schedule import ALWAYS, Condition, Schedule
from steering.vector import SteeringVector


@dataclass(frozen=True)
class Steering:
    """A vector or head offsets with a strength in a named unit, a schedule and a condition.

    Units: raw (the vector as it is), unit (norm 1), fraction (of the mean norm of the site's
    activations), sigma (spread of projections within classes). For ablate, clamp, affine and
    rotate the strength is the share of the full operation and has no unit.
    """

    what: SteeringVector | HeadOffsets
    strength: float = 1.0
    unit: str = "raw"
    schedule: Schedule = ALWAYS
    condition: Condition | None = None

    def edits(self, model: HookedModel) -> Sequence[Edit]:
        """The edits it makes of a model; none at strength 0."""
        return self.what.edits(model, self.strength, self.unit, self.schedule, self.condition)

    def __str__(self) -> str:
        unit = "" if self.unit == "raw" else f" {self.unit}"
        return f"{self.what} at strength {self.strength:g}{unit}"


def steer(
    model: HookedModel,
    what: SteeringVector | HeadOffsets,
    strength: float = 1.0,
    *,
    unit: str = "raw",
    schedule: Schedule = ALWAYS,
    condition: Condition | None = None,
) -> AbstractContextManager[None]:
    """While open, everything this model computes is steered; afterwards nothing is left.

    At strength 0 nothing is installed, so outputs are those of the unsteered model bit for bit.
    """
    return model.edit(Steering(what, strength, unit, schedule, condition).edits(model))


def at_budget(
    model: HookedModel,
    what: SteeringVector | HeadOffsets,
    kl: float | None = None,
    **options: Any,
) -> Steering:
    """Steering as strong as a budget allows: `model.generate(p, steer=at_budget(model, v, 0.05))`.

    The budget is `kl` (nats; 0.05 if none is given), `perplexity` or `benign_refusals`; it and the
    other options are those of `steering.budget.solve_strength`, which also says the held-out cost
    and everything tried: call it yourself to keep those.
    """
    from steering.budget import solve_strength  # it applies `Steering` itself

    if kl is None and not {"perplexity", "benign_refusals"} & set(options):
        kl = 0.05
    solved = solve_strength(model, what, kl=kl, **options)
    return solved.steering(what, options.get("condition"))
