"""Recipes: from a contrast to a steering vector or to a subspace to ablate.

A recipe is a function of two classes' activations, so any estimator of `probes.directions` or
`probes.linear` is one, and so is your own:

difference_of_means     contrastive activation addition (Rimsky et al. 2024), mean difference
pca_of_pairs            representation reading (Zou et al. 2023)
logistic_direction      weights of a logistic regression
lda, whitened_mean      Fisher's discriminant, mean difference in whitened coordinates
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probes import splits
from probes.activations import Activations
from probes.capturing import capture
from probes.contrast import Contrast
from probes.directions import Direction, checked, difference_of_means
from probes.model import HookedModel
from probes.positions import Positions
from probes.prompts import Prompt
from probes.sites import HEADED, READ_ONLY, Site, Sites, Unsupported
from steering import ops
from steering.artefact import Origin
from steering.axes import axes_of_pairs
from steering.axes import mean_and_axes as mean_and_axes
from steering.edits import Scale
from steering.vector import SteeringVector

Recipe = Callable[[Tensor, Tensor], Direction]
"""`(positive, negative) -> Direction`, rows `[example, width]`; twins come in the same order."""

Axes = Callable[[Tensor, Tensor, int], Tensor]
"""`(positive, negative, rank) -> [rank, width]`, independent rows, the most important first."""


def train_vector(
    model: HookedModel,
    contrast: Contrast,
    sites: Sites,
    *,
    recipe: Recipe = difference_of_means,
    positions: str | Positions = "last",
    answers: Sequence[str] | None = None,
    activations: Activations | None = None,
) -> SteeringVector:
    """A vector at each of the sites that points from the negative to the positive class.

    Its length is the distance of the class means along it, whatever the recipe: added with
    strength 1 (raw) it moves the mean of the negative class, seen along the vector, to that of the
    positive. For the difference of means that is the difference itself.

    `answers` stand behind the prompts of the contrast, one for each in its order; read them with
    `positions="tokens:-1:"` (the last token, as in CAA) or `"mean:generated"`. A position rule
    must give one vector a prompt. `activations`, captured from the contrast's prompts, spare
    reading them again. Every site keeps the sigma of projections and the mean norm.
    """
    acts = read(model, contrast, sites, positions, answers, activations)
    high, low, paired = classes(contrast.positive, contrast.topics)
    origin = Origin.of(model, data_hash=_data_hash(acts, contrast), positions=acts.positions)
    return fit(acts, model.sites(sites), high, low, recipe, origin, paired)


def train_subspace(
    model: HookedModel,
    contrast: Contrast,
    sites: Sites,
    rank: int,
    *,
    axes: Axes | None = None,
    positions: str | Positions = "last",
    answers: Sequence[str] | None = None,
    activations: Activations | None = None,
) -> SteeringVector:
    """Orthonormal rows at each site that hold the contrast, for ablation.

    `axes` says which: `axes_of_pairs` (the default), `mean_and_axes`, or your own. The positive
    class projects higher on each row along which the class means differ; along the others (all but
    the first of `mean_and_axes`) the sign means nothing. Sigma is measured along the first.
    """
    acts = read(model, contrast, sites, positions, answers, activations)
    high, low, paired = classes(contrast.positive, contrast.topics)
    axes = axes or axes_of_pairs
    if axes is axes_of_pairs and not paired:
        raise ValueError(UNPAIRED)
    rows: dict[Site, Tensor] = {}
    for site in model.sites(sites):
        positive, negative = checked(acts[site][high], acts[site][low])
        if not 1 <= rank <= positive.shape[1]:
            raise ValueError(
                f"rank {rank} at {site}, whose width is {positive.shape[1]}: ask for 1 to the width"
            )
        basis = ops.orthonormal(axes(positive, negative, rank)).double()
        gap = basis @ (positive.mean(0) - negative.mean(0))
        rows[site] = (basis * torch.where(gap < 0, -1.0, 1.0)[:, None]).float()
    origin = Origin.of(
        model,
        estimator=f"{getattr(axes, '__name__', 'axes')} (rank {rank})",
        data_hash=_data_hash(acts, contrast),
        positions=acts.positions,
    )
    return measured(SteeringVector(rows, origin, "ablate"), acts, contrast.positive)


def activation_addition(
    model: HookedModel,
    positive: Prompt,
    negative: Prompt,
    sites: Sites,
    *,
    positions: str | Positions = "last",
) -> SteeringVector:
    """The difference of a single pair of prompts (ActAdd, Turner et al. 2023).

    That method adds one difference for each of the first tokens, aligned by padding. Here a site
    has one vector for all tokens: the difference at the last token, or with
    `positions="mean:all"` the mean of the aligned differences where both prompts have as many
    tokens. To act at the first tokens only give `Schedule("prompt", prompt=(0, n))`. One pair has
    no spread, so there is no sigma.
    """
    pair = Contrast.of_pairs([positive], [negative], name="one pair")
    return train_vector(model, pair, sites, positions=positions)


def unembedding_vector(
    model: HookedModel, token: str | int, sites: Sites, *, against: str | int | None = None
) -> SteeringVector:
    """The row of the output matrix for a token, less that of `against`: what its logit reads.

    A text must be one token where an answer begins, behind the template. The row is taken as it
    is; the final norm's weights lie between the stream and it. Scales are those of no data:
    `measured` adds them.
    """
    output = model.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if output is None:
        raise ValueError(f"{model.name} has no output matrix: give a causal language model")
    weight: Tensor = output.weight  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
    ids = [
        _token(model, t, len(weight)) for t in ([token] if against is None else [token, against])
    ]
    rows = weight[ids].detach().float().cpu()
    row = rows[0] if against is None else rows[0] - rows[1]
    said = f"unembedding of {token!r}" + ("" if against is None else f" less {against!r}")
    origin = Origin.of(model, estimator=said)
    return SteeringVector(dict.fromkeys(_editable(model, sites), row), origin)


def measured(
    vector: SteeringVector,
    activations: Activations,
    positive: Bool[Tensor, " prompt"] | None = None,
) -> SteeringVector:
    """The same vector with its scales measured on these activations, one vector a prompt.

    Sigma is the standard deviation of projections on the unit (of a subspace: of its first row),
    pooled inside the classes if `positive` names them; the norm is the mean over rows.
    """
    one_each(activations)
    scales = {}
    for site in vector.sites:
        x = activations[site].double()
        along = x @ vector[site].reshape(-1, x.shape[1])[0].double() / vector.norm(site)
        groups = [along] if positive is None else [along[positive], along[~positive]]
        squares = sum(float((g - g.mean()).square().sum()) for g in groups if len(g))
        free = len(along) - len(groups)
        sigma = (squares / free) ** 0.5 if free > 0 else 0.0
        scales[site] = Scale(sigma or None, float(x.norm(dim=1).mean()))
    return SteeringVector(vector.vectors, vector.origin, vector.operation, vector.values, scales)


UNPAIRED = (
    "this recipe takes differences of pairs and the contrast's topics are no pairs: make it with "
    "Contrast.of_pairs, or take a recipe of two sets such as difference_of_means"
)


def read(
    model: HookedModel,
    contrast: Contrast,
    sites: Sites,
    positions: str | Positions,
    answers: Sequence[str] | None,
    activations: Activations | None,
) -> Activations:
    """Activations of the contrast's prompts, one vector each, at sites that can be steered."""
    found = _editable(model, sites)
    if activations is None:
        activations = capture(
            model, contrast.prompts, found, positions, answers=answers, progress=False
        )
    elif len(activations) != len(contrast):
        raise ValueError(
            f"activations of {len(activations)} prompts for a contrast of {len(contrast)}: capture "
            "the contrast's own prompts, in its order"
        )
    one_each(activations)
    return activations


