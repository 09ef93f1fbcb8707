"""Contrasts: two kinds of prompts, as pairs or as labelled sets, grouped by topic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from probes import splits
from probes.prompts import Prompt


@dataclass(frozen=True)
class Contrast:
    """Prompts with a label each: positive (1) has the concept, negative (0) lacks it.

    A *topic* is a pair of twins with all its paraphrases; topics never straddle a split. A
    *stratum* (a hazard class, say) is kept in proportion in every split.
    """

    prompts: tuple[Prompt, ...]
    labels: tuple[int, ...]
    topics: tuple[str, ...]
    strata: tuple[str, ...] | None = None
    name: str = "contrast"

    def __post_init__(self) -> None:
        n = len(self.prompts)
        if not n:
            raise ValueError("the contrast is empty: give prompts of both kinds")
        if len(self.labels) != n or len(self.topics) != n:
            raise ValueError(
                f"{n} prompts with {len(self.labels)} labels and {len(self.topics)} topics: give "
                "one of each for every prompt"
            )
        if self.strata is not None and len(self.strata) != n:
            raise ValueError(f"{n} prompts with {len(self.strata)} strata: give one for each")
        if set(self.labels) != {0, 1}:
            raise ValueError(
                f"the labels are {sorted(set(self.labels))}: a contrast needs both 1 (positive) "
                "and 0 (negative)"
            )

    @classmethod
    def of_pairs(
        cls,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        *,
        topics: Sequence[str] | None = None,
        strata: Sequence[str] | None = None,
        name: str = "contrast",
    ) -> "Contrast":
        """Twins: the i-th positive belongs to the i-th negative and shares its topic."""
        if len(positive) != len(negative):
            raise ValueError(
                f"{len(positive)} positive and {len(negative)} negative prompts: pairs need as "
                "many of one as of the other; for unpaired sets use Contrast.labelled"
            )
        topics = topics or [f"pair-{i:04d}" for i in range(len(positive))]
        prompts = [p for pair in zip(positive, negative, strict=True) for p in pair]
        twice = [t for topic in topics for t in (topic, topic)]
        doubled = None if strata is None else tuple(s for stratum in strata for s in (stratum,) * 2)
        return cls(tuple(prompts), (1, 0) * len(positive), tuple(twice), doubled, name)

    @classmethod
    def labelled(
        cls,
        prompts: Sequence[Prompt],
        labels: Sequence[int],
        *,
        topics: Sequence[str] | None = None,
        name: str = "contrast",
    ) -> "Contrast":
        """Two labelled sets without pairs; every prompt is a topic of its own unless said."""
        topics = topics or [f"prompt-{i:04d}" for i in range(len(prompts))]
        return cls(tuple(prompts), tuple(labels), tuple(topics), None, name)

    @property
    def positive(self) -> Bool[Tensor, " prompt"]:
        """True at positive prompts."""
        return torch.tensor(self.labels, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int] | Tensor) -> "Contrast":
        """The contrast of some of the prompts."""
        index = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        strata = None if self.strata is None else tuple(self.strata[i] for i in index)
        return Contrast(
            tuple(self.prompts[i] for i in index),
            tuple(self.labels[i] for i in index),
            tuple(self.topics[i] for i in index),
            strata,
            self.name,
        )

    def limited(self, topics: int, seed: int = 0) -> "Contrast":
        """At most `topics` topics, drawn evenly over strata by the seed."""
        known = sorted(set(self.topics))
        if topics >= len(known):
            return self
        share = topics / len(known)
        parts = splits.split(
            self.topics,
            strata=self.strata,
            fractions={"kept": share, "left": 1 - share},
            seed=seed,
        )
        return self.take(parts["kept"])

    def split(
        self, fractions: Mapping[str, float] = splits.FRACTIONS, seed: int = 0
    ) -> dict[str, "Contrast"]:
        """Parts by whole topics, strata in proportion; the same seed gives the same parts."""
        parts = splits.split(self.topics, strata=self.strata, fractions=fractions, seed=seed)
        return {name: self.take(rows) for name, rows in parts.items()}
