"""Model names, the same everywhere: what a name means and how it becomes a loaded model.

org/name            a repository on the Hub, with @revision if given
path/to/folder      a local checkpoint
path/to/file.gguf   a llama.cpp file, dequantised on loading
MODEL+ADAPTER       a PEFT adapter (folder or Hub id) merged into MODEL
builtin:base | aligned | drifted | mixed | aligned-s1 | drifted-3 | ...
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes import files

ADAPTERS = Path(__file__).parent / "lineage" / "adapters"


@dataclass(frozen=True)
class Name:
    """A model name taken apart."""

    base: str
    """Hub id or path of the full model."""
    revision: str | None
    adapter: str | None
    gguf: str | None
    """File name when the base is a GGUF file; `base` is then its folder."""
    label: str
    """What figures call it."""

    @property
    def local(self) -> bool:
        return Path(self.base).is_dir()


def builtin_names() -> tuple[str, ...]:
    """Every `builtin:` name that ships, `base` first."""
    found = sorted(folder.name for folder in ADAPTERS.iterdir() if folder.is_dir())
    return tuple(f"builtin:{name}" for name in ("base", *found))


def parse(text: str) -> Name:
    """Take a model name apart and check what can be checked without loading anything."""
    text = text.strip()
    if not text:
        raise ValueError(
            "the model name is empty: give a Hub id, a folder, a .gguf file or builtin:base"
        )
    if text.startswith("builtin:"):
        return _builtin(text)
    whole, plus, adapter = text.partition("+")
    if plus and (Path(text).exists() or not adapter):
        whole, adapter = text, ""  # a path that really holds a plus sign
    path = Path(whole).expanduser()
    label = path.name or whole
    if adapter:
        label += "+" + Path(adapter).name
        _check_adapter(adapter)
    if whole.startswith("builtin:"):
        inner = _builtin(whole)
        if inner.adapter:
            raise ValueError(f"{text!r}: put an adapter on builtin:base, not on another adapter")
        return Name(inner.base, None, adapter or None, None, label)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no such GGUF file: {whole}")
        return Name(str(path.parent), None, adapter or None, path.name, label)
    if path.is_dir():
        if not (path / "config.json").is_file():
            kind = (
                "a PEFT adapter; write MODEL+" + whole
                if (path / "adapter_config.json").is_file()
                else "no model: it holds no config.json"
            )
            raise ValueError(f"the folder {whole} is {kind}")
        return Name(str(path), None, adapter or None, None, label)
    name, _, revision = whole.partition("@")
    if path.is_absolute() or whole.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"no such model folder: {whole}")
    return Name(name, revision or None, adapter or None, None, label)


def _builtin(text: str) -> Name:
    from probes.lineage.base import base_folder

    name, _, adapter = text.removeprefix("builtin:").partition("+")
    if name != "base" and text not in builtin_names():
        raise ValueError(f"unknown model {text!r}: the lineage has {', '.join(builtin_names())}")
    if adapter:
        _check_adapter(adapter)
    own = str(ADAPTERS / name) if name != "base" else None
    if own and adapter:
        raise ValueError(f"{text!r}: put an adapter on builtin:base, not on another adapter")
    label = name + ("+" + Path(adapter).name if adapter else "")
    return Name(str(base_folder()), None, own or adapter or None, None, label)


def _check_adapter(adapter: str) -> None:
    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"the folder {adapter} is no PEFT adapter: it holds no adapter_config.json"
        )
    if not folder.is_dir() and (folder.is_absolute() or adapter.startswith((".", "~"))):
        raise FileNotFoundError(f"no such adapter folder: {adapter}")


def load(name: Name, **options: Any) -> tuple[Any, Any]:
    """The transformers model (in evaluation mode) and its tokenizer.

    `options` go to `from_pretrained` (dtype, device_map, attn_implementation, ...).
    """
    import transformers

    quiet = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    source: dict[str, Any] = {"revision": name.revision} if name.revision else {}
    if name.gguf:
        source["gguf_file"] = name.gguf
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name.base, **source)
        model = transformers.AutoModelForCausalLM.from_pretrained(name.base, **source, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"cannot load {name.base!r}: it is neither a local folder nor reachable on the Hub "
            f"({str(error).splitlines()[0]}). Give a folder, a .gguf file or builtin:base"
        ) from error
    finally:
        if quiet:
            transformers.utils.logging.enable_progress_bar()
    if name.gguf:  # the loader leaves marks that would stop the model from being saved
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    if name.adapter:
        model = merge(model, name.adapter)
    return model.eval(), tokenizer


def merge(model: Any, adapter: str) -> Any:
    """The model with a PEFT adapter folded into its weights, in the weights' own precision.

    An adapter that does not fit (other shapes, or no matching module) is an error.
    """
    from peft import PeftModel

    try:
        wrapped = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the adapter {Path(adapter).name} does not fit {type(model).__name__} with "
            f"{model.config.get_text_config().num_hidden_layers} layers: "
            f"{str(error).strip().splitlines()[-1].strip()}"
        ) from error
    merged = wrapped.merge_and_unload(safe_merge=True)
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    merged._hf_peft_config_loaded = False
    return merged


def fingerprint_files(name: Name) -> str | None:
    """sha256 over config, tokenizer and every weight file and adapter of a local model."""
    if not name.local or (name.adapter and not Path(name.adapter).is_dir()):
        return None
    digest = hashlib.sha256()
    folders = [Path(name.base)] + ([Path(name.adapter)] if name.adapter else [])
    for folder in folders:
        for path in sorted(folder.iterdir()):
            wanted = path.suffix in {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}
            if name.gguf and folder == folders[0]:
                wanted = path.name == name.gguf
            if wanted and path.is_file():
                digest.update(f"{path.name}\0{files.sha256(path)}\0".encode())
    return digest.hexdigest()


def fingerprint_memory(model: Any, tokenizer: Any) -> str:
    """The same for a model in memory: its configuration, vocabulary, template and state dict."""
    import torch

    digest = hashlib.sha256()
    config = model.config.to_dict()
    for transient in ("_name_or_path", "transformers_version", "dtype"):
        config.pop(transient, None)
    digest.update(repr(sorted(config.items(), key=lambda item: item[0])).encode())
    if tokenizer is not None:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
        digest.update(repr(getattr(tokenizer, "chat_template", None)).encode())
    for key, weight in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(weight.shape)}{weight.dtype}".encode())
        if weight.device.type != "meta":
            flat = weight.detach().contiguous().reshape(-1).cpu()
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()
