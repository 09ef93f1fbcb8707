"""Shares and means of answer tokens, with intervals over prompts.

Tokens of one answer are not independent, so prompts are resampled whole. Pooled over tokens, a
long answer weighs more; per response, every answer weighs the same.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from probes.scores import Intervals, bca, wilson

KINDS = ("unshifted", "marginal", "shifted")
LIMITS = (1, 3)
"""Ranks up to the first are unshifted, up to the second marginal."""

Per = Literal["token", "response"]

RESAMPLES = 2000


class Pooled(NamedTuple):
    """Ratios of sums over prompts: the estimate, its resamples and its leave-one-out values."""

    value: Float[Tensor, "*column"]
    resampled: Float[Tensor, " resample *column"]
    jackknife: Float[Tensor, " prompt *column"]

    def interval(self) -> Intervals:
        """95 % BCa limits; NaN of one prompt, which does not tell how much prompts differ."""
        if len(self.jackknife) < 2:
            none = torch.full_like(self.value, torch.nan)
            return Intervals(self.value, none, none.clone())
        return bca(*self)

    def minus(self, other: "Pooled") -> "Pooled":
        """The paired difference, resample by resample: both must be of the same prompts."""
        return Pooled(*(a - b for a, b in zip(self, other, strict=True)))


def sums(
    values: Shaped[Tensor, "token column"],
    owner: Int[Tensor, " token"],
    chosen: Bool[Tensor, " token"],
    prompts: int,
) -> tuple[Float[Tensor, "prompt column"], Float[Tensor, " prompt"]]:
    """Sums of the chosen tokens' values, and their number, for each prompt; float64."""
    at = owner[chosen]
    total = torch.zeros(prompts, values.shape[1], dtype=torch.float64)
    total.index_add_(0, at, values[chosen].double())
    return total, torch.bincount(at, minlength=prompts).double()


def pooled(
    total: Float[Tensor, "prompt column"],
    counts: Float[Tensor, " prompt"],
    per: Per = "token",
    seed: int = 0,
) -> Pooled:
    """Mean of the tokens' values (`per="token"`) or of the prompts' means (`per="response"`).

    Prompts without a token are left out; the same seed draws the same prompts again.
    """
    if per not in ("token", "response"):
        raise ValueError(f"per={per!r}: choose 'token' (pooled) or 'response' (mean of answers)")
    some = counts > 0
    total, counts = total[some], counts[some]
    n = len(counts)
    if not n:
        raise ValueError("0 prompts have tokens there: a mean needs one, an interval needs two")
    if per == "response":
        total, counts = total / counts[:, None], torch.ones_like(counts)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
    weights = torch.zeros(RESAMPLES, n, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    out = total.sum(0) - total, counts.sum() - counts
    return Pooled(
        total.sum(0) / counts.sum(),
        weights @ total / (weights @ counts)[:, None],
        out[0] / out[1][:, None],
    )


def share_intervals(found: Pooled) -> Intervals:
    """Limits of shares. Where a share is 0 or 1 in every resample, they are Wilson's for as many
    prompts, not a point."""
    limits = found.interval()
    n = len(found.jackknife)
    if n < 2:
        return limits
    for k in ((found.value == 0) | (found.value == 1)).nonzero().flatten().tolist():
        bound = wilson(round(n * float(found.value[k])), n)
        limits.low[k], limits.high[k] = bound.low, bound.high
    return limits


def token_counts(
    ids: Int[Tensor, " token"], shifted: Bool[Tensor, " token"]
) -> list[tuple[int, int, int]]:
    """(id, occurrences, how many of them are shifted) of every id among the tokens."""
    known, place = ids.unique(return_inverse=True)
    count = torch.bincount(place, minlength=len(known))
    often = torch.bincount(place[shifted], minlength=len(known))
    return list(zip(known.tolist(), count.tolist(), often.tolist(), strict=True))


def enough(groups: Sequence[str], least: int) -> list[str]:
    """A sentence for each group with fewer prompts than `least`."""
    counts = {group: list(groups).count(group) for group in dict.fromkeys(groups)}
    return [
        f"There are only {n} prompts of {group}: intervals over fewer than {least} are too narrow, "
        "so read them as a rough guide."
        for group, n in counts.items()
        if n < least
    ]


def cut_off(counts: Sequence[int], stops: Bool[Tensor, " token"], limit: int | None) -> int:
    """Answers of `limit` tokens of which the last does not stop; 0 where the limit is unknown."""
    if limit is None:
        return 0
    answers = stops.split(list(counts))
    return sum(len(own) >= limit and not bool(own[-1]) for own in answers)


def said_cut_off(writer: str, cut: int, answers: int, limit: int | None) -> list[str]:
    """A sentence where answers were cut off."""
    if not cut:
        return []
    return [
        f"{cut} of {answers} answers of {writer} met the limit of {limit} tokens without a stop: "
        "what comes behind, and the end of the answer, was not measured."
    ]
