"""Does a model rank preferred answers above others, and could its training have made it?

Ranking accuracy asks whether the model gives the preferred answer of a pair the larger
probability; the idealised accuracy is that of the policy which preference training (DPO, RLHF with
a KL penalty) would reach if it succeeded (Chen et al. 2024, arXiv 2405.19534). Everything is
computed from log-probabilities. The code released with the paper divides log-probabilities
where answers are not normalised by length, which turns the order round; that is not offered here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.tokens import ranking_figure
from analyses.tokens.preference_theory import idealised_margin, loss_bound
from probes.clustered import clustered_wilson
from probes.model import HookedModel
from probes.prompts import Rendered, prompts_hash
from probes.results import Record, Result, check_finite
from probes.scores import Interval, bca_bootstrap, newcombe
from probes.splits import warn_if_few
from steering.effects import Row, token_logprobs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)
"""Strengths of the KL penalty over which the idealised accuracy is given."""

TIE = 0.01
"""Pairs whose margin is smaller than this, in nats (per token where normalised), are ties."""

WHO = ("model", "reference")


class Idealised(NamedTuple):
    """Idealised ranking accuracy over the strengths of the penalty."""

    by_beta: tuple[float, ...]
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class RankingAccuracy(Result):
    """Log-probabilities of the answers of preference pairs, and the accuracies that follow."""

    model: str
    reference: str
    """The checkpoint that preference training started from."""
    topics: tuple[str, ...]
    logp: Float[Tensor, "who pair answer"]
    """Summed log-probability in nats; `who` is the model, then the reference; `answer` the
    preferred one, then the other."""
    lengths: Int[Tensor, "pair answer"]
    """Tokens of each answer."""
    shares: Float[Tensor, " pair"]
    """Share of raters who prefer the preferred answer, 0 to 1."""
    betas: tuple[float, ...] = BETAS
    tie: float = TIE

    def margins(self, who: str = "model", normalised: bool = False) -> Float[Tensor, " pair"]:
        """log p(preferred) - log p(other) in nats; normalised: of the means per token (eq. 15)."""
        if who not in WHO:
            raise ValueError(f"{who!r} was asked: choose one of {', '.join(WHO)}")
        logp = self.logp[WHO.index(who)].double()
        logp = logp / self.lengths if normalised else logp
        return logp[:, 0] - logp[:, 1]

    def accuracy(self, who: str = "model", normalised: bool = False) -> Interval:
        """Share of pairs ranked as the raters do (definition 2.3), ties left out, with its Wilson
        interval over topics; 0 to 1."""
        return self._share(self.margins(who, normalised))

    def ties(self, who: str = "model", normalised: bool = False) -> int:
        """Pairs left out because the two answers are as good as equally probable."""
        return int((self.margins(who, normalised).abs() < self.tie).sum())

    def idealised_margins(self, beta: float, normalised: bool = False) -> Float[Tensor, " pair"]:
        """Margins of the idealised policy (theorem 3.1), nats. Normalised, the reference's margin
        is the one per token, as in the paper's tables: an approximation, because normalising the
        policy itself would need its partition function."""
        return idealised_margin(self.margins("reference", normalised), self.shares.double(), beta)

    def idealised(self, normalised: bool = False) -> Idealised:
        """Idealised accuracy for each strength of the penalty, and their range (corollary 3.3)."""
        found = []
        for beta in self.betas:
            margin = self.idealised_margins(beta, normalised)
            found.append(_accuracy(margin, self.tie))
        return Idealised(tuple(found), min(found), _median(found), max(found))

    def gap(self, normalised: bool = False, seed: int = 0) -> Interval:
        """Median idealised accuracy minus the model's, over the same pairs, with a BCa interval
        over topics; what training left undone is positive. Where no resample differs the limits
        are Newcombe's for two rates of as many topics, not a point."""
        margin = self.margins("model", normalised)
        ideal = [self.idealised_margins(beta, normalised) for beta in self.betas]

        def statistic(rows: Tensor) -> float:
            best = _median([_accuracy(m[rows], self.tie) for m in ideal])
            return best - _accuracy(margin[rows], self.tie)

        found = bca_bootstrap(statistic, self.topics, seed=seed)
        if found.low < found.high:
            return found
        k = len(set(self.topics))
        own = round(k * _accuracy(margin, self.tie))
        limits = newcombe(min(k, own + round(k * found.value)), k, own, k)
        return Interval(found.value, min(limits.low, found.value), max(limits.high, found.value))

    def chance(self, seed: int = 0) -> float:
        """95th percentile of the accuracy of coins thrown for as many topics."""
        generator = torch.Generator().manual_seed(seed)
        coins = torch.randint(2, (2000, len(set(self.topics))), generator=generator)
        return float(coins.double().mean(1).quantile(0.95))

    def losses(self, beta: float = 0.1) -> Float[Tensor, " pair"]:
        """DPO loss of each pair, in nats; log 2 where the model is its reference."""
        moved = self.margins("model") - self.margins("reference")
        return -torch.nn.functional.logsigmoid(beta * moved)

    def bounds(self, beta: float = 0.1) -> Float[Tensor, " pair"]:
        """The loss a pair must come down to before it is ranked right (theorem 4.1): -log sigmoid
        of beta times c, with c = log p_ref(other) - log p_ref(preferred)."""
        return loss_bound(-self.margins("reference"), beta)

    def frame(self) -> "pd.DataFrame":
        """One row per accuracy; `null_95` is that of coins."""
        import pandas as pd

        rows = []
        for normalised in (False, True):
            for who in WHO:
                found = self.accuracy(who, normalised)
                row = {"measure": f"ranking accuracy of {who}", "normalised": normalised}
                row |= {"value": found.value, "low": found.low, "high": found.high}
                rows.append({**row, "null_95": self.chance(), "ties": self.ties(who, normalised)})
            for beta, value in zip(self.betas, self.idealised(normalised).by_beta, strict=True):
                row = {"measure": f"idealised, beta {beta:g}", "normalised": normalised}
                rows.append({**row, "value": value})
            gap = self.gap(normalised)
            row = {"measure": "alignment gap", "normalised": normalised, "value": gap.value}
            rows.append({**row, "low": gap.low, "high": gap.high})
        return pd.DataFrame(rows)

    def pairs(self, beta: float = 0.1) -> "pd.DataFrame":
        """One row per pair: margins in nats, share, DPO loss, its bound, ranked right or not."""
        import pandas as pd

        return pd.DataFrame(
            {
                "topic": self.topics,
                "margin": self.margins().numpy(),
                "reference_margin": self.margins("reference").numpy(),
                "share": self.shares.double().numpy(),
                "loss": self.losses(beta).numpy(),
                "bound": self.bounds(beta).numpy(),
                "right": (self.margins() >= 0).numpy(),
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Accuracies of reference and model beside the idealised range, raw and normalised."""
        return ranking_figure.accuracies(self, ax)

    def plot_losses(self, ax: "Axes | None" = None, beta: float = 0.1) -> "Axes":
        """DPO loss of each pair against how wrong the reference was, with theorem 4.1's line."""
        return ranking_figure.losses(self, ax, beta)

    def __str__(self) -> str:
        if torch.equal(self.logp[0], self.logp[1]):
            same = f"{self.model} and {self.reference} are the same model"
            return f"ranking accuracy: {same}, {self.accuracy().value:.1%} each"
        said = []
        for normalised in (False, True):
            own, was = self.accuracy("model", normalised), self.accuracy("reference", normalised)
            said.append(
                f"{'per token' if normalised else 'summed'} {own.value:.1%} "
                f"[{own.low:.1%}, {own.high:.1%}], {self.reference} {was.value:.1%}, "
                f"idealised {self.idealised(normalised).median:.1%}"
            )
        return f"ranking accuracy of {self.model}: {'; '.join(said)}"

    def _share(self, margin: Tensor) -> Interval:
        kept = margin.abs() >= self.tie
        if not kept.any():
            raise ValueError(
                f"all {len(margin)} pairs are ties: the answers of each are equally probable to "
                f"within {self.tie} nats, so give a smaller tie or other pairs"
            )
        topics = [t for t, k in zip(self.topics, kept.tolist(), strict=True) if k]
        return clustered_wilson(margin[kept] >= 0, topics)


def ranking_accuracy(
    model: HookedModel,
    reference: HookedModel,
    pairs: Sequence[Mapping[str, Any]],
    *,
    betas: Sequence[float] = BETAS,
    tie: float = TIE,
) -> RankingAccuracy:
    """Rank the answers of preference pairs by both models.

    A pair has `prompt`, `chosen`, `rejected`, `rater_share` (of raters for the chosen one) and
    perhaps `topic`, as `probes.datasets.preferences()`. Both models must read the same tokens:
    give them one template with `analyses.checkpoints.compare`.
    """
    check_pairs(pairs, "rater_share")
    if not betas or min(betas) <= 0:
        raise ValueError(f"the betas are {tuple(betas)}: give numbers above 0")
    if not 0 <= tie < math.inf:
        raise ValueError(f"the tie is {tie}: give 0 or a small number of nats")
    shares = [float(pair["rater_share"]) for pair in pairs]
    if wrong := [i for i, share in enumerate(shares) if not 0 <= share <= 1]:
        raise ValueError(
            f"the rater_share of pair {wrong[0]} is {shares[wrong[0]]}: give a share from 0 to 1"
        )
    topics = topics_of(pairs)
    warn_if_few(topics)
    rendered, found = [], []
    for one in (model, reference):
        given = [
            one.template.render(pair["prompt"], pair[key])
            for pair in pairs
            for key in ("chosen", "rejected")
        ]
        if rendered and [r.ids for r in rendered] != [r.ids for r in given]:
            raise ValueError(
                f"{model.name} and {reference.name} read the pairs as different tokens: compare "
                "checkpoints of one model, under one template (analyses.checkpoints.compare)"
            )
        rendered = given
        found.append(summed(one, given))
    lengths = torch.tensor([len(r.ids) - r.n_prompt for r in rendered])
    return RankingAccuracy(
        model=model.label,
        reference=reference.label,
        topics=topics,
        logp=torch.stack(found).float().reshape(2, -1, 2),
        lengths=lengths.reshape(-1, 2),
        shares=torch.tensor(shares, dtype=torch.float32),
        betas=tuple(map(float, betas)),
        tie=float(tie),
        record=Record(
            models=(model.name, reference.name),
            fingerprints=(model.fingerprint, reference.fingerprint),
            template_hash=model.template.hash,
            prompts_hash=prompts_hash(rendered),
            dtype=str(model.dtype).removeprefix("torch."),
            engine=model.engine.name,
            settings={"betas": list(map(float, betas)), "tie": float(tie)},
        ),
    )


def summed(model: HookedModel, rendered: Sequence[Rendered]) -> Float[Tensor, " answer"]:
    """Log-probability of each answer, in nats, float64."""
    found = token_logprobs(model, [Row(r.ids, r.n_prompt) for r in rendered])
    total = torch.stack([logp.sum() for logp in found])
    check_finite(total, f"the log-probabilities under {model.name}")
    return total


def check_pairs(pairs: Sequence[Mapping[str, Any]], *more: str) -> None:
    """Refuse pairs that lack something, and those whose two answers are the same or empty."""
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} preference pairs were given: give 2 at least, 20 or more")
    needed = {"prompt", "chosen", "rejected", *more}
    for i, pair in enumerate(pairs):
        if missing := needed - set(pair):
            raise ValueError(f"pair {i} has no {', '.join(sorted(missing))}: give it one")
        if not (pair["chosen"].strip() and pair["rejected"].strip()):
            raise ValueError(f"pair {i} has an empty answer: give both answers some text")
        if pair["chosen"] == pair["rejected"]:
            raise ValueError(f"the two answers of pair {i} are the same: there is nothing to rank")


def topics_of(pairs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The topic of each pair; pairs of one prompt, where none is said, share theirs."""
    return tuple(str(pair.get("topic") or pair["prompt"]) for pair in pairs)


def _accuracy(margin: Tensor, tie: float) -> float:
    """Share of pairs that are no ties and ranked right; one half where all are ties."""
    kept = margin[margin.abs() >= tie]
    return float((kept >= 0).double().mean()) if len(kept) else 0.5


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
