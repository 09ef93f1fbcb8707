"""The prompts that checkpoints are compared on: pairs of a positive and a negative prompt."""

from collections import Counter
from typing import Protocol, runtime_checkable

from probes import datasets
from probes.contrast import Contrast

SHIPPED = "the shipped twins"
"""What the shipped set is called."""


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
        classes, name = ("harmful", "harmless"), SHIPPED
    else:
        found = datasets.read(prompts)
        if not isinstance(found, Contrast):
            raise ValueError(
                f"{prompts} holds plain prompts; checkpoints are compared on two classes: rows with "
                "positive/negative (or harmful/harmless), or a label column"
            )
        _check_pairs(found, prompts)
        parts, classes, name = found.split(seed=seed), ("positive", "negative"), found.name
    return {p: c.limited(wanted[p], seed) for p, c in parts.items()}, classes, name


def _check_pairs(found: Contrast, prompts: str) -> None:
    """Refuse topics that are no pair: with two paraphrases of a class, results that look a prompt
    up by topic and class would not all read the same one."""
    counts = Counter(zip(found.topics, found.labels, strict=True))
    for topic in dict.fromkeys(found.topics):
        positive, negative = counts[topic, 1], counts[topic, 0]
        if (positive, negative) != (1, 1):
            raise ValueError(
                f"{prompts} is not made of pairs: its topic {topic!r} has {positive} positive and "
                f"{negative} negative prompts, so give every pair a topic of its own"
            )
