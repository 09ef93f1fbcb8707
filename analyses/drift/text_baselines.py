"""What the texts alone tell: the same indices from words and from lengths, without a model.

Safe and unsafe prompts that come from different sources differ in topic, length and style, and any
model that reads them parts them. What a model is said to know must exceed these.
"""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.prompts import Prompt

WORD = re.compile(r"\w+(?:'\w+)?")


def text_of(prompt: Prompt) -> str:
    """A request as it is; of a conversation, what its messages say."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def words(texts: Sequence[str], train: Int[Tensor, " train"]) -> Float[Tensor, "prompt word"]:
    """Counts of the words that the training texts hold, each row scaled to length 1 (a row
    without any of them is 0)."""
    split = [WORD.findall(text.lower()) for text in texts]
    known = {w: i for i, w in enumerate(sorted({w for t in train.tolist() for w in split[t]}))}
    if not known:
        raise ValueError("the training texts hold no words: leave texts out")
    counts = torch.zeros(len(texts), len(known))
    for row, its in enumerate(split):
        for word in its:
            if word in known:
                counts[row, known[word]] += 1
    return counts / counts.norm(dim=1, keepdim=True).clamp(min=1)


def lengths(texts: Sequence[str], train: Int[Tensor, " train"]) -> Float[Tensor, "prompt 2"]:
    """Words and characters of each text, in standard deviations of the training texts."""
    counts = torch.tensor(
        [[len(WORD.findall(text)), len(text)] for text in texts], dtype=torch.float64
    )
    spread = counts[train].std(0, correction=0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    return ((counts - counts[train].mean(0)) / spread).float()