def classes(
    positive: Bool[Tensor, " prompt"], topics: Sequence[str]
) -> tuple[Int[Tensor, " positive"], Int[Tensor, " negative"], bool]:
    """Rows of both classes, pair by pair where topics are pairs, and whether they are."""
    try:
        return *splits.twins(positive, topics), True
    except ValueError:  # topics of one class, or of unequal numbers
        return positive.nonzero().flatten(), (~positive).nonzero().flatten(), False


def fit(
    acts: Activations,
    sites: Sequence[Site],
    high: Int[Tensor, " positive"],
    low: Int[Tensor, " negative"],
    recipe: Recipe,
    origin: Origin,
    paired: bool,
) -> SteeringVector:
    """The recipe at every site, on rows already read."""
    vectors, scales, names = {}, {}, set()
    for site in sites:
        x = acts[site]
        found = recipe(x[high], x[low])
        if found.estimator.startswith("pca_of_pairs") and not paired:
            raise ValueError(UNPAIRED)
        vectors[site] = (found.unit.double() * found.gap).float()
        scales[site] = Scale(found.sigma or None, float(x.double().norm(dim=1).mean()))
        names.add(found.estimator)
    named = Origin(**{**vars(origin), "estimator": origin.estimator + ", ".join(sorted(names))})
    return SteeringVector(vectors, named, scales=scales)


def _editable(model: HookedModel, sites: Sites) -> tuple[Site, ...]:
    found = model.sites(sites)
    for site in found:
        if site.part in READ_ONLY:
            raise Unsupported(f"{site} can be read but not steered: choose a part of the stream")
        if site.part in HEADED and site.head is None:
            raise ValueError(f"{site} has several heads: name one, for example {site}.0")
    return found


def one_each(acts: Activations) -> None:
    """Refuse activations with several vectors of a prompt."""
    if set(acts.counts) != {1}:
        raise ValueError(
            f"position {acts.positions!r} reads {max(acts.counts)} tokens of a prompt and a recipe "
            f"takes one vector of each: use 'mean:{acts.positions}', or a rule that picks one token"
        )


def _token(model: HookedModel, token: str | int, size: int) -> int:
    if isinstance(token, int):
        if not 0 <= token < size:
            raise ValueError(f"token {token} is out of range: {model.name} has {size}, from 0")
        return token
    rendered = model.template.render("Hello.", token)
    ids = rendered.ids[rendered.n_prompt :]
    if len(ids) != 1:
        pieces = ", ".join(repr(model.tokenizer.decode([i])) for i in ids) or "none"
        raise ValueError(
            f"{token!r} is {len(ids)} tokens for {model.name} ({pieces}): give a text of one token, "
            "or a token's id"
        )
    return ids[0]


def _data_hash(acts: Activations, contrast: Contrast) -> str:
    """One hash over the prompts read and their labels."""
    said = repr((acts.record.prompts_hash, contrast.labels))
    return hashlib.sha256(said.encode()).hexdigest()[:32]
