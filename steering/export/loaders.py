"""What serving programs make of a file, done again in numpy.

They stand in where the real program is absent: a verdict then says that the format was checked and
nothing run. They follow the loaders' own rules, with their refusals, and share no code with the
writers.
"""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from steering.export.gguf_file import read_gguf

Table = dict[int, Float32[np.ndarray, " d_model"]]
"""What is added to the output of each 0-based block."""


def as_llama_cpp(path: Path | str, n_layers: int, d_model: int, scale: float = 1.0) -> Table:
    """What llama.cpp adds when it is started with this control vector.

    Raises `ValueError` where it refuses the file: it then logs an error, and the server of 2026
    serves on without the vector. Tensors of blocks that the model does not have are ignored by it,
    and here.
    """
    buffer = np.zeros((0,), np.float32)
    width = -1
    for name, values in read_gguf(path).tensors.items():
        head, _, rest = name.partition(".")
        number = re.match(r"\s*[+-]?\d+", rest) if head == "direction" else None
        k = int(number.group()) if number else -1
        if k < 0:
            raise ValueError(f"llama.cpp refuses {path}: {name!r} names no layer")
        if k == 0:
            raise ValueError(f"llama.cpp refuses {path}: it has a direction for layer 0")
        if values.dtype != np.float32:
            raise ValueError(f"llama.cpp refuses {path}: {name} is {values.dtype}, not float32")
        if sum(n > 1 for n in values.shape) > 1:
            raise ValueError(f"llama.cpp refuses {path}: {name} has shape {list(values.shape)}")
        if width not in (-1, values.size):
            raise ValueError(f"llama.cpp refuses {path}: directions of {width} and {values.size}")
        width = values.size
        if width * k > 2**28:
            raise ValueError(f"llama.cpp would ask for {width * k} numbers for {name} of {path}")
        buffer = np.pad(buffer, (0, max(0, width * k - len(buffer))))
        buffer[width * (k - 1) : width * k] += values.ravel() * np.float32(scale)
    if width == -1:
        raise ValueError(f"llama.cpp finds no direction in {path}")
    if width != d_model:
        raise ValueError(f"llama.cpp refuses {path}: its width is {width}, the model's {d_model}")
    rows = buffer.reshape(-1, width)
    return {
        k: rows[k - 1].copy() for k in range(1, min(len(rows) + 1, n_layers)) if rows[k - 1].any()
    }


def as_vllm_lens(payload: str | list[Any], n_layers: int, d_model: int) -> Table:
    """What vllm-lens adds for `apply_steering_vectors`, without norm matching and positions.

    A vector of another width is ignored by it without an error: then nothing is in the table.
    """
    vectors = json.loads(payload) if isinstance(payload, str) else payload
    table: Table = {}
    for vector in vectors:
        if vector.get("norm_match") or vector.get("position_indices") is not None:
            raise ValueError("vllm-lens scales this vector to each token, or adds it at some only")
        rows = _tensor(vector["activations"])
        if len(rows) != len(vector["layer_indices"]):
            raise ValueError(f"vllm-lens refuses {len(rows)} rows for {vector['layer_indices']}")
        for k, row in zip(vector["layer_indices"], rows, strict=True):
            if not 0 <= k < n_layers:
                raise ValueError(f"vllm-lens refuses layer {k}: out of range [0, {n_layers})")
            if row.shape[-1] == d_model:
                before = table.get(k, np.zeros(d_model, np.float32))
                table[k] = before + np.float32(vector.get("scale", 1.0)) * row
    return table


def as_easysteer(request: str | Mapping[str, Any], folder: Path | str) -> Table:
    """What EasySteer adds for a request of direct vectors, whatever tokens it names."""
    said: Any = json.loads(request) if isinstance(request, str) else request
    table: Table = {}
    for vector in said["vectors"]:
        if vector["algorithm"] != "direct" or vector.get("normalize"):
            raise ValueError(
                f"EasySteer does more than add for algorithm {vector['algorithm']!r}, normalize "
                f"{bool(vector.get('normalize'))}"
            )
        found: dict[int, np.ndarray]
        if vector.get("source"):
            tensors = read_gguf(Path(folder) / vector["source"]).tensors
            found = {int(name.split(".")[1]): values for name, values in tensors.items()}
        else:
            found = {
                int(name.split(".")[1]): np.frombuffer(base64.b64decode(t["data"]), "<f4")
                for name, t in vector["data"]["tensors"].items()
            }
        for k, row in found.items():
            if vector.get("layers") is None or k in vector["layers"]:
                before = table.get(k, np.zeros(row.size, np.float32))
                table[k] = before + np.float32(vector.get("scale", 1.0)) * row.astype(np.float32)
    return table


def easysteer_scope(request: str | Mapping[str, Any], scope: str) -> str:
    """What is wrong with the tokens that a request names, empty if they are those of `scope`."""
    said: Any = json.loads(request) if isinstance(request, str) else request
    wanted = {
        "all": {"prompt": "all", "generation": "all"},
        "prompt": {"prompt": "all"},
        "generated": {"generation": "all"},
    }[scope]
    for vector in said["vectors"]:
        if vector.get("apply") != wanted:
            return f"it acts at the tokens {vector.get('apply')}, meant were {wanted}"
    return ""


def as_vllm_hook(path: Path | str) -> Table:
    """What vLLM-Hook adds with the method `add_vector`."""
    said = json.loads(Path(path).read_text())["steering"]
    if said["method"] != "add_vector":
        raise ValueError(f"vLLM-Hook's method {said['method']!r} is no constant vector")
    tensors = Path(said["vector_path"])  # on the server, as it stands there
    if not tensors.is_file():
        raise ValueError(
            f"vLLM-Hook would look for {tensors}, which is not there: export again in place, or "
            "change vector_path"
        )
    found = torch.load(tensors, weights_only=True)
    row = found["dir"].float().numpy().ravel()
    return {int(said["optimal_layer"]): np.float32(said["coefficient"]) * row}


def as_lm_eval(path: Path | str) -> Table:
    """What the `steered` model of lm-evaluation-harness adds; the last vector at all hookpoints."""
    table: Table = {}
    config = torch.load(path, weights_only=True)
    for hookpoint, said in config.items():
        if said["action"] != "add":
            raise ValueError(f"the action {said['action']!r} at {hookpoint} adds no vector")
        row = said["steering_vector"].float().numpy().ravel()
        table[int(hookpoint.rsplit(".", 1)[1])] = np.float32(said["steering_coefficient"]) * row
    last = list(table.values())[-1]  # lambdas made in a loop see its last values
    return dict.fromkeys(table, last)


def _tensor(wire: Mapping[str, Any]) -> np.ndarray:
    raw = base64.b64decode(wire["data"], validate=True)
    if wire.get("compression") == "zstd":
        import zstandard

        most = int(np.prod(wire["shape"])) * 8
        raw = zstandard.ZstdDecompressor().decompress(raw, max_output_size=most)
    if wire.get("original_dtype") == "torch.bfloat16":  # carried as the bits of int16
        bits = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(wire["shape"])
    return np.frombuffer(raw, wire["dtype"]).astype(np.float32).reshape(wire["shape"])
