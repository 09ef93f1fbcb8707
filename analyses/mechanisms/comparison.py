"""One circuit in several checkpoints: does it work there, unchanged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken, legend_below, name_ticks
from analyses.mechanisms.ablation import Ablation, Kept
from analyses.mechanisms.circuit import Circuit
from analyses.mechanisms.cmap import Cmap, cmap
from analyses.mechanisms.faithfulness import disjoint, random_sets
from analyses.mechanisms.overlap import MechanismOverlap, mechanism_overlap
from analyses.mechanisms.paths import LOGITS, path_map
from analyses.mechanisms.task import Task
from analyses.patching import metrics
from analyses.patching.patch import few
from analyses.patching.sources import same_shape
from probes import figures
from probes.clustered import clustered_wilson
from probes.model import HookedModel
from probes.progress import progress as show
from probes.prompts import prompts_hash
from probes.results import Record, Result
from probes.sites import Sites

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Transplant(Result):
    """Faithfulness and accuracy of one circuit in each checkpoint."""

    task: str
    metric: str
    unit: str
    ablation: str
    names: tuple[str, ...]
    """The checkpoint that the circuit was found in first."""
    roles: tuple[str, ...]
    """"reference", "compared" or "control"."""
    full: Float[Tensor, "model limit"]
    """Mean metric of the whole model, with 95 % BCa limits over topics."""
    alone: Float[Tensor, "model limit"]
    """The same of the circuit with everything else ablated."""
    ratio: Float[Tensor, "model limit"]
    """alone / full of means; of a metric without a natural zero it says nothing."""
    normalised: Float[Tensor, "model limit"]
    """Faithfulness: 0 no better than nothing, 1 the whole model; may lie outside."""
    change: Float[Tensor, "model limit"]
    """Faithfulness minus the reference's on the same topics, in shares; exactly 0 for itself."""
    random: Float[Tensor, "model draw"]
    """Faithfulness of random circuits of that size."""
    accuracy: Float[Tensor, "model which limit"]
    """Share of prompts whose likeliest next token is the answer, in the whole model and in the
    circuit, with 95 % Wilson limits over topics."""
    notes: tuple[str, ...]

    @property
    def claimed(self) -> Tensor:
        """`[model]`: whether faithfulness lies above the 95th percentile of random circuits."""
        return self.normalised[:, 1] > self.random.double().quantile(0.95, dim=1)

    def frame(self) -> "pd.DataFrame":
        """One row a checkpoint."""
        import pandas as pd

        rows = []
        for m, (name, role) in enumerate(zip(self.names, self.roles, strict=True)):
            row: dict[str, object] = {"model": name, "role": role}
            for what in ("full", "alone", "ratio", "normalised", "change"):
                value, low, high = getattr(self, what)[m].tolist()
                row |= {what: value, f"{what}_low": low, f"{what}_high": high}
            row["random_95"] = float(self.random[m].double().quantile(0.95))
            row |= {"accuracy": float(self.accuracy[m, 0, 0]),
                    "circuit_accuracy": float(self.accuracy[m, 1, 0])}  # fmt: skip
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Faithfulness in each checkpoint beside random circuits."""
        ax = figures.axes(ax, 5.4, 3.4)
        with figures.theme():
            value, low, high = self.normalised.T.numpy()
            x = list(range(len(self.names)))
            look = figures.style(0)
            ax.vlines(x, low, high, color=look["color"], lw=1.5)
            ax.plot(x, value, ls="", label="circuit, 95 % interval", **look)
            grey = figures.PALETTE[7]
            for m in x:
                label = "random circuits" if not m else None
                ax.plot([m + 0.2] * self.random.shape[1], self.random[m].numpy(), ls="",
                        marker="_", color=grey, label=label)  # fmt: skip
            ax.axhline(1, color=figures.PALETTE[6], lw=0.8, ls=":", label="whole model")
            ax.axhline(0, color=figures.PALETTE[6], lw=0.8, label="nothing")
            named = [
                n + (f" ({r})" if r != "compared" else "")
                for n, r in zip(self.names, self.roles, strict=True)
            ]
            lines = name_ticks(ax, named)
            ax.set(
                ylabel="faithfulness",
                xlim=(-0.6, len(x) - 0.4),
                title=broken(f"The circuit of {self.names[0]} in other checkpoints: {self.task}"),
            )
            legend_below(ax, f"{self.ablation} ablation of the rest", lines)
        return ax

    def __str__(self) -> str:
        said = []
        for name, row in zip(self.names, self.normalised.tolist(), strict=True):
            said.append(f"{name} {row[0]:.2f} [{row[1]:.2f}, {row[2]:.2f}]")
        return f"{self.task}: faithfulness of the circuit of {self.names[0]}: " + ", ".join(said)


class MechanismDiff(NamedTuple):
    """The parts of `mechanism_diff`, each a result of its own."""

    transplant: Transplant
    overlap: MechanismOverlap
    cmaps: tuple[Cmap, ...]
    """Each compared checkpoint into the reference."""


def transplant(
    models: Sequence[HookedModel],
    task: Task,
    circuit: Circuit,
    *,
    controls: Sequence[str] = (),
    ablation: str = "mean",
    draws: int = 10,
    resamples: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Transplant:
    """The same circuit in every checkpoint, what lies outside ablated with the checkpoint's own
    values. The first is the one it was found in; `controls` are labels of models."""
    disjoint(task, circuit)
    rows, raw = [], []
    gap = torch.zeros(0)
    notes = few(task.topics)
    labels = [m.label for m in models]
    rendered = task.rendered(models[0])[0]
    for model in models:
        same_shape(models[0], model)
        circuit.check(model)
        runs = Ablation(model, task, ablation, mlps=circuit.mlps, batch_size=batch_size, seed=seed)
        own: Kept = circuit.where(task)
        sets: list[Kept] = [own, {}, *random_sets(runs.sites, own, draws, seed)]
        with show(len(sets), f"ablating {model.label}", progress) as advance:
            found = runs.measure(sets, advance)
        logits = runs.logits([own])[0]
        full, alone, empty = runs.full, found[0], found[1]
        raw.append((full, alone, empty))
        gap = full - empty
        args = {"resamples": resamples, "seed": seed}
        hits = [_right(task, rows_of) for rows_of in (runs.patcher.target_logits, logits)]
        rows.append(
            (
                metrics.triple(metrics.mean_interval(full, task.topics, **args)),
                metrics.triple(metrics.mean_interval(alone, task.topics, **args)),
                metrics.triple(metrics.share_interval(alone, full, task.topics, **args)),
                metrics.triple(metrics.share_interval(alone - empty, gap, task.topics, **args)),
                ((found[2:] - empty).mean(-1) / gap.mean()).float(),
                torch.tensor([list(clustered_wilson(h, task.topics)) for h in hits]),
            )
        )
        said = [f"{model.label}: {n}" for n in metrics.gap_note(gap, task.topics)]
        notes += tuple(n for n in (*said, *runs.patcher.notes) if n not in notes)
    columns = [torch.stack(list(c)) for c in zip(*rows, strict=True)]
    name, unit = metrics.named(task.metric)
    return Transplant(
        task=task.name,
        metric=name,
        unit=unit,
        ablation=ablation,
        names=tuple(labels),
        roles=tuple(
            "reference" if not k else "control" if n in controls else "compared"
            for k, n in enumerate(labels)
        ),
        full=columns[0],
        alone=columns[1],
        ratio=columns[2],
        normalised=columns[3],
        change=torch.stack([_difference(raw[0], own, task.topics, resamples, seed) for own in raw]),
        random=columns[4],
        accuracy=columns[5].float(),
        notes=notes,
        record=Record(
            models=tuple(m.name for m in models),
            fingerprints=tuple(m.fingerprint for m in models),
            template_hash=models[0].template.hash,
            prompts_hash=prompts_hash(rendered),
            dtype=str(models[0].dtype).removeprefix("torch."),
            engine=models[0].engine.name,
            settings={"ablation": ablation, "seed": seed, "circuit": list(map(str, circuit.sites))},
        ),
    )


def mechanism_diff(
    reference: HookedModel,
    others: Sequence[HookedModel],
    task: Task,
    circuit: Circuit,
    *,
    controls: Sequence[str] = (),
    receivers: Sites = LOGITS,
    senders_at: str | None = None,
    k: int = 20,
    ablation: str = "mean",
    draws: int = 10,
    batch_size: int = 32,
    folder: Path | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MechanismDiff:
    """Compare how checkpoints do one task, on prompts that the circuit was not chosen on.

    The circuit of `reference` is transplanted into the others; head scores (`path_map` to
    `receivers`) are compared; and each of the others' group outputs and inputs are patched into the
    reference. `controls` are labels of those models that differ by chance alone. The task is made
    once and put to all checkpoints.
    """
    models = [reference, *others]
    if not others:
        raise ValueError("no checkpoint was given to compare with: give at least one")
    moved = transplant(
        models, task, circuit, controls=controls, ablation=ablation, draws=draws,
        batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    maps = [
        path_map(
            model, task, receivers, senders_at=senders_at, null=None, batch_size=batch_size,
            folder=None if folder is None else Path(folder) / f"map-{n}", seed=seed,
            progress=progress,
        )
        for n, model in enumerate(models)
    ]  # fmt: skip
    labels = [m.label for m in models]
    shared = mechanism_overlap(maps, labels, controls=controls, k=k, seed=seed)
    patched = tuple(
        cmap(reference, m, task, circuit, draws=draws, batch_size=batch_size, seed=seed,
             progress=progress)
        for m in others
    )  # fmt: skip
    return MechanismDiff(moved, shared, patched)


def _right(task: Task, logits: Float[Tensor, "prompt vocab"]) -> Tensor:
    """Whether the likeliest token is (one of) the right ones."""
    wanted = getattr(task.metric, "answers", task.answers)
    return torch.tensor(
        [
            token in (own if isinstance(own, tuple) else (own,))
            for token, own in zip(logits.argmax(-1).tolist(), wanted, strict=True)
        ]
    )


def _difference(
    first: tuple[Tensor, Tensor, Tensor],
    other: tuple[Tensor, Tensor, Tensor],
    topics: Sequence[str],
    resamples: int,
    seed: int,
) -> Float[Tensor, " limit"]:
    """Faithfulness of the other minus that of the first, topics drawn together."""
    from probes.scores import bca
    from probes.splits import codes

    numbers, known = codes(topics)
    member = torch.nn.functional.one_hot(numbers, len(known)).double()

    def share(found: tuple[Tensor, Tensor, Tensor], weights: Tensor) -> Tensor:
        full, alone, empty = (values.double() @ member for values in found)
        return (weights @ (alone - empty)) / (weights @ (full - empty))

    def difference(weights: Tensor) -> Tensor:
        return share(other, weights) - share(first, weights)

    value = difference(torch.ones(1, len(known), dtype=torch.float64))[0]
    without = difference(1 - torch.eye(len(known), dtype=torch.float64))
    if len(known) < 2 or not bool(value.isfinite() & without.isfinite().all()):
        return torch.stack([value, value * torch.nan, value * torch.nan]).float()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(known), (resamples, len(known)), generator=generator)
    counts = torch.zeros(resamples, len(known), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.stack(list(bca(value, difference(counts), without))).float()
