"""The two terms whose null is two halves of the topics: representation and token.

Both have many cells (layers; answer tokens of each class), some of which differ from topic to topic
far more than others. Each cell counts in units of its own null before they are joined.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.drift.terms import Term, joined


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
    return (values / cells).square().nanmean(1).sqrt()


class Moves(NamedTuple):
    """Probabilities of answer tokens, or their changes, summed over the prompts of a topic: the
    inner products of these sums, from which the length of any mean over topics follows. A cell is
    a step of the answers of a class, positive class first."""

    products: Float[Tensor, "cell group group"]
    counts: Float[Tensor, "cell group"]
    """Prompts of each topic whose answer reaches the step."""


def moves(
    given: Callable[[Tensor, int], Float[Tensor, "row vocab"]],
    reached: Bool[Tensor, "prompt step"],
    positive: Bool[Tensor, " prompt"],
    groups: Int[Tensor, " prompt"],
) -> Moves:
    """Of what `given` says for some prompts at a step, one cell at a time; rows beyond the end of
    an answer are left out."""
    n = int(groups.max()) + 1
    products, counts = [], []
    for chosen in (positive, ~positive):
        for step in range(reached.shape[1]):
            rows = (chosen & reached[:, step]).nonzero().flatten()
            values = given(rows, step).double()
            sums = torch.zeros(n, values.shape[1], dtype=torch.float64)
            sums.index_add_(0, groups[rows], values)
            products.append(sums @ sums.T)
            counts.append(torch.bincount(groups[rows], minlength=n).double())
    return Moves(torch.stack(products), torch.stack(counts))


def _means(counts: Tensor, weights: Tensor) -> Float[Tensor, "draw cell group"]:
    """What each topic's sum counts in the mean over topics as often as drawn; NaN where no answer
    reaches the step."""
    return weights[:, None] / torch.einsum("dg,cg->dc", weights, counts)[..., None]


def _length(given: Moves, weights: Float[Tensor, "draw cell group"]) -> Float[Tensor, "draw cell"]:
    squared = torch.einsum("dcg,cgh,dch->dc", weights, given.products, weights)
    return squared.clamp_min(0.0).sqrt()  # a hair below 0 by rounding; NaN stays


def token_null(reference: Moves, split: Bool[Tensor, "split group"]) -> Null:
    """From the reference's own probabilities.

    No cell's null is taken for less than what one prompt of a half does that says another token.
    """
    first = split.double()
    apart = _means(reference.counts, first) - _means(reference.counts, 1 - first)
    gap = _length(reference, apart)
    least = 2 * math.sqrt(2) / reference.counts.sum(1)
    cells = torch.maximum(gap.nanquantile(0.95, dim=0), least)
    return Null(cells, float(_rms(gap, cells).nanquantile(0.95)))


def token_term(change: Moves, null: Null, *, count: int, seed: int) -> Term:
    """From the changes of probability, checkpoint minus reference, on the same answers.

    The distance of the mean distributions, square root of the summed squares of changes of
    probability (0 to the square root of 2), is divided in each cell by the cell's own null, so that
    steps at which answers differ from prompt to prompt count little; the statistic is the root mean
    square over cells. A squared distance exceeds the true one by the variance of the mean, which
    resampling measures; Jensen-Shannon divergences have no such property, and intervals from
    resampled ones miss the true value in most cases.
    """

    def statistic(weights: Tensor) -> Tensor:
        return _rms(_length(change, _means(change.counts, weights)), null.cells)

    return joined(statistic, change.counts.shape[1], null.whole, count, seed)
