"""Read language models: hooked models over three engines, capture, directions, probes.

Names are loaded when they are first used, so that importing this package is immediate.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probes.activations import Activations as Activations
    from probes.capturing import capture as capture
    from probes.capturing import stream as stream
    from probes.contrast import Contrast as Contrast
    from probes.directions import Direction as Direction
    from probes.directions import difference_of_means as difference_of_means
    from probes.directions import pca_of_pairs as pca_of_pairs
    from probes.engines import Batch as Batch
    from probes.engines import Edit as Edit
    from probes.linear import Probe as Probe
    from probes.linear import fit_logistic as fit_logistic
    from probes.mean import fit_mass_mean as fit_mass_mean
    from probes.model import HookedModel as HookedModel
    from probes.moments import ClassMoments as ClassMoments
    from probes.moments import Moments as Moments
    from probes.scanning import Scan as Scan
    from probes.scanning import scan as scan
    from probes.sites import Site as Site
    from probes.sites import Unsupported as Unsupported
    from probes.sweeps import ProbeSweep as ProbeSweep
    from probes.sweeps import sweep as sweep

_HOMES = {
    "Activations": "activations",
    "Batch": "engines",
    "ClassMoments": "moments",
    "Contrast": "contrast",
    "Direction": "directions",
    "Edit": "engines",
    "HookedModel": "model",
    "Moments": "moments",
    "Probe": "linear",
    "ProbeSweep": "sweeps",
    "Scan": "scanning",
    "Site": "sites",
    "Unsupported": "sites",
    "capture": "capturing",
    "difference_of_means": "directions",
    "fit_logistic": "linear",
    "fit_mass_mean": "mean",
    "pca_of_pairs": "directions",
    "scan": "scanning",
    "stream": "capturing",
    "sweep": "sweeps",
}

__all__ = [
    "Activations",
    "Batch",
    "ClassMoments",
    "Contrast",
    "Direction",
    "Edit",
    "HookedModel",
    "Moments",
    "Probe",
    "ProbeSweep",
    "Scan",
    "Site",
    "Unsupported",
    "capture",
    "difference_of_means",
    "fit_logistic",
    "fit_mass_mean",
    "pca_of_pairs",
    "scan",
    "stream",
    "sweep",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"probes.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:  # for completion in notebooks
    return [*globals(), *__all__]
