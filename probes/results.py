"""What every result of the project can do: show itself, be saved, be loaded, say how it was made.

A result is a frozen dataclass that derives from `Result`. Its fields are tensors, plain JSON
values, or `Record`; `save` writes the tensors to one safetensors file and everything else to JSON.
"""

import dataclasses
import html
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from probes import files

if TYPE_CHECKING:
    import pandas as pd

_R = TypeVar("_R", bound="Result")

FORMAT = 1
"""Version of the saved form; another version is refused."""

PACKAGES = ("alignlens", "torch", "transformers", "transformer-lens", "nnsight", "scikit-learn")


@dataclass(frozen=True)
class Record:
    """How a result was made: enough to make it again, and to know whether two may be compared."""

    models: tuple[str, ...] = ()
    """Names as given, in order."""
    fingerprints: tuple[str, ...] = ()
    """sha256 over config, tokenizer files and weights of each model."""
    template_hash: str = ""
    prompts_hash: str = ""
    seeds: tuple[int, ...] = ()
    dtype: str = ""
    engine: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    command: str = field(default_factory=lambda: " ".join(Path(a).name for a in sys.argv[:1]))


def versions() -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Result:
    """Base of all results. Subclasses add fields, `plot(ax=None)` and `frame()`."""

    record: Record = field(default_factory=Record, kw_only=True, repr=False, compare=False)

    def frame(self) -> "pd.DataFrame":
        """The result as a table."""
        raise NotImplementedError(f"{type(self).__name__} has no table")

    def save(self, folder: Path | str) -> Path:
        """Write `result.json`, `record.json` and, if there are tensors, `result.safetensors`."""
        from safetensors.torch import save as to_bytes

        folder = Path(folder)
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {"result": type(self).__name__, "format": FORMAT}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                tensors[item.name] = value.contiguous()
            elif item.name != "record":
                plain[item.name] = _plain(value)
        if tensors:
            files.write_bytes(folder / "result.safetensors", to_bytes(tensors))
        else:  # those of a result saved here before
            (folder / "result.safetensors").unlink(missing_ok=True)
        files.write_json(folder / "record.json", dataclasses.asdict(self.record))
        files.write_json(folder / "result.json", plain)
        return folder

    @classmethod
    def load(cls: type[_R], folder: Path | str) -> _R:  # beartype cannot check Self in a method
        """Read what `save` wrote; another kind of result or another format is refused."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "result.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no result.json: give the folder of a saved run"
            )
        plain = _read_json(folder / "result.json")
        if (kind := plain.pop("result", None)) != cls.__name__:
            raise ValueError(f"{folder} holds a {kind}, expected a {cls.__name__}")
        if (version := plain.pop("format", None)) != FORMAT:
            raise ValueError(f"{folder} has format {version}, this version reads {FORMAT}")
        record = _read_json(folder / "record.json")
        values = {key: _frozen(value) for key, value in plain.items()}
        path = folder / "result.safetensors"
        try:
            tensors = load_file(path) if path.is_file() else {}
            saved = Record(**{key: _frozen(value) for key, value in record.items()})
            return cls(**values, **tensors, record=saved)
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"the {cls.__name__} in {folder} is damaged: {error}") from error

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>" + self.frame().to_html(
            max_rows=20, float_format="%.3f", border=0
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a result field holds {type(value).__name__}: use a tensor or plain values")


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no saved result: it holds a {type(found).__name__}")
    return found


def check_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity with a sentence that says how many there are and where the first."""
    bad = ~torch.isfinite(values)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{what} holds {int(bad.sum())} values that are NaN or infinite, the first at index "
            f"{first}: load the model in float32 or bfloat16, or leave that prompt or layer out"
        )
