"""Whether a circuit is complete, and whether every head in it is needed (Wang et al. 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.mechanisms.ablation import Ablation, Kept
from analyses.mechanisms.circuit import Circuit
from analyses.mechanisms.faithfulness import disjoint
from analyses.mechanisms.task import Task
from analyses.patching import metrics
from analyses.patching.patch import few
from probes import figures
from probes.model import HookedModel
from probes.progress import progress as show
from probes.prompts import Prompt
from probes.results import Result
from probes.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Completeness(Result):
    """The metric of circuit and whole model with the same subset K of the circuit taken away."""

    task: str
    model: str
    metric: str
    unit: str
    removed: tuple[tuple[str, ...], ...]
    """The sites of each K."""
    names: tuple[str, ...]
    """The group that K is, or "random"."""
    circuit_without: Float[Tensor, " subset"]
    """Mean metric of the circuit without K."""
    model_without: Float[Tensor, " subset"]
    """Mean metric of the whole model with K alone ablated."""
    incompleteness: Float[Tensor, "subset limit"]
    """|mean of circuit_without - model_without| with 95 % BCa limits of the difference over topics
    (of its absolute value where they have one sign, else from 0), in the metric's unit."""
    notes: tuple[str, ...]

    def frame(self) -> "pd.DataFrame":
        """One row a subset."""
        import pandas as pd

        value, low, high = self.incompleteness.T.tolist()
        return pd.DataFrame(
            {
                "removed": self.names,
                "sites": [len(k) for k in self.removed],
                "circuit_without": self.circuit_without.tolist(),
                "model_without": self.model_without.tolist(),
                "incompleteness": value,
                "low": low,
                "high": high,
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The model against the circuit, one mark a subset; a complete circuit is on the line."""
        ax = figures.axes(ax, 4.6, 4.2)
        with figures.theme():
            ends = torch.cat([self.circuit_without, self.model_without])
            low, high = float(ends.min()), float(ends.max())
            ax.plot([low, high], [low, high], color=figures.PALETTE[7], lw=1, label="complete")
            for k, name in enumerate(dict.fromkeys(self.names)):
                at = [j for j, own in enumerate(self.names) if own == name]
                label = "random subsets" if name == "random" else f"without {name}"
                x, y = self.model_without[at].numpy(), self.circuit_without[at].numpy()
                ax.plot(x, y, ls="", label=label, **figures.style(k))
            unit = f" ({self.unit})" if self.unit else ""
            ax.set(
                xlabel=f"{self.metric} of the model without K{unit}",
                ylabel=f"of the circuit without K{unit}",
                title=broken(f"Completeness: {self.task}, {self.model}"),
            )
            legend_below(ax, "subset K of the circuit")
        return ax

    def __str__(self) -> str:
        worst = int(self.incompleteness[:, 0].argmax())
        return (
            f"{self.task}, {self.model}: without {self.names[worst]} ({len(self.removed[worst])} "
            f"sites) circuit and model differ most, by {float(self.incompleteness[worst, 0]):.3g} "
            f"{self.unit}".rstrip()
        )


@dataclass(frozen=True)
class Minimality(Result):
    """What each head adds to the circuit when those it interacts with most are gone."""

    task: str
    model: str
    metric: str
    unit: str
    sites: tuple[str, ...]
    partners: tuple[tuple[str, ...], ...]
    """K of each site: the sites that interact with it most."""
    score: Float[Tensor, "site limit"]
    """Mean of F(C without K) - F(C without K and the site), in the metric's unit, with 95 % BCa
    limits over topics; positive: the site helps."""
    ratio: Float[Tensor, " site"]
    """The released form F(C without K) / F(C without K and the site) - 1; NaN where it has no
    denominator. Kept there from 0.01 on."""
    null_score: Float[Tensor, " draw"]
    """The score of sites outside the circuit added to it, each with a random K."""
    notes: tuple[str, ...]

    @property
    def null_95(self) -> float:
        """95th percentile of the null's absolute scores; NaN without a null."""
        found = self.null_score.double().abs()
        return float(found.quantile(0.95)) if len(found) else float("nan")

    @property
    def needed(self) -> tuple[bool, ...]:
        """Whether each site's interval excludes what sites outside the circuit reach."""
        low, high = self.score[:, 1], self.score[:, 2]
        return tuple(((low > self.null_95) | (high < -self.null_95)).tolist())

    def frame(self) -> "pd.DataFrame":
        """One row a site."""
        import pandas as pd

        value, low, high = self.score.T.tolist()
        return pd.DataFrame(
            {"site": self.sites, "score": value, "low": low, "high": high,
             "ratio": self.ratio.tolist(), "needed": self.needed}
        )  # fmt: skip

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Score of each site with its interval, the null's band around 0."""
        ax = figures.axes(ax, 5.0, max(2.4, 1.4 + 0.2 * len(self.sites)))
        with figures.theme():
            value, low, high = self.score.numpy().T
            rows = range(len(self.sites))
            if len(self.null_score):
                label = "sites outside, 95 %"
                ax.axvspan(-self.null_95, self.null_95, color=figures.PALETTE[7], alpha=0.3,
                           lw=0, label=label)  # fmt: skip
            ax.hlines(rows, low, high, color=figures.PALETTE[0])
            ax.plot(value, rows, ls="", label="site, 95 % interval", **figures.style(0))
            ax.set_yticks(rows, self.sites)
            unit = f" ({self.unit})" if self.unit else ""
            ax.set(
                xlabel=f"{self.metric} lost without the site{unit}",
                title=broken(f"Minimality: {self.task}, {self.model}"),
            )
            legend_below(ax)
        return ax

    def __str__(self) -> str:
        return (
            f"{self.task}, {self.model}: {sum(self.needed)} of {len(self.sites)} sites are needed "
            f"(null {self.null_95:.2g} {self.unit}".rstrip()
            + ")"
        )


def completeness(
    model: HookedModel,
    task: Task,
    circuit: Circuit,
    *,
    draws: int = 20,
    ablation: str = "mean",
    reference: Sequence[Prompt] | None = None,
    resamples: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Completeness:
    """|F(C without K) - F(M without K)| for every group K and `draws` random subsets K.

    Random subsets hold each site of the circuit with probability one half.
    """
    runs, own = _opened(model, task, circuit, ablation, reference, batch_size, seed)
    generator = torch.Generator().manual_seed(seed)
    subsets = [(name, circuit.group(name)) for name in circuit.names if circuit.groups[name]]
    for _ in range(draws):
        coins = torch.rand(len(circuit), generator=generator)
        some = tuple(s for s, c in zip(circuit.sites, coins, strict=True) if c < 0.5)
        subsets.append(("random", some))
    sets: list[Kept] = []
    for _, gone in subsets:
        sets += [_less(own, gone), {s: None for s in runs.sites if s not in gone}]
    with show(len(sets), f"ablating {model.label}", progress) as advance:
        found = runs.measure(sets, advance)
    alone, whole = found[::2], found[1::2]
    interval = metrics.mean_interval(alone - whole, task.topics, resamples=resamples, seed=seed)
    value, low, high = interval
    across = (low < 0) & (high > 0)
    size = torch.stack([low.abs(), high.abs()])
    least = torch.where(across, torch.zeros_like(low), size.min(0).values)
    name, unit = metrics.named(task.metric)
    return Completeness(
        task=task.name,
        model=model.label,
        metric=name,
        unit=unit,
        removed=tuple(tuple(map(str, gone)) for _, gone in subsets),
        names=tuple(name for name, _ in subsets),
        circuit_without=alone.mean(-1).float(),
        model_without=whole.mean(-1).float(),
        incompleteness=torch.stack([value.abs(), least, size.max(0).values], 1).float(),
        notes=few(task.topics) + runs.patcher.notes,
        record=runs.patcher.record({"ablation": ablation, "draws": draws, "seed": seed}),
    )


def minimality(
    model: HookedModel,
    task: Task,
    circuit: Circuit,
    *,
    share: float = 0.3,
    draws: int = 20,
    ablation: str = "mean",
    reference: Sequence[Prompt] | None = None,
    resamples: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Minimality:
    """What each site adds when the `share` of the others that interact with it most is gone.

    Two sites interact by |F(C) - F(C without u) - F(C without v) + F(C without both)|, where F is
    the mean metric. The number of runs grows with the square of the circuit.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}: give the part of the circuit to remove, 0 to below 1")
    runs, own = _opened(model, task, circuit, ablation, reference, batch_size, seed)
    sites = circuit.sites
    n, k = len(sites), round(share * (len(sites) - 1))
    pairs = list(combinations(range(n), 2)) if k else []
    outside = [s for s in runs.sites if s not in own]
    generator = torch.Generator().manual_seed(seed)
    drawn = [outside[j] for j in torch.randperm(len(outside), generator=generator)[:draws].tolist()]
    singles: list[Kept] = [own, *(_less(own, [s]) for s in sites)]
    doubles: list[Kept] = [_less(own, [sites[a], sites[b]]) for a, b in pairs]
    total = len(singles) + len(doubles) + 2 * (n + len(drawn))
    with show(total, f"ablating {model.label}", progress) as advance:
        first = runs.measure([*singles, *doubles], advance).mean(-1)
        interacts = torch.zeros(n, n, dtype=torch.float64)
        for (a, b), both in zip(pairs, first[n + 1 :].tolist(), strict=True):
            second = first[0] - first[1 + a] - first[1 + b] + both
            interacts[a, b] = interacts[b, a] = second.abs()
        interacts.fill_diagonal_(-1)
        order = interacts.argsort(dim=-1, descending=True, stable=True)
        partners = [tuple(sites[j] for j in order[i, :k].tolist()) for i in range(n)]
        sets: list[Kept] = []
        for site, gone in zip(sites, partners, strict=True):
            sets += [_less(own, gone), _less(own, [*gone, site])]
        for site in drawn:
            gone = [sites[j] for j in torch.randperm(n, generator=generator)[:k].tolist()]
            left = _less(own, gone)
            sets += [{**left, site: None}, left]
        found = runs.measure(sets, advance)
    lost = found[::2] - found[1::2]
    score = metrics.mean_interval(lost[:n], task.topics, resamples=resamples, seed=seed)
    over, under = found[: 2 * n : 2].mean(-1), found[1 : 2 * n : 2].mean(-1)
    ratio = torch.where(under == 0, torch.nan, over / under.where(under != 0, 1.0) - 1)
    name, unit = metrics.named(task.metric)
    return Minimality(
        task=task.name,
        model=model.label,
        metric=name,
        unit=unit,
        sites=tuple(map(str, sites)),
        partners=tuple(tuple(map(str, own)) for own in partners),
        score=torch.stack([t.reshape(-1) for t in score], 1).float(),
        ratio=ratio.float(),
        null_score=lost[n:].mean(-1).float(),
        notes=few(task.topics) + runs.patcher.notes,
        record=runs.patcher.record({"ablation": ablation, "share": share, "seed": seed}),
    )


def _opened(
    model: HookedModel,
    task: Task,
    circuit: Circuit,
    ablation: str,
    reference: Sequence[Prompt] | None,
    batch_size: int,
    seed: int,
) -> tuple[Ablation, Kept]:
    circuit.check(model)
    disjoint(task, circuit)
    runs = Ablation(
        model, task, ablation, reference=reference, mlps=circuit.mlps, batch_size=batch_size,
        seed=seed,
    )  # fmt: skip
    return runs, circuit.where(task)


def _less(own: Kept, gone: Sequence[Site]) -> Kept:
    return {site: at for site, at in own.items() if site not in gone}
