"""Answers of a serving program, and our own reading of the same tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from probes.engines import Batch, Edit
from probes.model import HookedModel

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Replay:
    """What a program wrote after one prompt, always taking its likeliest token, and its scores.

    Programs give logits of all tokens, log-probabilities of a few, or text alone (neither).
    """

    prompt: Ids
    tokens: Ids
    """The answer; `scores[i]` are of the distribution that token i was taken from."""
    logits: Float[Tensor, "token vocab"] | None = None
    top: tuple[Mapping[int, float], ...] | None = None
    """Log-probabilities (nats) of the likeliest tokens, by id."""

    @property
    def kind(self) -> str:
        """What is compared: logits, log-probabilities, or tokens."""
        return "logits" if self.logits is not None else "tokens" if self.top is None else "top"


@runtime_checkable
class Consumer(Protocol):
    """A program that serves a steered model. Token ids go in, so that no tokenizer differs."""

    name: str
    version: str

    def replay(self, prompts: Sequence[Ids], n_tokens: int, steered: bool) -> list[Replay] | None:
        """Greedy answers with or without the export; None where it cannot run without (a baked
        checkpoint)."""
        ...


@dataclass(frozen=True)
class Gap:
    """How far a program is from a reference along the same tokens."""

    largest: float
    """Largest difference over tokens of the answers: of logits; of the given log-probabilities
    (nats); or, from text alone, how far below the reference's likeliest token (nats) the program's
    token is."""
    kl: float | None
    """Mean KL(program || reference) in nats; over the given tokens and all others as one where
    only some are given, which can only be less; None for text."""


def reference(
    model: HookedModel, edits: Sequence[Edit], replays: Sequence[Replay]
) -> list[Float[Tensor, "token vocab"]]:
    """Our logits where each answer's tokens were taken, all before them given (teacher forcing).

    Tokens of the answer count as generated, so schedules act as they do in generation.
    """
    found = []
    with model.edit(edits):
        for replay in replays:
            n, ids = len(replay.tokens), torch.tensor([replay.prompt + replay.tokens[:-1]])
            batch = Batch(
                ids, torch.ones_like(ids), n_prompt=torch.tensor([len(replay.prompt)])
            ).to(model.device)
            with torch.no_grad():
                found.append(model.engine.logits(batch, n)[0].float().cpu())
    return found


def gap(replays: Sequence[Replay], logits: Sequence[Float[Tensor, "token vocab"]]) -> Gap:
    """Compare answers with reference logits along them. Vocabularies are cut to the common ids."""
    largest, divergence, n = 0.0, 0.0, 0
    for replay, ours in zip(replays, logits, strict=True):
        want = ours.double()
        if replay.logits is not None:
            common = min(want.shape[-1], replay.logits.shape[-1])
            got, want = replay.logits[:, :common].double(), want[:, :common]
            largest = max(largest, _finite((got - want).abs().max()))
            p, q = got.log_softmax(-1), want.log_softmax(-1)
            divergence += float((p.exp() * (p - q)).sum())
        elif replay.top is not None:
            for given, row in zip(replay.top, want.log_softmax(-1), strict=True):
                ids = torch.tensor(list(given))
                got = torch.tensor(list(given.values()), dtype=torch.float64)
                largest = max(largest, _finite((got - row[ids]).abs().max()))
                divergence += _lumped(got, row[ids])
        else:
            taken = want.gather(-1, torch.tensor(replay.tokens)[:, None])[:, 0]
            largest = max(largest, float((want.max(-1).values - taken).max()))
        n += len(replay.tokens)
    text = replays[0].kind == "tokens"
    return Gap(largest, None if text else max(divergence / n, 0.0))


def greedy(logits: Sequence[Float[Tensor, "token vocab"]], like: Sequence[Replay]) -> list[Replay]:
    """Reference logits in the place of a program's, for measuring one edit against another."""
    made = []
    for ours, replay in zip(logits, like, strict=True):
        if replay.kind == "logits":
            made.append(Replay(replay.prompt, replay.tokens, logits=ours))
        elif replay.top is not None:
            logprobs = ours.double().log_softmax(-1)
            top = tuple(
                {i: float(row[i]) for i in given}
                for given, row in zip(replay.top, logprobs, strict=True)
            )
            made.append(Replay(replay.prompt, replay.tokens, top=top))
        else:
            made.append(Replay(replay.prompt, tuple(ours.argmax(-1).tolist())))
    return made


def _lumped(got: Tensor, want: Tensor) -> float:
    """KL over the given tokens and one more, all the others together."""
    rest = [(1 - x.exp().sum()).clamp(min=1e-12).log() for x in (got, want)]
    p, q = torch.cat([got, rest[0][None]]), torch.cat([want, rest[1][None]])
    return float((p.exp() * (p - q)).sum())


def _finite(value: Tensor) -> float:
    return float(value.nan_to_num(torch.inf, torch.inf, torch.inf))
