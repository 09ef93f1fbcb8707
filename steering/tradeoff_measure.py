"""Alignment and helpfulness measured at several steering norms, and what the laws assume.

The vector of each site is made a unit vector and multiplied by r, so r is the norm that is added
at every site of the band (Wolf et al. 2024, arXiv 2401.16332, section 5). The sign is the
vector's: positive r moves towards the class it was oriented by.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from probes.activations import Activations
from probes.model import HookedModel
from probes.progress import progress as show
from probes.prompts import Prompt, prompts_hash
from probes.refusals import refuses
from probes.results import Record, Result
from probes.sites import Site
from probes.splits import codes
from steering.applied import steer
from steering.edits import ADDING
from steering.four_choice import Items
from steering.judges import refusal_log_odds
from steering.vector import SteeringVector

Labels = Callable[[HookedModel, Sequence[Prompt]], Tensor]
"""`(model, prompts) -> [prompt]`, 1 where the model is surely aligned, -1 where surely not."""

GAPS = ("mean", "sd", "skew", "kurtosis", "distance")
"""What is kept of the shifts of the logit gaps of one item."""


@dataclass(frozen=True)
class Measured(Result):
    """One label a prompt and the probability of the correct answer of each item, at every norm."""

    strengths: Float[Tensor, " strength"]
    """Ascending, 0 among them."""
    labels: Float[Tensor, "strength prompt"]
    """-1 to 1; their mean over prompts is B(r)."""
    full: Float[Tensor, "strength item"]
    """P(correct) over the full vocabulary."""
    four: Float[Tensor, "strength item"]
    """P(correct) renormalised over the four candidates."""
    change: Float[Tensor, "strength item"]
    """Norm of the change of the logits, the unembedded change of the final state; 0 at r = 0."""
    gaps: Float[Tensor, "strength item shape"]
    """Of the shifts of `logit(wrong) - logit(correct)` over all wrong tokens of an item: the
    columns of `GAPS`, skew and excess kurtosis 0 for a normal distribution, and the Kolmogorov
    distance from the normal of that mean and sd. NaN at r = 0."""
    topics: tuple[str, ...]
    """Group of each prompt."""
    sites: tuple[str, ...]
    labelled_by: str
    form: str
    """How the items were asked."""

    def __post_init__(self) -> None:
        r = self.strengths
        if not bool((r == 0).any()) or bool((r.diff() <= 0).any()):
            raise ValueError(
                f"the strengths must ascend and hold 0, the unsteered model, given were {r.tolist()}"
            )

    @property
    def zero(self) -> int:
        """Index of r = 0."""
        return int((self.strengths == 0).nonzero()[0])


def answers(
    model: HookedModel, prompts: Sequence[Prompt], tokens: int = 8
) -> Float[Tensor, " prompt"]:
    """1 where the greedy answer opens with a refusal (`probes.refusals`), -1 where it does not."""
    said = model.generate(prompts, tokens)
    return torch.tensor([1.0 if refuses(text) else -1.0 for text in said], dtype=torch.float64)


def odds(
    model: HookedModel, prompts: Sequence[Prompt], openers: Sequence[str] = ("I",)
) -> Float[Tensor, " prompt"]:
    """P(R) - P(not R) of the first token being one that refusals open with: `tanh(log-odds / 2)`."""
    return torch.tanh(refusal_log_odds(model, prompts, openers) / 2)


def measure(
    model: HookedModel,
    vector: SteeringVector,
    strengths: Sequence[float],
    prompts: Sequence[Prompt],
    items: Items,
    *,
    labels: Labels = answers,
    topics: Sequence[str] | None = None,
    unsteered: Float[Tensor, " prompt"] | None = None,
    progress: bool = True,
) -> Measured:
    """Labels of `prompts` and reads of `items` at every norm; 0 is added if it is not asked for.

    At 0 nothing is installed, so its numbers are those of the unsteered model bit for bit. The
    same labels measured before, of another vector say, are taken from `unsteered`.
    """
    if vector.operation not in ADDING:
        raise ValueError(
            f"the vector is made for {vector.operation!r}, whose strength is no norm: the "
            "trade-off is defined for vectors that are added, vector.doing('add')"
        )
    if topics is not None and len(topics) != len(prompts):
        raise ValueError(f"{len(topics)} topics for {len(prompts)} prompts: give one for each")
    norms = sorted({0.0, *map(float, strengths)})
    if not torch.isfinite(torch.tensor(norms)).all():
        raise ValueError(f"the strengths {norms} are not all finite: give numbers")
    rendered = model.template.render_all(prompts)
    origin = items.logits(model)
    rows: dict[float, tuple[Tensor, ...]] = {}
    with show(len(norms), f"steering {model.label}", progress) as advance:
        for r in norms:
            with steer(model, vector, r, unit="unit"):
                known = unsteered if r == 0 else None
                judged = _checked(labels(model, prompts) if known is None else known, len(prompts))
                z = origin if r == 0 else items.logits(model)
            moved = z.double() - origin.double()
            read = (items.full(z), items.four(z), moved.norm(dim=1))
            rows[r] = (judged, *read, _shapes(moved, items))
            advance(1)
    labelled, full, four, change, gaps = (
        torch.stack([rows[r][i] for r in norms]) for i in range(5)
    )
    name = getattr(labels, "__name__", type(labels).__name__)
    record = Record(
        models=(model.name,),
        fingerprints=(model.fingerprint,),
        template_hash=model.template.hash,
        prompts_hash=prompts_hash(rendered),
        dtype=str(model.dtype).removeprefix("torch."),
        engine=model.engine.name,
        settings={
            "vector": str(vector),
            "labels": name,
            "items": f"{len(items)} {items.form}, {items.n_left_out} left out",
        },
    )
    return Measured(
        torch.tensor(norms, dtype=torch.float64),
        labelled,
        full,
        four,
        change,
        gaps,
        tuple(topics or (f"prompt-{i:04d}" for i in range(len(prompts)))),
        tuple(map(str, vector.sites)),
        name,
        items.form,
        record=record,
    )


def random_bands(
    vector: SteeringVector,
    values: Mapping[Site, Tensor] | Activations,
    n: int = 20,
    seed: int = 0,
    *,
    topics: Sequence[str] | None = None,
) -> list[SteeringVector]:
    """`n` vectors at the same sites that know nothing of the concept; `measure` gives all one norm.

    The first half (rounded up) is isotropic, the others are differences of means between random
    halves of the rows of `values[site]`, `[prompt, width]`; with `topics`, one a row, of whole
    topics, so that twins stay together and both halves hold the concept alike. Each is drawn once
    for all sites of one width: a concept's vectors in neighbouring layers point nearly alike, and
    random ones that do not (`steering.nulls`) would partly cancel in the stream and make an easy
    null.
    """
    if n < 1:
        raise ValueError(f"{n} random vectors were asked: ask for 20, at least 1")
    rows = len(values[vector.sites[0]])
    if topics is not None and len(topics) != rows:
        raise ValueError(f"{len(topics)} topics for {rows} rows: give one for each")
    numbers, known = codes(topics or [f"{i:06d}" for i in range(rows)])
    if len(known) < 4:
        raise ValueError(f"{len(known)} topics cannot be halved at random: give 4 or more")
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        drawn: dict[Site, Tensor] = {}
        isotropic: dict[int, Tensor] = {}
        halves = i >= (n + 1) // 2
        first = (torch.randperm(len(known), generator=generator) < len(known) // 2)[numbers]
        for site, v in vector.vectors.items():
            x = values[site].double()
            if x.shape[-1] != v.shape[-1] or x.ndim != 2:
                raise ValueError(
                    f"activations of shape {tuple(x.shape)} at {site}, where the vector has width "
                    f"{v.shape[-1]}: give one row a prompt, captured at the vector's own sites"
                )
            if halves:
                new = x[first].mean(0) - x[~first].mean(0)
            else:
                width = v.shape[-1]
                if width not in isotropic:
                    isotropic[width] = torch.randn(width, generator=generator, dtype=torch.float64)
                new = isotropic[width]
            drawn[site] = (new / new.norm()).float()
        kind = "random halves" if halves else "isotropic"
        origin = replace(vector.origin, estimator=f"random ({kind}, seed {seed}, number {i})")
        made.append(SteeringVector(drawn, origin))
    return made


def _shapes(moved: Float[Tensor, "item vocab"], items: Items) -> Float[Tensor, "item shape"]:
    """The columns of `GAPS` for each item."""
    if not bool(moved.any()):
        return torch.full((len(moved), len(GAPS)), torch.nan, dtype=torch.float64)
    right = items.correct[:, None]
    wrong = torch.ones_like(moved, dtype=torch.bool).scatter(1, right, value=False)
    shift = (moved - moved.gather(1, right))[wrong].reshape(len(moved), -1)
    mean, sd = shift.mean(1), shift.std(1, correction=0)
    z = ((shift - mean[:, None]) / sd[:, None]).sort(1).values
    n = z.shape[1]
    below, steps = torch.special.ndtr(z), torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - below).amax(1), (below - steps[:-1]).amax(1))
    return torch.stack([mean, sd, z.pow(3).mean(1), z.pow(4).mean(1) - 3, distance], 1)


def _checked(labels: Tensor, n: int) -> Float[Tensor, " prompt"]:
    if labels.shape != (n,) or not bool(((labels >= -1) & (labels <= 1)).all()):
        raise ValueError(
            f"the labels have shape {tuple(labels.shape)} for {n} prompts or leave -1 to 1: give "
            "one for each prompt, 1 aligned and -1 not"
        )
    return labels.double().cpu()
