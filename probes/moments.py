"""Counts, means and covariances that stream and merge, and what can be read from them alone.

A site's rows are seen once and dropped; two halves of the data, or two machines, merge to what one
pass over everything would have given, to float64 rounding. Besides the mean and the scatter two
small sums of third and fourth order are kept, so that the Ledoit-Wolf shrinkage is exact without
the rows as well.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from probes.results import check_finite

Label = int | str
Shrinkage = float | Literal["ledoit-wolf"]
"""Weight of the spherical part, 0 to 1, or the name of the rule that estimates it."""


@dataclass
class Moments:
    """Running moments of rows of one width. Memory is `d_model ** 2` float64 numbers."""

    count: int
    mean: Float[Tensor, " d_model"]
    scatter: Float[Tensor, "d_model d_model"]
    """Sum of outer products of rows about the mean; the covariance times (count - 1)."""
    third: Float[Tensor, " d_model"]
    """Sum over rows of c |c|^2, where c is the row about the mean."""
    fourth: float
    """Sum over rows of |c|^4."""

    @classmethod
    def empty(cls, width: int) -> "Moments":
        if width < 1:
            raise ValueError(f"moments need a width of at least 1, given {width}")
        zero = torch.zeros(width, dtype=torch.float64)
        return cls(0, zero, torch.zeros(width, width, dtype=torch.float64), zero.clone(), 0.0)

    @classmethod
    def of(cls, x: Float[Tensor, "example d_model"]) -> "Moments":
        """Moments of these rows."""
        check_finite(x, "the activations")
        if not len(x):
            return cls.empty(x.shape[1])
        x = x.detach().double().cpu()
        mean = x.mean(0)
        c = x - mean
        square = c.square().sum(1)
        return cls(len(x), mean, c.T @ c, square @ c, float(square.square().sum()))

    @property
    def width(self) -> int:
        return len(self.mean)

    def update(self, x: Float[Tensor, "example d_model"]) -> "Moments":
        """Take in more rows, in place; returns itself."""
        if x.shape[1] != self.width:
            raise ValueError(
                f"rows of width {x.shape[1]} were given to moments of width {self.width}: "
                "keep one Moments for each site"
            )
        whole = self.merge(Moments.of(x))
        self.count, self.mean, self.scatter = whole.count, whole.mean, whole.scatter
        self.third, self.fourth = whole.third, whole.fourth
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows together, as a new object (Chan, Golub and LeVeque 1983)."""
        if self.width != other.width:
            raise ValueError(
                f"moments of widths {self.width} and {other.width} cannot be merged: "
                "they come from different sites or models"
            )
        count = self.count + other.count
        if not count:
            return Moments.empty(self.width)
        mean = self.mean + (other.mean - self.mean) * (other.count / count)
        a, b = self._about(mean), other._about(mean)
        return Moments(count, mean, a.scatter + b.scatter, a.third + b.third, a.fourth + b.fourth)

    def _about(self, centre: Float[Tensor, " d_model"]) -> "Moments":
        """The same sums taken about `centre` in place of the mean."""
        n, shift = self.count, centre - self.mean
        square, pull = float(shift @ shift), self.scatter @ shift
        trace = float(self.scatter.trace())
        return Moments(
            n,
            centre,
            self.scatter + n * torch.outer(shift, shift),
            self.third - 2 * pull - (trace + n * square) * shift,
            self.fourth
            + 4 * float(shift @ pull - shift @ self.third)
            + 2 * square * trace
            + n * square**2,
        )

    def covariance(self) -> Float[Tensor, "d_model d_model"]:
        """Unbiased covariance (divided by count - 1)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, {self.count} were seen")
        return (self.scatter + self.scatter.T) / (2 * (self.count - 1))

    def shrunk(self, shrinkage: Shrinkage = "ledoit-wolf") -> Float[Tensor, "d_model d_model"]:
        """Covariance pulled towards a sphere, see `shrink`; divided by count, as in the paper."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, {self.count} were seen")
        return shrink(self.scatter / self.count, self.count, self.fourth, shrinkage)


