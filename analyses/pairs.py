"""The prompts that checkpoints are compared on: pairs of a positive and a negative prompt."""

from typing import Protocol, runtime_checkable

from probes import datasets
from probes.contrast import Contrast


@runtime_checkable
class Sizes(Protocol):
    """How many topics of each part are used at most."""

    @property
    def train(self) -> int: ...
    @property
    def validation(self) -> int: ...
    @property
    def test(self) -> int: ...


def pairs(
    prompts: str | None, size: Sizes, seed: int
) -> tuple[dict[str, Contrast], tuple[str, str], str]:
    """Training, validation and test contrasts of a file, or of the shipped twins; then the names
    of the two classes and of the set."""
    wanted = {"train": size.train, "validation": size.validation, "test": size.test}
    if prompts is None:
        parts = {part: datasets.safety(part) for part in wanted}
        classes, name = ("harmful", "harmless"), "the shipped twins"
    else:
        found = datasets.read(prompts)
        if not isinstance(found, Contrast):
            raise ValueError(
                f"{prompts} holds plain prompts; checkpoints are compared on two classes: rows with "
                "positive/negative (or harmful/harmless), or a label column"
            )
        parts, classes, name = found.split(seed=seed), ("positive", "negative"), found.name
        if {len(set(part.topics)) * 2 == len(part) for part in parts.values()} != {True}:
            raise ValueError(
                f"{prompts} is not made of pairs: give one positive and one negative prompt per "
                "topic"
            )
    return {p: c.limited(wanted[p], seed) for p, c in parts.items()}, classes, name
