"""Compare checkpoints of one model: token shift, separation, refusals, the report."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analyses.checkpoints import Checkpoints as Checkpoints
    from analyses.maps import Maps as Maps
    from analyses.maps import map_activations as map_activations
    from analyses.refusals import RefusalRates as RefusalRates
    from analyses.refusals import refusal_rates as refusal_rates
    from analyses.report import Report as Report
    from analyses.separation import Separation as Separation
    from analyses.separation import measure_separation as measure_separation
    from analyses.tokens.shift import TokenShift as TokenShift
    from analyses.tokens.shift import token_shift as token_shift

_HOMES = {
    "Checkpoints": "checkpoints",
    "Maps": "maps",
    "RefusalRates": "refusals",
    "Report": "report",
    "Separation": "separation",
    "TokenShift": "tokens.shift",
    "map_activations": "maps",
    "refusal_rates": "refusals",
    "measure_separation": "separation",
    "token_shift": "tokens.shift",
}

__all__ = [
    "Checkpoints",
    "Maps",
    "RefusalRates",
    "Report",
    "Separation",
    "TokenShift",
    "map_activations",
    "measure_separation",
    "refusal_rates",
    "token_shift",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'analyses' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"analyses.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:  # for completion in notebooks
    return [*globals(), *__all__]
