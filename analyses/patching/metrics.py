"""What is read off the logits of a patched run, and how much of a gap a patch closes.

A metric is any function of the last position's logits that gives one number a prompt. Those here
are frozen dataclasses that hold what they need for each prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.model import HookedModel
from probes.scores import Intervals, bca
from probes.splits import codes
from steering.judges import first_tokens, log_odds

Metric = Callable[[Float[Tensor, "prompt vocab"]], Float[Tensor, " prompt"]]
"""Takes the logits of all prompts in their order, gives one value for each."""


@dataclass(frozen=True)
class LogitDifference:
    """Logit of one answer token minus that of another, one pair of ids a prompt."""

    answers: tuple[int, ...]
    others: tuple[int, ...]
    name: str = "logit difference"
    unit: str = "logits"

    def __call__(self, logits: Tensor) -> Tensor:
        scores = logits.double()
        return _taken(scores, self.answers) - _taken(scores, self.others)


@dataclass(frozen=True)
class LogProbability:
    """Log-probability of one answer token a prompt."""

    answers: tuple[int, ...]
    name: str = "log-probability of the answer"
    unit: str = "nats"

    def __call__(self, logits: Tensor) -> Tensor:
        return _taken(logits.double().log_softmax(-1), self.answers)


@dataclass(frozen=True)
class Probability:
    """Probability of one answer token a prompt, 0 to 1."""

    answers: tuple[int, ...]
    name: str = "probability of the answer"
    unit: str = "probability"

    def __call__(self, logits: Tensor) -> Tensor:
        return _taken(logits.double().softmax(-1), self.answers)


@dataclass(frozen=True)
class Divergence:
    """KL(reference ‖ run) of the next token, at least 0; the reference is usually the source run,
    where it is 0 by definition."""

    reference: Float[Tensor, "prompt vocab"]
    """Logits of the reference run."""
    name: str = "KL from the source run"
    unit: str = "nats"

    def __call__(self, logits: Tensor) -> Tensor:
        if logits.shape != self.reference.shape:
            raise ValueError(
                f"the reference has logits of shape {tuple(self.reference.shape)}, the run "
                f"{tuple(logits.shape)}: compare runs of the same prompts and one vocabulary"
            )
        p, q = self.reference.double().log_softmax(-1), logits.double().log_softmax(-1)
        # equal logits give exactly 0; rounding may leave others a hair below
        return (p.exp() * (p - q)).sum(-1).clamp(min=0)


@dataclass(frozen=True)
class RefusalLogOdds:
    """Log-odds that the first token of the answer opens a refusal (`steering.judges.log_odds`)."""

    tokens: tuple[int, ...]
    name: str = "refusal log-odds"
    unit: str = "nats"

    @classmethod
    def of(cls, model: HookedModel, openers: Sequence[str] = ("I",)) -> "RefusalLogOdds":
        """The tokens that answers opening with these texts begin with."""
        return cls(tuple(first_tokens(model, openers)))

    def __call__(self, logits: Tensor) -> Tensor:
        return log_odds(logits, self.tokens)


def named(metric: Any) -> tuple[str, str]:
    """Name and unit of a metric; a plain function has its own name and no unit."""
    name = getattr(metric, "name", None) or getattr(metric, "__name__", type(metric).__name__)
    return str(name), str(getattr(metric, "unit", ""))


def measured(
    metric: Metric, logits: Float[Tensor, "prompt vocab"], texts: Sequence[str]
) -> Float[Tensor, " prompt"]:
    """The metric of every prompt in float64; a wrong shape or a NaN is an error."""
    values = torch.as_tensor(metric(logits))
    name = named(metric)[0]
    if values.shape != (len(logits),):
        raise ValueError(
            f"the metric {name!r} gave shape {tuple(values.shape)} for {len(logits)} prompts: "
            "return one number for each"
        )
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the metric {name!r} is {float(values[bad[0]])} for prompt {bad[0]}, "
            f"{texts[bad[0]][:60]!r}: leave that prompt out, or use a metric that is finite there"
        )
    return values.double()


def mean_interval(
    values: Float[Tensor, "*column prompt"], groups: Sequence[str], *, resamples: int, seed: int
) -> Intervals:
    """Mean over prompts with its BCa interval over groups, float64."""
    return _ratio(
        values, torch.ones(values.shape[-1], dtype=torch.float64), groups, resamples, seed
    )


def share_interval(
    change: Float[Tensor, "*column prompt"],
    gap: Float[Tensor, " prompt"],
    groups: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> Intervals:
    """Mean change over mean gap with its BCa interval over groups.

    A ratio of means, since a mean of ratios is ruled by the prompts whose gap happens to be small.
    1 is the whole gap; NaN where the mean gap is zero to rounding.
    """
    return _ratio(change, gap, groups, resamples, seed)


def _ratio(
    over: Tensor, under: Tensor, groups: Sequence[str], resamples: int, seed: int
) -> Intervals:
    numbers, known = codes(groups)
    if len(groups) != over.shape[-1]:
        raise ValueError(
            f"{over.shape[-1]} prompts came with {len(groups)} topics: give one for each"
        )
    columns = over.double().reshape(-1, over.shape[-1])
    member = torch.nn.functional.one_hot(numbers, len(known)).double()
    N, D = (columns @ member).T, under.double() @ member  # sums by group
    unknown = torch.full((len(columns),), torch.nan, dtype=torch.float64)
    shape = over.shape[:-1]
    if not float(D.sum().abs()) > 1e-9 * float(under.double().abs().sum()):
        nothing = unknown.reshape(shape)
        return Intervals(nothing, nothing, nothing)
    value = N.sum(0) / D.sum()
    if len(known) < 2:
        return Intervals(value.reshape(shape), unknown.reshape(shape), unknown.reshape(shape))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(known), (resamples, len(known)), generator=generator)
    counts = torch.zeros(resamples, len(known), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    leave = 1 - torch.eye(len(known), dtype=torch.float64)
    resampled, jackknife = ((W @ N) / (W @ D)[:, None] for W in (counts, leave))
    missing = ~value.isfinite()  # cells that do not exist
    known_value, resampled, jackknife = (
        torch.where(missing, torch.zeros_like(t), t) for t in (value, resampled, jackknife)
    )
    found = bca(known_value, resampled, jackknife)
    low, high = (torch.where(missing, unknown, t).reshape(shape) for t in (found.low, found.high))
    return Intervals(value.reshape(shape), low, high)


def triple(found: Intervals, at: int = 0) -> Float[Tensor, " limit"]:
    """One column of several: value, lower and upper limit."""
    return torch.stack([t.reshape(-1)[at] for t in found]).float()


def normalised(
    patched: Float[Tensor, " prompt"],
    target: Float[Tensor, " prompt"],
    source: Float[Tensor, " prompt"],
) -> Float[Tensor, " prompt"]:
    """(patched - target) / (source - target) of each prompt: 0 the target run, 1 the source run.

    NaN where source and target agree to rounding, never infinite.
    """
    p, t, s = patched.double(), target.double(), source.double()
    gap = s - t
    small = gap.abs() <= 1e-9 * (s.abs() + t.abs())
    return torch.where(small, torch.nan, (p - t) / torch.where(small, torch.ones_like(gap), gap))


def _taken(scores: Tensor, ids: Sequence[int]) -> Tensor:
    if len(ids) != len(scores):
        raise ValueError(
            f"the metric has answers for {len(ids)} prompts, the run has {len(scores)}: give one "
            "token id for each prompt"
        )
    index = torch.tensor(ids)
    if bool(((index < 0) | (index >= scores.shape[-1])).any()):
        raise ValueError(
            f"an answer id is {int(index.max())} or below 0, the vocabulary has "
            f"{scores.shape[-1]} rows: give ids of this model's tokenizer"
        )
    return scores.gather(1, index[:, None].to(scores.device))[:, 0]
