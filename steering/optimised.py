"""A vector found by gradient descent: what must be added so that the model says a given text?

Nothing is estimated from activations. A vector at one site is trained, with all weights fixed, to
raise the log-probability of short target answers (a refusal sentence, say) while its norm or what
it does to other prompts is held down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes import figures
from probes.capturing import capture
from probes.engines import Batch
from probes.engines.hooks import HookEngine
from probes.model import HookedModel
from probes.progress import progress as show
from probes.prompts import Prompt, Rendered
from probes.results import Record, Result
from probes.sites import HEADED, Site
from steering import ops
from steering.artefact import Origin
from steering.costs import kl_divergence
from steering.edits import Scale, edit_of
from steering.schedule import ALWAYS, Schedule
from steering.vector import SteeringVector

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ROWS = 16
"""Prompts in one pass; the gradient is summed over passes, so this changes rounding alone."""


@dataclass(frozen=True)
class OptimisedVector(Result):
    """The vector with the lowest loss, and the course of its training."""

    raw: Float[Tensor, " width"] = field(repr=False)
    site: str
    loss: Float[Tensor, " step"] = field(repr=False)
    """`-logprob + kl_weight * kl` before each step, nats; step 0 is the unsteered model."""
    logprob: Float[Tensor, " step"] = field(repr=False)
    """Log-probability of the whole target answer, mean over prompts, nats."""
    kl: Float[Tensor, " step"] = field(repr=False)
    """KL(unsteered‖steered) of the first answer token on the neutral prompts, mean, nats."""
    best: int
    """The step whose vector is kept."""
    stopped: bool
    """Whether it ended for lack of progress, before the last step allowed."""
    max_norm: float | None
    kl_weight: float
    norm: float
    """Mean norm of activations at the site, last token of the prompts."""
    origin: Mapping[str, Any] = field(repr=False)

    @property
    def vector(self) -> SteeringVector:
        """To be added at strength 1 under the schedule it was trained with."""
        site = Site.parse(self.site)
        scales = {site: Scale(norm=self.norm)}
        return SteeringVector({site: self.raw}, Origin(**self.origin), scales=scales)

    def frame(self) -> "pd.DataFrame":
        """One row a step."""
        import pandas as pd

        return pd.DataFrame(
            {
                "step": range(len(self.loss)),
                "loss": self.loss.tolist(),
                "logprob": self.logprob.tolist(),
                "kl": self.kl.tolist(),
                "kept": [i == self.best for i in range(len(self.loss))],
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Loss and its two terms by step."""
        ax = figures.axes(ax)
        curves = {"loss": self.loss, "-log P(target)": -self.logprob}
        if self.kl_weight:
            curves[f"KL on neutral prompts (weight {self.kl_weight:g})"] = self.kl
        with figures.theme():
            for i, (name, values) in enumerate(curves.items()):
                ax.plot(range(len(values)), values.numpy(), label=name, **figures.style(i))
            ax.axvline(self.best, ls=":", color=figures.PALETTE[6], label="kept")
            ax.set(xlabel="step", ylabel="nats, mean over prompts")
            ax.set_title(f"optimised vector at {self.site}")
            ax.legend()
        return ax

    def __str__(self) -> str:
        return (
            f"optimised vector at {self.site}: norm {float(self.raw.norm()):.3g}, log P(target) "
            f"{float(self.logprob[0]):.2f} -> {float(self.logprob[self.best]):.2f} nats "
            f"at step {self.best}"
        )


