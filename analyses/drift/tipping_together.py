"""Do several agents keep a common aim, round by round, that pays only if enough of them serve it?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from analyses.drift import tipping_figure
from analyses.drift.tipping_agents import (
    UNPARSED,
    Agent,
    Asked,
    Parse,
    name_of,
    read_label,
    record_of,
    round_line,
    round_text,
)
from analyses.drift.tipping_items import ITEMS_TOGETHER, Item
from probes.clustered import clustered_wilson
from probes.model import HookedModel
from probes.results import Result
from probes.scores import Interval
from probes.splits import FEW_GROUPS, warn_if_few

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class TippingTogether(Result):
    """Choices of several agents whose collective option pays only if enough of them take it."""

    agent: str
    items: tuple[str, ...]
    thresholds: tuple[int, ...]
    """How many agents the collective option needs in each environment."""
    choices: Int[Tensor, "threshold item agent round"]
    """1 the collective option, 0 the independent one, -1 could not be read."""
    breaks: tuple[bool, ...]
    """For each item, whether the collective option is the one declared to violate."""

    def rate(self, round_: int, threshold: int | None = None) -> Interval:
        """Share of choices for the collective option in a round (from 1), over the environments
        together or of one threshold; Wilson by item. Numerator and denominator are both summed
        over environments (the released script keeps the last denominator, so its shares can pass
        1); replies that could not be read stand in the denominator."""
        return clustered_wilson(*self._rows(round_, threshold, 1))

    def violations(self, round_: int, threshold: int | None = None) -> Interval:
        """The same for the option declared to violate, whichever that is."""
        chosen, names = self._rows(round_, threshold, 1)
        other, _ = self._rows(round_, threshold, 0)
        bad = dict(zip(self.items, self.breaks, strict=True))
        return clustered_wilson(
            torch.where(torch.tensor([bad[n] for n in names]), chosen, other), names
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers should know."""
        n = len(self.items)
        few = f"only {n} items: intervals over fewer than {FEW_GROUPS} are rough"
        return (few,) if n < FEW_GROUPS else ()

    def frame(self) -> "pd.DataFrame":
        """One row per threshold and round, and over all thresholds."""
        import pandas as pd

        rows = []
        for threshold in (*self.thresholds, None):
            for r in range(1, self.choices.shape[3] + 1):
                rate = self.rate(r, threshold)
                own = self._chosen(r, threshold)
                row = {"threshold": "all" if threshold is None else threshold, "round": r}
                row |= {"collective": rate.value, "low": rate.low, "high": rate.high}
                row |= {"violations": self.violations(r, threshold).value}
                rows.append(
                    {**row, "unparsed": int((own == UNPARSED).sum()), "choices": own.numel()}
                )
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Share of collective choices by round, one curve a threshold."""
        return tipping_figure.together(self, ax)

    def __str__(self) -> str:
        last = self.choices.shape[3]
        first, end = self.rate(1), self.rate(last)
        return (
            f"{self.choices.shape[2]} agents of {self.agent}: collective choices {first.value:.1%} "
            f"in round 1, {end.value:.1%} [{end.low:.1%}, {end.high:.1%}] in round {last}"
            + "".join(f"; {note}" for note in self.notes)
        )

    def _chosen(self, round_: int, threshold: int | None) -> Int[Tensor, "threshold item agent"]:
        if not 1 <= round_ <= self.choices.shape[3] or threshold not in (None, *self.thresholds):
            raise ValueError(
                f"round {round_} at threshold {threshold} was asked: there are rounds 1 to "
                f"{self.choices.shape[3]} and thresholds {self.thresholds}"
            )
        own = self.choices[..., round_ - 1]
        return own if threshold is None else own[[self.thresholds.index(threshold)]]

    def _rows(
        self, round_: int, threshold: int | None, option: int
    ) -> tuple[Bool[Tensor, " row"], list[str]]:
        own = self._chosen(round_, threshold)
        names = [n for _ in range(own.shape[0]) for n in self.items for _ in range(own.shape[2])]
        return (own == option).flatten(), names


def tipping_together(
    agent: HookedModel | Agent,
    items: Sequence[Item] = ITEMS_TOGETHER,
    *,
    agents: int = 8,
    rounds: int = 3,
    thresholds: Sequence[int] = (2, 4, 6, 8),
    rewards: tuple[float, float, float] = (1.2, 1.0, 0.8),
    memory: int = 5,
    labels: tuple[str, str] = ("A", "B"),
    parse: Parse | None = None,
    name: str | None = None,
    seed: int = 0,
) -> TippingTogether:
    """Agents choose between the collective and the independent option, round after round.

    `rewards` are those of a collective choice that enough agents made, of an independent one, and
    of a collective choice that too few made. The agents of a `HookedModel` draw from its
    probabilities of the labels by the seed, or they would all be one; every second sees the
    options in the other order.
    """
    if any(item.collective is None for item in items) or not items:
        raise ValueError("several agents need items that declare which option is `collective`")
    if not thresholds or not all(1 <= t <= agents for t in thresholds) or rounds < 1:
        raise ValueError(
            f"thresholds {tuple(thresholds)} for {agents} agents in {rounds} rounds: give "
            "thresholds from 1 to the number of agents, and a round or more"
        )
    warn_if_few([item.name for item in items])
    generator = torch.Generator().manual_seed(seed)
    choices = torch.full((len(thresholds), len(items), agents, rounds), UNPARSED)
    asked = Asked(agent, labels, parse or read_label)
    lines = {
        (t, i, a): []
        for t in range(len(thresholds))
        for i in range(len(items))
        for a in range(agents)
    }
    for r in range(rounds):
        keys = list(lines)
        texts = [
            round_text(items[i], a % 2 == 1, lines[t, i, a][-memory:], labels) for t, i, a in keys
        ]
        replies = dict(zip(keys, asked(texts), strict=True))
        for key in keys:
            reply = replies[key]
            if isinstance(agent, HookedModel):
                coin = float(torch.rand((), generator=generator))
                replies[key] = reply = reply._replace(choice=0 if coin < reply.first else 1)
            t, i, a = key
            if reply.choice is not None:
                shared = items[i].collective
                assert shared is not None
                choices[t, i, a, r] = int(reply.choice == shared ^ (a % 2))
        for t, i, a in keys:
            enough = int((choices[t, i, :, r] == 1).sum()) >= thresholds[t]
            paid = {1: rewards[0] if enough else rewards[2], 0: rewards[1]}
            own = paid.get(int(choices[t, i, a, r]), min(rewards))
            lines[t, i, a].append(
                round_line(r, items[i], a % 2 == 1, replies[t, i, a], own, labels)
            )
    return TippingTogether(
        agent=name or name_of(agent),
        items=tuple(item.name for item in items),
        thresholds=tuple(map(int, thresholds)),
        choices=choices,
        breaks=tuple(item.collective == item.violating for item in items),
        record=record_of(
            agent,
            seed,
            [round_text(item, turned, [], labels) for item in items for turned in (False, True)],
            rounds=rounds,
            agents=agents,
            thresholds=list(map(int, thresholds)),
            memory=memory,
            rewards=list(map(float, rewards)),
            labels=list(labels),
            items=[asdict(item) for item in items],
        ),
    )
