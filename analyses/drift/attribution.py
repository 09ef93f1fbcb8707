"""Which layers and heads carry a drift: what comes back when they are the aligned model's again.

The drifted checkpoint runs with activations, or with weights, of the aligned one put in. A window
of layers and a set of heads are chosen on validation prompts; what they restore is measured on
test prompts, beside as many layers and heads drawn at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.patching import metrics
from analyses.patching.metrics import Metric, RefusalLogOdds
from analyses.patching.patch import few, percentile
from analyses.patching.restored_figure import draw_heads, draw_layers
from analyses.patching.restoring import choose, confirm, explore
from analyses.patching.swaps import ActivationSwap, WeightSwap
from probes import datasets
from probes.model import HookedModel
from probes.progress import progress as show
from probes.prompts import Prompt
from probes.refusals import refuses
from probes.results import Result
from probes.scores import Interval, wilson
from steering.refusal_task import evenly

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class DriftAttribution(Result):
    """Share of a behaviour's gap between two checkpoints that each part of the model restores."""

    aligned: str
    drifted: str
    how: str
    """"activations": the aligned run's outputs are put in. "weights": its weights are."""
    metric: str
    unit: str
    kinds: tuple[str, ...]
    """What is patched in `single`: "attention" and "MLP" outputs, or "block" weights."""
    single: Float[Tensor, "kind layer"]
    """Mean change of the drifted model's metric on validation prompts when one layer is patched, in
    the metric's unit; NaN where a layer has no such part."""
    single_share: Float[Tensor, "kind layer"]
    """The same over the gap: 0 nothing restored, 1 all of it; NaN without a gap."""
    single_low: Float[Tensor, "kind layer"]
    single_high: Float[Tensor, "kind layer"]
    below: Float[Tensor, " layer"]
    """Share restored by layers 0 to l together, validation."""
    above: Float[Tensor, " layer"]
    """Share restored by layers l to the last together, validation."""
    heads: Float[Tensor, "layer head"]
    """Share restored by one query head (activations) or one group of heads with its keys and
    values (weights), validation; NaN where there is none."""
    window: tuple[int, int] | None
    """First and last layer of the window that restores most on validation prompts; None: no gap."""
    chosen_heads: tuple[str, ...]
    """The heads that restore most on validation prompts, as `layer.head`."""
    window_share: Float[Tensor, " limit"]
    """Share of the test gap that the window restores, lower and upper 95 % limit over topics
    (`metrics.share_interval`)."""
    heads_share: Float[Tensor, " limit"]
    """The same for the chosen heads together."""
    everything_share: Float[Tensor, " limit"]
    """The same for all layers together; below 1 where embeddings, norms or head drifted too."""
    window_null: Float[Tensor, " draw"]
    """Shares restored on test prompts by as many layers drawn at random."""
    heads_null: Float[Tensor, " head_draw"]
    """The same for as many heads drawn at random."""
    levels: tuple[float, float]
    """Mean metric of the drifted and of the aligned model on test prompts."""
    rates: tuple[tuple[str, int, int], ...]
    """(run, answers that open with a refusal, answers) on test prompts; empty if not asked."""
    notes: tuple[str, ...]

    def claimed(self, what: str = "window") -> bool:
        """Whether the interval of the window ("window") or heads ("heads") lies above the 95th
        percentile of its null."""
        share, null = {
            "window": (self.window_share, self.window_null),
            "heads": (self.heads_share, self.heads_null),
        }[what]
        return float(share[1]) > percentile(null)

    def rate(self, run: str) -> Interval:
        """Refusal rate of a run with its 95 % Wilson interval."""
        for name, refused, asked in self.rates:
            if name == run:
                return wilson(refused, asked)
        raise ValueError(
            f"no run {run!r}: there are {', '.join(r[0] for r in self.rates) or 'none'}"
        )

    def frame(self) -> "pd.DataFrame":
        """One row a layer, validation prompts."""
        import pandas as pd

        columns: dict[str, list] = {"layer": list(range(len(self.below)))}
        for k, kind in enumerate(self.kinds):
            columns[f"{kind} change"] = self.single[k].tolist()
            columns[f"{kind} share"] = self.single_share[k].tolist()
            columns[f"{kind} low"] = self.single_low[k].tolist()
            columns[f"{kind} high"] = self.single_high[k].tolist()
        first, last = self.window or (-1, -2)
        columns |= {
            "layers up to this": self.below.tolist(),
            "layers from this": self.above.tolist(),
            "in window": [first <= n <= last for n in columns["layer"]],
        }
        return pd.DataFrame(columns)

    def test_frame(self) -> "pd.DataFrame":
        """What was chosen, on test prompts, beside its null."""
        import pandas as pd

        empty = torch.zeros(0)
        return pd.DataFrame(
            [
                {
                    "what": what,
                    "share": float(share[0]),
                    "low": float(share[1]),
                    "high": float(share[2]),
                    "null_95": percentile(null),
                }
                for what, share, null in (
                    ("window", self.window_share, self.window_null),
                    ("heads", self.heads_share, self.heads_null),
                    ("all layers", self.everything_share, empty),
                )
            ]
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Layer by layer: bars of single layers, curves of layers up to and from each."""
        return draw_layers(
            ax,
            self,
            ylabel=f"{self.metric} restored (% of the gap)",
            title=f"{self.how} of {self.aligned} in {self.drifted}",
        )

    def plot_heads(self, ax: "Axes | None" = None) -> "Axes":
        """Every head patched alone; the chosen ones are ringed."""
        if not self.heads.shape[1]:
            raise ValueError(f"{self.drifted} has no attention heads to draw: use plot()")
        return draw_heads(
            ax,
            self,
            xlabel="head" if self.how == "activations" else "group of heads",
            label=f"{self.metric} restored (% of the gap)",
            title=f"Heads of {self.aligned} in {self.drifted}",
        )

    def __str__(self) -> str:
        if self.window is None:
            if bool((self.single.nan_to_num(0.0) == 0).all()):
                return (
                    f"{self.aligned} and {self.drifted} are equal on these prompts: every change "
                    "is exactly 0 and there is nothing to attribute"
                )
            return f"{self.metric} of {self.aligned} and {self.drifted} has no gap to attribute"
        value, low, high = (100 * self.window_share).tolist()
        said = (
            f"{self.how} of layers {self.window[0]} to {self.window[1]} restore {value:.0f} % "
            f"[{low:.0f}, {high:.0f}] of the {self.metric} that {self.drifted} lost; null at most "
            f"{100 * percentile(self.window_null):.0f} %"
        )
        return said + ("" if self.claimed() else ": not told from random layers")


def attribute_drift(
    aligned: HookedModel,
    drifted: HookedModel,
    how: str = "activations",
    *,
    validation: Sequence[Prompt] | None = None,
    test: Sequence[Prompt] | None = None,
    validation_topics: Sequence[str] | None = None,
    test_topics: Sequence[str] | None = None,
    n_topics: int | None = None,
    metric: Metric | None = None,
    window: int | None = None,
    heads: int = 10,
    draws: int = 20,
    max_new_tokens: int = 0,
    resamples: int = 2000,
    batch_size: int = 32,
    folder: Path | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DriftAttribution:
    """Attribute the gap between two checkpoints, aligned minus drifted, to layers and heads.

    Prompts are the harmful requests that ship, validation and test topics, at most `n_topics` of
    each, unless given. `metric` is by default the refusal log-odds of the first token. `window` is
    the number of consecutive layers chosen (a fifth of the model's), `heads` that of heads. With
    `max_new_tokens` the refusal rates of both models and of the drifted one with the window and
    with the heads patched are measured on test prompts; patched activations then act while the
    prompt is read, patched weights throughout.

    Both read the same token ids, rendered by the drifted model's template, which must be the
    aligned one's too (`analyses.checkpoints`). With activations, what single layers restore does
    not add up: a layer acts on what reaches it. `folder` keeps finished layers, those of the test
    prompts too: the same call made again goes on, another one needs another folder.
    """
    if aligned.template.hash != drifted.template.hash:
        raise ValueError(
            f"{aligned.name} and {drifted.name} have different chat templates, so two templates "
            "would be compared: load both with analyses.checkpoints, or give one template="
        )
    swap = {"activations": ActivationSwap, "weights": WeightSwap}.get(how)
    if swap is None:
        raise ValueError(f"how={how!r}: choose 'activations' or 'weights'")
    chosen_on, reported = (
        _prompts(part, given, named, n_topics)
        for part, given, named in (
            ("validation", validation, validation_topics),
            ("test", test, test_topics),
        )
    )
    _disjoint(chosen_on, reported)
    read = metric or RefusalLogOdds.of(aligned)
    n = drifted.n_layers
    size = max(1, round(n / 5)) if window is None else window
    if not 1 <= size <= n or heads < 1:
        raise ValueError(
            f"a window of {size} layers and {heads} heads: give 1 to {n} layers and at least 1 head"
        )
    total = swap.count(drifted, size) + 3 + 2 * draws
    with show(total, f"attributing {drifted.label}", progress) as advance:
        first = swap(aligned, drifted, chosen_on[0], read, batch_size, folder, advance)
        explored = explore(first, size, chosen_on[1], resamples, seed)
        choice = choose(explored, heads)
        second = swap(aligned, drifted, reported[0], read, batch_size, folder, advance)
        found = confirm(second, explored, choice, reported[1], draws, resamples, seed)
        rates: tuple[tuple[str, int, int], ...] = ()
        if choice is not None and max_new_tokens:
            runs = {
                drifted.label: drifted.generate(reported[0], max_new_tokens),
                aligned.label: aligned.generate(reported[0], max_new_tokens),
                "window": second.generate(choice.window_sites, max_new_tokens),
            }
            if choice.head_sites:
                runs["heads"] = second.generate(choice.head_sites, max_new_tokens)
            rates = tuple((name, sum(map(refuses, a)), len(a)) for name, a in runs.items())
    name, unit = metrics.named(read)
    notes = few(chosen_on[1]) + few(reported[1]) + first.notes + second.notes
    for run, topics in ((first, chosen_on[1]), (second, reported[1])):
        notes += metrics.gap_note(run.gap, topics)
    return DriftAttribution(
        aligned=aligned.label,
        drifted=drifted.label,
        how=how,
        metric=name,
        unit=unit,
        kinds=explored.kinds,
        single=explored.single[0],
        single_share=explored.single[1],
        single_low=explored.single[2],
        single_high=explored.single[3],
        below=explored.below,
        above=explored.above,
        heads=explored.heads,
        window=None if choice is None else choice.window,
        chosen_heads=() if choice is None else choice.heads,
        window_share=found.window,
        heads_share=found.heads,
        everything_share=found.everything,
        window_null=found.window_null,
        heads_null=found.heads_null,
        levels=(float(second.target.mean()), float(second.source.mean())),
        rates=rates,
        notes=tuple(dict.fromkeys(notes)),
        record=second.record({"how": how, "window": size, "heads": heads, "seed": seed}),
    )


def _prompts(
    part: str, given: Sequence[Prompt] | None, topics: Sequence[str] | None, n: int | None
) -> tuple[list[Prompt], tuple[str, ...]]:
    """The prompts of one part with their topics."""
    if given is None:
        rows = evenly(datasets.twins(part), n)
        return [row["harmful"] for row in rows], tuple(row["topic"] for row in rows)
    named = tuple(topics) if topics is not None else tuple(f"{part} {i}" for i in range(len(given)))
    if len(named) != len(given):
        raise ValueError(
            f"{len(given)} {part} prompts came with {len(named)} topics: give one for each"
        )
    return list(given), named


def _disjoint(
    validation: tuple[list[Prompt], tuple[str, ...]], test: tuple[list[Prompt], tuple[str, ...]]
) -> None:
    """Refuse to report on what the choice was made on."""
    if both := set(validation[1]) & set(test[1]):
        raise ValueError(
            f"validation and test prompts share {len(both)} topics, such as {min(both)!r}: layers "
            "are chosen on the one and reported on the other, so give each its own topics"
        )
    if same := [prompt for prompt in validation[0] if prompt in test[0]]:
        raise ValueError(
            f"{len(same)} validation prompts are test prompts too, the first {str(same[0])[:60]!r}: "
            "layers are chosen on the one and reported on the other, so give each its own prompts"
        )
