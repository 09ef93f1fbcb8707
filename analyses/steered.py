"""Does the class direction of the aligned model make it refuse, and at what cost?"""

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.refusals import RefusalRates
from probes import datasets
from probes.activations import Activations
from probes.contrast import Contrast
from probes.model import HookedModel, Steers
from probes.prompts import Prompt
from probes.refusals import refuses
from steering.costs import Reference, kl
from steering.effects import Measure
from steering.first_token import FirstToken
from steering.grid import Grid
from steering.judges import first_tokens, log_odds
from steering.nulls import random_vectors
from steering.recipes import train_vector
from steering.sweep import SteeringSweep, sweep

STRENGTHS = (0.5, 1.0)
EFFECT, COST = "refusal log-odds (nats)", "KL (nats)"
NULLS, BENIGN = 20, 8
COMMON = 0.1
"""Share of the refusals that a token must open to count as one that opens refusals."""


def steer_class(
    model: HookedModel,
    parts: dict[str, Contrast],
    activations: Activations,
    openers: Sequence[str],
    *,
    seed: int = 0,
) -> SteeringSweep:
    """Add the difference of class means to prompts of the negative class.

    The vector is made of `activations`, those of the training prompts at every layer's output. Of
    every eighth of the depth from a quarter on, the layer is chosen at which strength 1 raises the
    log-odds of a refusal's first token most on validation prompts; test prompts are then measured
    at it, beside random directions of the same norm. The cost is KL(unsteered‖steered) on answers
    to shipped benign prompts.
    """
    n = model.n_layers
    where = [f"{layer}.resid_post" for layer in sorted({n * i // 8 for i in range(2, 8)})]
    train = parts["train"]
    vector = train_vector(model, train, where, activations=activations)
    tokens = first_tokens(model, openers)

    def odds(part: str) -> dict[str, Measure]:
        asked, _ = _negative(parts[part])
        readout = FirstToken(model, asked)

        def measure(on: HookedModel, what: Steers | None) -> Float[Tensor, " prompt"]:
            return log_odds(readout([] if what is None else what.edits(on)), tokens)

        return {EFFECT: measure}

    name = "class direction"
    tried = sweep(model, Grid({name: vector}, [1.0], where), odds("validation"), progress=False)
    site = tried.best().site
    chosen = vector.at(site)
    nulls = {"random": random_vectors(chosen, activations, NULLS, seed, topics=train.topics)}
    reference = Reference.of(model, datasets.general("validation")[:BENIGN])

    def cost(on: HookedModel, what: Steers | None) -> Float[Tensor, " prompt"]:
        return kl(on, what, reference)

    return sweep(
        model,
        Grid({name: chosen}, STRENGTHS, [site], nulls=nulls),
        odds("test"),
        {COST: cost},
        groups={EFFECT: _negative(parts["test"])[1]},
        seed=seed,
        progress=False,
    )


def refusal_openers(rates: RefusalRates, model: str) -> list[str]:
    """First words with which this model's refusals open, the commonest first; none if it has none."""
    answers = rates.answers[rates.models.index(model)]
    words = Counter(a.split()[0] for a in answers if a.strip() and refuses(a))
    return [word for word, n in words.most_common() if n >= COMMON * words.total()]


def _negative(contrast: Contrast) -> tuple[list[Prompt], list[str]]:
    """Prompts of the negative class and their topics."""
    rows = torch.nonzero(~contrast.positive).flatten().tolist()
    return [contrast.prompts[i] for i in rows], [contrast.topics[i] for i in rows]
