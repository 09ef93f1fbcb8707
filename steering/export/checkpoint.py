"""Steering baked into a checkpoint: a folder that any program loads as an ordinary model.

The edited weights come from `steering.weights`. Added here are the configuration that keeps them
on loading (`steering.export.repackage`), the files, and a proof made with the files themselves: the
folder is loaded by plain transformers, and its logits are compared with those of the live edit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes import files
from probes.model import HookedModel
from probes.sites import Site, Unsupported
from steering.applied import Steering
from steering.edits import Scale, multiplier
from steering.export.blocks import block_offsets
from steering.export.checkpoint_check import Loading as Loading
from steering.export.checkpoint_check import check_loading as check_loading
from steering.export.checkpoint_files import write
from steering.export.checkpoint_proof import prove, reference
from steering.export.repackage import Form, form_of
from steering.offsets import HeadOffsets
from steering.vector import SteeringVector
from steering.weights import fold_offsets, fold_vector, orthogonalise
from steering.writers import check_plain


@dataclass(frozen=True)
class Baked:
    """What was written, and the proof: differences of logits on a few arbitrary tokens.

    Both are taken in float32, from half-precision weights too, which are widened for it.
    """

    folder: Path
    how: str
    """What carries the edit, and the settings that keep it: "bias of
    model.layers.12.mlp.down_proj (mlp_bias=True)"."""
    architecture: str
    """Class written into the configuration."""
    error: float
    """Largest absolute difference, the folder loaded by plain transformers against the live edit.
    In half precision it holds the rounding of the edited weights."""
    effect: float
    """Largest absolute difference of the live edit against no edit."""
    loading: Loading

    def __str__(self) -> str:
        of = "those of the model"
        if self.effect:
            of = f"the live edit, which moves them by {self.effect:.2g}"
        return (
            f"{self.architecture} in {self.folder}: {self.how}; loaded again its logits are "
            f"within {self.error:.1e} of {of}"
        )


def bake(
    model: HookedModel,
    what: SteeringVector | HeadOffsets | None,
    folder: Path | str,
    strength: float = 1.0,
    unit: str = "raw",
) -> Baked:
    """Write the model with the edit in its weights, for all tokens of prompts and answers.

    A vector for 'add' becomes biases (`fold_vector`), so do head offsets (`fold_offsets`); a
    vector for 'ablate' at one site, or `everywhere`, is taken out of every weight that writes to
    the residual stream (`orthogonalise`). None writes the model as it is: a merged adapter, a file
    of llama.cpp. Weights keep the model's dtype and are split into about as many files as those it
    was loaded from; the tokenizer keeps its own chat template. Image and audio processors of
    multimodal models are not written.

    Nothing is left at `folder` unless the proof holds (else `RuntimeError`): every weight is loaded
    again bit for bit, none is missing or left out, and the logits agree within 1e-4 (for logits up
    to 10, beyond in proportion) and within half of what the edit does. Half precision is compared
    in float32 and allowed 16 units of its precision, for the rounding of edited weights.

    Raises `Unsupported` for an operation that depends on the activation, for quantised weights,
    and where the architecture keeps no such bias; `FileExistsError` where something is at `folder`.
    Memory: two more copies of the model, in float32.
    """
    folder = Path(folder)
    _check_free(folder)
    check_plain(model.model)
    asked = _asked(model, what, strength, unit)
    expected = reference(model, () if asked is None else asked.edits(model))
    edited, form = _held(model, asked)
    how = _how(model, edited, form, asked)
    with files.folder(folder) as temporary:
        write(model, form, temporary)
        loading, error, effect = prove(model, form, temporary, expected, asked is not None)
        if folder.exists():  # it was empty: the rename needs the name free
            _check_free(folder)
            folder.rmdir()
    return Baked(folder, how, form.architecture.__name__, error, effect, loading)


def _check_free(folder: Path) -> None:
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if not empty and (folder.exists() or folder.is_symlink()):
        raise FileExistsError(
            f"there is something at {folder} already, and a checkpoint is never written over: "
            "give another folder, or remove it"
        )


def _asked(
    model: HookedModel,
    what: SteeringVector | HeadOffsets | None,
    strength: float,
    unit: str,
) -> Steering | None:
    """The live steering that the checkpoint must equal; ablation is that at every write."""
    if what is None:
        if strength != 1.0 or unit != "raw":
            raise ValueError(
                "a strength and a unit belong to a vector or head offsets, and none is given: "
                "leave them out to write the model as it is"
            )
        return None
    if not strength:
        raise ValueError(
            "strength 0 changes nothing: give another strength, or None instead of the vector to "
            "write the model as it is"
        )
    if isinstance(what, HeadOffsets) or what.operation == "add":
        return Steering(what, strength, unit)
    if what.operation == "ablate":
        first = what.at(str(what.sites[0]))
        everywhere = first.everywhere(model)
        already = what.sites == everywhere.sites and all(
            torch.equal(vector, everywhere[site]) for site, vector in what.vectors.items()
        )
        # several sites that are not that are refused there
        return Steering(everywhere if already else what.everywhere(model), strength, unit)
    raise Unsupported(
        f"weights add a constant or lack a direction, and {what.operation!r} depends on the "
        "activation in another way: no checkpoint is exactly equal; steer live, or make a vector "
        "for 'add' or 'ablate'"
    )


