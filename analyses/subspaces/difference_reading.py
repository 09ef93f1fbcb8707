"""How a direction of the stream is read: the tokens it promotes, its size, whether it repeats."""

import copy
import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from probes.model import HookedModel
from probes.prompts import NO_TEMPLATE, Template, choose_template
from probes.scores import bca
from probes.unembed import unembedding

REFUSAL_WORDS = (
    *("sorry", "apologize", "apologise", "apologies", "unfortunately", "regret"),
    *("cannot", "can't", "won't", "unable", "refuse", "decline"),
    *("harmful", "illegal", "unsafe", "dangerous"),
)
"""Words of refusals; a token counts when, without blanks and marks around, it is one of them."""


class Reader:
    """The tokens a direction promotes and suppresses, and how many are in a list of words."""

    def __init__(self, model: HookedModel, words: Sequence[str], top: int) -> None:
        self.unembed, self.top = unembedding(model), top
        size = model.layout.vocab_size
        known = model.tokenizer.convert_ids_to_tokens(list(range(min(size, len(model.tokenizer)))))
        self.texts = [model.tokenizer.convert_tokens_to_string([t]) if t else "" for t in known]
        self.texts += [""] * (size - len(self.texts))
        wanted = {word.lower() for word in words}
        self.hits = torch.tensor([_word(text) in wanted for text in self.texts])

    def __call__(
        self, states: Float[Tensor, "row d_model"]
    ) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]], Float[Tensor, " row"]]:
        logits = self.unembed(states.float()).cpu()
        strong, weak = (
            logits.topk(self.top, dim=-1, largest=side).indices for side in (True, False)
        )
        # a row without a direction promotes nothing
        hit = self.hits[strong].float().mean(1) * states.any(1)
        return self._names(strong), self._names(weak), hit

    def _names(self, ids: Tensor) -> list[tuple[str, ...]]:
        return [tuple(repr(self.texts[int(i)])[1:-1] for i in row) for row in ids]


def _word(text: str) -> str:
    return re.sub(r"^\W+|\W+$", "", text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")).lower()


def without_template(model: HookedModel, tokens: HookedModel | None = None) -> HookedModel:
    """The same model without a chat template: a text is what it reads."""
    found = copy.copy(model)
    found.tokenizer = (tokens or model).tokenizer
    found.template = choose_template(  # pyright: ignore[reportAttributeAccessIssue]
        found.tokenizer, model.name, NO_TEMPLATE, None, model.context_length
    )
    return found


def beginnings(template: Template, texts: Sequence[str], positions: int) -> list[str]:
    """The first words of each text, enough that its first tokens are the same: later tokens change
    nothing before them, and need not be read."""
    found = []
    for text in texts:
        start = " ".join(text.split(" ")[: 3 * positions + 3])
        same = template.render(start).ids[:positions] == template.render(text).ids[:positions]
        found.append(start if same else text)
    return found


def relative_norm(
    x: Float[Tensor, "text d_model"], h: Float[Tensor, "text d_model"], boot: Tensor
) -> Float[Tensor, " 3"]:
    """Norm of the mean difference over the mean norm, with 95 % BCa limits over texts."""
    gram, norms = x @ x.T, h.norm(dim=1)

    def of(w: Tensor) -> Tensor:
        return ((w @ gram) * w).sum(-1).clamp_min(0).sqrt() / (w @ norms)

    n = len(x)
    ones = torch.ones(n, dtype=torch.float64)
    return torch.stack(list(bca(of(ones), of(boot), of(1 - torch.eye(n, dtype=torch.float64)))))


def half_cosine(gram: Tensor, half: Tensor, signs: Tensor) -> Float[Tensor, " draw"]:
    """Cosine of the mean differences of two halves, for every half and choice of signs."""
    a, b = half.double()[:, None] * signs, (~half).double()[:, None] * signs
    products = [((p @ gram) * q).sum(-1) for p, q in ((a, b), (a, a), (b, b))]
    return (products[0] / (products[1] * products[2]).clamp_min(1e-300).sqrt()).flatten()
