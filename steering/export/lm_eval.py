"""A steering vector for the model `steered` of lm-evaluation-harness: `--model_args steer_path=`.

Read at v0.4.8 to v0.4.12 (`lm_eval/models/hf_steered.py`). A `.pt` holds a dict of module names
under `model.base_model` with what is done to the module's output at every token:
`add` is `h + coefficient * vector`, `clamp` sets the coordinate along the vector's unit to the
coefficient, counted from `bias` where there is one.

One module a file: up to v0.4.9.1 every `add` in a file took the last module's vector and
coefficient (a function made in a loop), silently.
"""

import io
from pathlib import Path

import torch
from torch import Tensor

from probes import files
from probes.sites import Site, Unsupported
from steering import ops
from steering.export.blocks import block_offsets
from steering.vector import SteeringVector

TARGET = "lm-evaluation-harness"

LISTS = {
    "bloom": "h",
    "falcon": "h",
    "gpt2": "h",
    "gpt_neo": "h",
    "gptj": "h",
    "opt": "decoder.layers",
}
"""Name of the list of blocks where it is not `layers`, by architecture."""


def write_lm_eval(
    path: Path | str,
    what: SteeringVector,
    strength: float = 1.0,
    unit: str = "raw",
    *,
    hookpoint: str | None = None,
) -> Path:
    """Write the `.pt`. `add` is exact at the output of a block (`block_offsets`), and so are
    `clamp`, `ablate` and `affine` along one vector at one `resid_post`, in full strength.

    `hookpoint` is the block's module under `model.base_model`; without it `layers.K`, `h.K` for
    the architectures in `LISTS`. The file loads with `weights_only=True`; the strength is
    multiplied into the vector, and the coefficient of `add` is 1.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path}: lm-evaluation-harness reads vectors from .pt or .pth")
    if len(what.sites) != 1:
        raise Unsupported(
            f"{TARGET} up to 0.4.9.1 gives several hookpoints of a file the last one's vector, and "
            f"this has {len(what.sites)} sites: choose one with `vector.at('12.resid_post')`, or "
            "export a checkpoint with --to checkpoint and evaluate that"
        )
    if what.operation in ("clamp", "ablate", "affine"):
        layer, vector, coefficient, bias = _clamped(what, strength, unit)
        action = "clamp"
    else:
        ((layer, vector),) = block_offsets(what, strength, unit, target=TARGET).items()
        action, coefficient, bias = "add", 1.0, None
    entry = {
        "steering_vector": vector,
        "steering_coefficient": coefficient,
        "action": action,
        "bias": bias,  # up to 0.4.9.1 it is looked up, so it must be there
    }
    module = hookpoint or f"{LISTS.get(what.origin.model_type, 'layers')}.{layer}"
    buffer = io.BytesIO()
    torch.save({module: entry}, buffer)
    files.write_bytes(path, buffer.getvalue())
    return path


def _clamped(
    what: SteeringVector, strength: float, unit: str
) -> tuple[int, Tensor, float, Tensor | None]:
    """Block, unit vector, coordinate and what it is counted from."""
    ((site, vector),) = what.vectors.items()
    if site != Site(site.layer, "resid_post"):
        raise Unsupported(
            f"{TARGET} clamps outputs of blocks: {what.operation} at {site} is none, move the "
            "vector to resid_post or steer live"
        )
    rows = ops.orthonormal(vector)
    if len(rows) != 1:
        raise Unsupported(
            f"{TARGET} clamps along one vector, {site} has {len(rows)}: no export is exactly equal"
        )
    if strength != 1 or unit != "raw":
        raise Unsupported(
            f"{TARGET} clamps in full: {what.operation} of strength {strength:g} in {unit!r} cannot "
            "be said; give strength 1"
        )
    value = what.values.get(site)
    if what.operation == "affine" and value is not None:
        return site.layer, rows[0], 0.0, value.detach().cpu().float().clone()
    return site.layer, rows[0], 0.0 if value is None else float(value[0]), None
