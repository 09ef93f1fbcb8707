"""Intervals of means over prompts, resampled by topic, many columns at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from probes.scores import Intervals, bca, newcombe
from probes.splits import codes


def mean_interval(
    values: Float[Tensor, " prompt *column"],
    groups: Sequence[str] | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Intervals:
    """BCa interval of each column's mean over prompts, by resampling whole groups.

    The same as `probes.scores.bca_bootstrap` with the mean for its statistic, without touching
    single prompts again: a resample with counts c has the mean `c s / c n`, of group sums s and
    sizes n. Without groups every prompt is its own.
    """
    if groups is None:
        groups = [f"{i:06d}" for i in range(len(values))]
    if len(groups) != len(values):
        raise ValueError(f"{len(values)} values came with {len(groups)} groups: give one for each")
    numbers, known = codes(groups)
    k = len(known)
    if k < 2:
        raise ValueError("one group only: an interval over groups needs at least 2")
    columns = values.double().reshape(len(values), -1)
    sums = torch.zeros(k, columns.shape[1], dtype=torch.float64).index_add_(0, numbers, columns)
    sizes = torch.bincount(numbers, minlength=k).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(k, (resamples, k), generator=generator)
    counts = torch.zeros(resamples, k, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    counts = torch.cat([counts, 1 - torch.eye(k, dtype=torch.float64)])
    means = (counts @ sums) / (counts @ sizes)[:, None]
    found = bca(columns.mean(0), means[:resamples], means[resamples:], level)
    return Intervals(*(t.reshape(values.shape[1:]) for t in found))


def change_interval(
    after: Float[Tensor, "prompt column"],
    before: Float[Tensor, " prompt"],
    groups: Sequence[str] | None = None,
    *,
    resamples: int = 2000,
    rate: bool = False,
    level: float = 0.95,
    seed: int = 0,
) -> Intervals:
    """Interval of the mean change from `before`, prompt by prompt, of each column.

    Where every prompt changes by the same whole number, as when all refuse and none did, no
    resample differs and the bootstrap gives a point. There the limits are Newcombe's for two
    rates, with as many trials as groups: wider than the pairs deserve, never a point. Values of 0
    and 1 are a rate where a 1 is among them. All 0, before and after, may as well be a continuous
    cost that never arose (repetition), whose limits are the point; say `rate` if it is a rate. A
    column equal to `before` because nothing was applied has nothing to be unsure of: give it
    limits of 0 yourself.
    """
    change = after.double() - before.double()[:, None]
    found = mean_interval(change, groups, resamples=resamples, level=level, seed=seed)
    k = len(set(groups)) if groups is not None else len(before)
    for c in range(change.shape[1]):
        column, own = change[:, c], after[:, c]
        both = torch.cat([before, own])
        judged = bool(((both == 0) | (both == 1)).all()) and (rate or bool(both.any()))
        if judged and bool((column == column[0]).all()):
            rates = (round(float(x.double().mean()) * k) for x in (own, before))
            was = newcombe(next(rates), k, next(rates), k, level)
            found.low[c] = min(was.low, float(found.value[c]))
            found.high[c] = max(was.high, float(found.value[c]))
    return found
