"""Where each activation lives in a model's module tree, found from the modules themselves.

One short forward pass is watched. Its tensors say which module writes what: the attention output
projection is the last linear map whose output *is* the attention's output, a post-norm is the
module whose input is that output, the MLP is the child whose output completes the residual sum.
Nothing is taken from names where the values decide it, and what does not add up is refused with
the part of the module tree in question. No other file knows module paths.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from probes.layout_heads import Split, head_points
from probes.layout_trace import Trace, linear_width, watch
from probes.results import check_finite
from probes.sites import HEADED, Site, Sites, Unsupported, expand

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mamba", "mixer")
"""Names of a block's token mixer, in order of preference."""

HEADLESS = ("linear_attn", "mamba", "mixer")
"""Mixers whose output projection has no attention heads in front of it."""

TOWERS = ("vision", "visual", "audio", "image", "speech")
"""Module names under which layer lists belong to another modality."""


@dataclass(frozen=True)
class Point:
    """One end of one module: where a part is read and written."""

    path: str
    side: str
    """"input" or "output"; the first tensor of either."""
    order: int
    """Place in the sequence of all module inputs and outputs of a forward pass."""
    scale: float = 1.0
    """The part is this times the tensor (residual multipliers)."""
    split: Split | None = None
    """How heads lie in the last axis; None for parts without heads."""


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    path: str
    attention: str
    points: Mapping[str, Point]
    refused: Mapping[str, str]
    """Parts this block lacks, with the reason."""
    heads: Mapping[str, int]
    """Number of heads of each headed part."""
    widths: Mapping[str, int]
    """Size of the last axis of each part; of one head for headed parts."""
    sums: bool
    """Whether resid_pre + attn_out + mlp_out == resid_post."""


@dataclass(frozen=True)
class Layout:
    """The addresses of one model's activations."""

    blocks: tuple[Block, ...]
    d_model: int
    vocab_size: int
    architecture: str
    shares_prefix: bool
    """Whether every mixer keeps plain keys and values, so that a common prefix can be reused."""
    model_type: str

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def sites(self, sites: Sites) -> tuple[Site, ...]:
        """All sites named (`probes.sites.expand`), each checked to exist in this model."""
        found = expand(sites, self.n_layers)
        for site in found:
            self.check(site)
        return found

    def check(self, site: Site) -> None:
        """Raise `Unsupported` with the reason when the model has no such activation."""
        if not 0 <= site.layer < self.n_layers:
            site.resolve(self.n_layers)
            raise ValueError(f"resolve {site} with `layout.sites` first")
        block = self.blocks[site.layer]
        if site.part in block.refused:
            raise Unsupported(f"{site} does not exist here: {block.refused[site.part]}")
        if site.head is not None and site.head >= block.heads[site.part]:
            raise ValueError(
                f"site {site} is out of range: layer {site.layer} has {block.heads[site.part]} "
                f"heads of {site.part}, 0 to {block.heads[site.part] - 1}"
            )

    def point(self, site: Site) -> Point:
        """The module end where a part other than `remainder` and `pattern` is computed."""
        self.check(site)
        return self.blocks[site.layer].points[site.part]

    def width(self, site: Site) -> int:
        """Size of the site's last axis."""
        self.check(site)
        return self.blocks[site.layer].widths[site.part]

    def order(self, site: Site) -> int:
        """Place of a site (not a remainder) in the sequence of a forward pass."""
        points = self.blocks[site.layer].points
        return points["attn_out" if site.part == "pattern" else site.part].order

    def supported(self, part: str) -> tuple[int, ...]:
        """Layers that have this part."""
        return tuple(i for i, block in enumerate(self.blocks) if part not in block.refused)


@torch.no_grad()
def resolve(model: Any) -> Layout:
    """Find the layout of a transformers causal language model in evaluation mode."""
    config = model.config
    text = config.get_text_config()
    architecture = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(
            f"{architecture} is an encoder-decoder; alignlens reads decoder-only language models"
        )
    if model.training:
        raise ValueError(
            f"{architecture} is in training mode, where dropout changes values: "
            "call model.eval() first"
        )
    path = _layer_list(model, text.num_hidden_layers)
    layers = model.get_submodule(path)
    trace = watch(model, path)
    blocks = tuple(
        _block(model, text, f"{path}.{i}", trace)
        for i in range(len(layers))  # pyright: ignore
    )
    shares = all(block.attention.rsplit(".", 1)[-1] not in HEADLESS for block in blocks)
    return Layout(
        blocks=blocks,
        d_model=trace.input(f"{path}.0").shape[-1],
        vocab_size=text.vocab_size,
        architecture=architecture,
        shares_prefix=shares,
        model_type=config.model_type,
    )


def _layer_list(model: nn.Module, n_layers: int) -> str:
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and not any(tower in piece for piece in name.split(".") for tower in TOWERS)
        and any(_attention_child(child) for child in module[:1])
    ]
    if len(found) != 1:
        lists = [
            f"{name} ({len(module)})"
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
        ]
        raise Unsupported(
            f"cannot find the decoder blocks of {type(model).__name__}: expected one ModuleList of "
            f"{n_layers} blocks with attention, found {len(found)}; its lists are "
            f"{', '.join(lists) or 'none'}"
        )
    return found[0]


def _attention_child(block: nn.Module) -> str | None:
    """Path of the mixer inside a block: the shallowest child with a known name or class."""
    named = dict(block.named_modules())
    by_depth = sorted((name for name in named if name), key=lambda name: name.count("."))
    for name in by_depth:
        last = name.rsplit(".", 1)[-1]
        if last in ATTENTION or "Attention" in type(named[name]).__name__:
            return name
    return None


