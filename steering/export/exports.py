"""An export: what a program loads, and beside it what it was made from, so that it can be checked.

    FOLDER/vector.gguf ...          what the program loads
    FOLDER/alignlens/source.safetensors   the artefact it was made from
    FOLDER/alignlens/export.json    target, strength, unit, tokens, hashes of the files

The record has a folder of its own because servers read every safetensors file beside a model.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from probes import files
from probes.model import HookedModel
from probes.sites import Unsupported
from steering.applied import Steering
from steering.export.blocks import block_offsets
from steering.offsets import KIND as OFFSETS
from steering.offsets import HeadOffsets
from steering.schedule import Schedule
from steering.vector import SteeringVector

TARGETS = {
    "gguf": "control vector of llama.cpp; repeng and EasySteer read it too",
    "vllm-lens": "JSON for requests to vLLM with vllm-lens",
    "easysteer": "GGUF and the request of EasySteer",
    "vllm-hook": "JSON and tensor file of vLLM-Hook",
    "lm-eval": "file for the `steered` model of lm-evaluation-harness",
    "checkpoint": "model folder with the edit in its weights",
}

RECORD = "alignlens"
"""Sub-folder of the record."""

FORMAT = 1

ELSEWHERE = ("gpt2", "gpt_neox", "gptj", "opt", "falcon", "bloom", "mpt", "mamba", "mamba2")
"""Architectures whose blocks vLLM does not call `model.layers`."""


@dataclass(frozen=True)
class Export:
    """A written export, as its record describes it."""

    folder: Path
    target: str
    file: str
    """The file a program is given, or '.' for the folder itself."""
    strength: float
    unit: str
    scope: str
    """Tokens at which it acts: all, prompt or generated."""
    model: str
    hashes: Mapping[str, str] = field(repr=False)
    """sha256 of every file that the export wrote, weights of checkpoints left out."""

    @property
    def path(self) -> Path:
        return self.folder / self.file

    @property
    def steering(self) -> Steering:
        """What was meant, from the artefact beside it."""
        what = load_artefact(self.folder / RECORD / "source.safetensors")
        return Steering(what, self.strength, self.unit, Schedule(self.scope))  # pyright: ignore[reportArgumentType]


def export(
    what: SteeringVector | HeadOffsets,
    target: str,
    folder: Path | str,
    *,
    strength: float = 1.0,
    unit: str = "raw",
    scope: str = "all",
    model: HookedModel | None = None,
) -> Export:
    """Write steering for a program (`TARGETS`), strength multiplied in.

    `model` is needed for a checkpoint. `scope` other than 'all' can be said to EasySteer only.
    Raises `Unsupported` for what the target cannot hold, with the nearest that can, and
    `FileExistsError` for a folder with something in it.
    """
    folder = Path(folder)
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    if scope not in ("all", "prompt", "generated"):
        raise ValueError(f"scope {scope!r}: choose all, prompt or generated")
    if scope != "all" and target != "easysteer":
        raise Unsupported(
            f"{target} acts at all tokens, asked was {scope!r}: only EasySteer is told tokens; "
            "export for all of them, or with --to easysteer"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"there is something at {folder} already: give another folder")
    if target == "checkpoint" and model is None:
        raise ValueError("a checkpoint is made from a model: give it with --model")
    # files and record appear together: a folder without its record could not be verified or redone
    with files.folder(folder) as temporary:
        if target == "checkpoint" and model is not None:
            from steering.export.checkpoint import bake

            baked = bake(model, what, temporary / "baked", strength, unit).folder
            for path in list(baked.iterdir()):
                path.rename(temporary / path.name)
            baked.rmdir()
            what, file = as_baked(what, model), "."
        else:
            file = _write(what, target, temporary, folder.resolve(), strength, unit, scope)
        _recorded(temporary, what, target, file, strength, unit, scope)
        if folder.exists():
            folder.rmdir()
    return read_export(folder)


def as_baked(
    what: SteeringVector | HeadOffsets, model: HookedModel
) -> SteeringVector | HeadOffsets:
    """What a checkpoint does of it: ablation at one site is ablation at every write there."""
    if isinstance(what, HeadOffsets) or what.operation != "ablate" or len(what.sites) > 1:
        return what
    return what.everywhere(model)


def _write(
    what: SteeringVector | HeadOffsets,
    target: str,
    folder: Path,
    final: Path,
    strength: float,
    unit: str,
    scope: str,
) -> str:
    """Write the files of one target; gives the name of the one that a program is given. `final` is
    what the folder will be called."""
    if target == "lm-eval" and isinstance(what, SteeringVector):
        from steering.export.lm_eval import write_lm_eval

        write_lm_eval(folder / "steered.pt", what, strength, unit)
        return "steered.pt"
    if target == "vllm-lens":
        from steering.export.vllm_lens import request_fields, to_vllm_lens

        entry = to_vllm_lens(what, strength, unit)
        files.write_json(folder / "steering.json", entry)
        files.write_json(folder / "request.json", request_fields(entry))
        return "steering.json"
    offsets = block_offsets(what, strength, unit, target=target)
    if target == "vllm-hook":
        from steering.export.vllm_hook import write_vllm_hook

        if what.origin.model_type in ELSEWHERE:
            raise Unsupported(
                f"vLLM-Hook looks for blocks at model.layers, and {what.origin.model_type} has them "
                "elsewhere: it would hook nothing and go on; export with --to vllm-lens"
            )
        write_vllm_hook(folder, offsets, vector_path=str(final / "vector.pt"))
        return "steering.json"
    from steering.export.control_vector import write_control_vector

    said = {"strength": repr(float(strength)), "unit": unit}
    write_control_vector(
        folder / "vector.gguf", offsets, what.origin, said, block_0=target == "easysteer"
    )
    if target == "easysteer":
        from steering.export.easysteer import write_easysteer

        write_easysteer(folder, offsets, source="vector.gguf", scope=scope)  # pyright: ignore[reportArgumentType]
        return "steering.json"
    return "vector.gguf"


def _recorded(
    folder: Path,
    what: SteeringVector | HeadOffsets,
    target: str,
    file: str,
    strength: float,
    unit: str,
    scope: str,
) -> None:
    written = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".safetensors")
    hashes = {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in written
    }
    what.save(folder / RECORD / "source.safetensors")
    done = Export(folder, target, file, float(strength), unit, scope, what.origin.model, hashes)
    plain = asdict(done)
    del plain["folder"]
    files.write_json(folder / RECORD / "export.json", {"format": FORMAT, **plain})


def read_export(folder: Path | str) -> Export:
    """The record of an export. Raises `ValueError` where it is damaged, or where a file is no
    longer the one that was written."""
    folder = Path(folder)
    path = folder / RECORD / "export.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no export of this project (there is no {RECORD}/export.json): give the "
            "folder that `alignlens export` wrote, or a file together with --vector"
        )
    try:
        said: dict[str, Any] = json.loads(path.read_text())
        version = said.pop("format")
        if version != FORMAT:
            raise ValueError(f"its format is {version}, this version reads {FORMAT}")
        found = Export(folder, **said)
        for name in (found.file, *found.hashes.keys()):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"it names a file outside of it, {name!r}")
        if found.target not in TARGETS:
            raise ValueError(f"its target is {found.target!r}")
        if found.unit not in ("raw", "unit", "fraction", "sigma"):
            raise ValueError(f"its unit is {found.unit!r}")
        if not math.isfinite(found.strength):
            raise ValueError(f"its strength is {found.strength}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the export in {folder} is damaged: {error}") from error
    for name, digest in found.hashes.items():
        there = folder / name
        if not there.is_file() or hashlib.sha256(there.read_bytes()).hexdigest() != digest:
            raise ValueError(
                f"{there} is missing, or is not the file that was exported: export again, or verify "
                "the file itself together with --vector"
            )
    return found


def load_artefact(path: Path | str) -> SteeringVector | HeadOffsets:
    """A steering vector or head offsets, whichever the file holds."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_file():
        try:
            with safe_open(path, "pt") as opened:
                kind = (opened.metadata() or {}).get("kind")
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error
        if kind == OFFSETS:
            return HeadOffsets.load(path)
    return SteeringVector.load(path)
