"""Attribution patching: what a gradient says patching every site alone would do.

To first order a patch changes a metric by the difference of the activations times the metric's
gradient, so that one forward and backward pass a batch estimates every site at once (Nanda 2023;
Syed, Rager and Conmy 2023, arXiv 2310.10348). It is an estimate: where a softmax saturates or a
patch moves far it can be wrong in size and in sign. Measure it against `patch_map` on some prompts
(`Attribution.agreement`) before relying on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken
from analyses.mechanisms.agreement import Agreement, agreement
from analyses.mechanisms.gradients import Slopes, midpoints
from analyses.mechanisms.nodes import headed, moves, node_scores
from analyses.patching import metrics
from analyses.patching.cells import parts_of
from analyses.patching.figure import heat_map
from analyses.patching.grid import PatchMap, map_cells
from analyses.patching.metrics import Metric
from analyses.patching.patch import few, percentile
from analyses.patching.patcher import Patcher
from analyses.patching.sources import From, Resampled, Source
from analyses.patching.spans import Spans
from probes.model import HookedModel
from probes.positions import Positions
from probes.progress import progress as show
from probes.prompts import Prompt
from probes.results import Result
from probes.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

METHODS = ("gradient", "activations", "inputs")
"""Where the gradient is taken: at the target run; on the way from the target's to the source's
activations of one part of one layer; on the way from the target's to the source's embeddings."""


@dataclass(frozen=True)
class Attribution(Result):
    """First-order estimate of what patching each site alone does to a metric."""

    layers: tuple[int, ...]
    columns: tuple[str, ...]
    """Heads, or parts of a block."""
    kind: str
    """"heads" or "parts": what the columns are."""
    part: str
    method: str
    """One of `METHODS`."""
    steps: int
    """Points of the path at which the gradient was taken."""
    positions: str
    origin: str
    metric: str
    unit: str
    topics: tuple[str, ...]
    target: Float[Tensor, " prompt"]
    """The metric of the unpatched target run."""
    source: Float[Tensor, " prompt"]
    """The metric of the source run; NaN where there is none."""
    scores: Float[Tensor, "layer column prompt"]
    """Sum over aligned tokens of (source - target activation) x gradient, in the metric's unit:
    what the patch is estimated to add to the metric. NaN where the model has no such site."""
    score: Float[Tensor, "layer column"]
    """Mean over prompts."""
    low: Float[Tensor, "layer column"]
    high: Float[Tensor, "layer column"]
    """95 % BCa limits over topics, each site by itself."""
    null_score: Float[Tensor, " draw"]
    """Mean score at sites drawn at random with the values of other topics' prompts; may be empty.
    It shows what a typical site gets from a wrong partner, so it keeps what all sources share."""
    notes: tuple[str, ...]

    @property
    def null_95(self) -> float:
        """95th percentile of the null's absolute mean score; NaN without a null."""
        return percentile(self.null_score)

    @property
    def claimed(self) -> Tensor:
        """`[layer, column]`: whether the interval excludes the null's 95th percentile."""
        return (self.low > self.null_95) | (self.high < -self.null_95)

    def best(self, n: int = 1) -> tuple[tuple[int, str], ...]:
        """Layer and column of the largest absolute scores, largest first."""
        flat = self.score.abs().nan_to_num(-1.0).flatten()
        order = flat.argsort(descending=True, stable=True)[:n].tolist()
        width = len(self.columns)
        return tuple((self.layers[k // width], self.columns[k % width]) for k in order)

    def agreement(
        self,
        exact: PatchMap | Float[Tensor, "layer column prompt"],
        *,
        k: int = 10,
        resamples: int = 1000,
        seed: int = 0,
    ) -> Agreement:
        """How far these scores agree with patches really made, over sites (`agreement`).

        `exact` is a map of the same sites, or `exact_changes` of the same prompts: with these the
        interval resamples both sides together, with a map only the scores' topics.
        """
        return agreement(self, exact, k=k, resamples=resamples, seed=seed)

    def frame(self) -> "pd.DataFrame":
        """One row a site."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"layer": layer, self.kind.removesuffix("s"): column}
                | {name: float(getattr(self, name)[i, j]) for name in ("score", "low", "high")}
                | {"claimed": bool(self.claimed[i, j])}
                for i, layer in enumerate(self.layers)
                for j, column in enumerate(self.columns)
            ]
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Heat map in the metric's unit; dots mark what the null does not explain."""
        unit = f" ({self.unit})" if self.unit else ""
        ax = heat_map(
            ax,
            self.score,
            layers=self.layers,
            columns=self.columns,
            xlabel=f"head of {self.part}" if self.kind == "heads" else "part of the block",
            label=f"estimated change of {self.metric}{unit}",
            title=broken(
                f"Attribution ({self.method}) from {self.origin}"
                + ("; dots: told from the null" if bool(self.claimed.any()) else "")
            ),
        )
        at = self.claimed.nonzero()
        ax.plot(at[:, 1].numpy(), at[:, 0].numpy(), ls="", marker=".", ms=3, color="black")
        return ax

    def __str__(self) -> str:
        if bool((self.scores.nan_to_num(0.0) == 0).all()):
            return (
                f"attribution of {self.kind}: source and target are equal, every score is exactly 0"
            )
        layer, column = self.best()[0]
        i, j = self.layers.index(layer), self.columns.index(column)
        said = (
            f"attribution of {self.kind} ({self.method}): layer {layer}, {column} is estimated to "
            f"change {self.metric} most, by {float(self.score[i, j]):+.3g} "
            f"[{float(self.low[i, j]):.3g}, {float(self.high[i, j]):.3g}]"
        )
        said += f" {self.unit}" if self.unit else ""
        if len(self.null_score):
            said += f"; null at most {self.null_95:.2g}, {int(self.claimed.sum())} sites beyond it"
        return said


def attribute(
    model: HookedModel,
    prompts: Sequence[Prompt],
    source: Source,
    metric: "Metric | str",
    kind: str = "heads",
    *,
    method: str = "gradient",
    steps: int = 8,
    part: str = "head_out",
    columns: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    positions: "str | Positions | Spans" = "all",
    topics: Sequence[str] | None = None,
    draws: int = 20,
    resamples: int = 2000,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Attribution:
    """Estimate what `patch_map` with the same arguments would measure.

    The score of a site is the sum over aligned tokens of (source - target activation) times the
    gradient of the metric, which is taken

    - "gradient": at the target run, one pass a batch for all sites (attribution patching);
    - "activations": on the straight way from the target's to the source's activations of all heads
      of one part of one layer together, `steps` passes a layer: integrated gradients, so that the
      scores of a layer add up to what patching the layer does, to quadrature error. With few heads
      a layer patching each of them is cheaper, and exact;
    - "inputs": on the way from the target's to the source's embeddings, `steps` passes for all
      sites (EAP-IG; Hanna, Pezzelle and Belinkov 2024, arXiv 2403.17806). Only the scores of the
      embeddings themselves add up to a known total. They sum at k/m, k = 1 ... m; here the midpoint
      rule is used, which converges faster. Between checkpoints with equal embeddings this is
      "gradient", and a note says so.

    The null puts values of other topics' prompts at `draws` random sites; with "activations" and
    "inputs" every draw runs the path again. Needs the plain engine for `model`.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose {', '.join(map(repr, METHODS))}")
    if kind not in ("heads", "parts"):
        raise ValueError(f"kind={kind!r}: choose 'heads' or 'parts'")
    patcher = Patcher(model, prompts, source, positions, shorten=False)
    slopes = Slopes(model, patcher.ids, batch_size)
    topics = tuple(topics) if topics is not None else tuple(str(i) for i in range(len(prompts)))
    read = patcher.metric(metric)
    rows, names, cells = map_cells(patcher, kind, part, columns, layers)
    present = {
        cell.sites[0]: (i, j) for i, row in enumerate(cells) for j, cell in enumerate(row) if cell
    }
    target, other = patcher.ends(read)
    notes = few(topics)
    n_null = draws if isinstance(source, From) and len(set(topics)) > 1 else 0
    n_null = 0 if isinstance(positions, Spans) else n_null
    if draws and not n_null:
        notes += ("No null was drawn: it needs a source run, prompts of two topics and no spans.",)
    generator = torch.Generator().manual_seed(seed)
    sites = list(present)
    some = [sites[int(torch.randint(len(sites), (), generator=generator))] for _ in range(n_null)]
    others = [
        patcher.with_source(Resampled(source, topics, seed + n), positions)  # pyright: ignore[reportArgumentType]
        for n in range(n_null)
    ]
    alphas = [0.0] if method == "gradient" else midpoints(steps)
    if method == "inputs" and not moves(patcher):
        notes += (
            "Source and target have equal embeddings, so the way between them has one point: this "
            "is the gradient at the target run. Use method='activations' between checkpoints.",
        )
    parts = parts_of(sites)
    passes = len(slopes.chunks) * len(alphas)
    total = passes * (len(parts) if method == "activations" else 1)
    shared = method == "gradient"
    with show(
        total + (0 if shared else passes * n_null), f"attributing {model.label}", progress
    ) as advance:
        alignments = [drawn.alignment for drawn in others] if shared else []
        found = node_scores(
            patcher, slopes, parts, read, method, alphas, others=alignments, advance=advance
        )
        null = []
        for n, site in enumerate(some):
            whole = Site(site.layer, site.part)
            if shared:
                values = found[whole][1 + n]
            else:
                values = node_scores(
                    others[n], slopes, [whole], read, method, alphas, advance=advance
                )[whole][0]
            null.append(float(headed(values, site).mean()))
    scores = torch.full((len(rows), len(names), len(target)), torch.nan, dtype=torch.float64)
    for site, (i, j) in present.items():
        scores[i, j] = headed(found[Site(site.layer, site.part)][0], site)
    grids = metrics.mean_interval(scores, topics, resamples=resamples, seed=seed)
    name, unit = metrics.named(read)
    return Attribution(
        layers=rows,
        columns=names,
        kind=kind,
        part=part if kind != "parts" else ", ".join(names),
        method=method,
        steps=len(alphas),
        positions=patcher.alignment.text,
        origin=patcher.said,
        metric=name,
        unit=unit,
        topics=topics,
        target=target.float(),
        source=other.float(),
        scores=scores.float(),
        score=grids.value.float(),
        low=grids.low.float(),
        high=grids.high.float(),
        null_score=torch.tensor(null, dtype=torch.float32),
        notes=notes,
        record=patcher.record(
            {"kind": kind, "part": part, "method": method, "steps": steps, "seed": seed}
        ),
    )
