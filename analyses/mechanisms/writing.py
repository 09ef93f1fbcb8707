"""Which heads can write along a direction, and which carry it from one token to another.

Said by weights alone, for all inputs at once: what a head's output projection has along the
direction, and what comes out along it when it goes in (the OV circuit, Elhage et al. 2021). What a
head does write on some prompts is `analyses.mechanisms.direct`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken
from analyses.mechanisms.direct_terms import vector_of
from analyses.mechanisms.frozen import frozen_norm, linear_map
from analyses.mechanisms.reading import described
from analyses.patching.figure import heat_map
from probes.directions import Direction
from probes.model import HookedModel
from probes.results import Result
from probes.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

DRAWS = 100
"""Isotropic directions of the null: its 95th percentile is a number of its own for every head."""


@dataclass(frozen=True)
class WritingDirections(Result):
    """How strongly each head's weights write along a direction, beside random directions."""

    model: str
    other: str | None
    """The checkpoint whose numbers were subtracted; None: one model alone."""
    write: Float[Tensor, "layer head"]
    """‖W_O^T d‖ for the unit direction d: the largest write along d for head outputs of norm 1;
    NaN where there is no such head."""
    gain: Float[Tensor, "layer head"]
    """d^T W_O W_V d': what a head gives along d for one unit of d' in what it reads, behind the
    block's norm; negative where it turns d' round. NaN where no projection gives values."""
    write_null: Float[Tensor, "draw layer head"]
    """The same for isotropic unit directions in place of d."""
    gain_null: Float[Tensor, "draw layer head"]
    """The same with isotropic directions in place of both d and d'."""

    def claimed(self, what: str = "write") -> tuple[str, ...]:
        """Heads, as `layer.head`, whose size lies above the 95th percentile of their null's; of n
        heads n / 20 do by chance, of which there is no correction here."""
        value, bound = self._of(what)
        found = (value.abs() > bound).nonzero().tolist()
        return tuple(f"{layer}.{head}" for layer, head in found)

    def frame(self) -> "pd.DataFrame":
        """One row a head."""
        import pandas as pd

        rows = []
        for layer, head in self.write.isfinite().nonzero().tolist():
            row: dict[str, Any] = {"layer": layer, "head": head}
            for what in ("write", "gain"):
                value, bound = self._of(what)
                row[what] = float(value[layer, head])
                row[f"{what} null 95"] = float(bound[layer, head])
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None, what: str = "write") -> "Axes":
        """Every head, in units of its null's 95th percentile."""
        value, bound = self._of(what)
        said = {"write": "write along d", "gain": "gain from d' to d"}[what]
        who = self.model if self.other is None else f"{self.model} minus {self.other}"
        return heat_map(
            ax,
            value / bound.where(bound > 0, torch.nan),
            layers=range(len(value)),
            columns=[str(h) for h in range(value.shape[1])],
            xlabel="head",
            label=f"{said} (95th percentile of random directions = 1)",
            title=broken(f"Weights of {who}"),
        )

    def _of(self, what: str) -> tuple[Tensor, Tensor]:
        if what not in ("write", "gain"):
            raise ValueError(f"what={what!r}: choose 'write' or 'gain'")
        value, null = getattr(self, what), getattr(self, f"{what}_null")
        # a head that does not exist is NaN in every draw
        return value, null.abs().double().nanquantile(0.95, dim=0).float()

    def __str__(self) -> str:
        n = int(self.write.isfinite().sum())
        who = self.model if self.other is None else f"{self.model} minus {self.other}"
        if self.other is not None and not bool(self.write.nan_to_num(0).any()):
            return f"{who}: the weights of all {n} heads write exactly alike"
        found = self.claimed()
        best = self.write.abs().nan_to_num(-1.0).flatten().argmax().item()
        layer, head = divmod(int(best), self.write.shape[1])
        return (
            f"{who}: {len(found)} of {n} heads write along the direction more than 95 % of random "
            f"directions; most of all {layer}.{head} ({float(self.write[layer, head]):.3g})"
        )


