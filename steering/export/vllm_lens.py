"""Steering vectors as vllm-lens takes them, for `vllm` offline and over HTTP.

`layer_indices` are 0-based blocks and what is added is added to their output, at prompt and
generated tokens alike. Positions are never written: where the server does not know those of
generated tokens (on a CPU), each of them counts as the first of the prompt. The wire form of a
tensor is base64 of its bytes, compressed with zstd.

Serve with `--no-enable-prefix-caching`: the keys of a steered prompt are stored under the prompt's
tokens, and a later request without steering reads them. A vector of another width than the model's
is skipped there with a warning in the log and status 200, so the width is checked here, and
`steering.export.client` looks at whether anything moved.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.results import check_finite
from probes.sites import Site
from probes.wire import decode as unpacked
from steering.artefact import Origin
from steering.export.blocks import block_offsets
from steering.offsets import HeadOffsets
from steering.vector import SteeringVector

TARGET = "vllm-lens"

_KEYS = {"activations", "layer_indices", "scale", "norm_match", "position_indices"}


def to_vllm_lens(
    what: SteeringVector | HeadOffsets,
    strength: float = 1.0,
    unit: str = "raw",
    *,
    norm_match: bool = False,
) -> dict[str, Any]:
    """One entry of `apply_steering_vectors`, as plain JSON values; strength is multiplied in.

    With `norm_match` the server scales at every token to the norm of the activation there: it adds
    `strength * |h| * v / |v|`, which is another operation, so it is done only when asked for. The
    strength then goes into `scale`, and needs unit 'fraction', whose meaning is nearest to it.
    """
    if norm_match:
        if unit != "fraction":
            raise ValueError(
                f"with norm_match the strength is a fraction of the norm at each token, given was "
                f"unit {unit!r}: use unit='fraction'"
            )
        offsets, scale = block_offsets(what, 1.0, "unit", target=TARGET), float(strength)
    else:
        offsets, scale = block_offsets(what, strength, unit, target=TARGET), 1.0
    rows = torch.stack(list(offsets.values()))
    return {
        "activations": encode(rows),
        "layer_indices": list(offsets),
        "scale": scale,
        "norm_match": norm_match,
        "position_indices": None,
    }


def request_fields(*entries: Mapping[str, Any]) -> dict[str, Any]:
    """What is added to the body of a request: `{"vllm_xargs": {...}}`. The list goes as a string,
    because arguments of that field are scalars."""
    return {"vllm_xargs": {"apply_steering_vectors": json.dumps(list(entries))}}


def read_entries(path: Path | str) -> list[dict[str, Any]]:
    """Entries of a file: one, a list of them, or a request that holds them."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the JSON of a vllm-lens vector")
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "vllm_xargs" in found:
            found = json.loads(found["vllm_xargs"]["apply_steering_vectors"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no vllm-lens vector: {error}") from error
    entries = found if isinstance(found, list) else [found]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} holds no vllm-lens vector: expected an object, or a list of them")
    return entries


def from_vllm_lens(entry: Mapping[str, Any] | str, origin: Origin) -> SteeringVector:
    """Read one entry back as a vector to be added at `resid_post`, its scale multiplied in.

    Raises `ValueError` for what is no such entry, and for what a constant vector cannot say:
    positions and norm matching.
    """
    try:
        found = json.loads(entry) if isinstance(entry, str) else entry
    except ValueError as error:
        raise ValueError(f"this is no vllm-lens vector: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"a vllm-lens vector is an object, this is a {type(found).__name__}")
    if unknown := set(found) - _KEYS:
        raise ValueError(f"unknown keys in the vllm-lens vector: {', '.join(sorted(unknown))}")
    if missing := {"activations", "layer_indices"} - set(found):
        raise ValueError(f"the vllm-lens vector lacks {', '.join(sorted(missing))}")
    if found.get("norm_match") or found.get("position_indices") is not None:
        raise ValueError(
            "this vllm-lens vector is scaled to each token's norm, or is for certain positions "
            "only: a constant vector says neither"
        )
    rows, layers = decode(found["activations"]), found["layer_indices"]
    whole = isinstance(layers, list) and all(type(k) is int for k in layers)
    if not whole or rows.ndim != 2 or len(rows) != len(layers) or len(set(layers)) != len(layers):
        raise ValueError(
            f"the vllm-lens vector has activations of shape {list(rows.shape)} for layers {layers}: "
            "expected one row for each of different layers"
        )
    scale = float(found.get("scale", 1.0))
    vectors = {Site(k, "resid_post"): scale * row for k, row in zip(layers, rows, strict=True)}
    return SteeringVector(vectors, origin)


def encode(tensor: Float[Tensor, "..."]) -> dict[str, Any]:
    """The wire form of a tensor, float32 and compressed."""
    import zstandard

    check_finite(tensor, "a tensor for vllm-lens")
    values = tensor.detach().cpu().float().contiguous().numpy()
    packed = zstandard.ZstdCompressor(level=1).compress(values.astype("<f4").tobytes())
    return {
        "data": base64.b64encode(packed).decode(),
        "dtype": "float32",
        "original_dtype": "torch.float32",
        "shape": list(values.shape),
        "compression": "zstd",
    }


def decode(wire: Any) -> Float[Tensor, "..."]:
    """A tensor of the wire form (`probes.wire`), float32. Raises `ValueError` for anything else."""
    return unpacked(wire).float()
