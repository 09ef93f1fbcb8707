"""Direct logit attribution: which heads and MLPs write the answer into the stream.

The stream is the embedding plus what every block adds, and behind it the final norm, its scale held
at the value of the run, and the head are linear. So logit(answer) - logit(other) is a sum of one
number for the embedding, each attention (itself a sum over heads) and each MLP (Elhage et al. 2021;
Wang et al. 2023, https://arxiv.org/abs/2211.00593). What a term does by way of later blocks is not
in its number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.mechanisms import reading
from analyses.mechanisms.direct_figure import draw_both, draw_heads, draw_layers
from analyses.mechanisms.direct_terms import Stream, isotropic, vector_of
from analyses.mechanisms.frozen import LINEAR, FrozenHead, frozen_head
from analyses.mechanisms.lens_difference import signed
from analyses.mechanisms.task import Task
from analyses.patching.metrics import mean_interval
from probes.directions import Direction
from probes.model import HookedModel
from probes.prompts import Prompt
from probes.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWS = 20
"""Random directions of a null."""
SIGNS = 500
"""Random signs of a null, which cost nothing."""


@dataclass(frozen=True)
class DirectAttribution(Result):
    """What each term of the stream adds to a difference of logits, or to a coordinate."""

    model: str
    other: str | None
    """The checkpoint whose numbers are subtracted; None: one model alone."""
    task: str
    target: str
    """What the terms add up to, in words."""
    contrast: bool
    """Whether the counterfactual prompts' numbers were subtracted."""
    embedding: Float[Tensor, " prompt"]
    """What enters the first block; in logits, or in the unit of activations for a direction."""
    attention: Float[Tensor, "layer prompt"]
    mlp: Float[Tensor, "layer prompt"]
    remainder: Float[Tensor, "layer prompt"]
    """What a block adds besides; exactly 0 in most architectures."""
    heads: Float[Tensor, "layer head prompt"]
    """Shares of `attention`; NaN where there is no such head."""
    bias: Float[Tensor, "layer prompt"]
    """Share of `attention` that comes from biases of its output; NaN without heads."""
    constant: Float[Tensor, " prompt"]
    """What biases of the final norm and of the head add."""
    total: Float[Tensor, " prompt"]
    """The same number from the model's own pass: what the terms add up to."""
    layer_means: Float[Tensor, "kind layer limit"]
    """Mean over prompts with its 95 % BCa interval over topics, of attention, MLP and remainder."""
    head_means: Float[Tensor, "layer head limit"]
    layer_null: Float[Tensor, "draw kind layer"]
    """The same means for random directions of equal norm, or, where something is subtracted, for
    differences with a random sign for each topic."""
    head_null: Float[Tensor, "draw layer head"]
    topics: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """Largest distance of a prompt's sum of terms from its total, relative to the sizes of what
        is summed."""
        parts = torch.cat(
            [
                self.embedding[None],
                self.attention,
                self.mlp,
                self.remainder,
                self.constant[None],
            ]
        ).double()
        off = (parts.sum(0) - self.total.double()).abs()
        return float((off / parts.abs().sum(0).clamp_min(1e-30)).max())

    @property
    def identical(self) -> bool:
        """Whether nothing differs between what was subtracted."""
        subtracted = self.other is not None or self.contrast
        return subtracted and not bool(self.layer_means[..., 0].any())

    def strongest(self, n: int = 10) -> "pd.DataFrame":
        """The terms that add most, either way, heads beside MLPs; `claimed` where the interval lies
        beyond the 95th percentile of the null's size, each term by itself: no correction is made for
        how many there are."""
        found = self.frame()
        rows = found.to_dict("records")
        whole = {row["layer"] for row in rows if row["kind"] == "head"}  # shown by its heads
        shown = [
            i
            for i, row in enumerate(rows)
            if row["kind"] != "attention" or row["layer"] not in whole
        ]
        order = sorted(shown, key=lambda i: -abs(rows[i]["mean"]))[:n]
        return found.loc[order].reset_index(drop=True)

    def frame(self) -> "pd.DataFrame":
        """One row a term: attention, MLP and remainder of each layer, and each head."""
        import pandas as pd

        rows = []

        def add(kind: str, layer: int, head: int | None, mean: Tensor, null: Tensor) -> None:
            value, low, high = mean.tolist()
            bound = float(null.abs().double().quantile(0.95)) if len(null) else float("nan")
            rows.append(
                {
                    "kind": kind,
                    "layer": layer,
                    "head": head,
                    "term": kind + f" {layer}" if head is None else f"head {layer}.{head}",
                    "mean": value,
                    "low": low,
                    "high": high,
                    "null_95": bound,
                    "claimed": low > bound or high < -bound,
                }
            )

        for layer in range(self.layer_means.shape[1]):
            for k, kind in enumerate(("attention", "MLP", "remainder")):
                if kind == "remainder" and not bool(self.remainder.any()):
                    continue
                add(kind, layer, None, self.layer_means[k, layer], self.layer_null[:, k, layer])
            for head in range(self.head_means.shape[1]):
                if bool(self.head_means[layer, head, 0].isfinite()):
                    mean, null = self.head_means[layer, head], self.head_null[:, layer, head]
                    add("head", layer, head, mean, null)
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Heads as a heat map, terms that are claimed marked."""
        return draw_heads(self, ax)

    def plot_layers(self, ax: "Axes | None" = None) -> "Axes":
        """Attention and MLP of each layer as bars with their intervals and null."""
        return draw_layers(self, ax)

    def figure(self) -> "Figure":
        """Both side by side on one axis of layers."""
        return draw_both(self)

    @property
    def said(self) -> str:
        """Whose numbers these are, in words."""
        who = self.model if self.other is None else f"{self.model} minus {self.other}"
        return who + (", prompts minus counterfactuals" if self.contrast else "")

    @property
    def unit(self) -> str:
        return "logits" if self.target.startswith("logit(") else "activation"

    def __str__(self) -> str:
        if self.identical:
            return f"{self.said}: every term is exactly equal, there is nothing to attribute"
        first = self.strongest(3)
        terms = ", ".join(
            f"{t} {m:+.2f}" for t, m in zip(first["term"], first["mean"], strict=True)
        )
        return (
            f"{self.target} of {self.said} is {float(self.total.mean()):+.2f} on "
            f"average; the largest terms are {terms}"
        )


def direct_attribution(
    model: HookedModel,
    task: Task,
    target: "str | Direction | Float[Tensor, ' d_model']" = "answers",
    *,
    other: HookedModel | None = None,
    contrast: bool = False,
    layer: int | None = None,
    position: str = "last",
    draws: int = DRAWS,
    resamples: int = 2000,
    seed: int = 0,
) -> DirectAttribution:
    """Split what the model says at one token into what each head and each MLP wrote.

    With `target="answers"` the terms add up to logit(answer) - logit(other), each prompt's final
    norm held at its own scale and its centring shared out to the terms; logits are those before a
    soft cap, where there is one, and behind a constant factor. With a direction they add up to the
    stream's coordinate along it behind block `layer` (the last), without any norm. A head's share
    passes its layer's post-norm, where there is one, at the scale of the run.

    With `other` the numbers are those of `model` minus those of the other checkpoint on the same
    prompts, each with its own head; with `contrast` those of the counterfactual prompts are
    subtracted. Each run has its own scale of the final norm, so layers whose writes are the same
    in both differ a little where the norms of the streams do. The null of such a difference gives
    each topic a random sign. For one model alone it is
    `draws` isotropic directions as long as the target's, for which large terms come from large
    writes alone.
    """
    if position != "last" and isinstance(target, str):
        raise ValueError(
            f"position {position!r}: the answers are said at the last token; give a direction to "
            "look elsewhere"
        )
    if isinstance(target, str) and (target != "answers" or layer is not None):
        raise ValueError(
            f"target={target!r}, layer={layer}: give 'answers' without a layer, or a direction"
        )
    if draws < 1:
        raise ValueError(f"{draws} draws are no null: give 1 or more, 20 for a percentile")
    models = [model] if other is None else [model, other]
    if other is not None:
        reading.same_vocabulary(model, other)
    clean, changed = task.rendered(model)
    vector = None if isinstance(target, str) else vector_of(target, model)[None]
    at = model.n_layers - 1 if layer is None else range(model.n_layers)[layer]
    subtracted = other is not None or contrast

    runs = [(m, rows) for m in models for rows in ((clean, changed) if contrast else (clean,))]
    signs = [1.0, -1.0, -1.0, 1.0] if len(runs) == 4 else [1.0, -1.0]
    sums: dict[str, Tensor] = {}
    for sign, (m, rows) in zip(signs, runs, strict=False):
        prompts = task.prompts if rows is clean else task.counterfactuals
        stream = Stream(m, rows, reading.columns(task, rows, position), at)
        if vector is None:
            head = frozen_head(m, stream.state, task.answers, task.others)
            v, constant = head.direction, head.constant
            total = _said(m, prompts, task, head)
        else:
            v, constant = vector.expand(len(rows), -1), torch.zeros(len(rows), dtype=torch.float64)
            total = (stream.state.double() * v).sum(-1)
        vectors = v[None] if subtracted else torch.cat([v[None], isotropic(v, draws, seed)])
        terms = stream.products(vectors)._asdict()
        for name, value in (terms | {"constant": constant[None], "total": total[None]}).items():
            sums[name] = sums.get(name, 0) + sign * value
    own = {name: value[0] for name, value in sums.items()}
    kinds = torch.stack([own["attention"], own["mlp"], own["remainder"]])
    if subtracted:
        layer_null = signed(kinds, task.topics, SIGNS, seed)
        head_null = signed(own["heads"], task.topics, SIGNS, seed)
    else:
        null = [sums[name][1:].mean(-1) for name in ("attention", "mlp", "remainder")]
        layer_null, head_null = torch.stack(null, 1), sums["heads"][1:].mean(-1)

    def limits(values: Tensor) -> Tensor:
        found = mean_interval(values, task.topics, resamples=resamples, seed=seed)
        return torch.stack(list(found), -1).float()

    said = "logit(answer) - logit(other)" if vector is None else f"coordinate behind block {at}"
    return DirectAttribution(
        model=model.label,
        other=None if other is None else other.label,
        task=task.name,
        target=said,
        contrast=contrast,
        layer_means=limits(kinds),
        head_means=limits(own["heads"]),
        layer_null=layer_null.float(),
        head_null=head_null.float(),
        topics=task.topics,
        notes=reading.few(task),
        record=reading.described(
            models,
            [*clean, *changed] if contrast else clean,
            {"task": task.name, "target": said, "position": position, "seed": seed},
        ),
        **{name: value.float() for name, value in own.items()},
    )


def _said(model: HookedModel, prompts: Sequence[Prompt], task: Task, head: FrozenHead) -> Tensor:
    """Logit(answer) - logit(other) of the model's own pass, a soft cap undone."""
    logits = model.logits(prompts).double()
    both = [
        logits.gather(1, torch.tensor(ids)[:, None])[:, 0] for ids in (task.answers, task.others)
    ]
    if head.form not in LINEAR:
        both = [torch.atanh(t / head.number) * head.number for t in both]
    return both[0] - both[1]
