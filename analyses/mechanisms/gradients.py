"""Gradients of a metric with respect to activations, by one differentiable pass of a batch.

A tap is an edit that adds a zero which asks for a gradient: what flows on is the same, and what the
metric changes by per unit of the activation can be read there. Weights take no part, and nothing of
the model is touched but its hooks while a pass runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.patching import metrics
from analyses.patching.cells import parts_of
from analyses.patching.metrics import Metric
from analyses.patching.patcher import _every
from analyses.patching.runs import Runs
from probes.engines import Edit, Where
from probes.engines.hooks import HookEngine
from probes.model import HookedModel
from probes.prompts import Prompt
from probes.results import check_finite
from probes.sites import READ_ONLY, Site, Sites, Unsupported

TOKENS = 512
"""Most tokens of a differentiable pass, whose intermediate values are all held; a longer prompt
runs alone."""

Placed = tuple[int, Tensor, Tensor]
"""Row of a batch, columns, and the values `[column, ...]` that belong there."""


@dataclass(frozen=True)
class Tape:
    """One differentiable pass of a batch, padded on the left."""

    prompts: tuple[int, ...]
    """Which prompt each row is."""
    lengths: tuple[int, ...]
    """Tokens of each row's prompt."""
    logits: Float[Tensor, "row vocab"]
    """Last-token logits, float32 on the CPU, differentiable by the taps."""
    taps: dict[Site, Tensor]
    """Activations as they flow on, `[row, column, ...]`."""

    def gradients(
        self, value: Float[Tensor, ""], sites: Sequence[Site], *, again: bool = False
    ) -> dict[Site, Tensor]:
        """d value / d activation at each site, `[row, column, ...]`, through everything behind it;
        zero where the value does not depend on it. `again` keeps the pass for another call."""
        found = torch.autograd.grad(
            value, [self.taps[site] for site in sites], retain_graph=again, allow_unused=True
        )
        return {
            site: torch.zeros_like(self.taps[site]) if g is None else g
            for site, g in zip(sites, found, strict=True)
        }

    def unpadded(self, h: Tensor) -> list[Tensor]:
        """The tokens of each row's prompt, float32 on the CPU."""
        return [
            row[len(row) - n :].detach().float().cpu()
            for row, n in zip(h, self.lengths, strict=True)
        ]


