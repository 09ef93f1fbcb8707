"""What a server can add: one constant vector at the output of a decoder block."""

import torch
from jaxtyping import Float
from torch import Tensor

from probes.sites import Site, Unsupported
from steering.edits import Scale, multiplier
from steering.offsets import HeadOffsets
from steering.vector import SteeringVector

SCALED_AFTER = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text")
"""Architectures that do more than add between what the MLP gives and the output of the block."""


def block_offsets(
    what: SteeringVector | HeadOffsets, strength: float = 1.0, unit: str = "raw", *, target: str
) -> dict[int, Float[Tensor, " d_model"]]:
    """Vectors added to the outputs of blocks, float32 by 0-based block, strength multiplied in.

    Exactly equal sites are converted: what is added to `resid_pre` of block k is added to the
    output of block k-1, what is added to `mlp_out` to the output of its own block (nothing but a
    sum stands between, save in Gemma 3n and 4). Several sites that meet at one block add up.

    Raises `Unsupported`, naming `target`, for everything that is no constant offset of a block's
    output, with the nearest target that can hold it exactly.
    """
    if isinstance(what, HeadOffsets):
        raise Unsupported(
            f"{target} adds vectors to the outputs of blocks, and head offsets act before the MLP "
            "of their block: export them with --to checkpoint, where a bias of the attention "
            "output projection is exactly equal"
        )
    if what.operation == "ablate":
        raise Unsupported(
            f"{target} adds a constant vector, and ablation depends on the activation: export it "
            "with --to checkpoint, where orthogonalised weights are exactly equal to ablating at "
            "every write"
        )
    if what.operation != "add":
        raise Unsupported(
            f"{target} adds a constant vector, and {what.operation!r} depends on the activation: no "
            "export is exactly equal; steer live, or make a vector for 'add'"
        )
    if not strength:
        raise ValueError(
            f"strength 0 exported for {target} would change nothing: give another strength"
        )
    found: dict[int, Tensor] = {}
    for site, raw in what.vectors.items():
        layer = _block(site, what, target)
        scale = multiplier(unit, raw, what.scales.get(site, Scale()), site)
        added = strength * scale * raw.detach().cpu().double()
        found[layer] = found[layer] + added if layer in found else added
    offsets = {layer: vector.float() for layer, vector in sorted(found.items())}
    for layer, vector in offsets.items():
        if not bool(torch.isfinite(vector).all()):
            raise ValueError(f"strength {strength:g} makes the vector at block {layer} overflow")
    return offsets


def _block(site: Site, what: SteeringVector, target: str) -> int:
    if site.part == "resid_post":
        return site.layer
    if site.part == "resid_pre":
        if site.layer == 0:
            raise Unsupported(
                f"{site} is the embedding, and {target} adds to the outputs of blocks: no export is "
                "exactly equal; steer live, or use a vector of 0.resid_post"
            )
        return site.layer - 1
    if site.part == "mlp_out" and what.origin.model_type not in SCALED_AFTER:
        return site.layer
    exact = (
        "export it with --to checkpoint, where a bias is exactly equal"
        if site.part in ("attn_out", "resid_mid", "head_out")
        else "no export is exactly equal; steer live"
    )
    raise Unsupported(f"{target} adds vectors to the outputs of blocks, not at {site}: {exact}")
