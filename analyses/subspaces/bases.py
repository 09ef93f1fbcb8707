"""Linear subspaces and how they compare: pure functions of tensors.

A basis is `Float[Tensor, "d k"]` with orthonormal columns, strongest first, float64. Nothing here
knows of models: the columns may be parts of weights, activations, or directions.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from probes.results import check_finite


class Null(NamedTuple):
    """How a share is distributed when the subspaces are independent and uniformly random (Haar)."""

    mean: float
    sd: float
    high: float
    """95th percentile, that of the Beta distribution with this mean and deviation."""


def thin_svd(
    matrix: Float[Tensor, "d n"],
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Left singular vectors and singular values in float64, strongest first, k = min(d, n).

    A matrix of zeros is refused: its singular vectors would be arbitrary.
    """
    A = _matrix(matrix, "the matrix")
    d, n = A.shape
    if d >= 2 * n:  # the singular vectors of R are found in a smaller space
        Q, R = torch.linalg.qr(A)
        U, s, _ = torch.linalg.svd(R)
        return Q @ U, s
    if n >= 2 * d:  # R^T has the same left singular vectors
        A = torch.linalg.qr(A.T, mode="r").R.T
    U, s, _ = torch.linalg.svd(A, full_matrices=False)
    return U, s


def span(
    columns: Float[Tensor, "d n"], *, rank: int | None = None, energy: float | None = None
) -> Float[Tensor, "d k"]:
    """Orthonormal basis of what the columns span: their left singular vectors, strongest first.

    `rank` keeps that many, `energy` the fewest that hold that share of the squared Frobenius norm
    (0 to 1); without either all that are not rounding. A rank beyond that is refused.
    """
    if rank is not None and energy is not None:
        raise ValueError(f"rank={rank} and energy={energy} were both given: give one of them")
    U, s = thin_svd(columns)
    eps = torch.finfo(columns.dtype if columns.dtype.is_floating_point else torch.float64).eps
    full = int((s > s[0] * max(columns.shape) * eps).sum())
    if energy is not None:
        return U[:, : energy_rank(s, energy)]
    if rank is None:
        return U[:, :full]
    if not 1 <= rank <= full:
        raise ValueError(
            f"rank {rank} was asked of columns that span {full} dimensions: ask for 1 to {full}"
        )
    return U[:, :rank]


def energy_rank(singular_values: Float[Tensor, " k"], eta: float) -> int:
    """Smallest k whose k largest singular values hold the share `eta` of the sum of squares.

    `eta` lies above 0 and is at most 1; the order of the values does not matter.
    """
    if not 0 < eta <= 1:
        raise ValueError(f"an energy share of {eta} was asked: give one above 0, at most 1")
    held = _spectrum(singular_values).square().cumsum(0)
    # a share met exactly (equal values, eta = 1/2) may fall short by rounding
    return 1 + int((held < eta * held[-1] * (1 - 1e-12)).sum())


