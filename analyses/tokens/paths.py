"""Along one model's answers, what does another model make of every step?

The states that leave the last block are read at the answer's positions only, and both models'
logits are made from them a few rows at a time (`probes.unembed`): nothing of the size
`[batch, seq, vocab]` is ever held. Distributions are compared in float32 over the ids both have.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.model import HookedModel
from probes.prompts import Prompt, Rendered, pad, pad_id_of
from probes.results import check_finite
from probes.sites import Site
from probes.unembed import Unembedding, unembedding

DECODED, COMPARED = 2**22, 2**20
"""Logits made at once, and compared at once: small enough that the comparison's own tensors, about
a dozen of that size, stay near the processor."""

Answers = tuple[tuple[int, ...], ...]
"""Token ids of the answer to each prompt."""


@dataclass(frozen=True)
class Reader:
    """One model with what it reads before the answers."""

    model: HookedModel
    prompts: tuple[Rendered, ...]
    decode: Unembedding


@dataclass(frozen=True)
class Steps:
    """Two next-token distributions at every token of the answers, P of the base and Q of the
    model that wrote them (the aligned one); nats, float32, answers one after the other."""

    ranks: Int[Tensor, " token"]
    """1 + number of ids with a larger base logit than the token's."""
    aligned_ranks: Int[Tensor, " token"]
    """The same under the aligned model; 1 where greedy decoding and reading agree."""
    logp_base: Float[Tensor, " token"]
    logp_aligned: Float[Tensor, " token"]
    kl: Float[Tensor, " token"]
    """KL(Q‖P)."""
    reverse_kl: Float[Tensor, " token"]
    """KL(P‖Q)."""
    js: Float[Tensor, " token"]
    """Jensen-Shannon divergence, 0 to ln 2."""
    entropy_base: Float[Tensor, " token"]
    entropy_aligned: Float[Tensor, " token"]
    top_base: Int[Tensor, "token top"]
    """The ids P holds most probable, most probable first."""
    top_base_p: Float[Tensor, "token top"]
    top_aligned: Int[Tensor, "token top"]
    top_aligned_p: Float[Tensor, "token top"]
    differs: Bool[Tensor, " token"]
    """Whether any logit of the ids compared differs, though too little to move a divergence."""

    def tensors(self) -> dict[str, Tensor]:
        """The fields above by name."""
        return {item.name: getattr(self, item.name) for item in fields(Steps)}


def compared(
    base: Float[Tensor, "token vocab"],
    aligned: Float[Tensor, "token vocab"],
    emitted: Int[Tensor, " token"],
    top: int = 10,
) -> Steps:
    """Compare two rows of float32 logits over the same ids, token by token.

    With d = log Q - log P, KL(P‖Q) is taken as sum(Q) - sum(P) - sum(P d), which differs from the
    textbook form by 0 and forgives the rounding of d to first order. Equal rows give exactly 0.
    """
    own = emitted[:, None]
    ranks = [1 + _count_above(x, x.gather(1, own)) for x in (base, aligned)]
    best = [x.topk(min(top, x.shape[1]), dim=1).indices for x in (base, aligned)]
    log_p, log_q = base.log_softmax(1), aligned.log_softmax(1)
    P, Q = log_p.exp(), log_q.exp()
    d = log_q - log_p
    dot = torch.linalg.vecdot
    p_d, q_d, excess = dot(P, d), dot(Q, d), Q.sum(1) - P.sum(1)
    # log(m / P) = log(1 + e^d) - ln 2 and log(m / Q) = log(1 + e^d) - ln 2 - d, m half-way
    s = torch.nn.functional.softplus(d)
    ln_2 = torch.nn.functional.softplus(d.new_zeros(1))
    js = ((P.sum(1) + Q.sum(1)) * ln_2 - dot(P, s) - dot(Q, s) + q_d) / 2
    js = torch.where(d.any(1), js.clamp(0.0, float(ln_2)), torch.zeros_like(js))
    return Steps(
        ranks=ranks[0],
        aligned_ranks=ranks[1],
        logp_base=log_p.gather(1, own)[:, 0],
        logp_aligned=log_q.gather(1, own)[:, 0],
        kl=(q_d - excess).clamp(min=0.0),
        reverse_kl=(excess - p_d).clamp(min=0.0),
        js=js,
        entropy_base=-dot(P, log_p),
        entropy_aligned=-dot(Q, log_q),
        top_base=best[0],
        top_base_p=P.gather(1, best[0]),
        top_aligned=best[1],
        top_aligned_p=Q.gather(1, best[1]),
        differs=torch.ne(base, aligned).any(1),
    )


def answers_of(
    model: HookedModel, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int, size: int
) -> Answers:
    """Greedy answers without penalties, each ended before the first id beyond `size`."""
    found = model.generate_ids(prompts, max_new_tokens, batch_size=batch_size)
    answers = tuple(tuple(itertools.takewhile(lambda t: t < size, ids)) for ids in found)
    if not any(answers):
        raise ValueError(
            f"the {len(answers)} answers of {model.name} have no token that the other model knows: "
            f"let it generate at least one, and compare over more than {size} ids"
        )
    return answers


