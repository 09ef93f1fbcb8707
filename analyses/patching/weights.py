"""Weight patching: a part of one checkpoint's weights put into another, and taken out again exactly.

Unlike a patched activation, a patched weight acts on whatever reaches it: it says what a module
does, not what it did on one prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from analyses.patching.sources import same_shape
from probes.model import HookedModel
from probes.sites import HEADED, Site, Sites, Unsupported
from steering.writers import check_plain

STREAM = {"resid_pre", "resid_mid", "remainder", "pattern"}
"""Parts that no weights of their own stand for."""


@contextmanager
def patched_weights(target: HookedModel, source: HookedModel, what: Sites) -> Iterator[HookedModel]:
    """While open, `target` has the weights of `source` at the sites named; then its own, bit for
    bit, whatever happened inside.

    `L.resid_post` is the whole block L, `L.attn_out` its attention, `L.mlp_out` what it holds
    besides attention and norms; `L.q`, `L.k`, `L.v` are the rows of the projections, `L.head_out`
    the columns of the output projection without its bias, of all heads or of the one named. The
    change is made in place: other users of the same weights see it, and `target.fingerprint`, if
    it was asked for before, is that of the weights outside.
    """
    new = replacement(target, source, what)
    held = dict(target.model.named_parameters())
    before = {name: held[name].detach().clone() for name in new}
    with torch.no_grad():
        try:
            for name, value in new.items():
                held[name].copy_(value)
            yield target
        finally:
            for name, value in before.items():
                held[name].copy_(value)


def replacement(target: HookedModel, source: HookedModel, what: Sites) -> dict[str, Tensor]:
    """What `patched_weights` writes: parameter name -> whole new value; only those that differ."""
    same_shape(target, source)
    for model in (target, source):
        check_plain(model.model)
    mine, other = dict(target.model.named_parameters()), dict(source.model.named_parameters())
    if mine.keys() != other.keys() or any(mine[n].shape != other[n].shape for n in mine):
        odd = sorted(mine.keys() ^ other.keys()) or [
            n for n in mine if mine[n].shape != other[n].shape
        ]
        raise ValueError(
            f"{target.name} and {source.name} do not have the same weights (the first that differs "
            f"is {odd[0]}): merge adapters, and give checkpoints of one model"
        )
    new: dict[str, Tensor] = {}
    for site in target.sites(what):
        _check(target, site)
        if site.part in HEADED:
            _slice(target, mine, other, new, site)
            continue
        for name in _names(target, site):
            new[name] = other[name].detach().to(mine[name])
    return {name: value for name, value in new.items() if not torch.equal(value, mine[name])}


def _check(model: HookedModel, site: Site) -> None:
    if site.part in STREAM:
        raise Unsupported(
            f"{site} has no weights of its own: name resid_post (the block), attn_out, mlp_out, "
            "head_out, q, k or v"
        )
    points = model.layout.blocks[site.layer].points
    fused = "q" in points and "k" in points and points["q"].path == points["k"].path
    if model.engine.name == "transformer_lens" and fused and site.part != "mlp_out":
        raise Unsupported(
            f"TransformerLens copies the fused projection {points['q'].path} and would not see it "
            "change: use the engine 'transformers' or 'nnsight'"
        )


def _names(model: HookedModel, site: Site) -> list[str]:
    """Parameters of a whole block, its attention, or the rest without norms."""
    block = model.layout.blocks[site.layer]
    root: Any = model.model
    inside = [n for n, _ in root.named_parameters() if n.startswith(f"{block.path}.")]
    attention = [n for n in inside if n.startswith(f"{block.attention}.")]
    if site.part == "resid_post":
        return inside
    if site.part == "attn_out":
        return attention

    def norm(name: str) -> bool:
        return "Norm" in type(root.get_submodule(name.rpartition(".")[0])).__name__

    return [n for n in inside if n not in attention and not norm(n)]


def _slice(
    target: HookedModel,
    mine: dict[str, nn.Parameter],
    other: dict[str, nn.Parameter],
    new: dict[str, Tensor],
    site: Site,
) -> None:
    """Rows of a projection, or columns of the output projection, that belong to a head."""
    point = target.layout.point(site)
    assert point.split is not None
    module = target.model.get_submodule(point.path)
    if not isinstance(module, nn.Linear | Conv1D):
        raise Unsupported(
            f"{point.path} is a {type(module).__name__}, whose weights cannot be cut by heads: "
            f"patch {site.layer}.attn_out"
        )
    # a linear map is stored [out, in], GPT-2's [in, out]; the heads have to lie in the last axis
    turned = isinstance(module, nn.Linear) == (point.side == "output")
    ends = ["weight"] + (["bias"] if point.side == "output" and module.bias is not None else [])
    for end in ends:
        name = f"{point.path}.{end}"
        flip = turned and end == "weight"
        old = new.get(name, mine[name].detach())
        have, give = (t.T if flip else t for t in (old, other[name].detach().to(old)))
        heads, given = point.split.read(have).clone(), point.split.read(give)
        at = slice(None) if site.head is None else site.head
        heads[..., at, :] = given[..., at, :]
        made = point.split.write(have.contiguous(), heads)
        new[name] = (made.T if flip else made).contiguous()
