"""Log-ratio rewards: how much more probable an answer is to a strong model than to a weak one.

`r(x, y) = log p_strong(y | x) - log p_weak(y | x)`, in nats, summed over the answer (arXiv
2411.02481). With a DPO model and its reference it is the implicit reward over beta.
A sum grows with length, so every ranking by it is shown beside the mean per token and beside
controls for length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.tokens.spans import common_spans, text_spans, token_spans
from probes import figures
from probes.model import HookedModel
from probes.prompts import Message, Prompt, Rendered, messages_of, prompts_hash
from probes.results import Record, Result, check_finite
from probes.scores import Interval, bca_bootstrap
from steering.effects import Row, token_logprobs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class LengthBias(NamedTuple):
    """Correlation of rewards with the length of the answers, -1 to 1."""

    summed: Interval
    per_token: Interval
    null_95: float
    """95th percentile of the absolute correlation of sums with shuffled lengths."""


@dataclass(frozen=True)
class LogRatios(Result):
    """log p_strong - log p_weak of each unit of some answers, in nats; positive where the strong
    model likes it more. A unit is a token, or with two tokenizers the least text both cut off."""

    strong: str
    weak: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    topics: tuple[str, ...]
    """Answers of one topic are not independent of each other."""
    spans: tuple[tuple[tuple[int, int], ...], ...]
    """Characters of its answer that each unit covers."""
    ratios: Float[Tensor, " unit"]
    """Answer after answer."""
    counted: Bool[Tensor, " unit"]
    """False for masked units: special tokens, and texts the caller named."""
    lengths: Int[Tensor, " answer"]
    """Tokens of the strong model in the units that count."""
    token_level: bool
    """Whether both models read the same tokens, so that every unit is one."""

    @property
    def sums(self) -> Float[Tensor, " answer"]:
        """Reward of each answer: the sum over the units that count, nats, float64."""
        owner = self._owners()[self.counted]
        total = torch.zeros(len(self.answers), dtype=torch.float64)
        return total.index_add_(0, owner, self.ratios[self.counted].double())

    @property
    def means(self) -> Float[Tensor, " answer"]:
        """Reward per token of the strong model, nats. With two tokenizers it is not antisymmetric,
        since the other model counts other tokens."""
        return self.sums / self.lengths

    def tokens(self, answer: int) -> list[tuple[str, float]]:
        """The tokens of one answer that count, each with its own reward in nats."""
        if not self.token_level:
            raise ValueError(
                f"{self.strong} and {self.weak} cut the answers into different tokens, so a token "
                "has no ratio: use `spans_of`, whose texts both models cut off, or the sums"
            )
        return [(text, ratio) for text, ratio, kept in self.spans_of(answer) if kept]

    def spans_of(self, answer: int) -> list[tuple[str, float, bool]]:
        """Text, ratio in nats, and whether it counts, of each unit of one answer."""
        mine = self._owners() == answer
        table = zip(
            self.spans[answer], self.ratios[mine].tolist(), self.counted[mine].tolist(), strict=True
        )
        return [(self.answers[answer][a:b], ratio, kept) for (a, b), ratio, kept in table]

    def length_bias(self, seed: int = 0) -> LengthBias:
        """How much of the reward is length, with BCa intervals over topics and the null."""
        n = self.lengths.double()
        if len(n) < 3 or float(n.std()) == 0:
            raise ValueError(
                f"{len(n)} answers of {len(set(n.tolist()))} lengths: a correlation with length "
                "needs 3 answers or more and two lengths at least"
            )
        found = []
        for reward in (self.sums, self.means):
            found.append(
                bca_bootstrap(lambda rows, r=reward: _pearson(r[rows], n[rows]), self.topics, seed=seed)
            )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        sums = self.sums
        null = [
            abs(_pearson(sums, n[torch.randperm(len(n), generator=generator)])) for _ in range(500)
        ]
        limit = torch.tensor(null, dtype=torch.float64).quantile(0.95)
        return LengthBias(found[0], found[1], float(limit))

    def frame(self) -> "pd.DataFrame":
        """One row an answer: sum and mean in nats, tokens that count."""
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": self.prompts,
                "topic": self.topics,
                "answer": self.answers,
                "sum": self.sums.numpy(),
                "per_token": self.means.numpy(),
                "tokens": self.lengths.numpy(),
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Summed reward of each answer against its length, with the line of least squares."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        n, sums = self.lengths.double(), self.sums
        with figures.theme():
            look = figures.style(0)
            ax.plot(n.numpy(), sums.numpy(), ls="", label=f"answers ({len(n)})", **look)
            if len(n) > 1 and float(n.std()) > 0:
                centred = n - n.mean()
                slope = float(centred @ sums / (centred @ centred))
                ends = torch.stack([n.min(), n.max()])
                fitted = sums.mean() + slope * (ends - n.mean())
                label = f"least squares, {slope:+.2f} nats a token"
                ax.plot(ends.numpy(), fitted.numpy(), color=figures.PALETTE[1], label=label)
            ax.axhline(0, lw=0.8, color=figures.PALETTE[7])
            ax.set(
                xlabel=f"length of the answer (tokens of {self.strong})",
                ylabel="summed log-ratio (nats)",
                title=broken(f"Reward {self.strong} over {self.weak}"),
            )
            legend_below(ax)
        return ax

    def __str__(self) -> str:
        if not self.ratios.any():
            return (
                f"log-ratios: {self.strong} and {self.weak} give every token of "
                f"{len(self.answers)} answers the same probability, all ratios are exactly 0"
            )
        unit = "tokens" if self.token_level else "spans"
        return (
            f"log-ratios {self.strong} over {self.weak}: mean {self.sums.mean():.2f} nats an "
            f"answer, {self.sums.sum() / self.lengths.sum():.3f} a token, {len(self.answers)} "
            f"answers, {int(self.counted.sum())} {unit}"
        )

    def _owners(self) -> Int[Tensor, " unit"]:
        counts = torch.tensor([len(own) for own in self.spans])
        return torch.repeat_interleave(torch.arange(len(counts)), counts)


def log_ratios(
    strong: HookedModel,
    weak: HookedModel,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    topics: Sequence[str] | None = None,
    context: Sequence[Message] = (),
    context_for: str = "both",
    mask: Sequence[str] = (),
    specials: bool = False,
) -> LogRatios:
    """Rewards of answers, each model reading the prompt in its own template.

    Give checkpoints of one model one template first (`analyses.checkpoints.compare`). `context`
    are messages put before every prompt, an instruction or answered examples (the paper's
    customised reward); whether the weak model reads it too is not told there, so choose.
    Special tokens of either tokenizer that stand in an answer do not count, unless `specials`,
    nor do the texts of `mask` ("\\n", say). They are found by their characters, so they are
    the same for both models. Answers may end with the stop token's text.
    """
    if context_for not in ("both", "strong", "weak"):
        raise ValueError(f"context_for is {context_for!r}: choose both, strong or weak")
    if topics is not None and len(topics) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts came with {len(topics)} topics: give one for each"
        )
    framed = [[*context, *messages_of(p)] for p in prompts] if context else prompts
    sides = {}
    for side, model in (("strong", strong), ("weak", weak)):
        read = framed if context_for in ("both", side) else prompts
        sides[side] = model.template.render_all(read, answers)
    hidden = [] if specials else [*_specials(strong), *_specials(weak)]
    hidden = sorted({text for text in (*hidden, *mask) if text})
    logp = {}
    for side, model in (("strong", strong), ("weak", weak)):
        logp[side] = token_logprobs(model, [Row(r.ids, r.n_prompt) for r in sides[side]])
        check_finite(torch.cat(logp[side]), f"the log-probabilities under {model.name}")
    token_level = all(
        _strings(strong, a) == _strings(weak, b)
        for a, b in zip(sides["strong"], sides["weak"], strict=True)
    )
    spans, ratios, counted, lengths = [], [], [], []
    for i, answer in enumerate(answers):
        pieces = token_spans(sides["strong"][i], answer), token_spans(sides["weak"][i], answer)
        mine, other = logp["strong"][i], logp["weak"][i]
        if token_level:
            own, ends = pieces[0], [(k, k) for k in range(1, len(mine) + 1)]
        else:
            own, ends = common_spans(*pieces, len(answer))
        starts = [(0, 0), *ends[:-1]]
        masked = text_spans(answer, hidden)
        kept = [not any(a < end and b > start for start, end in masked) for a, b in own]
        if not any(kept):
            raise ValueError(
                f"answer {i} ({answer[:40]!r}) has nothing but masked text: give it some"
            )
        for (s, w), (t, v) in zip(starts, ends, strict=True):
            ratios.append(mine[s:t].sum() - other[w:v].sum())
        spans.append(tuple(own))
        counted += kept
        lengths.append(
            sum(t - s for (s, _), (t, _), k in zip(starts, ends, kept, strict=True) if k)
        )
    return LogRatios(
        strong=strong.label,
        weak=weak.label,
        prompts=tuple(messages_of(p)[-1]["content"] for p in prompts),
        answers=tuple(answers),
        topics=tuple(topics or (str(p) for p in prompts)),
        spans=tuple(spans),
        ratios=torch.stack(ratios).float(),
        counted=torch.tensor(counted),
        lengths=torch.tensor(lengths),
        token_level=token_level,
        record=Record(
            models=(strong.name, weak.name),
            fingerprints=(strong.fingerprint, weak.fingerprint),
            template_hash=strong.template.hash,
            prompts_hash=prompts_hash(sides["strong"]),
            dtype=str(strong.dtype).removeprefix("torch."),
            engine=strong.engine.name,
            settings={"context": [dict(m) for m in context], "context_for": context_for,
                      "mask": list(mask), "specials": specials},
        ),
    )  # fmt: skip


def _specials(model: HookedModel) -> list[str]:
    return [str(text) for text in getattr(model.tokenizer, "all_special_tokens", ())]


def _strings(model: HookedModel, r: Rendered) -> list[str]:
    ids = r.ids[r.n_prompt :]
    return [
        f"{i} {s}" for i, s in zip(ids, model.tokenizer.convert_ids_to_tokens(ids), strict=True)
    ]


def _pearson(x: Tensor, y: Tensor) -> float:
    """Correlation; 0 where one of the two varies by no more than rounding."""
    a, b = x - x.mean(), y - y.mean()
    if bool(a.norm() <= 1e-9 * x.norm()) or bool(b.norm() <= 1e-9 * y.norm()):
        return 0.0
    return float(a @ b / (a.norm() * b.norm()))
