"""The bytes of a GGUF file, read strictly and with no more memory than the file has.

Control vectors come from strangers, so every length is held against the bytes that are left before
anything is allocated. Written from the format's specification, not from a loader: what
`gguf.GGUFWriter` writes is read back here by other code.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

LARGEST = 2**31
"""Bytes above which a file is no control vector; a whole model is not to be read by mistake."""

MOST_VALUES = 2**14
"""Longest array in the metadata; a model's vocabulary is longer, a control vector has none."""

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}  # fmt: skip
_NAMES = {0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32",
          7: "bool", 8: "string", 9: "array", 10: "uint64", 11: "int64", 12: "float64"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 28: np.dtype("<f8")}
"""Types of tensors that are plain numbers; all others are quantised, or no vectors."""


@dataclass(frozen=True)
class GGUFFile:
    """Metadata with their types, and tensors of plain numbers."""

    metadata: dict[str, Any]
    types: dict[str, str]
    """Type of each value of the metadata, as the format names it (`uint32`, `string`)."""
    tensors: dict[str, Shaped[np.ndarray, "..."]]
    """By name, in the file's own precision, axes in the order of the file."""

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(path: Path | str) -> GGUFFile:
    """Read a GGUF file of version 2 or 3, little-endian. Raises `ValueError` with the reason."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a control vector (.gguf)")
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes, more than any control vector: is it a model?")
    try:
        return _Reader(path.read_bytes()).file()
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable GGUF file: {error}") from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def file(self) -> GGUFFile:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        version = self.number("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "it is big-endian" if swapped in (2, 3) else "versions 2 and 3 are read"
            raise ValueError(f"its version is {version}: {why}")
        n_tensors, n_values = self.number("<Q"), self.number("<Q")
        # the smallest entry of either kind: an empty name with its length, and a type
        self.room(n_tensors, 24, "tensors")
        self.room(n_values, 13, "metadata")
        metadata: dict[str, Any] = {}
        types: dict[str, str] = {}
        for _ in range(n_values):
            key, kind = self.string(), self.number("<I")
            if key in metadata:
                raise ValueError(f"its metadata hold {key!r} twice")
            metadata[key], types[key] = self.value(kind), _NAMES[kind]
        infos = [self.info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, np.ndarray] = {}
        held = 0
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise ValueError(f"it holds two tensors {name!r}")
            tensors[name] = self.tensor(name, shape, kind, start + offset)
            held += tensors[name].nbytes
            if held > len(self.data):
                raise ValueError("its tensors lie over one another")
        return GGUFFile(metadata, types, tensors)

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise ValueError(f"{n} bytes were announced at byte {self.at}, where it ends sooner")
        self.at += n
        return self.data[self.at - n : self.at]

    def room(self, n: int, each: int, what: str) -> None:
        if n * each > len(self.data) - self.at:
            raise ValueError(
                f"{n} {what} were announced, more than its {len(self.data)} bytes hold"
            )

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"unknown type {kind} of metadata at byte {self.at}")
        inner, n = self.number("<I"), self.number("<Q")
        if inner == _ARRAY or inner not in _NAMES:
            raise ValueError(f"an array of type {inner} in its metadata is not read")
        self.room(n, 8 if inner == _STRING else struct.calcsize(_NUMBERS[inner]), "values")
        if n > MOST_VALUES:
            raise ValueError(f"an array of {n} values in its metadata: is it a model?")
        return [self.value(inner) for _ in range(n)]

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_axes = self.string(), self.number("<I")
        if n_axes > 4:
            raise ValueError(f"tensor {name!r} has {n_axes} axes")
        shape = tuple(self.number("<Q") for _ in range(n_axes))
        return name, shape, self.number("<I"), self.number("<Q")

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, at: int) -> np.ndarray:
        if kind not in _PLAIN:
            raise ValueError(f"tensor {name!r} has type {kind}: float32, 16 or 64 are read")
        count = 1
        for n in shape:
            count *= n
        end = at + count * _PLAIN[kind].itemsize
        if end > len(self.data):
            raise ValueError(f"tensor {name!r} of shape {list(shape)} ends after the file does")
        values = np.frombuffer(self.data, _PLAIN[kind], count, at)
        return values.reshape(shape[::-1]).copy()
