"""Whether a circuit does the task by itself: everything outside it ablated, on unseen prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.mechanisms.ablation import Ablation, Kept
from analyses.mechanisms.circuit import Circuit
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
class Faithfulness(Result):
    """The metric of a circuit alone beside that of the whole model and of nothing."""

    task: str
    model: str
    circuit: tuple[str, ...]
    ablation: str
    """"mean", "zero", "resample" or "counterfactual"."""
    metric: str
    unit: str
    full: Float[Tensor, " prompt"]
    """The metric of the whole model."""
    alone: Float[Tensor, " prompt"]
    """The metric with everything outside the circuit ablated."""
    empty: Float[Tensor, " prompt"]
    """The metric with everything ablated, the circuit too."""
    ratio: Float[Tensor, " limit"]
    """Mean of `alone` over mean of `full`, with its 95 % limits over topics
    (`metrics.share_interval`). It has a meaning only where the metric has a natural zero (accuracy,
    a probability)."""
    normalised: Float[Tensor, " limit"]
    """(M(C) - M(nothing)) / (M(full) - M(nothing)) of means, with its limits: 0 no better than
    nothing, 1 the whole model; may lie outside. NaN where the two are equal."""
    random: Float[Tensor, " draw"]
    """The same share of circuits of as many heads (and MLPs) drawn at random."""
    notes: tuple[str, ...]

    @property
    def null_95(self) -> float:
        """95th percentile of the random circuits' share; NaN without any."""
        return float(self.random.double().quantile(0.95)) if len(self.random) else float("nan")

    @property
    def claimed(self) -> bool:
        """Whether the interval lies above the 95th percentile of random circuits."""
        return float(self.normalised[1]) > self.null_95

    def frame(self) -> "pd.DataFrame":
        """One row a prompt."""
        import pandas as pd

        columns = {n: getattr(self, n).tolist() for n in ("full", "alone", "empty")}
        return pd.DataFrame({"prompt": range(len(self.full)), **columns})

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Every prompt's metric in the whole model and in the circuit alone."""
        ax = figures.axes(ax, 4.6, 4.2)
        with figures.theme():
            ends = torch.cat([self.full, self.alone, self.empty])
            low, high = float(ends.min()), float(ends.max())
            ax.plot([low, high], [low, high], color=figures.PALETTE[7], lw=1, label="equal")
            for k, (name, values) in enumerate(
                (("circuit alone", self.alone), ("nothing", self.empty))
            ):
                look = figures.style(k)
                if k:
                    look["mfc"] = "none"  # what lies below is seen
                ax.plot(self.full.numpy(), values.numpy(), ls="", label=name, **look)
            unit = f" ({self.unit})" if self.unit else ""
            ax.set(
                xlabel=f"whole model{unit}",
                ylabel=f"{self.metric}{unit}",
                title=broken(f"{self.task}: {len(self.circuit)} sites of {self.model}"),
            )
            legend_below(ax, f"{self.ablation} ablation of the rest")
        return ax

    def __str__(self) -> str:
        value, low, high = self.normalised.tolist()
        said = f"{self.task}, {self.model}: {len(self.circuit)} sites alone have a faithfulness of "
        said += f"{value:.2f} [{low:.2f}, {high:.2f}]"
        if len(self.random):
            said += f"; {len(self.random)} random circuits at most {self.null_95:.2f}"
            said += "" if self.claimed else ": not told from them"
        return said


