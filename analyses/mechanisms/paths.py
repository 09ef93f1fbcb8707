"""Path patching: what a head does to the answer through the inputs of chosen other heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from analyses.mechanisms.path_inputs import Senders
from analyses.mechanisms.path_results import PathMap, PathPatched
from analyses.mechanisms.path_runs import Paths, Where, where_said
from analyses.mechanisms.task import Task
from analyses.patching import metrics
from analyses.patching.metrics import Metric
from analyses.patching.patch import few
from analyses.patching.patcher import Patcher
from analyses.patching.sources import From, Resampled, Source
from probes.model import HookedModel
from probes.progress import progress as show
from probes.sites import Site, Sites

LOGITS = "logits"
"""The receiver of a direct path: nothing between the sender and the answer but MLPs."""


def path_patch(
    model: HookedModel,
    task: Task,
    senders: Sites,
    receivers: Sites = LOGITS,
    *,
    source: Source | None = None,
    metric: "Metric | str | None" = None,
    senders_at: "str | Where" = None,
    receivers_at: "str | Where" = None,
    freeze_mlps: bool = False,
    null: str | None = "prompts",
    draws: int = 20,
    resamples: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> PathPatched:
    """Patch the path from `senders`, all together, to `receivers`.

    The clean run is made with the senders (heads, `attn_out` or `mlp_out`) at the source's values
    and every other mixer's output held; MLPs are computed anew, or held too with `freeze_mlps`.
    The inputs `receivers` (q, k or v) get in it are put into the clean run. "logits": the
    answer of the first run itself. `source` is by default the task's counterfactuals, `metric`
    the task's. `senders_at` and `receivers_at` are names of the task's places, rules of
    `probes.positions` or token indices of each prompt; None: every token. Since no token sees
    another while mixers are held, only tokens that are both can carry anything.

    The null is `draws` repetitions with the values of other prompts of the source ("prompts"), or
    of as many inputs of other heads as receivers ("receivers"); None: no null.
    """
    prepared = _prepared(model, task, source, metric, batch_size)
    chosen = prepared.patcher.checked(senders)
    paths = prepared.paths(receivers, senders_at, receivers_at, freeze_mlps)
    paths.check(chosen)
    target, other = prepared.patcher.ends(prepared.metric)
    with show(1 + (draws if null else 0), f"path patching {model.label}", progress) as advance:
        patched = paths.measure([chosen], prepared.metric, advance=advance)[0]
        found, notes = prepared.null(paths, [chosen] * draws, null, seed, advance)
    change = metrics.mean_interval(patched - target, task.topics, resamples=resamples, seed=seed)
    share = metrics.share_interval(
        patched - target, other - target, task.topics, resamples=resamples, seed=seed
    )
    name, unit = metrics.named(prepared.metric)
    return PathPatched(
        sites=tuple(map(str, chosen)),
        positions=_place(senders_at),
        origin=prepared.patcher.said,
        metric=name,
        unit=unit,
        target=target.float(),
        source=other.float(),
        patched=patched.float(),
        change=metrics.triple(change),
        share=metrics.triple(share),
        null_change=(found - target).mean(-1).float(),
        null_kind={"prompts": "other prompts", "receivers": "other receivers"}.get(null or "", ""),
        notes=few(task.topics)
        + metrics.gap_note(other - target, task.topics)
        + notes
        + prepared.patcher.notes
        + paths.notes,
        record=prepared.record(paths, {"senders": [str(s) for s in chosen], "seed": seed}),
        receivers=_names(paths),
        receivers_at=_place(receivers_at) if paths.receivers else "last",
    )


def path_map(
    model: HookedModel,
    task: Task,
    receivers: Sites = LOGITS,
    *,
    layers: Sequence[int] | None = None,
    source: Source | None = None,
    metric: "Metric | str | None" = None,
    senders_at: "str | Where" = None,
    receivers_at: "str | Where" = None,
    freeze_mlps: bool = False,
    null: str | None = "prompts",
    draws: int = 20,
    resamples: int = 2000,
    batch_size: int = 32,
    folder: Path | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PathMap:
    """Patch the path from every single head below the receivers, one after the other.

    Arguments as in `path_patch`; `layers` are the senders'. The null takes `draws` of the senders
    at random. Numbers are not corrected for how many heads were tried: choose heads on some prompts
    and measure on others. With `folder` finished layers are kept, and the same call goes on.
    """
    prepared = _prepared(model, task, source, metric, batch_size)
    paths = prepared.paths(receivers, senders_at, receivers_at, freeze_mlps)
    rows = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    counts = {r: model.layout.blocks[r].heads.get("head_out", 0) for r in rows}
    if not any(counts.values()):
        prepared.patcher.checked(Site(rows[0], "head_out"))  # says why there are none
    heads: list[Senders] = [
        (Site(r, "head_out", h),) for r in rows if r < paths.top for h in range(counts[r])
    ]
    if not heads:
        paths.check((Site(rows[0], "head_out", 0),))
    target, other = prepared.patcher.ends(prepared.metric)
    total = len(heads) + (draws if null else 0)
    with show(total, f"path patching {model.label}", progress) as advance:
        found = paths.measure(heads, prepared.metric, folder=folder, advance=advance)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(heads), (draws,), generator=generator).tolist()
        nothing, notes = prepared.null(paths, [heads[k] for k in drawn], null, seed, advance)
    raw = metrics.mean_interval(found - target, task.topics, resamples=resamples, seed=seed)
    share = metrics.share_interval(
        found - target, other - target, task.topics, resamples=resamples, seed=seed
    )
    grids = []
    for values in (*raw, *share):
        grid = torch.full((len(rows), max(counts.values())), torch.nan)
        for (site,), value in zip(heads, values, strict=True):
            grid[rows.index(site.layer), site.head or 0] = float(value)
        grids.append(grid)
    each = torch.full((*grids[0].shape, len(target)), torch.nan)
    for (site,), values in zip(heads, found - target, strict=True):
        each[rows.index(site.layer), site.head or 0] = values.float()
    name, unit = metrics.named(prepared.metric)
    return PathMap(
        layers=rows,
        columns=tuple(str(h) for h in range(max(counts.values()))),
        kind="heads",
        part="head_out",
        positions=_place(senders_at),
        origin=prepared.patcher.said,
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
        null_change=(nothing - target).mean(-1).float(),
        notes=few(task.topics)
        + metrics.gap_note(other - target, task.topics)
        + notes
        + prepared.patcher.notes
        + paths.notes,
        record=prepared.record(paths, {"seed": seed, "draws": len(nothing)}),
        receivers=_names(paths),
        receivers_at=_place(receivers_at) if paths.receivers else "last",
        each=each,
        topics=task.topics,
    )


@dataclass
class _Prepared:
    patcher: Patcher
    task: Task
    asked: Metric | str

    @cached_property
    def metric(self) -> Metric:
        """Made after the paths: they say what the runs share."""
        return self.patcher.metric(self.asked)

    def paths(
        self, receivers: Sites, senders_at: "str | Where", receivers_at: "str | Where", mlps: bool
    ) -> Paths:
        chosen = () if receivers == LOGITS else self.patcher.checked(receivers)
        return Paths(
            self.patcher,
            chosen,
            senders_at=at(self.task, senders_at),
            receivers_at=at(self.task, receivers_at),
            freeze_mlps=mlps,
        )

    def null(self, paths: Paths, sets: Sequence[Senders], null: str | None, seed: int, advance):
        """The metric of each draw, and what is to be said of it."""
        nothing = torch.zeros(0, len(self.patcher.ids), dtype=torch.float64)
        if null is None or not sets:
            return nothing, ()
        if null not in ("prompts", "receivers"):
            raise ValueError(f"null={null!r}: choose 'prompts', 'receivers' or None")
        found = []
        for n, senders in enumerate(sets):
            patcher, receivers = self.patcher, paths.receivers
            if null == "prompts":
                if not isinstance(patcher.source, From) or len(set(self.task.topics)) < 2:
                    return nothing, ("No null was drawn: it needs a source run and two topics.",)
                drawn = Resampled(patcher.source, self.task.topics, seed + n)
                patcher = patcher.with_source(drawn, "all")
            else:
                receivers = _others(patcher, paths, senders, seed + n)
                if not receivers:
                    return nothing, ("No null was drawn: there are too few other receivers.",)
            other = paths.again(patcher, receivers)
            found.append(other.measure([senders], self.metric, advance=advance)[0])
        return torch.stack(found), ()

    def record(self, paths: Paths, settings: Mapping[str, object]):
        more = {
            "task": self.task.name, "receivers": list(_names(paths)),
            "senders_at": where_said(paths.senders_at),
            "receivers_at": where_said(paths.receivers_at), "freeze_mlps": paths.freeze_mlps,
        }  # fmt: skip
        return self.patcher.record({**more, **settings})


def _prepared(
    model: HookedModel,
    task: Task,
    source: Source | None,
    metric: "Metric | str | None",
    batch_size: int,
) -> _Prepared:
    task.rendered(model)  # says what is wrong with the task for this model
    origin = From(prompts=task.counterfactuals) if source is None else source
    patcher = Patcher(model, task.prompts, origin, batch_size=batch_size)
    patcher.settled()
    return _Prepared(patcher, task, task.metric if metric is None else metric)


def at(task: Task, where: "str | Where") -> Where:
    """A place of the task by its name, or positions as they are."""
    return task.places.get(where, where) if isinstance(where, str) else where


def _place(where: "str | Where") -> str:
    return where_said(where) if not isinstance(where, str) else where


def _names(paths: Paths) -> tuple[str, ...]:
    return tuple(map(str, paths.receivers)) or (LOGITS,)


def _others(patcher: Patcher, paths: Paths, senders: Senders, seed: int) -> tuple[Site, ...]:
    """As many inputs of other heads above the senders, of the same parts."""
    generator = torch.Generator().manual_seed(seed)
    lowest = min(s.layer for s in senders)
    found: list[Site] = []
    for part in sorted({s.part for s in paths.receivers}):
        n = sum(s.part == part for s in paths.receivers)
        pool = [
            Site(layer, part, head)
            for layer in patcher.model.layout.supported(part)
            for head in range(patcher.model.layout.blocks[layer].heads[part])
            if layer > lowest
        ]
        pool = [s for s in pool if s not in paths.receivers]
        if len(pool) < n:
            return ()
        found += [pool[k] for k in torch.randperm(len(pool), generator=generator)[:n].tolist()]
    return tuple(sorted(found))
