"""How well scores tell two classes apart, and how sure one can be: pure functions of tensors.

A higher score means the positive class throughout. Intervals are resampled over groups (topics),
because the examples of one topic are not independent of each other.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from probes.results import check_finite
from probes.splits import codes

Labels = Bool[Tensor, " example"] | Int[Tensor, " example"]
"""True or 1 for the positive class, False or 0 for the negative."""


class Interval(NamedTuple):
    """An estimate and its confidence limits."""

    value: float
    low: float
    high: float


class Intervals(NamedTuple):
    """Estimates and confidence limits of many columns."""

    value: Float[Tensor, "*column"]
    low: Float[Tensor, "*column"]
    high: Float[Tensor, "*column"]


def positive_mask(labels: Tensor, shape: Sequence[int]) -> Bool[Tensor, "*_"]:
    """Labels as booleans, for scores of this shape; refuses what is not two classes."""
    if labels.shape not in (torch.Size(shape[:1]), torch.Size(shape)):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for scores of shape {tuple(shape)}: "
            "give one for each example"
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(
            f"labels hold {labels.unique().tolist()[:5]}: use 1 (or True) for the positive class "
            "and 0 (or False) for the negative"
        )
    positive = labels.bool()
    if positive.all(0).any() or not positive.any(0).all():
        raise ValueError(
            f"{int(positive.sum())} of {positive.numel()} labels are positive: every set of "
            "labels needs both classes"
        )
    return positive


def auroc(
    scores: Float[Tensor, " example *column"],
    labels: Bool[Tensor, " example *_"] | Int[Tensor, " example *_"],
) -> Float[Tensor, "*column"]:
    """Chance that a positive example scores above a negative one, ties counting half; 0 to 1.

    It is the Mann-Whitney U divided by the number of pairs; 0.5 is chance. All columns at once,
    against the same labels or, if these have columns too, each against its own.
    """
    check_finite(scores, "the scores")
    positive = positive_mask(labels, scores.shape)
    columns = scores.detach().double().reshape(len(scores), -1).T.contiguous()
    ordered = columns.sort(1).values
    below = torch.searchsorted(ordered, columns)
    rank = (below + torch.searchsorted(ordered, columns, right=True) + 1).double() / 2
    T = positive.reshape(len(scores), -1).T.double()
    n = T.sum(1)
    wins = (rank * T).sum(1) - n * (n + 1) / 2
    return (wins / (n * (len(scores) - n))).reshape(scores.shape[1:])


def accuracy(
    scores: Float[Tensor, " example *column"], labels: Labels, threshold: float = 0.0
) -> Float[Tensor, "*column"]:
    """Share of examples on their own side of the threshold, 0 to 1."""
    positive = positive_mask(labels, scores.shape[:1])
    check_finite(scores, "the scores")
    right = (scores > threshold) == positive.reshape(-1, *[1] * (scores.ndim - 1))
    return right.double().mean(0)


def expected_calibration_error(
    probabilities: Float[Tensor, " example *column"], labels: Labels, bins: int = 10
) -> Float[Tensor, "*column"]:
    """Mean distance between stated and observed frequency over bins of equal width, weighted by
    how many examples fall in each; 0 is calibrated, 1 the worst (Guo et al. 2017, eq. 3).

    It is biased upwards when bins hold few examples.
    """
    positive = positive_mask(labels, probabilities.shape[:1]).double()
    if bins < 1:
        raise ValueError(f"{bins} bins were asked: ask for 1 or more")
    p = probabilities.detach().double().reshape(len(probabilities), -1)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(
            "probabilities must lie between 0 and 1: pass Probe.probability, not Probe.score"
        )
    index = (p * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, p.shape[1], dtype=torch.float64)
    gap.scatter_add_(0, index, p - positive[:, None])
    return (gap.abs().sum(0) / len(p)).reshape(probabilities.shape[1:])


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a rate: inside [0, 1], and wide at 0 of n (Wilson 1927)."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}: give 0 to n successes of at least 1 trial")
    z, p = _quantile(level), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    # at 0 and n the limit equals the rate exactly; rounding would put it a hair beyond
    low = 0.0 if successes == 0 else centre - half
    return Interval(p, low, 1.0 if successes == n else centre + half)


def newcombe(
    successes: int, n: int, other_successes: int, other_n: int, level: float = 0.95
) -> Interval:
    """Rate minus other rate, for independent samples; -1 to 1 (Newcombe 1998, method 10)."""
    a, b = wilson(successes, n, level), wilson(other_successes, other_n, level)
    difference = a.value - b.value
    down = ((a.value - a.low) ** 2 + (b.high - b.value) ** 2) ** 0.5
    up = ((a.high - a.value) ** 2 + (b.value - b.low) ** 2) ** 0.5
    return Interval(difference, difference - down, difference + up)


def bca(
    value: Float[Tensor, "*column"],
    resampled: Float[Tensor, " resample *column"],
    jackknife: Float[Tensor, " group *column"],
    level: float = 0.95,
) -> Intervals:
    """Bias-corrected and accelerated limits from resamples and leave-one-group-out values (Efron
    1987). NaN resamples and jackknife values, where a class was missing, are left out."""
    valid = resampled.isfinite()
    if not bool((2 * valid.sum(0) > len(resampled)).all()):
        raise ValueError(
            f"most of the {len(resampled)} resamples of groups hold one class only: "
            "there are too few groups for an interval"
        )
    # equal values may differ in the last digit, by the order of their sums
    above = (resampled - value) / (1e-12 * (1 + value.abs()))
    share = ((above < -1) + 0.5 * (above.abs() <= 1)).double().sum(0) / valid.sum(0)
    n = valid.sum(0)
    bias = torch.special.ndtri(share.clamp(0.5 / n, 1 - 0.5 / n))
    pull = (jackknife.nanmean(0) - jackknife).nan_to_num(0.0)
    spread = pull.square().sum(0) ** 1.5
    a = torch.where(spread > 0, pull.pow(3).sum(0) / (6 * spread), torch.zeros_like(spread))
    limits = []
    for side in (-_quantile(level), _quantile(level)):
        moved = bias + side
        at = torch.special.ndtr(bias + moved / (1 - a * moved).clamp_min(1e-3))
        limits.append(_quantile_of(resampled, at))
    return Intervals(value, limits[0], limits[1])


def bca_bootstrap(
    statistic: Callable[[Int[Tensor, " row"]], float],
    groups: Sequence[str],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """BCa interval of any statistic of rows, by resampling whole groups with replacement.

    `statistic` gets the row numbers of a resample, a row as often as its group was drawn.
    """
    numbers, known = codes(groups)
    if len(known) < 2:
        raise ValueError("one group only: an interval over groups needs at least 2")
    rows = [(numbers == i).nonzero().flatten() for i in range(len(known))]

    def at(chosen: Sequence[int]) -> float:
        return float(statistic(torch.cat([rows[i] for i in chosen])))

    everything = range(len(known))
    drawn = _draws(len(known), resamples, seed)
    found = bca(
        torch.tensor(at(everything), dtype=torch.float64),
        torch.tensor([at(chosen) for chosen in drawn.tolist()], dtype=torch.float64),
        torch.tensor(
            [at([j for j in everything if j != i]) for i in everything], dtype=torch.float64
        ),
        level,
    )
    return Interval(float(found.value), float(found.low), float(found.high))


def auroc_interval(
    scores: Float[Tensor, " example *column"],
    labels: Labels,
    groups: Sequence[str],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Intervals:
    """AUROC of each column with its BCa interval over groups; the same resamples for all columns.

    With `W[g, h]` the pairs that positives of group g win over negatives of group h, a resample
    with counts c has AUROC `c W c / ((c p)(c n))`: no example is touched again. Where the classes
    are parted without error every resample is 1, so there the limits are those of
    `rank_interval` with groups for examples.
    """
    positive = positive_mask(labels, scores.shape[:1])
    if len(groups) != len(scores):
        raise ValueError(f"{len(scores)} scores came with {len(groups)} groups: give one for each")
    value = auroc(scores, labels).reshape(-1)
    numbers, known = codes(groups)
    k = len(known)
    if k < 2:
        raise ValueError("one group only: an interval over groups needs at least 2")
    member = torch.nn.functional.one_hot(numbers, k).double()
    above, below = member[positive], member[~positive]
    p, n = above.sum(0), below.sum(0)
    drawn = _draws(k, resamples, seed)
    counts = torch.zeros(resamples, k, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    counts = torch.cat([counts, 1 - torch.eye(k, dtype=torch.float64)])
    pairs = (counts @ p) * (counts @ n)
    columns = scores.detach().double().reshape(len(scores), -1)
    found = torch.empty(len(counts), columns.shape[1], dtype=torch.float64)
    for i, column in enumerate(columns.T):
        ahead = column[positive, None] - column[~positive]
        wins = above.T @ ((ahead.sign() + 1) / 2) @ below
        found[:, i] = ((counts @ wins) * counts).sum(1) / pairs  # 0/0: NaN, which bca leaves out
    limits = bca(value, found[:resamples], found[resamples:], level)
    for i in ((value == 0) | (value == 1)).nonzero().flatten().tolist():
        bound = rank_interval(float(value[i]), int((p > 0).sum()), int((n > 0).sum()), level)
        limits.low[i], limits.high[i] = bound.low, bound.high
    return Intervals(*(t.reshape(scores.shape[1:]) for t in limits))


def rank_interval(value: float, positive: int, negative: int, level: float = 0.95) -> Interval:
    """Interval of an AUROC from the numbers of independent examples alone; not a point at 0 or 1.

    The limits are where the AUROC observed lies z standard errors away, the standard error taken
    at the limit (Newcombe 2006, part 2, method 5: Hanley and McNeil's with both sizes averaged).
    """
    z, size = _quantile(level), (positive + negative) / 2 - 1

    def beyond(t: float) -> bool:
        spread = 1 + size * (1 - t) / (2 - t) + size * t / (1 + t)
        return (value - t) ** 2 > z * z * t * (1 - t) * spread / (positive * negative)

    def limit(far: float) -> float:
        near = value
        for _ in range(60):
            middle = (near + far) / 2
            near, far = (near, middle) if beyond(middle) else (middle, far)
        return far

    return Interval(value, limit(0.0), limit(1.0))


def permutation_p(
    observed: float,
    null: Num[Tensor, " permutation"],
    alternative: Literal["greater", "less", "two-sided"] = "greater",
) -> float:
    """Share of the null at least as extreme, the observation counted in: never 0 (Phipson and
    Smyth 2010). Two-sided doubles the smaller tail."""
    if not len(null):
        raise ValueError("the null is empty: run at least 200 permutations")
    check_finite(null, "the null")
    up = (1 + int((null >= observed).sum())) / (1 + len(null))
    down = (1 + int((null <= observed).sum())) / (1 + len(null))
    return {"greater": up, "less": down, "two-sided": min(1.0, 2 * min(up, down))}[alternative]


def _draws(k: int, resamples: int, seed: int) -> Int[Tensor, "resample group"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(k, (resamples, k), generator=generator)


def _quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level of {level} was asked: give one between 0 and 1")
    return float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))


def _quantile_of(
    resampled: Float[Tensor, " resample *column"], at: Float[Tensor, "*column"]
) -> Float[Tensor, "*column"]:
    """Each column's own quantile, NaN left out, interpolated between neighbours."""
    ordered = resampled.reshape(len(resampled), -1).sort(0).values  # NaN sorts last
    place = at.reshape(-1) * (ordered.isfinite().sum(0) - 1)
    low = place.floor().long()
    left = ordered.gather(0, low[None])[0]
    right = ordered.gather(0, place.ceil().long()[None])[0]
    return (left + (place - low) * (right - left)).reshape(at.shape)
