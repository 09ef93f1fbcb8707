"""Where the real program is absent: what its loader would make of the file, against what was meant.

Nothing is run, so the best verdict is "format checked, not run".
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from probes.results import Record
from steering.applied import Steering
from steering.export import loaders
from steering.export.blocks import block_offsets
from steering.export.loaders import Table
from steering.export.verdict import ENDLESS, Verdict
from steering.export.vllm_lens import read_entries
from steering.export.ways import MEANT, NONE

TOLERANCE = 1e-6
"""Largest difference of an entry, relative to the largest entry that was meant."""

PROGRAMS = {
    "gguf": "llama.cpp's loader in numpy",
    "vllm-lens": "vllm-lens's loader in numpy",
    "easysteer": "EasySteer's loader in numpy",
    "vllm-hook": "vLLM-Hook's loader in numpy",
    "lm-eval": "lm-evaluation-harness's loader",
}


def table_of(path: Path | str, target: str, n_layers: int, d_model: int) -> Table:
    """What the target's loader makes of the exported file; `ValueError` where it would refuse."""
    path = Path(path)
    if target == "gguf":
        return loaders.as_llama_cpp(path, n_layers, d_model)
    if target == "vllm-lens":
        return loaders.as_vllm_lens(read_entries(path), n_layers, d_model)
    if target == "easysteer":
        return loaders.as_easysteer(path.read_text(), path.parent)
    if target == "vllm-hook":
        return loaders.as_vllm_hook(path)
    if target == "lm-eval":
        return loaders.as_lm_eval(path)
    raise ValueError(
        f"{target} has no loader that can be done again: choose one of {', '.join(PROGRAMS)}"
    )


def check_format(path: Path | str, target: str, steering: Steering) -> Verdict:
    """Compare what the loader makes of a file with what was meant; nothing is run."""
    origin = steering.what.origin
    found = table_of(path, target, origin.n_layers, origin.d_model)
    meant = {
        k: v.numpy()
        for k, v in block_offsets(
            steering.what, steering.strength, steering.unit, target=target
        ).items()
    }
    size = max(float(np.abs(v).max()) for v in meant.values())
    tables: dict[str, Table] = {
        MEANT: meant,
        NONE: {},
        "twice as strong": {k: 2 * v for k, v in meant.items()},
        "half as strong": {k: v / 2 for k, v in meant.items()},
        "the other sign": {k: -v for k, v in meant.items()},
        "one block late": {k + 1: v for k, v in meant.items()},
        "one block early": {k - 1: v for k, v in meant.items()},
    }
    gaps = {way: min(_difference(found, table) / size, ENDLESS) for way, table in tables.items()}
    best = min(gaps, key=lambda way: gaps[way])
    outcome = (
        "format checked" if gaps[MEANT] <= TOLERANCE
        else "not applied" if gaps[NONE] <= TOLERANCE
        else "different"
    )  # fmt: skip
    notes = [f"its vectors are those meant, {best}"] if best != MEANT else []
    if gaps[best] > TOLERANCE:
        notes = []
    if outcome == "format checked" and target == "easysteer":
        wrong = loaders.easysteer_scope(Path(path).read_text(), steering.schedule.scope)
        if wrong:
            outcome, notes = "different", [wrong]
    return Verdict(
        outcome=outcome,
        target=target,
        consumer=PROGRAMS[target],
        steering=str(steering),
        kind="vectors",
        gaps=gaps,
        divergences=dict.fromkeys(gaps),
        floor=None,
        floor_kl=None,
        effect=1.0,
        allowed=TOLERANCE,
        n_prompts=0,
        n_tokens=0,
        notes=tuple(notes),
        record=Record(models=(origin.model,), fingerprints=(origin.fingerprint,)),
    )


def _difference(a: Mapping[int, np.ndarray], b: Mapping[int, np.ndarray]) -> float:
    largest = 0.0
    for k in a.keys() | b.keys():
        width = len(a[k] if k in a else b[k])
        zero = np.zeros(width, np.float32)
        x, y = a.get(k, zero), b.get(k, zero)
        if len(x) != len(y):
            return float("inf")
        largest = max(largest, float(np.abs(x.astype(np.float64) - y).max()))
    return largest
