"""A token shift as pages to read: one offline file for each prompt, and an index.

Every answer stands token by token, marked by kind; a token opens what both models held probable at
its place. A page runs its own script and nothing else, loads nothing, and shows every prompt and
token as text.
"""

import base64
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analyses.tokens.shares import KINDS
from analyses.tokens.shift_result import TokenShift
from probes import files
from probes.results import Record

TEMPLATE = Path(__file__).parent / "answer.html"
TOP = 10
"""Entries of the lists a token opens, at most."""

MARKS = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣"}
"""What stands for blanks where a token is named; in the answer they are what they are."""


def write_pages(
    shift: TokenShift, folder: Path | str, record: Record | None = None, *, limit: int | None = None
) -> Path:
    """Write `index.html` and a page for each prompt into `folder`; returns the index.

    `limit` keeps the first so many prompts of every group. Without a record that of the shift is
    shown. Pages of an earlier, longer run that lie there are removed.
    """
    folder = Path(folder)
    shift = _with_short_lists(shift)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: ask for a page or more of each group, or give None")
    if not len(shift.ids):
        raise ValueError("the token shift has no tokens: let the model write at least one")
    chosen = [
        i
        for i, group in enumerate(shift.groups)
        if shift.counts[i] and (limit is None or shift.groups[:i].count(group) < limit)
    ]
    names = {i: f"answer-{n:04d}.html" for n, i in enumerate(chosen, 1)}
    template = _template()
    shared: dict[str, Any] = {
        "shift": shift,
        "kinds": KINDS,
        "hashes": _hashes(TEMPLATE.read_text(encoding="utf-8")),
        "record": json.dumps(
            dataclasses.asdict(record or shift.record), indent=1, sort_keys=True, default=str
        ),
    }
    rows = []
    for place, i in enumerate(chosen):
        answer = _answer(shift, i)
        page = template.render(
            **shared,
            title=f"Answer {place + 1} of {len(chosen)}: {shift.aligned} read by {shift.reader}",
            answer=answer,
            data=_data(shift, answer),
            previous=names[chosen[place - 1]] if place else None,
            next=names[chosen[place + 1]] if place + 1 < len(chosen) else None,
        )
        files.write_text(folder / names[i], page)
        rows.append({**answer, "file": names[i], "n": len(answer["tokens"])})
    title = f"Token shift: {shift.aligned} read by {shift.reader}"
    index = folder / "index.html"
    files.write_text(index, template.render(**shared, title=title, answer=None, rows=rows))
    for left in folder.glob("answer-*.html"):
        if left.name not in names.values() and re.fullmatch(r"answer-\d{4,}\.html", left.name):
            left.unlink()
    return index


def _with_short_lists(shift: TokenShift) -> TokenShift:
    names = ("top_base", "top_base_p", "top_aligned", "top_aligned_p")
    return dataclasses.replace(shift, **{name: getattr(shift, name)[:, :TOP] for name in names})


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _hashes(source: str) -> dict[str, str]:
    """What the content security policy lets through: the sha256 of the page's script and style,
    which stand in the template as they stand in the page."""
    found = {}
    for name in ("script", "style"):
        (text,) = re.findall(rf"<{name}>(.*?)</{name}>", source, re.DOTALL)
        found[name] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return found


def _answer(shift: TokenShift, i: int) -> dict[str, Any]:
    """One prompt with the tokens of its answer."""
    start = sum(shift.counts[:i])
    kinds = shift.kinds[start : start + shift.counts[i]]
    tokens = []
    for n, text in enumerate(shift.tokens[i]):
        at = start + n
        kind, rank = KINDS[int(kinds[n])], int(shift.ranks[at])
        blank = "".join(MARKS.get(c, "") for c in text) if not text.strip(" \t\r\n") else ""
        tokens.append(
            {
                "at": at,
                "text": text,
                # a blank cannot be seen or hit: line ends are shown, and what adds no text too
                "mark": ("▫" if not text else blank.replace("␣", "")),
                "kind": kind,
                "other": int(shift.top_base[at, 0]) != int(shift.ids[at]),
                "label": f"token {n + 1}, {_shown(text)}, {kind}, rank {rank}",
            }
        )
    mean = float(shift.kl[start : start + len(tokens)].double().mean())
    return {
        "prompt": shift.prompts[i],
        "group": shift.groups[i],
        "tokens": tokens,
        "counts": torch.bincount(kinds, minlength=len(KINDS)).tolist(),
        "kl": _number(mean),
    }


def _data(shift: TokenShift, answer: dict[str, Any]) -> dict[str, Any]:
    """What the page's script shows of each token: texts and numbers already written out."""
    k = shift.top_base.shape[1]
    names = [
        f"rank in {shift.base}",
        f"rank in {shift.aligned}",
        f"log p, {shift.base}",
        f"log p, {shift.aligned}",
        f"KL({shift.aligned}‖{shift.base})",
        f"KL({shift.base}‖{shift.aligned})",
        "Jensen-Shannon",
        f"Jaccard@{k}",
    ]
    tokens = []
    for token in answer["tokens"]:
        at = token["at"]
        own = int(shift.ids[at])
        values = ("logp_base", "logp_aligned", "kl", "reverse_kl", "js")
        numbers = [f"{_number(float(getattr(shift, name)[at]))} nats" for name in values]
        tokens.append(
            {
                "shown": _shown(token["text"]),
                "kind": token["kind"],
                "numbers": [
                    str(int(shift.ranks[at])),
                    str(int(shift.aligned_ranks[at])),
                    *numbers,
                    f"{jaccard(shift.top_base[at], shift.top_aligned[at]):.2f}",
                ],
                "base": _listed(shift, shift.top_base[at], shift.top_base_p[at], own),
                "aligned": _listed(shift, shift.top_aligned[at], shift.top_aligned_p[at], own),
            }
        )
    captions = {"base": shift.reader, "aligned": shift.aligned}
    return {"names": names, "tokens": tokens, **captions}


def jaccard(one: Tensor, two: Tensor) -> float:
    """Shared ids of two lists over all their ids, 0 to 1."""
    a, b = set(one.tolist()), set(two.tolist())
    return len(a & b) / len(a | b)


def _listed(shift: TokenShift, ids: Tensor, p: Tensor, own: int) -> Sequence[Sequence[Any]]:
    return [
        (_shown(shift.strings[str(i)]), _percent(chance), i == own)
        for i, chance in zip(ids.tolist(), p.tolist(), strict=True)
    ]


def _shown(text: str) -> str:
    """A token by itself, its blanks visible where it begins, ends or is nothing else."""
    if not text:
        return "(no text of its own)"
    inner = text.strip(" ")
    lead = len(text) - len(text.lstrip(" ")) if inner else len(text)
    trail = len(text) - len(text.rstrip(" ")) if inner else 0
    made = "".join(MARKS.get(c, c) if c != " " else c for c in inner)
    return "␣" * lead + made + "␣" * trail


def _percent(p: float) -> str:
    if not math.isfinite(p):
        return "n/a"
    return "<0.01" if 0 < p < 5e-5 else f"{100 * p:.2f}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
