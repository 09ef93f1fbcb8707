"""What steering costs: how far the model moves where nothing should change. Higher is worse.

Each cost is a function of the model and of what is applied to it (None: nothing) and gives one
value a prompt, so that intervals can be bootstrapped; with its prompts put in it is a measure
(`steering.effects`): `partial(kl, reference=reference)`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes import datasets
from probes.model import HookedModel, Steers
from probes.prompts import Prompt
from steering.cells import refuse_edits
from steering.choices import multiple_choice
from steering.effects import (
    Row,
    answer_logits,
    applied,
    batches,
    refusals,
    text_rows,
    token_logprobs,
)
from steering.questions import Question

TOKENS = 32
"""Tokens of the unsteered answers over which the KL divergence is averaged."""

_KEPT = 2**30
_CHUNK = 64


@dataclass(frozen=True)
class Reference:
    """The unsteered model's greedy answers to benign prompts, and its logits along them."""

    fingerprint: str
    rows: tuple[Row, ...] = field(repr=False)
    """Each prompt with its answer; an answer that ended early keeps its stop token."""
    logits: tuple[Float[Tensor, "_answer vocab"], ...] | None = field(repr=False, compare=False)
    """As the model gave them, or None: then each use computes them anew."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        prompts: Sequence[Prompt],
        tokens: int = TOKENS,
        *,
        keep: bool | None = None,
    ) -> "Reference":
        """Answer the prompts; `keep=None` keeps the logits if they take less than 1 GiB.

        Refused while edits are in force, for the answers would be those of the steered model.
        """
        refuse_edits(model, "Reference.of")
        rendered = model.template.render_all(prompts)
        answers = model.generate_ids(prompts, tokens)
        rows = tuple(
            Row((*r.ids, *answer), len(r.ids)) for r, answer in zip(rendered, answers, strict=True)
        )
        if keep is None:
            vocab = model.layout.vocab_size
            keep = sum(row.n_answer for row in rows) * vocab * model.dtype.itemsize < _KEPT
        kept: dict[int, Tensor] = {}
        for numbers in batches(model, rows) if keep else ():
            for i, logits in zip(numbers, answer_logits(model, rows, numbers), strict=True):
                kept[i] = logits.cpu().clone()
        return cls(
            model.fingerprint, rows, tuple(kept[i] for i in range(len(rows))) if keep else None
        )

    @property
    def key(self) -> str:
        """sha256 over the tokens: equal keys have equal prompts and answers."""
        described = repr([(row.ids, row.n_prompt) for row in self.rows])
        return hashlib.sha256(described.encode()).hexdigest()[:32]


def kl(model: HookedModel, what: Steers | None, reference: Reference) -> Float[Tensor, " prompt"]:
    """KL(unsteered‖steered) in nats, the mean over each answer's tokens; at least 0.

    Both models read the unsteered answer (teacher forcing), so the same contexts are compared. In
    the same batches the unsteered logits come out bit for bit as they were, and KL is exactly 0.
    """
    if reference.fingerprint != model.fingerprint:
        raise ValueError(
            f"the reference belongs to another model than {model.name}: make it with "
            "Reference.of(model, prompts)"
        )
    found: dict[int, Tensor] = {}
    for numbers in batches(model, reference.rows):
        if reference.logits is not None:
            before = [reference.logits[i] for i in numbers]
        else:
            before = answer_logits(model, reference.rows, numbers)
        with applied(model, what):
            after = answer_logits(model, reference.rows, numbers)
        for i, p, q in zip(numbers, before, after, strict=True):
            pieces = zip(p.split(_CHUNK), q.split(_CHUNK), strict=True)
            found[i] = torch.cat([kl_divergence(a.to(b.device), b).cpu() for a, b in pieces]).mean()
    return torch.stack([found[i] for i in range(len(reference.rows))])


def kl_divergence(
    p_logits: Float[Tensor, "*batch vocab"], q_logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p‖q) in nats from logits, in float64; p is the unsteered model. At least 0."""
    p = p_logits.double().log_softmax(-1)
    q = q_logits.double().log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).clamp(min=0)


def answer_log_perplexity(
    model: HookedModel, what: Steers | None, prompts: Sequence[Prompt], *, tokens: int = 64
) -> Float[Tensor, " prompt"]:
    """How odd the unsteered model finds the steered answers: mean -log P of a token, in nats.

    The exponential of the mean over prompts is the perplexity. Read it beside `repetition`: an
    answer that goes round in circles has a *low* perplexity.
    """
    rendered = model.template.render_all(prompts)
    answers = model.generate_ids(prompts, tokens, steer=what)
    rows = [Row((*r.ids, *answer), len(r.ids)) for r, answer in zip(rendered, answers, strict=True)]
    return -torch.stack([found.mean() for found in token_logprobs(model, rows)])


def text_log_perplexity(
    model: HookedModel, what: Steers | None, texts: Sequence[str] | None = None
) -> Float[Tensor, " text"]:
    """How odd the steered model finds neutral text: mean -log P of a token, in nats.

    Texts are read without a template and default to the shipped paragraphs. All tokens but the
    first count as generated, so steering of generated tokens alone is seen.
    """
    rows = text_rows(model, datasets.paragraphs() if texts is None else texts)
    with applied(model, what):
        return -torch.stack([found.mean() for found in token_logprobs(model, rows)])


def benign_refusals(
    model: HookedModel,
    what: Steers | None,
    prompts: Sequence[Prompt] | None = None,
    *,
    tokens: int = 12,
) -> Float[Tensor, " prompt"]:
    """1 where a harmless request is refused; default: the shipped general validation prompts."""
    asked = datasets.general("validation") if prompts is None else prompts
    return refusals(model, what, asked, tokens=tokens)


def repetition(
    model: HookedModel, what: Steers | None, prompts: Sequence[Prompt], *, tokens: int = 64
) -> Float[Tensor, " prompt"]:
    """Share of each greedy answer's 4-grams of tokens that stood in it before, 0 to 1."""
    answers = model.generate_ids(prompts, tokens, steer=what)
    return torch.tensor([repeated(answer) for answer in answers], dtype=torch.float64)


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the sequence; 0 if it is shorter than one."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mistakes(
    model: HookedModel, what: Steers | None, items: Sequence[Mapping[str, Any]] | None = None
) -> Float[Tensor, " item"]:
    """1 where a question with `choices` and the index of the right one as `answer` is answered
    wrongly: 1 - accuracy, asked as `Question: ...` and `Answer:` without a template.

    Default: the 200 shipped questions, of which SmolLM2-135M-Instruct fails about a quarter.
    """
    questions = []
    for item in datasets.choices() if items is None else items:
        right = item["choices"][item["answer"]]
        wrong = (c for i, c in enumerate(item["choices"]) if i != item["answer"])
        questions.append(Question(item["question"], (right,), tuple(wrong), right))
    return 1 - multiple_choice(model, what, questions, asked="Question: {}\nAnswer:")
