"""Foreign `.pt` and pickle files, read without running anything that they name.

Their pickles are run by a machine of our own (`pickle_machine`) that knows tensors, numeric
arrays, plain containers and one inert stand-in for objects. Work and memory are bounded by the
size of the file, and a file that is damaged anywhere is refused, never half-read.

`torch.load(weights_only=True)` is not used. It runs nothing foreign either, but 600 bytes keep it
busy for ever (a dict keyed by nested tuples: the time of the hash doubles at every level), it
inflates compressed records without a limit, and it gives tensors of any declared size. Files that
it loads and that hold plain tensors are read the same here (the tests compare).

Forms, from torch/serialization.py: a zip archive (`*/data.pkl` and one record a storage); the form
before torch 1.6 (five pickles, then the storages); a plain pickle, in which a tensor holds a file
of that older form as bytes, for `torch.storage._load_from_bytes`.
"""

import io
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from steering.export.pickle_machine import Limits, Machine, StandIn, Storage

__all__ = ["MAX_BYTES", "STAND_INS", "StandIn", "load_restricted"]

MAX_BYTES = 1 << 30
"""Largest file that is read: a vector for every block of the largest models takes some 10 MB."""

STAND_INS = frozenset({"steering_vectors.steering_vector.SteeringVector"})
"""Classes whose objects become a `StandIn`; every other class is refused."""

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before 1.6
MAX_RECORDS = 100_000


def load_restricted(
    path: Path | str, *, stand_ins: Collection[str] = STAND_INS, max_bytes: int = MAX_BYTES
) -> Any:
    """What the file holds: dicts, lists, tuples, text, numbers, tensors on the CPU, numpy arrays.

    Objects of the classes named in `stand_ins` become `StandIn`s. Keys of dicts are text or small
    integers; an OrderedDict is read as a dict, a parameter as its tensor, a device as its name.
    Tensors that share memory in the file share it here.

    Raises `ValueError` with the reason for every other class or function, by its name, for damage,
    and for sizes that the file does not hold.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes, at most {max_bytes} are read: raise max_bytes")
    try:
        return _read(path.read_bytes(), Limits(size), frozenset(stand_ins))
    except Exception as error:  # whatever breaks while a foreign file is read, the file broke
        known = type(error) is ValueError
        reason = str(error) if known else f"it is damaged ({type(error).__name__}: {error})"
        raise ValueError(f"{path} is refused: {reason[:500]}") from error


def _read(data: bytes, limits: Limits, stand_ins: frozenset[str], *, inside: bool = False) -> Any:
    if data.startswith(b"PK\x03\x04"):
        return _read_zip(data, limits, stand_ins)

    def inner(raw: bytes) -> Any:
        limits.spend(len(raw))
        return _read(raw, limits, frozenset(), inside=True)

    stream = io.BytesIO(data)
    # bytes of a storage hold no such bytes again
    found = Machine(limits, stand_ins, inner=None if inside else inner).run(stream)
    if type(found) is int and found == MAGIC:
        found = _read_old(stream, len(data), limits, stand_ins)
    if stream.read(1):
        raise ValueError("data follow the end of its pickle: one object a file is read")
    return found


def _read_zip(data: bytes, limits: Limits, stand_ins: frozenset[str]) -> Any:
    if data.count(b"PK\x01\x02") > MAX_RECORDS:
        raise ValueError(f"its archive has more than {MAX_RECORDS} records")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if len(records) != len(archive.infolist()):
            raise ValueError("its archive has two records of one name")
        roots = [name.partition("/")[0] for name in records if re.fullmatch("[^/]+/data.pkl", name)]
        if len(roots) != 1:
            raise ValueError("it is an archive, but not of torch.save: there is no one data.pkl")

        def record(name: str) -> bytes:
            info = records.get(f"{roots[0]}/{name}")
            if info is None:
                raise ValueError(f"its archive lacks the record {name[:80]!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"the record {name[:80]!r} is compressed, which torch never does")
            limits.spend(info.file_size)
            return archive.read(info)

        if f"{roots[0]}/byteorder" in records and record("byteorder") != b"little":
            raise ValueError("it is big-endian: save it on a little-endian machine")
        made: dict[str, Storage] = {}

        def storage(key: str, dtype: torch.dtype, numel: int) -> Storage:
            if key not in made:
                made[key] = Storage(dtype, bytearray(record(f"data/{key}")))
            held = made[key]
            if held.dtype != dtype or len(held.data) != numel * dtype.itemsize:
                raise ValueError(
                    f"storage {key[:80]!r} holds {len(held.data)} bytes of {held.dtype}, declared "
                    f"are {numel} numbers of {dtype}"
                )
            return held

        stream = io.BytesIO(record("data.pkl"))
        found = Machine(limits, stand_ins, storage).run(stream)
        if stream.read(1):
            raise ValueError("data follow the end of its pickle")
        return found


def _read_old(stream: io.BytesIO, size: int, limits: Limits, stand_ins: frozenset[str]) -> Any:
    """What follows the magic number: storages stand behind the pickle that refers to them."""
    version, system = (Machine(limits).run(stream) for _ in range(2))
    if version != PROTOCOL or not isinstance(system, dict):
        raise ValueError("it begins like an old file of torch.save and does not go on like one")
    if system.get("little_endian") is not True:
        raise ValueError("it is big-endian: save it on a little-endian machine")
    made: dict[str, Storage] = {}
    left = size

    def storage(key: str, dtype: torch.dtype, numel: int) -> Storage:
        nonlocal left
        if key not in made:
            left -= numel * dtype.itemsize
            if left < 0:
                raise ValueError(f"storage {key[:80]!r} of {numel} numbers is larger than the file")
            made[key] = Storage(dtype, bytearray(numel * dtype.itemsize))
        if (made[key].dtype, made[key].numel) != (dtype, numel):
            raise ValueError(f"storage {key[:80]!r} is declared twice, differently")
        return made[key]

    found = Machine(limits, stand_ins, storage).run(stream)
    keys = Machine(limits).run(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its list of storages is damaged")
    if len(keys) != len(made) or set(keys) != set(made):
        raise ValueError("its list of storages does not fit its tensors")
    for key in keys:
        held = made[key].data
        n, raw = int.from_bytes(stream.read(8), "little"), stream.read(len(held))
        if n != made[key].numel or len(raw) != len(held):
            raise ValueError(f"storage {key[:80]!r} is cut off, or not of the size declared")
        held[:] = raw  # the tensors made above are views of these bytes
    return found
