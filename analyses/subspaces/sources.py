"""Where the weights of a checkpoint are read, one tensor at a time: memory, shards, or an adapter.

Names are those of the checkpoint's own files, or of the model's state dict.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analyses.subspaces.adapters import LowRank, read_lora
from probes import names
from probes.model import HookedModel
from probes.state import state_of
from steering.writers import check_plain

Which = HookedModel | nn.Module | str | Path
"""A checkpoint: a model in memory, a model name (see `probes.names`), or a folder of safetensors
shards. The folder of an adapter alone stands for the weights that it changes."""

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_TIE = "tie_word_embeddings"
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Names of output embeddings, which a file may hold beside the input embedding they are tied to."""


@dataclass(frozen=True)
class Source:
    """One checkpoint's weights, read when asked."""

    label: str
    base: str
    """What tells two full checkpoints apart before any adapter; empty where it is not known."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of every floating weight; of an adapter alone, of what it changes. Tied weights once."""
    read: Callable[[str], Tensor]
    """A tensor in its own dtype, without the adapter."""
    vocab_size: int | None = None
    adapter: Mapping[str, LowRank] = field(default_factory=dict)
    partial: bool = False
    """Whether this is an adapter alone."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Weight left out -> the weight it is the same as."""
    skipped: int = 0
    """Tensors that hold no floating-point numbers."""
    identify: Callable[[], str | None] = lambda: None
    embedding: str = ""
    """The input embedding that output embeddings are tied to; empty where they are not."""

    def fingerprint(self) -> str:
        """sha256 over config, tokenizer, weight files and adapter, or, in memory, over the state
        dict (`probes.names`); the files are read."""
        return self.identify() or ""


def open_source(which: Which) -> Source:
    """Open a checkpoint without reading its weights (those of an adapter are read)."""
    if isinstance(which, HookedModel):
        return _memory(which.model, which.label, lambda: which.fingerprint)
    if isinstance(which, nn.Module):
        memory = partial(names.fingerprint_memory, which, None)
        return _memory(which, type(which).__name__, memory)
    folder = Path(which).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        adapter, base = read_lora(folder)
        shapes = {name: update.shape for name, update in adapter.items()}
        alone = partial(_hashed, folder)
        return Source(
            folder.name, base, shapes, _none, adapter=adapter, partial=True, identify=alone
        )
    parsed = names.parse(str(which))
    if parsed.gguf:
        raise ValueError(
            f"{which} is a GGUF file, whose weights are not read tensor by tensor: load it with "
            "HookedModel.load and give the model"
        )
    held = _folder_of(parsed)
    source = _folder(held, parsed.label, f"{parsed.base}@{parsed.revision or ''}")
    if not parsed.adapter:
        return source
    folder = _snapshot(parsed.adapter, None)
    adapter, _ = read_lora(folder)
    for name, update in adapter.items():
        if name in source.tied or (
            source.embedding and name not in source.shapes and name.endswith(_HEADS)
        ):
            raise ValueError(
                f"the adapter of {which} changes {name}, which the model ties to "
                f"{source.embedding}, so that the change is not one of a single weight: merge it "
                "into an untied copy of the model (tie_word_embeddings false) and give the folder"
            )
        if source.shapes.get(name) != update.shape:
            raise ValueError(
                f"the adapter of {which} changes {name} as a {update.shape[0]} x "
                f"{update.shape[1]} matrix, and the model has "
                f"{source.shapes.get(name, 'no such weight')} there: give the adapter its own base"
            )
    return replace(
        source, label=parsed.label, adapter=adapter, identify=partial(_hashed, held, folder)
    )


def _hashed(folder: Path, adapter: Path | None = None) -> str | None:
    """Fingerprint of a folder, and of an adapter on it, wherever they were fetched from."""
    own = None if adapter is None else str(adapter)
    return names.fingerprint_files(names.Name(str(folder), None, own, None, folder.name))


