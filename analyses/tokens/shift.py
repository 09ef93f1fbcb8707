"""Token-distribution shift: which of the aligned model's tokens would the base not have chosen?

The aligned model answers greedily. Every token of its answers is looked up in the base model's
distribution at the same place (same prompt, same answer so far): rank 1 is *unshifted*, 2 or 3
*marginal*, lower *shifted* (Lin et al. 2023, "The Unlocking Spell on Base LLMs", section 2). What
the base reads as the prompt can be chosen (`analyses.tokens.contexts`).
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.tokens import contexts
from probes import figures
from probes.model import HookedModel
from probes.prompts import Prompt, Rendered, pad, pad_id_of
from probes.results import Result
from probes.scores import Intervals, bca, wilson

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KINDS = ("unshifted", "marginal", "shifted")
LIMITS = (1, 3)
"""Ranks up to the first are unshifted, up to the second marginal."""


@dataclass(frozen=True)
class TokenShift(Result):
    """Ranks and probabilities, under the base, of the tokens of the aligned model's answers."""

    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    """Which set each prompt belongs to."""
    tokens: tuple[tuple[str, ...], ...]
    """The answers, token by token."""
    ranks: Int[Tensor, " token"]
    """Rank of each answer token under the base, 1 the most probable; answers in order."""
    p_base: Float[Tensor, " token"]
    p_aligned: Float[Tensor, " token"]
    base: str
    aligned: str
    base_context: str = "same"
    """What the base read before the answers: one of `contexts.CONTEXTS`."""

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

    def shares(self, group: str, positions: range | None = None, seed: int = 0) -> Intervals:
        """Share of each kind among a group's tokens (at these answer positions), `[3]`, with BCa
        intervals over prompts."""
        owner, place = self._owners()
        counted = torch.zeros(len(self.prompts), 3, dtype=torch.float64)
        chosen = torch.tensor([g == group for g in self.groups])[owner]
        if positions is not None:
            chosen &= (place >= positions.start) & (place < positions.stop)
        counted.index_put_(
            (owner[chosen], self.kinds[chosen]),
            torch.ones(int(chosen.sum()), dtype=torch.float64),
            accumulate=True,
        )
        counted = counted[counted.sum(1) > 0]
        return _pooled(counted, seed)

    def frame(self) -> "pd.DataFrame":
        """One row a token."""
        import pandas as pd

        owner, place = self._owners()
        return pd.DataFrame(
            {
                "prompt": owner.tolist(),
                "group": [self.groups[i] for i in owner.tolist()],
                "position": place.tolist(),
                "token": [token for answer in self.tokens for token in answer],
                "rank": self.ranks.tolist(),
                "kind": [KINDS[k] for k in self.kinds.tolist()],
                "p_base": self.p_base.tolist(),
                "p_aligned": self.p_aligned.tolist(),
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Share of shifted tokens by position in the answer, per group, with intervals."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        edges = [0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128]
        longest = max(self.counts)
        few = {g: min(5, n) for g, n in Counter(self.groups).items() if n > 1}
        with figures.theme():
            for i, group in enumerate(dict.fromkeys(self.groups)):
                x, y, low, high = [], [], [], []
                for start, stop in itertools.pairwise(edges):
                    reach = sum(
                        c > start
                        for c, g in zip(self.counts, self.groups, strict=True)
                        if g == group
                    )
                    if start >= longest or reach < few.get(group, 2):
                        break
                    share = self.shares(group, range(start, stop))
                    x.append((start + min(stop, longest) - 1) / 2)
                    y.append(float(share.value[2]))
                    low.append(y[-1] - float(share.low[2]))
                    high.append(float(share.high[2]) - y[-1])
                look = figures.style(i)
                ax.errorbar(
                    [v + 0.12 * i for v in x], y, yerr=[low, high], capsize=2, label=group, **look
                )
            ax.set(
                xlabel="position in the answer (tokens; binned)",
                ylabel=broken(f"share of tokens ranked below {LIMITS[1]} by {self.reader}", 40),
                ylim=(-0.02, 1.02),
                title=broken(f"Shifted tokens, {self.aligned} against {self.reader}"),
            )
            legend_below(ax, "prompts, 95 % interval")
        return ax

    def __str__(self) -> str:
        parts = []
        for group in dict.fromkeys(self.groups):
            share = self.shares(group)
            parts.append(
                f"{group} {share.value[2]:.1%} [{share.low[2]:.1%}, {share.high[2]:.1%}] shifted"
            )
        return f"token shift {self.aligned} against {self.reader}: " + "; ".join(parts)

    def _owners(self) -> tuple[Tensor, Tensor]:
        owner = torch.repeat_interleave(torch.arange(len(self.tokens)), torch.tensor(self.counts))
        place = torch.cat([torch.arange(count) for count in self.counts])
        return owner, place


def token_shift(
    base: HookedModel,
    aligned: HookedModel,
    prompts: Sequence[Prompt],
    groups: Sequence[str],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    vocab_size: int | None = None,
    base_context: str = "same",
    progress: Callable[[int], None] | None = None,
) -> TokenShift:
    """Let `aligned` answer the prompts and rank its tokens under `base`.

    Both models see the answers as the same token ids, `base` behind the context named
    (`contexts.CONTEXTS`). Distributions are over the first `vocab_size` ids, and an answer ends
    before a token beyond them, which the base cannot read; one model's logits are held at a time,
    at answer positions only.
    """
    given = {
        "base": [contexts.render(aligned.template, p, base_context) for p in prompts],
        "aligned": aligned.template.render_all(prompts),
    }
    if base_context != "same":
        _fits(base, given["base"], max_new_tokens, base_context)
    size = vocab_size or min(base.layout.vocab_size, aligned.layout.vocab_size)
    answers = [
        list(itertools.takewhile(lambda token: token < size, answer))
        for answer in aligned.generate_ids(prompts, max_new_tokens, batch_size=2 * batch_size)
    ]
    rows = {
        name: [(*r.ids, *answer) for r, answer in zip(read, answers, strict=True)]
        for name, read in given.items()
    }
    ranks: dict[int, Tensor] = {}
    chances: dict[str, dict[int, Tensor]] = {"base": {}, "aligned": {}}
    everyone = range(len(answers))
    order = sorted(everyone, key=lambda i: len(rows["aligned"][i]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        most = max(len(answers[i]) for i in chunk)
        for name, model in (("base", base), ("aligned", aligned)):
            batch = pad([rows[name][i] for i in chunk], pad_id_of(aligned.tokenizer), "left")
            logits = model.engine.logits(batch, most + 1)
            for row, i in zip(logits, chunk, strict=True):
                n = len(answers[i])
                steps = row[-n - 1 : -1, :size].float()
                emitted = torch.tensor(answers[i], dtype=torch.long, device=steps.device)[:, None]
                own = steps.gather(1, emitted)
                chances[name][i] = (own - steps.logsumexp(1, keepdim=True)).exp()[:, 0].cpu()
                if name == "base":
                    ranks[i] = 1 + (steps > own).sum(1).cpu()
        if progress:
            progress(len(chunk))
    return TokenShift(
        prompts=tuple(p if isinstance(p, str) else p[-1]["content"] for p in prompts),
        groups=tuple(groups),
        tokens=tuple(_pieces(aligned.tokenizer, answer) for answer in answers),
        ranks=torch.cat([ranks[i] for i in everyone]),
        p_base=torch.cat([chances["base"][i] for i in everyone]),
        p_aligned=torch.cat([chances["aligned"][i] for i in everyone]),
        base=base.label,
        aligned=aligned.label,
        base_context=base_context,
    )


def _fits(base: HookedModel, read: Sequence[Rendered], room: int, context: str) -> None:
    longest, limit = max(len(r.ids) for r in read), base.context_length
    if limit is not None and longest + room > limit:
        raise ValueError(
            f"the base context {context!r} makes prompts of up to {longest} tokens, with {room} for "
            f"the answer, and the context of {base.name} is {limit}: choose another one, shorter "
            "prompts or shorter answers"
        )


def _pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text. Decoded one by one, tokens of many tokenizers lose their
    leading blank, and those that hold a part of a character become rubble: its text stands at the
    token that completes it."""
    done, found = "", []
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
        whole = text.startswith(done) and (n == len(ids) or not text.endswith("\ufffd"))
        found.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return tuple(found)


def _pooled(counted: Float[Tensor, "prompt kind"], seed: int, resamples: int = 2000) -> Intervals:
    """Shares of pooled counts with intervals over prompts (rows)."""
    n = len(counted)
    if n < 2:
        raise ValueError(f"{n} prompts have tokens there: an interval over prompts needs 2")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    weights = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(resamples, n, dtype=torch.float64)
    )

    def share(total: Tensor) -> Tensor:
        return total / total.sum(-1, keepdim=True)

    value = share(counted.sum(0))
    limits = bca(value, share(weights @ counted), share(counted.sum(0) - counted))
    for k in ((value == 0) | (value == 1)).nonzero().flatten().tolist():
        # every resample is 0 or 1 there: the limits are those of as many prompts, not a point
        bound = wilson(round(n * float(value[k])), n)
        limits.low[k], limits.high[k] = bound.low, bound.high
    return limits