def effective_rank(singular_values: Float[Tensor, " k"]) -> float:
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007);
    from 1 to k, which equal values reach."""
    s = _spectrum(singular_values)
    return float(torch.special.entr(s / s.sum()).sum().exp())


def participation_ratio(singular_values: Float[Tensor, " k"]) -> float:
    """(sum of s^2)^2 / (sum of s^4), s^2 being the variance along each axis; from 1 to k."""
    variance = _spectrum(singular_values).square()
    variance = variance / variance[0]  # fourth powers of small values would underflow
    return float(variance.sum().square() / variance.square().sum())


def mode_overlap(Q_x: Float[Tensor, "d_x k_x"], Q_y: Float[Tensor, "d_y k_y"]) -> float:
    """||Q_x^T Q_y||_F^2 / min(k_x, k_y): the mean squared cosine of the principal angles, 0 to 1.

    It is 1 when one subspace holds the other and 0 when they are orthogonal. It grows with the
    dimensions alone, so read it beside `overlap_null` (mode subspace overlap, arXiv 2505.14185).
    """
    X, Y = _pair(Q_x, Q_y)
    return min(1.0, float((X.T @ Y).square().sum()) / min(X.shape[1], Y.shape[1]))


def overlap_null(k_x: int, k_y: int, d: int) -> Null:
    """`mode_overlap` of independent uniformly random subspaces of dimensions k_x and k_y in d.

    The mean is max(k_x, k_y) / d; the variance of tr(P_x P_y) is
    2 k_x (d - k_x) k_y (d - k_y) / (d^2 (d - 1) (d + 2)). Both are exact, and so is the percentile
    where one subspace is a line.
    """
    if not (1 <= k_x <= d and 1 <= k_y <= d):
        raise ValueError(f"subspaces of dimension {k_x} and {k_y} do not fit into {d}: give 1 to d")
    small, large = min(k_x, k_y), max(k_x, k_y)
    if large == d:  # everything holds the other
        return Null(1.0, 0.0, 1.0)
    variance = 2 * k_x * (d - k_x) * k_y * (d - k_y) / (d**2 * (d - 1) * (d + 2))
    mean, sd = large / d, math.sqrt(variance) / small
    return Null(mean, sd, beta_quantile(mean, sd, low=max(0, k_x + k_y - d) / small))


def energy_null(total: float, fourth: float, k: int, d: int) -> tuple[float, float]:
    """Mean and variance of ||Q^T U||_F^2 for a random basis Q of dimension k, U being fixed.

    `total` is tr(U U^T) and `fourth` is tr(U U^T U U^T), the sums of squares and of fourth powers
    of the singular values of U; d is its number of rows.
    """
    if not 1 <= k <= d:
        raise ValueError(f"a subspace of dimension {k} does not fit into {d}: give 1 to {d}")
    if d == 1 or k == d:
        return total, 0.0
    spread = max(0.0, d * fourth - total**2)  # 0 where U spreads evenly, but for rounding
    return total * k / d, 2 * k * (d - k) * spread / (d**2 * (d - 1) * (d + 2))


def beta_quantile(
    mean: float, sd: float, level: float = 0.95, *, low: float = 0.0, high: float = 1.0
) -> float:
    """Quantile of the Beta distribution over [low, high] that has this mean and deviation."""
    from scipy.stats import beta

    centre, spread = (mean - low) / (high - low), (sd / (high - low)) ** 2
    if spread <= 0 or not 0 < centre < 1:
        return mean
    size = centre * (1 - centre) / spread - 1
    return low + (high - low) * float(beta.ppf(level, centre * size, (1 - centre) * size))


def haar(d: int, k: int, generator: torch.Generator) -> Float[Tensor, "d k"]:
    """Basis of a uniformly random subspace of dimension k."""
    if not 1 <= k <= d:
        raise ValueError(f"a random subspace of dimension {k} does not fit into {d}: ask 1 to {d}")
    Q, R = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=generator))
    return Q * R.diagonal().sign()  # signs of the QR are not uniform by themselves


def principal_angles(
    Q_x: Float[Tensor, "d_x k_x"], Q_y: Float[Tensor, "d_y k_y"]
) -> Float[Tensor, " k"]:
    """The min(k_x, k_y) principal angles in radians, 0 to pi/2, smallest first.

    Small angles come from their sines, for a cosine near 1 has lost them to rounding (Bjorck and
    Golub 1973).
    """
    X, Y = _pair(Q_x, Q_y)
    if X.shape[1] < Y.shape[1]:
        X, Y = Y, X
    C = X.T @ Y
    cosines = torch.linalg.svdvals(C).clamp(max=1)  # largest first
    sines = torch.linalg.svdvals(Y - X @ C).flip(0).clamp(max=1)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def projector(Q: Float[Tensor, "d k"]) -> Float[Tensor, "d d"]:
    """Q Q^T, which maps a vector to its part in the subspace."""
    Q = _basis(Q, "the basis")
    return Q @ Q.T


def parallel(Q: Float[Tensor, "d k"], x: Float[Tensor, " width *column"]) -> Tensor:
    """The part of x inside the subspace, Q Q^T x: float64, shaped like x (columns are vectors)."""
    Q = _basis(Q, "the basis")
    if x.shape[0] != Q.shape[0]:
        raise ValueError(
            f"vectors of width {x.shape[0]} cannot be projected onto a subspace of "
            f"{Q.shape[0]} dimensions: give both from the same space"
        )
    check_finite(x, "what is projected")
    return Q @ (Q.T @ x.double())


def orthogonal(Q: Float[Tensor, "d k"], x: Float[Tensor, " width *column"]) -> Tensor:
    """The part of x outside the subspace, x - Q Q^T x: float64, shaped like x."""
    return x.double() - parallel(Q, x)


def linear_cka(
    X: Float[Tensor, "example d_x"], Y: Float[Tensor, "row d_y"], *, debiased: bool = False
) -> float:
    """Linear centred kernel alignment of two representations of the same examples; 0 to 1.

    Invariant to rotation and to one scale of each (Kornblith et al. 2019). With few examples and
    many dimensions it is near 1 for anything; `debiased` takes the unbiased estimates of HSIC
    (Song et al. 2012), is about 0 for independent data, and may be negative.
    """
    X, Y = _matrix(X, "the first representation"), _matrix(Y, "the second representation")
    n, least = len(X), 4 if debiased else 2
    if len(Y) != n or n < least:
        raise ValueError(
            f"CKA needs the same examples twice, at least {least}; given were {n} and {len(Y)}"
        )
    X, Y = X - X.mean(0), Y - Y.mean(0)
    if not X.any() or not Y.any():
        raise ValueError("a representation is the same for every example: CKA needs a spread")
    if not debiased:
        cross = (X.T @ Y).square().sum()
        return float(cross / ((X.T @ X).norm() * (Y.T @ Y).norm()))
    K, L = X @ X.T, Y @ Y.T
    own = _hsic(K, K) * _hsic(L, L)
    if own <= 0:
        raise ValueError(
            f"{n} examples are too few for the debiased CKA of {X.shape[1]} and {Y.shape[1]} "
            "dimensions (a self-similarity came out at 0 or below): give more examples"
        )
    return _hsic(K, L) / math.sqrt(own)


def _hsic(K: Tensor, L: Tensor) -> float:
    """Song et al. 2012, eq. 5: HSIC without the bias of comparing an example with itself."""
    n = len(K)
    K, L = (G - torch.diag(G.diagonal()) for G in (K, L))
    across = K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * (K.sum(0) @ L.sum(0)) / (n - 2)
    return float((K * L).sum() + across) / (n * (n - 3))


def _matrix(given: Tensor, what: str) -> Tensor:
    if given.dim() != 2 or not given.numel():
        raise ValueError(
            f"{what} has shape {tuple(given.shape)}: give a matrix with rows and columns"
        )
    check_finite(given, what)
    if not given.any():
        raise ValueError(f"{what} holds only zeros, so it spans nothing: leave it out")
    return given.detach().double()


def _spectrum(given: Tensor) -> Tensor:
    """Singular values in float64, largest first; refuses what are none."""
    if given.dim() != 1 or not len(given):
        raise ValueError(f"singular values have shape {tuple(given.shape)}: give one row of them")
    check_finite(given, "the singular values")
    if bool((given < 0).any()) or not given.any():
        raise ValueError(
            f"{int((given < 0).sum())} singular values are negative and {int((given > 0).sum())} "
            "positive: give those of a matrix that is not zero"
        )
    return given.detach().double().sort(descending=True).values


def _basis(given: Tensor, what: str) -> Tensor:
    """The basis in float64; refuses columns that are not orthonormal."""
    Q = _matrix(given, what)
    d, k = Q.shape
    off = float((Q.T @ Q - torch.eye(k, dtype=Q.dtype, device=Q.device)).abs().max())
    if k > d or off > 1e-4:
        raise ValueError(
            f"{what} ({d} x {k}) has columns that are off orthonormal by {off:.2g}: make it with "
            "bases.span(columns)"
        )
    return Q


def _pair(Q_x: Tensor, Q_y: Tensor) -> tuple[Tensor, Tensor]:
    X, Y = _basis(Q_x, "the first basis"), _basis(Q_y, "the second basis")
    if X.shape[0] != Y.shape[0]:
        raise ValueError(
            f"subspaces of {X.shape[0]} and {Y.shape[0]} dimensions cannot be compared: give two "
            "of the same space"
        )
    return X, Y
