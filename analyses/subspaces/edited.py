"""Aligned checkpoints with a projected update in their weights: in memory, or as a folder."""

import copy
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analyses.subspaces.deltas import Deltas, changes, together
from analyses.subspaces.projections import (
    Directions,
    Of,
    Part,
    Subspace,
    dense,
    projection,
    seeded,
    square,
)
from analyses.subspaces.sources import open_folder
from probes import files, names
from probes.model import HookedModel
from probes.state import state_of

_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"),
    *(".npz", ".tflite", ".onnx_data"),
}
"""Endings of files that hold the weights as they were, in whatever form."""
_INDICES = (".bin.index.json", ".h5.index.json", ".msgpack.index.json")


@dataclass(frozen=True)
class Projected:
    """Which part of an update is applied to the aligned weights (see `projections`)."""

    fraction: float
    subspace: Subspace = "top-k"
    part: Part = "parallel"
    of: Of = "size"
    matched: bool = False
    """Whether each weight's part is rescaled to the norm of its whole update."""
    seed: int = 0
    """Of the random subspaces."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"a fraction of {self.fraction:g} was asked: give one above 0, at most 1 (25 % is "
                "0.25)"
            )

    def __str__(self) -> str:
        end = " matched" if self.matched else ""
        end += f" #{self.seed}" if self.subspace != "top-k" else ""
        return f"{self.part} {self.subspace} {self.fraction:g}{end}"


def applied(
    V: Deltas, U: Deltas, what: Projected | None, directions: Directions | None = None
) -> Iterator[tuple[str, Tensor, float, float]]:
    """Weight by weight what is added to the aligned model, with its squared norm and that of U.

    None adds the whole update, which gives the tuned model. Weights without a change are left out.
    `directions` keeps decompositions of V for further calls with the same V.
    """
    for name, (v, u) in changes(together(V, U), V, U):
        UU = square(u)
        if not UU:
            continue
        if what is None:
            yield name, dense(u).float(), UU, UU
            continue
        P = projection(
            u,
            v,
            what.fraction,
            what.subspace,
            what.part,
            of=what.of,
            matched=what.matched,
            generator=seeded(what.seed, name),
            directions=directions,
            name=name,
        )
        yield name, P, float(P.double().square().sum()), UU


def edited_model(
    aligned: HookedModel,
    V: Deltas,
    U: Deltas,
    what: Projected | None,
    directions: Directions | None = None,
) -> tuple[HookedModel, float]:
    """A copy of the aligned model with the projected update added, and E: the squared norm of what
    was added over that of the update.

    The model given stays as it is. Sums are formed in float32 and rounded to the weights' dtype.
    """
    model = copy.deepcopy(aligned.model)
    held = state_of(model)
    added = whole = 0.0
    with torch.no_grad():
        for name, P, PP, UU in applied(V, U, what, directions):
            _add(held, name, P, aligned.name)
            added, whole = added + PP, whole + UU
    template = aligned.template if aligned.tokenizer is not None else None
    edited = HookedModel(
        model,
        aligned.tokenizer,
        engine=aligned.engine.name,
        template=None if template is None else template.source,
        template_arguments=None if template is None else template.arguments,
        name=f"{aligned.name} ({what or 'whole update'})",
    )
    return edited, added / whole if whole else 0.0


def check_new(folder: Path) -> None:
    """Refuse a place where something is already."""
    if folder.exists():
        raise FileExistsError(
            f"there is something at {folder} already, and a checkpoint is never written over: "
            "give another folder, or remove it"
        )


def write_edited(
    aligned: HookedModel | str | Path,
    V: Deltas,
    U: Deltas,
    what: Projected | None,
    folder: Path | str,
) -> Path:
    """Write the aligned model with the projected update as a folder that transformers loads.

    A folder of safetensors shards (or such a checkpoint of the Hub) is rewritten shard by shard, so
    memory holds one shard; a model in memory, an adapter on its base, and a built-in model are
    edited as a copy. Nothing is left at `folder` when it fails. What was done stands in
    `projection.json`; tied weights get the edit of the one they are tied to.
    """
    folder = Path(folder)
    check_new(folder)
    note: dict[str, Any] = {"alignment": str(V), "update": str(U), "applied": None}
    if what is not None:
        note["applied"] = asdict(what)
    parsed = None if isinstance(aligned, HookedModel) else names.parse(str(aligned))
    with files.folder(folder) as temporary:
        if parsed is None or parsed.adapter or parsed.gguf:
            source = aligned if isinstance(aligned, HookedModel) else None
            model = source or HookedModel.load(str(aligned), device="cpu")
            edited, _ = edited_model(model, V, U, what)
            saved: Any = edited.model
            saved.save_pretrained(temporary)
            if edited.tokenizer is not None:
                edited.tokenizer.save_pretrained(temporary)
        else:
            _rewrite(parsed, V, U, what, temporary)
        files.write_json(temporary / "projection.json", note)
    return folder


def _rewrite(
    parsed: names.Name, V: Deltas, U: Deltas, what: Projected | None, target: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder, where, tied = open_folder(parsed)
    listed = together(V, U)
    missing = [name for name in listed if name not in where]
    if missing:
        raise ValueError(
            f"{parsed.label} has no weight {missing[0]!r}, which the update changes: give the "
            "aligned checkpoint that the update starts from"
        )
    for path in folder.iterdir():
        held_there = path.suffix in _WEIGHTS or path.name.endswith(_INDICES)
        if path.is_file() and not held_there:
            shutil.copyfile(path, target / path.name)
    for shard in sorted(set(where.values())):
        with safe_open(folder / shard, "pt") as file:
            held = {name: file.get_tensor(name) for name, own in where.items() if own == shard}
            metadata = file.metadata()
        # those changed here, and those tied to one that is changed
        wanted = {tied.get(name, name) for name in held} & set(listed)
        for name, P, _, _ in applied(_only(V, wanted), _only(U, wanted), what):
            for at in held:
                if tied.get(at, at) == name:
                    _add(held, at, P, parsed.label)
        save_file(held, target / shard, metadata=metadata or {"format": "pt"})
        files.sync_directory(target)


def _only(deltas: Deltas, wanted: set[str]) -> Deltas:
    shapes = {name: shape for name, shape in deltas.shapes.items() if name in wanted}
    return replace(deltas, shapes=shapes)


def _add(held: Mapping[str, Tensor], name: str, P: Tensor, label: str) -> None:
    """Add to the first rows of a weight, in place; a vocabulary may have been cut to fewer."""
    weight = held.get(name)
    if weight is None or weight.shape[1:] != P.shape[1:] or weight.shape[:1] < P.shape[:1]:
        raise ValueError(
            f"{label} has no weight {name!r} of shape {tuple(P.shape)}: give the aligned "
            "checkpoint that the update starts from"
        )
    rows = weight[: P.shape[0]] if P.dim() else weight
    rows.copy_((rows.float() + P.to(rows.device)).to(rows.dtype))