def _memory(model: nn.Module, label: str, identify: Callable[[], str]) -> Source:
    check_plain(model)
    shapes, tied, owner = {}, {}, {}
    held = {
        name: weight.detach()
        for name, weight in state_of(model).items()
        if hasattr(weight, "dtype")
    }
    skipped = 0
    for name, weight in held.items():
        key = (weight.data_ptr(), tuple(weight.shape), weight.stride())
        if not weight.dtype.is_floating_point:
            skipped += 1
        elif weight.numel() and key in owner:
            tied[name] = owner[key]
        else:
            owner[key] = name
            shapes[name] = tuple(weight.shape)
    text = model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    vocab = getattr(text, "vocab_size", None)
    return Source(
        label, f"memory {id(model)}", shapes, held.__getitem__, vocab, tied=tied, skipped=skipped,
        identify=identify,
    )  # fmt: skip


def _folder(folder: Path, label: str, base: str) -> Source:
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    if config.get("quantization_config"):
        raise ValueError(
            f"the weights in {folder.name} are quantised, and differences of codes mean nothing: "
            "give the checkpoint in float32, bfloat16 or float16"
        )
    where = _shards(folder)
    shapes, skipped = {}, 0
    for shard in dict.fromkeys(where.values()):
        with safe_open(folder / shard, "pt") as file:
            for name in (name for name, own in where.items() if own == shard):
                part = file.get_slice(name)
                if part.get_dtype() in ("F64", "F32", "F16", "BF16"):
                    shapes[name] = tuple(part.get_shape())
                else:
                    skipped += 1
    embedding = _embedding(folder, config, shapes)
    tied = _ties(embedding, shapes)
    kept = {name: shape for name, shape in shapes.items() if name not in tied}

    def read(name: str) -> Tensor:
        with safe_open(folder / where[name], "pt") as file:
            return file.get_tensor(name)

    vocab = (config.get("text_config") or config).get("vocab_size")
    return Source(
        label, base, kept, read, vocab, tied=tied, skipped=skipped,
        identify=partial(_hashed, folder), embedding=embedding,
    )  # fmt: skip


def _embedding(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """The input embedding, where the configuration ties output embeddings to it; else empty."""
    told = [c[_TIE] for c in (config.get("text_config") or {}, config) if _TIE in c]
    if not told:  # not written where it is the architecture's default
        import transformers

        known = transformers.AutoConfig.from_pretrained(folder).get_text_config()
        told = [getattr(known, _TIE, False)]
    inputs = [name for name in shapes if name.endswith(_EMBEDDINGS)]
    return inputs[0] if told[0] and inputs else ""


def _ties(embedding: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Output embeddings that a file holds beside the input embedding they are tied to."""
    return {
        name: embedding
        for name in shapes
        if embedding and name.endswith(_HEADS) and shapes[name] == shapes[embedding]
    }


def open_folder(parsed: names.Name) -> tuple[Path, dict[str, str], Mapping[str, str]]:
    """Folder of a checkpoint, file of each of its tensors, and which are tied to which."""
    folder = _folder_of(parsed)
    return folder, _shards(folder), _folder(folder, parsed.label, "").tied


def _shards(folder: Path) -> dict[str, str]:
    """File of every tensor."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        found = dict(json.loads(index.read_text())["weight_map"])
        absent = sorted({file for file in found.values() if not (folder / file).is_file()})
        if absent:
            raise FileNotFoundError(
                f"{folder} lacks {len(absent)} of its shards, the first {absent[0]}: fetch the "
                "checkpoint again"
            )
        return found
    single = folder / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors and no index of shards: save the model with "
            "save_pretrained, or give it in memory"
        )
    try:
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except SafetensorError as error:
        raise ValueError(f"{single} is damaged: {error}") from error


def _folder_of(parsed: names.Name) -> Path:
    return Path(parsed.base) if parsed.local else _snapshot(parsed.base, parsed.revision)


def _snapshot(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=["*.safetensors", "*.json"]
        )
    except Exception as error:  # the library raises dozens of kinds
        raise FileNotFoundError(
            f"{name!r} is neither a local folder nor reachable on the Hub "
            f"({str(error).splitlines()[0]}): give a folder of safetensors"
        ) from error
    return Path(found)


def _none(name: str) -> Tensor:
    raise ValueError(f"an adapter alone does not hold {name}: give MODEL+ADAPTER")


def in_float(weight: Tensor) -> Tensor:
    """In float32, or float64 where it is that: no rounding is added to a difference."""
    return weight if weight.dtype == torch.float64 else weight.float()
