"""A machine for the pickles that hold tensors: containers, numbers, text, tensors, numeric arrays.

A pickle is a small program. A name in it is text that is looked up in a table here, never an
import, so no function of anything can be reached. Every instruction costs one step and every byte
made is counted, so that a short file is no long work; nothing is hashed that a file can make slow.
The instructions are those of the module `pickletools`, the calls those that torch and numpy write.
"""

import io
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_STEPS = 2_000_000
"""Most instructions of a file; a tensor takes some 30."""

SPARE = 1 << 26
"""Bytes that may be made of any file, beside eight for each of its own: rows may be repeated."""

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
DTYPES = {str(dtype): dtype for dtype in STORAGES.values()}
RENAMED = (
    ("copy_reg.", "copyreg."),
    ("__builtin__.", "builtins."),
    ("numpy.core.", "numpy._core."),
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUE = "((SHORT_)?BIN)?(INT[12]?|STRING|UNICODE8?|BYTES8?)|LONG[14]?|(BIN)?FLOAT|BYTEARRAY8"
PUSHED = frozenset(op.name for op in pickletools.opcodes if re.fullmatch(_VALUE, op.name))
"""Instructions that do no more than push their argument."""


@dataclass(frozen=True)
class StandIn:
    """An object of a foreign class: the class's name and the attributes, none of its code."""

    name: str
    state: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Storage:
    """The numbers of tensors, as bytes."""

    dtype: torch.dtype
    data: bytearray = field(repr=False)

    @property
    def numel(self) -> int:
        return len(self.data) // self.dtype.itemsize


class Limits:
    """What may be spent on one file, in steps and in bytes made."""

    def __init__(self, size: int) -> None:
        self.steps, self.bytes = MAX_STEPS, 8 * size + SPARE

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise ValueError(f"its pickle has more than {MAX_STEPS} instructions")

    def spend(self, n: int) -> None:
        self.bytes -= n
        if self.bytes < 0:
            raise ValueError("it makes much more data than it holds")


@dataclass(frozen=True)
class Name:
    """A global that a pickle names; only the table of the machine gives it a meaning."""

    full: str


class Machine:
    """Runs one pickle. `storages` gives `(key, dtype, numel)`, `inner` reads a file in bytes."""

    def __init__(
        self,
        limits: Limits,
        stand_ins: frozenset[str] = frozenset(),
        storages: Callable[[str, torch.dtype, int], Storage] | None = None,
        inner: Callable[[bytes], Any] | None = None,
    ) -> None:
        self.limits, self.stand_ins, self.storages = limits, stand_ins, storages
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.calls: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: _is(data, Tensor),
            "torch.Size": lambda sizes: _is(sizes, tuple),
            "torch.device": lambda kind, *_: _is(kind, str),
            "collections.OrderedDict": self.ordered,
            "_codecs.encode": self.encode,
            "copyreg._reconstructor": lambda cls, *_: self.stand_in(cls),
            "numpy.dtype": _numpy_dtype,
            "numpy._core.multiarray._reconstruct": lambda *_: np.empty(0, np.uint8),
            "numpy._core.multiarray.scalar": lambda dtype, raw: self.array(raw, dtype, ()).item(),
            "numpy._core.numeric._frombuffer": self.array,
        }
        if inner is not None:
            self.calls["torch.storage._load_from_bytes"] = lambda raw: _is(inner(raw), Storage)

    def run(self, stream: io.BytesIO) -> Any:
        """The one object that the pickle makes; the stream then stands behind it."""
        for code, value, _ in pickletools.genops(stream):
            self.limits.step()
            self.do(code.name, value)
        if len(self.stack) != 1 or self.marks:
            raise ValueError("its pickle is damaged: more than one object is left at the end")
        return self.stack.pop()

    def do(self, code: str, value: Any) -> None:
        stack = self.stack
        if code in PUSHED:
            stack.append(value)
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code])
        elif code in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            index = len(self.memo) if code == "MEMOIZE" else value
            if not 0 <= index <= MAX_STEPS:
                raise ValueError(f"its pickle numbers an object {index}, which no pickler does")
            self.memo[index] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[value])
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            taken = [stack.pop() for _ in range(int(code[-1]))]
            stack.append(tuple(reversed(taken)))
        elif code in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if code == "EMPTY_DICT" else [])
        elif code == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif code in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"):
            self.collect(code)
        elif code == "APPEND":
            added = stack.pop()
            _is(stack[-1], list).append(added)
        elif code == "SETITEM":
            set_to, key = stack.pop(), stack.pop()
            _is(stack[-1], dict)[_key(key)] = set_to
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            self.named(code, value)
        elif code in ("REDUCE", "NEWOBJ"):
            given, called = _is(stack.pop(), tuple), stack.pop()
            stack.append(self.stand_in(called) if code == "NEWOBJ" else self.call(called, given))
        elif code == "BUILD":
            state = stack.pop()
            self.build(stack[-1], state)
        elif code == "BINPERSID":
            stack.append(self.stored(_is(stack.pop(), tuple)))
        elif code not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"its pickle has the instruction {code}: no file of tensors needs it")

    def collect(self, code: str) -> None:
        """Take all that was put on the stack since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        if code == "TUPLE":
            self.stack.append(tuple(items))
        elif code == "LIST":
            self.stack.append(items)
        elif code == "APPENDS":
            _is(self.stack[-1], list).extend(items)
        else:
            if code == "DICT":
                self.stack.append({})
            filled = _is(self.stack[-1], dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                filled[_key(key)] = value

    def named(self, code: str, value: Any) -> None:
        if code == "GLOBAL":
            full = value.replace(" ", ".", 1)
        else:
            name, module = _is(self.stack.pop(), str), _is(self.stack.pop(), str)
            full = f"{module[:200]}.{name[:200]}"
        for old, new in RENAMED:
            full = new + full.removeprefix(old) if full.startswith(old) else full
        known = full in self.calls or full in self.stand_ins or full in STORAGES
        if full in DTYPES:
            self.stack.append(DTYPES[full])
        elif known or full in ("numpy.ndarray", "builtins.object"):
            self.stack.append(Name(full))
        else:
            raise ValueError(
                f"it names {full[:200]!r}, and only tensors, numeric arrays and plain containers "
                "are read: load it where you trust it, and save its tensors in a dict"
            )

    def call(self, called: Any, given: tuple) -> Any:
        full = _is(called, Name).full
        if full not in self.calls or len(given) > 8:
            raise ValueError(f"it calls {full!r} with {len(given)} arguments: that makes no tensor")
        return self.calls[full](*given)

    def stand_in(self, named: Any) -> StandIn:
        full = _is(named, Name).full
        if full not in self.stand_ins:
            raise ValueError(f"it makes an object of {full!r}, which is no tensor")
        return StandIn(full, {})

    def build(self, made: Any, state: Any) -> None:
        if isinstance(made, StandIn):
            # attributes in a dict; of a class with slots a pair of those
            for part in (state,) if isinstance(state, dict) else _is(state, tuple)[:2]:
                if part is not None:
                    self.limits.spend(64 * len(_is(part, dict)))
                    made.state.update({_is(key, str): value for key, value in part.items()})
        elif isinstance(made, np.ndarray):
            _, shape, dtype, fortran, raw = _is(state, tuple)
            filled = self.array(raw, dtype, shape)
            plain = (1, filled.shape, filled.dtype, bool(fortran), bytes(raw))
            made.__setstate__(plain)  # pyright: ignore[reportArgumentType] # takes no numpy.bool
        elif isinstance(made, np.dtype):
            if state[1] not in ("<", "|", "=") or any(part is not None for part in state[2:5]):
                raise ValueError("an array in it is big-endian or structured: save a plain one")
        elif not isinstance(made, dict):  # attributes of an OrderedDict (`_metadata`) are dropped
            raise ValueError(f"its pickle sets the attributes of a {type(made).__name__}")

    def stored(self, reference: tuple) -> Storage:
        if len(reference) not in (5, 6) or self.storages is None:
            raise ValueError("it refers to data outside its pickle that are no storage of torch")
        kind, cls, key, _place, numel, *view = reference
        full = _is(cls, Name).full
        if kind != "storage" or full not in STORAGES or any(part is not None for part in view):
            raise ValueError("it refers to data outside its pickle that are no storage of torch")
        return self.storages(_is(key, str), STORAGES[full], _count(numel))

    def tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, *meta: Any
    ) -> Tensor:
        held, sizes, strides = _is(storage, Storage), _sizes(size), _sizes(stride)
        if any(part is not None for part in meta) or len(sizes) != len(strides):
            raise ValueError(
                "a tensor in it is a conjugate or negative view, or has no valid shape"
            )
        numel = math.prod(sizes)
        self.limits.spend(numel * held.dtype.itemsize)
        if numel == 0:
            return torch.empty(sizes, dtype=held.dtype)
        last = _count(offset) + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if last >= held.numel:
            raise ValueError(
                f"a tensor of shape {sizes} in it needs {last + 1} numbers, its storage has "
                f"{held.numel}"
            )
        return torch.frombuffer(held.data, dtype=held.dtype).as_strided(sizes, strides, offset)

    def encode(self, text: Any, encoding: Any) -> bytes:
        """How the protocols 0 to 2 write bytes."""
        self.limits.spend(len(_is(text, str)))
        if _is(encoding, str) not in ("latin1", "latin-1"):
            raise ValueError("bytes in it have an encoding that no pickler writes")
        return text.encode("latin-1")

    def ordered(self, pairs: Any = ()) -> dict:
        self.limits.spend(64 * len(pairs))
        return {_key(key): value for key, value in pairs}

    def array(self, raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
        sizes, held = _sizes(shape), raw if isinstance(raw, bytes) else _is(raw, bytearray)
        self.limits.spend(len(held))
        if len(held) != math.prod(sizes) * _is(dtype, np.dtype).itemsize:
            raise ValueError(f"a numpy array of shape {sizes} in it has {len(held)} bytes")
        return np.frombuffer(held, dtype).reshape(sizes, order="F" if order == "F" else "C")


def _is(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(
            f"its pickle is damaged: a {type(value).__name__} stands for {kind.__name__}"
        )
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError("its pickle is damaged: a size is no number from 0")
    return value


def _sizes(value: Any) -> list[int]:
    if len(_is(value, tuple)) > 32:
        raise ValueError("its pickle is damaged: a tensor has more than 32 axes")
    return [_count(n) for n in value]


def _key(key: Any) -> Any:
    # the hash of nested tuples takes exponential time, and large numbers can be made to collide
    if type(key) is str or (type(key) in (int, bool) and -(1 << 31) < key < 1 << 31):
        return key
    raise ValueError(f"a dict in it has a {type(key).__name__} as a key: text or small integers")


def _numpy_dtype(code: Any, *_: Any) -> np.dtype:
    if not re.fullmatch("[<|=]?(f[248]|[iu][1248]|b1)", _is(code, str)):
        raise ValueError(f"a numpy array in it has the dtype {code[:80]!r}: only numbers are read")
    return np.dtype(code)
