"""Passes in which a few heads are another run's and everything that mixes tokens is held.

With every mixer's output held at its clean value no token sees another. What a changed head does to
the inputs of higher heads, and to the logits, then happens at its own token alone: only tokens that
are both a sender's and a receiver's need to run, one beside the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.patching.patcher import HELD, Patcher
from analyses.patching.runs import ALLOWED, Job, Runs, Write
from probes.sites import Site

Senders = tuple[Site, ...]
"""Heads (or attention and MLP outputs) that take the source's values together."""

Row = tuple[int, int]
"""A set of senders and a prompt, by number."""


@dataclass(frozen=True)
class Values:
    """What is known of the clean and of the source run, `[token, ...]` of each prompt."""

    clean: Mapping[Site, list[Tensor]]
    source: Mapping[Site, list[Tensor]]

    def differs(self, senders: Senders, i: int) -> bool:
        """Whether any sender's value in a prompt differs in any bit."""
        for site in senders:
            part = Site(site.layer, site.part)
            changed = self.clean[part][i] != self.source[part][i]
            if bool((changed if site.head is None else changed[:, site.head]).any()):
                return True
        return False


class HeldRun:
    """The first run of path patching: senders changed, every other mixer held.

    `tokens` are those of each prompt that matter; in prompts without any nothing can arrive.
    """

    def __init__(
        self,
        patcher: Patcher,
        receivers: tuple[Site, ...],
        tokens: Sequence[tuple[int, ...]],
        freeze_mlps: bool,
    ) -> None:
        self.patcher, self.receivers, self.freeze_mlps = patcher, receivers, freeze_mlps
        self.tokens = tokens
        self.notes: tuple[str, ...] = ()
        self.whole: bool | None = None
        """Whether whole prompts run; None before it was tried."""
        self._index = {i: k for k, i in enumerate(i for i, t in enumerate(tokens) if t)}

    @property
    def top(self) -> int:
        """The highest block in which anything is read; their number for the logits."""
        return max((s.layer for s in self.receivers), default=self.patcher.model.n_layers)

    def values(self, parts: Sequence[Site]) -> Values:
        """Both runs' values of senders, beside the clean ones that are held."""
        more = self._sliced(parts, source=False)
        return Values({**self.clean, **more}, self._sliced(parts, source=True))

    def logits(
        self, rows: Sequence[Row], sets: Sequence[Senders], values: Values, first: int
    ) -> Iterator[Float[Tensor, " vocab"]]:
        """Last-token logits of each row."""
        for runs, jobs in self.jobs(rows, sets, values, first):
            yield from runs.logits(jobs, first, self._hidden(first))

    def inputs(
        self, rows: Sequence[Row], sets: Sequence[Senders], values: Values, first: int
    ) -> dict[Row, tuple[Write, ...]]:
        """The receivers' inputs in each row, as they are put into the second run."""
        heads: dict[Site, list[int | None]] = {}
        for site in self.receivers:
            if site.layer > first:
                heads.setdefault(Site(site.layer, site.part), []).append(site.head)
        found = {}
        left = iter(rows)
        for runs, jobs in self.jobs(rows, sets, values, first):
            read = runs.activations(jobs, list(heads), first, self._hidden(first))
            for k in range(len(jobs)):
                n, i = next(left)
                writes = []
                for site, named in heads.items():
                    h = read[site][k][list(self._places(i))]
                    own = tuple(x for x in named if x is not None)
                    if len(own) < len(named):
                        writes.append(Write(site, self.tokens[i], None, h))
                    else:
                        writes.append(Write(site, self.tokens[i], own, h[:, list(own)]))
                found[n, i] = tuple(writes)
        return found

    def jobs(
        self, rows: Sequence[Row], sets: Sequence[Senders], values: Values, first: int
    ) -> Iterator[tuple[Runs, list[Job]]]:
        """Batches in the order of the rows."""
        runs = self.runs
        for k in range(0, len(rows), runs.rows):
            some = rows[k : k + runs.rows]
            made = [
                Job(self._index[i], n, self._writes(sets[n], i, values, first)) for n, i in some
            ]
            yield runs, made

    def settle(self, sets: Sequence[Senders], values: Values, first: int) -> None:
        """Compare a run of the tokens that matter with one of whole prompts, at first use."""
        if self.whole is not None:
            return
        if not self.patcher.runs.resume:
            self.whole = True
            return
        rows = [
            (n, i)
            for n, senders in enumerate(sets)
            for i in self._index
            if values.differs(senders, i)
        ]
        if not rows:  # nothing to compare with yet
            return
        rows = [rows[0], rows[len(rows) // 2], rows[-1]]
        try:
            short, long = (self._trial(rows, sets, values, first, whole) for whole in (False, True))
            error = max(
                float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).max())
                for a, b in zip(short, long, strict=True)
            )
            said = f"relative error {error:.1e}"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as e:
            error, said = torch.inf, f"{type(e).__name__}: {e}".splitlines()[0][:200]
        self.whole = not error <= ALLOWED.get(self.patcher.model.dtype, 0.05)
        if self.whole:
            name = self.patcher.model.layout.architecture
            self.notes += (f"{name} cannot run single tokens with its mixers held ({said})",)

    def _trial(
        self,
        rows: Sequence[Row],
        sets: Sequence[Senders],
        values: Values,
        first: int,
        whole: bool,
    ) -> list[Tensor]:
        self.whole = whole
        try:
            if not self.receivers:
                return [h.double()[None] for h in self.logits(rows, sets, values, first)]
            noted = self.inputs(rows, sets, values, first)
            return [w.values.double().flatten(0, -2) for row in rows for w in noted[row]]
        finally:
            self.whole = None

    def _writes(self, senders: Senders, i: int, values: Values, first: int) -> tuple[Write, ...]:
        """Senders at the source's values, every other mixer (and MLP, if asked) at the clean
        ones."""
        tokens = self._places(i)
        by_part: dict[Site, list[int | None]] = {}
        for site in senders:
            by_part.setdefault(Site(site.layer, site.part), []).append(site.head)
        blocks = self.patcher.model.layout.blocks
        found = []
        if not first and not self.whole:  # no lower block passes on what enters
            site = Site(0, "resid_pre")
            found.append(Write(site, tokens, None, values.clean[site][i]))
        for layer in range(first, min(self.top, len(blocks))):
            heads, mixer, mlp = (Site(layer, p) for p in ("head_out", "attn_out", "mlp_out"))
            if heads in by_part:
                new = values.clean[heads][i].clone()
                for head in by_part[heads]:
                    at = slice(None) if head is None else head
                    new[:, at] = values.source[heads][i][:, at]
                found.append(Write(heads, tokens, None, new))
            if mixer in by_part:
                found.append(Write(mixer, tokens, None, values.source[mixer][i]))
            elif heads not in by_part:
                found.append(Write(mixer, tokens, None, values.clean[mixer][i]))
            if mlp in by_part:
                found.append(Write(mlp, tokens, None, values.source[mlp][i]))
            elif self.freeze_mlps and "mlp_out" not in blocks[layer].refused:
                found.append(Write(mlp, tokens, None, values.clean[mlp][i]))
        return tuple(found)

    def _places(self, i: int) -> tuple[int, ...]:
        """Where the tokens that matter stand in a row."""
        return self.tokens[i] if self.whole else tuple(range(len(self.tokens[i])))

    @property
    def runs(self) -> Runs:
        return self._whole_prompts if self.whole else self._some_tokens

    @cached_property
    def _whole_prompts(self) -> Runs:
        ids = [self.patcher.ids[i] for i in self._index]
        return Runs(self.patcher.model, ids, rows=self.patcher.batch_size)

    @cached_property
    def _some_tokens(self) -> Runs:
        ids = [[self.patcher.ids[i][t] for t in self.tokens[i]] for i in self._index]
        fewer = sum(map(len, self.patcher.ids)) // max(1, sum(map(len, ids)))
        rows = self.patcher.batch_size * max(1, min(fewer, 16))
        return Runs(self.patcher.model, ids, resume=True, rows=rows)

    @cached_property
    def clean(self) -> dict[Site, list[Tensor]]:
        """Clean values of all that may be held, and of what enters each block."""
        sites = []
        for layer, block in enumerate(self.patcher.model.layout.blocks[: self.top]):
            sites += [Site(layer, "resid_pre"), Site(layer, "attn_out")]
            if self.freeze_mlps and "mlp_out" not in block.refused:
                sites.append(Site(layer, "mlp_out"))
        return self._sliced(sites, source=False)

    def _hidden(self, first: int) -> list[Tensor] | None:
        if self.whole or not first:
            return None
        entering = self.clean[Site(first, "resid_pre")]
        return [entering[i] for i in self._index]

    def _sliced(self, sites: Sequence[Site], *, source: bool) -> dict[Site, list[Tensor]]:
        """Values at the tokens that matter, a few sites read at a time."""
        patcher = self.patcher
        at = [list(own) for own in self.tokens]
        if source:
            pairs = zip(patcher.alignment.target, self.tokens, strict=True)
            at = [[aligned.index(t) for t in own] for aligned, own in pairs]
        size = sum(map(len, patcher.ids)) * patcher.model.d_model * 4
        each = max(1, HELD // max(1, size))
        found: dict[Site, list[Tensor]] = {}
        for k in range(0, len(sites), each):
            some = sites[k : k + each]
            read = patcher.values.at(some) if source else patcher.runs.read(some)
            for site in some:
                found[site] = [h[own].clone() for h, own in zip(read[site], at, strict=True)]
        return found