def writing_directions(
    model: HookedModel,
    direction: "Direction | Float[Tensor, ' d_model']",
    read: "Direction | Float[Tensor, ' d_model'] | None" = None,
    *,
    other: HookedModel | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> WritingDirections:
    """Scan every head for what it writes along `direction` (d), and gains from `read` (d', or d).

    Directions are made unit vectors. A post-norm between projection and stream acts by its gain and
    centring alone, its scale taken as 1. The norm in front of the block is left out: d' is what the
    value projection is given. Grouped heads share their group's values, and fused projections are
    cut as the layout says. With `other` its numbers are subtracted, and so in every draw.
    """
    if draws < 20:
        raise ValueError(f"{draws} random directions give no 95th percentile: give 20 or more")
    pair = [vector_of(v, model) for v in (direction, direction if read is None else read)]
    d, back = (v / v.norm() for v in pair)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(2, draws, model.d_model, generator=generator, dtype=torch.float64)
    random = random / random.norm(dim=-1, keepdim=True)
    given = torch.cat([torch.stack([d, back])[:, None], random], 1)
    write, gain = _scan(model, *given)
    if other is not None:
        if (other.n_layers, other.d_model) != (model.n_layers, model.d_model):
            raise ValueError(
                f"{model.name} and {other.name} have different shapes: compare checkpoints of one "
                "model"
            )
        its_write, its_gain = _scan(other, *given)
        write, gain = write - its_write, gain - its_gain
    models = [model] if other is None else [model, other]
    return WritingDirections(
        model=model.label,
        other=None if other is None else other.label,
        write=write[0].float(),
        gain=gain[0].float(),
        write_null=write[1:].float(),
        gain_null=gain[1:].float(),
        record=described(models, [], {"draws": draws, "seed": seed}),
    )


def _scan(model: HookedModel, d: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """Write and gain `[direction, layer, head]` of the paired rows of two sets of directions."""
    layers = range(model.n_layers)
    has = model.layout.supported("head_out")
    if not has:
        raise ValueError(f"{model.name} has no attention heads: there is nothing to scan")
    most = max(model.layout.blocks[layer].heads["head_out"] for layer in has)
    write = torch.full((len(d), len(layers), most), torch.nan, dtype=torch.float64)
    gain = write.clone()
    for layer in has:
        W = output_heads(model, layer)(d)  # direction, head, width
        write[:, layer, : W.shape[1]] = W.norm(dim=-1)
        V = value_heads(model, layer)
        if V is not None:
            v = torch.einsum("nd,dhw->nhw", back, V)
            gain[:, layer, : W.shape[1]] = (W * v).sum(-1)
    return write, gain


def output_heads(model: HookedModel, layer: int) -> Callable[[Tensor], Tensor]:
    """Function from directions `[n, d_model]` to W_O^T d of each head, `[n, head, width]`."""
    block, root = model.layout.blocks[layer], _root(model)
    point = block.points["head_out"]
    assert point.split is not None
    n, width = point.split.n_heads, point.split.width
    W, b = linear_map(root.get_submodule(point.path), n * width)
    out = block.points["attn_out"]
    norm = None
    if out.path not in (point.path, block.attention):
        some = torch.eye(model.d_model, dtype=torch.float64)[:4] + b
        norm = frozen_norm(root.get_submodule(out.path), some, out.path)

    def pull(d: Tensor) -> Tensor:
        if norm is not None:
            d = d * norm.gain
            d = d - d.mean(-1, keepdim=True) if norm.centred else d
        return (out.scale * d @ W.T).reshape(len(d), n, width)

    return pull


def value_heads(model: HookedModel, layer: int) -> Float[Tensor, "d_model head width"] | None:
    """W_V of every query head, those of a group repeated; None where no projection gives values."""
    block = model.layout.blocks[layer]
    if "v" in block.refused or "v" not in block.points:
        return None
    point = model.layout.point(Site(layer, "v"))
    assert point.split is not None
    W, _ = linear_map(_root(model).get_submodule(point.path), model.d_model)
    groups = point.split.read(W)
    heads, width = block.heads["head_out"], block.widths["head_out"]
    if groups.shape[-1] != width or heads % groups.shape[1]:
        return None  # values that are not what a head passes on
    return groups.repeat_interleave(heads // groups.shape[1], 1)


def _root(model: HookedModel) -> Any:
    return model.model
