"""Greater-than: the end of a span of years comes after its beginning.

"The war lasted from the year 1743 to the year 17" goes on with a number above 43 (Hanna et al.
2023, https://arxiv.org/abs/2305.00586; nouns and code are ours). That needs two-digit numbers that
are one token behind "17". Tokenizers that split digits get the one-digit form: "... from the year
1743 to the year 174" goes on with a digit above 3.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.mechanisms.task import Task
from analyses.mechanisms.words import continuation, dealt, drawn, generator, known, plain_text
from probes.model import HookedModel

_NOUNS = (
    "war siege drought revolt strike famine truce voyage reign plague crisis dispute trial journey "
    "dynasty empire regime rebellion expedition campaign project festival tour conflict battle "
    "blockade boycott census debate feud flood protest quarrel raid rule survey treaty alliance "
    "occupation exile negotiation experiment study program partnership marriage friendship contract "
    "lease search hunt mission migration construction investigation pilgrimage epidemic invasion "
    "struggle uprising recession boom monopoly ban embargo tradition custom practice fashion winter "
    "storm"
)
NOUNS = tuple(_NOUNS.split())
CENTURIES = tuple(range(11, 18))


@dataclass(frozen=True)
class MassDifference:
    """Probability of one set of next tokens minus that of another, for each prompt: -1 to 1."""

    answers: tuple[tuple[int, ...], ...]
    others: tuple[tuple[int, ...], ...]
    name: str = "probability above minus at or below"
    unit: str = "probability"

    def __call__(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
        if len(logits) != len(self.answers):
            raise ValueError(
                f"the metric has answers for {len(self.answers)} prompts, the run has "
                f"{len(logits)}: give a set of token ids for each prompt"
            )
        p = logits.double().softmax(-1)
        rows = zip(p, self.answers, self.others, strict=True)
        return torch.stack([row[list(a)].sum() - row[list(b)].sum() for row, a, b in rows])


def greater_than(
    model: HookedModel,
    part: str = "test",
    n: int = 60,
    *,
    digits: int | None = None,
    seed: int = 0,
) -> Task:
    """`n` prompts; parts share no noun, and the noun is the topic.

    `digits` is 2 for the published form, 1 for the form with the last digit, None for the first
    that the tokenizer can express. In the counterfactual the first year ends in 01 (or 0), so that
    nothing is ruled out but 00 and 01 (or 0). The metric is the probability of all numbers above
    minus that of all at or below: 0 for a model that knows nothing when as many lie on either
    side. `answers` is the next number above and `others` the next below the first year's.
    """
    name = "greater-than"
    plain_text(model, name)
    if digits not in (1, 2, None):
        raise ValueError(f"digits={digits!r}: give 2, 1, or None for what the tokenizer allows")
    ids: dict[int, int] = {}
    for size in (2, 1) if digits is None else (digits,):
        ids = _numbers(model, size)
        if ids:
            digits = size
            break
    if not ids:
        raise ValueError(
            f"the tokenizer of {model.name} has no "
            f"{'two-digit numbers' if digits == 2 else 'digits'} as single tokens behind a "
            f"century: the task {name!r} cannot be put to it"
            + (", try digits=1" if digits == 2 else "")
        )
    assert digits is not None
    low, high = (2, 98) if digits == 2 else (1, 8)
    dummy = 1 if digits == 2 else 0
    draw = generator(part, seed, name, digits)
    nouns = dealt(NOUNS, part)

    made: list[tuple[str, str, int]] = []

    def one() -> tuple[str, str, int] | None:
        noun = nouns[len(made) % len(nouns)]
        start, century = draw.randint(low, high), draw.choice(CENTURIES)
        stem = str(century) if digits == 2 else f"{century}{draw.randint(1, 9)}"
        fit = all(_splits(model, noun, stem, s, digits, ids) for s in (start, dummy))
        return (noun, stem, start) if fit else None

    for example in drawn(one, n, name):
        made.append(example)
    starts = [start for _, _, start in made]
    above = tuple(tuple(ids[k] for k in sorted(ids) if k > s) for s in starts)
    below = tuple(tuple(ids[k] for k in sorted(ids) if k <= s) for s in starts)
    prompts = tuple(_text(noun, stem, start, digits) for noun, stem, start in made)
    return Task(
        name=name,
        prompts=prompts,
        counterfactuals=tuple(_text(noun, stem, dummy, digits) for noun, stem, _ in made),
        changed=f"the first year ends in {'01' if digits == 2 else '0'}",
        answers=tuple(ids[start + 1] for start in starts),
        others=tuple(ids[start - 1] for start in starts),
        topics=tuple(f"{name}-{noun}" for noun, _, _ in made),
        metric=MassDifference(above, below),
        chat=False,
        places={
            "start": tuple(
                (len(model.template.render(f"{_stated(noun, stem)}{start:0{digits}d}").ids) - 1,)
                for noun, stem, start in made
            ),
            "last": tuple((len(model.template.render(text).ids) - 1,) for text in prompts),
        },
    )


def _text(noun: str, stem: str, start: int, digits: int) -> str:
    return f"{_stated(noun, stem)}{start:0{digits}d} to the year {stem}"


def _stated(noun: str, stem: str) -> str:
    return f"The {noun} lasted from the year {stem}"


def _numbers(model: HookedModel, digits: int) -> dict[int, int]:
    """Token of every number of so many digits behind a century; empty unless each is one token
    behind at least one century, the same behind every such century, and no two are alike."""
    found: dict[int, int] = {}
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    for century in CENTURIES:
        stem = f"the year {century}" + ("4" if digits == 1 else "")
        for k in range(10**digits):
            # some years are a token of their own (1776): those are not drawn
            ids = continuation(model, stem, f"{k:0{digits}d}")
            if ids is None or len(ids) != 1 or ids[0] == unknown:
                continue
            if found.setdefault(k, ids[0]) != ids[0]:
                return {}
    return found if len(set(found.values())) == 10**digits else {}


def _splits(
    model: HookedModel, noun: str, stem: str, start: int, digits: int, ids: dict[int, int]
) -> bool:
    """Whether the first year comes apart into its stem and one token for its end."""
    before, end = _stated(noun, stem), f"{start:0{digits}d}"
    return (
        known(model, _text(noun, stem, start, digits))
        and continuation(model, before, end) == [ids[start]]
        and continuation(model, before + end, _text(noun, stem, start, digits)[len(before + end) :])
        is not None
    )
