"""What is in a steering file: whose it is, which convention it follows, and what it does not say."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.export.control_vector import PRODUCERS, layer_of, producer_of
from steering.export.gguf_file import read_gguf

FORMATS = (
    "alignlens",
    "gguf",
    "vllm-lens",
    "easysteer",
    "svec",
    "steering-vectors",
    "persona-vectors",
    "block-tensor",
    "saelens",
    "export",
)


@dataclass(frozen=True)
class Inspection:
    """A steering file in words."""

    format: str
    """One of `FORMATS`, or "unknown"."""
    said: tuple[str, ...]
    """What the file says, and what its convention means for this project's sites."""
    unknown: tuple[str, ...] = ()
    """What it does not say and an import must be told."""

    def __str__(self) -> str:
        lines = [f"format: {self.format}", *self.said]
        return "\n".join([*lines, *(f"not said: {text}" for text in self.unknown)])


def inspect_file(path: Path | str) -> Inspection:
    """Look at a file or folder without trusting it. Raises `ValueError` for a damaged one."""
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a steering file")
    with path.open("rb") as opened:
        head = opened.read(16)
    if head[:4] == b"GGUF":
        return _gguf(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in (".json", ".svec") or head.lstrip()[:1] in (b"{", b"["):
        return _json(path)
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or path.suffix in (
        ".pt", ".pth", ".pkl", ".pickle", ".bin",
    ):  # fmt: skip
        return _pickle(path)
    return Inspection("unknown", (f"{path.name} begins with {head[:8]!r}",), ("what it is",))


def _gguf(path: Path) -> Inspection:
    found = read_gguf(path)
    layers = {layer_of(name) for name in found.tensors}
    if None in layers or not layers:
        names = ", ".join(list(found.tensors)[:3]) or "none"
        return Inspection("unknown", (f"a GGUF file with tensors {names}",), ("what it is",))
    ks = sorted(k for k in layers if k is not None)
    tool = producer_of(found)
    widths = sorted({values.size for values in found.tensors.values()})
    said = [
        f"written by: {tool or 'unknown'}",
        f"directions: {len(ks)}, {_range(ks)}, width {', '.join(map(str, widths))}",
        f"model: {found.metadata.get('controlvector.model_hint', 'not said')}",
    ]
    if tool is not None and PRODUCERS[tool]:
        said.append(
            f"measured at the outputs of blocks {_range([k - 1 for k in ks])}; llama.cpp adds each one "
            "block later"
        )
    elif tool is not None:
        said.append(f"for the outputs of blocks {_range(ks)}, counted from 0")
    if 0 in ks:
        said.append("llama.cpp refuses this file: it has a direction for layer 0")
    said += [
        f"{key.removeprefix('alignlens.')}: {found.metadata[key]}"
        for key in ("alignlens.strength", "alignlens.unit")
        if key in found.metadata
    ]
    unknown = ["the operation (llama.cpp adds)"]
    if tool is None:
        unknown.insert(0, "the tool, and with it whether direction.k is of block k or k-1")
    if tool != "alignlens":
        unknown.append("the model's sizes: give the model it is for")
    return Inspection("gguf", tuple(said), tuple(unknown))


def _safetensors(path: Path) -> Inspection:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            names = sorted(opened.keys())
            shapes = {name: list(opened.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error
    if "kind" in metadata and "format_version" in metadata:
        from steering.export.exports import load_artefact

        what = load_artefact(path)
        text = getattr(what, "describe", what.__str__)()
        return Inspection("alignlens", (f"{metadata['kind']}:", *text.splitlines()))
    said = tuple(f"{name}: shape {shapes[name]}" for name in names[:8])
    return Inspection("block-tensor", said, _BARE)


def _json(path: Path) -> Inspection:
    if path.stat().st_size > 2**30:
        raise ValueError(f"{path} is larger than any steering file")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    first = found[0] if isinstance(found, list) and found else found
    if not isinstance(first, Mapping):
        return Inspection("unknown", (f"JSON of a {type(first).__name__}",), ("what it is",))
    if "vllm_xargs" in first or "activations" in first:
        from steering.export.vllm_lens import read_entries

        entries = read_entries(path)
        said = [
            f"vector: blocks {e.get('layer_indices')} (outputs), shape {_shape(e)}, scale "
            f"{e.get('scale', 1.0)}{', scaled to each norm' if e.get('norm_match') else ''}"
            for e in entries
        ]
        return Inspection("vllm-lens", tuple(said), ("the model: give the one it is for",))
    if first.get("kind") and isinstance(first.get("tensors"), Mapping):
        said = (f"kind {first['kind']}, {', '.join(list(first['tensors'])[:8])}",)
        return Inspection("easysteer", said, ("the model: give the one it is for",))
    if isinstance(first.get("vectors"), list):
        said = (f"a request with {len(first['vectors'])} vectors, for outputs of blocks",)
        return Inspection("easysteer", said, ("the model: give the one it is for",))
    if isinstance(first.get("directions"), Mapping) and "model_type" in first:
        layers = ", ".join(list(first["directions"])[:12])
        return Inspection(
            "svec",
            (f"model {first['model_type']}, layers {layers}",),
            ("whether a layer's input or output is meant: say --location",),
        )
    return Inspection("unknown", (f"JSON with keys {', '.join(list(first)[:8])}",), ("what it is",))


def _shape(entry: Mapping[str, Any]) -> Any:
    wire = entry.get("activations")
    return wire.get("shape") if isinstance(wire, Mapping) else None


_BARE = (
    "which layers the rows belong to, and whether they are outputs of blocks or hidden states "
    "(counted from the embedding): say --format and --layers",
)


def _pickle(path: Path) -> Inspection:
    import torch

    from steering.export.pickles import StandIn, load_restricted

    found = load_restricted(path)
    if isinstance(found, torch.Tensor):
        return Inspection("block-tensor", (f"a tensor of shape {list(found.shape)}",), _BARE)
    state = found.state if isinstance(found, StandIn) else found
    if isinstance(state, dict) and isinstance(state.get("layer_activations"), dict):
        layers = ", ".join(map(str, state["layer_activations"]))
        return Inspection(
            "steering-vectors",
            (f"{state.get('layer_type')} vectors, layers {layers}",),
            ("the model: give the one it is for",),
        )
    if isinstance(found, StandIn):
        return Inspection("unknown", (f"a pickled {found.name}",), ("what it is",))
    if isinstance(found, Mapping):
        return Inspection(
            "unknown", (f"a dict with keys {', '.join(map(str, list(found)[:8]))}",), _BARE
        )
    return Inspection("unknown", (f"a {type(found).__name__}",), ("what it is",))


def _folder(path: Path) -> Inspection:
    if (path / "alignlens" / "export.json").is_file():
        from steering.export.exports import read_export

        done = read_export(path)
        return Inspection(
            "export",
            (
                f"for {done.target}: {done.file}, tokens {done.scope}",
                f"{done.steering}, from {done.model}",
            ),
        )
    if (path / "cfg.json").is_file():
        said = ("a sparse autoencoder: its rows are read with --feature",)
        return Inspection("saelens", said, ("which feature",))
    if (path / "config.json").is_file():
        from steering.export.checkpoint_check import check_loading

        return Inspection("unknown", ("a model folder", str(check_loading(path))))
    raise ValueError(f"{path} holds no export, no autoencoder and no model: give a file of it")


def _range(ks: list[int]) -> str:
    whole = ks == list(range(ks[0], ks[-1] + 1)) and len(ks) > 2
    return f"{ks[0]} to {ks[-1]}" if whole else ", ".join(map(str, ks))
