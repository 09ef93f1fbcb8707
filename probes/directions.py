"""Directions: unit vectors at a site that a concept moves along, and the estimators that find them.

The sign is fixed by labels: the positive class projects higher. The scale that an estimator gives
and the spread of the projections are kept beside the unit vector, so that a strength can be said
in raw, unit or sigma.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes import figures
from probes.moments import ClassMoments, Shrinkage, principal_axes
from probes.results import Result, check_finite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Estimator = Literal["difference_of_means", "pca", "lda", "whitened_mean"]
"""What can be estimated from class moments alone."""


@dataclass(frozen=True)
class Direction(Result):
    """A unit vector at a site, oriented so that the positive class projects higher."""

    unit: Float[Tensor, " d_model"]
    raw_norm: float
    """Norm of the estimate before it was made a unit vector, in the estimator's own unit: for a
    difference of means that of the activations, for a logistic weight log-odds per activation.
    Principal axes have no norm of their own and get the gap."""
    gap: float
    """Distance of the class means along the direction, in the unit of the activations; above 0."""
    sigma: float
    """Standard deviation of projections inside the classes, pooled; 0 if no class has two rows."""
    midpoint: float
    """Projection half-way between the class means."""
    n: int
    """Examples it was estimated from, both classes together."""
    estimator: str
    site: str = ""
    """Text form of the site, `12.resid_post`."""

    def __str__(self) -> str:
        place = f" at {self.site}" if self.site else ""
        return (
            f"{self.estimator} direction{place}: width {len(self.unit)}, n = {self.n}, "
            f"gap {self.gap:.3g}, sigma {self.sigma:.3g}, raw norm {self.raw_norm:.3g}"
        )

    @property
    def raw(self) -> Float[Tensor, " d_model"]:
        """The estimate with its own length."""
        return self.unit * self.raw_norm

    def project(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """Coordinate of each row along the direction, in the unit of the activations."""
        if x.shape[-1] != len(self.unit):
            raise ValueError(
                f"rows of width {x.shape[-1]} cannot be projected on a direction of width "
                f"{len(self.unit)}: take activations of site {self.site or 'it was made at'}"
            )
        return (x.double() @ self.unit.to(x.device).double()).float()

    def cosine(self, other: "Direction") -> float:
        """Cosine with another direction of the same width, -1 to 1."""
        if len(other.unit) != len(self.unit):
            raise ValueError(
                f"directions of widths {len(self.unit)} and {len(other.unit)} have no cosine: "
                "they come from different models or parts"
            )
        return float(self.unit.double() @ other.unit.double())

    def frame(self) -> "pd.DataFrame":
        """One row: where, how, and the scales. `d_prime` is gap / sigma."""
        import pandas as pd

        names = ("site", "estimator", "n", "raw_norm", "gap", "sigma", "midpoint")
        row = {name: getattr(self, name) for name in names}
        row["d_prime"] = self.gap / self.sigma if self.sigma else float("nan")
        return pd.DataFrame([row])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Components by size beside those of a random direction: shows whether a few outlier
        dimensions carry it."""
        ax = figures.axes(ax)
        d = len(self.unit)
        rank = torch.arange(1, d + 1)
        random = -torch.special.ndtri((rank.double() - 0.5) / (2 * d)) / d**0.5
        sizes = self.unit.abs().sort(descending=True).values
        with figures.theme():
            ax.plot(rank.numpy(), sizes.numpy(), color=figures.PALETTE[0], label=self.estimator)
            ax.plot(rank.numpy(), random.numpy(), ":", color=figures.PALETTE[6], label="random")
            ax.set(xlabel="rank of component", ylabel="|component| (unit norm)", xscale="log")
            ax.set_title(self.site)
            ax.legend()
        return ax


def difference_of_means(
    positive: Float[Tensor, "positive d_model"],
    negative: Float[Tensor, "negative d_model"],
    *,
    site: str = "",
) -> Direction:
    """Mean of the positive class minus mean of the negative (CAA, refusal direction)."""
    positive, negative = checked(positive, negative)
    return oriented(
        positive.mean(0) - negative.mean(0), positive, negative, "difference_of_means", site
    )


def pca_of_pairs(
    positive: Float[Tensor, "pair d_model"],
    negative: Float[Tensor, "pair d_model"],
    *,
    centred: bool = True,
    shuffle_seed: int | None = 0,
    site: str = "",
) -> Direction:
    """First principal axis of paired differences (Zou et al. 2023, representation reading).

    Centring subtracts the mean difference, which *is* the concept when every difference points
    the same way. So a random half of the pairs is turned round first, as that paper's data are
    shuffled; `shuffle_seed=None` leaves them, and then what is left after centring is the largest
    variation between pairs. Without centring turning a pair changes nothing.
    """
    positive, negative = checked(positive, negative)
    if len(positive) != len(negative):
        raise ValueError(
            f"{len(positive)} positive and {len(negative)} negative rows are not pairs: "
            "give row i of both from pair i, or use difference_of_means"
        )
    difference = positive - negative
    if centred:
        if len(difference) < 2:
            raise ValueError("one pair has no variance: give 2 or more, or centred=False")
        if shuffle_seed is not None:
            difference = torch.where(
                half_turned(len(difference), shuffle_seed)[:, None], -difference, difference
            )
        difference = difference - difference.mean(0)
    if not bool(difference.any()):
        raise ValueError("the paired differences do not vary: there is no principal axis")
    # the small side decides the cost: a model is often wider than the pairs are many
    axis = torch.linalg.svd(difference, full_matrices=False).Vh[0]
    name = "pca_of_pairs" if centred else "pca_of_pairs_uncentred"
    return oriented(axis, positive, negative, name, site, has_norm=False)


