"""Affine maps that take a concept out of activations: LEACE, and what it is compared with.

LEACE (Belrose et al. 2023, arXiv 2306.03819) is the affine map that changes activations least, in
mean square, among those after which every class has the same mean: on the rows it was fitted on no
linear reader is then better than a constant. It is computed from class moments, which stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from probes.engines import Edit, Where
from probes.model import HookedModel
from probes.moments import ClassMoments, Label, Shrinkage, shrink
from probes.results import Record, Result, check_finite
from probes.sites import Site

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Eraser(Result):
    """An affine map `x - (x - mean) reads' removes` of rank at most classes - 1.

    `eraser(x)` applies it to rows, `model.edit(eraser.edit("12.resid_post"))` to a model, and
    `model.generate(prompts, steer=eraser)` at the site it was fitted at.
    """

    removes: Float[Tensor, "rank d_model"]
    """Directions taken out, in the unit of the activations (float64, as are reads and mean)."""
    reads: Float[Tensor, "rank d_model"]
    """Covectors that say how much of each is there: `reads removes' = I`, so the map is a
    projection. They equal `removes` where the projection is orthogonal."""
    mean: Float[Tensor, " d_model"]
    """Mean of the training rows, which the map leaves in place."""
    kind: str
    n: int
    """Rows it was fitted on, all classes together."""
    site: str = ""

    @property
    def rank(self) -> int:
        return len(self.removes)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The rows without the concept; computed in float64, in the dtype that came in."""
        self._check(x.shape[-1])
        check_finite(x, "the activations")
        removes, reads, mean = (t.to(x.device) for t in (self.removes, self.reads, self.mean))
        whole = x.double()
        return (whole - (whole - mean) @ reads.T @ removes).to(x.dtype)

    def edit(
        self, site: Site | str | None = None, strength: float = 1.0, scope: str = "all"
    ) -> list[Edit]:
        """The same as an edit of a model, in the dtype of its stream; none at strength 0.

        `strength` is the share of what is taken out, 0 to 1; without `site`, where it was fitted.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength:g} of an eraser: give a share from 0 to 1")
        if site is None and not self.site:
            raise ValueError("the eraser does not know its site: give one, '12.resid_post' say")
        place = site if isinstance(site, Site) else Site.parse(site or self.site)

        def erased(h: Tensor, _where: Where) -> Tensor:
            self._check(h.shape[-1])
            return h - strength * ((h - self.mean.to(h)) @ self.reads.T.to(h) @ self.removes.to(h))

        return [] if strength == 0 else [Edit(place, erased, scope)]

    def edits(self, model: HookedModel) -> Sequence[Edit]:
        """At the site it was fitted at and in full: what `generate(steer=...)` asks for."""
        found = self.edit()
        self._check(model.layout.width(found[0].site))
        return found

    def frame(self) -> "pd.DataFrame":
        """One row a direction: length taken out and cosine with what reads it (1: orthogonal)."""
        import pandas as pd

        cosine = torch.cosine_similarity(self.removes, self.reads, dim=1)
        rows = [
            {"site": self.site, "kind": self.kind, "n": self.n, "direction": i, "cosine": float(c)}
            for i, c in enumerate(cosine)
        ]
        return pd.DataFrame(rows, columns=["site", "kind", "n", "direction", "cosine"])

    def __str__(self) -> str:
        place = f" at {self.site}" if self.site else ""
        if not self.rank:
            return f"{self.kind} eraser{place}: the class means are equal, it changes nothing"
        return f"{self.kind} eraser{place}: rank {self.rank} of {len(self.mean)}, n = {self.n}"

    def _check(self, width: int) -> None:
        if width != len(self.mean):
            raise ValueError(
                f"activations of width {width} were given to an eraser of width "
                f"{len(self.mean)}: use it at {self.site or 'the site it was fitted at'}"
            )


def fit_leace(
    moments: ClassMoments,
    *,
    shrinkage: Shrinkage = 0.0,
    site: str = "",
    record: Record | None = None,
) -> Eraser:
    """LEACE from class moments: `x - W^+ U U' W (x - mean)`, with W the inverse square root of the
    covariance of all rows and U an orthonormal basis of `W Sigma_xz`, z one-hot (theorem 4.3).

    Any `shrinkage` makes the class means equal all the same; what is then smallest is the change
    in the shrunk metric. Where rows are fewer than dimensions, what lies outside their span is
    left as it is without shrinkage. `record` is that of the capture.
    """
    cross, mean = _cross(moments)
    total = moments.total()
    covariance = shrink(total.scatter / total.count, total.count, total.fourth, shrinkage)
    variances, axes = torch.linalg.eigh((covariance + covariance.T) / 2)
    keep = variances > len(variances) * torch.finfo(torch.float64).eps * variances[-1].clamp_min(0)
    root, axes = variances[keep].sqrt(), axes[:, keep]
    # in the axes of the covariance, scaled: singular values are correlations, whatever the unit
    U, correlation, _ = torch.linalg.svd((axes.T @ cross) / root[:, None], full_matrices=False)
    U = U[:, correlation > 1e-8]
    kind = "LEACE" if shrinkage == 0 else f"LEACE ({shrinkage} shrinkage)"
    return Eraser(
        removes=(axes @ (root[:, None] * U)).T.contiguous(),
        reads=(axes @ (U / root[:, None])).T.contiguous(),
        mean=mean,
        kind=kind,
        n=total.count,
        site=site,
        record=record or Record(),
    )


def fit_mean_projection(
    moments: ClassMoments, *, site: str = "", record: Record | None = None
) -> Eraser:
    """The orthogonal projection off the span of the differences of class means, about the mean.

    It makes the class means equal as well, and changes activations more than it must.
    """
    cross, mean = _cross(moments)
    spread = moments.total().scatter.diagonal().sum().sqrt()
    U, sizes, _ = torch.linalg.svd(cross, full_matrices=False)
    basis = U[:, sizes > 1e-12 * spread].T.contiguous()
    own = record or Record()
    return Eraser(basis, basis.clone(), mean, "mean difference", moments.count, site, record=own)


def random_eraser(
    mean: Float[Tensor, " d_model"],
    rank: int,
    generator: torch.Generator,
    *,
    record: Record | None = None,
) -> Eraser:
    """The orthogonal projection off a random subspace of this rank: what erasing at all does."""
    if not 0 <= rank <= len(mean):
        raise ValueError(f"rank {rank} was asked of width {len(mean)}: ask for 0 to all")
    drawn = torch.randn(len(mean), rank, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn).Q.T.contiguous()
    return Eraser(basis, basis.clone(), mean.double(), "random", 0, record=record or Record())


def _cross(moments: ClassMoments) -> tuple[Float[Tensor, "d_model label"], Tensor]:
    """Covariance with each class's standardised indicator, and the mean of all rows."""
    kinds: Mapping[Label, int] = {label: m.count for label, m in moments.classes.items()}
    if sum(count > 0 for count in kinds.values()) < 2:
        raise ValueError(
            f"rows of one class only were given ({dict(kinds)}): an eraser needs two classes"
        )
    mean, n = moments.total().mean, moments.count
    columns = []
    for label, count in kinds.items():
        if count:
            share = count / n
            columns.append((moments.mean(label) - mean) * (share / (1 - share)) ** 0.5)
    return torch.stack(columns, 1), mean
