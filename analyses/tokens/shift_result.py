"""What the base makes of every token of the aligned model's answers: the result of `token_shift`."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from analyses.tokens import shift_figures, shift_tables
from analyses.tokens.buckets import buckets_of
from analyses.tokens.paths import Steps
from analyses.tokens.shares import (
    KINDS,
    LIMITS,
    Per,
    Pooled,
    cut_off,
    enough,
    pooled,
    said_cut_off,
    share_intervals,
    sums,
)
from probes.results import Result
from probes.scores import Interval, Intervals
from probes.splits import FEW_GROUPS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

QUANTITIES = ("kl", "reverse_kl", "js", "p_base", "p_aligned", "log_rank")
"""What `TokenShift.mean` takes the mean of: divergences in nats, probabilities of the token, and
the natural logarithm of its rank under the base."""


@dataclass(frozen=True)
class TokenShift(Result, Steps):
    """What the base makes of every token of the aligned model's answers.

    The tensors (see `Steps`) hold the answers one after the other, in the order of the prompts.
    """

    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    """Which set each prompt belongs to."""
    tokens: tuple[tuple[str, ...], ...]
    """The answers, token by token."""
    ids: Int[Tensor, " token"]
    stops: Bool[Tensor, " token"]
    """Whether the token stops generation."""
    strings: dict[str, str]
    """Text of every id that stands in a list of most probable ids, by the id as text."""
    base: str
    aligned: str
    base_context: str = "same"
    """What the base read before the answers: one of `contexts.CONTEXTS`."""
    limit: int | None = None
    """Tokens an answer could have at most; None where that is not known."""

    @property
    def reader(self) -> str:
        """The base's label, with its context where that is not the aligned model's."""
        own = self.base_context != "same"
        return f"{self.base} (context {self.base_context})" if own else self.base

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens per answer."""
        return tuple(map(len, self.tokens))

    @property
    def kinds(self) -> Int[Tensor, " token"]:
        """0 unshifted, 1 marginal, 2 shifted."""
        return (self.ranks > LIMITS[0]).long() + (self.ranks > LIMITS[1]).long()

    @property
    def p_base(self) -> Float[Tensor, " token"]:
        """Probability of each token under the base."""
        return self.logp_base.exp()

    @property
    def p_aligned(self) -> Float[Tensor, " token"]:
        """Probability of each token under the model that wrote it."""
        return self.logp_aligned.exp()

    @property
    def log_rank(self) -> Float[Tensor, " token"]:
        """Natural logarithm of the rank under the base."""
        return self.ranks.float().log()

    @property
    def agreement(self) -> float:
        """Share of tokens that the aligned model, reading, puts first; generating, it did."""
        return float((self.aligned_ranks == 1).double().mean())

    @property
    def identical(self) -> bool:
        """Whether the two gave the same logits everywhere, bit for bit."""
        return not self.differs.any()

    @property
    def truncated(self) -> int:
        """Answers cut off by `limit`: as long as it, and without a token that stops."""
        return cut_off(self.counts, self.stops, self.limit)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers should know."""
        found = enough(self.groups, FEW_GROUPS)
        found += said_cut_off(self.aligned, self.truncated, len(self.prompts), self.limit)
        if self.agreement < 0.99:
            found.append(
                f"Only {self.agreement:.1%} of the tokens {self.aligned} wrote are its most "
                "probable ones when it reads them again: ties or half precision turned the rest."
            )
        return tuple(found)

    @cached_property
    def owners(self) -> Int[Tensor, " token"]:
        """Which prompt each token answers."""
        return torch.repeat_interleave(torch.arange(len(self.tokens)), torch.tensor(self.counts))

    @cached_property
    def places(self) -> Int[Tensor, " token"]:
        """Position of each token in its answer, from 0."""
        return torch.cat([torch.arange(count) for count in self.counts])

    @cached_property
    def buckets(self) -> Int[Tensor, " token"]:
        """What kind of word each token is: an index into `buckets.BUCKETS`."""
        stops = torch.split(self.stops, list(self.counts))
        each = [buckets_of(t, s.tolist()) for t, s in zip(self.tokens, stops, strict=True)]
        return torch.tensor([bucket for answer in each for bucket in answer], dtype=torch.long)

    def among(
        self,
        group: str | None = None,
        positions: range | None = None,
        *,
        stops: bool = True,
        first: bool = True,
    ) -> Bool[Tensor, " token"]:
        """Which tokens belong to a group (None: any) and lie at these positions, with or without
        those that stop generation and the first of each answer."""
        chosen = torch.tensor([group in (None, g) for g in self.groups])[self.owners]
        if positions is not None:
            chosen &= (self.places >= positions.start) & (self.places < positions.stop)
        if not stops:
            chosen &= ~self.stops
        return chosen if first else chosen & (self.places > 0)

    def over_prompts(
        self,
        values: Shaped[Tensor, "token column"],
        chosen: Bool[Tensor, " token"],
        per: Per = "token",
        seed: int = 0,
    ) -> Pooled:
        """Means of any values of the chosen tokens, with resamples of whole prompts."""
        total, counts = sums(values, self.owners, chosen, len(self.prompts))
        return pooled(total, counts, per, seed)

    def shares(
        self,
        group: str | None = None,
        positions: range | None = None,
        seed: int = 0,
        *,
        stops: bool = True,
        first: bool = True,
        per: Per = "token",
    ) -> Intervals:
        """Share of each kind, `[3]`, with BCa intervals over prompts: of all tokens together
        (`per="token"`), or the mean over answers of each answer's own (`per="response"`). The
        limits of one prompt are NaN."""
        kinds = torch.nn.functional.one_hot(self.kinds, len(KINDS))
        chosen = self.among(group, positions, stops=stops, first=first)
        return share_intervals(self.over_prompts(kinds, chosen, per, seed))

    def mean(
        self,
        quantity: str,
        group: str | None = None,
        positions: range | None = None,
        seed: int = 0,
        *,
        stops: bool = True,
        first: bool = True,
        per: Per = "token",
    ) -> Interval:
        """Mean of one of `QUANTITIES` with its BCa interval over prompts (see `shares`)."""
        if quantity not in QUANTITIES:
            raise ValueError(f"{quantity!r} was asked: choose one of {', '.join(QUANTITIES)}")
        chosen = self.among(group, positions, stops=stops, first=first)
        found = self.over_prompts(getattr(self, quantity)[:, None], chosen, per, seed).interval()
        return Interval(*(float(limit) for limit in found))

    def frame(self) -> "pd.DataFrame":
        """One row a token."""
        return shift_tables.tokens(self)

    def summary(self) -> "pd.DataFrame":
        """One row per group, way of averaging and choice of tokens: shares and mean divergences
        (nats), with intervals."""
        return shift_tables.summary(self)

    def by_position(self, quantity: str = "shifted", group: str | None = None) -> "pd.DataFrame":
        """One row per range of positions: mean of a quantity, or share of shifted tokens."""
        return shift_tables.by_position(self, quantity, group)

    def frequent(
        self, group: str | None = None, *, by: str = "count", minimum: int = 3
    ) -> "pd.DataFrame":
        """Tokens by how often they are shifted (`by="count"`) or by the share of their
        occurrences that is (`by="rate"`), of those that occur `minimum` times or more."""
        return shift_tables.frequent(self, group, by, minimum)

    def by_bucket(self, group: str | None = None) -> "pd.DataFrame":
        """One row per bucket: share of the tokens, shifted share in it, share of all shifted."""
        return shift_tables.by_bucket(self, group)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Share of shifted tokens by position in the answer, per group, with intervals."""
        return shift_figures.positions(self, "shifted", ax)

    def plot_position(self, quantity: str, ax: "Axes | None" = None) -> "Axes":
        """The same for one of `QUANTITIES`."""
        return shift_figures.positions(self, quantity, ax)

    def plot_divergence(self, ax: "Axes | None" = None) -> "Axes":
        """Mean divergence by group: KL both ways and Jensen-Shannon, with intervals."""
        return shift_figures.divergences(self, ax)

    def plot_buckets(self, ax: "Axes | None" = None) -> "Axes":
        """Share of shifted tokens in each bucket, per group, with intervals."""
        return shift_figures.buckets(self, ax)

    def __str__(self) -> str:
        head = f"token shift {self.aligned} against {self.reader}: "
        if self.identical:
            return head + f"the same distributions at all {len(self.ids)} tokens, bit for bit"
        said = []
        for group in dict.fromkeys(self.groups):
            chosen = self.among(group)
            if not chosen.any():
                said.append(f"{group} has no tokens")
                continue
            share = self.shares(group)
            limits = f" [{share.low[2]:.1%}, {share.high[2]:.1%}]"
            one = bool(share.low[2].isnan())  # one prompt has no interval
            said.append(f"{group} {share.value[2]:.1%}{'' if one else limits} shifted")
        return head + "; ".join(said)