class Slopes:
    """Differentiable runs of fixed prompts, in batches of nearly one length."""

    def __init__(self, model: HookedModel, ids: Sequence[Sequence[int]], rows: int = 8) -> None:
        if not isinstance(model.engine, HookEngine):
            raise ValueError(
                f"gradients need the plain engine and {model.name} uses {model.engine.name}: load "
                "it with engine='transformers'"
            )
        if model.model.training:
            raise ValueError(
                f"{model.name} is in training mode, where dropout changes values: call "
                "model.model.eval() first"
            )
        if rows < 1:
            raise ValueError(f"batch_size={rows}: give 1 or more")
        self.model, self.engine = model, model.engine
        self.runs = Runs(model, ids, rows=max(1, min(rows, TOKENS // max(map(len, ids)))))

    @property
    def chunks(self) -> list[list[int]]:
        """Prompts that run together."""
        return self.runs.chunks

    def tape(
        self, prompts: Sequence[int], sites: Sequence[Site], edits: Sequence[Edit] = ()
    ) -> Tape:
        """Run these prompts with `edits`, tapped at `sites` (without heads named) behind them."""
        taps: dict[Site, Tensor] = {}

        def tap(site: Site) -> Edit:
            def read(h: Tensor, _where: Where) -> Tensor:
                taps[site] = h + torch.zeros((), dtype=h.dtype, device=h.device).requires_grad_()
                return taps[site].clone()  # a block may add into what it is given

            return Edit(site, read)

        batch = self.runs._batch(prompts)
        with self.model.edit([*edits, *(tap(site) for site in sites)]):
            logits = self.engine.logits(batch, 1, gradients=True)[:, -1]
        lengths = tuple(len(self.runs.ids[i]) for i in prompts)
        return Tape(tuple(prompts), lengths, logits.float().cpu(), taps)

    def columns(self, prompts: Sequence[int], row: int, tokens: Sequence[int]) -> Tensor:
        """Columns of tokens of a row's prompt when these prompts run together."""
        width = max(len(self.runs.ids[i]) for i in prompts)
        return torch.tensor(tokens, dtype=torch.long) + width - len(self.runs.ids[prompts[row]])


def mixed(site: Site, placed: Sequence[Placed], alpha: float) -> Edit:
    """An edit that moves activations the share `alpha` of the way to the values given."""

    def put(h: Tensor, _where: Where) -> Tensor:
        new = h.clone()
        for row, columns, values in placed:
            at = columns.to(h.device)
            new[row, at] = h[row, at] + alpha * (values.to(h) - h[row, at])
        return new

    return Edit(site, put)


def midpoints(steps: int) -> list[float]:
    """Where a path from 0 to 1 is read by the midpoint rule, whose error falls as 1 / steps^2."""
    if steps < 1:
        raise ValueError(f"{steps} integration steps: give at least 1")
    return [(k + 0.5) / steps for k in range(steps)]


def summed(
    metric: Metric, tape: Tape, every: Float[Tensor, "prompt vocab"], texts: Sequence[str]
) -> Float[Tensor, ""]:
    """Sum of the metric over the rows of a pass.

    A metric takes the logits of all prompts and gives one number for each, so those of the other
    prompts stand in `every`; it must read a prompt's number off that prompt's logits alone.
    """
    index = torch.tensor(tape.prompts)
    logits = every.index_copy(0, index, tape.logits)
    metrics.measured(metric, logits.detach(), texts)  # refuses NaN and wrong shapes
    values = metric(logits)
    if not values.requires_grad:
        raise ValueError(
            f"the metric {metrics.named(metric)[0]!r} cannot be differentiated: compute it from "
            "the logits by torch operations, without detach() or argmax"
        )
    return values[index].double().sum()


def gradients(
    model: HookedModel,
    prompts: Sequence[Prompt],
    sites: Sites,
    metric: Metric,
    *,
    batch_size: int = 8,
) -> dict[Site, list[Float[Tensor, " token *width"]]]:
    """d metric / d activation of each prompt at each site and token, float32 on the CPU.

    In the metric's unit per unit of the activation, through everything behind the site. At a part
    with heads `[token, head, width]`, with the head named `[token, width]`. Needs the plain
    engine; edits in force on the model act.
    """
    chosen = model.sites(sites)
    refuse_read_only(chosen)
    rendered = model.template.render_all(prompts)
    texts = [r.text for r in rendered]
    slopes = Slopes(model, [r.ids for r in rendered], batch_size)
    every = _every(slopes.runs)
    parts = parts_of(chosen)
    found: dict[Site, list[Tensor]] = {s: [torch.empty(0)] * len(texts) for s in chosen}
    for chunk in slopes.chunks:
        tape = slopes.tape(chunk, parts)
        got = tape.gradients(summed(metric, tape, every, texts), parts)
        for site in chosen:
            rows = tape.unpadded(got[Site(site.layer, site.part)])
            for i, row in zip(chunk, rows, strict=True):
                check_finite(row, f"the gradient at {site} of prompt {i}")
                found[site][i] = row if site.head is None else row[:, site.head].clone()
    return found


def refuse_read_only(sites: Sequence[Site]) -> None:
    """Raise for parts that are derived from others and cannot be tapped."""
    for site in sites:
        if site.part in READ_ONLY:
            raise Unsupported(
                f"{site} can be read but has no gradient here: {site.part} is derived from other "
                "values; use q, k, v, head_out or a part of the stream instead"
            )
