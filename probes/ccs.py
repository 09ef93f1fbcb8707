"""Contrast-consistent search (Burns, Ye, Klein and Steinhardt 2022, arXiv:2212.03827).

A probe is found without labels: of two contrasting answers it should call one true and the other
false, and be sure of it. It finds *some* feature that pairs disagree on, which need not be the
concept (Farquhar et al. 2023); labels are used for the sign only.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.directions import Direction, checked, half_turned, oriented
from probes.linear import Fits, Probe, Thin, thin
from probes.results import check_finite

DECAY = 0.01
"""Weight of `|w|^2 / 2` in the loss, which makes the best probe unique in separable data."""

RATE = 0.05
"""Step size of Adam at the start."""


class Search(NamedTuple):
    """What the search found for each fit, on scaled rows in their thin basis."""

    weight: Float[Tensor, "rank fit"]
    bias: Float[Tensor, " fit"]
    loss: Float[Tensor, "fit restart"]
    """Final loss of every restart; the probe with the lowest is kept."""


def fit_ccs(
    positive: Float[Tensor, "pair d_model"],
    negative: Float[Tensor, "pair d_model"],
    *,
    flip: Bool[Tensor, " pair"] | None = None,
    restarts: int = 10,
    steps: int = 500,
    seed: int = 0,
    site: str = "",
) -> Probe:
    """The best of several searches over pairs, row i of both from pair i.

    Each of the two sides of the pairs is centred by itself, to remove what the wording of the
    answers gives away. `flip` marks the pairs whose negative row stands on the first side: where
    sides are the answers Yes and No, the pairs for which No is true. If sides were the classes
    themselves, centring would remove the concept, so by default a random half is flipped.
    """
    positive, negative = checked(positive, negative)
    pairs = len(positive)
    if len(negative) != pairs or pairs < 2:
        raise ValueError(
            f"{pairs} positive and {len(negative)} negative rows were given: contrast-consistent "
            "search needs at least 2 pairs, row i of both from pair i"
        )
    if restarts < 1 or steps < 1:
        raise ValueError(f"{restarts} restarts of {steps} steps were asked: ask for 1 or more")
    flip = half_turned(pairs, seed) if flip is None else flip
    if flip.shape != (pairs,) or flip.all() or not flip.any():
        raise ValueError(
            f"flip marks {int(flip.sum())} of {pairs} pairs: centring each side would remove the "
            "concept itself, so some pairs must be flipped and some not"
        )
    own = torch.arange(pairs)
    first = torch.where(flip, own + pairs, own)[:, None]
    second = torch.where(flip, own, own + pairs)[:, None]
    rows = _scaled(torch.cat([positive, negative]))
    generator = torch.Generator().manual_seed(seed)
    found = search(rows.rows, first, second, restarts, steps, generator)
    scores = rows.rows @ found.weight[:, 0]
    sign = 1 if scores[:pairs].mean() >= scores[pairs:].mean() else -1
    weight = sign * rows.basis @ found.weight[:, 0]
    along = oriented(weight / rows.scale, positive, negative, "ccs", site)
    return Probe(
        weight=weight,
        bias=sign * float(found.bias[0]),
        mean=rows.mean,
        scale=rows.scale,
        gap=along.gap,
        sigma=along.sigma,
        midpoint=along.midpoint,
        n=along.n,
        kind="ccs",
        site=site,
    )


def ccs_direction(
    positive: Float[Tensor, "pair d_model"],
    negative: Float[Tensor, "pair d_model"],
    *,
    flip: Bool[Tensor, " pair"] | None = None,
    seed: int = 0,
    site: str = "",
) -> Direction:
    """The direction of `fit_ccs`, on features as they came."""
    return fit_ccs(positive, negative, flip=flip, seed=seed, site=site).direction


def fit_ccs_many(
    x: Float[Tensor, "example d_model"],
    labels: Bool[Tensor, "example fit"],
    first: Int[Tensor, " pair"],
    second: Int[Tensor, " pair"],
    *,
    restarts: int = 10,
    steps: int = 500,
    seed: int = 0,
) -> Fits:
    """`fit_ccs` for every column of labels over the same pairs, given as rows on either side.

    Labels decide a sign only, so one search serves all columns.
    """
    check_finite(x, "the activations")
    rows = _scaled(x)
    generator = torch.Generator().manual_seed(seed)
    found = search(rows.rows, first[:, None], second[:, None], restarts, steps, generator)
    T = labels.double()
    scores = rows.rows @ found.weight
    ahead = (scores * T).sum(0) / T.sum(0) - (scores * (1 - T)).sum(0) / (1 - T).sum(0)
    sign = torch.where(ahead >= 0, 1.0, -1.0).double()
    return rows.back(found.weight * sign, found.bias * sign)


def _scaled(x: Float[Tensor, "example d_model"]) -> Thin:
    """Rows centred and divided by one number, their root mean variance over features: as in the
    paper's code features keep their proportions, so the search does not depend on the basis."""
    rows = thin(x, standardise=False)
    size = (rows.rows.square().sum() / (len(x) * x.shape[1])).sqrt()
    return rows._replace(rows=rows.rows / size, scale=rows.scale * size)


