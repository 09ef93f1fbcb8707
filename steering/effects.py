"""What steering does: refusals, odds and log-probabilities, one value a prompt.

A *measure* is any function of the model and of what is applied to it (None: nothing) that gives
one number a prompt, so that two runs can be compared prompt by prompt. The functions here become
measures when their prompts are put in: `partial(refusals, prompts=prompts)`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from probes import prompts as rendering
from probes.engines import Batch
from probes.model import HookedModel, Steers
from probes.prompts import NO_TEMPLATE, Prompt, Template
from steering.judges import Judge, by_phrase, refusal_log_odds

Measure = Callable[[HookedModel, Steers | None], Float[Tensor, " prompt"]]
"""One number a prompt, in the same order for whatever is applied."""

_ELEMENTS = 2**26
"""Logits held at once, as numbers."""


def applied(model: HookedModel, what: Steers | None) -> AbstractContextManager[None]:
    """While open, the model runs with what is applied; None leaves it as it is."""
    return model.edit(() if what is None else what.edits(model))


def under(function: Callable[[HookedModel], Float[Tensor, " prompt"]]) -> Measure:
    """A measure from a function of the model alone, which is called while it is steered."""

    def measure(model: HookedModel, what: Steers | None) -> Float[Tensor, " prompt"]:
        with applied(model, what):
            return function(model)

    return measure


def refusals(
    model: HookedModel,
    what: Steers | None,
    prompts: Sequence[Prompt],
    *,
    tokens: int = 12,
    judge: Judge = by_phrase,
) -> Float[Tensor, " prompt"]:
    """1 where the greedy answer refuses, 0 where not; their mean is the refusal rate.

    The default judge reads the opening of the answer, for which 12 tokens are enough; a judge
    that reads on needs more.
    """
    answers = model.generate(prompts, tokens, steer=what)
    return torch.as_tensor(judge(prompts, answers)).double()


def refusal_odds(
    model: HookedModel,
    what: Steers | None,
    prompts: Sequence[Prompt],
    *,
    openers: Sequence[str] = ("I",),
) -> Float[Tensor, " prompt"]:
    """Log-odds, in nats, that the answer's first token opens a refusal. No answer is generated."""
    with applied(model, what):
        return refusal_log_odds(model, prompts, openers).double()


def answer_logprobs(
    model: HookedModel, what: Steers | None, prompts: Sequence[Prompt], answers: Sequence[str]
) -> Float[Tensor, " prompt"]:
    """Log-probability of each given answer after its prompt, summed over its tokens, in nats."""
    rendered = model.template.render_all(prompts, answers)
    rows = [Row(r.ids, r.n_prompt) for r in rendered]
    with applied(model, what):
        return torch.stack([found.sum() for found in token_logprobs(model, rows)])


@dataclass(frozen=True)
class Row:
    """Token ids of which those from `n_prompt` on are looked at, each given all before it."""

    ids: tuple[int, ...]
    n_prompt: int

    @property
    def n_answer(self) -> int:
        return len(self.ids) - self.n_prompt

    def __post_init__(self) -> None:
        if not 0 < self.n_prompt < len(self.ids):
            raise ValueError(
                f"{len(self.ids)} tokens of which {self.n_prompt} are the prompt: both the prompt "
                "and what follows need one token at least"
            )


def text_rows(model: HookedModel, texts: Sequence[str]) -> list[Row]:
    """Texts as they are, without a template; all tokens but the first are looked at."""
    return [Row(r.ids, 1) for r in _plain(model).render_all(texts)]


def token_logprobs(model: HookedModel, rows: Sequence[Row]) -> list[Float[Tensor, " answer"]]:
    """Log-probability of each looked-at token of each row, in nats, float64; edits are seen."""
    found: dict[int, Tensor] = {}
    for numbers in batches(model, rows):
        for i, logits in zip(numbers, answer_logits(model, rows, numbers), strict=True):
            answer = torch.tensor(rows[i].ids[rows[i].n_prompt :], device=logits.device)
            steps = logits.float().log_softmax(-1)
            found[i] = steps.gather(1, answer[:, None])[:, 0].double().cpu()
    return [found[i] for i in range(len(rows))]


def batches(model: HookedModel, rows: Sequence[Row], size: int = 16) -> Iterator[list[int]]:
    """Numbers of the rows that go through the model together: of like length, and so few that
    their logits stay small. The same rows always make the same batches."""
    vocab = model.layout.vocab_size
    chunk: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), rows[i].n_answer, i)):
        longest = max(rows[j].n_answer for j in [*chunk, i])
        if chunk and (len(chunk) == size or (len(chunk) + 1) * longest * vocab > _ELEMENTS):
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def answer_logits(
    model: HookedModel, rows: Sequence[Row], numbers: Sequence[int]
) -> list[Float[Tensor, "answer vocab"]]:
    """Logits that predict the looked-at tokens of some rows, in one forward pass; edits are seen."""
    chosen = [rows[i] for i in numbers]
    # the last token predicts nothing that is looked at; on the right, because only the last
    # positions go through the head
    batch = rendering.pad(
        [row.ids[:-1] for row in chosen], rendering.pad_id_of(model.tokenizer), "left"
    )
    n_prompt = torch.tensor([row.n_prompt for row in chosen])
    batch: Batch = replace(batch, n_prompt=n_prompt).to(model.device)
    logits = model.engine.logits(batch, max(row.n_answer for row in chosen))
    return [own[-row.n_answer :] for own, row in zip(logits, chosen, strict=True)]


def _plain(model: HookedModel) -> Template:
    return Template(model.tokenizer, NO_TEMPLATE, max_length=model.context_length)
