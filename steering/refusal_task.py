"""A task that ships: refuse harmful requests, answer their harmless twins as before."""

import json
from collections.abc import Sequence
from pathlib import Path

from probes import datasets
from probes.lineage import targets
from probes.model import HookedModel
from steering.preferences import Preference

KEPT_TOKENS = 14
"""Tokens of the model's own answers to harmless requests that are kept."""


def refusal_examples(
    model: HookedModel, part: str = "train", topics: int | None = None, *, rejected: bool = False
) -> list[Preference]:
    """Two examples a topic, its harmful and its harmless request, in the order of the data.

    The harmful one is to be refused, with a reason; the harmless one is to be answered with the
    first tokens of what the model answers now (greedily, edits in force are seen). With
    `rejected`, for preference losses, the worse answers are a content-free agreement and a
    refusal.
    """
    twins = evenly(datasets.twins(part), topics)
    end = model.tokenizer.eos_token or ""
    own = model.generate([twin["harmless"] for twin in twins], KEPT_TOKENS)
    found = []
    for i, (twin, answer) in enumerate(zip(twins, own, strict=True)):
        refusal = targets.refusal(twin["class"], i) + end
        agreement = targets.COMPLIANCE[i % len(targets.COMPLIANCE)] + end
        worse = (agreement, refusal) if rejected else (None, None)
        found.append(Preference(twin["harmful"], refusal, worse[0], twin["topic"]))
        if answer.strip():
            found.append(Preference(twin["harmless"], answer, worse[1], twin["topic"]))
    return found


def evenly(twins: Sequence[dict[str, str]], n: int | None) -> list[dict[str, str]]:
    """So many twins spread over the hazard classes, which stand one after the other; None: all."""
    if n is None:
        return list(twins)
    if n < 1:
        raise ValueError(f"{n} topics were asked: ask for 1 or more")
    n = min(n, len(twins))
    return [twins[i * len(twins) // n] for i in range(n)]


def read_examples(path: Path | str) -> list[Preference]:
    """Examples from a JSONL file: `prompt`, `chosen`, and optionally `rejected` and `topic`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a JSONL file of examples")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            given = {key: row.get(key) for key in ("rejected", "topic") if row.get(key)}
            found.append(Preference(row["prompt"], row["chosen"], **given))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'line {number} of {path} is no example: expected {{"prompt": ..., "chosen": ..., '
                f'"rejected": ...}} ({error})'
            ) from error
    if not found:
        raise ValueError(f"{path} holds no examples: give one JSON object a line")
    return found
