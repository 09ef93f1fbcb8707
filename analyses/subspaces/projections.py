"""The part of an update that lies in the subspace alignment wrote to (arXiv 2505.14185, 1 and 2).

For a weight matrix the subspace is spanned by k left singular vectors of V = W_aligned - W_base;
the part of U = W_tuned - W_aligned in it is Q Q^T U. A weight that is no matrix (norms, biases),
and every weight where the fraction lies outside (0, 1), is projected onto V itself instead, as in
the released code: (<U, V> / <V, V>) V. A fraction of 1 therefore does not keep everything.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.subspaces import bases
from analyses.subspaces.adapters import LowRank
from analyses.subspaces.deltas import Change
from analyses.subspaces.svd import left_svd, matrix_of

Subspace = Literal["top-k", "random-k", "random"]
"""The k strongest left singular vectors of V; k of them drawn at random; or k of a Gaussian matrix
shaped like V, which span a uniformly random subspace."""

SUBSPACES: tuple[Subspace, ...] = ("top-k", "random-k", "random")

Part = Literal["parallel", "orthogonal", "opposite"]
"""What is applied to the aligned weights: P, U - P, or -P, where P is the part in the subspace."""

Of = Literal["size", "rank"]
"""What a fraction is of: min(m, n), as in the paper, or the numerical rank of V."""


class Directions:
    """All left singular vectors of the weights of one V, decomposed once while they fit in memory.

    What was kept first stays: weights are asked for in one order again and again, and of a full
    store that drops the oldest nothing would ever be found. Ranks are all kept.
    """

    def __init__(self, limit: int = 2**30) -> None:
        self.limit = limit
        """Bytes of singular vectors kept."""
        self._vectors: dict[str, Tensor] = {}
        self._ranks: dict[str, int] = {}
        self._held = 0

    def vectors(self, name: str, V: Change) -> Float[Tensor, "m k"]:
        """Those of the weight of this name, strongest first, float64."""
        if name in self._vectors:
            return self._vectors[name]
        found = left_svd(V, method="exact").vectors
        self._ranks[name] = found.shape[1]
        if self._held + found.nbytes <= self.limit:
            # of its own: a view would keep what it was cut from
            self._vectors[name] = found.clone()
            self._held += found.nbytes
        return found

    def rank(self, name: str, V: Change) -> int:
        """How many there are."""
        if name not in self._ranks:
            self.vectors(name, V)
        return self._ranks[name]


def is_scalar(change: Change, fraction: float) -> bool:
    """Whether this weight is projected onto V itself."""
    return not 0 < fraction < 1 or len(change.shape) != 2


def width(fraction: float, rank: int, shape: Sequence[int], of: Of = "size") -> int:
    """Dimension k of the subspace: max(1, round(fraction * min(m, n))), at most the rank of V.

    Beyond the rank, singular vectors are arbitrary: an alignment by LoRA of rank 8 has eight.
    """
    if of not in ("size", "rank"):
        raise ValueError(f"a fraction of {of!r} was asked: choose 'size' or 'rank'")
    whole = min(shape) if of == "size" else rank
    return min(max(1, round(fraction * whole)), rank)


def projection(
    U: Change,
    V: Change,
    fraction: float,
    subspace: Subspace = "top-k",
    part: Part = "parallel",
    *,
    of: Of = "size",
    matched: bool = False,
    generator: torch.Generator | None = None,
    directions: Directions | None = None,
    name: str = "",
) -> Float[Tensor, "*shape"]:
    """What is applied to one aligned weight, multiplied out, in float32.

    `matched` rescales it to the norm of U, so that two subspaces compare at equal size. `generator`
    draws the random ones (see `seeded`); `directions` keeps the decomposition of V, under `name`,
    from one call to the next. Zero where U or V is zero: there is no subspace then.
    """
    if subspace not in SUBSPACES or part not in ("parallel", "orthogonal", "opposite"):
        raise ValueError(
            f"unknown projection {subspace!r}, {part!r}: choose a subspace of "
            f"{', '.join(SUBSPACES)}, and parallel, orthogonal or opposite"
        )
    if subspace != "top-k" and generator is None:
        raise ValueError(f"{subspace!r} draws at random: give a generator, seeded(seed, name)")
    if tuple(U.shape) != tuple(V.shape):
        raise ValueError(
            f"the update has shape {tuple(U.shape)} and the alignment matrix {tuple(V.shape)}: "
            "give differences of the same weight"
        )
    if not square(U) or not square(V):
        return torch.zeros(tuple(U.shape))
    update = dense(U).double()
    if is_scalar(V, fraction):
        onto = dense(V).double()
        if subspace == "random":
            onto = torch.randn(update.shape, dtype=torch.float64, generator=generator)
        P = (update * onto).sum() / onto.square().sum() * onto
    else:
        known = directions or Directions()
        if subspace == "random":
            assert generator is not None
            k = width(fraction, known.rank(name, V), V.shape, of)
            Q = bases.haar(V.shape[0], k, generator)
        else:
            every = known.vectors(name, V)
            r = every.shape[1]
            order = torch.arange(r)
            if subspace == "random-k":
                order = torch.randperm(r, generator=generator)
            Q = every[:, order[: width(fraction, r, V.shape, of)]]
        P = Q @ (Q.T @ update)
    applied = {"parallel": P, "orthogonal": update - P, "opposite": -P}[part]
    if matched and applied.any():
        applied = applied * (update.norm() / applied.norm())
    return applied.float()


def seeded(seed: int, name: str) -> torch.Generator:
    """Random numbers of one weight: they depend on the seed and its name, not on the order."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def dense(change: Change) -> Tensor:
    """The difference as one tensor."""
    return change.dense() if isinstance(change, LowRank) else change


def square(change: Change) -> float:
    """Squared Frobenius norm, from the factors where there are any."""
    return inner(change, change) if isinstance(change, LowRank) else _sum(change.double().square())


def inner(a: Change, b: Change) -> float:
    """Sum of the products of all entries, from the factors where there are any."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return _sum((a.left.T @ b.left) * (a.right @ b.right.T))
    if isinstance(a, LowRank):
        a, b = b, a
    if isinstance(b, LowRank):
        assert isinstance(a, Tensor)
        return _sum(b.left * (a.double() @ b.right.T))
    assert isinstance(a, Tensor)
    return _sum(a.double() * b.double())


def along(Q: Float[Tensor, "m k"], change: Change) -> Float[Tensor, " k"]:
    """||q_i^T U||^2 for each column of Q."""
    if not isinstance(change, LowRank):
        return (Q.T @ matrix_of(change).double()).square().sum(1)
    R = torch.linalg.qr(change.right.T, mode="r").R
    return ((Q.T @ change.left) @ R.T).square().sum(1)


def fourth(change: Change) -> float:
    """Sum of the fourth powers of the singular values."""
    if isinstance(change, LowRank):
        L, R = change.left.T @ change.left, change.right @ change.right.T
        return _sum((L @ R) * (L @ R).T)
    A = matrix_of(change).double()
    A = A if A.shape[0] >= A.shape[1] else A.T
    return _sum((A.T @ A).square())


def _sum(values: Tensor) -> float:
    return float(values.sum())
