"""Finished measurements, kept in a folder by what they are, so that a killed run goes on.

A measurement is one measure on one model with one steering applied. Its file is named by a hash
over all that decides its values and is written at once or not at all.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes import files
from probes.model import HookedModel
from probes.results import versions
from steering.applied import Steering
from steering.vector import SteeringVector

FORMAT = 1
"""Version of what is hashed and written; measurements of another are made anew."""


class Cells:
    """Measurements by key: in a folder, or in memory for one run only."""

    def __init__(self, folder: Path | str | None) -> None:
        self.folder = None if folder is None else Path(folder) / "cells"
        self._known: dict[str, Float[Tensor, " prompt"]] = {}
        if self.folder is None or not self.folder.is_dir():
            return
        for stale in self.folder.glob(".*.tmp"):  # of a killed run, not of one that still writes
            if not _alive(stale.name.rpartition(".tmp")[0].rpartition(".")[2]):
                stale.unlink(missing_ok=True)

    def get(self, key: str) -> Float[Tensor, " prompt"] | None:
        """The values measured, or None; a damaged file is an error."""
        if key in self._known:
            return self._known[key]
        path = None if self.folder is None else self.folder / f"{key}.json"
        if path is None or not path.is_file():
            return None
        try:
            found = json.loads(path.read_text())
            if found["format"] != FORMAT or found["key"] != key:
                raise ValueError("it holds another measurement")
            values = torch.tensor(found["values"], dtype=torch.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete it and run again, it will be measured anew"
            ) from error
        self._known[key] = values
        return values

    def put(self, key: str, values: Float[Tensor, " prompt"], **said: str) -> None:
        """Keep the values; what is `said` helps who opens the file."""
        self._known[key] = values
        if self.folder is not None:
            row = {"format": FORMAT, "key": key, "values": values.tolist(), **said}
            files.write_json(self.folder / f"{key}.json", row)


def key_of(model: HookedModel, what: Steering | None, measure: str) -> str:
    """Name of the measurement: model, template, engine, package versions, what is applied and the
    measure's key. Versions, because another release may compute other numbers by the same code."""
    steering = None if what is None or what.strength == 0 else _steering(what)
    said = [
        FORMAT, _versions(), model.fingerprint, model.engine.name, str(model.dtype),
        model.template.hash, steering, measure,
    ]  # fmt: skip
    return _hash(said)


def refuse_edits(model: HookedModel, doing: str) -> None:
    """What is kept under the unsteered model's name must be the unsteered model's."""
    if model.engine.edited:
        raise ValueError(
            f"edits are in force on {model.name}, and {doing} takes it for the unsteered model: "
            "leave `with steer(...)` or `with model.edit(...)` first"
        )


def measure_key(measure: Callable[..., Any]) -> str:
    """Hash of a measure: its code, what it closes over and the arguments put in with `partial`.

    What a function reads from its module, and what decorators add, is not seen. An object that
    cannot be told from others by its content needs an attribute `key`, a text that changes when
    the object does.
    """
    return _hash(_described(measure, "measure"))


def _steering(what: Steering) -> Any:
    held = what.what
    rest = _described([what.strength, what.unit, what.schedule, what.condition], "steering")
    if isinstance(held, SteeringVector):
        parts = [held.operation, held.vectors, held.values, held.scales]
    else:
        parts = ["offsets", held.vectors, held.scales]
    return [_described(parts, "vector"), rest]


def _described(x: Any, name: str) -> Any:
    """The content of a value as JSON; refuses what has no content that can be seen."""
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, Tensor):
        data = x.detach().cpu().contiguous()
        digest = hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        return ["tensor", str(x.dtype), list(x.shape), digest]
    if isinstance(x, HookedModel):
        return ["model", x.fingerprint, str(x.dtype), x.template.hash]
    if isinstance(key := getattr(x, "key", None), str):
        return [type(x).__qualname__, key]
    if isinstance(x, Mapping):
        return ["mapping", [[_described(k, name), _described(v, name)] for k, v in x.items()]]
    if isinstance(x, list | tuple):
        return [_described(item, name) for item in x]
    if isinstance(x, functools.partial):
        return ["partial", *(_described(p, name) for p in (x.func, x.args, x.keywords))]
    if isinstance(x, types.MethodType):
        return ["method", x.__name__, _described(x.__self__, name)]
    if isinstance(x, types.FunctionType):
        x = inspect.unwrap(x)
        held = [cell.cell_contents for cell in x.__closure__ or ()]
        given = [x.__defaults__, x.__kwdefaults__]
        parts = [_described(p, x.__qualname__) for p in (held, given)]
        return ["function", x.__module__, x.__qualname__, _code(x.__code__), *parts]
    if isinstance(x, type | types.BuiltinFunctionType):
        return ["named", x.__module__, x.__qualname__]
    if dataclasses.is_dataclass(x):
        fields = [_described(getattr(x, f.name), name) for f in dataclasses.fields(x)]
        return [type(x).__qualname__, fields]
    raise ValueError(
        f"{name} holds a {type(x).__name__}, whose content cannot be seen, so a finished "
        "measurement could not be told from another: give that object a text attribute `key`"
    )


def _code(code: types.CodeType) -> Any:
    constants = []
    for c in code.co_consts:
        if isinstance(c, frozenset):  # whose order changes from process to process
            c = sorted(map(repr, c))
        constants.append(_code(c) if isinstance(c, types.CodeType) else repr(c))
    return [code.co_code.hex(), list(code.co_names), constants]


def _hash(said: Any) -> str:
    text = json.dumps(said, sort_keys=True, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache  # read from disk, and asked for with every key
def _versions() -> dict[str, str]:
    return versions()


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        return True
    return True