def lda(
    positive: Float[Tensor, "positive d_model"],
    negative: Float[Tensor, "negative d_model"],
    *,
    shrinkage: Shrinkage = "ledoit-wolf",
    site: str = "",
) -> Direction:
    """Fisher's discriminant: the inverse within-class covariance times the mean difference."""
    return from_moments(_classes(positive, negative), "lda", shrinkage=shrinkage, site=site)


def whitened_mean(
    positive: Float[Tensor, "positive d_model"],
    negative: Float[Tensor, "negative d_model"],
    *,
    shrinkage: Shrinkage = "ledoit-wolf",
    site: str = "",
) -> Direction:
    """The mean difference in whitened coordinates: `S^(-1/2) (mean+ - mean-)`, S within classes.

    Half-way between the difference of means (power 0) and Fisher's discriminant (power -1); its
    raw norm is the Mahalanobis distance of the means.
    """
    moments = _classes(positive, negative)
    return from_moments(moments, "whitened_mean", shrinkage=shrinkage, site=site)


def from_moments(
    moments: ClassMoments,
    estimator: Estimator = "difference_of_means",
    *,
    shrinkage: Shrinkage = "ledoit-wolf",
    site: str = "",
) -> Direction:
    """The same estimators without rows, from the moments of classes 1 and 0.

    `pca` is the first principal axis of all rows together.
    """
    high, low = moments.mean(1), moments.mean(0)
    pair = ClassMoments({1: moments.classes[1], 0: moments.classes[0]})
    delta, has_norm = high - low, True
    if estimator == "difference_of_means":
        raw = delta
    elif estimator == "pca":
        raw, has_norm = principal_axes(pair.total().covariance(), 1).units[0], False
    elif estimator in ("lda", "whitened_mean"):
        power = -1.0 if estimator == "lda" else -0.5
        raw = pair.whitened(delta, power=power, shrinkage=shrinkage)
    else:
        raise ValueError(
            f"unknown estimator {estimator!r}: choose difference_of_means, pca, lda or "
            "whitened_mean; the others need rows"
        )
    free = max(pair.count - 2, 1)
    within = pair.within().scatter / free
    return _direction(
        raw, high, low, lambda u: u @ within @ u, pair.count, estimator, site, has_norm
    )


def oriented(
    raw: Float[Tensor, " d_model"],
    positive: Float[Tensor, "positive d_model"],
    negative: Float[Tensor, "negative d_model"],
    estimator: str,
    site: str = "",
    *,
    has_norm: bool = True,
) -> Direction:
    """A direction from any estimate and the rows that fix its sign and measure its scale."""
    free = max(len(positive) + len(negative) - 2, 1)
    high, low = positive.double(), negative.double()

    def variance(u: Tensor) -> Tensor:
        a, b = high @ u, low @ u
        return ((a - a.mean()).square().sum() + (b - b.mean()).square().sum()) / free

    n = len(positive) + len(negative)
    return _direction(
        raw.double(), high.mean(0), low.mean(0), variance, n, estimator, site, has_norm
    )


def checked(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Both classes' rows in float64 on the CPU; refuses what no estimator can use."""
    for x, which in ((positive, "positive"), (negative, "negative")):
        if x.ndim != 2 or not len(x):
            raise ValueError(
                f"the {which} activations have shape {tuple(x.shape)}: give one row for each "
                "example, at least one in each class"
            )
        check_finite(x, f"the {which} activations")
    if positive.shape[1] != negative.shape[1]:
        raise ValueError(
            f"positive rows are {positive.shape[1]} wide and negative rows {negative.shape[1]}: "
            "both must come from one site of one model"
        )
    return positive.detach().double().cpu(), negative.detach().double().cpu()


def half_turned(pairs: int, seed: int) -> Bool[Tensor, " pair"]:
    """A random half of the pairs (rounded down) by seed."""
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    return order < pairs // 2


def _classes(positive: Tensor, negative: Tensor) -> ClassMoments:
    positive, negative = checked(positive, negative)
    return ClassMoments.of({1: positive, 0: negative})


def _direction(
    raw: Tensor,
    high: Tensor,
    low: Tensor,
    variance: Callable[[Tensor], Tensor],
    n: int,
    estimator: str,
    site: str,
    has_norm: bool,
) -> Direction:
    check_finite(raw, f"the {estimator} estimate")
    norm = float(raw.norm())
    scale = float(torch.maximum(high.norm(), low.norm()))
    gap = float(raw @ (high - low)) / norm if norm else 0.0
    if abs(gap) <= 1e-12 * scale:
        raise ValueError(
            f"the {estimator} estimate does not part the classes: their means project to the "
            "same value, so labels cannot fix a sign; check that positive and negative differ"
        )
    unit = raw / (norm if gap > 0 else -norm)
    return Direction(
        unit=unit.float(),
        raw_norm=norm if has_norm else abs(gap),
        gap=abs(gap),
        sigma=float(variance(unit).clamp_min(0).sqrt()),
        midpoint=float(unit @ (high + low)) / 2,
        n=n,
        estimator=estimator,
        site=site,
    )
