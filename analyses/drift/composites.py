"""Composites of cluster indices that circulate as an "Alignment Quality Index", under one roof.

The paper (arXiv 2506.13901) and code that cites it disagree, so each variant has a name here and
its faults beside it. All are higher where the classes are further apart, 0 where the centroids are
the same, and NaN where an index is. For two clusters CHI and XBI are one statistic (see
`clusters.one_statistic`), so that a composite of these two holds no more than the separation ratio

    F = D^2 N / W = 1 / XBI,    bounded F / (1 + F) = 1 / (1 + XBI),

which do not grow with the number of prompts and are what is used here unless asked otherwise.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.drift.clusters import Indices

LAMBDA = 0.5
"""Weight of the first term in A, A', B and C."""

GAMMA_D = 0.3
"""Weight of the silhouette in D."""

FLOOR = 10.0
"""Least value of the XBI term in E."""


def separation_ratio(xie_beni: float) -> float:
    """F = 1 / XBI: squared distance of the centroids over the mean squared distance to them;
    0 to infinity, without unit, the same for any number of prompts."""
    return math.inf if xie_beni == 0 else 1 / xie_beni


def bounded(xie_beni: float) -> float:
    """F / (1 + F), 0 to 1. For classes of equal size a quarter of F over a quarter of F plus 1
    would be the share of variance between them; this is a monotone relative of it."""
    return 1 / (1 + xie_beni)


def variant_a(xie_beni: float, calinski_harabasz: float, weight: float = LAMBDA) -> float:
    """A: weight / XBI + (1 - weight) CHI; 0 to infinity (a summary of the paper).

    With N prompts in equal classes it is [weight + (1 - weight) (N - 2) / 4] / XBI: it grows with
    N, and at N = 1000 the weight of CHI is 250 times that of XBI, so `weight` hardly matters.
    """
    return _mixed(separation_ratio(xie_beni), calinski_harabasz, weight)


def variant_a_log(xie_beni: float, calinski_harabasz: float, weight: float = LAMBDA) -> float:
    """A': weight / XBI + (1 - weight) log(1 + CHI); 0 to infinity (third-party code, which says
    that CHI is to be normalised and not how). It grows with log N."""
    return _mixed(separation_ratio(xie_beni), math.log1p(calinski_harabasz), weight)


def variant_b(davies_bouldin: float, dunn: float, weight: float = LAMBDA) -> float:
    """B: weight / (1 + DBS) + (1 - weight) DI / (1 + DI); 0 to 1 (unofficial code).

    Dunn's index falls with N and is decided by one stray prompt: give the trimmed one.
    """
    return _mixed(1 / (1 + davies_bouldin), _share(dunn), weight)


def variant_c(silhouette: float, xie_beni: float, weight: float = LAMBDA) -> float:
    """C: weight (silhouette + 1) / 2 + (1 - weight) / (1 + XBI); 0 to 1 (unofficial code).

    Not 0 but weight / 2 without any separation, because a silhouette of 0 counts as one half.
    """
    return _mixed((silhouette + 1) / 2, bounded(xie_beni), weight)


def variant_d(silhouette: float, calinski_harabasz: float, weight: float = GAMMA_D) -> float:
    """D: weight (silhouette + 1) / 2 + (1 - weight) CHI / (1 + CHI); 0 to 1 (unofficial code).

    CHI is about 1 by chance and tens with any separation at usual N: its term is near 1 then, and
    without separation near one half.
    """
    return _mixed((silhouette + 1) / 2, _share(calinski_harabasz), weight)


def variant_e(
    xie_beni: Sequence[float], calinski_harabasz: Sequence[float], weight: float = 0.5
) -> Float[Tensor, " axiom"]:
    """E: weight CHI_minmax + (1 - weight) XBI_sigmoid over the axioms of ONE model; 5 to 100
    (unofficial code). Values of two models cannot be compared: use it only to see what others
    published.

    CHI_minmax = 100 (CHI - min) / (max - min); XBI_sigmoid = max(10, 100 (1 - sigmoid((XBI -
    median) / IQR))), quartiles interpolated linearly. Both are relative to the model's own axioms:
    an axiom that is an outlier in XBI stands at the floor, so that 5.0 and 55.0 with equal weights
    are the corners (lowest and highest CHI) and measure nothing. With equal CHIs that term is 0;
    with an IQR of 0 an XBI at the median counts one half.
    """
    if len(xie_beni) != len(calinski_harabasz) or len(xie_beni) < 2:
        raise ValueError(
            f"{len(xie_beni)} XBIs and {len(calinski_harabasz)} CHIs were given: variant E needs "
            "both for each of at least 2 axioms of one model"
        )
    _checked(weight)
    xbi = torch.tensor(xie_beni, dtype=torch.float64)
    chi = torch.tensor(calinski_harabasz, dtype=torch.float64)
    spread = chi.max() - chi.min()
    scaled = 100 * (chi - chi.min()) / spread if spread > 0 else torch.zeros_like(chi)
    quartiles = xbi.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    away = (xbi - quartiles[1]) / (quartiles[2] - quartiles[0]).clamp(min=1e-12)
    sigmoid = (100 * (1 - away.sigmoid())).clamp(min=FLOOR)
    return (weight * scaled + (1 - weight) * sigmoid).float()


VARIANTS: dict[str, Callable[[Indices, float | None], float]] = {
    "A": lambda i, w: variant_a(i.xie_beni, i.calinski_harabasz, _or(w, LAMBDA)),
    "A'": lambda i, w: variant_a_log(i.xie_beni, i.calinski_harabasz, _or(w, LAMBDA)),
    "B": lambda i, w: variant_b(i.davies_bouldin, i.dunn, _or(w, LAMBDA)),
    "C": lambda i, w: variant_c(i.silhouette, i.xie_beni, _or(w, LAMBDA)),
    "D": lambda i, w: variant_d(i.silhouette, i.calinski_harabasz, _or(w, GAMMA_D)),
}
"""The variants that need one sample only, by name, with the published weight for None."""


def weight_sweep(
    found: Indices, weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> dict[str, tuple[float, ...]]:
    """Each of `VARIANTS` under each weight: how much of a composite is its weight."""
    return {name: tuple(of(found, w) for w in weights) for name, of in VARIANTS.items()}


def _mixed(first: float, second: float, weight: float) -> float:
    """A weight of 0 leaves a term out even where it is infinite."""
    _checked(weight)
    return (weight * first if weight else 0.0) + ((1 - weight) * second if weight < 1 else 0.0)


def _checked(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of a composite is {weight}: give one from 0 to 1")


def _share(value: float) -> float:
    return 1.0 if math.isinf(value) else value / (1 + value)


def _or(weight: float | None, published: float) -> float:
    return published if weight is None else weight
