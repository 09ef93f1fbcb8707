"""Runs of one model over fixed prompts: read once, then made again with values put in.

Nothing is computed twice that a patch cannot change. What all prompts begin with runs once for
each patch; blocks below the first patched one pass on what the unpatched run gave there. Both need
the plain engine, and both are tried against a whole pass before they are used (`Runs.error`).
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.patching.writes import Job, Write, edits_of
from probes.engines import Batch, Edit
from probes.engines.hooks import HookEngine, Prefix
from probes.model import HookedModel
from probes.prompts import pad, pad_id_of
from probes.sites import Site
from steering.replay import Pass

ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative error of a logit vector for a shortened pass; 0.05 in half precision."""

PADDING = 0.05
"""Pads a batch may hold, as a share of its real tokens."""


class Runs:
    """Prompts of one model, batched by length in chunks that never change, so that a run with the
    same values put in gives the same bits.

    Whole prompts are padded on the left. What follows a shared beginning is padded on the right:
    pads between the two would use up the window of attention that looks back so many tokens.
    """

    def __init__(
        self,
        model: HookedModel,
        ids: Sequence[Sequence[int]],
        *,
        shared: int = 0,
        resume: bool = False,
        rows: int = 32,
    ) -> None:
        if (shared or resume) and not isinstance(model.engine, HookEngine):
            raise ValueError(f"the {model.engine.name} engine makes whole passes only")
        self.model, self.ids, self.shared, self.rows = model, [tuple(i) for i in ids], shared, rows
        self.resume = resume
        self.chunks = _chunks([len(i) - shared for i in ids], rows)
        self._pass = Pass(model) if resume else None
        self._clean: Prefix | None = None

    def read(self, sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
        """Activations of each prompt, `[token, ...]` on the CPU in the model's dtype."""
        found: dict[Site, list[Tensor]] = {s: [torch.empty(0)] * len(self.ids) for s in sites}
        prefix = self._prefix(sites) if self.shared else None
        for chunk in self.chunks:
            batch = self._batch(chunk)
            engine: Any = self.model.engine
            more = {} if prefix is None else {"prefix": prefix}
            for site, h in engine.read(batch, sites, **more).items():
                for row, i in zip(h.cpu(), chunk, strict=True):
                    own = row[self._at(i, len(row))]
                    if prefix is not None:
                        own = torch.cat([prefix.reads[site][0].cpu(), own])
                    found[site][i] = own.clone()
        return found

    def logits(
        self,
        jobs: Sequence[Job],
        first: int = 0,
        hidden: Sequence[Tensor] | None = None,
        *,
        prefixes: dict[int, Prefix] | None = None,
        fresh: bool = False,
    ) -> Float[Tensor, "job vocab"]:
        """Last-token logits of each row, float32 on the CPU.

        Nothing below block `first` may be written; `hidden` is what enters it in the unpatched run
        of every prompt. With `fresh` the common beginning runs again although nothing is written
        there: the weights are others now. `prefixes` keeps beginnings from one call to the next.
        """
        batch = self._batch([job.prompt for job in jobs])
        engine: Any = self.model.engine
        resumes = self.resume and first > 0 and hidden is not None
        with ExitStack() as stack:
            more: dict[str, Any] = {}
            if self.shared:
                more["prefix"] = self._joined(
                    jobs, first, hidden if resumes else None, fresh, prefixes
                )
            if resumes:
                assert hidden is not None
                entering = self._entering(batch, jobs, hidden)
                stack.enter_context(self._skipping(first, entering))
            stack.enter_context(self.model.edit(self._edits(batch, jobs)))
            ends = torch.tensor([len(self.ids[job.prompt]) - self.shared for job in jobs])
            pads = batch.ids.shape[1] - ends if self.shared else torch.zeros_like(ends)
            last = int(pads.max()) + 1
            found = engine.logits(batch, last, **more)
            found = found[torch.arange(len(jobs)), last - 1 - pads]
        return found.float().cpu()

    def activations(
        self,
        jobs: Sequence[Job],
        sites: Sequence[Site],
        first: int = 0,
        hidden: Sequence[Tensor] | None = None,
    ) -> dict[Site, list[Tensor]]:
        """Activations of each row with its values put in, `[token, ...]` on the CPU.

        `first` and `hidden` as in `logits`; a shared beginning is not supported.
        """
        if self.shared:
            raise ValueError("runs that share a beginning give logits only: open them without")
        batch = self._batch([job.prompt for job in jobs])
        with ExitStack() as stack:
            if self.resume and first > 0 and hidden is not None:
                entering = self._entering(batch, jobs, hidden)
                stack.enter_context(self._skipping(first, entering))
            stack.enter_context(self.model.edit(self._edits(batch, jobs)))
            found = self.model.engine.read(batch, sites)
        return {
            site: [
                row[self._at(job.prompt, len(row))].clone()
                for row, job in zip(h.cpu(), jobs, strict=True)
            ]
            for site, h in found.items()
        }

    def generate(self, jobs: Sequence[Job], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers with the values put in while the prompt is read; whole passes."""
        whole = Runs(self.model, self.ids, rows=self.rows)
        batch = whole._batch([job.prompt for job in jobs])
        stops = self.model._stop_ids()
        with self.model.edit(whole._edits(batch, jobs, "prompt")):
            out = self.model.engine.generate(
                batch, max_new_tokens, stops, pad_id_of(self.model.tokenizer)
            )
        found = []
        for ids in out.tolist():
            ends = [n for n, token in enumerate(ids) if token in stops]
            found.append(ids[: ends[0] + 1] if ends else ids)
        return found

    def error(
        self, other: "Runs", jobs: Sequence[Job], first: int, hidden: Sequence[Tensor] | None
    ) -> float:
        """Largest relative difference of a row's logits from those of `other`, whole passes."""
        found = self.logits(jobs, first, hidden, fresh=True).double()
        want = other.logits(jobs).double()
        error = (found - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)
        return float(error.nan_to_num(torch.inf).max())

    def _batch(self, prompts: Sequence[int]) -> Batch:
        tails = [self.ids[i][self.shared :] for i in prompts]
        side = "right" if self.shared else "left"
        return pad(tails, pad_id_of(self.model.tokenizer), side).to(self.model.device)

    def _at(self, prompt: int, width: int) -> slice:
        """Columns of a batch so wide in which a prompt stands, after what is shared."""
        length = len(self.ids[prompt]) - self.shared
        return slice(0, length) if self.shared else slice(width - length, width)

    def _edits(self, batch: Batch, jobs: Sequence[Job], scope: str = "all") -> list[Edit]:
        width = batch.ids.shape[1]
        placed: list[tuple[int, int, Write]] = []
        for row, job in enumerate(jobs):
            start = self._at(job.prompt, width).start
            for write in job.writes:
                tail = write.between(self.shared, len(self.ids[job.prompt]))
                if tail is not None:
                    placed.append((row, start, tail))
        return edits_of(placed, scope)

    def _entering(self, batch: Batch, jobs: Sequence[Job], hidden: Sequence[Tensor]) -> Tensor:
        """What enters a block in the run of each job, padded as the batch is."""
        rows, width = batch.ids.shape
        padded = torch.zeros(rows, width, hidden[0].shape[-1], dtype=hidden[0].dtype)
        for row, job in enumerate(jobs):
            padded[row, self._at(job.prompt, width)] = hidden[job.prompt][self.shared :]
        return padded.to(batch.ids.device)

    def _skipping(self, first: int, entering: Tensor) -> AbstractContextManager[None]:
        assert self._pass is not None
        return self._pass._skipping(first, entering)

    def _prefix(self, sites: Sequence[Site]) -> Prefix:
        engine = self.model.engine
        assert isinstance(engine, HookEngine)
        ids = torch.tensor(self.ids[0][: self.shared], device=self.model.device)
        return engine.prefix(ids, sites)

    def _complete(self, edits: Sequence[Edit] = ()) -> Prefix:
        """The common beginning with keys and values of every block."""
        with self.model.edit(edits):
            return self._prefix([Site(self.model.n_layers - 1, "resid_post")])

    def _joined(
        self,
        jobs: Sequence[Job],
        first: int,
        hidden: Sequence[Tensor] | None,
        fresh: bool,
        made: dict[int, Prefix] | None,
    ) -> Prefix:
        """The beginning that goes before each row, patched as its patch says."""
        clean = self._clean = self._clean or self._complete()
        made = {} if made is None else made
        for job in jobs:
            if job.patch not in made:
                made[job.patch] = self._patched(clean, job, first, hidden, fresh)
        kinds = list(dict.fromkeys(job.patch for job in jobs))
        if len(kinds) == 1:
            return made[kinds[0]]
        cache: Any = copy.copy(clean.cache)
        cache.layers = [
            _stacked([made[job.patch].cache.layers[i] for job in jobs])
            for i in range(len(clean.cache.layers))
        ]
        return Prefix(clean.ids, cache, {})

    def _patched(
        self,
        clean: Prefix,
        job: Job,
        first: int,
        hidden: Sequence[Tensor] | None,
        fresh: bool,
    ) -> Prefix:
        inside = [write.between(0, self.shared) for write in job.writes]
        placed = [(0, 0, write) for write in inside if write is not None]
        if not placed and not fresh:
            return clean
        with ExitStack() as stack:
            if hidden is not None:
                entering = hidden[job.prompt][None, : self.shared].to(self.model.device)
                stack.enter_context(self._skipping(first, entering))
            made = self._complete(edits_of(placed))
        if hidden is not None:  # blocks that passed on kept nothing
            made.cache.layers[:first] = clean.cache.layers[:first]
        return made


def _stacked(layers: Sequence[Any]) -> Any:
    """One cache layer with a row for each of these; equal ones stay one row."""
    if all(layer is layers[0] for layer in layers):
        return layers[0]
    joined = copy.copy(layers[0])
    joined.keys = torch.cat([layer.keys for layer in layers])
    joined.values = torch.cat([layer.values for layer in layers])
    return joined


def _chunks(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Prompts in batches of nearly one length: other patches fill a small batch, pads would not."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        own = [*found[-1], i] if found else []
        real = sum(lengths[k] for k in own)
        if not own or len(own) > rows or len(own) * lengths[i] - real > PADDING * real:
            found.append([i])
        else:
            found[-1] = own
    return found


def common(ids: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; each keeps a last token of its own."""
    if len(ids) < 2:
        return 0
    shortest = min(len(row) for row in ids) - 1
    same = [len({row[k] for row in ids}) == 1 for k in range(shortest)]
    return (*same, False).index(False)


def shortened(model: HookedModel) -> bool:
    """Whether passes of this model may leave out what a patch cannot change: edits of the user's
    own would act twice where a block passes on what they made."""
    return isinstance(model.engine, HookEngine) and not model.engine.edited


def shareable(
    target: Sequence[Sequence[int]],
    source: Sequence[Sequence[int]],
    pairs: Sequence[Mapping[int, int]],
) -> int:
    """How much of the target prompts' common beginning gets the same values in every prompt."""
    bound, known = common(target), common(source)
    for token in range(bound):
        found = {pair.get(token) for pair in pairs}
        if len(found) > 1 or any(s is not None and s >= known for s in found):
            return token
    return bound