def _held(model: HookedModel, asked: Steering | None) -> tuple[HookedModel, Form]:
    """The model with the edit in weights that are loaded again, and how they are."""
    ways = [lambda: _edited(model, asked)]
    beside = None if asked is None else _beside(model, asked)
    if beside is not None:
        ways.append(lambda: fold_vector(model, beside))
    refused = []
    for way in ways:
        try:
            edited = way()
            return edited, form_of(edited.model, edited.model.state_dict())
        except Unsupported as error:
            refused.append(error)
    raise Unsupported(_refusal(model, asked, refused[0])) from refused[0]


def _edited(model: HookedModel, asked: Steering | None) -> HookedModel:
    if asked is None:
        return model
    if isinstance(asked.what, HeadOffsets):
        return fold_offsets(model, asked.what, asked.strength, asked.unit)
    if asked.what.operation == "add":
        return fold_vector(model, asked.what, asked.strength, asked.unit)
    one = asked.what.at(str(asked.what.sites[0]))
    return orthogonalise(model, one, asked.strength)


def _beside(model: HookedModel, asked: Steering) -> SteeringVector | None:
    """The same added by attention where it was to be by the MLP, which in parallel blocks is one.

    Where only the attention output can have a bias (Cohere) that is the way. The strength is
    multiplied in. None where there is no such block.
    """
    if isinstance(asked.what, HeadOffsets) or asked.what.operation != "add":
        return None
    moved: dict[Site, Tensor] = {}
    for site, raw in asked.what.vectors.items():
        layer = site.layer - 1 if site.part == "resid_pre" else site.layer
        block = model.layout.blocks[layer] if layer >= 0 else None
        parallel = block is not None and "resid_mid" in block.refused
        if parallel and site.part in ("resid_pre", "mlp_out", "resid_post"):
            to = Site(layer, "attn_out")
        else:
            to = site
        scale = multiplier(asked.unit, raw, asked.what.scales.get(site, Scale()), site)
        added = asked.strength * scale * raw
        moved[to] = moved[to] + added if to in moved else added
    if moved.keys() == asked.what.vectors.keys():
        return None
    return SteeringVector(moved, asked.what.origin)


def _how(model: HookedModel, edited: HookedModel, form: Form, asked: Steering | None) -> str:
    """Which weights carry the edit, and what keeps them."""
    if asked is None:
        how = "the model as it is"
    else:
        before, after = model.model.state_dict(), edited.model.state_dict()
        names = [
            name
            for name, tensor in after.items()
            if name not in before or not torch.equal(tensor, before[name])
        ]
        if isinstance(asked.what, SteeringVector) and asked.what.operation == "ablate":
            how = f"ablation at every write to the residual stream, in {len(names)} weights"
        else:
            paths = [name.removesuffix("bias").rstrip("._") for name in names]
            how = "bias of " + ", ".join(paths[:3])
            how += f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    settings = [f"{flag}=True" for flag in form.flags]
    config: Any = model.model.config
    if form.config.tie_word_embeddings != config.tie_word_embeddings:
        settings.append("tie_word_embeddings=False")
    how += f" ({', '.join(settings)})" if settings else ""
    if form.architecture is not type(model.model):
        how += f", written as {form.architecture.__name__}"
    return how


def _refusal(model: HookedModel, asked: Steering | None, error: Unsupported) -> str:
    """What was asked, why a checkpoint cannot hold it, and what holds it exactly."""
    kind = type(model.model).__name__
    if asked is None:
        return f"a checkpoint of {kind} cannot hold it as it is: {error}"
    if isinstance(asked.what, HeadOffsets):
        n = len(asked.what.heads)
        what = f"offsets at {n} head{'s' if n > 1 else ''}"
    elif asked.what.operation == "ablate":
        what = "ablation at every write"
    else:
        what = f"a vector at {', '.join(map(str, asked.what.sites[:3]))}"
        what += ", ..." if len(asked.what.sites) > 3 else ""
    exact = "" if "steer it live" in str(error) else "; steer it live (`steering.steer`)"
    try:
        block_offsets(asked.what, asked.strength, asked.unit, target="a server")
    except Unsupported:
        pass
    else:
        exact = (
            "; what holds it exactly: a control vector of llama.cpp or a vector for vllm-lens, "
            "which are added to the outputs of blocks"
        )
    return f"a checkpoint of {kind} cannot hold {what}: {error}{exact}"
