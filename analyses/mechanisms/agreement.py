"""How far estimated effects of patches agree with patches really made."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.patching.grid import PatchMap, map_cells
from analyses.patching.metrics import Metric
from analyses.patching.patch import few
from analyses.patching.patcher import Patcher
from analyses.patching.sources import Source
from analyses.patching.spans import Spans
from probes import figures
from probes.model import HookedModel
from probes.positions import Positions
from probes.progress import progress as show
from probes.prompts import Prompt
from probes.results import Result
from probes.scores import bca_bootstrap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from analyses.mechanisms.attribution_patching import Attribution

RELIABLE = 0.8
"""Rank correlation with exact patches below which scores should not be used in their place."""


@dataclass(frozen=True)
class Agreement(Result):
    """Estimated scores of sites beside the exact changes."""

    sites: tuple[str, ...]
    """Sites compared, as layer.column; those where both are exactly 0 are left out, since they
    agree without saying anything."""
    left_out: int
    method: str
    metric: str
    unit: str
    score: Float[Tensor, " site"]
    exact: Float[Tensor, " site"]
    """Mean change of the metric by the patch, in its unit."""
    pearson: Float[Tensor, " limit"]
    """Correlation over sites, -1 to 1, lower and upper 95 % BCa limit over topics."""
    spearman: Float[Tensor, " limit"]
    """Rank correlation, likewise."""
    recall: Float[Tensor, " limit"]
    """Share of the `k` sites of largest absolute change that are among the `k` of largest absolute
    score, 0 to 1, likewise."""
    k: int
    jointly: bool
    """Whether resamples of topics moved both sides; if not, the interval is too narrow."""
    notes: tuple[str, ...]

    @property
    def chance(self) -> float:
        """Recall of a random order."""
        return self.k / len(self.sites) if self.sites else float("nan")

    @property
    def reliable(self) -> bool:
        """Whether the rank correlation is at least `RELIABLE`."""
        return float(self.spearman[0]) >= RELIABLE

    def frame(self) -> "pd.DataFrame":
        """One row a site."""
        import pandas as pd

        return pd.DataFrame(
            {"site": self.sites, "score": self.score.tolist(), "exact": self.exact.tolist()}
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Score against exact change; on the line the estimate is right."""
        ax = figures.axes(ax, 4.8, 4.4)
        unit = f" ({self.unit})" if self.unit else ""
        with figures.theme():
            both = torch.cat([self.score, self.exact, torch.zeros(1)])
            ends = [float(both.min()), float(both.max())]
            ax.plot(ends, ends, color=figures.PALETTE[7], lw=1, label="estimate = exact")
            ax.plot(
                self.exact.numpy(), self.score.numpy(), ls="", label="a site", **figures.style(0)
            )
            ax.set(
                xlabel=broken(f"exact change of {self.metric}{unit}"),
                ylabel=broken(f"attribution score{unit}"),
                title=broken(f"{self.method}: rank correlation {float(self.spearman[0]):.2f}"),
            )
            legend_below(ax, f"{len(self.sites)} sites")
        return ax

    def __str__(self) -> str:
        if not self.sites:
            return f"{self.method}: every score and every exact change is exactly 0"
        said = [
            f"{name} {value:.2f} [{low:.2f}, {high:.2f}]"
            for name, (value, low, high) in (
                ("rank correlation", self.spearman.tolist()),
                ("Pearson", self.pearson.tolist()),
                (f"recall of the top {self.k}", self.recall.tolist()),
            )
        ]
        return (
            f"{self.method} against exact patches at {len(self.sites)} sites: {', '.join(said)} "
            f"(chance {self.chance:.2f})" + ("" if self.reliable else ": do not rely on it")
        )


