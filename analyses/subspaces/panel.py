"""What a panel of `alignlens subspace` is, how large, and what its folder is called."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from probes.names import parse
from probes.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How many topics and texts are used; asked for, these are upper limits."""

    train: int = 60
    """Topics that subspaces and erasers are fitted on."""
    validation: int = 40
    """Topics the probes of the erasure are fitted on."""
    test: int = 60
    """Topics every figure is measured on, and prompts of the general set."""
    texts: int = 40
    """Unrelated texts of the difference lens."""
    asked: int = 6
    """Neutral prompts answered under steering."""


@dataclass(frozen=True)
class Panel:
    """One result with its name and figures."""

    name: str
    result: Result
    figures: Mapping[str, "Axes | Figure"] = field(default_factory=dict)


def distinct(models: Sequence[str]) -> list[str]:
    """Labels of models, as `checkpoints.compare` gives them: those that several have become the
    full names, then are numbered."""
    labels = [parse(model).label for model in models]
    for found in (labels, list(models)):
        if len(set(found)) == len(found):
            return found
    return [
        f"{label} ({labels[: i + 1].count(label)})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]


def folder_names(labels: Sequence[str]) -> dict[str, str]:
    """A name for a folder from each label (paths have slashes), no two alike."""
    found: dict[str, str] = {}
    for label in labels:
        name = plain = re.sub(r"[^\w.+-]+", "-", label).strip("-.") or "model"
        number = 1
        while name in found.values():
            number += 1
            name = f"{plain}-{number}"
        found.setdefault(label, name)
    return found
