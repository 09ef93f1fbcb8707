"""A short forward pass with every module's input and output kept, as evidence for the layout."""

from typing import Any

import torch
from torch import Tensor, nn

N_TOKENS = 6


def first_tensor(value: Any) -> Tensor | None:
    """The tensor a module takes or gives: itself, or the first one in a tuple."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list):
        for item in value:
            if isinstance(item, Tensor):
                return item
    return None


def linear_width(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map of any library; None for other modules.

    Quantised layers (bitsandbytes, GPTQ, AWQ, torchao) and adapters name their sizes like
    `nn.Linear` or without the underscore; GPT-2's `Conv1D` keeps its weight transposed.
    """
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        sizes = [getattr(module, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return sizes[0], sizes[1]  # pyright: ignore[reportReturnType]
    if type(module).__name__ == "Conv1D" and isinstance(
        weight := getattr(module, "weight", 0), Tensor
    ):
        return weight.shape[0], weight.shape[1]
    return None


class Trace:
    """Inputs and outputs of all modules under the layer list, in float64, with their order."""

    def __init__(self, eps: float) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._order: dict[tuple[str, str], int] = {}
        self._eps = eps

    def keep(self, path: str, side: str, tensor: Tensor | None) -> None:
        store = self._inputs if side == "input" else self._outputs
        self._order.setdefault((path, side), len(self._order))
        if tensor is not None and tensor.is_floating_point() and path not in store:
            # a copy: some blocks add into their MLP's output in place
            store[path] = tensor.detach().to("cpu", torch.float64, copy=True)

    def has(self, path: str) -> bool:
        return path in self._inputs and path in self._outputs

    def input(self, path: str) -> Tensor:
        return self._inputs[path]

    def output(self, path: str) -> Tensor:
        return self._outputs[path]

    def order(self, path: str, side: str) -> int:
        return self._order[path, side]

    def same_width(self, path: str, x: Tensor) -> bool:
        """Whether the module gives one vector of x's width per token."""
        return path in self._outputs and self._outputs[path].numel() == x.numel()

    def error(self, a: Tensor, b: Tensor) -> float:
        """Largest error of one token, relative to the larger vector's norm there."""
        size = torch.maximum(a.norm(dim=-1), b.norm(dim=-1)).clamp(min=1e-30)
        return ((a - b).norm(dim=-1) / size).max().item()

    def close(self, a: Tensor, b: Tensor) -> bool:
        """Equal to rounding in the model's own dtype."""
        return a.shape == b.shape and self.error(a, b) <= 16 * self._eps

    def input_is(self, path: str, tensor: Tensor) -> bool:
        known = self._inputs.get(path)
        return (
            known is not None
            and known.numel() == tensor.numel()
            and self.close(known.reshape(tensor.shape), tensor)
        )

    def output_is(self, path: str, tensor: Tensor) -> bool:
        known = self._outputs.get(path)
        return (
            known is not None
            and known.numel() == tensor.numel()
            and self.close(known.reshape(tensor.shape), tensor)
        )


def watch(model: Any, layers_path: str) -> Trace:
    """Run the model once on a few arbitrary tokens and keep what its blocks saw and gave."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    trace = Trace(torch.finfo(dtype).eps)
    handles = []
    layers = model.get_submodule(layers_path)
    device = next(model.parameters()).device
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(5, 5 + N_TOKENS, device="cpu")[None] % vocab
    try:
        for name, module in layers.named_modules():
            if not name:
                continue
            path = f"{layers_path}.{name}"

            def before(_module, args, kwargs, path=path):
                given = first_tensor(args)
                if given is None:
                    given = first_tensor(list(kwargs.values()))
                trace.keep(path, "input", given)

            def after(_module, _args, output, path=path):
                trace.keep(path, "output", first_tensor(output))

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        device = torch.device("cpu") if device.type == "meta" else device
        model(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids).to(device),
            use_cache=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    return trace
