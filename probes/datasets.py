"""Prompt sets that ship."""

import json
from pathlib import Path

HERE = Path(__file__).parent / "data"


def _rows(name, split):
    rows = [json.loads(l) for l in (HERE / name).read_text().splitlines()]
    return [r for r in rows if r["split"] == split]


def twins(split):
    return _rows("twins.jsonl", split)


def general(split):
    return [r["prompt"] for r in _rows("general.jsonl", split)]
