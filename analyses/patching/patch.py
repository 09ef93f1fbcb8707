"""Activation patching: what a run does with some of its activations taken from another run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.patching import metrics
from analyses.patching.metrics import Metric
from analyses.patching.patcher import Cell, Patcher
from analyses.patching.sources import From, Resampled, Source
from analyses.patching.spans import Spans
from probes import figures
from probes.model import HookedModel
from probes.positions import Positions
from probes.progress import progress as show
from probes.prompts import Prompt
from probes.results import Result
from probes.sites import Site, Sites
from probes.splits import FEW_GROUPS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Patched(Result):
    """A metric before and after a patch, and at the run the values came from."""

    sites: tuple[str, ...]
    positions: str
    origin: str
    """Where the values came from, in words."""
    metric: str
    unit: str
    target: Float[Tensor, " prompt"]
    """The metric of the unpatched target run."""
    source: Float[Tensor, " prompt"]
    """The metric of the source run; NaN where there is none (means, zeros, resampled values)."""
    patched: Float[Tensor, " prompt"]
    change: Float[Tensor, " limit"]
    """Mean of patched - target over prompts, in the metric's unit, with its lower and
    upper 95 % BCa limit over topics; positive: the patch raises the metric."""
    share: Float[Tensor, " limit"]
    """Mean change over the mean of source - target: 0 nothing, 1 the whole gap; may lie outside.
    NaN without a source run, or where the runs have no gap; limits NaN where the gap lies in
    one topic."""
    null_change: Float[Tensor, " draw"]
    """Mean change of each draw of the null; empty where none could be drawn."""
    null_kind: str
    notes: tuple[str, ...]

    @property
    def normalised(self) -> Float[Tensor, " prompt"]:
        """(patched - target) / (source - target) of each prompt; NaN where that gap is zero."""
        return metrics.normalised(self.patched, self.target, self.source)

    @property
    def without_gap(self) -> int:
        """Prompts whose normalised effect is undefined, source and target being equal there."""
        return int(self.normalised.isnan().sum())

    @property
    def gap(self) -> float:
        """Mean of source - target, in the metric's unit."""
        return float((self.source.double() - self.target.double()).mean())

    @property
    def null_95(self) -> float:
        """95th percentile of the null's absolute mean change; NaN without a null."""
        return percentile(self.null_change)

    @property
    def claimed(self) -> bool:
        """Whether the interval of the change excludes the null's 95th percentile."""
        _, low, high = self.change.tolist()
        return low > self.null_95 or high < -self.null_95

    def frame(self) -> "pd.DataFrame":
        """One row a prompt."""
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": range(len(self.target)),
                "target": self.target.tolist(),
                "source": self.source.tolist(),
                "patched": self.patched.tolist(),
                "change": (self.patched.double() - self.target.double()).tolist(),
                "normalised": self.normalised.tolist(),
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Every prompt's metric before and after the patch; on the diagonal nothing changed."""
        ax = figures.axes(ax, 4.6, 4.2)
        with figures.theme():
            ends = torch.cat([self.target, self.patched, self.source]).double()
            ends = ends[ends.isfinite()]
            low, high = float(ends.min()), float(ends.max())
            ax.plot([low, high], [low, high], color=figures.PALETTE[7], lw=1, label="no change")
            for i, (name, values) in enumerate(
                (("patched", self.patched), ("source", self.source))
            ):
                if not values.isnan().all():
                    look = figures.style(i)
                    ax.plot(self.target.numpy(), values.numpy(), ls="", label=name, **look)
            unit = f" ({self.unit})" if self.unit else ""
            ax.set(
                xlabel=f"target run{unit}",
                ylabel=f"{self.metric}{unit}",
                title=broken(f"{_listed(self.sites)} from {self.origin}"),
            )
            legend_below(ax, f"run, {len(self.target)} prompts")
        return ax

    def __str__(self) -> str:
        where = _listed(self.sites)
        if torch.equal(self.source, self.target) and torch.equal(self.patched, self.target):
            return f"{where}: source and target runs are equal, every change is exactly 0"
        value, low, high = self.change.tolist()
        said = f"{where} changes {self.metric} by {value:+.3g} [{low:.3g}, {high:.3g}]"
        said += f" {self.unit}" if self.unit else ""
        if not bool(self.share.isnan()[0]):
            value, low, high = self.share.tolist()
            said += f", {value:.0%} [{100 * low:.0f}, {100 * high:.0f}] of the gap"
        if len(self.null_change):
            said += f"; null ({self.null_kind}) at most {self.null_95:.2g}"
            said += "" if self.claimed else ": not told from it"
        return said


