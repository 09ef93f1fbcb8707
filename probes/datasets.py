"""Prompt sets: those that ship, and a user's own files. Everything shipped was written for this
project; `probes/data/README.md` says how."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from probes.contrast import Contrast
from probes.prompts import Prompt

HERE = Path(__file__).parent / "data"
KINDS = (".jsonl", ".json", ".csv", ".txt")
SPLITS = ("train", "validation", "test")


def _rows(name: str) -> list[dict[str, Any]]:
    lines = (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _check(split: str | None) -> None:
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")


def twins(split: str | None = None) -> list[dict[str, str]]:
    """Harmful requests with their harmless twins: topic, class, split, harmful, harmless.

    560 topics in eight hazard classes; a twin shares form and wording, not the hazard. Train (320)
    and validation (80) made the built-in lineage; test (160, 20 a class) was written apart and
    decided nothing.
    """
    _check(split)
    return [row for row in _rows("twins") if split in (None, row["split"])]


def general(split: str | None = None) -> list[str]:
    """Ordinary harmless requests of all kinds: 128 train, 32 validation, 80 test."""
    _check(split)
    return [row["prompt"] for row in _rows("general") if split in (None, row["split"])]


def safety(split: str | None = None) -> Contrast:
    """The twins as a contrast: harmful is positive, harmless negative, grouped by topic."""
    rows = twins(split)
    return Contrast.of_pairs(
        [row["harmful"] for row in rows],
        [row["harmless"] for row in rows],
        topics=[row["topic"] for row in rows],
        strata=[row["class"] for row in rows],
        name="safety twins" + (f" ({split})" if split else ""),
    )


def formality() -> Contrast:
    """100 pairs of one request said formally (positive) and informally: a contrast without any
    bearing on safety, to be used as a control."""
    rows = _rows("formality")
    return Contrast.of_pairs(
        [row["formal"] for row in rows],
        [row["informal"] for row in rows],
        topics=[row["topic"] for row in rows],
        name="formality",
    )


def paragraphs() -> list[str]:
    """100 neutral paragraphs of about 90 words, for perplexity and background statistics."""
    return [row["text"] for row in _rows("paragraphs")]


def choices() -> list[dict[str, Any]]:
    """200 easy four-choice questions (question, choices, answer as an index): a small measure of
    capability. SmolLM2-135M-Instruct's accuracy is in `probes/data/README.md`."""
    return _rows("choices")


def preferences() -> list[dict[str, Any]]:
    """40 prompts with a better and a worse answer and an authored share of raters for it."""
    return _rows("preferences")


def dialogues() -> list[list[dict[str, str]]]:
    """30 short conversations with a system message, ending with the user."""
    return [row["messages"] for row in _rows("dialogues")]


def read(source: str | Path, column: str | None = None) -> "list[Prompt] | Contrast":
    """Read prompts from a file, or from a Hugging Face dataset when its name is reachable.

    JSONL and CSV rows with `positive` and `negative` (or `harmful` and `harmless`) give a
    `Contrast`, with `topic` and `class` if present; rows with `label` (1 or 0) and a prompt give
    a labelled contrast; rows with `messages`, `prompt`, `text` or `column` give prompts. A text
    file gives one prompt a line.
    """
    path = Path(source)
    if path.is_file():
        rows = _file_rows(path)
    elif path.suffix in KINDS or path.is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(f"no such prompt file: {source}")
    else:
        rows = _hub_rows(str(source))
    if not rows:
        raise ValueError(f"{source} holds no prompts: the prompt set is empty")
    return _understand(rows, str(source), column)


def _file_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in (".jsonl", ".json"):
        try:
            if path.suffix == ".json":
                rows = json.loads(text)
            else:  # only at newlines: JSON strings may hold other line ends as they are
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict | str) for row in rows):
            raise ValueError(f"{path} holds no list of prompts: expected objects or strings")
        return [{"prompt": row} if isinstance(row, str) else row for row in rows]
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    return [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]


def _hub_rows(name: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset

        return [dict(row) for row in load_dataset(name, split="train")]
    except Exception as error:  # the library raises dozens of kinds
        raise FileNotFoundError(
            f"{name!r} is neither a file nor a reachable Hugging Face dataset "
            f"({type(error).__name__}); give a .jsonl, .csv or .txt file"
        ) from error


def _understand(
    rows: list[dict[str, Any]], name: str, column: str | None
) -> "list[Prompt] | Contrast":
    first = rows[0]

    def take(key: str) -> list[Any]:
        for number, row in enumerate(rows, 1):
            if row.get(key) is None:
                raise ValueError(f"row {number} of {name} has no {key}, and row 1 has one")
        return [row[key] for row in rows]

    for positive, negative in (("positive", "negative"), ("harmful", "harmless")):
        if positive in first and negative in first and column is None:
            return Contrast.of_pairs(
                take(positive),
                take(negative),
                topics=take("topic") if "topic" in first else None,
                strata=take("class") if "class" in first else None,
                name=Path(name).stem,
            )
    known = [column] if column else ["messages", "prompt", "text", "question", "instruction"]
    found = next((key for key in known if key in first), None)
    if found is None:
        raise ValueError(
            f"{name} has the columns {', '.join(first)}: expected {' or '.join(known)}, or the "
            "pairs positive/negative or harmful/harmless"
        )
    if "label" in first and column is None:
        return Contrast.labelled(
            take(found),
            [int(label) for label in take("label")],
            topics=take("topic") if "topic" in first else None,
            name=Path(name).stem,
        )
    return take(found)
