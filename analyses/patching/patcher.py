"""A target run prepared to be patched again and again, and the cells that say what is put in."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.patching import metrics
from analyses.patching.cells import Cell, Held, Kept, parts_of
from analyses.patching.metrics import Metric
from analyses.patching.prepared import Prepared
from analyses.patching.runs import Job, Runs
from probes.prompts import prompts_hash
from probes.results import Record
from probes.sites import Site, Sites

TOGETHER = 16
"""Most cells whose logits are held at a time."""

HELD = 2**30
"""Bytes of activations held at a time; with more, cells run in several portions."""


class Patcher(Prepared):
    """Runs the target prompts with values of the source put in.

    `hold` names sites that are kept at the target's own values at `held_positions` whatever is
    patched below them: with q, k or v patched and `hold="all.head_out"` only what the patched
    inputs do to the attention of the last token gets through (CMAP of inputs; Prakash et al. 2024,
    section 6). Where a site is both held and patched, the patch wins.

    A patch whose values equal the target's own bit for bit is not run: its logits are the
    target's. Passes are shortened (`runs`) where that gives the logits of whole passes.
    """

    @cached_property
    def target_logits(self) -> Float[Tensor, "prompt vocab"]:
        """Last-token logits of the unpatched target run."""
        return _every(self.runs)

    @cached_property
    def source_logits(self) -> Float[Tensor, "prompt vocab"] | None:
        """The same of the source run; None where there is none (means, zeros, resampled values)."""
        return _every(self.values.runs) if self.values.has_run else None

    def metric(self, metric: "Metric | str") -> Metric:
        """A metric by itself, or "kl" for the divergence from the source run."""
        if metric == "kl":
            if self.source_logits is None:
                raise ValueError(
                    "metric='kl' compares with the source run, and there is none for means, zeros "
                    "or resampled values: give another metric"
                )
            return metrics.Divergence(self.source_logits)
        if not callable(metric):
            raise ValueError(f"metric {metric!r}: give a function of logits, or 'kl'")
        return metric

    def ends(self, metric: Metric) -> tuple[Float[Tensor, " prompt"], Float[Tensor, " prompt"]]:
        """The metric of the target run and of the source run (NaN where there is none).

        Where cells at positions of their own will be measured, let `ready` see them first.
        """
        target = metrics.measured(metric, self.target_logits, self.texts)
        if self.source_logits is None:
            return target, torch.full_like(target, torch.nan)
        return target, metrics.measured(metric, self.source_logits, self.texts)

    def logits(self, sites: Sites, positions: str | None = None) -> Float[Tensor, "prompt vocab"]:
        """Last-token logits with these sites patched together."""
        (found,) = self.run([Cell(self.checked(sites), positions)])
        return found

    def measure(
        self,
        cells: Sequence[Cell],
        metric: Metric,
        *,
        folder: Path | str | None = None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Float[Tensor, "cell prompt"]:
        """The metric of every patched run, float64. `folder` keeps cells that are finished, layer
        by layer: the same call made again goes on where it was stopped."""
        self.ready(cells)
        kept = self.kept(folder, cells, metric)
        found = torch.full((len(cells), len(self.ids)), torch.nan, dtype=torch.float64)
        layers: dict[int, list[int]] = {}
        for c, cell in enumerate(cells):
            layers.setdefault(min(s.layer for s in cell.sites), []).append(c)
        todo = []
        for layer in sorted(layers):
            done = kept.read(layer)
            if done is None:
                todo.append(layer)
            else:
                found[layers[layer]] = done
                advance(len(layers[layer]))
        for portion in self._portions(todo, layers, cells):
            held = self._load([cells[c] for layer in portion for c in layers[layer]])
            for layer in portion:
                chosen = layers[layer]
                for c, logits in zip(
                    chosen, self._run([cells[c] for c in chosen], held), strict=True
                ):
                    found[c] = metrics.measured(metric, logits, self.texts)
                    advance(1)
                kept.write(layer, found[chosen])
        return found

    def run(self, cells: Sequence[Cell]) -> list[Float[Tensor, "prompt vocab"]]:
        """Last-token logits of every cell, held all at once."""
        return list(self._run(cells, self._load(cells)))

    def generate(self, cell: Cell, max_new_tokens: int = 10) -> list[str]:
        """Greedy answers with the cell patched while the prompt is read."""
        held = self._load([cell]) if cell.sites else Held()
        found = [""] * len(self.ids)
        for chunk in self.runs.chunks:
            jobs = [Job(i, 0, self._writes(cell, i, held)) for i in chunk]
            for i, ids in zip(chunk, self.runs.generate(jobs, max_new_tokens), strict=True):
                found[i] = self.model.tokenizer.decode(ids, skip_special_tokens=True)
        return found

    def record(self, settings: Mapping[str, object]) -> Record:
        """How a result of these runs was made."""
        models = list(dict.fromkeys([self.model, self.values.model]))
        return Record(
            models=tuple(m.name for m in models),
            fingerprints=tuple(m.fingerprint for m in models),
            template_hash=self.model.template.hash,
            prompts_hash=prompts_hash([*self.rendered, *self.values.rendered]),
            dtype=str(self.model.dtype).removeprefix("torch."),
            engine=self.model.engine.name,
            settings={"source": self.said, "positions": self.alignment.text, **settings},
        )

    @property
    def said(self) -> str:
        """The source in words."""
        other = self.values.model is not self.model
        kind = type(self.source).__name__
        if kind == "From":
            return self.values.model.label if other else "the source prompts"
        if kind == "Mean" and getattr(self.source, "by_position", False):
            kind = "MeanByPosition"
        words = {
            "Resampled": "other prompts",
            "Mean": "a mean over prompts",
            "MeanByPosition": "a mean over prompts by position",
            "Zero": "zeros",
        }[kind]
        return f"{words} ({self.values.model.label})" if other else words

    def kept(
        self, folder: Path | str | None, cells: Sequence[Cell], metric: Metric, *more: object
    ) -> Kept:
        """A folder for what a metric of these cells gives; `more` is what it depends on besides."""
        if folder is None:
            return Kept(None, None)
        for model in (self.model, self.values.model):
            if getattr(model.engine, "edited", False):
                raise ValueError(
                    f"{model.name} is being edited, which the files in {folder} would not say: "
                    "measure outside the edits, or without a folder"
                )
        record = self.record({})
        described = (
            record.fingerprints,
            record.prompts_hash,
            record.engine,
            record.dtype,
            self.said,
            self.alignment,
            self.hold,
            self.held_positions,
            metrics.named(metric),
            metrics.fields_of(metric),
            tuple(cells),
            more,
        )
        return Kept(folder, described, torch.cat(self.ends(metric)))

    def _portions(
        self, todo: Sequence[int], layers: Mapping[int, Sequence[int]], cells: Sequence[Cell]
    ) -> list[list[int]]:
        """Layers whose activations are held together, under `HELD` bytes."""
        tokens = sum(map(len, self.ids))
        each = tokens * torch.empty(0, dtype=self.model.dtype).element_size() * self.model.d_model
        portions: list[list[int]] = []
        union: set[Site] = set()
        for layer in todo:
            more = set(parts_of(s for c in layers[layer] for s in cells[c].sites))
            size = 2 * len(union | more) + len(portions[-1] if portions else ()) + 1
            if not portions or size * each > HELD:
                portions.append([])
                union = set()
            union |= more
            portions[-1].append(layer)
        return portions

    def _run(self, cells: Sequence[Cell], held: Held):
        """Logits of each cell in turn; several cells run together where their rows fit."""
        together = max(1, min(TOGETHER, self.batch_size // min(map(len, self.runs.chunks))))
        firsts = [self._first(cell, held) for cell in cells]
        same = self.target_logits
        # cells of one pass start at one layer
        order: dict[int | None, list[int]] = {}
        for c, first in enumerate(firsts):
            order.setdefault(first, []).append(c)
        found: dict[int, Tensor] = dict.fromkeys(order.pop(None, []), same)
        done = 0
        for first, chosen in order.items():
            assert first is not None
            for k in range(0, len(chosen), together):
                some = chosen[k : k + together]
                found |= dict(
                    zip(some, self._pass([cells[c] for c in some], first, held), strict=True)
                )
                while done in found:  # in the order of the cells, nothing held longer than needed
                    yield found.pop(done)
                    done += 1
        while done in found:
            yield found.pop(done)
            done += 1

    def _pass(self, cells: Sequence[Cell], first: int, held: Held) -> list[Tensor]:
        """Several cells that start at one layer."""
        found = [torch.empty_like(self.target_logits) for _ in cells]
        prefixes = {}
        for chunk in self.runs.chunks:
            at_once = max(1, self.batch_size // len(chunk))
            for start in range(0, len(cells), at_once):
                some = range(start, min(start + at_once, len(cells)))
                jobs = [
                    Job(i, n, self._writes(cells[n], i, held, first)) for n in some for i in chunk
                ]
                got = self.runs.logits(jobs, first, held.entering.get(first), prefixes=prefixes)
                for job, row in zip(jobs, got, strict=True):
                    cell, i = cells[job.patch], job.prompt
                    changed = any(self._differs(site, cell, i, held) for site in cell.sites)
                    # a batch of another size may round otherwise: no change is no change
                    found[job.patch][i] = row if changed else self.target_logits[i]
        return found


def _every(runs: Runs) -> Float[Tensor, "prompt vocab"]:
    """Unpatched logits of all prompts of some runs."""
    rows: dict[int, Tensor] = {}
    for chunk in runs.chunks:
        rows |= dict(zip(chunk, runs.logits([Job(i, 0) for i in chunk]), strict=True))
    return torch.stack([rows[i] for i in range(len(runs.ids))])