def optimise_vector(
    model: HookedModel,
    prompts: Sequence[Prompt],
    targets: str | Sequence[str],
    site: str | Site,
    *,
    max_norm: float | None = None,
    kl_weight: float = 0.0,
    neutral: Sequence[Prompt] = (),
    schedule: Schedule = ALWAYS,
    steps: int = 100,
    rate: float = 0.1,
    patience: int = 10,
    tolerance: float = 0.01,
    progress: bool = True,
) -> OptimisedVector:
    """Train a vector to be added at `site` so that `prompts` are answered by `targets`.

    Minimises `-log P(target) + kl_weight * KL(unsteered‖steered)`, the first over the whole answer
    with the schedule in force, the second at the first answer token of `neutral` prompts; both are
    means over prompts, in nats. With `max_norm` (unit of the activations) the vector is brought
    back to that norm after each step. One of the two limits is needed: without it the vector grows
    until nothing of the prompt is left; under a schedule of generated tokens only `max_norm` is one,
    because the first answer token is predicted from the prompt.

    Adam from the zero vector; `rate` is the length of a first
    step as a share of `max_norm`, or of the site's mean norm. It ends when `patience` steps have
    not lowered the best loss by `tolerance` nats. Deterministic; plain transformers engine only.
    """
    engine = model.engine
    if not isinstance(engine, HookEngine):
        raise ValueError(
            f"gradients through an edit need the plain engine, this model has {engine.name!r}: "
            "load it with engine='transformers'"
        )
    place = Site.parse(site) if isinstance(site, str) else site
    (place,) = model.sites([place])
    if place.part in HEADED and place.head is None:
        raise ValueError(f"{place} has several heads: name one, for example {place}.0")
    _check(max_norm, kl_weight, neutral, schedule, steps, patience)
    answers = [targets] * len(prompts) if isinstance(targets, str) else list(targets)
    rendered = model.template.render_all(prompts, answers)
    if any(len(r.ids) == r.n_prompt for r in rendered):
        raise ValueError("a target is empty: give the text the model should answer")
    acts = capture(model, prompts, place, progress=False)
    norm = float(acts[place].double().norm(dim=-1).mean())
    origin = Origin.of(model, estimator="optimised", data_hash=acts.record.prompts_hash)
    batches = [
        (model.batch(chunk), chunk)
        for chunk in (rendered[i : i + ROWS] for i in range(0, len(rendered), ROWS))
    ]
    others = [
        (batch, engine.logits(batch, 1)[:, -1])
        for batch in (
            model.batch(model.template.render_all(neutral[i : i + ROWS]))
            for i in range(0, len(neutral), ROWS)
        )
    ]
    width = acts[place].shape[-1]
    v = torch.zeros(width, device=model.device, requires_grad=True)
    adam = torch.optim.Adam([v], lr=rate * (max_norm or norm) / width**0.5)
    edit = edit_of(place, lambda h, strength: ops.add(h, v, strength), 1.0, schedule, None)
    course: list[tuple[float, float, float]] = []
    kept, best = v.detach().clone(), 0
    with show(steps, f"optimising at {place}", progress) as advance, model.edit([edit]):
        for step in range(steps + 1):
            adam.zero_grad()
            logprob = sum(_towards(engine, batch, rows, len(rendered)) for batch, rows in batches)
            kl = sum(_aside(engine, b, base, kl_weight, len(neutral)) for b, base in others)
            course.append((kl_weight * kl - logprob, logprob, kl))
            if course[-1][0] <= course[best][0] - (tolerance if step else 0.0):
                kept, best = v.detach().clone(), step
            if step - best >= patience or step == steps:
                break
            adam.step()
            if max_norm is not None:
                with torch.no_grad():
                    v *= (max_norm / v.norm().clamp_min(1e-12)).clamp(max=1.0)
            advance(1)
    if best == 0:
        raise ValueError(
            f"no step lowered the loss by {tolerance} nats at {place}: raise rate or max_norm, lower "
            "kl_weight, or choose another site"
        )
    table = torch.tensor(course, dtype=torch.float64).T.contiguous()
    return OptimisedVector(
        raw=kept.float().cpu(),
        site=str(place),
        loss=table[0],
        logprob=table[1],
        kl=table[2],
        best=best,
        stopped=len(course) <= steps,
        max_norm=max_norm,
        kl_weight=kl_weight,
        norm=norm,
        origin=asdict(origin),
        record=Record(
            models=(model.name,),
            fingerprints=(model.fingerprint,),
            template_hash=model.template.hash,
            prompts_hash=acts.record.prompts_hash,
            dtype=acts.record.dtype,
            engine=engine.name,
            settings={
                "targets": tuple(sorted(set(answers))),
                "neutral": len(neutral),
                "schedule": asdict(schedule),
                "rate": rate,
                "patience": patience,
                "tolerance": tolerance,
            },
        ),
    )


def _towards(engine: HookEngine, batch: Batch, rows: Sequence[Rendered], n: int) -> float:
    """Add the gradient of `-log P(target) / n` of some rows; gives their share of the mean."""
    lengths = [len(r.ids) - r.n_prompt for r in rows]
    # rows end together (pads stand on the left), so answers are at the end of every row
    logits = engine.logits(batch, max(lengths) + 1, gradients=True).float().log_softmax(-1)
    total = logits.new_zeros(())
    for row, ids, length in zip(logits, batch.ids, lengths, strict=True):
        steps, answer = row[-length - 1 : -1], ids[-length:].to(row.device)
        total = total + steps.gather(1, answer[:, None]).sum()
    (-total / n).backward()
    return float(total.detach()) / n


def _aside(engine: HookEngine, batch: Batch, base: Tensor, weight: float, n: int) -> float:
    """Add the gradient of the penalty on some neutral prompts; gives their share of the KL."""
    moved = kl_divergence(base, engine.logits(batch, 1, gradients=True)[:, -1]).sum() / n
    if weight:
        (weight * moved).backward()
    return float(moved.detach())


def _check(
    max_norm: float | None,
    kl_weight: float,
    neutral: Sequence[Prompt],
    schedule: Schedule,
    steps: int,
    patience: int,
) -> None:
    if max_norm is None and not kl_weight:
        raise ValueError(
            "neither max_norm nor kl_weight was given: the vector would grow without limit; give "
            "max_norm in the unit of the activations, or kl_weight with neutral prompts"
        )
    if (max_norm is not None and not max_norm > 0) or kl_weight < 0:
        raise ValueError(f"max_norm {max_norm} and kl_weight {kl_weight}: give numbers above 0")
    if kl_weight and not neutral:
        raise ValueError("kl_weight needs `neutral` prompts, on which nothing should change")
    if kl_weight and schedule.scope == "generated":
        raise ValueError(
            f"kl_weight {kl_weight:g} with a schedule of generated tokens: the KL is read before "
            "the first of them, where such a vector changes nothing; give max_norm instead, or a "
            "schedule that acts on the prompt"
        )
    if steps < 1 or patience < 1:
        raise ValueError(f"{steps} steps with patience {patience}: give at least 1 of each")
