"""A checkpoint whose weights went through a number format and back: a change that means nothing."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.model import HookedModel


def bf16(weight: Float[Tensor, "*axis"]) -> Float[Tensor, "*axis"]:
    """Rounded to bfloat16 and back."""
    return weight.to(torch.bfloat16).to(weight.dtype)


def int8(weight: Float[Tensor, "*axis"]) -> Float[Tensor, "*axis"]:
    """Every row to 8-bit integers with its own scale (largest magnitude to 127) and back. Vectors
    (norms, biases) stay, as quantisers leave them."""
    if weight.ndim < 2:
        return weight
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / scale.clamp_min(torch.finfo(weight.dtype).tiny)).round() * scale


FORMATS = {"bf16": bf16, "int8": int8}


def round_trip(model: HookedModel, kind: str) -> HookedModel:
    """A copy with all floating point weights there and back; one of `FORMATS`."""
    if kind not in FORMATS:
        raise ValueError(f"unknown round trip {kind!r}: choose one of {', '.join(FORMATS)}")
    twin: nn.Module = copy.deepcopy(model.model)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.is_floating_point():
                weight.copy_(FORMATS[kind](weight))
    template = model.template if model.tokenizer is not None else None
    made = HookedModel(
        twin,
        model.tokenizer,
        engine=model.engine.name,
        template=None if template is None else template.source,
        template_arguments=None if template is None else template.arguments,
        name=f"{model.name} ({kind} round trip)",
    )
    made.label = f"{model.label}, {kind}"
    return made