def patch(
    model: HookedModel,
    prompts: Sequence[Prompt],
    source: Source,
    sites: Sites,
    metric: "Metric | str",
    *,
    positions: "str | Positions | Spans" = "all",
    topics: Sequence[str] | None = None,
    hold: Sites | None = None,
    held_positions: str = "tokens:0:-1",
    null: str | None = "sites",
    draws: int = 20,
    resamples: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Patched:
    """Run `prompts` with the activations at `sites`, all together, taken from `source`.

    `metric` is a function of the last position's logits (`metrics`), or "kl" for the divergence
    from the source run. `positions` picks the tokens by a rule of `probes.positions` in both
    prompts, or by `Spans`; prompts whose tokens do not pair off are refused. Intervals are over
    `topics`, by default one a prompt. `hold`: see `Patcher`.

    The null is `draws` patches of as many other sites of the same parts ("sites"), or of the same
    sites with the values of other prompts of the source ("prompts"); None: no null.
    """
    patcher = Patcher(
        model,
        prompts,
        source,
        positions,
        hold=hold,
        held_positions=held_positions,
        batch_size=batch_size,
    )
    topics = tuple(topics) if topics is not None else tuple(str(i) for i in range(len(prompts)))
    chosen = patcher.checked(sites)
    patcher.ready([Cell(chosen)])
    read = patcher.metric(metric)
    target, other = patcher.ends(read)
    notes = few(topics)
    with show(1 + (draws if null else 0), f"patching {model.label}", progress) as advance:
        patched = patcher.measure([Cell(chosen)], read, advance=advance)[0]
        if null == "sites":
            cells = random_cells(patcher, chosen, draws, seed)
            if not cells:
                notes += ("No null was drawn: too few other sites of the same parts are left.",)
            found = patcher.measure(cells, read, advance=advance)
        elif null == "prompts":
            found = other_prompts(
                patcher, [Cell(chosen)] * draws, read, positions, topics, seed, advance
            )
        elif null is None:
            found = torch.zeros(0, len(target), dtype=torch.float64)
        else:
            raise ValueError(f"null={null!r}: choose 'sites', 'prompts' or None")
    change = metrics.mean_interval(patched - target, topics, resamples=resamples, seed=seed)
    share = metrics.share_interval(
        patched - target, other - target, topics, resamples=resamples, seed=seed
    )
    name, unit = metrics.named(read)
    return Patched(
        sites=tuple(map(str, chosen)),
        positions=patcher.alignment.text,
        origin=patcher.said,
        metric=name,
        unit=unit,
        target=target.float(),
        source=other.float(),
        patched=patched.float(),
        change=metrics.triple(change),
        share=metrics.triple(share),
        null_change=(found - target).mean(-1).float(),
        null_kind={"sites": "as many other sites", "prompts": "other prompts"}.get(null or "", ""),
        notes=notes + metrics.gap_note(other - target, topics) + patcher.notes,
        record=patcher.record(
            {"sites": [str(s) for s in chosen], "seed": seed, "draws": len(found)}
        ),
    )


def random_cells(patcher: Patcher, sites: Sequence[Site], draws: int, seed: int) -> list[Cell]:
    """Cells of as many sites of each part, at heads if the sites name heads, none of them those
    given; empty where fewer are left than needed."""
    generator = torch.Generator().manual_seed(seed)
    layout = patcher.model.layout
    kinds: dict[tuple[str, bool], list[Site]] = {}
    for site in sites:
        kinds.setdefault((site.part, site.head is not None), []).append(site)
    pools = []
    for (part, headed), own in kinds.items():
        pool = [
            Site(layer, part, head)
            for layer in layout.supported(part)
            for head in (range(layout.blocks[layer].heads[part]) if headed else [None])
        ]
        pool = [site for site in pool if site not in own]
        if len(pool) < len(own):
            return []
        pools.append((pool, len(own)))
    found = []
    for _ in range(draws):
        picked = []
        for pool, n in pools:
            order = torch.randperm(len(pool), generator=generator)[:n].tolist()
            picked += [pool[k] for k in order]
        found.append(Cell(tuple(sorted(picked))))
    return found


def other_prompts(
    patcher: Patcher,
    cells: Sequence[Cell],
    metric: Metric,
    positions: "str | Positions | Spans",
    topics: Sequence[str],
    seed: int,
    advance: Callable[[int], None],
) -> Float[Tensor, "cell prompt"]:
    """The metric with each cell patched from another prompt of the source, drawn anew each time."""
    if not isinstance(patcher.source, From):
        raise ValueError(
            "null='prompts' takes values of the source's other prompts, and there is no source run "
            "for means, zeros or resampled values: use null='sites'"
        )
    found = []
    for n, cell in enumerate(cells):
        drawn = patcher.with_source(Resampled(patcher.source, tuple(topics), seed + n), positions)
        found.append(drawn.measure([cell], metric, advance=advance)[0])
    return torch.stack(found)


def percentile(null: Float[Tensor, " draw"]) -> float:
    """95th percentile of absolute values; NaN of none."""
    return float(null.double().abs().quantile(0.95)) if len(null) else float("nan")


def few(topics: Sequence[str]) -> tuple[str, ...]:
    """The note of a measurement on few topics."""
    n = len(set(topics))
    if n >= FEW_GROUPS:
        return ()
    rough = "no interval" if n < 2 else "intervals over so few are too narrow"
    return (f"Only {n} topic{'s' if n > 1 else ''}: {rough}; {FEW_GROUPS} are needed.",)


def _listed(sites: Sequence[str]) -> str:
    if len(sites) <= 3:
        return ", ".join(sites)
    return f"{len(sites)} sites ({sites[0]} to {sites[-1]})"
