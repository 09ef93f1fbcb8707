"""Change language models: steering vectors, head offsets, strengths that mean something.

Names are loaded when they are first used, so that importing this package is immediate. `sweep`,
`lofit` and `tradeoff` are functions of the modules of their names.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steering.applied import Steering as Steering
    from steering.applied import at_budget as at_budget
    from steering.applied import steer as steer
    from steering.artefact import Origin as Origin
    from steering.budget import solve_strength as solve_strength
    from steering.edits import Scale as Scale
    from steering.grid import Grid as Grid
    from steering.heads import HeadRanking as HeadRanking
    from steering.iti import fit_iti as fit_iti
    from steering.iti import rank_heads as rank_heads
    from steering.lofit import LoFiT as LoFiT
    from steering.nulls import random_vectors as random_vectors
    from steering.nulls import shuffled_vectors as shuffled_vectors
    from steering.offsets import HeadOffsets as HeadOffsets
    from steering.preferences import Preference as Preference
    from steering.recipes import train_vector as train_vector
    from steering.refusal_direction import find_refusal_direction as find_refusal_direction
    from steering.schedule import Condition as Condition
    from steering.schedule import Schedule as Schedule
    from steering.sweep import SteeringSweep as SteeringSweep
    from steering.tuning import Training as Training
    from steering.vector import SteeringVector as SteeringVector
    from steering.weights import fold_offsets as fold_offsets
    from steering.weights import fold_vector as fold_vector
    from steering.weights import orthogonalise as orthogonalise

_HOMES = {
    "Condition": "schedule",
    "Grid": "grid",
    "HeadOffsets": "offsets",
    "HeadRanking": "heads",
    "LoFiT": "lofit",
    "Origin": "artefact",
    "Preference": "preferences",
    "Scale": "edits",
    "Schedule": "schedule",
    "Steering": "applied",
    "SteeringSweep": "sweep",
    "SteeringVector": "vector",
    "Training": "tuning",
    "at_budget": "applied",
    "find_refusal_direction": "refusal_direction",
    "fit_iti": "iti",
    "fold_offsets": "weights",
    "fold_vector": "weights",
    "orthogonalise": "weights",
    "random_vectors": "nulls",
    "rank_heads": "iti",
    "shuffled_vectors": "nulls",
    "solve_strength": "budget",
    "steer": "applied",
    "train_vector": "recipes",
}

__all__ = [
    "Condition",
    "Grid",
    "HeadOffsets",
    "HeadRanking",
    "LoFiT",
    "Origin",
    "Preference",
    "Scale",
    "Schedule",
    "Steering",
    "SteeringSweep",
    "SteeringVector",
    "Training",
    "at_budget",
    "find_refusal_direction",
    "fit_iti",
    "fold_offsets",
    "fold_vector",
    "orthogonalise",
    "random_vectors",
    "rank_heads",
    "shuffled_vectors",
    "solve_strength",
    "steer",
    "train_vector",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'steering' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"steering.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:  # for completion in notebooks
    return [*globals(), *__all__]
