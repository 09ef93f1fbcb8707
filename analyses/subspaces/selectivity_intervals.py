"""Intervals of rates and of means over topics, for one model and for two on the same prompts."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.subspaces.grouping import ratio_over
from probes.scores import Interval, wilson
from probes.splits import codes


def mean(values: Float[Tensor, "draw prompt"], groups: Sequence[str]) -> Interval:
    """Mean over prompts and draws with its 95 % interval over topics.

    Of values that are all 0 or 1 it is Wilson's interval of that rate in as many trials as there
    are topics: prompts of one topic, and draws on the same prompts, are no trials of their own.
    Others are bootstrapped (BCa).
    """
    prompts = values.double().mean(0)
    if _binary(values):
        return _wilson(float(prompts.mean()), len(set(groups)))
    return ratio_over(prompts, torch.ones_like(prompts), groups)


def difference(
    values: Float[Tensor, "draw prompt"],
    other: Float[Tensor, "row prompt"],
    groups: Sequence[str],
) -> Interval:
    """Mean minus other mean on the same prompts, with its paired 95 % interval over topics.

    Of values that are all 0 or 1 the distances to Wilson's limits are taken together with the
    correlation of the two (Newcombe 1998, paired differences, method 10, continuity corrected; of
    topics with several prompts or draws, their means), which is no point where nobody changed
    sides. Others are bootstrapped (BCa).
    """
    a, b = values.double().mean(0), other.double().mean(0)
    if not (_binary(values) and _binary(other)):
        return ratio_over(a - b, torch.ones_like(a), groups)
    x, y = _topics(a, groups), _topics(b, groups)
    one, two = _wilson(float(a.mean()), len(x)), _wilson(float(b.mean()), len(x))
    phi = _correlation(x, y)
    down, up = (
        math.sqrt(max(0.0, s * s - 2 * phi * s * t + t * t))
        for s, t in (
            (one.value - one.low, two.high - two.value),
            (one.high - one.value, two.value - two.low),
        )
    )
    d = one.value - two.value
    return Interval(d, d - down, d + up)


def _binary(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _wilson(rate: float, n: int) -> Interval:
    """Wilson's interval of a rate that n trials need not be able to have: between its neighbours'."""
    below = min(int(rate * n), n - 1)
    part = min(1.0, max(0.0, rate * n - below))
    a, b = wilson(below, n), wilson(below + 1, n)
    low, high = ((1 - part) * p + part * q for p, q in ((a.low, b.low), (a.high, b.high)))
    return Interval(rate, min(low, rate), max(high, rate))


def _topics(prompts: Tensor, groups: Sequence[str]) -> Float[Tensor, " topic"]:
    numbers, known = codes(groups)
    sums = torch.zeros(len(known), dtype=torch.float64).index_add_(0, numbers, prompts)
    return sums / numbers.bincount(minlength=len(known))


def _correlation(x: Float[Tensor, " topic"], y: Float[Tensor, " topic"]) -> float:
    """Correlation of two rows of answers, drawn towards 0 by half a topic; 0 where one has no
    spread."""
    n, a, b = len(x), float(x.sum()), float(y.sum())
    spread = a * (n - a) * b * (n - b)
    if spread <= 0:
        return 0.0
    above = n * float(x @ y) - a * b
    if above > 0:
        above = max(0.0, above - n / 2)
    return above / math.sqrt(spread)
