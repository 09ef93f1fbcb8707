"""What may be measured, and what all readings of a measurement share: shuffles and resamples."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.drift.between_topics import FEWEST, topic_weights
from analyses.drift.pooling import MOST_ROWS
from probes.results import check_finite
from probes.splits import FEW_GROUPS, shuffled


class Axiom(NamedTuple):
    """The test rows of one stratum and their resamples; none where it has too few topics."""

    name: str
    rows: Int[Tensor, " row"]
    topics: int
    drawn: Float[Tensor, "resample row"] | None
    left: Float[Tensor, "topic row"] | None


class Design(NamedTuple):
    """What all readings share, so that they are compared on the same shuffles and resamples."""

    train_labels: Bool[Tensor, " train"]
    test_labels: Bool[Tensor, " test"]
    test_topics: tuple[str, ...]
    train_shuffled: Bool[Tensor, "train permutation"]
    test_shuffled: Bool[Tensor, "test permutation"]
    drawn: Float[Tensor, "resample test"]
    left: Float[Tensor, "topic test"]
    axioms: tuple[Axiom, ...]
    seed: int


def design(
    labels: Bool[Tensor, " prompt"],
    topics: Sequence[str],
    train: Int[Tensor, " train"],
    test: Int[Tensor, " test"],
    strata: Sequence[str] | None,
    *,
    permutations: int,
    resamples: int,
    seed: int,
) -> Design:
    """Shuffles inside the training and inside the test rows, resamples of test topics."""
    generator = torch.Generator().manual_seed(seed)
    trained, tested = ([topics[i] for i in map(int, rows)] for rows in (train, test))
    drawn, left = topic_weights(labels[test], tested, resamples, seed)
    axioms = []
    names = [] if strata is None else [strata[i] for i in map(int, test)]
    for name in sorted(set(names)):
        rows = torch.tensor([i for i, n in enumerate(names) if n == name])
        own = [tested[i] for i in map(int, rows)]
        side = labels[test][rows]
        count = len(set(own))
        held = [len({t for t, s in zip(own, side.tolist(), strict=True) if s == c}) for c in (0, 1)]
        weights = topic_weights(side, own, resamples, seed) if min(held) >= FEWEST else (None, None)
        axioms.append(Axiom(name, rows, count, *weights))
    return Design(
        labels[train],
        labels[test],
        tuple(tested),
        shuffled(labels[train], trained, permutations, generator),
        shuffled(labels[test], tested, permutations, generator),
        drawn,
        left,
        tuple(axioms),
        seed,
    )


def check(
    activations: Mapping[str, Mapping[str, Tensor]],
    labels: Tensor,
    topics: Sequence[str],
    train: Tensor,
    test: Tensor,
    reference: str | None,
) -> str:
    """Refuse what cannot be measured; gives the reference."""
    if not activations or not all(activations.values()):
        raise ValueError("no activations were given: give {checkpoint: {site: [prompt, d_model]}}")
    reference = next(iter(activations)) if reference is None else reference
    if reference not in activations:
        raise ValueError(f"reference {reference!r} is none of {', '.join(activations)}")
    first = activations[reference]
    for model, sites in activations.items():
        if tuple(sites) != tuple(first):
            raise ValueError(
                f"{model} was read at {len(sites)} sites and {reference} at {len(first)}, or at "
                "others: read all checkpoints at the same sites, in the same order"
            )
        shapes = {tuple(x.shape) for x in sites.values()}
        if len(shapes) > 1 or any(len(s) != 2 or s[0] != len(labels) for s in shapes):
            raise ValueError(
                f"the activations of {model} have shapes {sorted(shapes)} for {len(labels)} "
                "labels: pooling needs [prompt, d_model] of one width at every site"
            )
        for site, x in sites.items():
            check_finite(x, f"site {site} of {model}")
    if len(topics) != len(labels):
        raise ValueError(f"{len(labels)} prompts with {len(topics)} topics: give one for each")
    parts = {"training": train, "test": test}
    held = {name: {topics[i] for i in map(int, rows)} for name, rows in parts.items()}
    if both := held["training"] & held["test"]:
        raise ValueError(
            f"topic {min(both)!r} ({len(both)} such) is in training and in test: split by topic"
        )
    for name, rows in parts.items():
        for side, word in ((True, "positive"), (False, "negative")):
            count = len({topics[i] for i in map(int, rows) if bool(labels[i]) == side})
            if count < FEWEST:
                raise ValueError(
                    f"the {name} part has {count} topics with a {word} prompt: both classes are "
                    f"needed, in at least {FEWEST} topics each ({FEW_GROUPS} for an interval to "
                    "be trusted)"
                )
    return reference


def notes(plan: Design, n_topics: int, identity: str) -> tuple[str, ...]:
    """What the reader of the numbers should know, a sentence each."""
    notes = [identity + "."]
    if (trained := len(plan.train_labels)) > MOST_ROWS:
        notes.append(
            f"Layer weights were learned on {MOST_ROWS} of the {trained} training prompts, whole "
            "topics drawn by the seed; scales and probes on all."
        )
    if n_topics < FEW_GROUPS:
        notes.append(
            f"There are only {n_topics} test topics: intervals over fewer than {FEW_GROUPS} are "
            "too narrow, so read them as a rough guide."
        )
    positive = int(plan.test_labels.sum())
    negative = len(plan.test_labels) - positive
    if positive != negative:
        notes.append(
            f"The test classes have {positive} and {negative} prompts: CHI, A, A' and D depend on "
            "these numbers."
        )
    few = [f"{a.name} ({a.topics})" for a in plan.axioms if a.topics < FEW_GROUPS]
    if few:
        notes.append(f"Strata with fewer than {FEW_GROUPS} topics: {', '.join(few)}.")
    return tuple(notes)
