"""Who goes to training, validation and test: whole groups, spread evenly over strata, by seed.

A group (a topic: a twin pair with its paraphrases) never straddles a split, because a near copy in
the test half turns memory into accuracy. Only names come in and only row numbers go out.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

FEW_GROUPS = 20
"""With fewer groups than this an interval over groups is not to be trusted."""

FRACTIONS = {"train": 0.6, "validation": 0.2, "test": 0.2}
"""Shares of the groups: parameters are fitted on the first, choices made on the second, figures
reported on the third."""


class Fold(NamedTuple):
    """Row numbers of one division in two, each in ascending order."""

    train: Int[Tensor, " train"]
    test: Int[Tensor, " test"]


def codes(names: Sequence[str]) -> tuple[Int[Tensor, " example"], tuple[str, ...]]:
    """Each row's group as a number, and the sorted group names the numbers stand for."""
    if not len(names):
        raise ValueError("no group names were given: give one for each example")
    known = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(known)}
    return torch.tensor([number[name] for name in names]), known


def warn_if_few(groups: Sequence[str]) -> int:
    """The number of groups, with a warning if there are fewer than `FEW_GROUPS`."""
    count = len(set(groups))
    if count < FEW_GROUPS:
        warnings.warn(
            f"only {count} groups (topics): intervals over fewer than {FEW_GROUPS} groups are "
            "too narrow, so read them as a rough guide or add topics",
            stacklevel=3,
        )
    return count


def split(
    groups: Sequence[str],
    *,
    strata: Sequence[str] | None = None,
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int = 0,
) -> dict[str, Int[Tensor, " row"]]:
    """Row numbers of each named part, in ascending order; every row is in exactly one part.

    `strata` (class, hazard) are kept in proportion as far as whole groups allow; the stratum of a
    group with rows in several is their combination.
    """
    shares = list(fractions.values())
    if min(shares, default=0) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"the fractions are {dict(fractions)}: give positive numbers that add up to 1"
        )
    numbers, known = codes(groups)
    warn_if_few(groups)
    part = _dealt(_strata_of(groups, known, strata), shares, seed)
    found = {
        name: torch.isin(numbers, (part == i).nonzero().flatten()).nonzero().flatten()
        for i, name in enumerate(fractions)
    }
    if empty := [name for name, rows in found.items() if not len(rows)]:
        raise ValueError(
            f"{len(known)} groups leave {' and '.join(empty)} empty with fractions "
            f"{dict(fractions)}: add topics, or ask for fewer parts"
        )
    return found


def folds(
    groups: Sequence[str], n: int, *, strata: Sequence[str] | None = None, seed: int = 0
) -> list[Fold]:
    """`n` divisions whose test rows together are every row once (cross-validation by group)."""
    numbers, known = codes(groups)
    if not 2 <= n <= len(known):
        raise ValueError(
            f"{n} folds were asked of {len(known)} groups: ask for 2 to as many as there are groups"
        )
    warn_if_few(groups)
    part = _dealt(_strata_of(groups, known, strata), [1 / n] * n, seed)[numbers]
    return [
        Fold((part != i).nonzero().flatten(), (part == i).nonzero().flatten()) for i in range(n)
    ]


def leave_one_out(strata: Sequence[str]) -> dict[str, Fold]:
    """For each stratum, training on all others and testing on it: a robustness figure."""
    numbers, known = codes(strata)
    if len(known) < 2:
        raise ValueError(
            f"there is one stratum only, {strata[0]!r}: leaving it out leaves nothing to train on"
        )
    return {
        name: Fold((numbers != i).nonzero().flatten(), (numbers == i).nonzero().flatten())
        for i, name in enumerate(known)
    }


def shuffled(
    labels: Bool[Tensor, " example"],
    groups: Sequence[str],
    permutations: int,
    generator: torch.Generator,
) -> Bool[Tensor, "example permutation"]:
    """Labels that carry nothing but keep the topics' structure.

    A topic that holds both classes (a twin pair with its paraphrases) exchanges them as a whole,
    by a coin; topics of one class exchange their labels among themselves.
    """
    numbers, known = codes(groups)
    k = len(known)
    share = torch.zeros(k).scatter_reduce(0, numbers, labels.float(), "mean", include_self=False)
    single = ((share == 0) | (share == 1)).nonzero().flatten()
    turned = torch.rand(permutations, k, generator=generator) < 0.5
    for row in turned:
        order = torch.randperm(len(single), generator=generator)
        row[single] = share[single] != share[single[order]]
    return labels[:, None] ^ turned.T[numbers]


def twins(
    labels: Bool[Tensor, " example"], groups: Sequence[str]
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Rows of the positive and of the negative member of each pair: within a topic the k-th
    positive goes with the k-th negative."""
    numbers, known = codes(groups)
    high, low = [], []
    for i, name in enumerate(known):
        inside = numbers == i
        a, b = (inside & labels).nonzero().flatten(), (inside & ~labels).nonzero().flatten()
        if len(a) != len(b):
            raise ValueError(
                f"topic {name!r} has {len(a)} positive and {len(b)} negative examples: pairs need "
                "as many of one as of the other"
            )
        high.append(a)
        low.append(b)
    return torch.cat(high), torch.cat(low)


def _strata_of(
    groups: Sequence[str], known: Sequence[str], strata: Sequence[str] | None
) -> list[tuple[str, ...]]:
    """The stratum of each known group: the sorted names that its rows carry."""
    if strata is None:
        return [()] * len(known)
    if len(strata) != len(groups):
        raise ValueError(
            f"{len(groups)} examples came with {len(strata)} strata: give one for each example"
        )
    carried: dict[str, set[str]] = {name: set() for name in known}
    for group, stratum in zip(groups, strata, strict=True):
        carried[group].add(stratum)
    return [tuple(sorted(carried[name])) for name in known]


def _dealt(
    strata: Sequence[tuple[str, ...]], shares: Sequence[float], seed: int
) -> Int[Tensor, " group"]:
    """The part each group goes to: always the part furthest behind its share, first within the
    group's stratum and, where that is even, over all."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.tensor(shares, dtype=torch.float64)
    part = torch.zeros(len(strata), dtype=torch.long)
    overall = torch.zeros_like(share)
    dealt = {stratum: torch.zeros_like(share) for stratum in strata}
    order = torch.randperm(len(strata), generator=generator).tolist()
    for i in sorted(order, key=lambda i: strata[i]):  # stable: shuffled inside each stratum
        inside = dealt[strata[i]]
        behind = share * (inside.sum() + 1) - inside + share * (overall.sum() + 1) - overall
        part[i] = behind.argmax()
        inside[part[i]] += 1
        overall[part[i]] += 1
    return part
