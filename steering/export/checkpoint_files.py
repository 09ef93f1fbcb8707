"""The files of a checkpoint: configurations, weights split as they came, tokenizer."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch

from probes.model import HookedModel
from steering.export.checkpoint_check import quiet
from steering.export.repackage import Form


def write(model: HookedModel, form: Form, folder: Path) -> None:
    """Configurations, weights and tokenizer, readable as other new files are."""
    with torch.device("meta"):
        shell = form.architecture(form.config)
    shell.load_state_dict(form.state, assign=True)  # the same memory, no copy
    own = getattr(model.model, "generation_config", None)
    if own is not None:
        shell.generation_config = copy.deepcopy(own)
    with quiet():
        shell.save_pretrained(folder, **_splitting(model, form))
    if model.tokenizer is not None:
        tokenizer = copy.deepcopy(model.tokenizer)
        if getattr(tokenizer, "is_fast", False):  # the last call leaves its padding there
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
        for note in ("is_local", "local_files_only"):  # of how it was loaded here
            tokenizer.init_kwargs.pop(note, None)
        tokenizer.save_pretrained(folder)
    _make_ordinary(folder)


def _make_ordinary(folder: Path) -> None:
    """Give the mode that new files have here: safetensors writes private ones."""
    new = folder / "new"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for file in folder.iterdir():
        file.chmod(mode)


def _splitting(model: HookedModel, form: Form) -> dict[str, int]:
    """The option that makes about as many weight files as the model came in, if that is known."""
    from huggingface_hub import split_torch_state_dict_into_shards as split

    n = _n_files(model.model.config)
    if n is None:
        return {}
    whole = sum(tensor.numel() * tensor.element_size() for tensor in form.state.values())
    once = split(form.state, max_shard_size=whole).metadata["total_size"]  # tied weights once
    limit = math.ceil(once / n)
    # files are filled one after the other, so n of equal size may not take everything
    while len(split(form.state, max_shard_size=limit).filename_to_tensors) > n:
        limit = math.ceil(limit * 1.02)
    return {"max_shard_size": limit}


def _n_files(config: Any) -> int | None:
    """Number of weight files of the folder or cached repository that a model was loaded from."""
    from huggingface_hub import try_to_load_from_cache

    name = getattr(config, "_name_or_path", "")
    if not name:  # made in memory
        return None
    local = Path(name).is_dir()
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        path: Any = Path(name) / index
        if not local:
            revision = getattr(config, "_commit_hash", None)
            try:
                path = try_to_load_from_cache(name, index, revision=revision)
            except ValueError:  # a folder that has gone, or a name of the caller's own
                return None
        if isinstance(path, str | Path) and Path(path).is_file():
            return len(set(json.loads(Path(path).read_text())["weight_map"].values()))
    return 1 if local else None
