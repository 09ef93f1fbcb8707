"""The cluster indices of the population that the prompts were drawn from, with intervals.

The published indices describe a sample. As estimates they are biased: the squared distance of two
means holds the means' own noise, twins of one topic lie closer than two prompts at random, and a
resample of topics has the noise twice, so that its percentiles miss the truth. Distances between
rows of *different* topics have none of this. With M_ab the mean squared distance of rows of class
a to rows of class b in other topics,

    sigma_a^2 = M_aa / 2,    D^2 = M_su - sigma_s^2 - sigma_u^2

are unbiased (U-statistics), and so is a row's squared distance to its centroid, its mean squared
distance to the rows of the class less sigma^2. All resamples are made at once from the matrix of
distances; rows are never touched again.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.drift.clusters import TRIM
from probes.results import check_finite
from probes.splits import codes

FEWEST = 4
"""Topics that must hold a class, so that leaving one out still leaves pairs of others."""


class Between(NamedTuple):
    """Indices from pairs of different topics, one a column of weights, each higher where the
    classes are further apart."""

    ratio: Float[Tensor, " resample"]
    """F = D^2 N / W, the inverse of XBI; about 0 without a difference, and then often below."""
    closeness: Float[Tensor, " resample"]
    """D / (S_s + S_u), the inverse of DBS; 0 where D^2 is below 0."""
    silhouette: Float[Tensor, " resample"]
    """-1 to 1; a row's own topic is left out of both its means."""
    dunn_trimmed: Float[Tensor, " resample"]
    """Low quantile of the distances across over the larger high quantile of those within."""


class Pairs(NamedTuple):
    """Distances between the rows of one sample, and which of them are between topics."""

    distance: Float[Tensor, "row row"]
    other: Float[Tensor, "row row"]
    """1 where two rows are of different topics, else 0."""
    labels: Bool[Tensor, " row"]


def pairs_of(
    x: Float[Tensor, "row d_model"], labels: Bool[Tensor, " row"], topics: Sequence[str]
) -> Pairs:
    """All distances of a sample small enough to hold them (8 bytes a pair)."""
    if not len(x) == len(labels) == len(topics):
        raise ValueError(
            f"{len(x)} rows came with {len(labels)} labels and {len(topics)} topics: give one of "
            "each for every row"
        )
    check_finite(x, "the activations")
    centred = x.double() - x.double().mean(0)
    square = centred.square().sum(1)
    distance = (square[:, None] + square - 2 * centred @ centred.T).clamp(min=0).sqrt()
    numbers, _ = codes(topics)
    return Pairs(distance, (numbers[:, None] != numbers).double(), labels)


def relabelled(pairs: Pairs, labels: Bool[Tensor, " row"]) -> Pairs:
    """The same rows under other labels."""
    return pairs._replace(labels=labels)


def taken(pairs: Pairs, rows: Int[Tensor, " taken"]) -> Pairs:
    """Some of the rows."""
    return Pairs(pairs.distance[rows][:, rows], pairs.other[rows][:, rows], pairs.labels[rows])


