"""Tasks of random words for tiny models, and a tokenizer that knows the words of real ones."""

from functools import cache
from typing import Any

import tiny
import tiny_lineage
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, Whitespace
from transformers import PreTrainedTokenizerFast

from analyses.mechanisms.boxes import LABELS, OBJECTS
from analyses.mechanisms.greater_than import NOUNS
from analyses.mechanisms.indirect_objects import NAMES, PLACES, TEMPLATES, THINGS
from analyses.mechanisms.task import Task
from analyses.patching.metrics import LogitDifference
from probes import HookedModel

OTHERS = (
    "The the is in Box contains lasted from year to . , Then When Yesterday While After In and "
    "gave went met at decided give a spent day evening handed were working passed had lunch near "
    "sent"
)


def task(n: int = 24, seed: int = 5, answer: int | None = None, other: int | None = None) -> Task:
    """Random words, or the same answers for all; the counterfactual has another first word."""
    texts = tiny.words(n, seed, shortest=4, longest=7)
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int) -> tuple[int, ...]:
        return tuple(torch.randint(low, high, (n,), generator=generator).tolist())

    answers = drawn(20, 90) if answer is None else (answer,) * n
    others = drawn(90, 140) if other is None else (other,) * n
    prompts = tuple(f"w7 {t}" for t in texts)
    lengths = [len(tiny.hooked().template.render(p).ids) for p in prompts]
    return Task(
        name="words",
        prompts=prompts,
        counterfactuals=tuple(f"w8 {t}" for t in texts),
        changed="the first word",
        answers=answers,
        others=others,
        topics=tuple(f"topic-{i}" for i in range(n)),
        metric=LogitDifference(answers, others),
        chat=True,
        places={"before": tuple((length - 2,) for length in lengths)},
    )


def tokenizer(digits: int = 2, without: str = "") -> Any:
    """Words split at white space, numbers into pieces of so many digits."""
    words = {*OTHERS.split(), *OBJECTS, *LABELS, *NOUNS, *NAMES, *PLACES, *THINGS}
    words |= {piece for t in TEMPLATES for piece in t.split() if "{" not in piece}
    words |= {f"{k:0{digits}d}" for k in range(10**digits)}
    words -= set(without.split())
    known = ["<unk>", "<pad>", *sorted(words)]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    cut = Split(Regex(r"\d" if digits == 1 else r"\d\d"), "isolated")
    core.pre_tokenizer = Sequence([Whitespace(), cut])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


@cache
def plain(digits: int = 2, without: str = "") -> HookedModel:
    """A tiny model that reads plain text with the tokenizer above; not to be changed."""
    made = tokenizer(digits, without)
    model = tiny_lineage.weights(vocab=len(made))
    return HookedModel(model, made, template="none", name="tiny plain")
