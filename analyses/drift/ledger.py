"""The drift ledger: four kinds of drift side by side, each in units of its own null.

One number of one kind fails. A fine-tune can override the output and leave the representation
where it was, or erode the representation first; two of equal weight change can do either. So the
ledger keeps a weight, a representation, a token and a behaviour term (`analyses.drift.terms`), and
the headline never stands without them.

**Headline.** The geometric mean of (1 + term), less 1, over the three terms of what the model does:
representation, token, behaviour, each in units of its null's 95th percentile. It is 0 where none
of them changed, and 1 where each is as large as its null makes it in one case of twenty. The weight
term stands beside it and not in it: weights are read without sampling error, so any training at all
is tens to hundreds of nulls large there. A checkpoint that was not trained from the reference (another
seed) even holds the alignment matrix negated by construction: its update is its own alignment less
the reference's.

Controls stand beside the drifts and calibrate nothing: a bfloat16 and an 8-bit round trip of the
reference, and other alignments of the same base (seeds), where there are some.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.drift.round_trips import FORMATS, round_trip
from analyses.drift.terms import TERMS
from analyses.drift.yardstick import Drift, Yardstick
from analyses.figures import legend_below
from probes import figures
from probes.contrast import Contrast
from probes.model import HookedModel
from probes.progress import progress as show
from probes.results import Result
from probes.scores import Interval, bca

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

HEADLINE: dict[str, Any] = {"color": "#111111", "marker": "|"}
"""How the headline is drawn beside the terms."""


@dataclass(frozen=True)
class DriftLedger(Result):
    """Checkpoints against one aligned reference."""

    reference: str
    labels: tuple[str, ...]
    roles: tuple[str, ...]
    """`base`, `drifted` or `control`."""
    value: Float[Tensor, "checkpoint term"]
    """In units of the null's 95th percentile, terms in the order of `TERMS`."""
    low: Float[Tensor, "checkpoint term"]
    high: Float[Tensor, "checkpoint term"]
    statistic: Float[Tensor, "checkpoint term"]
    """Signed cosine, ratio, nats, rate: what the units are counted of."""
    null_95: Float[Tensor, "checkpoint term"]
    resampled: Float[Tensor, "checkpoint resample term"]
    """Values on resampled topics, the same topics for every checkpoint (tensors of the model for
    the weight term)."""
    layer_null: Float[Tensor, " layer"]
    """95th percentile of the change of the distance between the class means that two halves of
    the topics show."""
    projection: Float[Tensor, "checkpoint class layer"]
    """Shift of the class means along the reference's class direction, over the distance between
    the classes (positive class first)."""
    details: tuple[dict[str, tuple[float, float, float]], ...]
    topics: int

    @classmethod
    def of(cls, yardstick: Yardstick, drifts: Sequence[Drift]) -> "DriftLedger":
        """From measured checkpoints."""
        if not drifts:
            raise ValueError("no checkpoint was measured: give at least one beside the reference")
        _told_apart([d.label for d in drifts])

        def column(name: str) -> Tensor:
            rows = [[getattr(term, name) for term in d.terms] for d in drifts]
            return torch.tensor(rows, dtype=torch.float64)

        return cls(
            yardstick.reference.label,
            tuple(d.label for d in drifts),
            tuple(d.role for d in drifts),
            column("value"),
            column("low"),
            column("high"),
            column("statistic"),
            column("null_95"),
            torch.stack([torch.stack([t.resampled for t in d.terms], -1) for d in drifts]),
            yardstick.nulls[0].cells.float(),
            torch.stack([d.projection for d in drifts]),
            tuple(d.details for d in drifts),
            int(yardstick.groups.max()) + 1,
            record=yardstick.record,
        )

    def headline(self, label: str) -> Interval:
        """The index of one checkpoint with its bias-corrected 95 % bootstrap interval."""
        i = self.labels.index(label)
        still = torch.zeros(2, dtype=torch.float64)  # no acceleration: the units are of two kinds
        found = bca(headline(self.value[i]), headline(self.resampled[i]), still)
        return Interval(*(float(x) for x in found))

    def claimed(self, label: str) -> tuple[str, ...]:
        """Terms whose interval excludes their null's 95th percentile."""
        i = self.labels.index(label)
        return tuple(t for t, low in zip(TERMS, self.low[i].tolist(), strict=True) if low > 1)

    def compare(self, first: str, second: str) -> dict[str, Interval]:
        """Each term, and the headline, of the first checkpoint minus the second: percentile
        intervals of the difference on the same resampled topics."""
        i, j = self.labels.index(first), self.labels.index(second)
        names = (*TERMS, "headline")
        whole = [torch.cat([v, headline(v)[None]]) for v in (self.value[i], self.value[j])]
        drawn = [torch.cat([r, headline(r)[:, None]], 1) for r in self.resampled[[i, j]]]
        low, high = (drawn[0] - drawn[1]).quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
        rows = zip(names, (whole[0] - whole[1]).tolist(), low.tolist(), high.tolist(), strict=True)
        return {name: Interval(value, a, b) for name, value, a, b in rows}

    def frame(self) -> "pd.DataFrame":
        """One row per checkpoint and term, the headline among them."""
        import pandas as pd

        rows = []
        for i, (label, role) in enumerate(zip(self.labels, self.roles, strict=True)):
            head = self.headline(label)
            rows.append({"checkpoint": label, "role": role, "term": "headline"} | head._asdict())
            for k, term in enumerate(TERMS):
                rows.append(
                    {"checkpoint": label, "role": role, "term": term}
                    | {n: float(getattr(self, n)[i, k]) for n in ("value", "low", "high")}
                    | {n: float(getattr(self, n)[i, k]) for n in ("statistic", "null_95")}
                    | {"claimed": float(self.low[i, k]) > 1}
                )
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Every term of every checkpoint in units of its null, and the headline."""
        n = len(self.labels)
        ax = figures.axes(ax, 6.4, 1.6 + 0.62 * n)
        with figures.theme():
            ax.axvspan(0, 1, color=figures.PALETTE[7], alpha=0.18, lw=0, label="inside the null")
            heads = [self.headline(label) for label in self.labels]
            for k, term in enumerate((*TERMS, "headline")):
                look = figures.style(k) if k < len(TERMS) else HEADLINE
                points = [
                    heads[i]
                    if k == len(TERMS)
                    else Interval(*(float(x[i, k]) for x in (self.value, self.low, self.high)))
                    for i in range(n)
                ]
                error = [
                    [max(0.0, p.value - p.low) for p in points],
                    [max(0.0, p.high - p.value) for p in points],
                ]
                ax.errorbar(
                    [p.value for p in points],
                    [i + (k - 2) * 0.14 for i in range(n)],
                    xerr=error,
                    ls="",
                    capsize=2,
                    label=term,
                    markersize=9 if k == len(TERMS) else 4,
                    **look,
                )
            ax.set_xscale("symlog", linthresh=1.0)
            ax.set_xlim(left=-0.05)
            ax.set_yticks(
                range(n),
                [
                    f"{x} (control)" if r == "control" else x
                    for x, r in zip(self.labels, self.roles, strict=True)
                ],
            )
            ax.set_ylim(n - 0.4, -0.6)
            ax.set(
                xlabel="95th percentiles of the term's own null (linear to 1, then logarithmic)",
                title=f"Drift from {self.reference}, {self.topics} topics",
            )
            legend_below(ax, "term, 95 % interval")
        return ax

    def plot_layers(self, ax: "Axes | None" = None) -> "Axes":
        """Change of the distance between the class means along the reference's direction."""
        ax = figures.axes(ax, 5.0, 3.9)
        layers = range(self.projection.shape[2])
        null = self.layer_null.numpy()
        with figures.theme():
            ax.fill_between(
                layers, -null, null, color=figures.PALETTE[7], alpha=0.18, lw=0,
                label="two halves of the topics, 95 %",
            )  # fmt: skip
            for i, label in enumerate(self.labels):
                change = self.projection[i, 0] - self.projection[i, 1]
                ax.plot(layers, change.numpy(), label=label, markevery=3, **figures.style(i))
            ax.axhline(0.0, lw=0.8, color=figures.PALETTE[7])
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel="change of the class contrast\n(-1: nothing of it is left)",
                title=f"Along {self.reference}'s class direction",
            )
            legend_below(ax, "checkpoint")
        return ax

    def __str__(self) -> str:
        said = []
        for label in self.labels:
            if not bool(self.value[self.labels.index(label)].any()):
                said.append(f"{label} 0 (identical)")
                continue
            head, claimed = self.headline(label), self.claimed(label)
            beyond = ", ".join(claimed) or "none"
            said.append(
                f"{label} {head.value:.2f} [{head.low:.2f}, {head.high:.2f}] (beyond null: {beyond})"
            )
        return f"drift from {self.reference}: " + "; ".join(said)


