"""The stream as a sum of terms, and each term's product with vectors of the stream."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.mechanisms import reading
from analyses.mechanisms.frozen import FrozenNorm, frozen_norm, linear_map
from probes.directions import Direction
from probes.model import HookedModel
from probes.prompts import Rendered
from probes.sites import Site


class Products(NamedTuple):
    """Products of every term with one vector a prompt; several vectors at once."""

    embedding: Float[Tensor, "target prompt"]
    attention: Float[Tensor, "target layer prompt"]
    mlp: Float[Tensor, "target layer prompt"]
    """0 where a block has no MLP."""
    remainder: Float[Tensor, "target layer prompt"]
    """What a block adds beside attention and MLP; 0 in most architectures."""
    heads: Float[Tensor, "target layer head prompt"]
    """Parts of `attention`; NaN where there is no such head."""
    bias: Float[Tensor, "target layer prompt"]
    """What biases of the attention's output projection and post-norm add to `attention`; NaN where
    a layer has no heads."""


class Stream:
    """The terms of the stream that leaves a block, at one token of every prompt."""

    def __init__(
        self,
        model: HookedModel,
        rendered: Sequence[Rendered],
        at: Sequence[int],
        last: int,
    ) -> None:
        self.model, self.last = model, last
        layout = model.layout
        sites = [Site(0, "resid_pre"), Site(last, "resid_post")]
        for layer in range(last + 1):
            refused = layout.blocks[layer].refused
            sites += [
                Site(layer, part)
                for part in ("attn_out", "mlp_out", "head_out", "remainder")
                if part not in refused and (part != "remainder" or not layout.blocks[layer].sums)
            ]
        self.seen = reading.states(model, rendered, sorted(set(sites)), at)

    @property
    def state(self) -> Float[Tensor, "prompt d_model"]:
        """What leaves the last of the blocks."""
        return self.seen[Site(self.last, "resid_post")]

    def products(self, v: Float[Tensor, "target prompt d_model"]) -> Products:
        """Products with the vectors, float64."""
        n = range(self.last + 1)
        heads = [self._heads(layer, v) for layer in n]
        most = max((h.shape[1] for h, _ in heads), default=0)
        missing = torch.full((len(v), most, v.shape[1]), torch.nan, dtype=torch.float64)
        padded = [torch.cat([h, missing[:, h.shape[1] :]], 1) for h, _ in heads]

        def part(name: str) -> Tensor:
            return torch.stack([self._product(Site(layer, name), v) for layer in n], 1)

        return Products(
            embedding=self._product(Site(0, "resid_pre"), v),
            attention=part("attn_out"),
            mlp=part("mlp_out"),
            remainder=part("remainder"),
            heads=torch.stack(padded, 1),
            bias=torch.stack([b for _, b in heads], 1),
        )

    def _product(self, site: Site, v: Tensor) -> Tensor:
        if site not in self.seen:
            return torch.zeros(v.shape[:2], dtype=torch.float64)
        return torch.einsum("tpd,pd->tp", v, self.seen[site].double())

    def _heads(self, layer: int, v: Tensor) -> tuple[Tensor, Tensor]:
        """`[target, head, prompt]` and the share of the biases `[target, prompt]`."""
        site = Site(layer, "head_out")
        if site not in self.seen:
            nothing = torch.full(v.shape[:2], torch.nan, dtype=torch.float64)
            return torch.zeros(len(v), 0, v.shape[1], dtype=torch.float64), nothing
        z = self.seen[site].double()
        W, b, norm = output_map(self.model, layer, z.flatten(1))
        scale = self.model.layout.blocks[layer].points["attn_out"].scale
        before = v * scale
        bias = torch.zeros(v.shape[:2], dtype=torch.float64)
        if norm is not None:
            bias = before @ norm.bias
            before = norm.pulled(before)
        bias = bias + before @ b
        back = (before @ W.T).reshape(*v.shape[:2], *z.shape[1:])
        return torch.einsum("tphw,phw->thp", back, z), bias


def output_map(
    model: HookedModel, layer: int, z: Float[Tensor, "prompt width"]
) -> tuple[Float[Tensor, "width d_model"], Float[Tensor, " d_model"], FrozenNorm | None]:
    """The attention's output projection as matrix and bias, and the post-norm behind it with its
    scale held at the head outputs `z`; None where there is none."""
    block = model.layout.blocks[layer]
    path = block.points["head_out"].path
    root: Any = model.model
    W, b = linear_map(root.get_submodule(path), z.shape[-1])
    written = block.points["attn_out"].path
    if written in (path, block.attention):
        return W, b, None
    return W, b, frozen_norm(root.get_submodule(written), z.double() @ W + b, written)


def vector_of(
    given: "Direction | Float[Tensor, ' d_model']", model: HookedModel
) -> Float[Tensor, " d_model"]:
    """A direction of the stream in float64; another width, 0 and NaN are errors."""
    v = given.unit if isinstance(given, Direction) else given
    if v.shape != (model.d_model,) or not bool(v.isfinite().all()) or not bool(v.any()):
        raise ValueError(
            f"the direction has shape {tuple(v.shape)} and norm {float(v.norm()):.3g}: give a "
            f"finite vector of width {model.d_model} that is not 0"
        )
    return v.detach().double().cpu()


def isotropic(
    v: Float[Tensor, "prompt d_model"], draws: int, seed: int
) -> Float[Tensor, "draw prompt d_model"]:
    """Isotropic directions, each the same for all prompts, as long as each prompt's own."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(draws, 1, v.shape[-1], generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=-1, keepdim=True) * v.norm(dim=-1, keepdim=True)
