"""Ways a model can be steered by an export: as was meant, not at all, and under the known faults."""

from collections.abc import Sequence
from dataclasses import replace

from probes.engines import Edit
from probes.model import HookedModel
from probes.sites import Site
from steering.applied import Steering
from steering.vector import SteeringVector

MEANT, NONE = "as it was made", "not at all"


def ways(model: HookedModel, steering: Steering) -> dict[str, Sequence[Edit]]:
    """The edit that was meant, none, and the faults exports are known for."""
    s = steering
    found: dict[str, Sequence[Edit]] = {MEANT: s.edits(model), NONE: ()}
    if not isinstance(s.what, SteeringVector) or s.what.operation == "add":
        for name, factor in (
            ("twice as strong", 2),
            ("half as strong", 0.5),
            ("the other sign", -1),
        ):
            found[name] = replace(s, strength=factor * s.strength).edits(model)
    if isinstance(s.what, SteeringVector):
        for name, by in (("one block late", 1), ("one block early", -1)):
            moved = _moved(s.what, by)
            if moved is not None:
                found[name] = replace(s, what=moved).edits(model)
    if s.schedule.scope == "all":
        for name, scope in (
            ("at prompt tokens only", "prompt"),
            ("at generated tokens only", "generated"),
        ):
            found[name] = replace(s, schedule=replace(s.schedule, scope=scope)).edits(model)
    return found


def _moved(vector: SteeringVector, by: int) -> SteeringVector | None:
    """The vectors some blocks further on; those that fall off an end are left out."""
    n = vector.origin.n_layers
    where = {s: Site(s.layer + by, s.part, s.head) for s in vector.sites if 0 <= s.layer + by < n}
    if not where:
        return None
    kept = {
        name: {
            new: getattr(vector, name)[old]
            for old, new in where.items()
            if old in getattr(vector, name)
        }
        for name in ("vectors", "values", "scales")
    }
    return replace(vector, **kept)