def agreement(
    scored: "Attribution",
    exact: PatchMap | Float[Tensor, "layer column prompt"],
    *,
    k: int = 10,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Correlation over sites of mean scores and mean exact changes; a warning below `RELIABLE`."""
    ours = scored.scores.double().flatten(0, 1)
    if isinstance(exact, PatchMap):
        _same(scored, exact)
        theirs = exact.change.double().flatten()[:, None].expand_as(ours)
    else:
        if exact.shape != scored.scores.shape:
            raise ValueError(
                f"exact changes of shape {tuple(exact.shape)} for scores of shape "
                f"{tuple(scored.scores.shape)}: measure the same sites and prompts"
            )
        theirs = exact.double().flatten(0, 1)
    there = ours.isfinite().all(1) & theirs.isfinite().all(1)
    told = there & ((ours != 0).any(1) | (theirs != 0).any(1))
    left = int((there & ~told).sum())
    ours, theirs = ours[told], theirs[told]
    names = [f"{layer}.{column}" for layer in scored.layers for column in scored.columns]
    sites = tuple(name for name, kept in zip(names, told.tolist(), strict=True) if kept)
    if 0 < len(sites) < 3:
        raise ValueError(f"{len(sites)} sites differ from 0: a correlation needs at least 3")
    if k < 1:
        raise ValueError(f"k={k}: give 1 or more of the largest sites")
    k = min(k, len(sites))
    found = {}
    for name, statistic in (("pearson", _pearson), ("spearman", _spearman), ("recall", _recall(k))):

        def at(rows: Tensor, statistic: Callable[[Tensor, Tensor], float] = statistic) -> float:
            return statistic(ours[:, rows].mean(1), theirs[:, rows].mean(1))

        found[name] = _limits(at, scored.topics, len(sites), resamples, seed)
    notes = few(scored.topics)
    if sites and found["spearman"][0] < RELIABLE:
        note = (
            f"attribution ({scored.method}) and exact patches have rank correlation "
            f"{float(found['spearman'][0]):.2f}, below {RELIABLE}: rank sites by exact patches, or "
            "try method='activations'"
        )
        warnings.warn(note, stacklevel=3)
        notes += (note,)
    return Agreement(
        sites=sites,
        left_out=left,
        method=scored.method,
        metric=scored.metric,
        unit=scored.unit,
        score=ours.mean(1).float(),
        exact=theirs.mean(1).float(),
        **found,
        k=k,
        jointly=not isinstance(exact, PatchMap),
        notes=notes,
        record=scored.record,
    )


def _limits(
    at: Callable[[Tensor], float], topics: Sequence[str], n: int, resamples: int, seed: int
) -> Float[Tensor, " limit"]:
    if not n:
        return torch.full((3,), torch.nan)
    if len(set(topics)) < 2:
        return torch.tensor([at(torch.arange(len(topics))), torch.nan, torch.nan])
    return torch.tensor(bca_bootstrap(at, topics, resamples=resamples, seed=seed))


def _pearson(a: Tensor, b: Tensor) -> float:
    from scipy.stats import pearsonr

    found: Any = pearsonr(a.numpy(), b.numpy())
    return float(found[0])


def _spearman(a: Tensor, b: Tensor) -> float:
    from scipy.stats import spearmanr

    found: Any = spearmanr(a.numpy(), b.numpy())
    return float(found[0])


def _recall(k: int) -> Callable[[Tensor, Tensor], float]:
    def recall(a: Tensor, b: Tensor) -> float:
        top = [set(t.abs().argsort(descending=True, stable=True)[:k].tolist()) for t in (a, b)]
        return len(top[0] & top[1]) / k

    return recall


def _same(scored: "Attribution", exact: PatchMap) -> None:
    """Refuse a map of other sites, prompts or metric."""
    for what in ("layers", "columns", "kind", "part", "positions", "origin", "metric"):
        ours, theirs = getattr(scored, what), getattr(exact, what)
        if ours != theirs:
            raise ValueError(
                f"the scores have {what} {ours!r} and the map {theirs!r}: compare the same sites, "
                "source and metric"
            )
    if exact.target.shape != scored.target.shape or not torch.allclose(
        exact.target, scored.target, rtol=1e-2, atol=1e-3
    ):
        raise ValueError("the scores and the map are of other prompts: measure the same ones")


def exact_changes(
    model: HookedModel,
    prompts: Sequence[Prompt],
    source: Source,
    metric: "Metric | str",
    kind: str = "heads",
    *,
    part: str = "head_out",
    columns: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    positions: "str | Positions | Spans" = "all",
    batch_size: int = 32,
    progress: bool = True,
) -> Float[Tensor, "layer column prompt"]:
    """What each patch really adds to the metric of each prompt: `patch_map` before the mean."""
    patcher = Patcher(model, prompts, source, positions, batch_size=batch_size)
    read = patcher.metric(metric)
    rows, names, cells = map_cells(patcher, kind, part, columns, layers)
    at = [(i, j, cell) for i, row in enumerate(cells) for j, cell in enumerate(row) if cell]
    target, _ = patcher.ends(read)
    found = torch.full((len(rows), len(names), len(target)), torch.nan, dtype=torch.float64)
    with show(len(at), f"patching {model.label}", progress) as advance:
        measured = patcher.measure([cell for *_, cell in at], read, advance=advance)
    for (i, j, _), values in zip(at, measured, strict=True):
        found[i, j] = values - target
    return found.float()
