"""The logit lens: which next token the stream already says, layer by layer.

The state that leaves each block is read by the model's own final norm and unembedding
(nostalgebraist 2020). Before them a tuned lens may put an affine map for each layer (Belrose et al.
2023, https://arxiv.org/abs/2303.08112).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.mechanisms import reading
from analyses.mechanisms.task import Task
from analyses.patching import metrics
from analyses.subspaces.activations_figure import whole_layers
from probes import figures
from probes.model import HookedModel
from probes.results import Result, check_finite
from probes.sites import Site
from probes.unembed import unembedding

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Translators = Mapping[int, tuple[Tensor, Tensor]]
"""Layer -> (A, b): the state h that leaves the layer is read as A h + b."""

MEASURES = ("probability", "log rank", "logit difference", "divergence", "metric")
"""Rows of a lens, in its order; the last is the task's own metric."""
_LABELS = (
    "probability of the answer",
    "log10 rank of the answer",
    "logit(answer) - logit(other)",
    "KL from the final distribution (nats)",
)


@dataclass(frozen=True)
class LogitLens(Result):
    """What each layer's stream says about a task's answers, at one place of the prompts."""

    model: str
    task: str
    position: str
    metric: str
    unit: str
    tuned: bool
    """Whether translators stood before the final norm."""
    values: Float[Tensor, "measure layer prompt"]
    """Rows `MEASURES`: probability of the answer, 0 to 1; log10 of its rank, 0 for the likeliest
    token; logit(answer) - logit(other); KL(final || layer) in nats, 0 at the last layer; the task's
    metric. Row l of the layers is what leaves block l."""
    mean: Float[Tensor, "measure layer limit"]
    """Mean over prompts, lower and upper limit of its 95 % BCa interval over topics."""
    counterfactual: Float[Tensor, "measure layer limit"]
    """The same on the counterfactual prompts, with the answers of the prompts: what there is
    without the cause that the task varies."""
    effect: Float[Tensor, "measure layer limit"]
    """Mean of prompt minus its counterfactual, paired, with its interval: what the cause adds."""
    top: tuple[tuple[str, ...], ...]
    """Tokens of the largest mean probability over prompts, by layer, the likeliest first."""
    topics: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def layers(self) -> int:
        return self.values.shape[1]

    def first(self, measure: str = "logit difference") -> int | None:
        """The first layer from which on the interval of `effect` lies above 0 at every layer; None
        if it does not at the last. (For "log rank" and "divergence" less is more: look at them.)"""
        over = self.effect[row_of(measure), :, 1] > 0
        held = over.long().flip(0).cumprod(0).flip(0).nonzero().flatten()
        return int(held[0]) if len(held) else None

    def frame(self) -> "pd.DataFrame":
        """One row a layer."""
        import pandas as pd

        columns: dict[str, list] = {"layer": list(range(self.layers))}
        rows = zip(MEASURES, self.mean, self.counterfactual, self.effect, strict=True)
        for name, mean, other, effect in rows:
            for end, column in zip(("", " low", " high"), mean.T, strict=True):
                columns[name + end] = column.tolist()
            columns[f"{name} counterfactual"] = other[:, 0].tolist()
            for end, column in zip(("", " low", " high"), effect.T, strict=True):
                columns[f"{name} effect{end}"] = column.tolist()
        columns["top"] = [" ".join(map(repr, tokens)) for tokens in self.top]
        return pd.DataFrame(columns)

    def plot(self, ax: "Axes | None" = None, measure: str = "logit difference") -> "Axes":
        """One measure by layer, prompts beside counterfactuals, with 95 % intervals."""
        ax = figures.axes(ax, 5.2, 3.8)
        with figures.theme():
            for i, (values, said) in enumerate(
                ((self.mean, "prompts"), (self.counterfactual, "counterfactuals"))
            ):
                band(ax, values[row_of(measure)], said, i)
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel=label_of(measure, self.metric, self.unit),
                title=broken(f"{self.task}: what the stream of {self.model} says"),
            )
            whole_layers(ax)
            legend_below(ax, f"token: {self.position}, 95 % interval over topics")
        return ax

    def __str__(self) -> str:
        turn, p = self.first(), self.mean[0, -1, 0]
        if not bool(self.effect.any()):
            said = "prompts and counterfactuals are exactly alike"
        elif turn is None:
            said = "the answer gains nothing over the counterfactuals at the last layer"
        else:
            said = f"the answer gains over the counterfactuals from layer {turn} on"
        return (
            f"{'tuned' if self.tuned else 'logit'} lens of {self.model} on {self.task}, "
            f"{self.values.shape[2]} prompts: {said}; probability at the end {float(p):.2f}"
        )


