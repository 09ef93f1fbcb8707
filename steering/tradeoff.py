"""The trade-off of alignment against helpfulness along a steering norm (Wolf et al. 2024).

Claim of arXiv 2401.16332: alignment rises linearly in the norm, helpfulness falls quadratically, so
small norms pay. `tradeoff` measures both on a model and fits the laws of `steering.tradeoff_law`;
`fit` does the second part alone. What is said beyond a fit: the log-log slopes (expected 1 and 2)
with intervals, which law describes a window that was declared before, and the gain at a norm
chosen on validation prompts beside that of random directions.

The paper's released code draws another curve than it fitted (b / 2.5), smooths the measurements it
draws with a window that pulls the ends to 0, takes the interval of a mean for that of 100 prompts
however many there were, and turns what failed into 0. None of that is done here.
"""

from collections.abc import Sequence
from typing import Any

import torch

from probes.model import HookedModel
from probes.prompts import Prompt
from steering.four_choice import Items
from steering.tradeoff_fit import Read, fit, inside
from steering.tradeoff_measure import Labels, Measured, answers, measure
from steering.tradeoff_result import Tradeoff
from steering.vector import SteeringVector


def tradeoff(
    model: HookedModel,
    vector: SteeringVector,
    strengths: Sequence[float],
    prompts: Sequence[Prompt],
    items: Items,
    *,
    window: tuple[float, float],
    validation: Measured | None = None,
    nulls: Sequence[SteeringVector] = (),
    null_strengths: Sequence[float] = (),
    weight: float = 1.0,
    read: Read = "full",
    labels: Labels = answers,
    topics: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Tradeoff:
    """Measure the test prompts and items, and the random directions `nulls`, and fit.

    From `validation`, measured on other prompts and items (`measure`), the norm of the largest
    net benefit is chosen; the nulls are measured there and at `null_strengths`.
    """
    chosen = None if validation is None else choose(validation, weight, read)
    if chosen is not None and chosen not in [0.0, *map(float, strengths)]:
        raise ValueError(
            f"the validation prompts chose the norm {chosen:g}, which is not among the strengths "
            "to be measured: measure both at the same strengths"
        )
    norms = sorted({0.0, *map(float, strengths)})
    inside(torch.tensor(norms, dtype=torch.float64), window)
    given: dict[str, Any] = {"labels": labels, "topics": topics, "progress": progress}
    found = measure(model, vector, strengths, prompts, items, **given)
    places = {*map(float, null_strengths), *([] if chosen is None else [chosen])} - {0.0}
    given["unsteered"] = found.labels[found.zero]
    null = [measure(model, v, sorted(places), prompts, items, **given) for v in nulls if places]
    return fit(
        found,
        window=window,
        null=null,
        chosen=chosen,
        weight=weight,
        read=read,
        resamples=resamples,
        seed=seed,
    )


def choose(measured: Measured, weight: float = 1.0, read: Read = "full") -> float:
    """The measured norm of the largest `w B + P`, of several the one nearest 0."""
    P = (measured.four if read == "four" else measured.full).mean(1)
    net = weight * measured.labels.mean(1) + P
    best = (net >= net.max() - 1e-12).nonzero().flatten()
    return float(min(measured.strengths[best].tolist(), key=abs))
