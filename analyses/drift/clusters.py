"""How well two labelled clusters are apart: the classical indices, exactly, in linear memory.

Rows come with their labels; no clustering is run. Sums are float64, pairwise distances are made
block by block, so that memory grows with the rows and not with their pairs.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.results import check_finite

BLOCK = 1024
"""Rows whose distances to as many others are held at a time."""

BINS = 2**17
"""Bins that the range of distances is cut into to find a quantile of them."""

TRIM = 0.05
"""Share of the pairs that the trimmed Dunn index leaves out at each end."""


class Indices(NamedTuple):
    """The indices of one sample, as they are published. NaN where a class is empty."""

    xie_beni: float
    """W / (N D^2), 0 to infinity, lower is further apart (Xie and Beni 1991, hard membership)."""
    calinski_harabasz: float
    """Variance between over variance within, 0 to infinity, higher is further apart (Calinski
    and Harabasz 1974). It grows with N: compare equal N only."""
    davies_bouldin: float
    """(S_s + S_u) / D, 0 to infinity, lower is further apart (Davies and Bouldin 1979, p = 1)."""
    dunn: float
    """Smallest distance across over largest distance within, 0 to infinity, higher is further
    apart (Dunn 1974). One stray row decides it."""
    dunn_trimmed: float
    """The same from quantiles instead of extremes (see `indices`)."""
    silhouette: float
    """Mean over rows of (b - a) / max(a, b), -1 to 1, higher is further apart (Rousseeuw 1987)."""


class Scatter(NamedTuple):
    """Sizes, centroids and spread of two clusters: all that XBI, CHI and DBS need."""

    positive: int
    negative: int
    within: float
    """W: squared distances of all rows to their own centroid, summed."""
    distance2: float
    """D^2: squared distance of the two centroids; exactly 0 where only rounding parts them."""
    radii: float
    """S_s + S_u: the two mean distances of rows to their own centroid, added."""

    @property
    def xie_beni(self) -> float:
        """Infinite where the centroids are the same, whatever W is."""
        if not self.positive or not self.negative:
            return math.nan
        if self.distance2 == 0:
            return math.inf
        return self.within / ((self.positive + self.negative) * self.distance2)

    @property
    def calinski_harabasz(self) -> float:
        """From its own definition, not through XBI."""
        n = self.positive + self.negative
        if not self.positive or not self.negative or n == 2:
            return math.nan
        # both centroids lie on one line with the centre of all rows, parted as n_u to n_s
        between = self.distance2 * (
            self.positive * (self.negative / n) ** 2 + self.negative * (self.positive / n) ** 2
        )
        if between == 0:
            return 0.0
        return math.inf if self.within == 0 else between / (self.within / (n - 2))

    @property
    def davies_bouldin(self) -> float:
        """Infinite where the centroids are the same."""
        if not self.positive or not self.negative:
            return math.nan
        return math.inf if self.distance2 == 0 else self.radii / math.sqrt(self.distance2)


def calinski_harabasz_of(xie_beni: float, positive: int, negative: int) -> float:
    """CHI from XBI and the two sizes: (n_s n_u / N^2) (N - 2) / XBI.

    With two clusters both are the same ratio of D^2 to W, so neither says what the other does not.
    """
    n = positive + negative
    if xie_beni == 0:
        return math.inf
    return positive * negative / n**2 * (n - 2) / xie_beni


def one_statistic(found: Scatter) -> str:
    """The sentence that shows the identity of CHI and XBI with the numbers of this sample."""
    n = found.positive + found.negative
    factor = found.positive * found.negative / n**2 * (n - 2)
    return (
        f"CHI {found.calinski_harabasz:.4g} = {factor:.4g} / XBI {found.xie_beni:.4g} with "
        f"n_s = {found.positive}, n_u = {found.negative}: for two clusters CHI and XBI are one "
        "statistic, and the factor grows with the number of prompts"
    )


def scatter(
    x: Float[Tensor, "row d_model"], labels: Bool[Tensor, " *_"], *, block: int = BLOCK
) -> Scatter:
    """Sizes, W, D^2 and radii of the rows where labels are True and of the others."""
    _checked(x, labels)
    rows = (labels.nonzero().flatten(), (~labels).nonzero().flatten())
    sizes = len(rows[0]), len(rows[1])
    if not min(sizes):
        return Scatter(*sizes, math.nan, math.nan, math.nan)
    centres = [_mean(x, index, block) for index in rows]
    within, radii = 0.0, 0.0
    for index, centre in zip(rows, centres, strict=True):
        square = torch.cat([(p - centre).square().sum(1) for p in _pieces(x, index, block)])
        within += float(square.sum())
        radii += float(square.sqrt().mean())
    distance2 = float((centres[0] - centres[1]).square().sum())
    # sums of equal rows in another order differ by a few units of float64
    size = max(float(centre.square().sum()) for centre in centres) + within / sum(sizes)
    return Scatter(*sizes, within, distance2 if distance2 > 1e-28 * size else 0.0, radii)


def indices(
    x: Float[Tensor, "row d_model"],
    labels: Bool[Tensor, " *_"],
    *,
    trim: float = TRIM,
    block: int = BLOCK,
) -> Indices:
    """All indices of the rows where labels are True against the others, swapped labels alike.

    Trimmed Dunn: the `trim` quantile of the distances across the classes over the larger of the
    two `1 - trim` quantiles of the distances within a class. A quantile is the smallest distance
    that at least this share of the pairs does not exceed, found to one part in `BINS` of the
    range; at `trim` 0 it is Dunn's index. Rows of half precision are widened. With a class empty
    all are NaN; with one row in a class there is no distance within it and its silhouette is 0.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim is {trim}: give a share of the pairs from 0 to below 0.5")
    found = scatter(x, labels, block=block)
    dunn = dunn_trimmed = silhouette = math.nan
    if found.positive and found.negative:
        pairs = _pairs(x, labels, block)
        dunn = _over(pairs.gap, pairs.diameter)
        across, *inside = _quantiles(pairs, trim)
        dunn_trimmed = _over(across, max(inside)) if trim else dunn
        silhouette = _silhouette(pairs, labels)
    return Indices(
        found.xie_beni,
        found.calinski_harabasz,
        found.davies_bouldin,
        dunn,
        dunn_trimmed,
        silhouette,
    )


