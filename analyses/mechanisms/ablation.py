"""Runs in which everything outside a set of heads and MLPs is ablated."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.mechanisms.circuit import all_heads, all_mlps
from analyses.mechanisms.task import Task
from analyses.patching import metrics
from analyses.patching.cells import parts_of
from analyses.patching.patcher import Patcher
from analyses.patching.runs import Job, Runs, Write, common
from analyses.patching.sources import From, Resampled, Source, Zero
from analyses.patching.spans import Indices, chosen
from probes.model import HookedModel
from probes.prompts import Prompt
from probes.sites import Site

KINDS = ("mean", "zero", "resample", "counterfactual")
"""What an ablated site gets: its mean over other prompts; zeros; its value in another prompt of
the counterfactuals, drawn at random; its value in the prompt's own counterfactual."""

Kept = Mapping[Site, str | Indices | None]
"""Site -> the tokens at which it keeps its value; None: every token."""


class Ablation:
    """One model on the prompts of a task, with heads (and MLPs, if asked) ablated outside a set.

    "mean" is taken over `reference`, by default the counterfactuals. What all prompts begin with,
    and what they all end with, has a mean at each place; what lies between them has one mean where
    lengths differ, and a mean at each place where they agree. Embeddings, norms and, without
    `mlps`, MLPs are always the model's own, computed on what the ablation leaves.
    """

    def __init__(
        self,
        model: HookedModel,
        task: Task,
        kind: str = "mean",
        *,
        reference: Sequence[Prompt] | None = None,
        mlps: bool = False,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"ablation {kind!r}: choose one of {', '.join(KINDS)}")
        task.rendered(model)  # says what is wrong with the task for this model
        other = From(prompts=task.counterfactuals)
        source: Source = Zero()
        if kind == "counterfactual":
            source = other
        if kind == "resample":
            source = Resampled(other, task.topics, seed)
        self.model, self.task, self.kind = model, task, kind
        self.sites = all_heads(model) + (all_mlps(model) if mlps else ())
        self.patcher = Patcher(model, task.prompts, source, batch_size=batch_size)
        self.patcher.settled()
        if kind == "mean":
            self._values = self._means(reference or task.counterfactuals)
        else:
            self._values = self.patcher.values.at(parts_of(self.sites))

    @property
    def full(self) -> Float[Tensor, " prompt"]:
        """The metric of the unablated model, float64."""
        return self._metric(self.patcher.target_logits)

    def measure(
        self, sets: Sequence[Kept], advance: Callable[[int], None] = lambda n: None
    ) -> Float[Tensor, "set prompt"]:
        """The metric with everything ablated that a set does not keep, float64."""
        found = []
        for k in range(0, len(sets), 16):
            some = sets[k : k + 16]
            found += [self._metric(logits) for logits in self.logits(some)]
            advance(len(some))
        empty = torch.zeros(0, len(self.task), dtype=torch.float64)
        return torch.stack(found) if found else empty

    def logits(self, sets: Sequence[Kept]) -> list[Float[Tensor, "prompt vocab"]]:
        """Last-token logits for each set of kept sites; where nothing is ablated, the model's own."""
        kept = [[self._tokens(own, i) for i in range(len(self.task))] for own in sets]
        for other in kept:
            for site in {s for row in other for s in row}:
                self.patcher.alike([[sorted(row.get(site, ())) for row in other]])
        runs = self.patcher.runs
        found = [self.patcher.target_logits.clone() for _ in sets]
        prefixes = {}
        for chunk in runs.chunks:
            rows = [(n, i) for n in range(len(sets)) for i in chunk]
            for k in range(0, len(rows), self.patcher.batch_size):
                jobs = [Job(i, n, self._writes(kept[n][i], i))
                        for n, i in rows[k : k + self.patcher.batch_size]]  # fmt: skip
                jobs = [job for job in jobs if job.writes]
                if not jobs:
                    continue
                for job, row in zip(jobs, runs.logits(jobs, prefixes=prefixes), strict=True):
                    found[job.patch][job.prompt] = row
        return found

    def _metric(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
        return metrics.measured(self.task.metric, logits, self.patcher.texts)

    def _tokens(self, kept: Kept, i: int) -> dict[Site, frozenset[int]]:
        """The tokens of a prompt at which each site keeps its value."""
        rendered = self.patcher.rendered[i]
        return {
            site: frozenset(range(len(rendered.ids)) if at is None else chosen(at, rendered, i))
            for site, at in kept.items()
        }

    def _writes(self, kept: Mapping[Site, frozenset[int]], i: int) -> tuple[Write, ...]:
        """Ablated values at every site and aligned token that is not kept."""
        aligned = self.patcher.alignment.target[i]
        tokens = {
            site: tuple(t for t in aligned if t not in kept.get(site, ())) for site in self.sites
        }
        return writes(tokens, {part: rows[i] for part, rows in self._values.items()}, aligned)

    def _means(self, reference: Sequence[Prompt]) -> dict[Site, list[Tensor]]:
        """Means of each site for the tokens of every prompt."""
        ids = [r.ids for r in self.model.template.render_all(reference)]
        own = self.patcher.ids
        start = common([*ids, *own])
        end = common([[*reversed(row[start:])] for row in (*ids, *own)])
        same = len({len(row) for row in (*ids, *own)}) == 1
        runs = Runs(self.model, ids, rows=self.patcher.batch_size)
        found = {}
        parts = parts_of(self.sites)
        for k in range(0, len(parts), 8):
            for part, rows in runs.read(parts[k : k + 8]).items():
                found[part] = _mean(rows, own, len(own[0]) if same else start, 0 if same else end)
        return found


def writes(
    tokens: Mapping[Site, tuple[int, ...]],
    values: Mapping[Site, Tensor],
    aligned: Sequence[int],
) -> tuple[Write, ...]:
    """Values put at some tokens of each site in one prompt; `values` of a part hold a row for each
    aligned token. Heads of a layer with the same tokens are written together."""
    place = {token: k for k, token in enumerate(aligned)}
    together: dict[tuple[Site, tuple[int, ...]], list[int]] = {}
    for site, own in tokens.items():
        if own:
            heads = together.setdefault((Site(site.layer, site.part), own), [])
            heads += [] if site.head is None else [site.head]
    found = []
    for (part, own), heads in together.items():
        rows = values[part][[place[token] for token in own]]
        if heads:
            found.append(Write(part, own, tuple(heads), rows[:, heads]))
        else:
            found.append(Write(part, own, None, rows))
    return tuple(found)


def _mean(
    rows: Sequence[Tensor], own: Sequence[Sequence[int]], start: int, end: int
) -> list[Tensor]:
    """Means by place at the first and last tokens, one mean between them, for prompts `own`."""
    head = torch.stack([h[:start] for h in rows]).double().mean(0)
    tail = torch.stack([h[len(h) - end :] for h in rows]).double().mean(0)
    between = torch.cat([h[start : len(h) - end] for h in rows]).double()
    middle = between.mean(0) if len(between) else between.new_zeros(between.shape[1:])
    found = []
    for ids in own:
        n = len(ids) - start - end
        made = [head, middle.expand(n, *middle.shape), tail]
        found.append(torch.cat(made).to(rows[0].dtype))
    return found
