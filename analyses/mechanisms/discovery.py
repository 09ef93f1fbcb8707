"""Find a circuit in stages: the heads a stage chooses receive what the next one looks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken
from analyses.mechanisms.circuit import Circuit, heads_of
from analyses.mechanisms.paths import LOGITS, path_map
from analyses.mechanisms.task import Task
from analyses.patching.figure import heat_map
from analyses.patching.metrics import Metric
from analyses.patching.sources import Source
from probes import figures
from probes.model import HookedModel
from probes.results import Result
from probes.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGNS = ("absolute", "negative", "positive")


@dataclass(frozen=True)
class Stage:
    """One step of a search: which heads write what the receivers read."""

    name: str
    """Of the group that it makes."""
    k: int
    """Heads that it chooses."""
    receives: str | None = None
    """The group whose heads receive; None: the logits."""
    part: str = "q"
    """Which of their inputs: "q", "k" or "v"."""
    at: str | None = None
    """Where the chosen heads work: a place of the task, or a rule of `probes.positions`; None:
    every token. It is the group's place in the circuit."""
    received_at: str | None = None
    """Where the receivers read it; None: for q at their own place, for k and v at `at`."""
    sign: str = "absolute"
    """"absolute": the largest effects whichever way; "negative" and "positive": those alone whose
    patch lowers or raises the metric. The released code of Prakash et al. 2024 takes the most
    negative, and so misses heads that work against the answer."""


