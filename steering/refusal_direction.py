"""The refusal direction of Arditi et al. (2024): found, tested and chosen on validation prompts.

Candidates are differences of mean activations between refused and answered requests, at the input
of each block and at each token that the template puts behind the request. A candidate is judged
by what it does: ablated everywhere it should end refusals (*bypass*) and change little else (*KL*),
added at its own block it should cause them (*induce*).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from probes.activations import Activations
from probes.capturing import capture
from probes.contrast import Contrast
from probes.directions import difference_of_means
from probes.model import HookedModel
from probes.progress import progress as show
from probes.prompts import Prompt
from probes.sites import Site
from steering.artefact import Origin
from steering.costs import kl_divergence
from steering.first_token import FirstToken
from steering.judges import first_tokens, log_odds
from steering.refusal_scores import RefusalDirection
from steering.vector import SteeringVector


def find_refusal_direction(
    model: HookedModel,
    train: Contrast,
    validation: Contrast,
    *,
    neutral: Sequence[Prompt] | None = None,
    openers: Sequence[str] = ("I",),
    positions: str = "instruction_end",
    layers: Sequence[int] | None = None,
    depth: float = 0.8,
    max_kl: float = 0.1,
    min_induce: float = 0.0,
    n_train: int = 128,
    n_validation: int = 32,
    screen: int | None = 4,
    finalists: int = 6,
    seed: int = 0,
    progress: bool = True,
) -> RefusalDirection:
    """The candidate with the lowest bypass score among those that pass the filters.

    Positive prompts of the contrasts are requests to refuse. At most `n_train` and `n_validation`
    topics are drawn; of these only prompts stay that the model treats as labelled: log-odds of a
    refusal opener above 0 if positive, below 0 if negative. Scores (nats, first token of the
    answer, means over prompts):

    bypass  log-odds of refusing the positive prompts, the unit vector ablated everywhere
    induce  log-odds of refusing the negative prompts, the raw vector added at its block, all tokens
    KL      KL(unedited‖ablated) on `neutral` prompts, or on the negative ones. Twins of harmful
            requests lie near the border of refusal, so there KL counts the wanted change too:
            ordinary requests are the better measure

    Dropped are layers from floor(depth * n_layers) on, KL above `max_kl`, induce below
    `min_induce` (the paper's values are the defaults); if none is left, the error says by how much
    the nearest fails. To save time candidates are first scored on `screen` prompts of a kind; those
    on the border of low bypass and low KL, nearest to `max_kl`, are scored again on all and only
    they can be chosen: `finalists` at a time, until one passes or none is left. `screen=None`
    scores all on all, as the paper does. `layers` scores some layers only.
    """
    if finalists < 1:
        raise ValueError(f"{finalists} finalists: give 1 or more, to be scored on all prompts")
    layers = _layers(model.n_layers, depth, layers)
    known = first_tokens(model, openers)
    train, _ = _as_labelled(model, train.limited(n_train, seed), openers, "training")
    validation, odds = _as_labelled(
        model, validation.limited(n_validation, seed), openers, "validation"
    )
    sites = [Site(layer, "resid_pre") for layer in layers]
    acts = capture(model, train.prompts, sites, positions, progress=False)
    if len(set(acts.counts)) > 1:
        raise ValueError(
            f"position {positions!r} reads between {min(acts.counts)} and {max(acts.counts)} tokens "
            "of a prompt: candidates need the same tokens in all, such as 'instruction_end'"
        )
    candidates = _candidates(acts, train.positive, layers, model.n_layers)
    origin = Origin.of(
        model,
        estimator="refusal direction (difference_of_means)",
        data_hash=acts.record.prompts_hash,
        positions=positions,
    )
    # in random order, for the few that screen should be of all kinds
    order = torch.randperm(len(validation), generator=torch.Generator().manual_seed(seed)).tolist()
    harmful, harmless = (
        [validation.prompts[i] for i in order if validation.labels[i] == y] for y in (1, 0)
    )
    others = harmless if neutral is None else list(neutral)[:n_validation]
    if not others:
        raise ValueError("the neutral set is empty: give ordinary prompts, or None for the twins")

    table = torch.full((3, *candidates.shape[:2]), torch.nan, dtype=torch.float64)
    scored = torch.zeros(candidates.shape[:2], dtype=torch.long)
    exist = candidates.isfinite().all(-1)

    def score(cells: Sequence[tuple[int, int]], n: int, note: str) -> None:
        judge = _Judge(model, harmful[:n], harmless[:n], others[:n], known)
        with show(len(cells), note, progress) as advance:
            for p, layer in cells:
                table[:, p, layer] = judge(candidates[p, layer], Site(layer, "resid_pre"), origin)
                scored[p, layer] = n
                advance(1)

    everything = [(int(p), int(layer)) for p, layer in exist.nonzero()]
    most = max(len(harmful), len(harmless), len(others))
    score(everything, most if screen is None else min(screen, most), "scoring candidates")
    while True:
        full = scored == most
        passing = full & (table[2] <= max_kl) & (table[1] >= min_induce)
        rest = shortlist(table.masked_fill(full, torch.nan), finalists, max_kl, min_induce)
        if bool(passing.any()):
            break
        if not rest:
            raise ValueError(_none(table, full, max_kl, min_induce, layers))
        score(rest, most, "scoring finalists")
    best = torch.where(passing, table[0], torch.inf).argmin()
    position, layer = divmod(int(best), candidates.shape[1])
    along = acts[Site(layer, "resid_pre")]
    along = along[:, position] if along.ndim == 3 else along
    found = difference_of_means(along[train.positive], along[~train.positive])
    return RefusalDirection(
        candidates=candidates,
        bypass=table[0],
        induce=table[1],
        kl=table[2],
        scored=scored,
        tokens=_tokens(model, train.prompts[0], acts),
        position=position,
        layer=layer,
        refusing=float(odds[validation.positive].mean()),
        answering=float(odds[~validation.positive].mean()),
        n_train=_sizes(train),
        n_validation=_sizes(validation),
        depth=depth,
        max_kl=max_kl,
        min_induce=min_induce,
        sigma=found.sigma,
        norm=float(along.double().norm(dim=1).mean()),
        origin=asdict(origin),
        record=replace(
            acts.record,
            seeds=(seed,),
            settings={
                "positions": positions,
                "openers": tuple(openers),
                "neutral": neutral is not None,
                "screen": screen,
                "finalists": finalists,
            },
        ),
    )


def shortlist(table: Tensor, n: int, max_kl: float, min_induce: float) -> list[tuple[int, int]]:
    """Places of the `n` candidates worth scoring on more prompts.

    `table` is bypass, induce and KL, `[3, position, layer]`, NaN where there is no candidate. The
    best candidate under any limit of KL is one that no other beats in bypass and KL at once; such
    layers of the border are peeled off until there are enough, the last of them cut by distance
    of log KL from the limit. Candidates that induce come first.
    """
    bypass, induce, kl = (t.flatten() for t in table)
    left = set(bypass.isfinite().nonzero().flatten().tolist())
    chosen: list[int] = []
    while left and len(chosen) < n:
        pool = [i for i in left if induce[i] >= min_induce] or sorted(left)
        border = [
            i
            for i in sorted(pool)
            if not any(bypass[j] < bypass[i] and kl[j] < kl[i] for j in pool)
        ]
        border.sort(key=lambda i: abs(math.log(max(float(kl[i]), 1e-9) / max_kl)))
        chosen += border[: n - len(chosen)]
        left -= set(border)
    return [divmod(i, table.shape[2]) for i in chosen]


class _Judge:
    """Scores one candidate after another on the same prompts."""

    def __init__(
        self,
        model: HookedModel,
        harmful: Sequence[Prompt],
        harmless: Sequence[Prompt],
        neutral: Sequence[Prompt],
        tokens: Sequence[int],
    ) -> None:
        self.model, self.tokens, self.n = model, tokens, len(harmful)
        self.ablated = FirstToken(model, [*harmful, *neutral])
        self.added = FirstToken(model, harmless)
        self.unedited = FirstToken(model, neutral)(())

    def __call__(self, vector: Tensor, site: Site, origin: Origin) -> Tensor:
        """Bypass, induce and KL."""
        steering = SteeringVector({site: vector.float()}, origin)
        ablated = self.ablated(steering.everywhere(self.model).edits(self.model))
        added = self.added(steering.edits(self.model))
        return torch.stack(
            [
                log_odds(ablated[: self.n], self.tokens).mean(),
                log_odds(added, self.tokens).mean(),
                kl_divergence(self.unedited, ablated[self.n :]).mean(),
            ]
        )


def _layers(n_layers: int, depth: float, layers: Sequence[int] | None) -> list[int]:
    if not 0 < depth <= 1:
        raise ValueError(f"depth {depth}: give the share of layers to consider, above 0 up to 1")
    end = math.floor(depth * n_layers)
    wanted = sorted(set(range(end) if layers is None else layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= end:
        raise ValueError(
            f"layers {wanted}: give some from 0 to {end - 1}; from {end} = floor({depth} * "
            f"{n_layers}) on a direction writes the answer's tokens itself, unless depth is raised"
        )
    return wanted


def _as_labelled(
    model: HookedModel, contrast: Contrast, openers: Sequence[str], which: str
) -> tuple[Contrast, Tensor]:
    """The prompts that the model refuses and answers as their labels say, and their log-odds."""
    odds = log_odds(FirstToken(model, contrast.prompts)(()), first_tokens(model, openers))
    refuses, positive = odds > 0, contrast.positive
    kept = (refuses == positive).nonzero().flatten()
    n = int(refuses[positive].sum()), int((~refuses)[~positive].sum())
    if min(n) < 2:
        raise ValueError(
            f"{model.name} refuses {n[0]} of the {int(positive.sum())} positive {which} prompts and "
            f"answers {n[1]} of the {int((~positive).sum())} negative: there is no refusal to find "
            f"a direction of, or refusals do not open with {', '.join(map(repr, openers))}"
        )
    return contrast.take(kept), odds[kept]


def _candidates(acts: Activations, positive: Tensor, layers: Sequence[int], n: int) -> Tensor:
    """Raw differences of means `[position, layer, d_model]`, NaN where there is none."""
    found: Tensor | None = None
    for layer in layers:
        x = acts[Site(layer, "resid_pre")].double()
        x = x[:, None] if x.ndim == 2 else x
        if found is None:
            found = torch.full((x.shape[1], n, x.shape[2]), torch.nan)
        differ = (x != x[0]).flatten(2).any(-1).any(0)  # at the embedding a token is always itself
        delta = (x[positive].mean(0) - x[~positive].mean(0)).float()
        found[differ, layer] = delta[differ]
    assert found is not None
    return found


def _none(
    table: Tensor,
    eligible: Tensor,
    max_kl: float,
    min_induce: float,
    layers: Sequence[int],
) -> str:
    bypass, induce, kl = table
    inducing = eligible & (induce >= min_induce)
    pool = inducing if bool(inducing.any()) else eligible
    nearest = int(torch.where(pool, kl, torch.inf).argmin())
    p, layer = divmod(nearest, table.shape[2])
    return (
        f"no candidate passes: of {int(eligible.sum())} scored on all validation prompts (layers "
        f"{layers[0]} to {layers[-1]}) {int((eligible & (kl <= max_kl)).sum())} have KL of at most "
        f"max_kl = {max_kl:g} and {int(inducing.sum())} an induce score of at least min_induce = "
        f"{min_induce:g}; the nearest, layer {layer} at position {p}, has KL {float(kl[p, layer]):.3f}, "
        f"induce {float(induce[p, layer]):.2f} and bypass {float(bypass[p, layer]):.2f}: raise "
        "max_kl, measure KL on ordinary prompts (neutral=...), or give other prompts"
    )


def _tokens(model: HookedModel, prompt: Prompt, acts: Activations) -> tuple[str, ...]:
    from probes import positions as places

    rendered = model.template.render(prompt)
    at = places.parse(acts.positions).indices(rendered)
    if len(at) != acts.counts[0]:  # a mean over tokens
        return (acts.positions,)
    return tuple(
        f"{i - rendered.n_prompt} {model.tokenizer.decode([rendered.ids[i]])!r}" for i in at
    )


def _sizes(contrast: Contrast) -> tuple[int, int]:
    n = int(contrast.positive.sum())
    return n, len(contrast) - n
