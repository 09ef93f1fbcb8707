"""Requests for EasySteer: what goes into the field `steering` of a request to its server.

The same dict is taken by `llm.generate(steering=...)` and by `--steering-config`. Vectors are
named by a GGUF file on the server (`source`) or sent along (`data`). Read from EasySteer's fork of
vLLM, commit 6267ca0 of 2026-08-06 (`vllm/steer_vectors/api.py` and `payloads.py`); engines before
it took other words, which `check_request` refuses by name.

The server needs `--enable-steer-vector --steer-algorithms direct`. Blocks are counted from 0, and
a vector is added to the output of its block. No condition and no decay can be said there.
"""

import base64
import binascii
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes import files
from probes.results import check_finite

Scope = Literal["all", "prompt", "generated"]

PHASES = {
    "all": {"prompt": "all", "generation": "all"},
    "prompt": {"prompt": "all"},
    "generated": {"generation": "all"},
}
KINDS = {  # of the vectors that may be sent along, by algorithm
    "direct": "direction",
    "erase": "direction",
    "replace": "direction",
    "linear": "linear",
    "lm_steer": "lowrank",
    "loreft": "reft",
    "concept_replace": "concept_pair",
}
_INCLUDE = [
    f"{phase}_{by}"
    for phase in ("prompt", "generation")
    for by in ("tokens", "positions", "window")
]
_SELECT = {"prompt", "generation", *_INCLUDE, *(f"exclude_{name}" for name in _INCLUDE)}
_REMOVED = {
    "phases": "write prompt='all' and generation='all' in apply",
    "tokens": "write prompt_tokens or generation_tokens in apply",
    "positions": "write prompt_positions or generation_positions in apply",
    "window": "write prompt_window or generation_window in apply",
    "exclude_tokens": "write exclude_prompt_tokens or exclude_generation_tokens in apply",
    "exclude_positions": "write exclude_prompt_positions in apply",
    "debug": "set VLLM_STEER_TRACE_DIR on the server",
}


def write_easysteer(
    folder: Path | str,
    offsets: Mapping[int, Float[Tensor, " d_model"]],
    *,
    source: str | None = None,
    scale: float = 1.0,
    scope: Scope = "all",
    name: str | None = None,
) -> Path:
    """Write `steering.json`, the value of the request's field `steering`, into the folder.

    `source` is the path of a GGUF of the same offsets as the server sees it; without one the
    vectors are in the request itself.
    """
    made = request(offsets, source=source, scale=scale, scope=scope, name=name)
    path = Path(folder) / "steering.json"
    files.write_json(path, made)
    return path


def request(
    offsets: Mapping[int, Float[Tensor, " d_model"]],
    *,
    source: str | None = None,
    scale: float = 1.0,
    scope: Scope = "all",
    name: str | None = None,
) -> dict[str, Any]:
    """The request as a dict: `h + scale * offset` at the outputs of the blocks, at all tokens of
    the scope, `generated` being the tokens after the prompt."""
    if scope not in PHASES:
        raise ValueError(f"scope {scope!r}: expected 'all', 'prompt' or 'generated' tokens")
    if scale == 0:
        raise ValueError("scale 0 would change nothing: give another scale")
    vector: dict[str, Any] = {
        "algorithm": "direct",
        "scale": float(scale),
        "layers": sorted(offsets),
        "normalize": False,
        "apply": dict(PHASES[scope]),
    }
    sent = wire(offsets)
    vector |= {"data": sent} if source is None else {"source": source}
    if name is not None:
        vector["name"] = name
    made = {"vectors": [vector], "conflict": "priority"}
    check_request(made)
    return made


def wire(offsets: Mapping[int, Float[Tensor, " d_model"]]) -> dict[str, Any]:
    """The vectors as EasySteer sends them in JSON: base64 of float32, with its hash of them all."""
    if not offsets:
        raise ValueError("there is no vector to send")
    held = {}
    for layer, vector in offsets.items():
        if layer < 0 or vector.ndim != 1:
            raise ValueError(f"block {layer}, shape {list(vector.shape)}: expected vectors [width]")
        check_finite(vector, f"the vector at block {layer}")
        held[f"layer.{layer}"] = vector.detach().cpu().float().contiguous().numpy().astype("<f4")
    if len({len(row) for row in held.values()}) != 1:
        raise ValueError("the vectors have several widths, those of one model have one")
    tensors = {
        key: {"shape": list(row.shape), "data": base64.b64encode(row.tobytes()).decode()}
        for key, row in sorted(held.items())
    }
    return {
        "version": 1,
        "kind": "direction",
        "tensors": tensors,
        "extra": {},
        "sha256": _digest(held),
    }