@dataclass(frozen=True)
class Discovery(Result):
    """The stages of a search and the heads that they chose."""

    task: str
    metric: str
    unit: str
    names: tuple[str, ...]
    receivers: tuple[str, ...]
    """What each stage's paths lead to, in words."""
    change: Float[Tensor, "stage layer head"]
    """Mean change of the metric with the path of one head patched; NaN where there is no path."""
    low: Float[Tensor, "stage layer head"]
    high: Float[Tensor, "stage layer head"]
    null_95: Float[Tensor, " stage"]
    """95th percentile of each null's absolute mean change; NaN without a null."""
    groups: Mapping[str, tuple[str, ...]]
    """The heads chosen, strongest first."""
    places: Mapping[str, str]
    heads: tuple[int, ...]
    chosen_on: tuple[str, ...]
    """Topics of the prompts."""
    notes: tuple[str, ...]

    @property
    def circuit(self) -> Circuit:
        """The groups as a circuit."""
        groups = {
            n: tuple(map(str, sorted(map(Site.parse, own)))) for n, own in self.groups.items()
        }
        return Circuit(
            names=self.names, groups=groups, places=self.places, heads=self.heads, task=self.task,
            chosen_on=self.chosen_on, record=self.record,
        )  # fmt: skip

    @property
    def ranked(self) -> tuple[Site, ...]:
        """Every head once, by its largest absolute effect in any stage; without a path, last."""
        strongest = self.change.abs().nan_to_num(-1.0).max(0).values
        order = strongest.flatten().argsort(descending=True, stable=True).tolist()
        width = self.change.shape[-1]
        found = [Site(k // width, "head_out", k % width) for k in order]
        return tuple(s for s in found if (s.head or 0) < self.heads[s.layer])

    def frame(self) -> "pd.DataFrame":
        """One row for each stage and head with a path."""
        import pandas as pd

        rows = []
        for s, name in enumerate(self.names):
            for layer, head in self.change[s].isfinite().nonzero().tolist():
                site = f"{layer}.head_out.{head}"
                row = {
                    n: float(getattr(self, n)[s, layer, head]) for n in ("change", "low", "high")
                }
                null = float(self.null_95[s])
                more = {
                    "null_95": null,
                    "claimed": row["low"] > null or row["high"] < -null,
                    "chosen": site in self.groups[name],
                }
                rows.append({"stage": name, "site": site, **row, **more})
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None, stage: int = 0) -> "Axes":
        """One stage's heads; rings mark the chosen ones."""
        unit = f" ({self.unit})" if self.unit else ""
        found = self.change[stage]
        top = int(found.isfinite().any(-1).nonzero().max()) + 1
        ax = heat_map(
            ax,
            found[:top],
            layers=range(top),
            columns=[str(h) for h in range(found.shape[1])],
            xlabel="head that sends (rings: chosen)",
            label=f"change of {self.metric}{unit}",
            title=broken(f"{self.names[stage]}: paths to {self.receivers[stage]}"),
        )
        sites = [Site.parse(s) for s in self.groups[self.names[stage]]]
        for width, colour in ((3.0, "white"), (1.2, "black")):  # seen on any shade
            ax.plot([s.head or 0 for s in sites], [s.layer for s in sites], ls="", marker="o",
                    ms=7, mfc="none", mec=colour, mew=width)  # fmt: skip
        return ax

    def plot_all(self) -> "Figure":
        """All stages side by side."""
        n = len(self.names)
        figure, panels = figures.row(n, 5.0 * n, 4.6)
        for stage, ax in enumerate(panels):
            self.plot(ax, stage)
        return figure

    def __str__(self) -> str:
        own = []
        for s, name in enumerate(self.names):
            said = f"{name} {len(self.groups[name])}"
            if first := self.groups[name][:1]:
                at = (s, *(int(x) for x in first[0].split(".head_out.")))
                value, low, high = (float(t[at]) for t in (self.change, self.low, self.high))
                said += f", most of all {first[0]} by {value:+.3g} [{low:.3g}, {high:.3g}]"
                said += f" {self.unit}" * bool(self.unit)
                null = float(self.null_95[s])
                said += f", null at most {null:.2g}" * (null == null)
            own.append(said)
        n = sum(map(len, self.groups.values()))
        return f"{self.task}: {n} heads chosen ({'; '.join(own)})"


def discover(
    model: HookedModel,
    task: Task,
    stages: Sequence[Stage],
    *,
    source: Source | None = None,
    metric: "Metric | str | None" = None,
    freeze_mlps: bool = False,
    draws: int = 20,
    resamples: int = 1000,
    batch_size: int = 32,
    folder: Path | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Discovery:
    """Search a circuit stage by stage with `path_map`, on training or validation prompts.

    A head that an earlier stage chose is not chosen again. Heads whose effect is exactly 0, or has
    another sign than asked, are never chosen, so a group may stay smaller than `k`.
    """
    _check(stages)
    counts = heads_of(model)
    grids, nulls, receivers, notes = [], [], [], ()
    groups: dict[str, tuple[str, ...]] = {}
    places: dict[str, str] = {}
    by_name = {stage.name: stage for stage in stages}
    name = unit = ""
    record = None
    for stage in stages:
        to, read_at = LOGITS, None
        if stage.receives is not None:
            heads = [Site.parse(s) for s in groups[stage.receives]]
            if not heads:
                raise ValueError(
                    f"stage {stage.name!r} receives at {stage.receives!r}, which chose no head: "
                    "ask for another sign there, or leave the stage out"
                )
            if not any(site.layer for site in heads):
                raise ValueError(
                    f"stage {stage.name!r} receives at {stage.receives!r}, whose heads all lie in "
                    "the first block, below which there are none: choose more heads there, or "
                    "leave the stage out"
                )
            to = receiving(model, heads, stage.part)
            own = by_name[stage.receives].at if stage.part == "q" else stage.at
            read_at = stage.received_at or own
        found = path_map(
            model, task, to, source=source, metric=metric, senders_at=stage.at,
            receivers_at=read_at, freeze_mlps=freeze_mlps, draws=draws, resamples=resamples,
            null="prompts" if draws else None, batch_size=batch_size, seed=seed, progress=progress,
            folder=None if folder is None else Path(folder) / stage.name,
        )  # fmt: skip
        taken = {s for own in groups.values() for s in own}
        groups[stage.name] = chosen(found.change, stage, taken)
        if stage.at is not None:
            places[stage.name] = stage.at
        if len(groups[stage.name]) < stage.k:
            notes += (f"{stage.name}: {len(groups[stage.name])} heads qualify, {stage.k} asked.",)
        grids.append((found.change, found.change_low, found.change_high))
        nulls.append(found.null_95)
        of = stage.receives
        receivers.append(LOGITS if of is None else f"{stage.part} of {of}")
        name, unit, record = found.metric, found.unit, found.record
        notes += tuple(n for n in found.notes if n not in notes)
    assert record is not None
    change, low, high = (torch.stack(list(g)) for g in zip(*grids, strict=True))
    return Discovery(
        task=task.name,
        metric=name,
        unit=unit,
        names=tuple(groups),
        receivers=tuple(receivers),
        change=change,
        low=low,
        high=high,
        null_95=torch.tensor(nulls),
        groups=groups,
        places=places,
        heads=counts,
        chosen_on=tuple(sorted(set(task.topics))),
        notes=notes,
        record=record,
    )


def chosen(change: Float[Tensor, "layer head"], stage: Stage, taken: set[str]) -> tuple[str, ...]:
    """The strongest heads that are not taken, strongest first."""
    score = {"absolute": change.abs(), "negative": -change, "positive": change}[stage.sign]
    score = score.nan_to_num(-1.0).flatten()
    found = []
    for k in score.argsort(descending=True, stable=True).tolist():
        site = f"{k // change.shape[1]}.head_out.{k % change.shape[1]}"
        if float(score[k]) > 0 and site not in taken and len(found) < stage.k:
            found.append(site)
    return tuple(found)


def receiving(model: HookedModel, heads: Sequence[Site], part: str) -> tuple[Site, ...]:
    """An input of each of these heads; of k and v that of the key-value head they share."""
    found = set()
    for site in heads:
        block = model.layout.blocks[site.layer]
        model.layout.check(Site(site.layer, part))
        shared = block.heads["head_out"] // block.heads[part]
        found.add(Site(site.layer, part, (site.head or 0) // shared))
    return tuple(sorted(found))


def _check(stages: Sequence[Stage]) -> None:
    if not stages:
        raise ValueError("no stages were given: give at least one, the first with the logits")
    seen: list[str] = []
    for stage in stages:
        if stage.name in seen or stage.k < 1:
            raise ValueError(
                f"stage {stage.name!r} with k={stage.k}: give every stage a name of its own and at "
                "least 1 head"
            )
        if stage.receives is not None and stage.receives not in seen:
            raise ValueError(
                f"stage {stage.name!r} receives at {stage.receives!r}, which no stage before it "
                f"makes: choose one of {', '.join(seen) or 'none (None for the logits)'}"
            )
        if stage.part not in ("q", "k", "v") or stage.sign not in SIGNS:
            raise ValueError(
                f"stage {stage.name!r} has part={stage.part!r} and sign={stage.sign!r}: choose q, "
                f"k or v, and one of {', '.join(SIGNS)}"
            )
        seen.append(stage.name)
