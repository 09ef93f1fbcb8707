"""How much of an update lies in the subspace alignment wrote to, beside random subspaces."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.subspaces import bases
from analyses.subspaces.deltas import Change, Deltas, changes, record_of, together
from analyses.subspaces.grouping import notes_of
from analyses.subspaces.projection_result import ProjectionEnergy
from analyses.subspaces.projections import (
    SUBSPACES,
    Of,
    along,
    fourth,
    inner,
    is_scalar,
    square,
    width,
)
from analyses.subspaces.svd import Method, Uncertified, left_svd
from probes.progress import progress as show

FRACTIONS = (0.01, 0.25, 0.5, 0.75, 0.99)


def projection_energy(
    V: Deltas,
    U: Deltas,
    fractions: Sequence[float] = FRACTIONS,
    *,
    of: Of = "size",
    method: Method = "exact",
    progress: bool = True,
) -> ProjectionEnergy:
    """Measure what of the update U = tuned - aligned lies where V = aligned - base wrote.

    Random subspaces are not sampled: mean and variance over all draws are known in closed form
    (`bases.energy_null`, and drawing without replacement for random-k). One weight at a time is in
    memory; each costs one SVD of V. `method` says how that is made (`svd.left_svd`): `certified`
    finds the directions of small fractions alone, holding all but 1e-3 of the energy of V that so
    many can hold, and refuses those beyond half of the smaller side; V then counts as of full rank.

    `tuned` must have been trained from `aligned`. The difference to a checkpoint that was not, another
    seed say, holds -V by construction and so a large share whatever it learnt: compare the two
    alignment matrices with `weight_overlap` instead. Uniformly random subspaces are a mild null,
    for any two trainings of one model share directions: hold an unrelated update beside it.
    """
    if not fractions or not all(0 < f <= 1 for f in fractions):
        raise ValueError(
            f"the fractions {tuple(fractions)} were given: give some above 0, at most 1 (25 % is "
            "0.25)"
            if fractions else "no fractions were given: give some between 0 and 1"
        )  # fmt: skip
    names, skipped, capped, certified = together(V, U), 0, 0, 0
    columns: list[tuple[str, tuple[float, ...], list[int], Tensor]] = []
    with show(len(names), f"projections of {U}", progress) as done:
        for name, (v, u) in changes(names, V, U):
            UU, VV = square(u), square(v)
            done(1)
            skipped += not UU or not VV
            if not UU and not VV:
                continue
            ks, moments = [0] * len(fractions), torch.zeros(2, len(SUBSPACES), len(fractions))
            squares = (UU, VV, inner(u, v) if UU and VV else 0.0)
            if UU and VV:
                try:
                    ks, moments, cut, quick = _weight(v, u, squares, fractions, of, method)
                except Uncertified as error:
                    raise Uncertified(f"{name}: {error}") from error
                capped, certified = capped + cut, certified + quick
            columns.append((name, squares, ks, moments))
    n, f = len(columns), len(fractions)
    moments = torch.zeros(2, len(SUBSPACES), f, n, dtype=torch.float64)
    for i, (*_, found) in enumerate(columns):
        moments[..., i] = found
    return ProjectionEnergy(
        alignment=str(V),
        update=str(U),
        fractions=tuple(float(x) for x in fractions),
        of=of,
        tensors=tuple(name for name, *_ in columns),
        ranks=torch.tensor([ks for _, _, ks, _ in columns]).reshape(n, f).T.contiguous().long(),
        squares=torch.tensor([s for _, s, _, _ in columns], dtype=torch.float64).reshape(n, 3).T,
        kept=moments[0],
        variance=moments[1],
        skipped=skipped,
        capped=capped,
        certified=certified,
        notes=notes_of([name for name, s, _, _ in columns if s[0]], V.notes, U.notes),
        record=record_of(V, U, of=of, method=method),
    )


def _weight(
    v: Change,
    u: Change,
    squares: tuple[float, ...],
    fractions: Sequence[float],
    of: Of,
    method: Method,
) -> tuple[list[int], Float[Tensor, "moment subspace fraction"], bool, bool]:
    """Dimension at each fraction, mean and variance of ||P||^2, whether V ran out of directions,
    and whether they were certified."""
    UU, VV, UV = squares
    found = torch.zeros(2, len(SUBSPACES), len(fractions), dtype=torch.float64)
    ks, cut = [], False
    svd = held = spread = None
    for f, fraction in enumerate(fractions):
        if is_scalar(v, fraction):
            ks.append(0)
            found[0, :2, f] = UV * UV / VV
            n = torch.Size(v.shape).numel()
            found[0, 2, f], found[1, 2, f] = bases.energy_null(UU, UU * UU, 1, n)
            continue
        if svd is None or held is None or spread is None:
            # so many are needed where V is of full rank, which a certified one counts as
            most = max(width(x, min(v.shape), v.shape, of) for x in fractions if x < 1)
            svd = left_svd(v, method=method, rank=most)
            held, spread = along(svd.vectors, u), fourth(u)
        quick = svd.method == "certified"
        r = min(v.shape) if quick else svd.vectors.shape[1]
        k = width(fraction, r, v.shape, of)
        cut |= of == "size" and k < round(fraction * min(v.shape))
        ks.append(k)
        found[0, 0, f] = held[:k].sum()
        # k of r directions, drawn without replacement
        inside = _inside(v, u, UU) if quick else held.sum()
        found[0, 1, f] = k * inside / r
        if quick:
            found[1, 1, f] = math.nan
        else:
            found[1, 1, f] = k * (1 - k / r) * held.var() if r > 1 else 0.0
        found[0, 2, f], found[1, 2, f] = bases.energy_null(UU, spread, k, v.shape[0])
    return ks, found, cut, svd is not None and svd.method == "certified"


def _inside(v: Change, u: Change, UU: float) -> float:
    """||Q^T U||^2 for a basis Q of all columns of V, which needs no singular vectors."""
    assert isinstance(v, Tensor)
    if v.shape[0] <= v.shape[1]:
        return UU
    return float(along(torch.linalg.qr(v.double()).Q, u).sum())