def _block(model: nn.Module, text, path: str, trace: Trace) -> Block:
    block = model.get_submodule(path)
    child = _attention_child(block)
    if child is None:
        raise Unsupported(f"cannot find the attention of {path}:\n{_tree(block)}")
    attention = f"{path}.{child}"
    x, y = trace.input(path), trace.output(path)
    check_finite(y, f"the output of {path} on a few arbitrary tokens")
    scale = float(getattr(block, "residual_multiplier", 1.0))
    points = {
        "resid_pre": Point(path, "input", trace.order(path, "input")),
        "resid_post": Point(path, "output", trace.order(path, "output")),
    }
    refused: dict[str, str] = {}

    children = [f"{path}.{name}" for name, _ in block.named_children()]
    written = _after_norms(trace, attention, children, x)
    a = trace.output(written) * scale
    points["attn_out"] = Point(written, "output", trace.order(written, "output"), scale)
    sums = True
    others = [c for c in children if c not in (written, attention) and trace.same_width(c, x)]
    errors = {c: trace.error(x + a + scale * trace.output(c).reshape(x.shape), y) for c in others}
    # in half precision an MLP may add less than what counts as close, and yet the sum needs it
    if trace.close(x + a, y) and trace.error(x + a, y) <= min(errors.values(), default=math.inf):
        refused["mlp_out"] = refused["resid_mid"] = (
            f"the blocks of {type(model).__name__} have one mixer and no MLP"
        )
    else:
        mlp = min(errors, key=errors.__getitem__, default=None)
        if mlp is None or not trace.close(x + a + scale * trace.output(mlp).reshape(x.shape), y):
            # Gemma 4 adds a per-layer input and rescales the sum: known, exposed as remainder
            if not hasattr(block, "layer_scalar"):
                raise Unsupported(
                    f"the residual sum of {path} does not close: resid_pre + attn_out + (any "
                    f"child) != resid_post. Its modules are\n{_tree(block)}"
                )
            mlp = _after_norms(trace, f"{path}.mlp", children, x + a)
            if mlp == f"{path}.mlp":
                mlp = f"{path}.post_feedforward_layernorm"
            sums = False
        points["mlp_out"] = Point(mlp, "output", trace.order(mlp, "output"), scale)
        wrote = points["attn_out"].order
        later = [c for c in children if trace.has(c) and trace.order(c, "input") > wrote]
        middle = _reader(trace, later, x + a, other=x)
        if middle:
            points["resid_mid"] = Point(middle, "input", trace.order(middle, "input"))
        else:
            refused["resid_mid"] = (
                f"{type(model).__name__} runs attention and MLP in parallel, so nothing lies "
                "between them"
            )

    heads: dict[str, int] = {}
    streams = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "remainder")
    widths: dict[str, int] = dict.fromkeys(streams, x.shape[-1])
    if child.rsplit(".", 1)[-1] in HEADLESS:
        reason = f"{path} mixes tokens by {type(model.get_submodule(attention)).__name__}, "
        refused |= dict.fromkeys(HEADED, reason + "which has no attention heads")
    else:
        projection = _output_projection(model, attention, trace)
        found, why = head_points(model, text, attention, projection, trace)
        refused |= why
        for part, (where, side, split) in found.items():
            points[part] = Point(where, side, trace.order(where, side), 1.0, split)
            heads[part], widths[part] = split.n_heads, split.width
        heads["pattern"], widths["pattern"] = heads["head_out"], 0
    return Block(
        path,
        attention,
        MappingProxyType(points),
        MappingProxyType(refused),
        MappingProxyType(heads),
        MappingProxyType(widths),
        sums,
    )


def _after_norms(trace: Trace, path: str, children: list[str], x: Tensor) -> str:
    """The module whose output joins the stream `x`: `path`, or the post-norm that reads it."""
    out = trace.output(path)
    others = [child for child in children if child != path]
    return _reader(trace, others, out, other=x + out.reshape(x.shape)) or path


def _reader(trace: Trace, children: list[str], tensor: Tensor, other: Tensor) -> str | None:
    """The child whose input is `tensor`: of several that are close to it, as in half precision they
    may all be, the nearest, and none that is nearer to the `other` tensor."""
    errors = {}
    for child in children:
        if trace.has(child) and trace.input_is(child, tensor):
            given = trace.input(child).reshape(tensor.shape)
            if trace.error(given, tensor) <= trace.error(given, other.reshape(tensor.shape)):
                errors[child] = trace.error(given, tensor)
    return min(errors, key=errors.__getitem__, default=None)


def _output_projection(model: nn.Module, attention: str, trace: Trace) -> str:
    target = trace.output(attention)
    found = None
    for name, module in model.get_submodule(attention).named_modules():
        path = f"{attention}.{name}"
        if name and linear_width(module) and trace.has(path) and trace.output_is(path, target):
            found = path
    if found is None:
        raise Unsupported(
            f"cannot find the output projection of {attention}: no linear map inside gives its "
            f"output. Its modules are\n{_tree(model.get_submodule(attention))}"
        )
    return found


def _tree(module: nn.Module) -> str:
    return "\n".join(
        f"  {'  ' * name.count('.')}{name.rsplit('.', 1)[-1]}: {type(child).__name__}"
        for name, child in module.named_modules()
        if name
    )
