"""The components that write to the residual stream and those that read it, and their edges."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.mechanisms.gradients import Slopes, Tape, mixed, summed
from analyses.mechanisms.nodes import INPUT
from analyses.patching.metrics import Metric
from analyses.patching.patcher import Patcher
from probes.layout import Layout
from probes.model import HookedModel
from probes.results import check_finite
from probes.sites import Site, Unsupported
from steering.writers import Writers

SUMS = 0.02
"""Largest relative difference between the writers' summed changes and that of the last stream."""


class Graph:
    """Writers and readers of one model, and the maps by which heads write."""

    def __init__(self, model: HookedModel, source: HookedModel) -> None:
        self.layout: Layout = model.layout
        self.out = self._maps(model)
        self.source_out = self.out if source is model else self._maps(source)
        heads, n = self.layout.blocks, self.layout.n_layers
        self.notes: tuple[str, ...] = ()
        writers, readers = ["embedding"], []
        before: list[int] = []
        """Number of writers that come before each reader."""
        self.sites = [INPUT]
        for layer, block in enumerate(heads):
            inner = len(writers)
            for part in ("q", "k", "v"):
                self.layout.check(Site(layer, part))
                readers += [f"{layer}.{part}.{h}" for h in range(block.heads[part])]
            before += [inner] * (len(readers) - len(before))
            writers += [f"{layer}.head_out.{h}" for h in range(block.heads["head_out"])]
            self.sites.append(Site(layer, "head_out"))
            if "mlp_out" not in block.refused:
                sequential = "resid_mid" not in block.refused
                readers.append(f"{layer}.mlp")
                before.append(len(writers) if sequential else inner)
                writers.append(f"{layer}.mlp_out")
                self.sites.append(Site(layer, "mlp_out"))
        readers.append("logits")
        before.append(len(writers))
        self.writers, self.readers, self.before = tuple(writers), tuple(readers), tuple(before)
        self.last = Site(n - 1, "resid_post")
        self.taps = [
            Site(layer, part)
            for layer, block in enumerate(heads)
            for part in ("resid_pre", "q", "k", "v", "resid_mid", "mlp_out")
            if part not in block.refused
        ] + [self.last]

    def _maps(self, model: HookedModel) -> list[Float[Tensor, "head width d_model"]]:
        """What each head writes per unit of its output."""
        found, writers = [], Writers(model.model, model.layout)
        for layer, block in enumerate(model.layout.blocks):
            model.layout.check(Site(layer, "head_out"))
            here, joins = block.points["head_out"], block.points["attn_out"]
            inside = joins.path in (here.path, block.attention)
            normed = not inside and any(
                True for _ in model.model.get_submodule(joins.path).parameters()
            )
            if normed or not block.sums:
                why = (
                    f"passes {joins.path} before it joins the stream"
                    if block.sums
                    else "is not all that its blocks add beside the MLP"
                )
                raise Unsupported(
                    f"the attention output of layer {layer} of {model.name} {why}, so heads do not "
                    "add to the stream one by one: use attribute() on heads instead"
                )
            writer = writers.attention(layer)
            W = getattr(writer.module, writer.weight).detach()
            W = W if writer.axis else W.T
            split = here.split
            assert split is not None
            found.append((joins.scale * W.float()).reshape(split.n_heads, split.width, -1).cpu())
        return found

    def written(
        self, values: dict[Site, Tensor], maps: Sequence[Tensor]
    ) -> Float[Tensor, "writer token d_model"]:
        """What every writer adds to the stream of one prompt."""
        rows = []
        for site in self.sites:
            h = values[site].float()
            if site.part == "head_out":
                rows.append(torch.einsum("thw,hwd->htd", h, maps[site.layer]))
            else:
                rows.append(h[None])
        return torch.cat(rows)

    def check_sum(
        self, writers: Float[Tensor, "writer token d_model"], stream: Float[Tensor, "token d_model"]
    ) -> None:
        """Refuse a model in which the stream changes by something that no writer here writes."""
        missing = float(
            (writers.sum(0) - stream.float()).norm() / stream.float().norm().clamp(min=1e-30)
        )
        if bool(stream.any()) and missing > SUMS:
            raise Unsupported(
                f"the changes of embeddings, heads and MLPs leave {missing:.0%} of the stream's change "
                "unexplained (biases that differ between checkpoints, or a part of the block that is "
                "not read): use attribute() instead"
            )

    def entering(self, tape: Tape, value: Float[Tensor, ""]) -> Iterator[tuple[int, int, Tensor]]:
        """First reader, number of writers before, and gradients at the inputs, layer by layer."""
        grads = tape.gradients(value, self.taps, again=True)
        at = 0
        for layer, block in enumerate(self.layout.blocks):
            stream = tape.taps[Site(layer, "resid_pre")]
            found = []
            for part in ("q", "k", "v"):
                site = Site(layer, part)
                for head in range(block.heads[part]):
                    only = torch.zeros_like(grads[site])
                    only[:, :, head] = grads[site][:, :, head]
                    found.append(_through(tape.taps[site], stream, only))
            yield at, self.before[at], torch.stack(found)
            at += len(found)
            if (mlp := Site(layer, "mlp_out")) in tape.taps:
                middle = tape.taps.get(Site(layer, "resid_mid"), stream)
                yield at, self.before[at], _through(tape.taps[mlp], middle, grads[mlp])[None]
                at += 1
        yield at, self.before[at], grads[self.last][None]


def _through(output: Tensor, stream: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at the stream through this output alone."""
    (found,) = torch.autograd.grad(output, stream, gradient, retain_graph=True)
    return found


def graph_scores(
    patcher: Patcher,
    slopes: Slopes,
    graph: Graph,
    metric: Metric,
    alphas: Sequence[float],
    advance: Callable[[int], None],
) -> Float[Tensor, "prompt writer reader"]:
    """Scores of every prompt, NaN where there is no edge."""
    size = (len(patcher.ids), len(graph.writers), len(graph.readers))
    found = torch.full(size, torch.nan)
    sites = [*graph.sites, graph.last]
    own, given = patcher.runs.read(sites), patcher.values.at(sites)
    for chunk in slopes.chunks:
        changes = []
        for i in chunk:
            at = list(patcher.alignment.target[i])
            mine = graph.written({s: rows[i][at] for s, rows in own.items()}, graph.out)
            theirs = graph.written({s: rows[i] for s, rows in given.items()}, graph.source_out)
            whole = torch.zeros(len(mine), len(patcher.ids[i]), mine.shape[-1])
            whole[:, at] = theirs - mine
            graph.check_sum(whole[:, at], given[graph.last][i] - own[graph.last][i][at])
            changes.append(whole)
        for alpha in alphas:
            placed = [
                (r, slopes.columns(chunk, r, patcher.alignment.target[i]), given[INPUT][i])
                for r, i in enumerate(chunk)
            ]
            edits = [mixed(INPUT, placed, alpha)] if alpha else []
            tape = slopes.tape(chunk, graph.taps, edits)
            value = summed(metric, tape, patcher.target_logits, patcher.texts)
            for first, n, gradients in graph.entering(tape, value):
                for r, i in enumerate(chunk):
                    length = len(patcher.ids[i])
                    G = gradients[:, r, gradients.shape[2] - length :].float().cpu()
                    check_finite(G, f"the gradient at {graph.readers[first]} of prompt {i}")
                    score = torch.einsum("utd,vtd->uv", changes[r][:n], G) / len(alphas)
                    into = found[i, :n, first : first + len(G)]
                    found[i, :n, first : first + len(G)] = into.nan_to_num(0.0) + score
        advance(len(chunk))
    return found
