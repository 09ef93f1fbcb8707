"""Which class and which configuration keep the weights of an edited model when they are loaded.

A bias that an architecture does not make is dropped on loading without an error. Whether one is
made is found out by construction: the modules are built without memory (on the meta device) under
the settings that could ask for it, and the names of their weights are looked at.
"""

import copy
from collections.abc import Collection, Iterable
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.sites import Unsupported

AS_LLAMA = ("mistral", "qwen2")
"""Architectures without a setting for biases that compute what Llama computes, with the same names
of weights, wherever no sliding window is used."""


class Form(NamedTuple):
    """What a checkpoint says of itself."""

    architecture: Any
    """Class of the model."""
    config: Any
    flags: tuple[str, ...]
    """Settings switched on so that biases are kept."""
    state: dict[str, Tensor]
    """Every weight of the class by name; biases that a flag brought along are zeros."""


def form_of(model: Any, state: dict[str, Tensor]) -> Form:
    """The form under which all of `state` is loaded again: the model's own, or Llama's.

    `state` is the state dict of `model`, whose modules may carry biases that its class would not
    make. Raises `Unsupported` with the reason where no form keeps them.
    """
    architecture, config = type(model), copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # left by files whose weights were dequantised
        del config.quantization_config
    own = names_of(architecture, config)
    # a bridge of TransformerLens gives a head without a bias one of zeros
    state = {name: t for name, t in state.items() if name in own or not _is_zero_bias(name, t)}
    flags = flags_for(architecture, config, state)
    if flags is not None:
        return _filled(architecture, with_flags(config, flags), flags, state)
    text, lost = config.get_text_config(), sorted(state.keys() - own)
    reason = f"no setting of {type(text).__name__} keeps {_some(lost)} on loading"
    if config.model_type in AS_LLAMA and architecture.__name__.endswith("ForCausalLM"):
        if window := _window(config):
            raise Unsupported(
                f"{reason}, and its sliding window of {window} tokens is one that "
                "LlamaForCausalLM, which would keep it, does not have"
            )
        from transformers import LlamaForCausalLM

        config = as_llama(config)
        flags = flags_for(LlamaForCausalLM, config, state)
        if flags is not None:
            return _filled(LlamaForCausalLM, with_flags(config, flags), flags, state)
    raise Unsupported(reason)


def flags_for(architecture: Any, config: Any, wanted: Iterable[str]) -> tuple[str, ...] | None:
    """The fewest settings, now False, under which the class has the weights `wanted`.

    `()` where it has them as it is, None where no settings give them. Settings that bring along
    weights other than biases are left out, because those have no neutral value.
    """
    wanted = set(wanted)
    if wanted <= names_of(architecture, config):
        return ()
    text = config.get_text_config()
    off = [name for name, value in text.to_dict().items() if "bias" in name and value is False]
    for n in range(1, len(off) + 1):
        fitting = []
        for flags in combinations(off, n):
            names = names_of(architecture, with_flags(config, flags))
            if wanted <= names and all(name.endswith("bias") for name in names - wanted):
                fitting.append((len(names), flags))
        if fitting:
            return min(fitting)[1]
    return None


def names_of(architecture: Any, config: Any) -> set[str]:
    """Names of all weights of a class under a configuration."""
    with torch.device("meta"):
        return set(architecture(copy.deepcopy(config)).state_dict())


def with_flags(config: Any, flags: Collection[str]) -> Any:
    """A copy of a configuration with settings of its language model switched on."""
    config = copy.deepcopy(config)
    for flag in flags:
        setattr(config.get_text_config(), flag, True)
    return config


def as_llama(config: Any) -> Any:
    """The settings of a Mistral or Qwen 2 without a sliding window as those of a Llama."""
    from transformers import LlamaConfig

    known = LlamaConfig.__dataclass_fields__.keys() - {"architectures", "transformers_version"}
    kept = {name: value for name, value in config.to_dict().items() if name in known}
    return LlamaConfig(**kept)


def _window(config: Any) -> int | None:
    """Tokens that attention reaches back in some layer, None where it reaches all."""
    kinds = getattr(config, "layer_types", None)
    return None if kinds and "sliding_attention" not in kinds else config.sliding_window


def _filled(
    architecture: Any, config: Any, flags: tuple[str, ...], state: dict[str, Tensor]
) -> Form:
    with torch.device("meta"):
        wanted = architecture(copy.deepcopy(config)).state_dict()
    whole = {}
    for name, shape in ((name, tensor.shape) for name, tensor in wanted.items()):
        if name in state:
            whole[name] = state[name]
        else:
            beside = state.get(name.removesuffix("bias") + "weight", next(iter(state.values())))
            whole[name] = torch.zeros(shape, dtype=beside.dtype)
    return Form(architecture, config, flags, whole)


def _is_zero_bias(name: str, tensor: Tensor) -> bool:
    return name.endswith("bias") and not bool(tensor.any())


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
