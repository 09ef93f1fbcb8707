"""Weights by layer and module type, and intervals that take layers for a sample."""

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from probes.scores import Interval, bca
from probes.splits import codes

By = Literal["everything", "layer", "kind", "tensor"]


class Place(NamedTuple):
    """Where a weight stands in its model."""

    stack: str
    """What the name has before the layer's number, where a model has several such stacks of layers
    (vision and text, encoder and decoder); else empty."""
    layer: int | None
    kind: str
    """Module type, with the stack in front where there are several."""

    @property
    def group(self) -> str:
        """Name of the layer; a weight outside the layers is one of its own."""
        if self.layer is None:
            return self.kind
        return f"{self.stack}.{self.layer}" if self.stack else str(self.layer)


def place(tensor: str) -> tuple[int | None, str]:
    """Layer and module type of a weight: `model.layers.3.mlp.up_proj.weight` is (3,
    "mlp.up_proj"), `model.norm.weight` is (None, "model.norm"). Biases keep their ending.

    Of a model with several stacks of layers two weights may have the same: see `places`.
    """
    _, layer, kind = _parted(tensor)
    return layer, kind


def places(tensors: Sequence[str]) -> list[Place]:
    """The place of each weight of one model; no two weights have the same."""
    parted = [_parted(name) for name in tensors]
    if len({stack for stack, layer, _ in parted if layer is not None}) < 2:
        return [Place("", layer, kind) for _, layer, kind in parted]
    return [
        Place(stack, layer, kind if layer is None else f"{stack}.{kind}")
        for stack, layer, kind in parted
    ]


def grouped(tensors: Sequence[str], by: By) -> dict[str, list[int]]:
    """Positions of the weights of each layer ("none" outside them), module type, or weight."""
    if by not in ("everything", "layer", "kind", "tensor"):
        raise ValueError(f"unknown grouping {by!r}: choose everything, layer, kind or tensor")
    found: dict[str, list[int]] = {}
    for i, (name, at) in enumerate(zip(tensors, places(tensors), strict=True)):
        outside = "none" if at.layer is None else at.group
        keys = {"everything": "all", "layer": outside, "kind": at.kind, "tensor": name}
        found.setdefault(keys[by], []).append(i)
    return found


def layers_of(tensors: Sequence[str]) -> list[str]:
    """The layer of each weight; one outside them is a layer of its own."""
    return [at.group for at in places(tensors)]


def _parted(tensor: str) -> tuple[str, int | None, str]:
    """What a name has before the layer's number, the number, and what it has after it."""
    short = tensor.removesuffix(".weight")
    found = re.search(r"\.(\d+)\.", short)
    if found is None:
        return "", None, short
    return short[: found.start()], int(found[1]), short[found.end() :]


def ratio_over(
    numerator: Float[Tensor, " row"],
    denominator: Float[Tensor, " row"],
    groups: Sequence[str],
    resamples: int = 1000,
) -> Interval:
    """Sum over sum with its 95 % BCa interval over groups (layers, topics); with a denominator of
    ones it is a mean. It is `bca_bootstrap` of that ratio, all resamples at once. NaN limits where
    there is one group only."""
    value = numerator.double().sum() / denominator.double().sum()
    numbers, known = codes(groups)
    k = len(known)
    if k < 2:
        return Interval(float(value), math.nan, math.nan)
    above, below = (
        torch.zeros(k, dtype=torch.float64).index_add_(0, numbers, x.double())
        for x in (numerator, denominator)
    )
    drawn = torch.randint(k, (resamples, k), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(resamples, k, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    left = 1 - torch.eye(k, dtype=torch.float64)
    found = [(weights @ above) / (weights @ below) for weights in (counts, left)]
    limits = bca(value, found[0], found[1])
    return Interval(float(value), float(limits.low), float(limits.high))


def notes_of(tensors: Sequence[str], *given: Sequence[str]) -> tuple[str, ...]:
    """The notes given, each once, and one where there are fewer than 20 layers."""
    notes = list(dict.fromkeys(note for notes in given for note in notes))
    n = len(set(layers_of(tensors)))
    if 0 < n < 20:
        notes.append(f"Intervals over layers rest on {n} of them; 20 are advised.")
    return tuple(notes)