def logit_lens(
    model: HookedModel,
    task: Task,
    *,
    position: str = "last",
    translators: "Translators | Path | str | None" = None,
    top: int = 5,
    resamples: int = 2000,
    seed: int = 0,
) -> LogitLens:
    """Read the stream behind every block as logits, at one token of every prompt.

    `position` is "last" or a place of the task, whose last token is read. `translators` is a
    mapping layer -> (A `[d_model, d_model]`, b `[d_model]`), or a safetensors file with tensors
    `"3.weight"` and `"3.bias"` for layer 3, and the state h is read as A h + b; layers without one
    are read as they are. (The published tuned lenses store A - 1: add the identity.) At the last
    token the last layer gives the model's own logits, to rounding.
    """
    clean, changed = task.rendered(model)
    maps = _translators(translators, model)
    values, names = _values(model, task, clean, position, maps, top)
    other, _ = _values(model, task, changed, position, maps, 0)
    name, unit = metrics.named(task.metric)

    def limits(rows: Tensor) -> Tensor:
        found = metrics.mean_interval(rows, task.topics, resamples=resamples, seed=seed)
        return torch.stack(list(found), -1).float()

    return LogitLens(
        model=model.label,
        task=task.name,
        position=position,
        metric=name,
        unit=unit,
        tuned=bool(maps),
        values=values.float(),
        mean=limits(values),
        counterfactual=limits(other),
        effect=limits(values - other),
        top=names,
        topics=task.topics,
        notes=reading.few(task),
        record=reading.described(
            [model], clean, {"task": task.name, "position": position, "seed": seed}
        ),
    )


def _values(
    model: HookedModel,
    task: Task,
    rendered: Sequence,
    position: str,
    maps: Translators,
    top: int,
) -> tuple[Float[Tensor, "measure layer prompt"], tuple[tuple[str, ...], ...]]:
    """All measures of every layer, float64, one layer's logits held at a time."""
    read = unembedding(model)
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    seen = reading.states(model, rendered, sites, reading.columns(task, rendered, position))
    answers, others = torch.tensor(task.answers)[:, None], torch.tensor(task.others)[:, None]
    texts = [r.text for r in rendered]
    final = read(seen[sites[-1]]).double().cpu().log_softmax(-1)
    rows, names = [], []
    for site in sites:
        h = seen[site]
        if site.layer in maps:
            A, b = maps[site.layer]
            h = (h.double() @ A.double().T + b.double()).float()
        logits = read(h).double().cpu()
        log_p = logits.log_softmax(-1)
        mine = logits.gather(1, answers)
        rank = (logits > mine).sum(-1) + 1
        rows.append(
            torch.stack(
                [
                    log_p.gather(1, answers)[:, 0].exp(),
                    rank.double().log10(),
                    (mine - logits.gather(1, others))[:, 0],
                    (final.exp() * (final - log_p)).sum(-1).clamp(min=0),
                    metrics.measured(task.metric, logits, texts),
                ]
            )
        )
        best = log_p.exp().mean(0).topk(top).indices.tolist()
        names.append(tuple(model.tokenizer.decode([t]) for t in best))
    return torch.stack(rows, 1), tuple(names)


def _translators(given: "Translators | Path | str | None", model: HookedModel) -> Translators:
    if given is None:
        return {}
    maps = dict(given) if isinstance(given, Mapping) else _read(Path(given))
    d = model.d_model
    for layer, (A, b) in maps.items():
        if not 0 <= layer < model.n_layers or A.shape != (d, d) or b.shape != (d,):
            raise ValueError(
                f"the translator of layer {layer} has shapes {tuple(A.shape)} and "
                f"{tuple(b.shape)}: {model.name} needs ({d}, {d}) and ({d},) for layers 0 to "
                f"{model.n_layers - 1}"
            )
        check_finite(A, f"the translator of layer {layer}")
        check_finite(b, f"the translator of layer {layer}")
    return maps


def _read(path: Path) -> Translators:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a safetensors file of translators")
    try:
        tensors = load_file(path)
        layers = sorted({int(name.partition(".")[0]) for name in tensors})
        return {n: (tensors[f"{n}.weight"], tensors[f"{n}.bias"]) for n in layers}
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} holds no translators: it needs tensors named '3.weight' and '3.bias' for "
            f"layer 3 and so on ({error})"
        ) from error


def row_of(measure: str) -> int:
    """Row of a measure in `LogitLens.values`."""
    if measure not in MEASURES:
        raise ValueError(f"measure {measure!r}: choose one of {', '.join(MEASURES)}")
    return MEASURES.index(measure)


def label_of(measure: str, metric: str, unit: str) -> str:
    """What an axis of this measure is called."""
    row = row_of(measure)
    return _LABELS[row] if row < len(_LABELS) else metric + (f" ({unit})" if unit else "")


def band(ax: "Axes", values: Tensor, label: str, i: int) -> None:
    """A curve over layers with its interval."""
    x = range(len(values))
    value, low, high = values.unbind(-1)
    look = figures.style(i)
    ax.fill_between(x, low.numpy(), high.numpy(), alpha=0.15, lw=0, color=look["color"])
    ax.plot(x, value.numpy(), label=label, markevery=3, **look)
