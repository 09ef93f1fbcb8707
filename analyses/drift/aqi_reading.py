"""All indices of one set of vectors, held out, with intervals over topics and a shuffled null."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.drift import composites
from analyses.drift.aqi_design import Design
from analyses.drift.between_topics import (
    Between,
    Pairs,
    between,
    pairs_of,
    relabelled,
    taken,
)
from analyses.drift.clusters import Scatter, indices, scatter
from probes.linear import fit_logistic_many
from probes.scores import auroc, auroc_interval, bca

INDICES = (
    *("F", "F/(1+F)", "XBI", "CHI", "DBS", "Dunn", "Dunn (trimmed)", "silhouette"),
    *("A", "A'", "B", "B (trimmed)", "C", "D", "AUROC"),
)
"""Names of all indices, in the order of the tensors."""

LOWER = ("XBI", "DBS")
"""Lower is further apart; with all others higher is."""

EXTREMES = ("Dunn", "B")
"""Decided by one pair of prompts. The bootstrap of an extreme fails (Bickel and Freedman 1981), so
these have a null and no interval."""


class Reading(NamedTuple):
    """The numbers of one set of vectors."""

    value: Float[Tensor, " index"]
    """By the published formulas, of the sample."""
    estimate: Float[Tensor, " index"]
    """Of the population, from pairs of different topics; NaN for `EXTREMES`."""
    low: Float[Tensor, " index"]
    high: Float[Tensor, " index"]
    null: Float[Tensor, "permutation index"]
    """Estimates (for `EXTREMES` values) under shuffled labels, everything fitted again."""
    drawn: Float[Tensor, " resample"]
    """F of the resamples, and with each topic left out."""
    left: Float[Tensor, " topic"]
    scatter: Scatter
    projection: Float[Tensor, " test"]
    """Test rows along the difference of the training means, from the training midpoint, in
    standard deviations within the training classes."""
    top_share: float
    """Share of the variance of the test rows that one dimension alone holds, the largest."""
    axioms: Float[Tensor, "axiom 6"]
    """F with its limits and its null's 95th percentile, XBI and CHI of each stratum."""


def read(
    train: Float[Tensor, "train d_model"],
    test: Float[Tensor, "test d_model"],
    plan: Design,
    under: Callable[[int], tuple[Tensor, Tensor]] | None = None,
) -> Reading:
    """Measure one set of vectors. `under` gives the training and test vectors of a shuffle, where
    they depend on the labels."""
    T, own = plan.test_labels, plan.train_labels
    found = scatter(test, T)
    pairs = pairs_of(test, T, plan.test_topics)
    scores = _probe(train, own[:, None], test)[:, 0]
    area = auroc_interval(scores, T, plan.test_topics, resamples=len(plan.drawn), seed=plan.seed)
    value = _published(test, T, float(area.value))
    plain = between(pairs)
    estimate = _family(plain, pairs, area.value.reshape(1))[0]
    resampled, left = between(pairs, plan.drawn), between(pairs, plan.left)
    low, high = _limits(plain, resampled, left, found)
    low[-1], high[-1] = area.low, area.high
    for name in EXTREMES:
        estimate[INDICES.index(name)] = math.nan

    shuffles = plan.test_shuffled.shape[1]
    areas = torch.empty(shuffles, dtype=torch.float64)
    if under is None:
        scored = _probe(train, plan.train_shuffled, test)
        areas = auroc(scored, plan.test_shuffled)
    null = torch.empty(shuffles, len(INDICES), dtype=torch.float64)
    strata = torch.full((shuffles, len(plan.axioms)), math.nan, dtype=torch.float64)
    for p in range(shuffles):
        labels, shuffle = plan.test_shuffled[:, p], relabelled(pairs, plan.test_shuffled[:, p])
        if under is not None:
            its_train, its_test = under(p)
            shuffle = pairs_of(its_test, labels, plan.test_topics)
            scored = _probe(its_train, plan.train_shuffled[:, p, None], its_test)
            areas[p] = auroc(scored[:, 0], labels)
        null[p] = _family(between(shuffle), shuffle, areas[p].reshape(1))[0]
        for a, axiom in enumerate(plan.axioms):
            if axiom.drawn is not None:
                strata[p, a] = between(taken(shuffle, axiom.rows), ratio_only=True).ratio[0]
    return Reading(
        value,
        estimate,
        low,
        high,
        null,
        resampled.ratio,
        left.ratio,
        found,
        _projection(train, own, test),
        _top_share(test),
        _axioms(test, pairs, plan, strata),
    )


def _probe(train: Tensor, labels: Tensor, test: Tensor) -> Float[Tensor, "test fit"]:
    """Held-out log-odds of logistic regression, one column a labelling."""
    fits = fit_logistic_many(train, labels)
    return test.double() @ fits.weight + fits.bias


def _published(test: Tensor, labels: Tensor, area: float) -> Float[Tensor, " index"]:
    found = indices(test, labels)
    trimmed = composites.variant_b(found.davies_bouldin, found.dunn_trimmed)
    variants = {name: of(found, None) for name, of in composites.VARIANTS.items()}
    named = {
        **variants,
        "F": composites.separation_ratio(found.xie_beni),
        "F/(1+F)": composites.bounded(found.xie_beni),
        "XBI": found.xie_beni,
        "CHI": found.calinski_harabasz,
        "DBS": found.davies_bouldin,
        "Dunn": found.dunn,
        "Dunn (trimmed)": found.dunn_trimmed,
        "silhouette": found.silhouette,
        "B (trimmed)": trimmed,
        "AUROC": area,
    }
    return torch.tensor([named[name] for name in INDICES], dtype=torch.float64)


