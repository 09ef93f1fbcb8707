"""What drift is measured against: the aligned reference, its prompts and its nulls, read once."""

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.checkpoints import fits, prompted_as
from analyses.drift import halves, terms
from analyses.drift.halves import Null
from analyses.drift.readings import Path, Reading, Weights, compare_weights, read
from analyses.drift.terms import Term
from probes.contrast import Contrast
from probes.model import HookedModel
from probes.prompts import prompts_hash
from probes.results import Record
from probes.scores import bca, newcombe
from probes.splits import FEW_GROUPS, codes

METHOD = 2
"""Raised when a term is defined otherwise, so that numbers kept in files are not mixed."""

LEAST = 4
"""Topics that two random halves need, to hold two each."""


@dataclass(frozen=True)
class Drift:
    """How far one checkpoint is from the reference."""

    label: str
    role: str
    """`base`, `drifted`, or `control`."""
    terms: tuple[Term, ...]
    """In the order of `terms.TERMS`."""
    details: dict[str, tuple[float, float, float]]
    """What the terms do not say: value and 95 % interval by name."""
    weights: Weights
    projection: Float[Tensor, "class layer"]
    """How far the means of the positive and of the negative class moved along the reference's
    class direction, over the distance between the classes; below 0 towards the negative class."""


@dataclass(frozen=True)
class Yardstick:
    """The reference read once; `measure(model)` then says how far any checkpoint is from it."""

    base: HookedModel
    reference: HookedModel
    contrast: Contrast
    groups: Int[Tensor, " prompt"]
    reading: Reading
    path: Path
    direction: Float[Tensor, "layer d_model"]
    """From the reference's negative to its positive class mean, over the squared distance: the
    classes lie 1 apart along it."""
    nulls: tuple[Null, Null, float]
    """Of representation, token and behaviour; the weight term has one for each update."""
    resamples: int
    seed: int

    @classmethod
    def of(
        cls,
        base: HookedModel,
        reference: HookedModel,
        contrast: Contrast,
        *,
        given: tuple[Reading, Path] | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> "Yardstick":
        """Read the reference, unless that is given. `base` is what it was aligned from: their
        difference is the alignment matrix of the weight term."""
        base = prompted_as(base, reference)
        groups, known = codes(contrast.topics)
        positive = contrast.positive
        fewest = min(len(groups[positive].unique()), len(groups[~positive].unique()))
        if fewest < LEAST:
            raise ValueError(
                f"a class has prompts of {fewest} topics: the nulls need {LEAST} or more, and "
                f"{FEW_GROUPS} for intervals that can be trusted"
            )
        if len(known) < FEW_GROUPS:
            warnings.warn(
                f"only {len(known)} topics: intervals over fewer than {FEW_GROUPS} are too narrow",
                stacklevel=2,
            )
        size = min(base.layout.vocab_size, reference.layout.vocab_size)
        fits(reference, size)
        reading, path = given or read(reference, contrast, vocab_size=size)
        means = [reading.states[:, chosen].double().mean(1) for chosen in (positive, ~positive)]
        apart = (means[0] - means[1]).norm(dim=-1)
        if not bool((apart > 0).all()):
            raise ValueError(
                f"both classes have the same states in layer {int((apart == 0).nonzero()[0])} of "
                f"{reference.name}: give prompts that differ between the classes"
            )
        split = terms.halves(_strata(positive, groups), seed)
        direction = (means[0] - means[1]) / apart[:, None] ** 2
        along = torch.einsum("lpd,ld->lp", reading.states.double(), direction)
        said = halves.moves(
            lambda rows, step: reading.logp[rows, step].exp(), path.reached, positive, groups
        )
        nulls = (
            halves.representation_null(halves.project(along, positive, groups), split),
            halves.token_null(said, split),
            terms.behaviour_null(reading.refused, positive, seed),
        )
        return cls(
            base, reference, contrast, groups, reading, path, direction, nulls, resamples, seed
        )

    def measure(
        self,
        model: HookedModel,
        role: str = "drifted",
        label: str | None = None,
        given: Reading | None = None,
    ) -> Drift:
        """The four terms of one checkpoint and what stands behind them; it is read unless that is
        given."""
        model = prompted_as(model, self.reference, label)
        weights = compare_weights(self.base, self.reference, model)
        other = given or read(model, self.contrast, self.path)[0]
        positive, options = self.contrast.positive, {"count": self.resamples, "seed": self.seed}
        change = (other.states - self.reading.states).double()
        along = torch.einsum("lpd,ld->lp", change, self.direction)
        size = min(self.reading.logp.shape[-1], other.logp.shape[-1])
        ours, theirs = self.reading.logp, other.logp
        if size < ours.shape[-1]:  # a vocabulary smaller than base and reference share
            ours = ours[..., :size].log_softmax(-1) * self.path.reached[..., None]
        moved = halves.moves(
            lambda rows, step: theirs[rows, step].exp() - ours[rows, step].exp(),
            self.path.reached,
            positive,
            self.groups,
        )
        found = (
            terms.weight_term(
                weights.dot, weights.update, weights.alignment, weights.size, **options
            ),
            halves.representation_term(
                halves.project(along, positive, self.groups), self.nulls[0], **options
            ),
            halves.token_term(moved, self.nulls[1], **options),
            terms.behaviour_term(
                self.reading.refused,
                other.refused,
                positive,
                self.groups,
                self.nulls[2],
                identical=not bool(weights.update.any()),
                **options,
            ),
        )
        return Drift(
            label or model.label,
            role,
            found,
            self._details(weights, other, along, ours, theirs),
            weights,
            torch.stack([along[:, chosen].mean(1) for chosen in (positive, ~positive)]).float(),
        )

    def _details(
        self, weights: Weights, other: Reading, along: Tensor, ours: Tensor, theirs: Tensor
    ) -> dict[str, tuple[float, float, float]]:
        positive = self.contrast.positive
        touched = weights.alignment > 0
        update, alignment = float(weights.update.sum()), float(weights.alignment.sum())
        inside = float(weights.update[touched].sum())
        kl = torch.zeros(len(ours), dtype=torch.float64)
        for a, b in zip(ours.unbind(1), theirs.unbind(1), strict=True):  # a step at a time
            kl += (a.double().exp() * (a - b).double()).sum(-1)
        kl /= self.path.reached.sum(1).clamp_min(1)
        said: dict[str, tuple[float, float, float]] = {
            "relative weight change": _exact(math.sqrt(update / float(weights.reference.sum()))),
            "weight change over alignment's": _exact(math.sqrt(update / alignment)),
            "share of the change in tensors alignment changed": _exact(
                inside / update if update else 0.0
            ),
            "alignment taken back": _exact(-float(weights.dot.sum()) / alignment),
        }
        for chosen, name in ((positive, "positive"), (~positive, "negative")):
            rate = newcombe(
                int((other.refused & chosen).sum()),
                int(chosen.sum()),
                int((self.reading.refused & chosen).sum()),
                int(chosen.sum()),
            )
            said[f"change of refusal rate, {name}"] = (rate.value, rate.low, rate.high)
            said[f"KL(reference‖checkpoint), {name}, nats"] = self._mean(kl, chosen)
            said[f"shift along the class direction, {name}"] = self._mean(along.mean(0), chosen)
        return said

    def _mean(
        self, values: Float[Tensor, " prompt"], chosen: Bool[Tensor, " prompt"]
    ) -> tuple[float, float, float]:
        """Mean over prompts with its BCa interval over topics."""
        n = int(self.groups.max()) + 1
        sums = torch.zeros(n, dtype=torch.float64)
        sums.index_add_(0, self.groups[chosen], values[chosen].double())
        counts = torch.bincount(self.groups[chosen], minlength=n).double()
        draws = terms.resamples(n, self.resamples, self.seed)
        left = 1 - torch.eye(n, dtype=torch.float64)
        limits = bca(
            sums.sum() / counts.sum(),
            draws @ sums / (draws @ counts),
            left @ sums / (left @ counts),
        )
        return float(limits.value), float(limits.low), float(limits.high)

    @property
    def record(self) -> Record:
        template = self.reference.template
        return Record(
            models=(self.base.name, self.reference.name),
            fingerprints=(self.base.fingerprint, self.reference.fingerprint),
            template_hash=template.hash,
            prompts_hash=prompts_hash(template.render_all(self.contrast.prompts)),
            seeds=(self.seed,),
            dtype=str(self.reference.dtype).removeprefix("torch."),
            engine=self.reference.engine.name,
            settings={"resamples": self.resamples, "topics": int(self.groups.max()) + 1},
        )


def _strata(
    positive: Bool[Tensor, " prompt"], groups: Int[Tensor, " prompt"]
) -> Int[Tensor, " group"]:
    """Which classes each topic has prompts of: 1 the negative, 2 the positive, 3 both."""
    found = torch.zeros(int(groups.max()) + 1, dtype=torch.long)
    found[groups[positive].unique()] += 2
    found[groups[~positive].unique()] += 1
    return found


def _exact(value: float) -> tuple[float, float, float]:
    """A number that is computed, not estimated."""
    return value, value, value
