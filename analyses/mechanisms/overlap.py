"""Whether the same heads carry a task in several checkpoints of one model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import legend_below, name_ticks
from analyses.mechanisms.paths import PathMap
from analyses.patching.patch import few
from probes import figures
from probes.results import Record, Result
from probes.scores import bca
from probes.splits import codes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MEASURES = ("Pearson", "Spearman", "top")
"""Correlation of head scores, of their ranks, and the share of the top heads that both have."""


@dataclass(frozen=True)
class MechanismOverlap(Result):
    """Head scores of several checkpoints beside those of a reference."""

    reference: str
    names: tuple[str, ...]
    roles: tuple[str, ...]
    """"compared" or "control" (such as another seed of the same training)."""
    k: int
    """Heads that count as top, by absolute score."""
    n_heads: int
    values: Float[Tensor, "model measure limit"]
    """Each of `MEASURES` with 95 % BCa limits over topics, drawn alike for both checkpoints. The
    correlations are -1 to 1, the share 0 to 1."""
    shuffled_95: Float[Tensor, "model measure"]
    """95th percentile with the heads of one checkpoint shuffled: absolute for the correlations;
    for the top heads that of the hypergeometric distribution."""
    p_top: Float[Tensor, " model"]
    """Chance of so many common top heads or more when k are drawn at random (hypergeometric)."""
    scores: Float[Tensor, "map head"]
    """Mean scores, the reference first, heads in forward order."""
    notes: tuple[str, ...]

    @property
    def claimed(self) -> Tensor:
        """`[model, measure]`: whether the interval lies above what shuffled heads reach."""
        return self.values[..., 1] > self.shuffled_95

    def frame(self) -> "pd.DataFrame":
        """One row for each checkpoint and measure."""
        import pandas as pd

        rows = []
        for m, (name, role) in enumerate(zip(self.names, self.roles, strict=True)):
            for j, measure in enumerate(MEASURES):
                value, low, high = self.values[m, j].tolist()
                null = float(self.shuffled_95[m, j])
                rows.append({"model": name, "role": role, "measure": measure, "value": value,
                             "low": low, "high": high, "shuffled_95": null})  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Agreement of each checkpoint with the reference; bars of grey mark shuffled heads."""
        ax = figures.axes(ax, 5.4, 3.6)
        labels = ("Pearson", "Spearman", f"share of top {self.k}")
        with figures.theme():
            for j, label in enumerate(labels):
                x = [m + 0.2 * (j - 1) for m in range(len(self.names))]
                value, low, high = self.values[:, j].double().T.numpy()
                look = figures.style(j)
                ax.vlines(x, low, high, color=look["color"], lw=1.2)
                ax.plot(x, value, ls="", label=label, **look)
                null = self.shuffled_95[:, j].numpy()
                grey, name = figures.PALETTE[7], "_" * bool(j) + "shuffled heads, 95 %"
                ax.hlines(
                    null, [a - 0.08 for a in x], [a + 0.08 for a in x], color=grey, label=name
                )
            named = [
                name + (" (control)" if role == "control" else "")
                for name, role in zip(self.names, self.roles, strict=True)
            ]
            lines = name_ticks(ax, named)
            ax.set(
                xlim=(-0.6, len(self.names) - 0.4),
                ylabel=f"agreement with {self.reference}",
                title=f"Which heads carry the task: {self.n_heads} heads",
            )
            legend_below(ax, "mean over prompts, 95 % interval", lines)
        return ax

    def __str__(self) -> str:
        said = []
        for m, (name, role) in enumerate(zip(self.names, self.roles, strict=True)):
            r, low, high = self.values[m, 1].tolist()
            common = round(float(self.values[m, 2, 0]) * self.k)
            said.append(
                f"{name}{' (control)' if role == 'control' else ''} rank correlation {r:.2f} "
                f"[{low:.2f}, {high:.2f}], {common} of the top {self.k} heads common "
                f"(p {float(self.p_top[m]):.2g})"
            )
        return f"head scores beside {self.reference}'s: " + "; ".join(said)


