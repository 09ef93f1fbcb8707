"""States of a task's prompts at one place, for the analyses of this folder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from analyses.mechanisms.task import Task
from analyses.patching.runs import Runs
from probes.model import HookedModel
from probes.prompts import Rendered, prompts_hash
from probes.results import Record, check_finite
from probes.sites import Site
from probes.splits import FEW_GROUPS

ROWS = 16
"""Prompts in a pass."""


def columns(task: Task, rendered: Sequence[Rendered], position: str) -> list[int]:
    """The one token of each prompt that `position` names: "last", or a place of the task."""
    if position == "last":
        return [len(r.ids) - 1 for r in rendered]
    if position not in task.places:
        raise ValueError(
            f"position {position!r}: task {task.name!r} has 'last'"
            + "".join(f", {name!r}" for name in task.places if name != "last")
        )
    found = []
    for i, tokens in enumerate(task.places[position]):
        if not tokens:
            raise ValueError(f"prompt {i} of task {task.name!r} has no token at {position!r}")
        found.append(tokens[-1])
    return found


@torch.no_grad()
def states(
    model: HookedModel,
    rendered: Sequence[Rendered],
    sites: Sequence[Site],
    at: Sequence[int],
) -> dict[Site, Tensor]:
    """`[prompt, ...]` of each site at one token of each prompt, float32 on the CPU."""
    ids = [r.ids for r in rendered]
    runs = Runs(model, ids, rows=ROWS)
    rows: dict[Site, list[Tensor]] = {s: [torch.empty(0)] * len(ids) for s in sites}
    for chunk in runs.chunks:
        batch = model.batch([rendered[i] for i in chunk])
        width = batch.ids.shape[1]
        for site, h in model.engine.read(batch, sites).items():
            for row, i in zip(h, chunk, strict=True):
                rows[site][i] = row[width - len(ids[i]) + at[i]].float().cpu().clone()
    found = {site: torch.stack(values) for site, values in rows.items()}
    for site, values in found.items():
        check_finite(values, f"the activations at {site}")
    return found


def described(
    models: Sequence[HookedModel], rendered: Sequence[Rendered], settings: dict[str, object]
) -> Record:
    """How a result was made."""
    known = list(dict.fromkeys(models))
    return Record(
        models=tuple(m.name for m in known),
        fingerprints=tuple(m.fingerprint for m in known),
        template_hash=known[0].template.hash,
        prompts_hash=prompts_hash(rendered),
        dtype=str(known[0].dtype).removeprefix("torch."),
        engine=known[0].engine.name,
        settings=settings,
    )


def few(task: Task) -> tuple[str, ...]:
    """A note where there are too few topics for an interval."""
    n = len(set(task.topics))
    if n >= FEW_GROUPS:
        return ()
    return (f"only {n} topics: intervals over fewer than {FEW_GROUPS} are too narrow",)


def same_vocabulary(model: HookedModel, other: HookedModel) -> None:
    """Two models must render alike and have one vocabulary, or ids do not mean the same."""
    if model.template.hash != other.template.hash:
        raise ValueError(
            f"{model.name} and {other.name} have different templates, so they would read different "
            "tokens: load both with one template="
        )
    sizes = [m.layout.vocab_size for m in (model, other)]
    if sizes[0] != sizes[1] or model.n_layers != other.n_layers:
        raise ValueError(
            f"{model.name} has {model.n_layers} layers and {sizes[0]} tokens, {other.name} "
            f"{other.n_layers} and {sizes[1]}: compare checkpoints of one model"
        )
