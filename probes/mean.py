"""Mass-mean probes: read along the difference of class means, plain or whitened."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.directions import Direction, difference_of_means, lda
from probes.linear import Fits, Probe, thin
from probes.moments import Shrinkage, ledoit_wolf
from probes.results import check_finite


def fit_mass_mean(
    positive: Float[Tensor, "positive d_model"],
    negative: Float[Tensor, "negative d_model"],
    *,
    whiten: bool = False,
    shrinkage: Shrinkage = "ledoit-wolf",
    site: str = "",
) -> Probe:
    """The probe of Marks and Tegmark (2023): along the mean difference, or with `whiten` along
    their correction for features that vary together, which is Fisher's discriminant.

    Log-odds are those of `gaussian_probe`. Where rows are fewer than features the whitened form's
    sigma is too small on its own training rows, so its probabilities are too sure.
    """
    if whiten:
        found = lda(positive, negative, shrinkage=shrinkage, site=site)
    else:
        found = difference_of_means(positive, negative, site=site)
    return gaussian_probe(found, kind="whitened" if whiten else "mean")


def gaussian_probe(direction: Direction, *, kind: str | None = None) -> Probe:
    """Any direction as a probe: log-odds of two equally likely normal classes whose projections
    have the direction's midpoint, gap and sigma, which is `(x - midpoint) gap / sigma^2`."""
    if not direction.sigma > 0:
        raise ValueError(
            f"the {direction.estimator} direction has no spread inside its classes (n = "
            f"{direction.n}), so no odds: give at least 2 different examples of a class"
        )
    unit = direction.unit.double()
    return Probe(
        weight=unit * (direction.gap / direction.sigma**2),
        bias=0.0,
        mean=unit * (direction.midpoint / float(unit @ unit)),
        scale=torch.ones_like(unit),
        gap=direction.gap,
        sigma=direction.sigma,
        midpoint=direction.midpoint,
        n=direction.n,
        kind=kind or direction.estimator,
        site=direction.site,
        record=direction.record,
    )


def fit_mass_mean_many(
    x: Float[Tensor, "example d_model"],
    labels: Bool[Tensor, "example fit"],
    *,
    whiten: bool = False,
    shrinkage: Shrinkage = "ledoit-wolf",
) -> Fits:
    """`fit_mass_mean` for every column of labels over the same rows.

    The within-class scatter is the total scatter less a rank-one term along the mean difference,
    which changes the length of the solution and not its direction (Sherman-Morrison). So one
    eigenbasis serves all labellings, the Ledoit-Wolf weight of each included.
    """
    check_finite(x, "the activations")
    rows = thin(x, standardise=False)
    Z, n, width = rows.rows, len(x), x.shape[1]
    T = labels.double()
    high, low = T.sum(0), (1 - T).sum(0)
    if bool((high == 0).any()) or bool((low == 0).any()):
        raise ValueError("some labelling holds one class only: both classes are needed")
    square = Z.square().sum(0)[:, None]
    total = Z.T @ T  # the rows sum to zero, so the negative class sums to minus this
    delta = total * (1 / high + 1 / low)
    between = high * low / n
    unit = delta
    if whiten:
        length = delta.square().sum(0)
        trace = (square.sum() - between * length) / n
        frobenius = (
            square.square().sum()
            - 2 * between * (square * delta.square()).sum(0)
            + (between * length) ** 2
        ) / n**2
        if shrinkage == "ledoit-wolf":
            cross = (Z @ total) * (T / high - (1 - T) / low)
            own = total.square().sum(0) * (T / high**2 + (1 - T) / low**2)
            fourth = (Z.square().sum(1)[:, None] - 2 * cross + own).square().sum(0)
            weight = ledoit_wolf(trace, frobenius, fourth, n, width)
        else:
            weight = torch.full_like(trace, shrinkage)
        unit = delta / ((1 - weight) * square / n + weight * trace / width)
    unit = unit / unit.norm(dim=0)
    gap = (unit * delta).sum(0)
    within = (square * unit.square()).sum(0) - between * gap**2
    slope = gap * max(n - 2, 1) / within.clamp_min(1e-300)
    midpoint = (unit * total).sum(0) * (1 / high - 1 / low) / 2
    return rows.back(unit * slope, -slope * midpoint)
