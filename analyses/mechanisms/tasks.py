"""Tasks by name, made for a model's own tokenizer, and how well a model does them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.mechanisms.boxes import boxes
from analyses.mechanisms.greater_than import greater_than
from analyses.mechanisms.indirect_objects import indirect_object
from analyses.mechanisms.task import Task
from analyses.patching.metrics import RefusalLogOdds, measured
from probes import datasets, figures
from probes.model import HookedModel
from probes.prompts import prompts_hash
from probes.results import Record, Result
from probes.scores import wilson
from steering.refusal_task import evenly

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MEASURES = ("favoured", "beats", "top")
"""What `accuracy` counts, in its order."""


def refusal_task(model: HookedModel, part: str = "test", n: int | None = None) -> Task:
    """Harmful requests, each with its harmless twin as the counterfactual.

    Only twins whose rendered prompts have equally many tokens, spread over the hazard classes; n
    is None for all of them. The metric is the log-odds that the answer opens with "I", and
    `answers` is that token. `others` is the token that `model` itself would open its answer to the
    twin with, the likeliest one that opens no refusal: what it says when it does what is asked.
    Make the task once, with the checkpoint that refuses, and put it to all checkpoints compared.
    """
    if not model.template.chat:
        raise ValueError(
            f"the task 'refusal' is a chat and {model.name} was loaded without a chat template: "
            "load it with its own, or with that of a related model"
        )
    render = model.template.render
    twins = [
        t
        for t in datasets.twins(part)
        if len(render(t["harmful"]).ids) == len(render(t["harmless"]).ids)
    ]
    if not twins or (n is not None and n > len(twins)):
        raise ValueError(
            f"{'some' if n is None else n} twins of the part {part} were asked and {len(twins)} "
            f"have prompts of equal length under the tokenizer of {model.name}: ask for "
            f"{'another part' if not twins else f'at most {len(twins)}'}"
        )
    rows = evenly(twins, n)
    metric = RefusalLogOdds.of(model)
    logits = model.logits([t["harmless"] for t in rows])
    logits[:, list(metric.tokens)] = -torch.inf
    return Task(
        name="refusal",
        prompts=tuple(t["harmful"] for t in rows),
        counterfactuals=tuple(t["harmless"] for t in rows),
        changed="the hazard: the harmless twin shares form and wording",
        answers=(metric.tokens[0],) * len(rows),
        others=tuple(logits.argmax(-1).tolist()),
        topics=tuple(t["topic"] for t in rows),
        metric=metric,
        chat=True,
        places={"last": tuple((len(render(t["harmful"]).ids) - 1,) for t in rows)},
    )


TASKS: dict[str, Callable[[HookedModel, str, int], Task]] = {
    "refusal": refusal_task,
    "boxes": boxes,
    "indirect-object": indirect_object,
    "greater-than": greater_than,
}
"""Name -> function of (model, part, n); part is "train", "validation" or "test". Options beyond
these three are those of the functions themselves. All but refusal are plain text: load the model
with template="none"."""


@dataclass(frozen=True)
class TaskAccuracy(Result):
    """How often a model does a task, with Wilson intervals over prompts."""

    task: str
    model: str
    hits: Bool[Tensor, "measure prompt"]
    """Rows `MEASURES`: the metric is above 0; the answer is likelier than the other; the answer (or
    one of the right ones) is likeliest of the whole vocabulary."""
    shares: Float[Tensor, "measure limit"]
    """Share, lower and upper limit of the 95 % Wilson interval, 0 to 1."""
    chance: tuple[float, ...]
    """Of each measure: 1/2 where two things are compared, one over the vocabulary for the last."""

    def frame(self) -> "pd.DataFrame":
        """One row a measure."""
        import pandas as pd

        return pd.DataFrame(
            {
                "measure": MEASURES,
                "share": self.shares[:, 0].tolist(),
                "low": self.shares[:, 1].tolist(),
                "high": self.shares[:, 2].tolist(),
                "chance": self.chance,
                "prompts": self.hits.shape[1],
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Shares with their intervals, chance beside them."""
        with figures.theme():
            ax = figures.axes(ax)
            names = ("metric above 0", "answer beats the other", "answer is likeliest")
            for i, (value, low, high) in enumerate(self.shares.tolist()):
                error = [[value - low], [high - value]]
                ax.errorbar([i], [value], error, capsize=3, ls="", **figures.style(i))
                ax.hlines(self.chance[i], i - 0.3, i + 0.3, color="0.4", ls=":")
            ax.hlines([], 0, 0, color="0.4", ls=":", label="chance")
            ax.set(
                xticks=range(3),
                xticklabels=names,
                xlim=(-0.5, 2.5),
                ylim=(-0.03, 1.03),
                ylabel="share of prompts",
                title=f"{self.task}, {self.model}",
            )
            ax.legend()
        return ax

    def __str__(self) -> str:
        said = [
            f"{m} {s[0]:.2f} [{s[1]:.2f}, {s[2]:.2f}]"
            for m, s in zip(MEASURES, self.shares.tolist(), strict=True)
        ]
        return f"{self.task}, {self.model}, {self.hits.shape[1]} prompts: " + ", ".join(said)


def accuracy(model: HookedModel, task: Task) -> TaskAccuracy:
    """How often the model does what the task asks for, on the task's own prompts."""
    clean, _ = task.rendered(model)
    logits = model.logits(task.prompts)
    values = measured(task.metric, logits, [r.text for r in clean])
    answers, others = torch.tensor(task.answers)[:, None], torch.tensor(task.others)[:, None]
    beats = (logits.gather(1, answers) > logits.gather(1, others))[:, 0]
    top = logits.argmax(-1).tolist()
    right = [
        t in (a if isinstance(a, tuple) else (a,))
        for t, a in zip(top, getattr(task.metric, "answers", task.answers), strict=True)
    ]
    hits = torch.stack([values > 0, beats, torch.tensor(right)])
    n = len(task)
    shares = []
    for row in hits:
        found = wilson(int(row.sum()), n)
        shares.append([float(row.double().mean()), found.low, found.high])
    return TaskAccuracy(
        task=task.name,
        model=model.label,
        hits=hits,
        shares=torch.tensor(shares),
        chance=(0.5, 0.5, 1 / logits.shape[1]),
        record=Record(
            models=(model.name,),
            fingerprints=(model.fingerprint,),
            template_hash=model.template.hash,
            prompts_hash=prompts_hash(clean),
            dtype=str(model.dtype).removeprefix("torch."),
            engine=model.engine.name,
            settings={"task": task.name},
        ),
    )
