"""Runs with the values of a path put in, for many senders one after the other."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.mechanisms.path_inputs import HeldRun, Row, Senders, Values
from analyses.patching import metrics
from analyses.patching.cells import Cell, parts_of
from analyses.patching.metrics import Metric
from analyses.patching.patcher import TOGETHER, Patcher
from analyses.patching.runs import Job
from analyses.patching.spans import Indices, chosen, said
from probes.sites import Site

Where = str | Indices | None
"""A rule of `probes.positions`, token indices of each prompt, or every aligned token."""


class Paths:
    """Runs of a target with one path patched: from senders to receivers through MLPs alone.

    Wang et al. 2022, appendix B; Goldowsky-Dill et al. 2023. First the clean run is made with the
    senders at the source's values and every other mixer held, and the receivers' inputs are noted;
    then the clean run is made with these inputs put in, everything above computed anew. Without
    receivers the logits of the first run are the answer. With `freeze_mlps` MLPs are held too.
    """

    def __init__(
        self,
        patcher: Patcher,
        receivers: tuple[Site, ...],
        *,
        senders_at: Where = None,
        receivers_at: Where = None,
        freeze_mlps: bool = False,
    ) -> None:
        for site in receivers:
            if site.part not in ("q", "k", "v"):
                raise ValueError(
                    f"{site} cannot receive a path: name q, k or v of heads, or 'logits'"
                )
        self.patcher, self.receivers, self.freeze_mlps = patcher, receivers, freeze_mlps
        self.senders_at, self.receivers_at = senders_at, receivers_at
        sent = patcher._tokens(Cell((), senders_at))
        at = (receivers_at or "all") if receivers else "last"
        read = [chosen(at, r, i) for i, r in enumerate(patcher.rendered)]
        self.tokens = [tuple(sorted(set(s) & set(r))) for s, r in zip(sent, read, strict=True)]
        """Tokens of each prompt at which a sender's change reaches a receiver."""
        patcher.settled()
        patcher.alike([self.tokens])
        self.held = HeldRun(patcher, receivers, self.tokens, freeze_mlps)
        self._entered: tuple[int, list[Tensor]] | None = None

    @property
    def top(self) -> int:
        """The highest block in which anything is read; their number for the logits."""
        return self.held.top

    @property
    def notes(self) -> tuple[str, ...]:
        return self.held.notes

    def check(self, senders: Senders) -> None:
        """Refuse senders and receivers between which there is no path."""
        lowest = min(s.layer for s in senders)
        for sender in senders:
            if sender.part not in ("head_out", "attn_out", "mlp_out"):
                raise ValueError(
                    f"{sender} cannot send: name heads (head_out), attn_out or mlp_out"
                )
            if sender.layer >= self.top:
                raise ValueError(
                    f"sender {sender} lies in or above the highest receiver's layer {self.top}: "
                    "a path runs upwards, so name senders in lower layers"
                )
        for receiver in self.receivers:
            if receiver.layer <= lowest:
                raise ValueError(
                    f"receiver {receiver} lies in or below the lowest sender's layer {lowest}: a "
                    "path runs upwards, so name receivers in higher layers"
                )

    def measure(
        self,
        sets: Sequence[Senders],
        metric: Metric,
        *,
        folder: Path | str | None = None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Float[Tensor, "set prompt"]:
        """The metric with the path from each set of senders patched; float64.

        `folder` keeps finished layers, by the lowest sender: the same call goes on."""
        patcher = self.patcher
        about = (self.receivers, self.senders_at, self.receivers_at, self.freeze_mlps)
        kept = patcher.kept(folder, [Cell(s) for s in sets], metric, about)
        found = torch.full((len(sets), len(patcher.ids)), torch.nan, dtype=torch.float64)
        layers: dict[int, list[int]] = {}
        for n, senders in enumerate(sets):
            layers.setdefault(min(s.layer for s in senders), []).append(n)
        before = {layer: kept.read(layer) for layer in layers}
        left = [n for layer, own in layers.items() if before[layer] is None for n in own]
        values = self.held.values(parts_of(s for n in left for s in sets[n])) if left else None
        for layer in sorted(layers):
            own = layers[layer]
            done = before[layer]
            if done is None:
                assert values is not None
                rows = self._run([sets[n] for n in own], values)
                done = torch.stack([metrics.measured(metric, r, patcher.texts) for r in rows])
                kept.write(layer, done)
            found[own] = done
            advance(len(own))
        return found

    def logits(self, senders: Senders) -> Float[Tensor, "prompt vocab"]:
        """Last-token logits with the path from these senders patched."""
        self.check(senders)
        (found,) = self._run([senders], self.held.values(parts_of(senders)))
        return found

    def again(self, patcher: Patcher, receivers: tuple[Site, ...]) -> "Paths":
        """The same with another source or other receivers; what stays as it is is not read anew."""
        other = Paths(
            patcher, receivers, senders_at=self.senders_at, receivers_at=self.receivers_at,
            freeze_mlps=self.freeze_mlps,
        )  # fmt: skip
        other.held.whole = self.held.whole
        if (other.tokens, other.top) == (self.tokens, self.top):
            other.held.clean, other._entered = self.held.clean, self._entered
        return other

    def _run(
        self, sets: Sequence[Senders], values: Values
    ) -> Iterator[Float[Tensor, "prompt vocab"]]:
        """Logits of each set in turn; the lowest senders of all lie in one layer."""
        first = min(s.layer for s in sets[0])
        self.held.settle(sets, values, first)
        for k in range(0, len(sets), TOGETHER):
            some = sets[k : k + TOGETHER]
            rows = [
                (n, i)
                for n, senders in enumerate(some)
                for i, tokens in enumerate(self.tokens)
                if tokens and values.differs(senders, i)
            ]
            yield from self._answers(rows, some, values, first)

    def _answers(
        self, rows: Sequence[Row], sets: Sequence[Senders], values: Values, first: int
    ) -> list[Float[Tensor, "prompt vocab"]]:
        found = [self.patcher.target_logits.clone() for _ in sets]
        if not self.receivers:
            for (n, i), row in zip(rows, self.held.logits(rows, sets, values, first), strict=True):
                found[n][i] = row
            return found
        inputs = self.held.inputs(rows, sets, values, first)
        lowest = min((s.layer for s in self.receivers if s.layer > first), default=0)
        runs = self.patcher.runs
        prefixes = {}
        for chunk in runs.chunks:
            inside = [(n, i) for n, i in rows if i in chunk]
            for k in range(0, len(inside), self.patcher.batch_size):
                some = inside[k : k + self.patcher.batch_size]
                jobs = [Job(i, n, inputs[n, i]) for n, i in some]
                got = runs.logits(jobs, lowest, self._entering(lowest), prefixes=prefixes)
                for (n, i), row in zip(some, got, strict=True):
                    found[n][i] = row
        return found

    def _entering(self, layer: int) -> list[Tensor] | None:
        """What enters a block at every token, for the second run."""
        if not self.patcher.runs.resume or not layer:
            return None
        if self._entered is None or self._entered[0] != layer:
            site = Site(layer, "resid_pre")
            self._entered = layer, self.patcher.runs.read([site])[site]
        return self._entered[1]


def where_said(where: Where) -> str:
    """Positions in words."""
    return "all" if where is None else said(where)
