"""Compare checkpoints of one model: token shift, subspaces, drift, patching, the report."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analyses.checkpoints import Checkpoints as Checkpoints
    from analyses.differences import compare_reports as compare_reports
    from analyses.drift.aqi import lineage_aqi as lineage_aqi
    from analyses.drift.attribution import attribute_drift as attribute_drift
    from analyses.drift.bisect import bisect as bisect
    from analyses.drift.ledger import DriftLedger as DriftLedger
    from analyses.drift.ledger import drift_ledger as drift_ledger
    from analyses.maps import Maps as Maps
    from analyses.maps import map_activations as map_activations
    from analyses.patching.grid import patch_map as patch_map
    from analyses.refusals import RefusalRates as RefusalRates
    from analyses.refusals import refusal_rates as refusal_rates
    from analyses.report import Report as Report
    from analyses.separation import Separation as Separation
    from analyses.separation import measure_separation as measure_separation
    from analyses.subspaces.projection_energy import projection_energy as projection_energy
    from analyses.subspaces.weights import weight_overlap as weight_overlap
    from analyses.tokens.in_context import context_shifts as context_shifts
    from analyses.tokens.matrix import shift_matrix as shift_matrix
    from analyses.tokens.rewards import log_ratios as log_ratios
    from analyses.tokens.shift import TokenShift as TokenShift
    from analyses.tokens.shift import token_shift as token_shift

_HOMES = {
    "Checkpoints": "checkpoints",
    "DriftLedger": "drift.ledger",
    "Maps": "maps",
    "RefusalRates": "refusals",
    "Report": "report",
    "Separation": "separation",
    "TokenShift": "tokens.shift",
    "attribute_drift": "drift.attribution",
    "bisect": "drift.bisect",
    "compare_reports": "differences",
    "context_shifts": "tokens.in_context",
    "drift_ledger": "drift.ledger",
    "lineage_aqi": "drift.aqi",
    "log_ratios": "tokens.rewards",
    "map_activations": "maps",
    "measure_separation": "separation",
    "patch_map": "patching.grid",
    "projection_energy": "subspaces.projection_energy",
    "refusal_rates": "refusals",
    "shift_matrix": "tokens.matrix",
    "token_shift": "tokens.shift",
    "weight_overlap": "subspaces.weights",
}

__all__ = [
    "Checkpoints",
    "DriftLedger",
    "Maps",
    "RefusalRates",
    "Report",
    "Separation",
    "TokenShift",
    "attribute_drift",
    "bisect",
    "compare_reports",
    "context_shifts",
    "drift_ledger",
    "lineage_aqi",
    "log_ratios",
    "map_activations",
    "measure_separation",
    "patch_map",
    "projection_energy",
    "refusal_rates",
    "shift_matrix",
    "token_shift",
    "weight_overlap",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'analyses' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"analyses.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:  # for completion in notebooks
    return [*globals(), *__all__]
