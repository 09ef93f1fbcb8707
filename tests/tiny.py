"""A tokenizer and models small enough for every test: built here, nothing downloaded."""

from functools import cache
from typing import Any

import torch
from architectures import BOS, EOS, PAD, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from probes import HookedModel

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
WORDS = (*("you are helpful user assistant think answer a . , : ? ! < > </".split()),)
N_WORDS = 140
"""The words w0, w1, ...; with the others they fit into the vocabulary of `architectures`."""

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|system|> you are helpful <|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] | trim }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% if enable_thinking is false %}"
    "<think> </think> {% endif %}{% endif %}"
)
"""A chat template like those of published models: a default system prompt, an option."""


def tokenizer(*, bos: bool = False, template: str | None = TEMPLATE) -> Any:
    """Words split at white space; with `bos`, one that puts <s> before every text."""
    known = (*SPECIALS, *WORDS, *(f"w{i}" for i in range(N_WORDS)))
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    if bos:
        core.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIALS[4:]),
    )
    assert (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (PAD, BOS, EOS)
    if template is not None:
        made.chat_template = ("{{ bos_token }}" if bos else "") + template
    return made


def words(n: int, seed: int, shortest: int = 2, longest: int = 9) -> list[str]:
    """Prompts of random words, all different, some of them beginning alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found: list[str] = []
    while len(found) < n:
        text = " ".join(f"w{draw(0, N_WORDS - 1)}" for _ in range(draw(shortest, longest)))
        if len(found) % 3 == 2:  # a twin of the one before
            text = found[-1].rsplit(" ", 1)[0] + " " + text.split(" ", 1)[0]
        if text not in found:
            found.append(text)
    return found


@cache
def hooked(name: str = "llama") -> HookedModel:
    """A tiny model with the tokenizer above; one object for all tests, not to be changed."""
    return HookedModel(build(name), tokenizer(), name=f"tiny {name}")
