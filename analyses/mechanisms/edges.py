"""Edge attribution patching: what one component's output does through one reader's input.

The score of an edge from a writer u (the embeddings, a head, an MLP) to a reader v (the query, key
or value input of a head, an MLP's input, the logits) is

    sum over tokens of (source - target output of u) . (gradient of the metric at the input of v),

all edges of a layer of readers at once (EAP: Syed, Rager and Conmy 2023, arXiv 2310.10348; with the
gradient averaged on the way between the embeddings, EAP-IG: Hanna et al. 2024, arXiv 2403.17806).

The gradient is that of the residual stream entering the reader *before* its norm, so that the
norm's Jacobian at the run is part of it. Two sums hold exactly, whatever the model: over all
writers into a reader, the change of the stream there times its gradient; with "gradient", over all
readers of a writer, the writer's own attribution score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken
from analyses.mechanisms.edge_graph import Graph, graph_scores
from analyses.mechanisms.gradients import Slopes, midpoints
from analyses.patching import metrics
from analyses.patching.figure import heat_map
from analyses.patching.metrics import Metric
from analyses.patching.patch import few
from analyses.patching.patcher import Patcher
from analyses.patching.sources import From, Resampled, Source
from probes.model import HookedModel
from probes.progress import progress as show
from probes.prompts import Prompt
from probes.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLUMNS = 4096
"""Edges whose intervals are computed together."""


@dataclass(frozen=True)
class EdgeScores(Result):
    """Estimated change of a metric through every edge between two components."""

    writers: tuple[str, ...]
    """"embedding", `layer.head_out.head`, `layer.mlp_out`, in forward order."""
    readers: tuple[str, ...]
    """`layer.q.head`, `layer.k.head`, `layer.v.head`, `layer.mlp`, "logits", in forward order."""
    method: str
    """"gradient" (EAP) or "inputs" (EAP-IG)."""
    steps: int
    origin: str
    metric: str
    unit: str
    target: Float[Tensor, " prompt"]
    """The metric of the target run."""
    source: Float[Tensor, " prompt"]
    score: Float[Tensor, "writer reader"]
    """Mean over prompts, in the metric's unit; positive: taking the source's output along this
    edge alone raises the metric. NaN where the reader does not come behind the writer."""
    low: Float[Tensor, "writer reader"]
    high: Float[Tensor, "writer reader"]
    """95 % BCa limits over topics, each edge by itself."""
    null: Float[Tensor, "writer reader"]
    """Mean scores with the values of other topics' prompts; NaN throughout without a null."""
    notes: tuple[str, ...]

    @property
    def null_95(self) -> float:
        """95th percentile of the absolute null scores of all edges; NaN without a null."""
        found = self.null[self.null.isfinite()].double().abs()
        if not len(found):
            return float("nan")
        return float(found.sort().values[int(0.95 * (len(found) - 1) + 0.5)])

    @property
    def claimed(self) -> Tensor:
        """`[writer, reader]`: whether the interval excludes the null's 95th percentile."""
        return (self.low > self.null_95) | (self.high < -self.null_95)

    def best(self, n: int = 1) -> tuple[tuple[str, str], ...]:
        """Writer and reader of the largest absolute scores, largest first."""
        flat = self.score.abs().nan_to_num(-1.0).flatten()
        order = flat.argsort(descending=True, stable=True)[:n].tolist()
        width = len(self.readers)
        return tuple((self.writers[k // width], self.readers[k % width]) for k in order)

    def frame(self) -> "pd.DataFrame":
        """One row an edge that exists, largest absolute score first."""
        import pandas as pd

        u, v = self.score.isfinite().nonzero().T
        order = self.score[u, v].abs().argsort(descending=True, stable=True)
        u, v = u[order], v[order]
        return pd.DataFrame(
            {
                "writer": [self.writers[i] for i in u.tolist()],
                "reader": [self.readers[i] for i in v.tolist()],
                "score": self.score[u, v].tolist(),
                "low": self.low[u, v].tolist(),
                "high": self.high[u, v].tolist(),
                "claimed": self.claimed[u, v].tolist(),
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Scores added up by the layer that writes and the layer that reads."""
        rows = [_layer(name) for name in self.readers]
        columns = [_layer(name) for name in self.writers]
        ys, xs = list(dict.fromkeys(rows)), list(dict.fromkeys(columns))
        grid = torch.full((len(ys), len(xs)), torch.nan)
        y, x = (
            torch.tensor([known.index(n) for n in names])
            for known, names in ((ys, rows), (xs, columns))
        )
        for i in range(len(ys)):
            for j in range(len(xs)):
                block = self.score[x == j][:, y == i]
                if bool(block.isfinite().any()):
                    grid[i, j] = block.nan_to_num(0.0).sum()
        unit = f" ({self.unit})" if self.unit else ""
        ax = heat_map(
            ax,
            grid,
            layers=range(len(ys)),
            columns=xs,
            xlabel="layer that writes",
            label=f"estimated change of {self.metric}{unit}",
            title=broken(f"Edges ({self.method}) from {self.origin}"),
        )
        step = max(1, len(ys) // 10)
        ax.set_yticks([*range(0, len(ys) - 1, step), len(ys) - 1], [*ys[:-1:step], ys[-1]])
        ax.set_ylabel("layer that reads")
        return ax

    def __str__(self) -> str:
        if bool((self.score.nan_to_num(0.0) == 0).all()):
            return "edges: source and target are equal, every score is exactly 0"
        (u, v), n = self.best()[0], int(self.score.isfinite().sum())
        i, j = self.writers.index(u), self.readers.index(v)
        said = (
            f"{n} edges ({self.method}): {u} to {v} is estimated to change {self.metric} most, by "
            f"{float(self.score[i, j]):+.3g} [{float(self.low[i, j]):.3g}, "
            f"{float(self.high[i, j]):.3g}]"
        )
        said += f" {self.unit}" if self.unit else ""
        if bool(self.null.isfinite().any()):
            said += f"; null at most {self.null_95:.2g}, {int(self.claimed.sum())} edges beyond it"
        return said


def edge_scores(
    model: HookedModel,
    prompts: Sequence[Prompt],
    source: Source,
    metric: "Metric | str",
    *,
    method: str = "gradient",
    steps: int = 8,
    topics: Sequence[str] | None = None,
    null: bool = True,
    resamples: int = 1000,
    batch_size: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> EdgeScores:
    """Scores of all edges between prompts and source prompts with as many tokens.

    `method` "gradient" takes the gradient at the target run, "inputs" its mean over `steps`
    midpoints on the way to the source's embeddings. The null repeats everything with the source
    values of other topics' prompts. Refused are models whose attention output passes a norm before
    it joins the stream, since heads then do not add to it one by one, and models whose blocks add
    a third term. Needs the plain engine.
    """
    if method not in ("gradient", "inputs"):
        raise ValueError(f"method={method!r}: choose 'gradient' or 'inputs'")
    if not isinstance(source, From):
        raise ValueError(
            "edge scores compare with a source run: give From(prompts=...) or From(model=...)"
        )
    patcher = Patcher(model, prompts, source, "all", shorten=False)
    slopes = Slopes(model, patcher.ids, batch_size)
    graph = Graph(model, patcher.values.model)
    topics = tuple(topics) if topics is not None else tuple(str(i) for i in range(len(prompts)))
    read = patcher.metric(metric)
    target, other = patcher.ends(read)
    notes = few(topics) + graph.notes
    alphas = [0.0] if method == "gradient" else midpoints(steps)
    shuffled = null and len(set(topics)) > 1
    if null and not shuffled:
        notes += ("No null was drawn: it needs prompts of two topics.",)
    with show(
        len(prompts) * (1 + shuffled), f"attributing edges of {model.label}", progress
    ) as advance:
        scores = graph_scores(patcher, slopes, graph, read, alphas, advance)
        wrong = torch.full_like(scores[0], torch.nan)
        if shuffled:
            drawn = patcher.with_source(Resampled(source, topics, seed), "all")
            wrong = graph_scores(drawn, slopes, graph, read, alphas, advance).mean(0)
    flat = scores.flatten(1).T
    limits = [
        metrics.mean_interval(part, topics, resamples=resamples, seed=seed)
        for part in flat.split(COLUMNS)
    ]
    value, low, high = (
        torch.cat([part[k] for part in limits]).reshape(scores.shape[1:]).float() for k in range(3)
    )
    name, unit = metrics.named(read)
    return EdgeScores(
        writers=graph.writers,
        readers=graph.readers,
        method=method,
        steps=len(alphas),
        origin=patcher.said,
        metric=name,
        unit=unit,
        target=target.float(),
        source=other.float(),
        score=value,
        low=low,
        high=high,
        null=wrong.float(),
        notes=notes,
        record=patcher.record({"method": method, "steps": steps, "seed": seed}),
    )


def _layer(name: str) -> str:
    return name.partition(".")[0].replace("embedding", "emb.")