def read_wire(sent: dict[str, Any]) -> dict[int, Float[Tensor, " d_model"]]:
    """The vectors of a `direction`, float32 by block; a wrong hash, size or number is refused."""
    if not isinstance(sent, dict) or set(sent) != {"version", "kind", "tensors", "extra", "sha256"}:
        raise ValueError("expected version, kind, tensors, extra and sha256, and nothing else")
    if sent["version"] != 1 or sent["kind"] != "direction" or sent["extra"] != {}:
        raise ValueError(
            f"version {sent['version']!r} and kind {sent['kind']!r}: only version 1 of 'direction', "
            "without extras, holds vectors to add"
        )
    if not isinstance(sent["tensors"], dict) or not sent["tensors"]:
        raise ValueError("tensors: expected vectors by layer, there are none")
    held = {key: _row(key, entry) for key, entry in sent["tensors"].items()}
    if len({len(row) for row in held.values()}) != 1:
        raise ValueError("the vectors have several widths")
    if _digest(held) != sent["sha256"]:
        raise ValueError("the vectors do not have the sha256 that is said: they were changed")
    rows = {int(key.removeprefix("layer.")): torch.from_numpy(row) for key, row in held.items()}
    for layer, row in rows.items():
        check_finite(row, f"the vector at block {layer}")
    return dict(sorted(rows.items()))


