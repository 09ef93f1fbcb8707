"""Model names, the same everywhere: what a name means and how it becomes a loaded model.

org/name            a repository on the Hub, with @revision if given
path/to/folder      a local checkpoint
path/to/file.gguf   a llama.cpp file, dequantised on loading
MODEL+ADAPTER       a PEFT adapter (folder or Hub id) merged into MODEL
builtin:base | aligned | drifted | mixed | aligned-s1 | drifted-3 | ...
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes import files
from probes.state import state_of

ADAPTERS = Path(__file__).parent / "lineage" / "adapters"
LAST = "-6"
"""Ending of the last step of a drift, which is what `builtin:drifted` and its like mean."""


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
    """Every `builtin:` name that ships: base, the aligned models of the three seeds, the ends of
    their drifts (`drifted`, `mixed-s1`, ...), then the steps along them (`drifted-3`, ...)."""
    steps = sorted(folder.name for folder in ADAPTERS.iterdir() if folder.is_dir())
    ends = [name.removesuffix(LAST) for name in steps if name.endswith(LAST)]
    aligned = [name for name in steps if name.startswith("aligned")]
    rest = [name for name in steps if name not in aligned]
    return tuple(f"builtin:{name}" for name in ("base", *aligned, *ends, *rest))


def parse(text: str) -> Name:
    """Take a model name apart and check what can be checked without loading anything."""
    text = text.strip()
    if not text:
        raise ValueError(
            "the model name is empty: give a Hub id, a folder, a .gguf file or builtin:base"
        )
    if text.startswith("builtin:"):
        return _builtin(text)
    whole, adapter = _at_plus(text)
    path = Path(whole).expanduser()
    label = path.name or whole
    if adapter:
        label += "+" + Path(adapter).name
        adapter = _adapter(adapter)
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
    if f"builtin:{name}" not in builtin_names():
        raise ValueError(
            f"unknown model 'builtin:{name}': the lineage has {', '.join(builtin_names())}"
        )
    folder = ADAPTERS / name
    own = None if name == "base" else str(folder if folder.is_dir() else ADAPTERS / (name + LAST))
    if own and adapter:
        raise ValueError(f"{text!r}: put an adapter on builtin:base, not on another adapter")
    label = name + ("+" + Path(adapter).name if adapter else "")
    adapter = _adapter(adapter) if adapter else None
    return Name(str(base_folder()), None, own or adapter, None, label)


def _at_plus(text: str) -> tuple[str, str]:
    """MODEL and ADAPTER; a plus sign inside a path that exists parts nothing."""
    if Path(text).expanduser().exists():
        return text, ""
    places = [i for i, sign in enumerate(text) if sign == "+" and text[i + 1 :]]
    known = [i for i in places if Path(text[:i]).expanduser().exists()]
    if not places:
        return text, ""
    place = (known or places)[0]
    return text[:place], text[place + 1 :]


def _adapter(adapter: str) -> str:
    """The adapter's folder or Hub id, checked as far as that goes without loading it."""
    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"the folder {adapter} is no PEFT adapter: it holds no adapter_config.json"
        )
    if not folder.is_dir() and (folder.is_absolute() or adapter.startswith((".", "~"))):
        raise FileNotFoundError(f"no such adapter folder: {adapter}")
    return str(folder) if folder.is_dir() else adapter


def load(name: Name, **options: Any) -> tuple[Any, Any]:
    """The transformers model (in evaluation mode) and its tokenizer.

    `options` go to `from_pretrained` (dtype, device_map, attn_implementation, ...).
    """
    import transformers

    with _reading(name) as source:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name.base, **source)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name.base, **source, **options
        )
    if name.gguf:  # the loader leaves marks that would stop the model from being saved
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    if name.adapter:
        model = merge(model, name.adapter)
    return model.eval(), tokenizer


def outline(name: Name) -> tuple[Any, Any]:
    """The same without weights: the model on the meta device, made from its configuration."""
    import torch
    import transformers

    with _reading(name) as source:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name.base, **source)
        config = transformers.AutoConfig.from_pretrained(name.base, **source)
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(config)
        source.pop("gguf_file", None)
        with suppress(OSError):  # stop tokens; not every model has the file
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                name.base, **source
            )
    return model.eval(), tokenizer


