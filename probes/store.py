"""Activations on disk, safe against being killed at any instant.

    store.json        what all cells share: model fingerprint, template, positions, dtype, engine
    manifest.jsonl    one line per finished shard: its hash, sites, prompts, vectors per prompt
    shards/*.safetensors

A shard is written under a temporary name, synced and renamed, and only then named in the manifest,
whose lines are appended and synced. What the manifest does not name does not exist; a torn last
line is dropped. A cell is (prompt, site); it is in exactly one shard.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from probes import files

FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """What every cell of a store has in common."""

    fingerprint: str
    template: str
    positions: str
    engine: str
    dtype: str
    model: str
    """The model's name, for people; not compared."""


@dataclass(frozen=True)
class Shard:
    """One line of the manifest."""

    name: str
    digest: str
    sites: tuple[str, ...]
    prompts: tuple[str, ...]
    counts: tuple[int, ...]
    backed_off: bool
    """Whether the batch was split after running out of memory; its last bits may then differ."""


class Store:
    """A folder of captured activations of one model."""

    def __init__(self, folder: Path | str, identity: Identity) -> None:
        self.folder = Path(folder)
        self.identity = identity
        self._verified: set[str] = set()
        described = {"format": FORMAT, **identity.__dict__}
        path = self.folder / "store.json"
        if path.is_file():
            self._compare(_header(path), described)
        elif self.folder.is_dir() and any(
            p.name != "lock" and not p.name.endswith(".tmp") for p in self.folder.iterdir()
        ):
            raise ValueError(
                f"{self.folder} is not empty and holds no store.json: give an empty folder or a "
                "store of this model"
            )
        else:
            files.write_json(path, described)
        self.shards = self._read_manifest()

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder} is a store of format {found.get('format')}, this version reads "
                f"{FORMAT}"
            )
        for name in ("fingerprint", "template", "positions", "engine", "dtype"):
            if found.get(name) != wanted[name]:
                what = {"fingerprint": "another model", "template": "another chat template"}.get(
                    name, f"{name} {found.get(name)!r}"
                )
                raise ValueError(
                    f"{self.folder} holds activations of {what} (model {found.get('model')!r}), "
                    f"asked for {name} {str(wanted[name])[:20]!r} of {wanted['model']!r}: give "
                    "another folder"
                )

    def _read_manifest(self) -> list[Shard]:
        path = self.folder / "manifest.jsonl"
        if not path.is_file():
            return []
        # what follows the last newline was torn off by a kill: that shard was never promised
        *lines, _ = path.read_bytes().split(b"\n")
        shards = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                shard = Shard(
                    row["name"],
                    row["sha256"],
                    tuple(row["sites"]),
                    tuple(row["prompts"]),
                    tuple(row["counts"]),
                    row["backed_off"],
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is damaged: delete that line and run again; its "
                    "prompts will be captured anew"
                ) from error
            if self._path(shard.name).is_file():
                shards.append(shard)
        return shards

    def _path(self, name: str) -> Path:
        return self.folder / "shards" / f"{name}.safetensors"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store for writing; a second writer is refused.

        What a killed writer left is cleared, and what others finished meanwhile is read. Only here,
        because before the lock is held, half a line may be another writer's.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                pass  # no such locks on this platform
            except BlockingIOError:
                raise RuntimeError(
                    f"another process is writing to {self.folder}: wait for it, or give another "
                    "folder"
                ) from None
            for stale in [*self.folder.glob(".*.tmp"), *self.folder.glob("shards/.*.tmp")]:
                stale.unlink(missing_ok=True)
            self._drop_torn_line()
            self.shards = self._read_manifest()
            yield
        finally:
            os.close(lock)

    def _drop_torn_line(self) -> None:
        path = self.folder / "manifest.jsonl"
        if path.is_file():
            with path.open("r+b") as manifest:
                data = manifest.read()
                manifest.truncate(data.rfind(b"\n") + 1)

    def present(self) -> dict[str, set[str]]:
        """Sites held for each prompt."""
        held: dict[str, set[str]] = {}
        for shard in self.shards:
            for prompt in shard.prompts:
                held.setdefault(prompt, set()).update(shard.sites)
        return held

    def write(
        self,
        values: Mapping[str, Tensor],
        prompts: Sequence[str],
        counts: Sequence[int],
        backed_off: bool = False,
    ) -> None:
        """Add one batch: `values[site]` holds the vectors of the prompts one after the other."""
        sites = tuple(sorted(values))
        name = hashlib.sha256(json.dumps([sites, list(prompts)]).encode()).hexdigest()[:16]
        data = tensors_to_bytes({site: values[site].contiguous() for site in sites})
        shard = Shard(
            name, hashlib.sha256(data).hexdigest(), sites, tuple(prompts), tuple(counts), backed_off
        )
        files.write_bytes(self._path(name), data)
        line = {
            "name": name,
            "sha256": shard.digest,
            "sites": sites,
            "prompts": shard.prompts,
            "counts": shard.counts,
            "backed_off": backed_off,
        }
        with (self.folder / "manifest.jsonl").open("ab") as manifest:
            manifest.write(json.dumps(line).encode() + b"\n")
            manifest.flush()
            os.fsync(manifest.fileno())
        self.shards.append(shard)

    def read(self, site: str, prompts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """The vectors of a site for these prompts, one after the other, and how many each has."""
        where: dict[str, tuple[Shard, int, int]] = {}
        for shard in self.shards:
            if site in shard.sites:
                start = 0
                for prompt, count in zip(shard.prompts, shard.counts, strict=True):
                    where[prompt] = (shard, start, count)
                    start += count
        missing = [p for p in prompts if p not in where]
        if missing:
            raise KeyError(
                f"{self.folder} has no {site} for {len(missing)} of {len(prompts)} prompts: run "
                "the capture again, it computes what is missing"
            )
        pieces, counts = [], []
        loaded: dict[str, Tensor] = {}
        for prompt in prompts:
            shard, start, count = where[prompt]
            if shard.name not in loaded:
                loaded[shard.name] = self._load(shard, site)
            pieces.append(loaded[shard.name][start : start + count])
            counts.append(count)
        return torch.cat(pieces), counts

    def _load(self, shard: Shard, site: str) -> Tensor:
        path = self._path(shard.name)
        if shard.digest not in self._verified:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.digest:
                raise ValueError(
                    f"shard {path} is damaged: its content does not match the manifest. Delete the "
                    f"file and run the capture again; only its {len(shard.prompts)} prompts are "
                    "computed anew"
                )
            self._verified.add(shard.digest)
        with safe_open(path, "pt") as tensors:
            return tensors.get_tensor(site)


def _header(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: delete the folder and capture again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no store of activations: give another folder")
    return found
