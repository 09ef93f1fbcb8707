"""What the difference lens makes a model write: the difference is added, ever more of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import legend_below
from analyses.subspaces.difference_lens import DifferenceLens
from analyses.subspaces.difference_reading import REFUSAL_WORDS
from probes import figures
from probes.model import HookedModel
from probes.prompts import Prompt, prompts_hash
from probes.refusals import refuses
from probes.results import Record, Result
from probes.scores import Interval, permutation_p, wilson
from probes.sites import Site
from steering.applied import Steering
from steering.artefact import Origin
from steering.vector import SteeringVector

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

STRENGTHS = (0.0, 1.0, 4.0, 16.0)
"""Multiples of the mean difference; 0 is the model as it is."""


@dataclass(frozen=True)
class SteeredByDifference(Result):
    """Greedy answers with the mean difference added at one layer to every token."""

    model: str
    """Who answered."""
    difference: str
    layer: int
    strengths: tuple[float, ...]
    norms: tuple[float, ...]
    """Length of what was added at each strength, in the unit of the activations."""
    prompts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    """`answers[strength][prompt]`."""
    words: tuple[str, ...]
    hits: tuple[int, ...]
    """Answers at each strength that open with a refusal or hold one of the words."""
    null: tuple[tuple[int, ...], ...]
    """`null[strength][draw]`: the same of random directions of equal norm, half of them isotropic,
    half differences between the means of random halves of the lens's texts; at strength 0 no
    direction is added and all equal `hits`."""

    def rate(self, strength: float) -> Interval:
        """Share of answers counted, with its 95 % Wilson interval."""
        return wilson(self.hits[self.strengths.index(strength)], len(self.prompts))

    def p(self, strength: float) -> float:
        """Exact one-sided p of the count among those of the random directions."""
        i = self.strengths.index(strength)
        return permutation_p(float(self.hits[i]), torch.tensor(self.null[i]))

    def frame(self) -> "pd.DataFrame":
        """One row per strength, with the answer to the first prompt."""
        import pandas as pd

        rows = []
        for i, strength in enumerate(self.strengths):
            rate, null = self.rate(strength), torch.tensor(self.null[i]).double()
            rows.append(
                {
                    "model": self.model,
                    "difference": self.difference,
                    "layer": self.layer,
                    "strength": strength,
                    "norm": self.norms[i],
                    "hits": self.hits[i],
                    "asked": len(self.prompts),
                    "rate": rate.value,
                    "low": rate.low,
                    "high": rate.high,
                    "null_mean": float(null.mean()) / len(self.prompts),
                    "null_high": float(null.quantile(0.95)) / len(self.prompts),
                    "p": self.p(strength),
                    "first_answer": self.answers[i][0],
                }
            )
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Share of answers counted by strength, beside random directions of equal norm."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        rates = [self.rate(strength) for strength in self.strengths]
        x = range(len(self.strengths))
        n = len(self.prompts)
        with figures.theme():
            ax.errorbar(
                x, [r.value for r in rates],
                yerr=[[r.value - r.low for r in rates], [r.high - r.value for r in rates]],
                capsize=3, label=f"difference (n = {n})", **figures.style(0),
            )  # fmt: skip
            null = torch.tensor(self.null).double() / n
            ax.plot(
                x, null.mean(1).numpy(), ls="--", lw=1, label="random directions, mean",
                **figures.style(7),
            )  # fmt: skip
            ax.plot(
                x, null.quantile(0.95, dim=1).numpy(), ls=":", color=figures.PALETTE[6],
                label=f"{null.shape[1]} random directions, 95 %",
            )  # fmt: skip
            ax.set_xticks(list(x), [f"{strength:g}" for strength in self.strengths])
            ax.set(
                ylim=(-0.03, 1.03),
                xlabel=f"multiples of the mean difference at layer {self.layer}",
                ylabel="share of answers that refuse\nor hold a word of the list",
                title=f"{self.model} with {self.difference} added",
            )
            legend_below(ax, "95 % Wilson interval")
        return ax

    def __str__(self) -> str:
        said = [
            f"{strength:g}: {self.rate(strength).value:.0%} (p = {self.p(strength):.2f})"
            for strength in self.strengths
        ]
        return (
            f"{self.model} steered by {self.difference} at layer {self.layer}, answers counted at "
            f"strength {', '.join(said)}"
        )


def steer_by_difference(
    model: HookedModel,
    lens: DifferenceLens,
    prompts: Sequence[Prompt],
    *,
    layer: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    words: Sequence[str] = REFUSAL_WORDS,
    max_new_tokens: int = 16,
    draws: int = 20,
    seed: int = 0,
) -> SteeredByDifference:
    """Generate from neutral prompts with the lens's difference added at one layer.

    Added is the mean over positions from the second on (the first token of any text is a sink of
    great norm, and its difference is no direction of content). `layer` is that of the lens nearest
    to two thirds of the depth. Half of the `draws` are directions in which texts differ, of which
    the lens keeps half as many as it drew itself.
    """
    if not prompts or not strengths:
        raise ValueError(
            f"{len(prompts)} prompts and {len(strengths)} strengths were given: give at least one "
            "of each"
        )
    if not 20 <= draws <= 2 * len(lens.apart) + 1:
        raise ValueError(
            f"{draws} random directions were asked: a null needs at least 20, and a lens with "
            f"{len(lens.null)} draws has at most {2 * len(lens.apart) + 1}, so measure it with as "
            "many draws"
        )
    wanted = 2 * model.n_layers // 3 if layer is None else layer
    layer = min(lens.layers, key=lambda known: abs(known - wanted)) if layer is None else layer
    if layer not in lens.layers:
        raise ValueError(f"layer {layer} was not measured: choose one of {lens.layers}")
    if lens.difference.shape[2] != model.d_model:
        raise ValueError(
            f"the difference has width {lens.difference.shape[2]}, {model.name} has "
            f"{model.d_model}: steer a checkpoint of the same model"
        )
    at = lens.layers.index(layer)
    vector = _content(lens.difference[at].double())
    if not bool(vector.any()):
        raise ValueError(
            f"the difference at layer {layer} is exactly zero: choose a layer where "
            f"{lens.model} and {lens.reference} differ"
        )
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(draws, len(vector), generator=generator, dtype=torch.float64)
    between = _content(lens.apart[: draws // 2, at].double())
    varied = between.any(1)  # not where the texts are one
    random[: draws // 2][varied] = between[varied]
    random = random / random.norm(dim=1, keepdim=True) * vector.norm()
    known = {word.lower() for word in words}
    asked = list(prompts)

    def answered(direction: Tensor, strength: float) -> list[str]:
        origin = Origin.of(model, estimator=f"difference {lens.model} - {lens.reference}")
        made = SteeringVector({Site(layer, "resid_post"): direction.float()}, origin)
        return model.generate(asked, max_new_tokens, steer=Steering(made, strength))

    answers, hits, null = [], [], []
    for strength in strengths:
        said = answered(vector, strength)
        answers.append(tuple(said))
        hits.append(_count(said, known))
        if strength == 0:
            null.append((hits[-1],) * draws)
        else:
            null.append(tuple(_count(answered(r, strength), known) for r in random))
    return SteeredByDifference(
        model=model.label,
        difference=f"{lens.model} - {lens.reference}",
        layer=layer,
        strengths=tuple(map(float, strengths)),
        norms=tuple(abs(s) * float(vector.norm()) for s in strengths),
        prompts=tuple(p if isinstance(p, str) else str(p[-1]["content"]) for p in prompts),
        answers=tuple(answers),
        words=tuple(words),
        hits=tuple(hits),
        null=tuple(null),
        record=Record(
            models=(model.name, *lens.record.models),
            fingerprints=(model.fingerprint, *lens.record.fingerprints),
            template_hash=model.template.hash,
            prompts_hash=prompts_hash(model.template.render_all(asked)),
            seeds=(seed,),
            dtype=str(model.dtype).removeprefix("torch."),
            engine=model.engine.name,
            settings={
                "layer": layer,
                "max_new_tokens": max_new_tokens,
                "draws": draws,
                "lens": {"prompts_hash": lens.record.prompts_hash, "seeds": lens.record.seeds},
            },
        ),
    )


def _content(states: Float[Tensor, "*row position d_model"]) -> Float[Tensor, "*row d_model"]:
    """Mean over positions without the first, where there is another."""
    return states[..., 1:, :].mean(-2) if states.shape[-2] > 1 else states[..., 0, :]


def _count(answers: Sequence[str], words: set[str]) -> int:
    return sum(
        refuses(a) or not words.isdisjoint(w.strip(".,:;!?\"'()").lower() for w in a.split())
        for a in answers
    )
