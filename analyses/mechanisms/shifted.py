"""What moves a shifted token: the layers and heads of the aligned model, put back to the base's.

A shifted token is one the aligned model writes and the base would not (rank above 3; Lin et al.
2024). At its place in the answer both models read the same ids. The base's activations are put
into the aligned run layer by layer and head by head: what brings the base's own choice back carries
the shift. Beside it stands where both runs lie along the direction that tells the two classes of
prompts apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.figures import legend_below
from analyses.patching import metrics
from analyses.patching.metrics import LogitDifference
from analyses.patching.patch import few, percentile
from analyses.patching.restored_figure import draw_heads, draw_layers
from analyses.patching.restoring import choose, confirm, explore
from analyses.patching.swaps import ActivationSwap
from analyses.tokens.shift import token_shift
from probes import datasets, figures
from probes.capturing import capture
from probes.contrast import Contrast
from probes.model import HookedModel
from probes.progress import progress as show
from probes.prompts import Prompt, Rendered
from probes.results import Result
from probes.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TRAINED = 64
"""Topics the class direction is made of."""


@dataclass(frozen=True)
class ShiftedTokens(Result):
    """The first shifted token of each answer: what carries it, and what the stream says there."""

    base: str
    aligned: str
    tokens: tuple[str, ...]
    """The shifted token of each test prompt's answer."""
    instead: tuple[str, ...]
    """What the base holds most probable there."""
    places: Int[Tensor, " prompt"]
    """Its position in the answer, from 0."""
    kinds: tuple[str, ...]
    single_share: Float[Tensor, "kind layer"]
    """Share of the gap, logit of the token minus logit of the base's choice, that goes when the
    base's output of one layer's attention or MLP is put in; validation prompts. 1: all of it."""
    single_low: Float[Tensor, "kind layer"]
    single_high: Float[Tensor, "kind layer"]
    below: Float[Tensor, " layer"]
    """Share that goes with layers 0 to l together."""
    above: Float[Tensor, " layer"]
    """Share that goes with layers l to the last together."""
    heads: Float[Tensor, "layer head"]
    """Share that goes with one head."""
    window: tuple[int, int] | None
    """First and last layer of the window that takes most away, chosen on validation prompts."""
    chosen_heads: tuple[str, ...]
    """The heads that take most away, as `layer.head`, chosen likewise."""
    window_share: Float[Tensor, " limit"]
    """Share that goes with the window on test prompts, lower and upper 95 % BCa limit."""
    heads_share: Float[Tensor, " limit"]
    """The same for the chosen heads together."""
    window_null: Float[Tensor, " draw"]
    """Shares that go with as many layers drawn at random, test prompts."""
    heads_null: Float[Tensor, " head_draw"]
    projection: Float[Tensor, "model layer limit"]
    """Base, then aligned: mean position along the class direction of each layer where the token is
    chosen, with 95 % BCa limits; 0 is the mean of the negative class and 1 that of the positive
    class of the aligned model at the last prompt token. Test prompts."""
    projection_gap: Float[Tensor, "layer limit"]
    """Aligned minus base."""
    projection_null: Float[Tensor, " layer"]
    """95th percentile of that gap along 20 other directions of the same length: ten isotropic, ten
    between random halves of the negative class."""
    notes: tuple[str, ...]

    @property
    def claimed(self) -> bool:
        """Whether the window takes more than random layers do."""
        return float(self.window_share[1]) > percentile(self.window_null)

    def frame(self) -> "pd.DataFrame":
        """One row a layer."""
        import pandas as pd

        columns: dict[str, list] = {"layer": list(range(len(self.below)))}
        for k, kind in enumerate(self.kinds):
            columns[f"{kind} share"] = self.single_share[k].tolist()
            columns[f"{kind} low"] = self.single_low[k].tolist()
            columns[f"{kind} high"] = self.single_high[k].tolist()
        columns["layers up to this"] = self.below.tolist()
        columns["layers from this"] = self.above.tolist()
        for m, name in enumerate(("base", "aligned")):
            columns[f"projection of {name}"] = self.projection[m, :, 0].tolist()
        columns["projection gap"] = self.projection_gap[:, 0].tolist()
        columns["gap low"] = self.projection_gap[:, 1].tolist()
        columns["gap high"] = self.projection_gap[:, 2].tolist()
        columns["gap null_95"] = self.projection_null.tolist()
        return pd.DataFrame(columns)

    def token_frame(self) -> "pd.DataFrame":
        """One row a test prompt."""
        import pandas as pd

        return pd.DataFrame(
            {"token": self.tokens, "instead": self.instead, "place": self.places.tolist()}
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Layer by layer: bars of single layers, curves of layers up to and from each."""
        return draw_layers(
            ax, self, ylabel="shift of the token taken back (% of the gap)",
            title=f"{self.base} put into {self.aligned} at its shifted tokens",
        )  # fmt: skip

    def plot_heads(self, ax: "Axes | None" = None) -> "Axes":
        """Every head alone; the chosen ones are ringed."""
        if not self.heads.shape[1]:
            raise ValueError(f"{self.aligned} has no attention heads to draw: use plot()")
        return draw_heads(
            ax, self, xlabel="head", label="shift of the token taken back (% of the gap)",
            title=f"Heads of {self.base} in {self.aligned}",
        )  # fmt: skip

    def plot_projection(self, ax: "Axes | None" = None) -> "Axes":
        """How much further towards the positive class the aligned run lies, by layer. (Positions
        themselves are in `frame()`: where a layer hardly parts the classes they are huge.)"""
        ax = figures.axes(ax, 5.0, 3.9)
        layers = torch.arange(len(self.projection_gap)).numpy()
        null = self.projection_null.numpy()
        value, low, high = self.projection_gap.T.numpy()
        with figures.theme():
            look = figures.style(0)
            ax.fill_between(
                layers, -null, null, color=figures.PALETTE[7], alpha=0.25, lw=0,
                label="20 other directions, 95 %",
            )  # fmt: skip
            ax.fill_between(layers, low, high, color=look["color"], alpha=0.2, lw=0)
            ax.plot(layers, value, label=f"{self.aligned} less {self.base}", markevery=3, **look)
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel="move along the class direction\n(1: from one class to the other)",
                title="Where the shifted token is chosen",
            )
            legend_below(ax, f"{len(self.tokens)} tokens, 95 % interval")
        return ax

    def __str__(self) -> str:
        n = len(self.tokens)
        if self.window is None:
            return f"the {n} shifted tokens of {self.aligned} have no gap to {self.base} to explain"
        value, low, high = (100 * self.window_share).tolist()
        first = ", ".join(self.chosen_heads[:4]) + (", ..." if len(self.chosen_heads) > 4 else "")
        said = (
            f"{n} shifted tokens of {self.aligned}: layers {self.window[0]} to {self.window[1]} of "
            f"{self.base} take {value:.0f} % [{low:.0f}, {high:.0f}] of the shift back; null at "
            f"most {100 * percentile(self.window_null):.0f} %"
        )
        said += "" if self.claimed else ": not told from random layers"
        if self.chosen_heads:
            value, low, high = (100 * self.heads_share).tolist()
            said += f"; heads {first} together {value:.0f} % [{low:.0f}, {high:.0f}]"
        return said


def trace_shift(
    base: HookedModel,
    aligned: HookedModel,
    contrasts: dict[str, Contrast] | None = None,
    *,
    n_topics: int = 40,
    max_new_tokens: int = 24,
    window: int | None = None,
    heads: int = 10,
    draws: int = 20,
    resamples: int = 2000,
    batch_size: int = 32,
    folder: Path | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ShiftedTokens:
    """Trace the first shifted token of each answer to the positive prompts.

    `contrasts` holds the parts "train", "validation" and "test", by default the shipped twins:
    the direction is made on training prompts, layers and heads are chosen on validation prompts and
    reported on test prompts. Prompts whose answer has no shifted token are left out and counted in
    the notes. Both models must share a chat template (`analyses.checkpoints`). What single layers
    take back does not add up. `folder` keeps finished layers.
    """
    if base.template.hash != aligned.template.hash:
        raise ValueError(
            f"{base.name} and {aligned.name} have different chat templates, so two templates would "
            "be compared: load both with analyses.checkpoints, or give one template="
        )
    parts = contrasts or {p: datasets.safety(p) for p in datasets.SPLITS}
    n = aligned.n_layers
    size = max(1, round(n / 5)) if window is None else window
    if not 1 <= size <= n or heads < 1:
        raise ValueError(
            f"a window of {size} layers and {heads} heads: give 1 to {n} layers and at least 1 head"
        )
    found = {
        part: _shifted(base, aligned, parts[part].limited(n_topics, seed), part, max_new_tokens)
        for part in ("validation", "test")
    }
    total = ActivationSwap.count(aligned, size) + 3 + 2 * draws
    with show(total, f"tracing {aligned.label}", progress) as advance:
        swaps = {
            part: ActivationSwap(
                base, aligned, at.read, at.metric, batch_size,
                None if folder is None else Path(folder) / part, advance,
            )
            for part, at in found.items()
        }  # fmt: skip
        explored = explore(swaps["validation"], size, found["validation"].topics, resamples, seed)
        choice = choose(explored, heads)
        test, topics = swaps["test"], found["test"].topics
        confirmed = confirm(test, explored, choice, topics, draws, resamples, seed)
    along, other = _positions(parts["train"].limited(TRAINED, seed), aligned, test, seed)
    means = [metrics.mean_interval(a, topics, resamples=resamples, seed=seed) for a in along]
    gap = metrics.mean_interval(along[1] - along[0], topics, resamples=resamples, seed=seed)
    notes = [
        f"{at.without} of {at.without + len(at.topics)} {part} answers hold no shifted token."
        for part, at in found.items()
        if at.without
    ]
    for swap, at in ((swaps["validation"], found["validation"]), (test, found["test"])):
        notes += [*few(at.topics), *swap.notes, *metrics.gap_note(swap.gap, at.topics)]
    return ShiftedTokens(
        base=base.label,
        aligned=aligned.label,
        tokens=found["test"].tokens,
        instead=found["test"].instead,
        places=torch.tensor(found["test"].places),
        kinds=explored.kinds,
        single_share=explored.single[1],
        single_low=explored.single[2],
        single_high=explored.single[3],
        below=explored.below,
        above=explored.above,
        heads=explored.heads,
        window=None if choice is None else choice.window,
        chosen_heads=() if choice is None else choice.heads,
        window_share=confirmed.window,
        heads_share=confirmed.heads,
        window_null=confirmed.window_null,
        heads_null=confirmed.heads_null,
        projection=torch.stack([torch.stack(list(m), -1) for m in means]).float(),
        projection_gap=torch.stack(list(gap), -1).float(),
        projection_null=other.float(),
        notes=tuple(dict.fromkeys(notes)),
        record=test.record({"window": size, "heads": heads, "seed": seed}),
    )


@dataclass(frozen=True)
class _Shifted:
    """The first shifted token of each answer that has one."""

    read: list[Rendered]
    """What both models read before it."""
    metric: LogitDifference
    tokens: tuple[str, ...]
    instead: tuple[str, ...]
    places: list[int]
    topics: tuple[str, ...]
    without: int
    """Answers in which no token is shifted."""


def _shifted(
    base: HookedModel, aligned: HookedModel, contrast: Contrast, part: str, max_new_tokens: int
) -> _Shifted:
    """Answer the positive prompts and find where the base would have gone elsewhere."""
    rows = contrast.positive.nonzero().flatten().tolist()
    prompts: Sequence[Prompt] = [contrast.prompts[i] for i in rows]
    shift = token_shift(base, aligned, prompts, [part] * len(rows), max_new_tokens=max_new_tokens)
    decode = aligned.tokenizer.decode
    read, chosen, places, topics = [], [], [], []
    ends = torch.tensor(shift.counts).cumsum(0).tolist()
    for i, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        start = end - shift.counts[i]
        at = (shift.kinds[start:end] == 2).nonzero().flatten().tolist()
        if not at:
            continue
        own = aligned.template.render(prompt)
        before = tuple(shift.ids[start : start + at[0]].tolist())
        text = own.text + (decode(list(before)) if before else "")
        read.append(Rendered(text, own.ids + before, (), len(own.ids), own.content))
        chosen.append(start + at[0])
        places.append(at[0])
        topics.append(contrast.topics[rows[i]])
    if not chosen:
        raise ValueError(
            f"no answer of {aligned.name} to {len(rows)} {part} prompts holds a token that "
            f"{base.name} ranks below third place: there is no shift to trace"
        )
    answers, others = shift.ids[chosen].tolist(), shift.top_base[chosen, 0].tolist()
    return _Shifted(
        read,
        LogitDifference(tuple(answers), tuple(others), "preference for the token over the base's"),
        tuple(decode([t]) for t in answers),
        tuple(decode([t]) for t in others),
        places,
        tuple(topics),
        len(rows) - len(chosen),
    )


def _positions(
    train: Contrast, aligned: HookedModel, swap: ActivationSwap, seed: int
) -> tuple[Float[Tensor, "model layer prompt"], Float[Tensor, " layer"]]:
    """Positions of the base's and the aligned run along the class direction, and what their gap
    reaches along other directions of its length."""
    acts = capture(aligned, train.prompts, "all.resid_post", progress=False)
    states = torch.stack([acts[site].double() for site in acts.sites])
    positive, negative = states[:, train.positive], states[:, ~train.positive]
    middle = negative.mean(1)
    direction = positive.mean(1) - middle
    squared = direction.square().sum(-1, keepdim=True)
    sites = [Site(k, "resid_post") for k in range(aligned.n_layers)]
    ends = []
    for runs in (swap.patcher.values.runs, swap.patcher.runs):  # the source is the base
        read = runs.read(sites)
        ends.append(torch.stack([torch.stack([h[-1] for h in read[s]]) for s in sites]).double())
    both = torch.stack(ends)
    along = torch.einsum("mlpd,ld->mlp", both - middle[:, None], direction / squared)
    gap = (both[1] - both[0]).mean(1)
    generator = torch.Generator().manual_seed(seed)
    others = []
    for k in range(20):
        if k < 10:
            drawn = torch.randn(direction.shape, generator=generator, dtype=torch.float64)
        else:
            order = torch.randperm(negative.shape[1], generator=generator)
            half = len(order) // 2
            drawn = negative[:, order[:half]].mean(1) - negative[:, order[half:]].mean(1)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True) * squared.sqrt()
        others.append((gap * drawn / squared).sum(-1).abs())
    return along, torch.stack(others).quantile(0.95, 0)
