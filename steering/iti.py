"""Inference-time intervention: push the heads that know (Li et al. 2023).

A probe is fitted to the output of every query head, the heads whose probes read best on held-out
topics are chosen, and each is moved along its own direction by alpha standard deviations:

    offsets = fit_iti(model, contrast)
    with steer(model, offsets, 15, unit="sigma", schedule=AT_EACH_STEP): ...

The order of heads is decided on rows that their probes did not see, whole topics at a time. The
directions and their spreads are then taken from all rows, as in the paper.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.capturing import capture
from probes.contrast import Contrast
from probes.linear import fit_logistic_many
from probes.model import HookedModel
from probes.results import Record, check_finite
from probes.sites import Site
from probes.splits import folds, shuffled
from steering.heads import HeadRanking, shares
from steering.offsets import HeadOffsets
from steering.schedule import Schedule

LAST = "tokens:-1:"
"""The last token of a prompt, or of its answer where there is one."""

AT_EACH_STEP = Schedule(prompt=(-1, None))
"""The paper's tokens: the last of the prompt, then every generated one. By default steering acts
on all tokens, as an offset folded into a bias does."""


def fit_iti(
    model: HookedModel,
    contrast: Contrast,
    n_heads: int = 48,
    *,
    direction: str = "mean",
    answers: Sequence[str] | None = None,
    positions: str = LAST,
    seed: int = 0,
) -> HeadOffsets:
    """Offsets at the `n_heads` best heads: apply them with `unit="sigma"` and alpha as strength.

    The null that says whether heads read anything at all is in `rank_heads`, whose
    `HeadRanking.offsets` this is.
    """
    ranking = rank_heads(
        model,
        contrast,
        direction=direction,
        answers=answers,
        positions=positions,
        permutations=0,
        seed=seed,
    )
    return ranking.offsets(model, n_heads)


def rank_heads(
    model: HookedModel,
    contrast: Contrast,
    *,
    direction: str = "mean",
    answers: Sequence[str] | None = None,
    positions: str = LAST,
    n_folds: int = 5,
    C: float = 1.0,
    permutations: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> HeadRanking:
    """Probe every query head in every layer that has heads, in one capture.

    `direction` is "mean" (difference of class means), "probe" (weight of a logistic regression on
    all rows) or "random" (isotropic, a control). Rows are read at the last token, that of
    `answers` where these are given (the paper's "Q A"); several tokens a prompt are refused.
    Probes are logistic regressions on standardised features with penalty `1 / C`, fitted on all
    folds but one and scored on that one; topics never straddle folds. Accuracy is balanced (the
    mean over both classes), so that uneven classes leave chance at 0.5, shuffled or not.
    """
    rows, record = head_rows(
        model, contrast, answers=answers, positions=positions, progress=progress
    )
    ranking = rank_rows(
        rows,
        contrast,
        n_layers=model.n_layers,
        direction=direction,
        n_folds=n_folds,
        C=C,
        permutations=permutations,
        seed=seed,
    )
    return replace(ranking, record=replace(record, seeds=(seed,)), positions=positions)


def head_rows(
    model: HookedModel,
    contrast: Contrast,
    *,
    answers: Sequence[str] | None = None,
    positions: str = LAST,
    progress: bool = True,
) -> tuple[dict[int, Float[Tensor, "example head head_dim"]], Record]:
    """Head outputs of every layer that has heads, one row a prompt, and how they were read."""
    sites = [Site(layer, "head_out") for layer in model.layout.supported("head_out")]
    if not sites:
        raise ValueError(
            f"{model.name} ({model.layout.architecture}) has no attention heads to rank"
        )
    acts = capture(model, contrast.prompts, sites, positions, answers=answers, progress=progress)
    if set(acts.counts) != {1}:
        raise ValueError(
            f"positions {positions!r} reads {max(acts.counts)} tokens of a prompt, a probe of "
            f"heads needs one: use {LAST!r} or 'mean:...'"
        )
    return {site.layer: acts[site] for site in sites}, acts.record


def rank_rows(
    rows: Mapping[int, Float[Tensor, "example head head_dim"]],
    contrast: Contrast,
    *,
    n_layers: int,
    direction: str = "mean",
    n_folds: int = 5,
    C: float = 1.0,
    permutations: int = 200,
    seed: int = 0,
) -> HeadRanking:
    """The same from head outputs in memory, by layer; layers left out have no heads."""
    shapes = {tuple(x.shape[1:]) for x in rows.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"heads differ in number or width between layers ({sorted(shapes)}): one map cannot "
            "hold them, and neither can head offsets"
        )
    ((heads, width),) = shapes
    positive, n = contrast.positive, len(contrast)
    if any(len(x) != n for x in rows.values()):
        raise ValueError(f"the head outputs must have one row for each of the {n} prompts")
    generator = torch.Generator().manual_seed(seed)
    targets = torch.cat(
        [positive[:, None], shuffled(positive, contrast.topics, permutations, generator)], 1
    )
    strata = [f"{s}|{y}" for s, y in zip(contrast.strata or [""] * n, contrast.labels, strict=True)]
    # a shuffle may change how many rows are positive: both classes weigh one half in each
    share = targets.double().mean(0)
    even = torch.where(targets, 0.5 / share, 0.5 / (1 - share))
    parts = folds(contrast.topics, n_folds, strata=strata, seed=seed)
    right = torch.full((n, n_layers, heads), math.nan, dtype=torch.float64)
    loss = torch.full((n_layers, heads), math.nan, dtype=torch.float64)
    null = torch.full((permutations, n_layers, heads), math.nan)
    unit = torch.full((n_layers, heads, width), math.nan)
    sigma = torch.full((n_layers, heads), math.nan)
    for layer, x in sorted(rows.items()):
        check_finite(x, f"the head outputs of layer {layer}")
        for head in range(heads):
            own = x[:, head].double().cpu()
            if not bool((own != own[0]).any()):
                continue  # a head that says nothing stays NaN and is never chosen
            scores = torch.empty(n, targets.shape[1], dtype=torch.float64)
            for fold in parts:
                fit = fit_logistic_many(own[fold.train], targets[fold.train], C=C)
                scores[fold.test] = own[fold.test] @ fit.weight + fit.bias
            hits = (scores > 0) == targets
            right[:, layer, head] = hits[:, 0] * even[:, 0]
            null[:, layer, head] = (hits * even).mean(0)[1:]
            sign = 1 - 2 * positive.double()
            loss[layer, head] = torch.nn.functional.softplus(sign * scores[:, 0]).mean()
            along = _along(own, positive, direction, C, generator)
            if along is not None:
                unit[layer, head] = along.float()
                sigma[layer, head] = float((own @ along).std())
    accuracy, low, high = shares(right, contrast.topics, seed)
    return HeadRanking(
        accuracy=accuracy.float(),
        low=low.float(),
        high=high.float(),
        null=null,
        loss=loss.float(),
        unit=unit,
        sigma=sigma,
        direction=direction,
        n=n,
        n_groups=len(set(contrast.topics)),
        n_folds=n_folds,
        contrast=contrast.name,
    )


def _along(
    x: Float[Tensor, "example head_dim"],
    positive: Bool[Tensor, " example"],
    direction: str,
    C: float,
    generator: torch.Generator,
) -> Float[Tensor, " head_dim"] | None:
    """The unit direction of one head in float64, positive class higher; None if there is none."""
    if direction == "mean":
        raw = x[positive].mean(0) - x[~positive].mean(0)
    elif direction == "probe":
        raw = fit_logistic_many(x, positive[:, None], C=C).weight[:, 0]
    elif direction == "random":
        raw = torch.randn(x.shape[1], generator=generator, dtype=torch.float64)
    else:
        raise ValueError(f"unknown direction {direction!r}: choose mean, probe or random")
    norm = raw.norm()
    return raw / norm if float(norm) > 1e-12 * float(x.norm(dim=1).max()) else None
