"""A client of an OpenAI-compatible vLLM server with vllm-lens: one steered request, and a check
that the server really steers.

vllm-lens answers with status 200 when it skips a vector (one of another width, for example), so the
status says nothing: `check` asks the same prompt with and without and compares.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probes.servers import post, served_model
from steering.export.replays import Ids, Replay
from steering.export.vllm_lens import request_fields

MOVED = 1e-3
"""Nats by which a log-probability must move for a server to be called steered."""


def complete(
    address: str,
    prompt: str | Ids,
    *,
    model: str | None = None,
    entries: Sequence[Mapping[str, Any]] = (),
    max_tokens: int = 64,
    logprobs: int | None = None,
) -> dict[str, Any]:
    """One greedy completion, steered by vllm-lens `entries`; the server's answer as it comes.

    `address` is that of the server, without `/v1`; `prompt` is text, or token ids where a
    tokenizer must not come between. `model` may be left out where the server has one.
    """
    body: dict[str, Any] = {
        "model": model or served_model(address),
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        **(request_fields(*entries) if entries else {}),
    }
    if logprobs is not None:
        body |= {"logprobs": logprobs, "return_tokens_as_token_ids": True, "ignore_eos": True}
    return post(f"{address.rstrip('/')}/v1/completions", body)


def chat(
    address: str,
    messages: Sequence[Mapping[str, str]],
    *,
    model: str | None = None,
    entries: Sequence[Mapping[str, Any]] = (),
    max_tokens: int = 256,
) -> str:
    """The text of one greedy answer in a conversation, through the server's chat template."""
    body: dict[str, Any] = {
        "model": model or served_model(address),
        "messages": [dict(message) for message in messages],
        "max_tokens": max_tokens,
        "temperature": 0,
        **(request_fields(*entries) if entries else {}),
    }
    found = post(f"{address.rstrip('/')}/v1/chat/completions", body)
    return str(found["choices"][0]["message"]["content"])


@dataclass(frozen=True)
class Moved:
    """How far a server's log-probabilities move under a vector."""

    largest: float
    """Largest change among the likeliest tokens after the prompt, in nats."""
    again: float
    """The same between two requests without the vector: the server's own noise."""

    @property
    def steered(self) -> bool:
        return self.largest > max(MOVED, 3 * self.again)

    def __str__(self) -> str:
        if self.steered:
            return f"steered: log-probabilities move by up to {self.largest:.3g} nats"
        return (
            f"NOT STEERED: log-probabilities move by {self.largest:.2g} nats, and by "
            f"{self.again:.2g} without the vector; the server ignores it: look in its log for a "
            "skipped vector (width, layers), and whether it runs vllm-lens"
        )


def check(
    address: str,
    prompt: str | Ids,
    entries: Sequence[Mapping[str, Any]],
    *,
    model: str | None = None,
) -> Moved:
    """Ask one prompt without, with, and again without the vector; the third shows the noise.

    A prefix cache that hands steered keys to others is not seen here, because the first request
    fills it with keys of its own: serve without one (`alignlens serve-args`).
    """
    name = model or served_model(address)
    plain, steered, again = (
        _first(complete(address, prompt, model=name, entries=e, max_tokens=1, logprobs=5))
        for e in ((), entries, ())
    )
    return Moved(_change(plain, steered), _change(plain, again))


class VllmServer:
    """A running server as a consumer of an export."""

    name = "vLLM server with vllm-lens"

    def __init__(
        self, address: str, entries: Sequence[Mapping[str, Any]], model: str | None = None
    ) -> None:
        self.address, self.entries = address, list(entries)
        self.model = model or served_model(address)
        self.version = str(post(f"{address.rstrip('/')}/version").get("version", ""))

    def replay(self, prompts: Sequence[Ids], n_tokens: int, steered: bool) -> list[Replay]:
        """Greedy answers with the five likeliest tokens' log-probabilities."""
        made = []
        for prompt in prompts:
            got = complete(
                self.address, prompt, model=self.model, entries=self.entries if steered else (),
                max_tokens=n_tokens, logprobs=5,
            )["choices"][0]["logprobs"]  # fmt: skip
            tokens = tuple(_id(token) for token in got["tokens"])
            top = tuple({_id(t): p for t, p in row.items()} for row in got["top_logprobs"])
            made.append(Replay(prompt, tokens, top=top))
        return made


def _first(answer: Mapping[str, Any]) -> dict[int, float]:
    row = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {_id(token): logprob for token, logprob in row.items()}


def _id(token: str) -> int:
    """Of `token_id:123`, the form asked for."""
    return int(token.rpartition(":")[2])


def _change(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Largest change over tokens that both give; without any in common, infinite."""
    return max((abs(a[i] - b[i]) for i in a.keys() & b.keys()), default=math.inf)
