"""Wilson's interval of a rate whose rows come in groups, by a design effect."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from probes.scores import Interval, wilson
from probes.splits import codes


def clustered_wilson(
    hits: Bool[Tensor, " row"], groups: Sequence[str], level: float = 0.95
) -> Interval:
    """Wilson's interval of a rate whose rows come in groups: with the number of independent rows
    that would be as informative (design effect), and Student's t for the normal quantile, because
    how much the groups differ is estimated from so few of them (Korn and Graubard 1998).

    Where every row is a hit, or none is, rows of a group are taken for one and the same; so are
    all rows where there is one group, which does not tell how much groups differ.
    """
    numbers, known = codes(groups)
    n, k, successes = len(hits), len(known), int(hits.sum())
    if k == n:
        return wilson(successes, n, level)
    p = successes / n
    if successes in (0, n):
        return wilson(k * successes // n, k, level)
    if k == 1:
        return _wilson(p, 1.0, _normal(level))
    off = torch.zeros(k, dtype=torch.float64).index_add_(0, numbers, hits.double() - p)
    variance = float(off.square().sum()) * k / (k - 1) / n**2
    m = min(float(n), p * (1 - p) / max(variance, 1e-300))
    return _wilson(p, m, _student(level, k - 1))


def _wilson(p: float, m: float, z: float) -> Interval:
    """Wilson's limits of a rate over m trials, m any positive number."""
    centre = (p + z * z / (2 * m)) / (1 + z * z / m)
    half = z / (1 + z * z / m) * (p * (1 - p) / m + z * z / (4 * m * m)) ** 0.5
    return Interval(p, centre - half, centre + half)


def _normal(level: float) -> float:
    return float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))


def _student(level: float, freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + level) / 2))
