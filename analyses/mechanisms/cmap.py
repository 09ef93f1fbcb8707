"""Cross-model patching of a circuit: what one checkpoint's heads do in another (CMAP)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken, legend_below, name_ticks
from analyses.mechanisms.ablation import Kept, writes
from analyses.mechanisms.circuit import Circuit, all_heads
from analyses.mechanisms.faithfulness import disjoint, random_sets
from analyses.mechanisms.task import Task
from analyses.patching import metrics
from analyses.patching.cells import parts_of
from analyses.patching.patch import few
from analyses.patching.patcher import Patcher
from analyses.patching.runs import Job, Runs
from analyses.patching.sources import From
from analyses.patching.spans import chosen
from probes import figures
from probes.model import HookedModel
from probes.progress import progress as show
from probes.results import Result
from probes.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KINDS = ("outputs", "q", "k", "v")
"""What of a group is the other checkpoint's."""

Tokens = list[dict[Site, tuple[int, ...]]]
"""Of each prompt, the tokens at which sites are written."""


@dataclass(frozen=True)
class Cmap(Result):
    """The target's metric with groups of the source's heads in it, on the same token ids."""

    task: str
    target_name: str
    source_name: str
    metric: str
    unit: str
    groups: tuple[str, ...]
    """The circuit's groups, the whole circuit, and every head of the model."""
    target: Float[Tensor, " prompt"]
    source: Float[Tensor, " prompt"]
    change: Float[Tensor, "group kind limit"]
    """Mean of patched - target for each of `KINDS`, in the metric's unit, with 95 % BCa limits over
    topics; NaN where a group has no such input."""
    share: Float[Tensor, "group kind limit"]
    """Mean change over the mean of source - target: 1 is the whole gap; NaN without a gap."""
    null_change: Float[Tensor, "group draw"]
    """Mean change with the outputs of as many heads (and MLPs) drawn at random; NaN where the group
    is every head."""
    notes: tuple[str, ...]

    @property
    def gap(self) -> float:
        """Mean of source - target, in the metric's unit."""
        return float((self.source.double() - self.target.double()).mean())

    @property
    def null_95(self) -> Float[Tensor, " group"]:
        """95th percentile of each group's absolute null."""
        return self.null_change.double().abs().quantile(0.95, dim=1).float()

    @property
    def claimed(self) -> Tensor:
        """`[group, kind]`: whether the interval excludes the null's 95th percentile; never for
        every head, which has no null."""
        band = self.null_95[:, None]
        return (self.change[..., 1] > band) | (self.change[..., 2] < -band)

    def frame(self) -> "pd.DataFrame":
        """One row for each group and kind."""
        import pandas as pd

        rows = []
        for g, name in enumerate(self.groups):
            for k, kind in enumerate(KINDS):
                row = {"group": name, "patched": kind}
                for what in ("change", "share"):
                    value, low, high = getattr(self, what)[g, k].tolist()
                    row |= {what: value, f"{what}_low": low, f"{what}_high": high}
                rows.append(row | {"claimed": bool(self.claimed[g, k])})
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The metric with each group patched, between the two checkpoints' own."""
        ax = figures.axes(ax, 5.6, 3.6)
        with figures.theme():
            base = float(self.target.double().mean())
            for k, kind in enumerate(KINDS):
                value, low, high = (base + self.change[:, k].double()).T.numpy()
                x = [g + 0.16 * (k - 1.5) for g in range(len(self.groups))]
                look = figures.style(k)
                ax.vlines(x, low, high, color=look["color"], lw=1.2)
                ax.plot(x, value, ls="", label=f"{kind} patched", **look)
            for own, name, line in (
                (self.target, self.target_name, "--"),
                (self.source, self.source_name, ":"),
            ):
                ax.axhline(float(own.mean()), color=figures.PALETTE[6], lw=1, ls=line, label=name)
            unit = f" ({self.unit})" if self.unit else ""
            lines = name_ticks(ax, self.groups)
            ax.set(
                ylabel=broken(f"{self.metric}{unit}", 28),
                title=broken(f"{self.task}: {self.source_name} into {self.target_name}"),
            )
            legend_below(ax, "mean over prompts, 95 % interval", lines)
        return ax

    def __str__(self) -> str:
        said = f"{self.task}, {self.source_name} into {self.target_name}: "
        if bool((self.change.nan_to_num(0.0) == 0).all()):
            return said + "nothing changes, every change is exactly 0"
        row = self.change[:-1, 0, 0].abs().argmax()
        value, low, high = self.change[row, 0].tolist()
        said += f"outputs of {self.groups[int(row)]} change {self.metric} by {value:+.3g} "
        said += f"[{low:.3g}, {high:.3g}] {self.unit}".rstrip()
        share = float(self.share[row, 0, 0])
        said += "" if share != share else f", {share:.0%} of the gap"
        return said + f"; null at most {float(self.null_95[row]):.2g}"


