"""How often log-ratio rewards prefer what raters prefer, with controls for length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.tokens.ranking import check_pairs, topics_of
from analyses.tokens.rewards import log_ratios
from probes import figures
from probes.clustered import clustered_wilson
from probes.model import HookedModel
from probes.results import Result
from probes.scores import Interval, bca_bootstrap
from probes.splits import warn_if_few

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class RewardRanking(Result):
    """How often the log-ratio reward prefers the answer that raters prefer, and whether length
    explains it. Margins are those of the preferred answer minus those of the other."""

    strong: str
    weak: str
    topics: tuple[str, ...]
    summed: Float[Tensor, " pair"]
    """Difference of summed rewards, nats."""
    per_token: Float[Tensor, " pair"]
    """Difference of rewards per token, nats."""
    length: Int[Tensor, " pair"]
    """Difference of lengths in tokens of the strong model: the reward of a rater of length."""
    within: int = 5
    """Pairs whose lengths differ by no more tokens than this are matched."""

    def accuracy(self, reward: str = "summed") -> Interval:
        """Share of pairs, ties left out, in which the reward (summed, per_token or length) is
        larger for the preferred answer; Wilson over topics, chance one half."""
        return self._share(reward, torch.ones_like(self.length, dtype=torch.bool))

    def matched(self, reward: str = "summed") -> Interval:
        """The same over pairs of matched length."""
        return self._share(reward, self.length.abs() <= self.within)

    def balanced(self, reward: str = "summed", seed: int = 0) -> Interval:
        """Mean of the accuracies where the preferred answer is the longer and where it is the
        shorter one, with a BCa interval over topics: a reward that is only length has one half.
        Where no resample differs, as when all pairs are ranked right, the limits are those of the
        mean of two independent rates (Wilson's, joined after Zou and Donner 2008), not a point."""
        margin, length = self._margin(reward), self.length
        if not self.both_lengths:
            raise ValueError(
                "the preferred answer is never the longer one, or never the shorter one: give pairs "
                "of both kinds"
            )

        def statistic(rows: Tensor) -> float:
            parts = []
            for sign in (1, -1):
                own = margin[rows][(length[rows].sign() == sign) & (margin[rows] != 0)]
                parts.append(float((own > 0).double().mean()) if len(own) else 0.5)
            return sum(parts) / 2

        found = bca_bootstrap(statistic, self.topics, seed=seed)
        if found.low < found.high:
            return found
        parts = [self._part(reward, length.sign() == sign) for sign in (1, -1)]
        down = sum((part.value - part.low) ** 2 for part in parts) ** 0.5 / 2
        up = sum((part.high - part.value) ** 2 for part in parts) ** 0.5 / 2
        return Interval(found.value, found.value - down, found.value + up)

    @property
    def both_lengths(self) -> bool:
        """Whether the preferred answer is the longer one of some pairs and the shorter one of
        others, without which nothing can be balanced."""
        return bool((self.length > 0).any() and (self.length < 0).any())

    def frame(self) -> "pd.DataFrame":
        """One row per reward and control; `pairs` are those that count. Where nothing counts the
        row is left out, as of identical models, and so is `balanced` without `both_lengths`."""
        import pandas as pd

        rows = []
        for reward in ("summed", "per_token", "length"):
            usable = self._margin(reward) != 0
            for control in ("none", "balanced", "matched"):
                chosen = (
                    usable & (self.length.abs() <= self.within) if control == "matched" else usable
                )
                if not chosen.any() or (control == "balanced" and not self.both_lengths):
                    continue
                by = {"none": self.accuracy, "balanced": self.balanced, "matched": self.matched}
                found = by[control](reward)
                row = {"reward": reward, "control": control, "value": found.value}
                rows.append(
                    {**row, "low": found.low, "high": found.high, "pairs": int(chosen.sum())}
                )
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Accuracy of each reward, uncontrolled, balanced and matched for length."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        table = self.frame()
        names = {"none": "all pairs", "balanced": "balanced for length",
                 "matched": f"lengths within {self.within} tokens"}  # fmt: skip
        rewards = ("summed", "per_token", "length")
        with figures.theme():
            for i, (control, name) in enumerate(names.items()):
                own = [r for r in table.to_dict("records") if r["control"] == control]
                if not own:
                    continue
                name += f" (n = {max(r['pairs'] for r in own)})"
                x = [rewards.index(r["reward"]) + 0.2 * (i - 1) for r in own]
                y = [100 * r["value"] for r in own]
                error = [[100 * (r["value"] - r["low"]) for r in own],
                         [100 * (r["high"] - r["value"]) for r in own]]  # fmt: skip
                ax.errorbar(x, y, yerr=error, ls="", capsize=3, label=name, **figures.style(i))
            ax.axhline(50, ls=":", color=figures.PALETTE[6], label="chance")
            ax.set_xticks(range(3), ("summed", "per token", "length alone"))
            ax.set(
                ylim=(-3, 103),
                xlim=(-0.5, 2.5),
                xlabel="reward of an answer",
                ylabel="pairs ranked as raters do (%)",
                title=broken(f"Reward {self.strong} over {self.weak}"),
            )
            legend_below(ax, "95 % interval over topics")
        return ax

    def __str__(self) -> str:
        if not self.summed.any() and not self.per_token.any():
            return (
                f"reward ranking: {self.strong} and {self.weak} give every answer the same "
                "probability, all rewards are exactly 0 and rank nothing"
            )
        said = []
        for reward in ("summed", "per_token"):
            name = reward.replace("_", " ")
            if not self._margin(reward).any():
                said.append(f"{name} ranks nothing, all are ties")
                continue
            own = self.accuracy(reward)
            text = f"{name} {own.value:.1%} [{own.low:.1%}, {own.high:.1%}], "
            if self.both_lengths:
                even = self.balanced(reward)
                text += f"balanced for length {even.value:.1%} [{even.low:.1%}, {even.high:.1%}]"
            else:
                text += "not balanced, because the longer answer is always, or never, the preferred"
            said.append(text)
        return f"reward ranking {self.strong} over {self.weak}: {'; '.join(said)}"

    def _margin(self, reward: str) -> Tensor:
        if reward not in ("summed", "per_token", "length"):
            raise ValueError(f"unknown reward {reward!r}: choose summed, per_token or length")
        return getattr(self, reward).double()

    def _part(self, reward: str, chosen: Tensor) -> Interval:
        """Accuracy over some pairs; one half, and no idea, where all of them are ties."""
        if not (chosen & (self._margin(reward) != 0)).any():
            return Interval(0.5, 0.0, 1.0)
        return self._share(reward, chosen)

    def _share(self, reward: str, chosen: Tensor) -> Interval:
        margin = self._margin(reward)
        kept = chosen & (margin != 0)
        if not kept.any():
            raise ValueError(
                f"no pair is left to rank by {reward}: all are ties or differ in length by more "
                f"than {self.within} tokens, so raise `within` or give other pairs"
            )
        topics = [t for t, k in zip(self.topics, kept.tolist(), strict=True) if k]
        return clustered_wilson(margin[kept] > 0, topics)


def rank_by_reward(
    strong: HookedModel,
    weak: HookedModel,
    pairs: Sequence[Mapping[str, Any]],
    *,
    within: int = 5,
    **options: Any,
) -> RewardRanking:
    """Rewards of the answers of preference pairs (`prompt`, `chosen`, `rejected`, perhaps
    `topic`, as `probes.datasets.preferences()`); options are those of `log_ratios`."""
    check_pairs(pairs)
    if within < 0:
        raise ValueError(f"within is {within}: give 0 tokens or more")
    topics = topics_of(pairs)
    warn_if_few(topics)
    both = ("chosen", "rejected")
    found = log_ratios(
        strong,
        weak,
        [pair["prompt"] for pair in pairs for _ in both],
        [pair[key] for pair in pairs for key in both],
        topics=[topic for topic in topics for _ in both],
        **options,
    )

    def margin(values: Tensor) -> Tensor:
        return values[::2] - values[1::2]

    return RewardRanking(
        strong=found.strong,
        weak=found.weak,
        topics=topics,
        summed=margin(found.sums).float(),
        per_token=margin(found.means).float(),
        length=margin(found.lengths),
        within=within,
        record=found.record,
    )
