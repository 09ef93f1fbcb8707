"""What tuning learns from: prompts with a better and, for DPO, a worse answer; and the two losses.

An answer is encoded behind its prompt, whose tokens it does not change, so the tokens that count
are those after `Rendered.n_prompt` and no template has to be searched for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.prompts import Prompt, Rendered, Template


@dataclass(frozen=True)
class Preference:
    """A prompt with the answer to prefer and, for preference losses, the one to prefer it to.

    Answers are taken as they are: with the blank before the first word where the prompt ends
    without one, and with the stop token's text where the model should learn to stop.
    """

    prompt: Prompt
    chosen: str
    rejected: str | None = None
    topic: str = ""
    """Examples of one topic may not stand in training and validation both (`apart`)."""


@dataclass(frozen=True)
class Answers:
    """Summed log-probabilities, in nats, of the answers of some examples."""

    chosen: Float[Tensor, " example"]
    n_chosen: Int[Tensor, " example"]
    """Tokens of each chosen answer."""
    rejected: Float[Tensor, " example"] | None = None
    reference_chosen: Float[Tensor, " example"] | None = None
    """The same under the unmodified model; constant."""
    reference_rejected: Float[Tensor, " example"] | None = None


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers of several batches as one batch."""

    def all_of(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    return Answers(*(all_of(field.name) for field in fields(Answers)))  # pyright: ignore


Loss = Callable[[Answers], Float[Tensor, ""]]
"""From the log-probabilities of a batch to a number to make small."""


@dataclass(frozen=True)
class SFT:
    """Cross-entropy of the chosen answers, mean over their tokens, in nats."""

    def __call__(self, answers: Answers) -> Float[Tensor, ""]:
        return -answers.chosen.sum() / answers.n_chosen.sum()


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7), mean over pairs.

    `-log sigmoid(beta ((c - c_ref) - (r - r_ref)))`, log 2 where the model is its own reference.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"DPO's beta is {self.beta}: give a number above 0")

    def __call__(self, answers: Answers) -> Float[Tensor, ""]:
        c, r = answers.reference_chosen, answers.reference_rejected
        if answers.rejected is None or c is None or r is None:
            raise ValueError("DPO needs a rejected answer in every example: give one, or use SFT")
        margin = (answers.chosen - c) - (answers.rejected - r)
        return -torch.nn.functional.logsigmoid(self.beta * margin).mean()


def apart(examples: Sequence[Preference], validation: Sequence[Preference]) -> None:
    """Refuse a topic, or an example, that is in training and validation both."""
    topics = {e.topic for e in examples} & {e.topic for e in validation} - {""}
    if topics:
        raise ValueError(
            f"the topic {min(topics)!r} is in training and validation: give each topic to one"
        )
    seen = {(str(e.prompt), e.chosen) for e in examples}
    if both := [e for e in validation if (str(e.prompt), e.chosen) in seen]:
        raise ValueError(
            f"the example {str(both[0].prompt)[:40]!r} is in training and validation: hold others "
            "back"
        )


def encode(
    template: Template, examples: Sequence[Preference]
) -> tuple[list[Rendered], list[Rendered] | None]:
    """Prompts with their chosen and, if all examples have one, their rejected answers.

    Refused are empty sets and answers, answers that are the same tokens, and sets in which only
    some examples have a rejected answer.
    """
    if not examples:
        raise ValueError("there are no examples to learn from: give at least one")
    with_two = [e.rejected is not None for e in examples]
    if any(with_two) and not all(with_two):
        raise ValueError(
            f"{sum(with_two)} of {len(examples)} examples have a rejected answer: give all of them "
            "one (DPO) or none (SFT)"
        )
    prompts = [e.prompt for e in examples]
    chosen = template.render_all(prompts, [e.chosen for e in examples])
    rejected = None
    if all(with_two):
        rejected = template.render_all(prompts, [str(e.rejected) for e in examples])
    for i, example in enumerate(examples):
        for name, rendered in (("chosen", chosen), ("rejected", rejected)):
            if rendered is not None and len(rendered[i].ids) == rendered[i].n_prompt:
                raise ValueError(f"the {name} answer of example {i} has no tokens: give it text")
        if rejected is not None and chosen[i].ids == rejected[i].ids:
            raise ValueError(
                f"the two answers of example {i} are the same ({example.chosen[:40]!r}): there is "
                "nothing to prefer"
            )
    return chosen, rejected