@contextmanager
def _reading(name: Name) -> Iterator[dict[str, Any]]:
    """What `from_pretrained` is told about where to read; its errors become sentences."""
    import transformers

    quiet = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    source: dict[str, Any] = {"revision": name.revision} if name.revision else {}
    if name.gguf:
        source["gguf_file"] = name.gguf
    if not name.local and not _hub_answers(name):
        source["local_files_only"] = True
    try:
        yield source
    except ValueError as error:
        raise ValueError(f"cannot load {name.base!r}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        what = "" if name.local else "it is neither a local folder nor reachable on the Hub "
        raise FileNotFoundError(
            f"cannot load {name.base!r}: {what}({str(error).splitlines()[0]}). Give a folder with "
            "config, weights and tokenizer, a .gguf file or builtin:base"
        ) from error
    finally:
        if quiet:
            transformers.utils.logging.enable_progress_bar()


def _hub_answers(name: Name) -> bool:
    """Whether the Hub can be reached: without it every file would be asked for again and again
    for most of a minute, also those that are in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().model_info(name.base, revision=name.revision, timeout=10)
    except OfflineModeIsEnabled:
        return False
    except (HfHubHTTPError, ValueError):  # it answers, and loading says what is wrong
        return True
    except Exception:  # no connection: the library for it, and so the class, varies
        return False
    return True


def merge(model: Any, adapter: str) -> Any:
    """The model with a PEFT adapter folded into its weights, in the weights' own precision.

    An adapter that does not fit (other shapes, no matching module, tensors for modules the model
    lacks, or none for modules it has) is an error.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"the weights of {type(model).__name__} are quantised, and folding the adapter "
            f"{Path(adapter).name} into them would round it away: load the model unquantised, or "
            "put the adapter on it with peft and pass HookedModel(model, tokenizer)"
        )
    misfit = (
        f"the adapter {Path(adapter).name} does not fit {type(model).__name__} with "
        f"{model.config.get_text_config().num_hidden_layers} layers"
    )
    own = {f"base_model.model.{name}" for name in model.state_dict()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            wrapped = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{misfit}: {str(error).strip().splitlines()[-1].strip()}") from error
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        kind = str(wrapped.active_peft_config.peft_type).rpartition(".")[2]
        raise ValueError(
            f"the adapter {Path(adapter).name} is of kind {kind}, which has no weights to fold "
            "into the model: use a LoRA or another adapter of weights"
        )
    given = set(load_peft_weights(adapter, device="cpu")) - own
    taken = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False)) - own
    if given != taken:
        which, odd = "without a place in", given - taken
        if not odd:
            which, odd = "missing for", taken - given
        raise ValueError(f"{misfit}: {len(odd)} tensors {which} the model, first {min(odd)}")
    merged = wrapped.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
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
                called = "" if path.suffix == ".gguf" else path.name  # one file: its name is free
                digest.update(f"{called}\0{files.sha256(path)}\0".encode())
    return digest.hexdigest()


def fingerprint_memory(model: Any, tokenizer: Any) -> str:
    """The same for a model in memory: its configuration, vocabulary, template and state dict."""
    digest = hashlib.sha256()
    config = json.dumps(_settings(model.config.to_dict()), sort_keys=True, default=str)
    digest.update(f"{type(model).__name__}{config}".encode())
    if tokenizer is not None:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
        digest.update(repr(getattr(tokenizer, "chat_template", None)).encode())
        if getattr(tokenizer, "is_fast", False):
            # merges, normaliser, special tokens; padding is left there by the last call
            parts = json.loads(tokenizer.backend_tokenizer.to_str())
            parts["padding"] = parts["truncation"] = None
            digest.update(json.dumps(parts, sort_keys=True).encode())
    for key, weight in sorted(state_of(model).items()):
        for name, part in _plain_parts(key, weight):
            digest.update(f"{name}{tuple(part.shape)}{part.dtype}".encode())
            digest.update(_bytes(part))
    return digest.hexdigest()


def _plain_parts(name: str, weight: Any) -> Iterator[tuple[str, Any]]:
    """A weight as ordinary tensors: quantised ones (torchao) are wrappers around several."""
    if not hasattr(weight, "dtype"):  # state dicts of quantised layers hold settings too
        return
    inner = getattr(weight.detach(), "__tensor_flatten__", None)
    if inner is None:
        yield name, weight.detach()
        return
    for part in inner()[0]:
        yield from _plain_parts(f"{name}.{part}", getattr(weight.detach(), part))


def _bytes(weight: Any) -> Any:
    import torch

    if weight.device.type == "meta" or not weight.numel():
        return b""
    return weight.contiguous().reshape(-1).cpu().view(torch.uint8).numpy().data


def _settings(config: dict[Any, Any]) -> dict[str, Any]:
    """A configuration without what saving and loading leave in it."""
    transient = {"_name_or_path", "transformers_version", "dtype", "architectures"}
    return {
        str(key): _settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in transient
    }
