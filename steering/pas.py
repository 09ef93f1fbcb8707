"""Personality alignment by steering heads (PAS, arXiv 2408.11779).

A persona gives every trait a level. Statements are answered "very accurate" and "very inaccurate",
and head probes learn which answer is the persona's; the best heads are pushed along the difference
of the class means by alpha sigmas, with alpha chosen on items that are used for nothing else:

    found = align(model, {"extraversion": 5, "agreeableness": 1})
    shy = found.folded(model)  # the same as biases: nothing to install

What differs from the released code, and why. Alpha is chosen there on the answers that are then
reported; here three sets of items part. Answers A and E of one item fall there on both sides of the
split, and when a persona agrees with all items the letter alone tells the classes apart; here items
never straddle folds and every item is asked with the scale in both orders, so that letters carry
nothing. Unreadable answers are dropped there; here they count as the worst.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes import figures
from probes.model import HookedModel
from probes.results import Result
from probes.scores import Interval
from probes.splits import codes
from steering.alphas import AlphaSearch, search_alpha
from steering.applied import Steering
from steering.artefact import Origin
from steering.edits import Scale
from steering.intervals import mean_interval
from steering.iti import LAST, head_rows, rank_heads, rank_rows
from steering.offsets import HeadOffsets
from steering.questionnaire import Item, Persona, contrast_of, errors, of_persona, points, split
from steering.questionnaire import items as shipped
from steering.weights import fold_offsets

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def fit_pas(
    model: HookedModel,
    persona: Persona,
    n_heads: int = 24,
    *,
    items: Sequence[Item] | None = None,
    direction: str = "mean",
    seed: int = 0,
) -> HeadOffsets:
    """Offsets of a persona from all the items given: apply them with `unit="sigma"`.

    With one trait in the persona these are that trait's probes alone. Heads are ranked by accuracy
    on held-out items (in the released code by the mean with that on training items).
    """
    contrast, answers = contrast_of(shipped() if items is None else items, persona)
    ranking = rank_heads(
        model, contrast, answers=answers, direction=direction, permutations=0, seed=seed
    )
    return ranking.offsets(model, n_heads)


@dataclass(frozen=True)
class Alignment(Result):
    """A persona's offsets, the alpha chosen on validation items, and errors on test items.

    Errors are distances from the persona's answers, 0 to 4 points.
    """

    persona: Mapping[str, float]
    model: str
    heads: Int[Tensor, "chosen 2"]
    """(layer, head), the best reader first."""
    unit: Float[Tensor, "chosen head_dim"]
    sigma: Float[Tensor, " chosen"]
    accuracy: Float[Tensor, " chosen"]
    """Held-out accuracy of the chosen heads' probes on training items."""
    null_best: float
    """95th percentile of the best head's accuracy under shuffled labels."""
    alphas: Float[Tensor, " alpha"]
    validation: Float[Tensor, "alpha item"]
    """Errors by which alpha was chosen."""
    items: tuple[str, ...]
    """Test items, and below their traits."""
    traits: tuple[str, ...]
    plain: Float[Tensor, " test"]
    """Errors of the unsteered model on test items."""
    steered: Float[Tensor, " test"]
    null: Float[Tensor, "random test"]
    """The same with random directions at the same heads, alpha and sigmas: the first half
    isotropic, the others means of random halves of the training rows subtracted."""
    unread: tuple[int, int]
    """Test answers without a letter, of two for each item: unsteered, steered."""
    read: str

    @property
    def search(self) -> AlphaSearch:
        """The choice of alpha, with its figure."""
        return AlphaSearch(self.alphas, self.validation, "points")

    @property
    def alpha(self) -> float:
        """In sigmas, chosen on validation items."""
        return self.search.best

    @property
    def change(self) -> Interval:
        """Steered minus unsteered error on test items with its 95 % limits over items; below 0 the
        answers came closer to the persona's."""
        return Interval(*(float(t) for t in mean_interval(self.steered - self.plain)))

    @property
    def null_5(self) -> float:
        """5th percentile of the change that random directions make; NaN without any."""
        moved = (self.null - self.plain).double().mean(1)
        return float(moved.quantile(0.05)) if len(moved) else float("nan")

    @property
    def claimed(self) -> bool | None:
        """Whether the interval of the change lies below the 5th percentile of at least 20 random
        directions (and 0); None where fewer were tried."""
        if len(self.null) < 20:
            return None
        return self.change.high < min(self.null_5, 0.0)

    def offsets(self, model: HookedModel) -> HeadOffsets:
        """The offsets, to be applied to this model or a checkpoint of it with `unit="sigma"`."""
        return _offsets(model, self.heads, self.unit, self.sigma, self.record.prompts_hash)

    def folded(self, model: HookedModel) -> HookedModel:
        """A copy of the model with the persona in its biases (`steering.weights.fold_offsets`)."""
        return fold_offsets(model, self.offsets(model), self.alpha, "sigma")

    def __str__(self) -> str:
        change = self.change
        chance = "not compared with random directions"
        if len(self.null):
            few = "too few for a claim"
            claim = few if self.claimed is None else "an effect" if self.claimed else "no effect"
            chance = f"random directions 5 % {self.null_5:+.2f}: {claim}"
        levels = ", ".join(f"{trait} {level:g}" for trait, level in sorted(self.persona.items()))
        return (
            f"{levels} in {self.model}: alpha {self.alpha:g} at {len(self.heads)} heads changes the "
            f"error on {len(self.items)} test items from {float(self.plain.mean()):.2f} by "
            f"{change.value:+.2f} points [{change.low:+.2f}, {change.high:+.2f}], {chance}"
        )

    def frame(self) -> "pd.DataFrame":
        """One row a trait, and one for all: error unsteered and steered, and by chance."""
        import pandas as pd

        rows = []
        for trait in (*dict.fromkeys(self.traits), "all"):
            own = torch.tensor([trait in (t, "all") for t in self.traits])
            rows.append(
                {
                    "trait": trait,
                    "level": self.persona.get(trait, float("nan")),
                    "items": int(own.sum()),
                    "unsteered": float(self.plain[own].mean()),
                    "steered": float(self.steered[own].mean()),
                    "random": float(self.null[:, own].mean()),
                }
            )
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Error by trait: unsteered, steered, and each of the random directions."""
        ax = figures.axes(ax)
        names = list(dict.fromkeys(self.traits))
        with figures.theme():
            for i, name in enumerate(names):
                own = torch.tensor([trait == name for trait in self.traits])
                chance = self.null[:, own].mean(1).numpy()
                for series, (values, label) in enumerate(
                    ((self.plain, "unsteered"), (self.steered, f"alpha {self.alpha:g}"))
                ):
                    ax.plot(
                        [i + 0.12 * (2 * series - 1)],
                        [float(values[own].mean())],
                        ls="",
                        ms=7,
                        **figures.style(series),
                        label=label if i == 0 else None,
                    )
                ax.plot(
                    [i + 0.3] * len(chance),
                    chance,
                    ls="",
                    marker="_",
                    ms=9,
                    color=figures.PALETTE[7],
                    label="random directions" if i == 0 else None,
                )
            ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
            ax.set(ylabel="error (points, 0 to 4)", ylim=(0, 4), xlim=(-0.5, len(names) - 0.3))
            ax.set_title(f"{self.model}, {len(self.items)} test items")
            ax.legend()
        return ax


def align(
    model: HookedModel,
    persona: Persona,
    *,
    items: Sequence[Item] | None = None,
    n_heads: int = 24,
    alphas: Sequence[float] = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0),
    read: str = "text",
    permutations: int = 200,
    nulls: int = 20,
    seed: int = 0,
) -> Alignment:
    """Fit on half of the items, choose alpha on a quarter, report on the last quarter.

    Answers are read from greedy text or from the odds of the letters (`questionnaire.points`).
    `nulls` random directions are applied to the test items at the chosen alpha.
    """
    parts = split(of_persona(shipped() if items is None else items, persona), seed)
    contrast, answers = contrast_of(parts["train"], persona)
    rows, record = head_rows(model, contrast, answers=answers, progress=False)
    ranking = rank_rows(
        rows, contrast, n_layers=model.n_layers, permutations=permutations, seed=seed
    )
    chosen = torch.tensor(ranking.top(n_heads))
    unit, sigma = (t[chosen[:, 0], chosen[:, 1]] for t in (ranking.unit, ranking.sigma))

    def answered(part: str, along: Tensor, alpha: float) -> Float[Tensor, "item order"]:
        what = _offsets(model, chosen, along, sigma, record.prompts_hash)
        return points(model, parts[part], Steering(what, alpha, "sigma"), read=read)

    search = search_alpha(
        lambda alpha: errors(answered("validation", unit, alpha), parts["validation"], persona),
        alphas,
        unit="points",
    )
    test = parts["test"]
    plain, steered = (answered("test", unit, alpha) for alpha in (0.0, search.best))
    chance = [
        errors(answered("test", along, search.best), test, persona)
        for along in _random_units(rows, chosen, contrast.topics, nulls if search.best else 0, seed)
    ]
    return Alignment(
        persona=dict(persona),
        model=model.label,
        heads=chosen,
        unit=unit,
        sigma=sigma,
        accuracy=ranking.accuracy[chosen[:, 0], chosen[:, 1]],
        null_best=ranking.null_best,
        alphas=search.alphas,
        validation=search.error,
        items=tuple(item.id for item in test),
        traits=tuple(item.trait for item in test),
        plain=errors(plain, test, persona),
        steered=errors(steered, test, persona),
        null=torch.stack(chance) if chance else torch.empty(0, len(test)),
        unread=(int(plain.isnan().sum()), int(steered.isnan().sum())),
        read=read,
        record=replace(record, seeds=(seed,)),
    )


def _offsets(
    model: HookedModel, heads: Tensor, unit: Tensor, sigma: Tensor, data_hash: str
) -> HeadOffsets:
    pairs = [(int(layer), int(head)) for layer, head in heads]
    origin = Origin.of(model, estimator="PAS mean", data_hash=data_hash, positions=LAST)
    return HeadOffsets(
        dict(zip(pairs, unit, strict=True)),
        origin,
        {pair: Scale(sigma=float(s)) for pair, s in zip(pairs, sigma, strict=True)},
    )


def _random_units(
    rows: Mapping[int, Float[Tensor, "example head head_dim"]],
    heads: Int[Tensor, "chosen 2"],
    topics: Sequence[str],
    n: int,
    seed: int,
) -> Iterator[Float[Tensor, "chosen head_dim"]]:
    """Unit directions for the chosen heads that know nothing of the persona; half are differences
    of means between random halves of the topics, so that both halves hold the persona alike; the
    same halves at all heads."""
    numbers, known = codes(topics)
    generator = torch.Generator().manual_seed(seed)
    own = torch.stack([rows[int(layer)][:, int(head)] for layer, head in heads]).double().cpu()
    for i in range(n):
        if i < (n + 1) // 2:
            raw = torch.randn(own.shape[0], own.shape[2], generator=generator, dtype=own.dtype)
        else:
            half = (torch.randperm(len(known), generator=generator) < len(known) // 2)[numbers]
            raw = own[:, half].mean(1) - own[:, ~half].mean(1)
        yield (raw / raw.norm(dim=1, keepdim=True)).float()
