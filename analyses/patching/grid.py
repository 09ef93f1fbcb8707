"""Maps of patches: every layer against every head, part of a block, or position."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken
from analyses.patching import metrics
from analyses.patching.figure import heat_map
from analyses.patching.metrics import Metric
from analyses.patching.patch import few, other_prompts, percentile
from analyses.patching.patcher import Cell, Patcher
from analyses.patching.sources import From, Source
from analyses.patching.spans import Spans
from probes.model import HookedModel
from probes.positions import Positions
from probes.progress import progress as show
from probes.prompts import Prompt
from probes.results import Result
from probes.sites import HEADED, Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PARTS = ("attn_out", "mlp_out")
"""Columns of a map of parts; a part of the stream would carry all that lies below it."""


@dataclass(frozen=True)
class PatchMap(Result):
    """What patching each site alone does to a metric."""

    layers: tuple[int, ...]
    columns: tuple[str, ...]
    """Heads, parts or position rules."""
    kind: str
    """"heads", "parts" or "positions": what the columns are."""
    part: str
    """The part patched; of a map of parts, all of them."""
    positions: str
    origin: str
    metric: str
    unit: str
    target: Float[Tensor, " prompt"]
    """The metric of the unpatched target run."""
    source: Float[Tensor, " prompt"]
    """The metric of the source run; NaN where there is none."""
    change: Float[Tensor, "layer column"]
    """Mean of patched - target over prompts, in the metric's unit; NaN where the model has no
    such site."""
    change_low: Float[Tensor, "layer column"]
    change_high: Float[Tensor, "layer column"]
    """95 % BCa limits over topics, each site by itself."""
    share: Float[Tensor, "layer column"]
    """Mean change over the mean of source - target: 1 is the whole gap; NaN without a gap. Its limits
    (`metrics.share_interval`) are NaN too where the gap lies in one topic."""
    share_low: Float[Tensor, "layer column"]
    share_high: Float[Tensor, "layer column"]
    null_change: Float[Tensor, " draw"]
    """Mean change with values of another prompt at sites drawn at random; may be empty."""
    notes: tuple[str, ...]

    @property
    def gap(self) -> float:
        """Mean of source - target, in the metric's unit."""
        return float((self.source.double() - self.target.double()).mean())

    @property
    def null_95(self) -> float:
        """95th percentile of the null's absolute mean change: the band around 0."""
        return percentile(self.null_change)

    @property
    def claimed(self) -> Tensor:
        """`[layer, column]`: whether the interval excludes the null's 95th percentile."""
        return (self.change_low > self.null_95) | (self.change_high < -self.null_95)

    def best(self, n: int = 1) -> tuple[tuple[int, str], ...]:
        """Layer and column of the largest absolute changes, largest first."""
        flat = self.change.abs().nan_to_num(-1.0).flatten()
        order = flat.argsort(descending=True, stable=True)[:n].tolist()
        width = len(self.columns)
        return tuple((self.layers[k // width], self.columns[k % width]) for k in order)

    def frame(self) -> "pd.DataFrame":
        """One row a site."""
        import pandas as pd

        names = ("change", "change_low", "change_high", "share", "share_low", "share_high")
        return pd.DataFrame(
            [
                {"layer": layer, self.kind.removesuffix("s"): column}
                | {name: float(getattr(self, name)[i, j]) for name in names}
                | {"claimed": bool(self.claimed[i, j])}
                for i, layer in enumerate(self.layers)
                for j, column in enumerate(self.columns)
            ]
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Share of the gap in percent, or the change in the metric's unit where there is no gap;
        dots mark what the null does not explain."""
        shares = bool(self.share.isfinite().any())
        unit = f" ({self.unit})" if self.unit else ""
        ax = heat_map(
            ax,
            100 * self.share if shares else self.change,
            layers=self.layers,
            columns=self.columns,
            xlabel={"heads": f"head of {self.part}", "parts": "part of the block"}.get(
                self.kind, f"position of {self.part}"
            ),
            label=f"gap in {self.metric} closed (%)"
            if shares
            else f"change of {self.metric}{unit}",
            title=broken(
                f"Patched one by one from {self.origin}"
                + ("; dots: told from the null" if bool(self.claimed.any()) else "")
            ),
        )
        at = self.claimed.nonzero()
        ax.plot(at[:, 1].numpy(), at[:, 0].numpy(), ls="", marker=".", ms=3, color="black")
        return ax

    def __str__(self) -> str:
        if bool((self.change.nan_to_num(0.0) == 0).all()):
            return f"map of {self.kind}: no patch changes anything, every change is exactly 0"
        layer, column = self.best()[0]
        i, j = self.layers.index(layer), self.columns.index(column)
        said = f"map of {self.kind}: layer {layer}, {column} changes {self.metric} most, by "
        low, high = float(self.change_low[i, j]), float(self.change_high[i, j])
        said += f"{float(self.change[i, j]):+.3g} [{low:.3g}, {high:.3g}]"
        said += f" {self.unit}" if self.unit else ""
        if bool(self.share[i, j].isfinite()):
            said += f", {float(self.share[i, j]):.0%} of the gap"
        if len(self.null_change):
            said += f"; null at most {self.null_95:.2g}, {int(self.claimed.sum())} sites beyond it"
        return said


def patch_map(
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
    topics: Sequence[str] | None = None,
    draws: int = 20,
    resamples: int = 2000,
    batch_size: int = 32,
    folder: Path | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PatchMap:
    """Patch every site of a map alone.

    `kind` is "heads" (every head of `part`), "parts" (`columns`, by default attention and MLP
    outputs) or "positions" (`part`, at the position rules in `columns`, which must lie among the
    tokens that `positions` aligns). Numbers are not corrected for how many sites were tried: choose
    sites on some prompts and measure them on others (`patch`).

    The null patches `draws` sites drawn from the map with the values of other prompts of the
    source; it needs a source run, and positions that are no `Spans`. With `folder` finished layers are kept there, and the same call
    made again goes on.
    """
    patcher = Patcher(model, prompts, source, positions, batch_size=batch_size)
    topics = tuple(topics) if topics is not None else tuple(str(i) for i in range(len(prompts)))
    rows, names, cells = map_cells(patcher, kind, part, columns, layers)
    present = [(i, j) for i in range(len(rows)) for j in range(len(names)) if cells[i][j]]
    chosen = [c for i, j in present if (c := cells[i][j])]
    patcher.ready(chosen)
    read = patcher.metric(metric)
    target, other = patcher.ends(read)
    null = torch.zeros(0, len(target), dtype=torch.float64)
    notes = few(topics)
    n_null = draws
    if draws and isinstance(positions, Spans):
        n_null = 0
        notes += ("No null was drawn: values of another prompt cannot follow named spans.",)
    elif draws and not (isinstance(source, From) and len(set(topics)) > 1):
        n_null = 0
        notes += ("No null was drawn: it needs a source run and prompts of two topics.",)
    with show(len(chosen) + n_null, f"patching {model.label}", progress) as advance:
        found = patcher.measure(chosen, read, folder=folder, advance=advance)
        if n_null and not isinstance(positions, Spans):
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(len(chosen), (n_null,), generator=generator).tolist()
            some = [chosen[k] for k in drawn]
            null = other_prompts(patcher, some, read, positions, topics, seed, advance)
    raw = metrics.mean_interval(found - target, topics, resamples=resamples, seed=seed)
    share = metrics.share_interval(
        found - target, other - target, topics, resamples=resamples, seed=seed
    )
    grids = []
    for values in (*raw, *share):
        grid = torch.full((len(rows), len(names)), torch.nan)
        for (i, j), value in zip(present, values, strict=True):
            grid[i, j] = float(value)
        grids.append(grid)
    name, unit = metrics.named(read)
    return PatchMap(
        layers=rows,
        columns=names,
        kind=kind,
        part=part if kind != "parts" else ", ".join(names),
        positions=patcher.alignment.text,
        origin=patcher.said,
        metric=name,
        unit=unit,
        target=target.float(),
        source=other.float(),
        change=grids[0],
        change_low=grids[1],
        change_high=grids[2],
        share=grids[3],
        share_low=grids[4],
        share_high=grids[5],
        null_change=(null - target).mean(-1).float(),
        notes=notes + metrics.gap_note(other - target, topics) + patcher.notes,
        record=patcher.record({"kind": kind, "part": part, "seed": seed, "draws": n_null}),
    )


def map_cells(
    patcher: Patcher,
    kind: str,
    part: str,
    columns: Sequence[str] | None,
    layers: Sequence[int] | None,
) -> tuple[tuple[int, ...], tuple[str, ...], list[list[Cell | None]]]:
    """Layers, columns and the cell of each place of a map; None where the model has no such site."""
    layout = patcher.model.layout
    cells: list[list[Cell | None]]
    rows = tuple(range(layout.n_layers)) if layers is None else tuple(layers)
    if kind == "heads":
        if part not in HEADED:
            raise ValueError(
                f"part={part!r} has no heads: choose head_out, q, k or v, or kind='parts'"
            )
        counts = {r: layout.blocks[r].heads.get(part, 0) for r in rows}
        for r in rows[:1] if not any(counts.values()) else []:
            patcher.checked(Site(r, part))  # says why there are none
        names = tuple(str(h) for h in range(max(counts.values())))
        cells = [
            [
                Cell(patcher.checked(Site(r, part, int(h)))) if int(h) < counts[r] else None
                for h in names
            ]
            for r in rows
        ]
    elif kind == "parts":
        names = tuple(columns or PARTS)
        cells = [
            [
                None
                if p in layout.blocks[r].refused and any(r in layout.supported(q) for q in names)
                else Cell(patcher.checked(Site(r, p)))
                for p in names
            ]
            for r in rows
        ]
    elif kind == "positions":
        if not columns:
            raise ValueError(
                "a map of positions needs its columns: give rules of probes.positions, for "
                "example columns=['content', 'instruction_end', 'last']"
            )
        names = tuple(columns)
        sites = [patcher.checked(Site(r, part)) for r in rows]
        cells = [[Cell(site, name) for name in names] for site in sites]
    else:
        raise ValueError(f"kind={kind!r}: choose 'heads', 'parts' or 'positions'")
    return rows, names, cells