def search(
    Z: Float[Tensor, "example rank"],
    first: Int[Tensor, "pair fit"],
    second: Int[Tensor, "pair fit"],
    restarts: int,
    steps: int,
    generator: torch.Generator,
) -> Search:
    """Minimise mean `(p1 + p2 - 1)^2 + min(p1, p2)^2 + decay |w|^2 / 2` by Adam, from random
    directions, all fits and restarts at once."""
    fits = first.shape[1]
    first, second = (side.repeat_interleave(restarts, 1) for side in (first, second))
    pairs, columns = first.shape
    w = torch.randn(Z.shape[1], columns, generator=generator, dtype=Z.dtype)
    # unit length on the features, and scores of order 1 whatever the width
    w = w / (Z @ w).std(0)
    b = torch.zeros(columns, dtype=Z.dtype)
    state = [torch.zeros_like(t) for t in (w, w, b, b)]
    loss = torch.empty(0)
    for step in range(1, steps + 1):
        scores = Z @ w
        sides = [scores.gather(0, side) for side in (first, second)]
        # centring a side's rows is centring its scores
        p, q = (torch.sigmoid(side - side.mean(0) + b) for side in sides)
        agree = p + q - 1
        loss = (agree.square() + torch.minimum(p, q).square()).mean(0) + DECAY / 2 * w.square().sum(
            0
        )
        dp = 2 * (agree + torch.where(p < q, p, 0)) * p * (1 - p) / pairs
        dq = 2 * (agree + torch.where(p < q, 0, q)) * q * (1 - q) / pairs
        gb = (dp + dq).sum(0)
        pull = torch.zeros_like(scores)
        pull.scatter_(0, first, dp - dp.mean(0)).scatter_(0, second, dq - dq.mean(0))
        gw = Z.T @ pull + DECAY * w
        # the rate falls to zero, so that the end does not depend on where a cycle stopped
        rate = RATE * (1 - (step - 1) / steps)
        w = w - rate * _adam(gw, state[0], state[1], step)
        b = b - rate * _adam(gb, state[2], state[3], step)
    loss = loss.reshape(fits, restarts)
    best = torch.arange(fits) * restarts + loss.argmin(1)
    return Search(w[:, best], b[best], loss)


def _adam(gradient: Tensor, mean: Tensor, square: Tensor, step: int) -> Tensor:
    """Adam's step of size 1; updates its running means in place.

    One scale for all components of a column, so that the basis does not matter: a scale for each
    would blow narrow axes up, and in few rows of great width the search would end in their noise.
    """
    mean.lerp_(gradient, 0.1)
    square.lerp_(gradient.square().mean(0).expand_as(square), 0.001)
    return mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