def _told_apart(labels: Sequence[str]) -> None:
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ValueError(
            f"two checkpoints of a ledger are called {twice[0]!r}: give each a label of its own"
        )


def joined(ledgers: Sequence[DriftLedger]) -> DriftLedger:
    """One ledger of several against the same reference, prompts and draws."""
    first = ledgers[0]
    for other in ledgers[1:]:
        same = (other.reference, other.topics, other.record.prompts_hash, other.record.seeds)
        if same != (first.reference, first.topics, first.record.prompts_hash, first.record.seeds):
            raise ValueError(
                f"a ledger against {other.reference} ({other.topics} topics) cannot join one against "
                f"{first.reference} ({first.topics}): measure all against one yardstick"
            )
    _told_apart([label for ledger in ledgers for label in ledger.labels])
    stacked = {name: torch.cat([getattr(ledger, name) for ledger in ledgers]) for name in _STACKED}
    listed = {
        name: tuple(item for ledger in ledgers for item in getattr(ledger, name))
        for name in ("labels", "roles", "details")
    }
    return replace(first, **stacked, **listed)


_STACKED = ("value", "low", "high", "statistic", "null_95", "resampled", "projection")


def headline(values: Float[Tensor, "*row term"]) -> Float[Tensor, "*row"]:
    """`exp(mean log(1 + term)) - 1` over all terms but the first, the weight term."""
    return values.double()[..., 1:].log1p().mean(-1).expm1()


def drift_ledger(
    base: HookedModel,
    reference: HookedModel,
    drifted: Sequence[HookedModel],
    contrast: Contrast,
    *,
    controls: Sequence[HookedModel] = (),
    round_trips: Sequence[str] = tuple(FORMATS),
    with_base: bool = True,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> DriftLedger:
    """Measure checkpoints against `reference`, which was aligned from `base`.

    `contrast` holds requests that should be refused (positive) and their harmless twins, none of
    which decided anything before. Models too large to be held together are measured one by one with
    `Yardstick.of(...).measure(model)` and joined by `DriftLedger.of`.
    """
    yardstick = Yardstick.of(base, reference, contrast, resamples=resamples, seed=seed)
    given = [(m, "drifted") for m in drifted] + [(m, "control") for m in controls]
    if with_base:
        given.insert(0, (base, "base"))
    total = len(given) + len(round_trips)
    measured = []
    with show(total, f"drift from {reference.label}", progress) as advance:
        for model, role in given:
            measured.append(yardstick.measure(model, role))
            advance(1)
        for kind in round_trips:
            copy = round_trip(reference, kind)
            measured.append(yardstick.measure(copy, "control", copy.label))
            del copy
            advance(1)
    return DriftLedger.of(yardstick, measured)
