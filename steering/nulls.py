"""What chance shows: vectors of the same norm at the same sites that know nothing of the concept.

Beside every effect stand at least 20 of them. The stream is anisotropic, so isotropic directions
are an easy null: half are differences of means between random halves of the prompts.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from probes import splits
from probes.activations import Activations
from probes.contrast import Contrast
from probes.directions import difference_of_means
from probes.model import HookedModel
from probes.positions import Positions
from probes.sites import Sites
from steering.artefact import Origin
from steering.recipes import Recipe, classes, fit, one_each, read
from steering.vector import SteeringVector


def random_vectors(
    vector: SteeringVector,
    activations: Activations,
    n: int = 20,
    seed: int = 0,
    *,
    topics: Sequence[str] | None = None,
) -> list[SteeringVector]:
    """`n` vectors with the sites, norms, operation and scales of `vector`, but random directions.

    The first half (rounded up) is isotropic, the others are differences of means between random
    halves of the prompts of `activations`; a vector splits the prompts alike at all its sites.
    Give the contrast's `topics`: halves then hold whole topics, twins stay together, and the
    concept is in both alike. Where a contrast is wide, halves of single prompts hold some of it by
    chance, and are no null. The rows of a subspace are drawn one by one. A strength in sigma is the
    true vector's, so that both are moved equally far. For ablation everywhere draw at one site,
    then use `everywhere`.
    """
    if n < 1:
        raise ValueError(f"{n} random vectors were asked: ask for 20, at least 1")
    one_each(activations)
    if topics is not None and len(topics) != len(activations):
        raise ValueError(
            f"{len(topics)} topics for activations of {len(activations)} prompts: give one of each"
        )
    numbers, known = splits.codes(
        [str(i) for i in range(len(activations))] if topics is None else topics
    )
    if len(known) < 4:
        raise ValueError(
            f"{len(known)} {'prompts' if topics is None else 'topics'} cannot be halved at random: "
            "give activations of the prompts the vector was made from"
        )
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        halves = i >= (n + 1) // 2
        rank = max(1 if v.ndim == 1 else len(v) for v in vector.vectors.values())
        parts = [
            (torch.randperm(len(known), generator=generator) < len(known) // 2)[numbers]
            for _ in range(rank if halves else 0)
        ]
        drawn = {}
        for site, v in vector.vectors.items():
            rows = v.reshape(-1, v.shape[-1]).double()
            if halves:
                x = activations[site].double()
                new = torch.stack([x[h].mean(0) - x[~h].mean(0) for h in parts[: len(rows)]])
            else:
                new = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
            lengths = rows.norm(dim=1, keepdim=True) / new.norm(dim=1, keepdim=True)
            drawn[site] = (new * lengths).reshape(v.shape).float()
        kind = "random halves" if halves else "isotropic"
        origin = replace(vector.origin, estimator=f"random ({kind}, seed {seed}, number {i})")
        made.append(replace(vector, vectors=drawn, origin=origin))
    return made


def shuffled_vectors(
    model: HookedModel,
    contrast: Contrast,
    sites: Sites,
    n: int = 20,
    seed: int = 0,
    *,
    recipe: Recipe = difference_of_means,
    positions: str | Positions = "last",
    answers: Sequence[str] | None = None,
    activations: Activations | None = None,
) -> list[SteeringVector]:
    """The recipe repeated with labels that carry nothing of the concept.

    Of the twin topics a random half exchanges its labels, each pair as a whole; topics of one class
    exchange theirs so that either class keeps its share of the other (`_balanced`). The other
    arguments are those of `train_vector`. A vector keeps its own norm, a fraction of the true one:
    for k topics about 1/sqrt(k) of the spread of single differences. Brought to the true norm
    (as a sweep does) what little it holds is amplified with it, so draw as many as of any null.
    """
    if n < 1:
        raise ValueError(f"{n} shuffles were asked: ask for 20, at least 1")
    acts = read(model, contrast, sites, positions, answers, activations)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        column = _balanced(contrast, generator)
        high, low, paired = classes(column, contrast.topics)
        said = f"shuffled labels (seed {seed}, number {i}) "
        origin = Origin.of(model, estimator=said, positions=acts.positions)
        made.append(fit(acts, model.sites(sites), high, low, recipe, origin, paired))
    return made


def _balanced(contrast: Contrast, generator: torch.Generator) -> Bool[Tensor, " prompt"]:
    """Labels that share nothing with the true ones, up to a topic where numbers are odd.

    `probes.splits.shuffled` throws a coin for each topic, as a permutation test must. But k coins
    leave about 1/sqrt(k) of the mean difference, as long as the rest of such a vector where a
    concept is wide: at the true norm many would be the true vector, or its opposite.
    """
    numbers, known = splits.codes(contrast.topics)
    if len(known) < 4:
        raise ValueError(
            f"labels of {len(known)} topics cannot be shuffled: any exchange gives the true "
            "vector, or what chance left of it; give 4 topics or more"
        )
    labels = contrast.positive
    share = torch.zeros(len(known)).scatter_reduce(
        0, numbers, labels.float(), "mean", include_self=False
    )
    kinds = [(share > 0) & (share < 1), share == 1, share == 0]
    twins, high, low = (kind.nonzero().flatten() for kind in kinds)
    either = float(torch.rand(1, generator=generator))  # up or down, so that many have no sign
    half = int(len(twins) / 2 + either)
    exchanged = int(len(high) * len(low) / max(len(high) + len(low), 1) + either)
    turned = torch.zeros(len(known), dtype=torch.bool)
    for group, n in ((twins, half), (high, exchanged), (low, exchanged)):
        turned[group[torch.randperm(len(group), generator=generator)[:n]]] = True
    return labels ^ turned[numbers]