def mechanism_overlap(
    maps: Sequence[PathMap],
    names: Sequence[str],
    *,
    controls: Sequence[str] = (),
    k: int = 20,
    shuffles: int = 1000,
    resamples: int = 1000,
    seed: int = 0,
) -> MechanismOverlap:
    """Compare head scores measured on the same prompts; the first map is the reference.

    `controls` are those names that differ by chance alone, such as another seed: how far they agree
    is what an unchanged mechanism looks like.
    """
    if len(maps) != len(names) or len(maps) < 2:
        raise ValueError(
            f"{len(maps)} maps came with {len(names)} names: give one for each of two or more"
        )
    first = maps[0]
    for name, other in zip(names, maps, strict=True):
        if other.topics != first.topics or other.change.shape != first.change.shape:
            raise ValueError(
                f"the map of {name} has other prompts, layers or heads than that of {names[0]}: "
                "measure one task on checkpoints of one model"
            )
        if (other.receivers, other.metric) != (first.receivers, first.metric):
            raise ValueError(
                f"the map of {name} is of paths to {', '.join(other.receivers)} and "
                f"{other.metric}, that of {names[0]} of {', '.join(first.receivers)} and "
                f"{first.metric}: compare like with like"
            )
    there = first.each.isfinite().all(-1)
    scores = torch.stack([m.each[there].double() for m in maps])  # map, head, prompt
    n = scores.shape[1]
    if not 0 < k < n:
        raise ValueError(f"k={k} top heads of {n}: give 1 to {n - 1}")
    numbers, known = codes(first.topics)
    member = torch.nn.functional.one_hot(numbers, len(known)).double()
    sums = scores @ member  # map, head, topic
    sizes = member.sum(0)
    generator = torch.Generator().manual_seed(seed)

    def means(weights: Tensor) -> Tensor:
        """`[draw, map, head]` for weights of topics."""
        return torch.einsum("mht,dt->dmh", sums, weights) / (weights @ sizes)[:, None, None]

    drawn = torch.randint(len(known), (resamples, len(known)), generator=generator)
    counts = torch.zeros(resamples, len(known), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    ones = torch.ones(1, len(known), dtype=torch.float64)
    leave = 1 - torch.eye(len(known), dtype=torch.float64)
    whole = means(ones)
    values, nulls, ps = [], [], []
    boot, jack = (means(w) if len(known) > 1 else None for w in (counts, leave))
    orders = [torch.randperm(n, generator=generator) for _ in range(shuffles)]
    for m in range(1, len(maps)):
        row, null = [], []
        for which in (pearson, spearman, lambda a, b: top_shared(a, b, k)):
            value = which(whole[:, 0], whole[:, m])
            if boot is None or jack is None:
                limits = torch.full((2,), torch.nan, dtype=torch.float64)
            else:
                found = bca(value[0], which(boot[:, 0], boot[:, m]), which(jack[:, 0], jack[:, m]))
                limits = torch.stack([found.low, found.high])
            row.append(torch.cat([value, limits]))
            if len(row) < 3:
                null.append(_shuffled(which, whole[0, 0], whole[0, m], orders))
        common = round(float(row[2][0]) * k)
        p, bound = hypergeometric(n, k, common)
        values.append(torch.stack(row))
        nulls.append([*null, bound / k])
        ps.append(p)
    own = tuple(names[1:])
    return MechanismOverlap(
        reference=names[0],
        names=own,
        roles=tuple("control" if name in controls else "compared" for name in own),
        k=k,
        n_heads=n,
        values=torch.stack(values).float(),
        shuffled_95=torch.tensor(nulls),
        p_top=torch.tensor(ps),
        scores=whole[0].float(),
        notes=few(first.topics),
        record=Record(
            models=tuple(names),
            fingerprints=tuple(f for m in maps for f in m.record.fingerprints[:1]),
            template_hash=first.record.template_hash,
            prompts_hash=first.record.prompts_hash,
            dtype=first.record.dtype,
            engine=first.record.engine,
            settings={**first.record.settings, "k": k, "shuffles": shuffles, "seed": seed},
        ),
    )


def pearson(a: Float[Tensor, "draw head"], b: Float[Tensor, "draw head"]) -> Tensor:
    """Correlation over heads; NaN where one side is constant."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def spearman(a: Float[Tensor, "draw head"], b: Float[Tensor, "draw head"]) -> Tensor:
    """Correlation of ranks, ties at their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def top_shared(a: Float[Tensor, "draw head"], b: Float[Tensor, "draw head"], k: int) -> Tensor:
    """Share of the k largest absolute scores that both have."""
    chosen = []
    for x in (a, b):
        at = x.abs().argsort(dim=-1, descending=True, stable=True)[:, :k]
        chosen.append(torch.zeros_like(x).scatter_(-1, at, 1.0))
    return (chosen[0] * chosen[1]).sum(-1) / k


def hypergeometric(n: int, k: int, common: int) -> tuple[float, int]:
    """P(common or more) of two random sets of k out of n, and the 95th percentile."""
    from scipy.stats import hypergeom

    law = hypergeom(n, k, k)
    return float(law.sf(common - 1)), int(law.ppf(0.95))


def _ranks(x: Float[Tensor, "draw head"]) -> Tensor:
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(x.numpy(), axis=-1))


def _shuffled(
    which: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, orders: Sequence[Tensor]
) -> float:
    moved = torch.stack([b[order] for order in orders])
    return float(which(a.expand_as(moved), moved).abs().quantile(0.95))
