"""Weights by layer and module type, and intervals that take layers for a sample."""

import math
import re
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from probes.scores import Interval, bca
from probes.splits import codes

By = Literal["everything", "layer", "kind", "tensor"]


def place(tensor: str) -> tuple[int | None, str]:
    """Layer and module type of a weight: `model.layers.3.mlp.up_proj.weight` is (3,
    "mlp.up_proj"), `model.norm.weight` is (None, "model.norm"). Biases keep their ending."""
    short = tensor.removesuffix(".weight")
    found = re.search(r"\.(\d+)\.", short)
    return (int(found[1]), short[found.end() :]) if found else (None, short)


def grouped(tensors: Sequence[str], by: By) -> dict[str, list[int]]:
    """Positions of the weights of each layer ("none" outside them), module type, or weight."""
    if by not in ("everything", "layer", "kind", "tensor"):
        raise ValueError(f"unknown grouping {by!r}: choose everything, layer, kind or tensor")
    found: dict[str, list[int]] = {}
    for i, name in enumerate(tensors):
        layer, kind = place(name)
        outside = "none" if layer is None else str(layer)
        keys = {"everything": "all", "layer": outside, "kind": kind, "tensor": name}
        found.setdefault(keys[by], []).append(i)
    return found


def layers_of(tensors: Sequence[str]) -> list[str]:
    """The layer of each weight; one outside them is a layer of its own."""
    return [kind if layer is None else str(layer) for layer, kind in map(place, tensors)]


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
