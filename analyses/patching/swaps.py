"""The drifted model with something of the aligned one in it: activations of its run, or weights."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.patching import metrics
from analyses.patching.metrics import Metric
from analyses.patching.patcher import HELD, Cell, Patcher
from analyses.patching.runs import Job
from analyses.patching.sources import From
from analyses.patching.weights import patched_weights, replacement
from probes.model import HookedModel
from probes.prompts import Prompt, Rendered
from probes.results import Record
from probes.sites import Site

Unit = tuple[Site, ...]
"""Sites that are swapped together."""


class ActivationSwap:
    """The aligned run's outputs put into the drifted run of the same tokens."""

    def __init__(
        self,
        aligned: HookedModel,
        drifted: HookedModel,
        prompts: Sequence[Prompt | Rendered],
        metric: Metric,
        batch_size: int,
        folder: Path | str | None,
        advance: Callable[[int], None],
    ) -> None:
        self.aligned, self.drifted, self.metric = aligned, drifted, metric
        self.folder = None if folder is None else Path(folder)
        self.advance = advance
        self.patcher = Patcher(drifted, prompts, From(model=aligned), batch_size=batch_size)
        self.patcher.settled()
        self.target, self.source = self.patcher.ends(metric)

    @property
    def gap(self) -> Float[Tensor, " prompt"]:
        """Aligned minus drifted, of each prompt."""
        return self.source - self.target

    @property
    def notes(self) -> tuple[str, ...]:
        return self.patcher.notes

    def record(self, settings: dict[str, object]) -> Record:
        return self.patcher.record(settings)

    @staticmethod
    def count(model: HookedModel, window: int) -> int:
        """Patched runs that a whole attribution makes before anything is chosen."""
        layout, n = model.layout, model.n_layers
        parts = sum(len(layout.supported(p)) for p in ("attn_out", "mlp_out"))
        return (
            parts + 2 * n + n - window + 1 + sum(b.heads.get("head_out", 0) for b in layout.blocks)
        )

    def layer_units(self) -> tuple[tuple[str, ...], list[list[Unit]]]:
        """Names of what can be swapped in a layer, and its sites; empty where a layer has none."""
        blocks = self.drifted.layout.blocks
        rows = [
            [() if part in block.refused else (Site(k, part),) for k, block in enumerate(blocks)]
            for part in ("attn_out", "mlp_out")
        ]
        return ("attention", "MLP"), rows

    def head_units(self) -> list[tuple[int, int, Unit]]:
        """Layer, head and sites of every head."""
        return [
            (layer, head, (Site(layer, "head_out", head),))
            for layer, block in enumerate(self.drifted.layout.blocks)
            for head in range(block.heads.get("head_out", 0))
        ]

    def change(self, units: Sequence[Unit], name: str) -> Float[Tensor, "unit prompt"]:
        """Metric with each unit swapped minus that of the drifted run."""
        if not units:
            return torch.zeros(0, len(self.target), dtype=torch.float64)
        folder = None if self.folder is None else self.folder / name
        cells = [Cell(unit) for unit in units]
        found = self.patcher.measure(cells, self.metric, folder=folder, advance=self.advance)
        return found - self.target

    def generate(self, unit: Unit, max_new_tokens: int) -> list[str]:
        return self.patcher.generate(Cell(unit), max_new_tokens)


class WeightSwap(ActivationSwap):
    """The aligned model's weights in the drifted one."""

    @staticmethod
    def count(model: HookedModel, window: int) -> int:
        groups = sum(block.heads.get("k", 0) for block in model.layout.blocks)
        return 3 * model.n_layers + model.n_layers - window + 1 + groups

    def layer_units(self) -> tuple[tuple[str, ...], list[list[Unit]]]:
        return ("block",), [[(Site(k, "resid_post"),) for k in range(self.drifted.n_layers)]]

    def head_units(self) -> list[tuple[int, int, Unit]]:
        """Groups of query heads with the keys and values they share: these have weights of their
        own, a single query head has not."""
        found = []
        for layer, block in enumerate(self.drifted.layout.blocks):
            groups = block.heads.get("k", 0)
            each = block.heads["head_out"] // groups if groups else 0
            for g in range(groups):
                queries = range(g * each, (g + 1) * each)
                sites = [Site(layer, part, h) for part in ("q", "head_out") for h in queries]
                found.append((layer, g, (*sites, Site(layer, "k", g), Site(layer, "v", g))))
        return found

    def change(self, units: Sequence[Unit], name: str) -> Float[Tensor, "unit prompt"]:
        folder = None if self.folder is None else self.folder / name
        cells = [Cell(unit) for unit in units]
        kept = self.patcher.kept(folder, cells, self.metric, "weights")
        found = torch.zeros(len(units), len(self.target), dtype=torch.float64)
        layers: dict[int, list[int]] = {}
        for u, unit in enumerate(units):
            layers.setdefault(min(site.layer for site in unit), []).append(u)
        for layer, own in layers.items():
            done = kept.read(layer)
            if done is not None:
                self.advance(len(own))
            else:
                done = torch.stack([self._measured(units[u]) for u in own])
                kept.write(layer, done)
            found[own] = done - self.target
        return found

    def _measured(self, unit: Unit) -> Float[Tensor, " prompt"]:
        """The metric with the weights of a unit swapped."""
        self.advance(1)
        if not replacement(self.drifted, self.aligned, unit):
            return self.target
        runs, first = self.patcher.runs, min(site.layer for site in unit)
        logits = torch.empty_like(self.patcher.target_logits)
        hidden = self._entering.get(first)
        with patched_weights(self.drifted, self.aligned, unit):
            prefixes = {}
            for chunk in runs.chunks:
                jobs = [Job(i, 0) for i in chunk]
                logits[chunk] = runs.logits(jobs, first, hidden, prefixes=prefixes, fresh=True)
        return metrics.measured(self.metric, logits, self.patcher.texts)

    def generate(self, unit: Unit, max_new_tokens: int) -> list[str]:
        with patched_weights(self.drifted, self.aligned, unit):
            return self.patcher.generate(Cell(()), max_new_tokens)

    @cached_property
    def _entering(self) -> dict[int, list[Tensor]]:
        """What enters each block of the drifted run; nothing where it would not fit."""
        runs = self.patcher.runs
        size = sum(map(len, runs.ids)) * self.drifted.d_model * self.drifted.n_layers * 4
        if not runs.resume or size > HELD or self.drifted.n_layers < 2:
            return {}
        sites = {k: Site(k, "resid_pre") for k in range(1, self.drifted.n_layers)}
        read = runs.read(list(sites.values()))
        return {k: read[site] for k, site in sites.items()}
