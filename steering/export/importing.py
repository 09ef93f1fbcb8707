"""Read any known steering file as a `SteeringVector`, where its tool measured it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from probes.model import HookedModel
from probes.sites import Site
from steering.artefact import Origin
from steering.export.inspecting import FORMATS, inspect_file
from steering.vector import SteeringVector


def import_vector(
    path: Path | str,
    model: HookedModel | None = None,
    format: str | None = None,
    *,
    producer: str | None = None,
    location: Literal["layer_output", "layer_input"] | None = None,
    convention: Literal["block_output", "hidden_states"] | None = None,
    layers: Sequence[int] | None = None,
    feature: int | None = None,
) -> SteeringVector:
    """Read a file of another tool. `model` is the one it is for; our own files carry theirs.

    The format is recognised where the file gives it away (`inspect_file`); a file that could mean
    two things is refused until the missing word is given: `producer` of a GGUF, `location` of a
    `.svec`, `convention` and `layers` of a bare tensor, `feature` of an autoencoder.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    seen = inspect_file(path)
    kind = format or seen.format
    if kind == "alignlens":
        return SteeringVector.load(path)
    if kind == "export":
        raise ValueError(
            f"{path} is an export of this project: what it was made from is "
            f"{Path(path) / 'alignlens' / 'source.safetensors'}"
        )
    if kind == "unknown":
        raise ValueError(f"{path} is not recognised ({'; '.join(seen.said)}): say its format")
    if kind == "gguf" and model is None:
        from steering.export.control_vector import read_control_vector

        return read_control_vector(path, None, producer)
    if model is None:
        raise ValueError(f"{path} does not carry its model: say which model it is for")
    if kind == "saelens":
        from steering.sae import sae_vector

        if feature is None:
            raise ValueError(f"{path} is a sparse autoencoder: say which feature")
        return sae_vector(model, path, feature)
    return _read(Path(path), kind, Origin.of(model), producer, location, convention, layers)


def _read(
    path: Path,
    kind: str,
    origin: Origin,
    producer: str | None,
    location: Any,
    convention: Any,
    layers: Sequence[int] | None,
) -> SteeringVector:
    from steering.export import foreign

    if kind == "gguf":
        from steering.export.control_vector import read_control_vector

        return read_control_vector(path, origin, producer)
    if kind == "vllm-lens":
        from steering.export.vllm_lens import from_vllm_lens, read_entries

        entries = read_entries(path)
        if len(entries) > 1:
            raise ValueError(f"{path} holds {len(entries)} vectors: give one of them in a file")
        return from_vllm_lens(entries[0], origin)
    if kind == "easysteer":
        return _easysteer(path, origin)
    if kind == "svec":
        return foreign.from_svec(path, origin, location=location)
    if kind == "steering-vectors":
        return foreign.from_steering_vectors(path, origin)
    if kind == "persona-vectors":
        if layers is not None and len(layers) > 1:
            raise ValueError(
                "of a persona vector one row is named, or none for all: give one layer"
            )
        return foreign.from_persona_vectors(path, origin, None if layers is None else layers[0])
    if layers is None:
        raise ValueError(
            f"{path} holds a bare tensor: say the layers of its rows and the convention, or the "
            "format persona-vectors for a tensor with a row for each hidden state"
        )
    return foreign.from_block_tensor(path, origin, layers, convention=convention)


def _easysteer(path: Path, origin: Origin) -> SteeringVector:
    import json

    from steering.export.easysteer import check_request, read_wire
    from steering.export.loaders import easysteer_scope

    found = json.loads(path.read_text())
    layers = None
    if "vectors" in found:
        check_request(found)
        vectors = found["vectors"]
        if len(vectors) != 1 or not vectors[0].get("data"):
            raise ValueError(
                f"{path} is a request with {len(vectors)} vectors; one that is sent along can be "
                "read, and a GGUF that it names by itself"
            )
        first = vectors[0]
        other = easysteer_scope(found, "all")
        if first["algorithm"] != "direct" or first.get("normalize") or other:
            raise ValueError(
                f"{path} does more than add a vector at all tokens: "
                f"{other or 'algorithm ' + first['algorithm']}; a constant vector cannot say that"
            )
        found, scale, layers = first["data"], float(first.get("scale", 1.0)), first.get("layers")
    else:
        scale = 1.0
    rows = {k: v for k, v in read_wire(found).items() if layers is None or k in layers}
    return SteeringVector({Site(k, "resid_post"): scale * v for k, v in rows.items()}, origin)