class _Pairs(NamedTuple):
    """What one pass over all pairs leaves."""

    within: Tensor
    """Sum of each row's distances to the rows of its own class."""
    across: Tensor
    """Sum of each row's distances to the rows of the other class."""
    gap: float
    diameter: float
    counts: Tensor
    """`[3, BINS]`: distances across, within the positive and within the negative class."""
    width: float
    """Distance that a bin spans."""


def _pairs(x: Tensor, labels: Tensor, block: int) -> _Pairs:
    rows = (labels.nonzero().flatten(), (~labels).nonzero().flatten())
    middle = _mean(x, torch.arange(len(x)), block)
    norms = torch.cat(
        [(p - middle).square().sum(1) for p in _pieces(x, torch.arange(len(x)), block)]
    )
    # no two rows are further apart than twice the largest distance from the middle
    width = max(2.0 * float(norms.max().sqrt()) * (1 + 1e-12), 1e-300) / BINS
    sums = torch.zeros(2, len(x), dtype=torch.float64)  # within, across
    counts = torch.zeros(3, BINS, dtype=torch.float64)
    gap, diameter = math.inf, 0.0
    for kind, (first, second) in enumerate(((0, 1), (0, 0), (1, 1))):
        same = kind > 0
        for i in range(0, len(rows[first]), block):
            left = rows[first][i : i + block]
            a = x[left].double() - middle
            for j in range(i if same else 0, len(rows[second]), block):
                right = rows[second][j : j + block]
                diagonal = same and i == j
                b = a if diagonal else x[right].double() - middle
                apart = _distances(a, b, norms[left], norms[right])
                sums[int(not same)].index_add_(0, left, apart.sum(1))
                if not diagonal:
                    sums[int(not same)].index_add_(0, right, apart.sum(0))
                else:
                    apart = apart[tuple(torch.triu_indices(len(a), len(a), 1))]
                if not apart.numel():
                    continue
                if same:
                    diameter = max(diameter, float(apart.max()))
                else:
                    gap = min(gap, float(apart.min()))
                counts[kind] += torch.histc(apart, BINS, 0.0, width * BINS)
    return _Pairs(sums[0], sums[1], gap, diameter, counts, width)


def _distances(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Float[Tensor, "left right"]:
    size = a2[:, None] + b2
    square = torch.addmm(size, a, b.T, alpha=-2)
    # below this nothing is left of the difference but rounding: the rows are equal
    square[square <= 1e-14 * size] = 0
    return square.sqrt_()


def _quantiles(pairs: _Pairs, trim: float) -> list[float]:
    """The low quantile across, the high ones within each class; 0 where a class has no pair."""
    found = []
    for counts, share in zip(pairs.counts, (trim, 1 - trim, 1 - trim), strict=True):
        total = float(counts.sum())
        rank = max(1, math.ceil(share * total - 1e-9))
        at = int(torch.searchsorted(counts.cumsum(0), torch.tensor(rank, dtype=torch.float64)))
        found.append((at + 0.5) * pairs.width if total and at else 0.0)
    return found


def _silhouette(pairs: _Pairs, labels: Tensor) -> float:
    positive = int(labels.sum())
    own = torch.where(labels, positive, len(labels) - positive)
    a = pairs.within / (own - 1).clamp(min=1)
    b = pairs.across / (len(labels) - own)
    larger = torch.maximum(a, b)
    each = torch.where((own > 1) & (larger > 0), (b - a) / larger.clamp(min=1e-300), 0.0)
    return float(each.mean())


def _over(gap: float, diameter: float) -> float:
    if diameter == 0:
        return math.inf if gap > 0 else 0.0
    return gap / diameter


def _mean(x: Tensor, index: Tensor, block: int) -> Float[Tensor, " d_model"]:
    # about a first row, so that a large common offset costs no digits
    origin = x[index[0]].double()
    total = torch.zeros_like(origin)
    for piece in _pieces(x, index, block):
        total += (piece - origin).sum(0)
    return origin + total / len(index)


def _pieces(x: Tensor, index: Tensor, block: int) -> Iterator[Float[Tensor, "row d_model"]]:
    for start in range(0, len(index), block):
        yield x[index[start : start + block]].double()


def _checked(x: Tensor, labels: Tensor) -> None:
    if len(x) != len(labels):
        raise ValueError(f"{len(x)} rows came with {len(labels)} labels: give one for each row")
    check_finite(x, "the activations")
