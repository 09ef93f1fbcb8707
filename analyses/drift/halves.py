"""The two terms whose null is two halves of the topics: representation and token.

Both have many cells (layers; answer tokens of each class), some of which differ from topic to topic
far more than others. Each cell counts in units of its own null before they are joined.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.drift.terms import Term, joined

KEPT = 1024
"""Token ids that the token term tells apart; all others are one more."""


class Projections(NamedTuple):
    """Positions along the reference's class direction, summed over the prompts of a topic."""

    sums: Float[Tensor, "class group layer"]
    counts: Float[Tensor, "class group"]


def project(
    along: Float[Tensor, "layer prompt"],
    positive: Bool[Tensor, " prompt"],
    groups: Int[Tensor, " prompt"],
) -> Projections:
    """Sums by class (positive first) and topic of each prompt's position in each layer."""
    n = int(groups.max()) + 1
    sums = torch.zeros(2, n, len(along), dtype=torch.float64)
    counts = torch.zeros(2, n, dtype=torch.float64)
    for c, chosen in enumerate((positive, ~positive)):
        sums[c].index_add_(0, groups[chosen], along[:, chosen].T.double())
        counts[c] = torch.bincount(groups[chosen], minlength=n)
    return Projections(sums, counts)


def contrast(
    given: Projections, weights: Float[Tensor, "draw group"]
) -> Float[Tensor, "draw layer"]:
    """Positive mean less negative mean in each layer, topics as often as drawn."""
    means = [
        (weights @ sums) / (weights @ counts)[:, None]
        for sums, counts in zip(given.sums, given.counts, strict=True)
    ]
    return means[0] - means[1]


class Null(NamedTuple):
    """95th percentiles between two halves of the topics."""

    cells: Float[Tensor, "*cell"]
    """Of each layer, or of each class and step."""
    whole: float
    """Of the statistic that joins the cells."""


def representation_null(reference: Projections, split: Bool[Tensor, "split group"]) -> Null:
    """From the reference's own projections."""
    first = split.double()
    gap = contrast(reference, first) - contrast(reference, 1 - first)
    cells = gap.abs().quantile(0.95, 0)
    return Null(cells, float(_rms(gap, cells).quantile(0.95)))


def representation_term(change: Projections, null: Null, *, count: int, seed: int) -> Term:
    """From the projections of the change of states (checkpoint minus reference, same prompts).

    Each layer's change is divided by the layer's own null, so that layers that hardly part the
    classes count little; the statistic is the root mean square over layers.
    """

    def statistic(weights: Tensor) -> Tensor:
        return _rms(contrast(change, weights), null.cells)

    return joined(statistic, change.counts.shape[1], null.whole, count, seed)


def _rms(values: Tensor, cells: Tensor) -> Tensor:
    return (values / cells).square().mean(1).sqrt()


class Steps(NamedTuple):
    """Probabilities of answer tokens, summed over the prompts of a topic and class."""

    sums: Float[Tensor, "class group step kept"]
    counts: Float[Tensor, "class group step"]


def kept_ids(*logp: Float[Tensor, "prompt step vocab"], kept: int = KEPT) -> Int[Tensor, " kept"]:
    """The ids with the largest total probability."""
    mass = sum(x.exp().sum((0, 1)) for x in logp)
    assert isinstance(mass, Tensor)
    return mass.topk(min(kept, len(mass))).indices


def steps(
    logp: Float[Tensor, "prompt step vocab"],
    reached: Bool[Tensor, "prompt step"],
    positive: Bool[Tensor, " prompt"],
    groups: Int[Tensor, " prompt"],
    ids: Int[Tensor, " kept"],
) -> Steps:
    """Probabilities of the ids, and of all others together, by topic; rows beyond the end of an
    answer are left out."""
    p = logp[..., ids].double().exp()
    p = torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp_min(0.0)], -1) * reached[..., None]
    n = int(groups.max()) + 1
    shape = (2, n, *p.shape[1:])
    sums = torch.zeros(shape, dtype=torch.float64)
    counts = torch.zeros(shape[:-1], dtype=torch.float64)
    for c, chosen in enumerate((positive, ~positive)):
        sums[c].index_add_(0, groups[chosen], p[chosen])
        counts[c].index_add_(0, groups[chosen], reached[chosen].double())
    return Steps(sums, counts)


def mean_steps(
    given: Steps, weights: Float[Tensor, "draw group"]
) -> Float[Tensor, "draw class step kept"]:
    """Mean distribution at each step over the topics, as often as drawn; NaN where none is."""
    total = torch.einsum("dg,cgsk->dcsk", weights, given.sums)
    return total / torch.einsum("dg,cgs->dcs", weights, given.counts)[..., None]


def jensen_shannon(
    p: Float[Tensor, "*row kept"], q: Float[Tensor, "*row kept"]
) -> Float[Tensor, "*row"]:
    """Jensen-Shannon divergence of probabilities, nats, 0 to ln 2; exactly 0 for equal ones."""
    m = (p + q) / 2
    return (torch.xlogy(p, p / m).nan_to_num(0.0) + torch.xlogy(q, q / m).nan_to_num(0.0)).sum(
        -1
    ).clamp_min(0.0) / 2


def _divergences(a: Steps, b: Steps, weights: Tensor, other: Tensor) -> Tensor:
    """Divergence of the mean distributions, `[draw, class, step]`; NaN where no answer reaches."""
    found = []
    for rows, against in zip(weights.split(100), other.split(100), strict=True):
        p, q = mean_steps(a, rows), mean_steps(b, against)
        empty = p[..., 0].isnan() | q[..., 0].isnan()
        js = jensen_shannon(p.nan_to_num(0.0), q.nan_to_num(0.0))
        found.append(js.masked_fill(empty, float("nan")))
    return torch.cat(found)


def token_null(reference: Steps, split: Bool[Tensor, "split group"]) -> Null:
    """From the reference's own distributions."""
    first = split.double()
    js = _divergences(reference, reference, first, 1 - first)
    cells = js.nanquantile(0.95, dim=0)
    return Null(cells, float((js / cells).flatten(1).nanmean(1).quantile(0.95)))


def token_term(reference: Steps, other: Steps, null: Null, *, count: int, seed: int) -> Term:
    """From the steps of reference and checkpoint on the same answers, with the same ids kept.

    The divergence at each step of each class is divided by that cell's own null, so that steps at
    which answers differ from prompt to prompt count little; the statistic is the mean over cells.
    """

    def statistic(weights: Tensor) -> Tensor:
        js = _divergences(reference, other, weights, weights)
        return (js / null.cells).flatten(1).nanmean(1)

    return joined(statistic, reference.counts.shape[1], null.whole, count, seed)