@dataclass(frozen=True)
class FaithfulnessCurve(Result):
    """Faithfulness of the first heads of a ranking, for several numbers of heads."""

    task: str
    model: str
    ablation: str
    ranked: tuple[str, ...]
    sizes: tuple[int, ...]
    normalised: Float[Tensor, "size limit"]
    """As in `Faithfulness`, with its limits over topics."""
    random: Float[Tensor, "size draw"]
    """The same share of circuits of that size drawn at random."""
    notes: tuple[str, ...]

    def frame(self) -> "pd.DataFrame":
        """One row a size."""
        import pandas as pd

        band = self._band()
        return pd.DataFrame(
            {
                "size": self.sizes,
                "normalised": self.normalised[:, 0].tolist(),
                "low": self.normalised[:, 1].tolist(),
                "high": self.normalised[:, 2].tolist(),
                "random_low": band[0].tolist(),
                "random_high": band[1].tolist(),
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Share of the metric kept against the number of heads, beside random circuits."""
        ax = figures.axes(ax)
        with figures.theme():
            x = list(range(len(self.sizes)))
            value, low, high = self.normalised.T.numpy()
            look = figures.style(0)
            ax.plot(x, value, label="heads by rank, 95 % interval", **look)
            ax.fill_between(x, low, high, color=look["color"], alpha=0.2, lw=0)
            band = self._band().numpy()
            grey = figures.PALETTE[7]
            ax.fill_between(x, *band, color=grey, alpha=0.35, lw=0)
            label = f"{self.random.shape[1]} random circuits, 5 to 95 %"
            ax.plot(x, self.random.mean(1).numpy(), color=grey, ls="--", label=label)
            ax.axhline(1, color=figures.PALETTE[6], lw=0.8, ls=":")
            ax.set_xticks(x, [str(n) for n in self.sizes])
            ax.set(
                xlabel=f"heads kept, of {len(self.ranked)}",
                ylabel="faithfulness\n(0 nothing, 1 whole model)",
                title=broken(f"{self.task}: circuits of {self.model}"),
            )
            legend_below(ax)
        return ax

    def __str__(self) -> str:
        reached = [n for n, v in zip(self.sizes, self.normalised[:, 0].tolist(), strict=True)
                   if v >= 0.8]  # fmt: skip
        said = f"{reached[0]} heads reach" if reached else f"{self.sizes[-1]} heads do not reach"
        if reached == [len(self.ranked)]:
            said = f"only all {reached[0]} heads reach"
        return f"{self.task}, {self.model}: {said} a faithfulness of 0.80"

    def _band(self) -> Tensor:
        return self.random.double().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), 1)


def faithfulness(
    model: HookedModel,
    task: Task,
    circuit: Circuit,
    *,
    ablation: str = "mean",
    reference: Sequence[Prompt] | None = None,
    draws: int = 10,
    resamples: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Faithfulness:
    """What the circuit does with everything else ablated (`ablation.Ablation`).

    MLPs are ablated where the circuit names any. Prompts of topics on which the circuit was
    chosen are refused. A site outside its group's place counts as outside the circuit. The null
    is circuits of as many heads and MLPs drawn at random, at the same places.
    """
    circuit.check(model)
    disjoint(task, circuit)
    runs = Ablation(
        model, task, ablation, reference=reference, mlps=circuit.mlps, batch_size=batch_size,
        seed=seed,
    )  # fmt: skip
    own: Kept = circuit.where(task)
    sets: list[Kept] = [own, {}, *random_sets(runs.sites, own, draws, seed)]
    with show(len(sets), f"ablating {model.label}", progress) as advance:
        found = runs.measure(sets, advance)
    full, alone, empty = runs.full, found[0], found[1]
    name, unit = metrics.named(task.metric)
    ratio = metrics.share_interval(alone, full, task.topics, resamples=resamples, seed=seed)
    return Faithfulness(
        task=task.name,
        model=model.label,
        circuit=tuple(map(str, circuit.sites)),
        ablation=ablation,
        metric=name,
        unit=unit,
        full=full.float(),
        alone=alone.float(),
        empty=empty.float(),
        ratio=metrics.triple(ratio),
        normalised=_normalised(alone, full, empty, task.topics, resamples, seed)[0],
        random=_shares(found[2:], full, empty),
        notes=few(task.topics) + metrics.gap_note(full - empty, task.topics) + runs.patcher.notes,
        record=runs.patcher.record({"ablation": ablation, "draws": draws, "seed": seed}),
    )


def faithfulness_curve(
    model: HookedModel,
    task: Task,
    ranked: Sequence[Site],
    sizes: Sequence[int] | None = None,
    *,
    ablation: str = "mean",
    reference: Sequence[Prompt] | None = None,
    draws: int = 10,
    resamples: int = 2000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> FaithfulnessCurve:
    """Faithfulness of the first heads of a ranking made on other prompts, best first.

    By default sizes double from 1 on, up to all of them.
    """
    if not ranked or len(set(ranked)) < len(ranked):
        raise ValueError(
            f"the ranking has {len(ranked)} heads, {len(set(ranked))} of them different: give "
            "each head once, at least one"
        )
    model.sites(list(ranked))
    if sizes is None:
        sizes = [2**k for k in range(len(ranked).bit_length()) if 2**k < len(ranked)]
        sizes = [*sizes, len(ranked)]
    sizes = sorted(set(sizes))
    if sizes[0] < 1 or sizes[-1] > len(ranked):
        raise ValueError(
            f"sizes {sizes[0]} to {sizes[-1]} were asked of {len(ranked)} ranked heads: give "
            f"sizes from 1 to {len(ranked)}"
        )
    mlps = any(site.part == "mlp_out" for site in ranked)
    runs = Ablation(
        model, task, ablation, reference=reference, mlps=mlps, batch_size=batch_size, seed=seed
    )
    sets: list[Kept] = [{}]
    for n in sizes:
        own: Kept = dict.fromkeys(ranked[:n])
        sets += [own, *random_sets(runs.sites, own, draws, seed + n)]
    with show(len(sets), f"ablating {model.label}", progress) as advance:
        found = runs.measure(sets, advance)
    full, empty = runs.full, found[0]
    rows = found[1:].reshape(len(sizes), draws + 1, -1)
    return FaithfulnessCurve(
        task=task.name,
        model=model.label,
        ablation=ablation,
        ranked=tuple(map(str, ranked)),
        sizes=tuple(sizes),
        normalised=_normalised(rows[:, 0], full, empty, task.topics, resamples, seed),
        random=torch.stack([_shares(own, full, empty) for own in rows[:, 1:]]),
        notes=few(task.topics) + metrics.gap_note(full - empty, task.topics) + runs.patcher.notes,
        record=runs.patcher.record({"ablation": ablation, "draws": draws, "seed": seed}),
    )


def disjoint(task: Task, circuit: Circuit) -> None:
    """Refuse prompts of topics that a circuit was chosen on."""
    if both := set(task.topics) & set(circuit.chosen_on):
        raise ValueError(
            f"the circuit was chosen on {len(both)} of the {len(set(task.topics))} topics of these "
            f"prompts, such as {min(both)!r}: measure on a disjoint part"
        )


def random_sets(pool: Sequence[Site], own: Kept, draws: int, seed: int) -> list[Kept]:
    """Sets of as many heads and MLPs drawn from all, at the tokens of those given."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Kept] = []
    for _ in range(draws):
        drawn: dict = {}
        for part in ("head_out", "mlp_out"):
            some = [s for s in pool if s.part == part]
            wanted = [own[s] for s in own if s.part == part]
            order = torch.randperm(len(some), generator=generator).tolist()
            drawn |= {some[k]: at for k, at in zip(order, wanted, strict=False)}
        found.append(drawn)
    return found


def _normalised(
    alone: Tensor, full: Tensor, empty: Tensor, topics: Sequence[str], resamples: int, seed: int
) -> Float[Tensor, "size limit"]:
    found = metrics.share_interval(
        alone - empty, full - empty, topics, resamples=resamples, seed=seed
    )
    return torch.stack([t.reshape(-1) for t in found], 1).float()


def _shares(sets: Tensor, full: Tensor, empty: Tensor) -> Float[Tensor, " draw"]:
    """Normalised faithfulness of each set, without intervals."""
    gap = float((full - empty).mean())
    over = (sets - empty).mean(-1)
    return (over / gap if gap else torch.full_like(over, torch.nan)).float()
