"""Are prompts refused that stand behind earlier turns, refused or answered, of a conversation?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from analyses.drift import tipping_figure
from analyses.drift.tipping_agents import record_of
from probes import datasets
from probes.clustered import clustered_wilson
from probes.contrast import Contrast
from probes.model import HookedModel
from probes.prompts import Message, Prompt, messages_of, prompts_hash
from probes.refusals import refuses
from probes.results import Result
from probes.scores import Interval
from probes.splits import FEW_GROUPS, warn_if_few
from steering.intervals import change_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PASTS = ("benign", "refusals", "compliances")
"""What earlier turns hold: ordinary requests, refused ones, harmless ones that were answered; the
answers are the model's own."""


@dataclass(frozen=True)
class MultiRoundRefusals(Result):
    """Refusals of prompts that stand behind so many earlier turns of a conversation."""

    model: str
    pasts: tuple[str, ...]
    turns: tuple[int, ...]
    """Earlier turns, of one request and one answer; 0 first."""
    topics: tuple[str, ...]
    positive: Bool[Tensor, " prompt"]
    """Whether a prompt is one to refuse (harmful), or its harmless twin."""
    refused: Bool[Tensor, "past turn prompt"]

    def rate(self, past: str, turn: int, positive: bool = True) -> Interval:
        """Refusal rate of harmful prompts, or over-refusal of twins, 0 to 1; Wilson by topic."""
        hits, topics = self._rows(past, turn, positive)
        return clustered_wilson(hits, topics)

    def change(self, past: str, turn: int, positive: bool = True) -> Interval:
        """Refusal rate behind the turns minus that without, paired by prompt, by topic. With the
        benign past it is what length of the conversation alone does."""
        after, topics = self._rows(past, turn, positive)
        before, _ = self._rows(past, 0, positive)
        if turn == 0:
            return Interval(0.0, 0.0, 0.0)
        found = change_interval(after[:, None].double(), before.double(), topics, rate=True)
        return Interval(*(float(t) for t in found))

    def frame(self) -> "pd.DataFrame":
        """One row per past, number of turns and class."""
        import pandas as pd

        rows = []
        for past in self.pasts:
            for turn in self.turns:
                for positive in (True, False):
                    rate, change = (f(past, turn, positive) for f in (self.rate, self.change))
                    row = {
                        "past": past,
                        "turns": turn,
                        "prompts": "harmful" if positive else "twins",
                    }
                    row |= {"refused": rate.value, "low": rate.low, "high": rate.high}
                    row |= {"change": change.value, "change_low": change.low}
                    rows.append({**row, "change_high": change.high})
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Refusal rates by number of earlier turns; harmful prompts filled, twins open."""
        return tipping_figure.refusals(self, ax)

    def __str__(self) -> str:
        said, last = [], self.turns[-1]
        for past in self.pasts:
            ends = [self.rate(past, last, positive).value for positive in (True, False)]
            said.append(f"after {last} turns of {past} {ends[0]:.1%} and {ends[1]:.1%}")
        start = [self.rate(self.pasts[0], 0, positive).value for positive in (True, False)]
        few = len(set(self.topics))
        note = f" (only {few} topics)" if few < FEW_GROUPS else ""
        return (
            f"refusals of {self.model}, harmful and twins: {start[0]:.1%} and {start[1]:.1%} at "
            f"once, {'; '.join(said)}{note}"
        )

    def _rows(self, past: str, turn: int, positive: bool) -> tuple[Bool[Tensor, " row"], list[str]]:
        if past not in self.pasts or turn not in self.turns:
            raise ValueError(
                f"{turn} turns of {past!r} were asked: there are {', '.join(self.pasts)} with "
                f"{', '.join(map(str, self.turns))} turns"
            )
        chosen = self.positive == positive
        hits = self.refused[self.pasts.index(past), self.turns.index(turn)]
        topics = [t for t, c in zip(self.topics, chosen.tolist(), strict=True) if c]
        return hits[chosen], topics


def multi_round_refusals(
    model: HookedModel,
    prompts: Contrast,
    *,
    past: Contrast | None = None,
    benign: Sequence[str] | None = None,
    pasts: Sequence[str] = PASTS,
    turns: Sequence[int] = (1, 2, 4),
    max_new_tokens: int = 10,
    past_tokens: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> MultiRoundRefusals:
    """Refusals of harmful prompts (positive) and their twins behind earlier turns.

    Earlier requests come from `past`, whose topics must be others (default: validation twins),
    and `benign` (default: ordinary validation requests); their answers are what the model itself
    says to each alone, greedily, up to `past_tokens`. Refused requests are positive ones it
    refuses, complied ones harmless twins it does not refuse. Twins of one topic stand behind the
    same turns, drawn by seed.
    """
    if unknown := [p for p in pasts if p not in PASTS]:
        raise ValueError(f"unknown past {unknown[0]!r}: choose {', '.join(PASTS)}")
    lengths = (0, *sorted(set(turns) - {0}))
    if not pasts or len(lengths) < 2 or lengths[1] < 0:
        raise ValueError(f"pasts {tuple(pasts)} and turns {tuple(turns)}: give one above 0 of each")
    warn_if_few(prompts.topics)
    past = datasets.safety("validation") if past is None else past
    if both := set(past.topics) & set(prompts.topics):
        raise ValueError(
            f"the topic {min(both)!r} is asked and stands in the past too: give each to one"
        )
    positive = [p for p, label in zip(past.prompts, past.labels, strict=True) if label]
    negative = [p for p, label in zip(past.prompts, past.labels, strict=True) if not label]
    ordinary = datasets.general("validation") if benign is None else list(benign)
    pools: dict[str, list[tuple[Prompt, str]]] = {}
    for name, asked in zip(PASTS, (ordinary, positive, negative), strict=True):
        if name not in pasts:
            continue
        answers = model.generate(asked, past_tokens, batch_size=batch_size)
        wanted = {"benign": None, "refusals": True, "compliances": False}[name]
        pools[name] = [
            (request, answer.strip())
            for request, answer in zip(asked, answers, strict=True)
            if answer.strip() and (wanted is None or refuses(answer) == wanted)
        ]
        if len(pools[name]) < lengths[-1]:
            raise ValueError(
                f"{model.name} gave {len(pools[name])} of {len(asked)} answers for the past "
                f"{name!r} and {lengths[-1]} turns need as many: give more requests, fewer turns, "
                "or leave that past out"
            )

    def hashed(asked: Sequence[Prompt]) -> str:
        return prompts_hash(model.template.render_all(asked))

    topics = list(dict.fromkeys(prompts.topics))
    refused = torch.zeros(len(pasts), len(lengths), len(prompts.prompts), dtype=torch.bool)
    for p, name in enumerate(pasts):
        generator = torch.Generator().manual_seed(seed)
        order = {t: torch.randperm(len(pools[name]), generator=generator).tolist() for t in topics}
        for t, length in enumerate(lengths):
            if p and not length:
                refused[p, t] = refused[0, t]
                continue
            conversations = [
                [*_turns([pools[name][i] for i in order[topic][:length]]), *messages_of(prompt)]
                for prompt, topic in zip(prompts.prompts, prompts.topics, strict=True)
            ]
            answers = model.generate(conversations, max_new_tokens, batch_size=batch_size)
            refused[p, t] = torch.tensor([refuses(answer) for answer in answers])
            if progress:
                progress(len(conversations))
    return MultiRoundRefusals(
        model=model.label,
        pasts=tuple(pasts),
        turns=lengths,
        topics=tuple(prompts.topics),
        positive=torch.tensor(prompts.labels).bool(),
        refused=refused,
        record=record_of(
            model,
            seed,
            prompts.prompts,
            prompts=prompts.name,
            past=past.name,
            past_hash=hashed(past.prompts),
            benign_hash=hashed(ordinary),
            pasts=list(pasts),
            turns=list(lengths),
            max_new_tokens=max_new_tokens,
            past_tokens=past_tokens,
            batch_size=batch_size,
        ),
    )


def _turns(answered: Sequence[tuple[Prompt, str]]) -> list[Message]:
    found: list[Message] = []
    for request, answer in answered:
        found += [*messages_of(request), {"role": "assistant", "content": answer}]
    return found