@dataclass
class ClassMoments:
    """Moments of each class of labelled rows."""

    classes: dict[Label, Moments]

    @classmethod
    def of(cls, rows: Mapping[Label, Float[Tensor, "_ d_model"]]) -> "ClassMoments":
        """From rows already parted by class, for example `{1: positive, 0: negative}`."""
        return cls({label: Moments.of(x) for label, x in rows.items()})

    def update(
        self, x: Float[Tensor, "example d_model"], labels: Tensor | Sequence[Label]
    ) -> "ClassMoments":
        """Take in labelled rows, in place; returns itself. Boolean labels become 1 and 0."""
        names = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        if len(names) != len(x):
            raise ValueError(f"{len(x)} rows came with {len(names)} labels: give one for each row")
        names = [int(name) if isinstance(name, bool) else name for name in names]
        for label in dict.fromkeys(names):
            rows = x[torch.tensor([name == label for name in names])]
            self.classes.setdefault(label, Moments.empty(x.shape[1])).update(rows)
        return self

    def merge(self, other: "ClassMoments") -> "ClassMoments":
        """Moments of both sets of rows together; a class may be in one of them only."""
        both = dict(self.classes)
        for label, moments in other.classes.items():
            both[label] = both[label].merge(moments) if label in both else moments
        return ClassMoments(both)

    @property
    def count(self) -> int:
        return sum(moments.count for moments in self.classes.values())

    def mean(self, label: Label) -> Float[Tensor, " d_model"]:
        """Mean of one class."""
        if label not in self.classes or not self.classes[label].count:
            seen = ", ".join(f"{name!r} ({m.count} rows)" for name, m in self.classes.items())
            raise ValueError(
                f"no rows of class {label!r} were seen, only {seen or 'none at all'}: "
                "give examples of both classes"
            )
        return self.classes[label].mean

    def total(self) -> Moments:
        """Moments of all rows, labels forgotten."""
        kinds = list(self.classes.values())
        if not kinds:
            raise ValueError("no rows were seen: call update first")
        whole = kinds[0]
        for moments in kinds[1:]:
            whole = whole.merge(moments)
        return whole

    def within(self) -> Moments:
        """Moments of all rows after each class mean is subtracted; the mean is zero."""
        whole = self.total()
        kinds = self.classes.values()
        return Moments(
            whole.count,
            torch.zeros_like(whole.mean),
            torch.stack([m.scatter for m in kinds]).sum(0),
            torch.stack([m.third for m in kinds]).sum(0),
            math.fsum(m.fourth for m in kinds),
        )

    def within_covariance(self) -> Float[Tensor, "d_model d_model"]:
        """Pooled covariance inside the classes, divided by rows - classes (unbiased)."""
        free = self.count - sum(m.count > 0 for m in self.classes.values())
        if free < 1:
            raise ValueError(
                f"{self.count} rows leave nothing to vary inside their classes: "
                "a class needs at least 2 rows"
            )
        scatter = self.within().scatter
        return (scatter + scatter.T) / (2 * free)

    def whitened(
        self, vector: Float[Tensor, " d_model"], *, power: float, shrinkage: Shrinkage
    ) -> Float[Tensor, " d_model"]:
        """A power of the shrunk within-class covariance times a vector: -1/2 gives whitened
        coordinates, -1 Fisher's discriminant of a mean difference."""
        within, free = self.within(), max(self.count - len(self.classes), 1)
        # the weight is estimated as in its paper (divided by n), the scale then made unbiased
        covariance = shrink(within.scatter / self.count, self.count, within.fourth, shrinkage)
        variances, axes = torch.linalg.eigh(covariance * (self.count / free))
        if variances[-1] <= 0 or variances[0] <= 1e-12 * variances[-1]:
            raise ValueError(
                f"the within-class covariance of {self.count} rows of width {len(vector)} is "
                f"singular with shrinkage {shrinkage!r}: use 'ledoit-wolf' or a number above 0, "
                "or more varied examples"
            )
        return axes @ ((axes.T @ vector) * variances**power)


class Axes(NamedTuple):
    """Principal axes, the widest first."""

    units: Float[Tensor, "axis d_model"]
    """Orthonormal rows; the largest component of each is positive."""
    variances: Float[Tensor, " axis"]


def principal_axes(covariance: Float[Tensor, "d_model d_model"], k: int) -> Axes:
    """The `k` widest axes of a covariance: total, within classes, or of differences."""
    if not 1 <= k <= len(covariance):
        raise ValueError(f"{k} axes were asked of width {len(covariance)}: ask for 1 to all")
    variances, vectors = torch.linalg.eigh(covariance)
    units = vectors.T.flip(0)[:k]
    largest = units.gather(1, units.abs().argmax(1, keepdim=True))
    return Axes(units * largest.sign(), variances.flip(0)[:k].clamp_min(0))


def shrink(
    covariance: Float[Tensor, "d_model d_model"],
    count: int,
    fourth: float,
    shrinkage: Shrinkage = "ledoit-wolf",
) -> Float[Tensor, "d_model d_model"]:
    """`(1 - s) S + s m I`, where m is the mean variance.

    The Ledoit-Wolf weight s (J. Multivariate Analysis 88, 2004) minimises the expected squared
    error; it needs S divided by `count`, and `fourth`, the sum over rows of |c|^4.
    """
    if shrinkage == "ledoit-wolf":
        weight = float(
            ledoit_wolf(
                covariance.trace(),
                covariance.square().sum(),
                torch.tensor(fourth, dtype=torch.float64),
                count,
                len(covariance),
            )
        )
    elif isinstance(shrinkage, str) or not 0 <= shrinkage <= 1:
        raise ValueError(
            f"shrinkage was {shrinkage!r}: give a number from 0 to 1, or 'ledoit-wolf'"
        )
    else:
        weight = float(shrinkage)
    sphere = covariance.trace() / len(covariance)
    return (1 - weight) * covariance + weight * sphere * torch.eye(
        len(covariance), dtype=covariance.dtype
    )


def ledoit_wolf(
    trace: Float[Tensor, "*fit"],
    square: Float[Tensor, "*fit"],
    fourth: Float[Tensor, "*fit"],
    count: int,
    width: int,
) -> Float[Tensor, "*fit"]:
    """Shrinkage weight, 0 to 1, from a covariance's trace, its squared Frobenius norm and the sum
    over rows of |c|^4. Many covariances at once if the arguments are vectors."""
    spread = square - trace.square() / width
    noise = (fourth / count - square) / count
    return torch.where(spread > 0, (noise / spread).clamp(0, 1), torch.ones_like(spread))