def reader(model: HookedModel, prompts: Sequence[Rendered], room: int, what: str = "") -> Reader:
    """A model with its prompts, or one sentence why it cannot read them; `room` is how many
    tokens an answer may have, `what` how the prompts are called."""
    longest, limit = max(len(r.ids) for r in prompts), model.context_length
    if limit is not None and longest + room > limit:
        raise ValueError(
            f"{what or 'the template'} makes prompts of up to {longest} tokens, with {room} for "
            f"the answer, and the context of {model.name} is {limit}: choose another one, shorter "
            "prompts or shorter answers"
        )
    highest = max(max(r.ids) for r in prompts)
    if highest >= model.layout.vocab_size:
        raise ValueError(
            f"the prompts hold the token id {highest} and the vocabulary of {model.name} has "
            f"{model.layout.vocab_size} rows: use a template made of tokens that both models know"
        )
    return Reader(model, tuple(prompts), unembedding(model))


def along(
    writer: Reader,
    readers: Sequence[Reader],
    answers: Answers,
    size: int,
    *,
    top: int = 10,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Steps]:
    """Compare each reader with the writer of the answers at every answer token, over the first
    `size` ids. Each model is run once over each batch of answers."""
    found: list[dict[int, Steps]] = [{} for _ in readers]
    order = sorted(range(len(answers)), key=lambda i: len(writer.prompts[i].ids) + len(answers[i]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        emitted = torch.tensor([t for i in chunk for t in answers[i]], dtype=torch.long)
        counts = [len(answers[i]) for i in chunk]
        written = _states(writer, answers, chunk)
        for results, one in zip(found, readers, strict=True):
            read = written if one is writer else _states(one, answers, chunk)
            parts = list(_in_parts(one, writer, read, written, emitted, size, top))
            whole = {name: torch.cat([p[name] for p in parts]).split(counts) for name in parts[0]}
            for place, i in enumerate(chunk):
                results[i] = Steps(**{name: split[place] for name, split in whole.items()})
        if progress:
            progress(len(chunk))
    everyone = range(len(answers))
    joined = [
        Steps(
            **{f.name: torch.cat([getattr(r[i], f.name) for i in everyone]) for f in fields(Steps)}
        )
        for r in found
    ]
    for steps, one in zip(joined, readers, strict=True):
        for name in ("kl", "reverse_kl", "js", "logp_base", "logp_aligned"):
            who = f"{one.model.name} and {writer.model.name}"
            check_finite(getattr(steps, name), f"the {name} of {who} along the answers")
    return joined


def same_tokens(base: HookedModel, aligned: HookedModel) -> None:
    """Refuse two tokenizers in which one id stands for two strings."""
    pair = (base.tokenizer, aligned.tokenizer)
    if pair[0] is pair[1] or pair[0] is None:
        return
    mine, other = ({i: text for text, i in own.get_vocab().items()} for own in pair)
    if wrong := sorted(i for i in mine.keys() & other.keys() if mine[i] != other[i]):
        first = wrong[0]
        raise ValueError(
            f"the tokenizers of {base.name} and {aligned.name} differ: id {first} means "
            f"{mine[first]!r} in one and {other[first]!r} in the other ({len(wrong)} such ids), so "
            "their tokens have no common ranks; analyses.tokens.rewards.log_ratios compares by bytes"
        )


def pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
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


def strings(tokenizer: Any, ids: Sequence[int]) -> dict[str, str]:
    """What each id stands for inside a text, by the id as text: with its blank, and for parts of
    characters the tokenizer's own name. Two ids may stand for one string."""
    found = {}
    for i in sorted(set(ids)):
        added = pieces(tokenizer, [i, i])[1]
        if not added or "\ufffd" in added:
            added = tokenizer.convert_ids_to_tokens(i) or f"[id {i}]"  # a row without a token
        found[str(i)] = added
    return found


@torch.no_grad()
def _states(one: Reader, answers: Answers, chunk: Sequence[int]) -> Float[Tensor, "token d_model"]:
    """States that leave the last block where each answer token is predicted."""
    site = Site(one.model.n_layers - 1, "resid_post")
    rows = [(*one.prompts[i].ids, *answers[i]) for i in chunk]
    batch = pad(rows, pad_id_of(one.model.tokenizer), "left")
    counts = [len(answers[i]) for i in chunk]

    def keep(h: Tensor) -> Tensor:
        return torch.cat([row[-n - 1 : -1] for row, n in zip(h, counts, strict=True)])

    return one.model.engine.read(batch, [site], keep)[site]


@torch.no_grad()
def _in_parts(
    base: Reader,
    aligned: Reader,
    read: Tensor,
    written: Tensor,
    emitted: Tensor,
    size: int,
    top: int,
) -> Iterator[dict[str, Tensor]]:
    """The comparison a few rows at a time, on the CPU; the first part may be empty."""
    rows, few = max(16, DECODED // size), max(1, COMPARED // size)
    if not len(emitted):
        yield compared(torch.zeros(0, size), torch.zeros(0, size), emitted, top).tensors()
    for start in range(0, len(emitted), rows):
        part = slice(start, start + rows)
        p, q = (
            one.decode(states[part])[:, :size] for one, states in ((base, read), (aligned, written))
        )
        q, own = q.to(p.device), emitted[part].to(p.device)
        for i in range(0, len(own), few):
            some = slice(i, i + few)
            steps = compared(p[some], q[some], own[some], top).tensors()
            yield {name: value.cpu() for name, value in steps.items()}


def _count_above(x: Tensor, limit: Tensor) -> Int[Tensor, " token"]:
    """How many of each row are strictly larger; summed as float32, exact below 2^24, because that
    is several times faster than summing booleans."""
    return torch.gt(x, limit, out=torch.empty_like(x)).sum(1).long()
