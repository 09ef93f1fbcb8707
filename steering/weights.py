"""Edits of weights that equal edits of activations: what is served needs no hooks.

Every function gives a new `HookedModel` over a copy; the caller's model stays as it is, to the bit.
Before the copy is handed out its logits are compared with those of the same edit made live
(`steering.copies`), so a copy that does something else, or nothing, is an error and not a result.

Memory: the copy. In bfloat16 and float16 it is float32 while it is edited and compared, twice the
size of the model, and the model's own size again when it is handed out.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.model import HookedModel
from probes.sites import Site, Unsupported
from steering import ops
from steering.artefact import Origin
from steering.copies import EditedCopy
from steering.copies import agreement as agreement
from steering.edits import Scale, multiplier
from steering.offsets import HeadOffsets
from steering.vector import SteeringVector
from steering.writers import Writers


def orthogonalise(
    model: HookedModel, what: SteeringVector | Float[Tensor, "*rank width"], strength: float = 1.0
) -> HookedModel:
    """A copy whose weights cannot write a subspace: `steer(model, vector.everywhere(model))`.

    Token embeddings, learned positions, attention (or mixer) output projections and every MLP's or
    expert's last map lose it, their biases too: `W <- (I - strength Q'Q) W` (Arditi et al. 2024,
    section 4.1, where biases are left out). `what` is a steering vector with one site, a vector,
    or the rows of a subspace; its length and sign do not matter. The unembedding reads and is left
    alone: where it is tied to the embedding it gets a copy of its own first. Multipliers on the
    residual (Granite) change nothing. Image or audio features of a multimodal model are not edited.

    Refused where a norm stands before the stream (Gemma 2 to 4, OLMo 2) and on quantised weights.
    """
    if isinstance(what, SteeringVector):
        what.origin.check(model)
        if len(what.vectors) != 1:
            raise ValueError(
                f"one vector is taken out of the weights, this has {len(what.vectors)}: choose a "
                "site with `at`"
            )
        (what,) = what.vectors.values()
    if what.shape[-1] != model.d_model:
        raise ValueError(
            f"the vector has width {what.shape[-1]}, the residual stream of {model.name} "
            f"{model.d_model}: give a vector of the stream"
        )
    basis = ops.orthonormal(what)
    vector = SteeringVector({Site(0, "resid_pre"): basis}, Origin.of(model), "ablate")
    twin = EditedCopy(model, vector.everywhere(model).edits(model, strength))
    writers = Writers(twin.model, model.layout)
    targets = [
        pair
        for layer, block in enumerate(model.layout.blocks)
        for part in ("attn_out", "mlp_out")
        if part in block.points
        for writer in writers.of(layer, part)
        for pair in writer.tensors()
    ]
    embeddings = writers.embeddings()
    if strength:
        _untie(twin.model)
        targets += [(module.weight, 1) for module in embeddings]
        for tensor, axis in targets:
            _project_out(tensor.data, axis, basis, strength)
    return twin.checked("orthogonalised")


def fold_offsets(
    model: HookedModel, offsets: HeadOffsets, strength: float = 1.0, unit: str = "raw"
) -> HookedModel:
    """A copy whose attention output projections carry the offsets in their bias, for all tokens.

    `o(z + v) = o(z) + sum_h W_O[:, h] v_h`, so that sum is the bias (the released ITI code adds the
    offset itself, which is in the basis of the heads). A bias is made where there is none. To keep
    it in a checkpoint the configuration must ask for one when it is loaded: `attention_bias` of
    Llama, Qwen 3, Granite and others (the biases of q, k and v that it brings are then zeros),
    nothing for GPT-2, OPT and GPT-NeoX; some architectures have no such flag, and biases without
    one are dropped on loading with no error. Norms behind the projection are no obstacle here.
    """
    twin = EditedCopy(model, offsets.edits(model, strength, unit))
    writers = Writers(twin.model, model.layout)
    if strength:
        for layer in sorted({layer for layer, _ in offsets.heads}):
            rows = strength * offsets.layer(layer, unit).double()
            _fold_heads(writers, layer, rows)
    return twin.checked("offsets folded")


def fold_vector(
    model: HookedModel, vector: SteeringVector, strength: float = 1.0, unit: str = "raw"
) -> HookedModel:
    """A copy that adds the vector at every token without hooks, by biases.

    What a site needs: `attn_out` and `resid_mid` a bias of the attention output projection;
    `mlp_out` and `resid_post` one of the MLP's last map, in parallel blocks either; `resid_pre`
    that of the layer before; a head of `head_out` as in `fold_offsets`. Residual multipliers are
    divided out. Of mixtures of experts only those whose experts have biases and whose router
    weights add up to 1 can carry it (GPT-OSS).

    Configuration flags a checkpoint needs to keep the bias: `mlp_bias` (Llama, SmolLM3, Granite),
    `bias` (Falcon), `use_bias` (Mamba), `attention_bias` for the attention output; none for GPT-2,
    OPT, GPT-NeoX and GPT-OSS. Without it the bias is dropped on loading and nothing is said.
    """
    if vector.operation != "add":
        raise ValueError(
            f"a bias can add and nothing else, this vector is for {vector.operation!r}: fold a "
            "vector for 'add', or see `orthogonalise` for ablation"
        )
    for site in vector.sites:
        model.layout.check(site)
    twin = EditedCopy(model, vector.edits(model, strength, unit))
    writers = Writers(twin.model, model.layout)
    for site, raw in vector.vectors.items() if strength else ():
        size = strength * multiplier(unit, raw, vector.scales.get(site, Scale()), site)
        _fold_site(writers, site, size * raw.double())
    return twin.checked("vector folded")


def _fold_site(writers: Writers, site: Site, added: Tensor) -> None:
    layout = writers.layout
    if site.part == "head_out" and site.head is not None:
        block = layout.blocks[site.layer]
        rows = torch.zeros(block.heads["head_out"], len(added), dtype=torch.float64)
        rows[site.head] = added
        return _fold_heads(writers, site.layer, rows)
    layer = site.layer - 1 if site.part == "resid_pre" else site.layer
    if layer < 0:
        raise Unsupported(
            f"{site} is the embedding itself, where no bias is added: fold at 0.resid_post, or "
            "steer live"
        )
    if site.part not in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
        raise Unsupported(
            f"{site} is no part of the residual stream: biases are folded at resid_pre, resid_mid, "
            "resid_post, attn_out, mlp_out and head_out"
        )
    refused = layout.blocks[layer].refused
    wanted = "mlp_out" if site.part in ("resid_pre", "resid_post", "mlp_out") else "attn_out"
    if site.part != "mlp_out" and "mlp_out" in refused:  # one mixer is all that the block adds
        wanted = "attn_out"
    found = writers.of(layer, wanted)
    if len(found) > 1 or found[0].weight != "weight":
        parallel = "resid_mid" in refused
        if site.part in ("resid_pre", "resid_post") and parallel:
            wanted, found = "attn_out", writers.of(layer, "attn_out")
        elif not all(getattr(w.module, w.bias, None) is not None for w in found):
            raise Unsupported(
                f"{site} is written by a mixture of experts without biases ({found[0].path}), "
                "through which no constant passes unweighted: fold at attn_out or head_out, or "
                "steer live"
            )
    scale = layout.blocks[layer].points[wanted].scale
    for writer in found:
        writer.add_bias(added / scale)


def _fold_heads(writers: Writers, layer: int, rows: Float[Tensor, "head head_dim"]) -> None:
    writer = writers.attention(layer)
    weight = getattr(writer.module, writer.weight).detach().double()
    W = weight if writer.axis == 0 else weight.T
    writer.add_bias(W @ rows.flatten().to(W))


def _project_out(
    tensor: Tensor, axis: int, basis: Float[Tensor, "rank d_model"], strength: float
) -> None:
    """Take the subspace out along one axis, in place, in float64 and a piece at a time."""
    if tensor.ndim == 3:  # experts, one by one
        for one in tensor:
            _project_out(one, axis - 1, basis, strength)
        return
    Q = basis.to(tensor.device).double()
    for rows in tensor.movedim(axis, -1).split(8192):
        whole = rows.double()
        rows.copy_(ops.ablate(whole, Q, strength))


def _untie(twin: Any) -> None:
    """Give a tied unembedding its own weight, and say so in the configuration."""
    head, embedding = twin.get_output_embeddings(), twin.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
    for config in (twin.config, twin.config.get_text_config()):
        config.tie_word_embeddings = False
    if hasattr(twin, "get_expanded_tied_weights_keys"):  # what saving leaves out
        twin.all_tied_weights_keys = twin.get_expanded_tied_weights_keys(all_submodels=True)
