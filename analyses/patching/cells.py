"""What a patch is made of, what is held in memory for it, and what is kept of it in files."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from analyses.patching.spans import Indices
from probes import files
from probes.sites import Site


@dataclass(frozen=True)
class Cell:
    """One configuration: the sites patched together, at all aligned tokens or some of them."""

    sites: tuple[Site, ...]
    positions: str | Indices | None = None
    """A rule of `probes.positions` on the target prompts, or token indices of each; None: every
    aligned token."""


@dataclass
class Held:
    """Activations of a portion of cells."""

    values: dict[Site, list[Tensor]] = field(default_factory=dict)
    own: dict[Site, list[Tensor]] = field(default_factory=dict)
    """The target's values at held sites, every token."""
    differs: dict[Site, list[Tensor]] = field(default_factory=dict)
    """Whether source and target differ in any bit, `[token]` or `[token, head]`."""
    entering: dict[int, list[Tensor]] = field(default_factory=dict)


class Kept:
    """Finished layers of a measurement in a folder; without a folder it keeps nothing."""

    def __init__(
        self, folder: Path | str | None, described: object, ends: Tensor | None = None
    ) -> None:
        """`described` is all that the numbers depend on, in a form whose `repr` says it. `ends` is
        the metric without a patch: a function tells what it measures by its values alone, which are
        compared to a thousandth of the largest, since batches of another size round otherwise."""
        self.folder = None if folder is None else Path(folder)
        self.key = hashlib.sha256(repr(described).encode()).hexdigest()
        self.ends = torch.zeros(0) if ends is None else ends.double().nan_to_num()

    def read(self, layer: int) -> Tensor | None:
        from safetensors import safe_open

        if self.folder is None or not self._path(layer).is_file():
            return None
        with safe_open(self._path(layer), "pt") as file:
            same = (file.metadata() or {}).get("key") == self.key
            if not same or not self._agrees(file.get_tensor("ends")):
                raise ValueError(
                    f"{self.folder} holds the layers of another map (other models, prompts, sites "
                    "or metric): give an empty folder"
                )
            return file.get_tensor("values")

    def write(self, layer: int, values: Tensor) -> None:
        from safetensors.torch import save

        if self.folder is not None:
            kept = {"values": values.contiguous(), "ends": self.ends.contiguous()}
            data = save(kept, metadata={"key": self.key})
            files.write_bytes(self._path(layer), data)

    def _agrees(self, ends: Tensor) -> bool:
        if ends.shape != self.ends.shape:
            return False
        allowed = 1e-3 * float(self.ends.abs().max()) if len(ends) else 0.0
        return bool(((ends - self.ends).abs() <= allowed).all())

    def _path(self, layer: int) -> Path:
        assert self.folder is not None
        return self.folder / f"layer-{layer:03d}.safetensors"


def parts_of(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites without their heads, each once, in forward order."""
    return tuple(sorted({Site(s.layer, s.part) for s in sites}))
