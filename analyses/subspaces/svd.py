"""Left singular vectors of a difference: exact, from its factors, or randomised and certified.

The randomised ones come from block subspace iteration (Halko, Martinsson and Tropp 2011) and carry
bounds of the singular values they stand for; where the bounds do not settle how many vectors hold
a share of the energy, that is an error, never a guess and never another method in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.subspaces import bases
from analyses.subspaces.adapters import LowRank
from analyses.subspaces.deltas import Change
from probes.results import check_finite

Method = Literal["auto", "exact", "certified"]

EXACT_UP_TO = 4096
"""`auto` decomposes exactly where the smaller side is at most this; factors always are exact."""

PROBES = 12
"""Random vectors that bound what a basis misses: each bound fails with probability 1e-12."""

_POWER = 3


class Uncertified(ValueError):
    """The bounds of a randomised decomposition leave open what was asked."""


@dataclass(frozen=True)
class LeftSvd:
    """Leading left singular vectors of a matrix A and what is known of its spectrum, float64."""

    vectors: Float[Tensor, "m k"]
    squares: Float[Tensor, " k"]
    """||u_i^T A||^2, largest first: the squared singular values, or exact lower bounds of them."""
    upper: Float[Tensor, " k"]
    """Upper bounds of the squared singular values; the same where the method is exact."""
    energy: float
    """||A||_F^2, exactly."""
    method: Literal["exact", "factored", "certified"]

    def kept(self, k: int) -> float:
        """Share of the energy inside the first k vectors, 0 to 1, exactly."""
        return min(1.0, float(self.squares[:k].sum()) / self.energy)

    def shortfall(self, k: int) -> float:
        """At most how much more of the energy, as a share, the best k-dimensional subspace holds;
        0 where the method is exact."""
        best = torch.minimum(self.upper[:k].sum(), self.squares[:k].sum() + self._rest())
        return max(0.0, float(best - self.squares[:k].sum())) / self.energy

    def rank(self, eta: float) -> int:
        """Smallest k whose k largest squared singular values hold the share `eta` of the energy.

        The lower and upper bounds of the spectrum must agree on it, else `Uncertified`.
        """
        if not 0 < eta <= 1:
            raise ValueError(f"an energy share of {eta} was asked: give one above 0, at most 1")
        low, high = self.rank_bounds(eta)
        if high is None or low != high:
            raise Uncertified(
                f"{eta:.0%} of the energy of a {self.vectors.shape[0]}-row matrix lie in "
                f"{low} to {high or 'more than ' + str(len(self.squares))} directions, and "
                "randomised bounds do not settle it: ask for method='exact'"
            )
        return high

    def rank_bounds(self, eta: float) -> tuple[int, int | None]:
        """Least and most that `rank` can be; None where the vectors hold less than that share."""
        wanted = eta * self.energy * (1 - 1e-12)
        held = self.squares.cumsum(0)
        high = 1 + int((held < wanted).sum())
        if self.method != "certified":
            exact = min(high, len(held))
            return exact, exact
        best = torch.minimum(self.upper.cumsum(0), held + self._rest())
        return 1 + int((best < wanted).sum()), high if high <= len(held) else None

    def _rest(self) -> float:
        """Energy outside all the vectors; rounding may not make it negative."""
        return max(0.0, self.energy - float(self.squares.sum()))


def left_svd(
    of: Change,
    *,
    method: Method = "auto",
    energy: float = 0.99,
    rank: int | None = None,
    seed: int = 0,
) -> LeftSvd:
    """Left singular vectors of a difference, the last axes of a tensor flattened; 1-D is a column.

    `exact` gives all of them that are not rounding of the decomposition; the difference of merged
    weights also has, in every direction, the rounding of these, which factors have not. `certified` gives enough for a certified
    `rank(eta)` at this share `energy`, or for a certified `rank` leading ones (whose shortfall is
    then at most 1e-3), growing the basis up to half of the smaller side, and raises `Uncertified`
    where that does not do: flat spectra need all directions. `auto` is exact up to
    `EXACT_UP_TO`, certified above. Factors are decomposed by two thin QRs, always exactly.
    A difference of zeros is refused.
    """
    if isinstance(of, LowRank):
        return _factored(of)
    if method not in ("auto", "exact", "certified"):
        raise ValueError(f"unknown method {method!r}: choose auto, exact or certified")
    A = matrix_of(of)
    if method == "exact" or (method == "auto" and min(A.shape) <= EXACT_UP_TO):
        U, s = bases.thin_svd(A)
        full = int((s > s[0] * max(A.shape) * torch.finfo(s.dtype).eps).sum())
        squares = s[:full].square()
        return LeftSvd(U[:, :full], squares, squares, float(s.square().sum()), "exact")
    check_finite(A, "the difference")
    return _certified(A.double(), energy, rank, seed)


def matrix_of(weight: Tensor) -> Float[Tensor, "m n"]:
    """A tensor as a matrix: trailing axes flattened, a vector as a column, a number as 1 x 1."""
    return weight.reshape(weight.shape[0] if weight.dim() else 1, -1)


def _factored(of: LowRank) -> LeftSvd:
    check_finite(of.left, "the left factor")
    check_finite(of.right, "the right factor")
    Q, R = torch.linalg.qr(of.left.double())
    core = R @ torch.linalg.qr(of.right.double().T, mode="r").R.T
    if not core.any():
        raise ValueError("the difference is zero, so it has no singular vectors: leave it out")
    U, s, _ = torch.linalg.svd(core, full_matrices=False)
    full = int((s > s[0] * max(of.shape) * torch.finfo(torch.float64).eps).sum())
    squares = s[:full].square()
    return LeftSvd(Q @ U[:, :full], squares, squares, float(squares.sum()), "factored")


def _certified(A: Tensor, energy: float, rank: int | None, seed: int) -> LeftSvd:
    """Double the basis until the bounds settle what was asked, or half the space is in it."""
    generator = torch.Generator().manual_seed(seed)
    limit = min(A.shape) // 2
    size = min(limit, max(32, 0 if rank is None else rank + max(8, rank // 4)))
    total = float(A.square().sum())
    if not total:
        raise ValueError("the difference is zero, so it has no singular vectors: leave it out")

    def settled(found: LeftSvd) -> bool:
        if rank is not None:
            return rank <= len(found.squares) and found.shortfall(rank) <= 1e-3
        low, high = found.rank_bounds(energy)
        return low == high

    while size:
        found = _iterated(A, size, total, generator)
        if settled(found):
            return found
        if size == limit or (rank is None and _hopeless(found, energy, limit)):
            break
        size = min(limit, 2 * size)
    asked = f"{energy:.0%} of the energy" if rank is None else f"the first {rank} directions"
    raise Uncertified(
        f"a randomised decomposition of a {A.shape[0]} x {A.shape[1]} matrix does not settle "
        f"{asked} with a basis of {size} vectors, for its spectrum falls too slowly: ask for "
        "method='exact'"
    )


def _hopeless(found: LeftSvd, energy: float, limit: int) -> bool:
    """Whether even as many directions as may be tried, each as strong as the last one found, hold
    too little: larger bases need not be computed to know it."""
    q = len(found.squares)
    return float(found.upper.sum() + (limit - q) * found.upper[-1]) < energy * found.energy


def _iterated(A: Tensor, q: int, total: float, generator: torch.Generator) -> LeftSvd:
    """Subspace iteration with a basis of q vectors, Rayleigh-Ritz, and bounds of the spectrum.

    With Q = the Ritz vectors, A = Q B + E and Q^T E = 0, so A A^T in the basis [Q, its complement]
    is [[theta, R^T], [R, C]] with R = A B^T - Q theta and ||C|| = ||E||_2^2 = tau. By the Schur
    complement of A A^T - mu, each eigenvalue is at most the larger root of
    (x - theta_i)(x - tau) = ||R||^2; taken with the first j Ritz vectors as Q, the others counted
    to the complement, it is sharp for the leading ones.
    """
    n = A.shape[1]
    Q = torch.linalg.qr(A @ torch.randn(n, q, dtype=A.dtype, generator=generator)).Q
    for _ in range(_POWER):
        Z = torch.linalg.qr(A.T @ Q).Q
        Q = torch.linalg.qr(A @ Z).Q
    B = Q.T @ A
    W, s, _ = torch.linalg.svd(B, full_matrices=False)
    Q, B, theta = Q @ W, W.T @ B, s.square()
    residuals = (A @ B.T - Q * theta).square().sum(0)  # of each Ritz vector
    tau = _remainder(
        lambda x: A @ x - Q @ (B @ x), lambda y: A.T @ y - B.T @ (Q.T @ y), n, generator
    )
    # R of the first j vectors, and a bound of the norm of the rest: what stands below them
    ahead = residuals.cumsum(0)
    everything = _root(theta, tau, ahead[-1])
    below = torch.cat([everything[1:], everything.new_tensor([tau])])
    rest = torch.maximum(below, everything.new_tensor(tau))
    bounds = _root(theta[:, None], rest[None, :], ahead[None, :])  # [i, j]
    allowed = torch.ones(q, q, dtype=torch.bool, device=A.device).triu()  # j at least i
    bounds = torch.where(allowed, bounds, torch.inf).amin(1)
    upper = torch.minimum(bounds, everything).clamp(max=total)
    return LeftSvd(Q, theta, torch.maximum(upper, theta), total, "certified")


def _root(theta: Tensor, tau: float | Tensor, square: Tensor) -> Tensor:
    return (theta + tau + ((theta - tau).square() + 4 * square).sqrt()) / 2


def _remainder(
    forward: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], Tensor],
    n: int,
    generator: torch.Generator,
) -> float:
    """Upper bound of ||E||_2^2, wrong with probability 10^-PROBES.

    ||M||_2 <= 10 sqrt(2 / pi) max ||M w_i|| over `PROBES` Gaussian w_i (Halko et al. 2011, lemma
    4.1), with M = (E E^T)^p E, whose norm is ||E||_2^(2 p + 1): the factor 8 becomes 8^(1/(2p+1)).
    """
    w = torch.randn(n, PROBES, dtype=torch.float64, generator=generator)
    p, scale = 4, 0.0  # logarithm of what was divided out
    y = forward(w)
    for _ in range(p):
        size = float(y.norm())
        if not size:
            return 0.0
        y, scale = y / size, scale + torch.log(torch.tensor(size)).item()
        y = forward(backward(y))
    largest = float(y.norm(dim=0).max())
    if not largest:
        return 0.0
    log = scale + torch.log(torch.tensor(10 * (2 / torch.pi) ** 0.5 * largest)).item()
    return float(torch.tensor(2 * log / (2 * p + 1)).exp())