def cmap(
    target: HookedModel,
    source: HookedModel,
    task: Task,
    circuit: Circuit,
    *,
    draws: int = 20,
    resamples: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Cmap:
    """Patch each group of a circuit from one checkpoint into another (Prakash et al. 2024, 6).

    Outputs: the group's head outputs (and MLP outputs) at its tokens are the source's; everything
    above is computed anew. Inputs: its queries at its tokens, or its keys or its values at every
    token, are the source's while every mixer is held; the outputs that the group's heads then have
    at its tokens are put into the target's run, so that nothing else, such as heads that share a
    key-value head, is changed. q, k and v all three would give the outputs.

    Tokens are looked up in each prompt. The released code writes the position of one row into
    every row of a batch; and it holds all outputs but the last token's, which leaves groups at
    earlier tokens without any effect.
    """
    circuit.check(target)
    disjoint(task, circuit)
    task.rendered(target)
    runs = _Swap(target, source, task, batch_size)
    where = circuit.where(task)
    sets: dict[str, Kept] = {
        name: {s: where[s] for s in circuit.group(name)}
        for name in circuit.names
        if circuit.groups[name]
    }
    if len(sets) > 1:
        sets["whole circuit"] = where
    nulls = [random_sets(runs.pool, own, draws, seed + g) for g, own in enumerate(sets.values())]
    sets["all heads"] = dict.fromkeys(all_heads(target))
    n = len(task)
    with show(len(sets) * (4 + draws), f"patching {target.label}", progress) as advance:
        found = torch.full((len(sets), len(KINDS), n), torch.nan, dtype=torch.float64)
        for g, own in enumerate(sets.values()):
            found[g, 0] = runs.measure([own])[0]
            for k, part in enumerate(KINDS[1:], 1):
                if any(site.part == "head_out" for site in own):
                    found[g, k] = runs.with_inputs(own, part)
            advance(len(KINDS))
        null = torch.full((len(sets), draws), torch.nan, dtype=torch.float64)
        for g, some in enumerate(nulls):
            null[g] = (runs.measure(some) - runs.ends[0]).mean(-1)
            advance(draws)
    first, other = runs.ends
    flat = (found - first).reshape(-1, n)
    change = metrics.mean_interval(flat, task.topics, resamples=resamples, seed=seed)
    share = metrics.share_interval(flat, other - first, task.topics, resamples=resamples, seed=seed)
    name, unit = metrics.named(task.metric)
    shape = (len(sets), len(KINDS), 3)
    return Cmap(
        task=task.name,
        target_name=target.label,
        source_name=source.label,
        metric=name,
        unit=unit,
        groups=tuple(sets),
        target=first.float(),
        source=other.float(),
        change=torch.stack(list(change), -1).reshape(shape).float(),
        share=torch.stack(list(share), -1).reshape(shape).float(),
        null_change=null.float(),
        notes=few(task.topics) + metrics.gap_note(other - first, task.topics) + runs.patcher.notes,
        record=runs.patcher.record({"task": task.name, "draws": draws, "seed": seed}),
    )


class _Swap:
    """The target's runs with values of the source's run of the same ids put in, row by row."""

    def __init__(
        self, target: HookedModel, source: HookedModel, task: Task, batch_size: int
    ) -> None:
        self.patcher = Patcher(target, task.prompts, From(model=source), batch_size=batch_size)
        self.patcher.settled()
        # whole prompts: what the sets write differs from prompt to prompt
        self.patcher._open(resume=False, share=False)
        self.task, self.pool = task, all_heads(target)
        blocks = target.layout.blocks
        self.pool += tuple(
            Site(k, "mlp_out") for k, b in enumerate(blocks) if "mlp_out" not in b.refused
        )

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        return self.patcher.ends(self.task.metric)

    def measure(self, sets: Sequence[Kept]) -> Float[Tensor, "set prompt"]:
        """The metric with the outputs of each set taken from the source."""
        given = self.patcher.values.at(parts_of(site for own in sets for site in own))
        found = []
        for own in sets:
            values = {part: given[part] for part in parts_of(own)}
            found.append(self._with(self._tokens(own), values))
        return torch.stack(found)

    def with_inputs(self, own: Kept, part: str) -> Float[Tensor, " prompt"]:
        """The metric with the outputs that a group's heads have on the source's q, k or v."""
        model, patcher = self.patcher.model, self.patcher
        heads: Kept = {s: at for s, at in own.items() if s.part == "head_out"}
        tokens = self._tokens(heads)
        layers = sorted({s.layer for s in heads})
        mixers = [Site(layer, "attn_out") for layer in range(layers[0], layers[-1])]
        outputs, inputs = ([Site(n, p) for n in layers] for p in ("head_out", part))
        clean = patcher.runs.read([*mixers, *inputs])
        source = patcher.values.at(inputs)
        runs = Runs(model, patcher.ids, rows=patcher.batch_size)
        made: dict[Site, list[Tensor]] = {
            site: [torch.empty(0)] * len(self.task) for site in outputs
        }
        for chunk in runs.chunks:
            jobs = []
            for i in chunk:
                every = tuple(range(len(patcher.ids[i])))
                given: dict[Site, tuple[int, ...]] = dict.fromkeys(mixers, every)
                for site, at in tokens[i].items():
                    block = model.layout.blocks[site.layer]
                    shared = block.heads["head_out"] // block.heads[part]
                    to = Site(site.layer, part, (site.head or 0) // shared)
                    given[to] = at if part == "q" else every
                put = {s: clean[s][i] for s in mixers} | {s: source[s][i] for s in inputs}
                jobs.append(Job(i, 0, writes(given, put, every)))
            for site, rows in runs.activations(jobs, outputs).items():
                for i, row in zip(chunk, rows, strict=True):
                    made[site][i] = row
        changed = {
            (site, i): bool((source[site][i] != clean[site][i]).any())
            for site in inputs
            for i in range(len(self.task))
        }
        same = [not any(changed[site, i] for site in inputs) for i in range(len(self.task))]
        return self._with(tokens, made, same)

    def _tokens(self, own: Kept) -> Tokens:
        """Where each site is written in every prompt."""
        found: Tokens = []
        for i, rendered in enumerate(self.patcher.rendered):
            every = tuple(range(len(rendered.ids)))
            found.append(
                {
                    s: every if at is None else tuple(chosen(at, rendered, i))
                    for s, at in own.items()
                }
            )
        return found

    def _with(
        self,
        tokens: Tokens,
        values: Mapping[Site, list[Tensor]],
        same: Sequence[bool] | None = None,
    ) -> Float[Tensor, " prompt"]:
        runs = self.patcher.runs
        logits = self.patcher.target_logits.clone()
        for chunk in runs.chunks:
            rows = [i for i in chunk if same is None or not same[i]]
            jobs = [
                Job(i, 0, writes(tokens[i], {s: v[i] for s, v in values.items()},
                                 range(len(self.patcher.ids[i]))))
                for i in rows
            ]  # fmt: skip
            if jobs:
                logits[rows] = runs.logits(jobs)
        return metrics.measured(self.task.metric, logits, self.patcher.texts)
