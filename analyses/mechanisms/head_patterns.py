"""Where heads look: attention to the token itself, the one before, the first, and named places."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken
from analyses.mechanisms import reading
from analyses.mechanisms.task import Task
from analyses.patching.figure import heat_map
from analyses.patching.metrics import mean_interval
from analyses.patching.runs import Runs
from probes.model import HookedModel
from probes.prompts import Rendered
from probes.results import Result
from probes.sites import Site, Unsupported

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ALWAYS = ("self", "previous", "first", "entropy")
"""Measures that need no place."""


@dataclass(frozen=True)
class HeadPatterns(Result):
    """Attention of every head on a task's prompts, from one token or averaged over all."""

    model: str
    task: str
    query: str
    """The token that looks: "last", a place of the task, or "all"."""
    measures: tuple[str, ...]
    """`ALWAYS`, then the task's places as "to NAME"."""
    values: Float[Tensor, "measure layer head limit"]
    """Mean over prompts, lower and upper limit of its 95 % BCa interval over topics. Probabilities
    0 to 1, the entropy over its largest possible value log(tokens seen), 0 to 1. NaN where there is
    no such head."""
    uniform: Float[Tensor, " measure"]
    """The same if every head looked at all tokens alike: the level to hold a head against."""
    topics: tuple[str, ...]
    notes: tuple[str, ...]

    def frame(self) -> "pd.DataFrame":
        """One row a head."""
        import pandas as pd

        rows = []
        for layer, head in self.values[0, ..., 0].isfinite().nonzero().tolist():
            row: dict[str, float] = {"layer": layer, "head": head}
            for name, (value, low, high) in zip(
                self.measures, self.values[:, layer, head].tolist(), strict=True
            ):
                row |= {name: value, f"{name} low": low, f"{name} high": high}
            rows.append(row)
        return pd.DataFrame(rows)

    def strongest(self, measure: str, n: int = 5) -> tuple[str, ...]:
        """The heads with the largest mean of a measure, as `layer.head`."""
        values = self._row(measure).nan_to_num(-1.0)
        order = values.flatten().topk(min(n, values.numel())).indices.tolist()
        return tuple("{}.{}".format(*divmod(i, values.shape[1])) for i in order)

    def plot(self, ax: "Axes | None" = None, measure: str = "previous") -> "Axes":
        """One measure of every head, less what looking at all tokens alike would give."""
        values = self._row(measure)
        level = self.uniform[self.measures.index(measure)]
        what = "entropy over its maximum" if measure == "entropy" else f"attention, {measure}"
        return heat_map(
            ax,
            values - level,
            layers=range(len(values)),
            columns=[str(h) for h in range(values.shape[1])],
            xlabel="head",
            label=f"{what}, less uniform attention's",
            title=broken(f"{self.task}: heads of {self.model}, from {self.query}"),
        )

    def _row(self, measure: str) -> Tensor:
        if measure not in self.measures:
            raise ValueError(f"measure {measure!r}: choose one of {', '.join(self.measures)}")
        return self.values[self.measures.index(measure), ..., 0]

    def __str__(self) -> str:
        found = [
            f"{m} {self.strongest(m, 1)[0]} ({float(self._row(m).nan_to_num(-1).max()):.2f})"
            for m in self.measures
            if m != "entropy"
        ]
        return f"{self.task}, {self.model}, from {self.query}: most to " + ", ".join(found)


def head_patterns(
    model: HookedModel,
    task: Task,
    *,
    query: str = "last",
    resamples: int = 2000,
    seed: int = 0,
) -> HeadPatterns:
    """Summaries of attention probabilities on the task's prompts.

    `query` is the token that looks: "last", a place of the task, or "all" for the mean over all
    tokens that have one before them. Patterns are read with eager attention, the only one that
    forms them. Attention to a place is the sum over its tokens; from "all", only tokens behind the
    place count.
    """
    clean, _ = task.rendered(model)
    layers = model.layout.supported("pattern")
    if not layers:
        raise ValueError(f"{model.name} has no attention heads: there are no patterns to read")
    most = max(model.layout.blocks[layer].heads["pattern"] for layer in layers)
    names = (*ALWAYS, *(f"to {place}" for place in task.places))
    shape = (len(names), model.n_layers, most, len(task))
    values = torch.full(shape, torch.nan, dtype=torch.float64)
    uniform = torch.zeros(len(names), len(task), dtype=torch.float64)
    at = None if query == "all" else reading.columns(task, clean, query)
    sites = [Site(layer, "pattern") for layer in layers]
    for i, found in _patterns(model, clean, sites):
        places = [rows[i] for rows in task.places.values()]
        rows = range(1, len(clean[i].ids)) if at is None else [at[i]]
        for site, pattern in found.items():
            summary = summarised(pattern, rows, places)
            values[:, site.layer, : summary.shape[1], i] = summary
        even = torch.tril(torch.ones(len(clean[i].ids), len(clean[i].ids), dtype=torch.float64))
        even = (even / even.sum(-1, keepdim=True))[:, None]
        uniform[:, i] = summarised(even, rows, places)[:, 0]
    limits = mean_interval(values, task.topics, resamples=resamples, seed=seed)
    return HeadPatterns(
        model=model.label,
        task=task.name,
        query=query,
        measures=names,
        values=torch.stack(list(limits), -1).float(),
        uniform=uniform.nanmean(-1).float(),
        topics=task.topics,
        notes=reading.few(task),
        record=reading.described([model], clean, {"task": task.name, "query": query}),
    )


def summarised(
    pattern: Float[Tensor, "query head key"],
    rows: Sequence[int],
    places: Sequence[Sequence[int]] = (),
) -> Float[Tensor, "measure head"]:
    """The measures of one prompt's pattern, averaged over the query tokens `rows`."""
    found = []
    for q in rows:
        p = pattern[q, :, : q + 1].double()
        log = torch.where(p > 0, p, torch.ones_like(p)).log()
        entropy = -(p * log).sum(-1)
        one = [
            p[:, q],
            p[:, q - 1] if q else torch.zeros_like(entropy),
            p[:, 0],
            entropy / torch.tensor(float(q + 1)).double().log() if q else torch.zeros_like(entropy),
        ]
        for tokens in places:
            seen = [t for t in tokens if t <= q] if len(rows) == 1 else [t for t in tokens if t < q]
            one.append(p[:, seen].sum(-1) if seen else torch.full_like(entropy, torch.nan))
        found.append(torch.stack(one))
    return torch.stack(found).nanmean(0)


@torch.no_grad()
def _patterns(model: HookedModel, rendered: Sequence[Rendered], sites: Sequence[Site]):
    """Prompt number and its patterns `[query, head, key]`, pads cut off."""
    runs = Runs(model, [r.ids for r in rendered], rows=8)
    for chunk in runs.chunks:
        batch = model.batch([rendered[i] for i in chunk])
        try:
            seen = model.engine.read(batch, sites)
        except (AttributeError, TypeError, IndexError) as error:
            raise Unsupported(
                f"the attention of {model.name} gave no patterns ({error}): load it with "
                "attn_implementation='eager', or with engine='transformer_lens'"
            ) from error
        for row, i in enumerate(chunk):
            start = batch.ids.shape[1] - len(rendered[i].ids)
            yield i, {s: h[row, start:, :, start:].cpu() for s, h in seen.items()}