def between(
    pairs: Pairs,
    weights: Float[Tensor, "resample row"] | None = None,
    *,
    trim: float = TRIM,
    ratio_only: bool = False,
) -> Between:
    """The indices under row weights (how often each row's topic was drawn); plain without.

    NaN where a resample has no two topics of a class; with `ratio_only`, all but the ratio.
    """
    d, other = pairs.distance, pairs.other
    if weights is None:
        weights = torch.ones(1, len(d), dtype=torch.float64)
    squares = d.square() * other
    sides = [weights * side for side in (pairs.labels.double(), (~pairs.labels).double())]
    count = [w @ other for w in sides]  # per resample and row: weight of rows of other topics
    square = [w @ squares for w in sides]

    def mean(a: int, b: int) -> Float[Tensor, " resample"]:
        return (sides[a] * square[b]).sum(1) / (sides[a] * count[b]).sum(1)

    sizes = [w.sum(1) for w in sides]
    variance = [mean(0, 0) / 2, mean(1, 1) / 2]
    distance2 = mean(0, 1) - variance[0] - variance[1]
    within = (sizes[0] * variance[0] + sizes[1] * variance[1]) / (sizes[0] + sizes[1])
    ratio = _ratio(distance2, within)
    if ratio_only:
        return Between(ratio, *[torch.full_like(ratio, math.nan)] * 3)
    lengths = d * other
    length = [w @ lengths for w in sides]
    radii = torch.zeros_like(within)
    score = torch.zeros_like(within)
    for c in (0, 1):
        to_centre = square[c] / count[c] - variance[c][:, None]
        radii += _sum(sides[c], to_centre.clamp(min=0).sqrt()) / sizes[c]
        a, b = length[c] / count[c], length[1 - c] / count[1 - c]
        score += _sum(sides[c], (b - a) / torch.maximum(a, b).clamp(min=1e-300))
    return Between(
        ratio,
        _ratio(distance2.clamp(min=0).sqrt(), radii),
        score / (sizes[0] + sizes[1]),
        _dunn(pairs, weights, trim),
    )


def _sum(weights: Tensor, values: Tensor) -> Float[Tensor, " resample"]:
    """Weighted sum over rows; rows of weight 0 may hold anything."""
    return torch.where(weights > 0, weights * values, 0.0).sum(1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Where nothing is spread and nothing apart, 0; where only nothing is spread, infinite."""
    same = (above == 0) & (below == 0)
    return torch.where(same, torch.zeros_like(above), above / below)


def _dunn(pairs: Pairs, weights: Tensor, trim: float) -> Float[Tensor, " resample"]:
    upper = torch.triu(pairs.other, 1) > 0
    T = pairs.labels
    kinds = ((T[:, None] != T, trim), (T[:, None] & T, 1 - trim), (~T[:, None] & ~T, 1 - trim))
    low, *high = (_quantile(pairs.distance, upper & kind, weights, at) for kind, at in kinds)
    return _ratio(low, torch.maximum(*high))


def _quantile(
    distance: Tensor, chosen: Tensor, weights: Tensor, share: float
) -> Float[Tensor, " resample"]:
    """The smallest distance that `share` of the pairs' weight does not exceed."""
    i, j = chosen.nonzero(as_tuple=True)
    if not len(i):
        return torch.full((len(weights),), math.nan, dtype=torch.float64)
    values, order = distance[i, j].sort()
    i, j = i[order], j[order]
    found = []
    for some in weights.split(max(1, 2**24 // len(i))):
        total = (some[:, i] * some[:, j]).cumsum(1)
        wanted = (share * total[:, -1:]).clamp(min=1e-9) - 1e-9
        at = torch.searchsorted(total, wanted).clamp(max=len(values) - 1)[:, 0]
        found.append(torch.where(total[:, -1] > 0, values[at], math.nan))
    return torch.cat(found)


def topic_weights(
    labels: Bool[Tensor, " row"], topics: Sequence[str], resamples: int, seed: int
) -> tuple[Float[Tensor, "resample row"], Float[Tensor, "topic row"]]:
    """Row weights of resamples of whole topics, and of the sample with each topic left out.

    Topics are drawn among those that hold the same classes (both, or one of them alone), so a
    resample has as many topics of each kind as the sample.
    """
    numbers, known = codes(topics)
    holds = [
        (bool(labels[numbers == g].any()), bool((~labels[numbers == g]).any()))
        for g in range(len(known))
    ]
    for c, name in enumerate(("positive", "negative")):
        if (found := sum(h[c] for h in holds)) < FEWEST:
            raise ValueError(
                f"{found} topics hold a {name} prompt: an interval over topics needs at least "
                f"{FEWEST} of each class"
            )
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(resamples, len(known), dtype=torch.float64)
    for kind in sorted(set(holds)):
        members = torch.tensor([g for g, h in enumerate(holds) if h == kind])
        drawn = members[torch.randint(len(members), (resamples, len(members)), generator=generator)]
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    left = 1 - torch.eye(len(known), dtype=torch.float64)
    return counts[:, numbers], left[:, numbers]