def _row(key: Any, entry: Any) -> np.ndarray:
    if not isinstance(key, str) or not re.fullmatch("layer[.](0|[1-9][0-9]{0,5})", key):
        raise ValueError(f"tensor {str(key)[:40]!r}: expected the name layer.<block>")
    if not isinstance(entry, dict) or set(entry) != {"shape", "data"}:
        raise ValueError(f"{key}: expected shape and data")
    shape, data = entry["shape"], entry["data"]
    try:
        raw = base64.b64decode(data, validate=True) if isinstance(data, str) else data
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{key}: its data are no base64 ({error})") from error
    if not isinstance(raw, bytes):
        raise ValueError(f"{key}: its data are a {type(raw).__name__}, expected base64 or bytes")
    if not raw or len(raw) % 4 or shape != [len(raw) // 4]:
        raise ValueError(f"{key}: {len(raw)} bytes are no float32 numbers of shape {shape}")
    return np.frombuffer(raw, "<f4").astype(np.float32)


def _digest(held: Mapping[str, np.ndarray]) -> str:
    """Their hash: kind and version, then name, shape and bytes of each tensor in order of names."""
    digest = hashlib.sha256(b"direction:1")
    for key, row in sorted(held.items()):
        digest.update(f"{key}({len(row)},)".encode())
        digest.update(row.astype("<f4").tobytes())
    return digest.hexdigest()


def check_request(made: Any) -> None:
    """Refuse, with a sentence, what the engine refuses in a request, before it is sent.

    Words that an older EasySteer knew are refused by name. Data are checked whole where they are of
    the kind `direction`, and must hold the layers named. Routing of experts (`moe_router`), which
    adds no vector, is not known here.
    """
    _keys(made, {"vectors", "conflict"}, {"vectors"}, "the request")
    if made.get("conflict", "priority") not in ("priority", "sequential", "error"):
        raise ValueError(f"conflict {made['conflict']!r}: expected priority, sequential or error")
    if not isinstance(made["vectors"], list) or not made["vectors"]:
        raise ValueError("vectors: expected a list with one vector at least")
    for i, vector in enumerate(made["vectors"]):
        _check_vector(vector, f"vector {i}")


def _check_vector(vector: Any, what: str) -> None:
    known = {
        "source",
        "data",
        "algorithm",
        "scale",
        "layers",
        "normalize",
        "apply",
        "params",
        "name",
    }
    _keys(vector, known, {"apply"}, what)
    source, data = vector.get("source"), vector.get("data")
    algorithm, layers = vector.get("algorithm", "direct"), vector.get("layers")
    if layers is not None and not _ints(layers, 0):
        raise ValueError(f"{what}: layers {layers!r}: expected a list of blocks, from 0")
    if (source is None) == (data is None):
        raise ValueError(f"{what}: give either source or data")
    if not isinstance(algorithm, str) or algorithm not in KINDS:
        raise ValueError(f"{what}: algorithm {algorithm!r} is none of {', '.join(KINDS)}")
    if source is not None:
        direction = KINDS[algorithm] == "direction"
        if not direction or not isinstance(source, str) or not source.lower().endswith(".gguf"):
            raise ValueError(
                f"{what}: source {source!r} for {algorithm}: expected a .gguf of 'direct'"
            )
        if "|" in source:
            raise ValueError(f"{what}: source {source!r} holds a '|', which the engine refuses")
    else:
        kind = data.get("kind") if isinstance(data, dict) else None
        if kind != KINDS[algorithm]:
            raise ValueError(
                f"{what}: {algorithm} takes data of kind {KINDS[algorithm]!r}, not {kind!r}"
            )
        if kind == "direction" and isinstance(data, dict):
            held = read_wire(data)
            if layers is not None and not set(layers) <= set(held):
                raise ValueError(f"{what}: layers {layers}, but data hold {sorted(held)} only")
    scale = vector.get("scale", 1.0)
    if type(scale) not in (int, float) or not math.isfinite(scale):
        raise ValueError(f"{what}: scale {scale!r} is no finite number")
    if type(vector.get("normalize", False)) is not bool or vector.get("params", {}) != {}:
        raise ValueError(f"{what}: normalize is true or false, and {algorithm} takes no params")
    if not isinstance(vector.get("name", ""), str | None):
        raise ValueError(f"{what}: its name is no text")
    _check_apply(vector["apply"], f"apply of {what}")


def _check_apply(apply: Any, what: str) -> None:
    _keys(apply, _SELECT, set(), what)
    said = {key: value for key, value in apply.items() if value is not None}
    covered = {phase: any(k.startswith(phase) for k in said) for phase in ("prompt", "generation")}
    if not any(covered.values()):
        raise ValueError(f"{what} selects no token: write prompt='all' or generation='all'")
    for key, value in said.items():
        phase = key.removeprefix("exclude_").partition("_")[0]
        if not covered[phase]:
            raise ValueError(f"{what}: {key} excludes tokens of the {phase}, and none is selected")
        if key == phase:
            fits = value == "all"
        elif key.endswith("window"):
            fits = _window(value, from_end=phase == "prompt")
        else:
            fits = _ints(value, None if key.endswith("prompt_positions") else 0)
        if not fits:
            raise ValueError(f"{what}: {key} is {value!r}, which the engine refuses")


def _keys(given: Any, known: set[str], needed: set[str], what: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{what}: expected an object, found a {type(given).__name__}")
    for key in given:
        if key in known:
            continue
        if key in _REMOVED:
            raise ValueError(f"{what}: {key!r} was removed from EasySteer: {_REMOVED[key]}")
        raise ValueError(f"{what}: unknown key {key!r}; known are {', '.join(sorted(known))}")
    if needed - set(given):
        raise ValueError(f"{what} lacks {', '.join(sorted(needed - set(given)))}")


def _ints(value: Any, least: int | None) -> bool:
    whole = isinstance(value, list) and bool(value) and all(type(n) is int for n in value)
    return whole and (least is None or min(value) >= least)


def _window(value: Any, *, from_end: bool) -> bool:
    """Whether `[start, stop)` can hold a token; bounds below 0 count from the end of the prompt."""
    if not isinstance(value, list | tuple) or len(value) != 2 or type(value[0]) is not int:
        return False
    start, stop = value
    if stop is None:
        return from_end or start >= 0
    if type(stop) is not int or (not from_end and start < 0):
        return False
    return stop > start if not from_end or (start < 0) == (stop < 0) else True
