"""Words that a tokenizer reads as one token inside a text, and the parts they are dealt to.

What a word costs depends on what stands before it, so words are looked up behind another word, as
they stand in the prompts, and never at the start of a text.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from probes.model import HookedModel

_E = TypeVar("_E")

PARTS = ("train", "validation", "test")


def generator(part: str, seed: int, *more: object) -> random.Random:
    """A generator of a part's own."""
    return random.Random(repr((part, seed, *more)))


def dealt(words: Sequence[str], part: str) -> list[str]:
    """Every third word, so that no two parts share one; whatever the tokenizer."""
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}: choose one of {', '.join(PARTS)}")
    return list(words[PARTS.index(part) :: len(PARTS)])


def plain_text(model: HookedModel, task: str) -> None:
    """Refuse a model that would put a chat template around the prompts of a plain-text task."""
    if model.tokenizer is None or model.template.chat:
        raise ValueError(
            f"the task {task!r} is plain text and {model.name} was loaded "
            f"{'without a tokenizer' if model.tokenizer is None else 'with a chat template'}: load "
            "it with template='none'"
        )


def ids_of(model: HookedModel, text: str) -> list[int]:
    """Token ids of a bare text, nothing added."""
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def continuation(model: HookedModel, before: str, text: str) -> list[int] | None:
    """Ids of `text` where it follows `before`; None where the two do not come apart there."""
    frame, whole = ids_of(model, before), ids_of(model, before + text)
    return whole[len(frame) :] if frame and whole[: len(frame)] == frame else None


def single_tokens(model: HookedModel, words: Sequence[str], before: str = "the") -> dict[str, int]:
    """The words that are one token behind a space, with its id; unknown ones and words that share
    an id with another are left out."""
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    found: dict[str, int] = {}
    for word in words:
        ids = continuation(model, before, f" {word}")
        if ids is not None and len(ids) == 1 and ids[0] != unknown:
            found[word] = ids[0]
    counts: dict[int, int] = {}
    for token in found.values():
        counts[token] = counts.get(token, 0) + 1
    return {word: token for word, token in found.items() if counts[token] == 1}


def enough(found: Sequence[str], need: int, what: str, task: str, model: HookedModel) -> list[str]:
    """The words, or an error that says how many this tokenizer has as single tokens."""
    if len(found) < need:
        raise ValueError(
            f"the tokenizer of {model.name} has {len(found)} of the {what} as single tokens and "
            f"the task {task!r} needs {need}: use a smaller form of the task, or another model"
        )
    return list(found)


def known(model: HookedModel, text: str) -> bool:
    """Whether the tokenizer has a token for everything in a text."""
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    return unknown is None or unknown not in ids_of(model, text)


def places_of(ids: Sequence[int], token: int) -> list[int]:
    """Where a token stands."""
    return [i for i, known in enumerate(ids) if known == token]


def drawn(draw: Callable[[], _E | None], n: int, task: str, tries: int = 200) -> Iterator[_E]:
    """`n` different examples; a draw that fails (None) or was drawn before is made again."""
    if n < 1:
        raise ValueError(f"{n} examples of the task {task!r} were asked: ask for 1 or more")
    seen: set[str] = set()
    for _ in range(n * tries):
        made = draw()
        if made is None or repr(made) in seen:
            continue
        seen.add(repr(made))
        yield made
        if len(seen) == n:
            return
    raise ValueError(
        f"the task {task!r} gave {len(seen)} different examples of the {n} asked with this "
        "tokenizer: ask for fewer"
    )