def _family(found: Between, pairs: Pairs, area: Tensor) -> Float[Tensor, "resample index"]:
    """All indices from those four that hold what there is, at the sample's own N."""
    T = pairs.labels
    d = pairs.distance
    widest = torch.maximum(d[T][:, T].max(), d[~T][:, ~T].max())
    dunn = (d[T][:, ~T].min() / widest).expand(len(found.ratio))
    n_s, n_u = int(T.sum()), int((~T).sum())
    columns = _of_ratio(found.ratio, n_s, n_u)
    columns["DBS"] = 1 / found.closeness
    columns["Dunn"], columns["Dunn (trimmed)"] = dunn, found.dunn_trimmed
    columns["silhouette"], columns["AUROC"] = found.silhouette, area
    columns["B"] = _variant_b(found.closeness, dunn)
    columns.update(_mixed(found, columns))
    return torch.stack([columns[name] for name in INDICES], 1)


def _of_ratio(ratio: Tensor, n_s: int, n_u: int) -> dict[str, Tensor]:
    """The indices that are one statistic with F, which counts as 0 where it is below."""
    F = ratio.clamp(min=0)
    factor = n_s * n_u / (n_s + n_u) ** 2 * (n_s + n_u - 2)
    chi, half = factor * F, composites.LAMBDA
    return {
        "F": ratio,
        "F/(1+F)": _share(F),
        "XBI": 1 / F,
        "CHI": chi,
        "A": half * F + (1 - half) * chi,
        "A'": half * F + (1 - half) * chi.log1p(),
    }


def _variant_b(closeness: Tensor, dunn: Tensor) -> Tensor:
    half = composites.LAMBDA
    return half * _share(closeness) + (1 - half) * _share(dunn)


def _share(value: Tensor) -> Tensor:
    return torch.where(value.isinf(), torch.ones_like(value), value / (1 + value))


def _mixed(found: Between, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    half, gamma = composites.LAMBDA, composites.GAMMA_D
    score = (found.silhouette + 1) / 2
    return {
        "B (trimmed)": _variant_b(found.closeness, found.dunn_trimmed),
        "C": half * score + (1 - half) * columns["F/(1+F)"],
        "D": gamma * score + (1 - gamma) * _share(columns["CHI"]),
    }


def _limits(plain: Between, drawn: Between, left: Between, sizes: Scatter) -> tuple[Tensor, Tensor]:
    """BCa limits; those of F carry over to all that are functions of it."""

    def columns(found: Between) -> dict[str, Tensor]:
        ratio = _of_ratio(found.ratio, sizes.positive, sizes.negative)
        own = {"Dunn (trimmed)": found.dunn_trimmed, "silhouette": found.silhouette}
        return {"F": found.ratio, "DBS": found.closeness, **own, **_mixed(found, ratio)}

    values, resampled, jackknife = columns(plain), columns(drawn), columns(left)
    limits: dict[str, tuple[Tensor, Tensor]] = {}
    for name, value in values.items():
        limits[name] = _ends(value, resampled[name], jackknife[name])
    ends = [_of_ratio(end, sizes.positive, sizes.negative) for end in limits["F"]]
    for name in ("F/(1+F)", "CHI", "A", "A'"):
        limits[name] = ends[0][name], ends[1][name]
    limits["XBI"] = ends[1]["XBI"], ends[0]["XBI"]
    limits["DBS"] = 1 / limits["DBS"][1], 1 / limits["DBS"][0]
    nothing = torch.tensor(math.nan, dtype=torch.float64)
    both = [limits.get(name, (nothing, nothing)) for name in INDICES]
    return torch.stack([low for low, _ in both]), torch.stack([high for _, high in both])


def _ends(value: Tensor, resampled: Tensor, jackknife: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(value.isfinite()):  # nothing is spread within the classes: nothing can vary
        return value[0], value[0]
    found = bca(value[0], resampled, jackknife)
    return found.low, found.high


def _projection(train: Tensor, labels: Tensor, test: Tensor) -> Float[Tensor, " test"]:
    x = train.double()
    means = x[labels].mean(0), x[~labels].mean(0)
    direction = means[0] - means[1]
    middle = (means[0] + means[1]) / 2
    along = (x - torch.where(labels[:, None], *means)) @ direction
    spread = along.square().mean().sqrt().clamp(min=1e-30)
    return (test.double() - middle) @ direction / spread


def _top_share(test: Tensor) -> float:
    variance = test.double().var(0)
    return float(variance.max() / variance.sum().clamp(min=1e-300))


def _axioms(test: Tensor, pairs: Pairs, plan: Design, null: Tensor) -> Float[Tensor, "axiom 6"]:
    found = torch.full((len(plan.axioms), 6), math.nan, dtype=torch.float64)
    for a, axiom in enumerate(plan.axioms):
        if axiom.drawn is None or axiom.left is None:
            continue
        own = taken(pairs, axiom.rows)
        of = [between(own, w, ratio_only=True).ratio for w in (None, axiom.drawn, axiom.left)]
        low, high = _ends(of[0], of[1], of[2])
        sample = scatter(test[axiom.rows], plan.test_labels[axiom.rows])
        found[a] = torch.tensor(
            [
                *(float(of[0][0]), float(low), float(high)),
                float(null[:, a].quantile(0.95)),
                sample.xie_beni,
                sample.calinski_harabasz,
            ]
        )
    return found
