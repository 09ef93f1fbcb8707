"""The TransformerLens engine: reads and edits through the hook points of a `TransformerBridge`.

A bridge replaces the submodules of the model it wraps, so a plain model is never wrapped itself
but a twin: its own tree of modules over the same tensors. Where a module was stands a component
of the bridge with a hook point at each end, so the layout's module paths lead to hook points, and
the layout is translated once: in the translation, a point's path is the name of a hook point.
"""

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.engines import Batch, Edit, Keep, Where, whole
from probes.engines.modes import plain_generation, whole_prompt
from probes.engines.points import check_edits, edit_steps, in_order, needed, part, with_remainders
from probes.layout import Block, Layout, Point, resolve
from probes.layout_heads import plain
from probes.sites import Site, Unsupported

_level = logging.getLogger("transformers").level
with warnings.catch_warnings():  # its import quietens transformers for the whole process
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformer_lens.model_bridge.sources import build_bridge_from_module
logging.getLogger("transformers").setLevel(_level)


def _value(h: Tensor, point: Point, site: Site, shape: tuple[int, ...]) -> Tensor:
    """The part inside the tensor of a hook point, see `probes.engines.points.part`."""
    if site.part != "pattern":
        return part(h, point, site, shape)
    pattern = h.transpose(1, 2)
    return pattern if site.head is None else pattern[:, :, site.head]


class _Stop(Exception):
    """Ends a forward pass after the last value asked for."""


class LensEngine:
    """Runs a `TransformerBridge`, which computes attention explicitly ("eager").

    A plain transformers model is left alone and run through a twin that shares its tensors: what
    changes them in place is seen, except that bridges copy some fused attention projections. A
    bridge already in memory is run as it is, with the hooks it carries.
    """

    name = "transformer_lens"

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._open(_bridge(model), layout)

    @classmethod
    def of_bridge(cls, bridge: TransformerBridge, layout: Layout | None = None) -> "LensEngine":
        """The engine of a bridge in memory; `layout` is that of the model without the bridge."""
        engine = cls.__new__(cls)
        engine._open(bridge, layout or resolve(unwrapped(bridge)))
        return engine

    def _open(self, bridge: TransformerBridge, layout: Layout) -> None:
        self.bridge = bridge
        if self.bridge.compatibility_mode:
            raise Unsupported(
                "the bridge is in compatibility mode, where folded and centred weights give other "
                "activations than the checkpoint's: boot it without enable_compatibility_mode()"
            )
        self.layout = layout
        self._translated = replace(
            self.layout,
            blocks=tuple(_translate(self.bridge, block) for block in self.layout.blocks),
        )
        self._edits: tuple[Edit, ...] = ()
        takes = inspect.signature(self.bridge.original_model.forward).parameters
        self._positions, self._keeps_logits = "position_ids" in takes, "logits_to_keep" in takes

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.bridge.original_model.parameters()).device

    @property
    def edited(self) -> bool:
        """Whether any edit of `edit` is in force."""
        return bool(self._edits)

    @contextmanager
    def edit(self, edits: Sequence[Edit]) -> Iterator[None]:
        check_edits(self._translated, edits)
        before, self._edits = self._edits, (*self._edits, *edits)
        try:
            yield
        finally:
            self._edits = before

    @torch.no_grad()
    def read(self, batch: Batch, sites: Sequence[Site], keep: Keep = whole) -> dict[Site, Tensor]:
        batch = batch.to(self.device)
        with self._hooks(batch, sites, keep) as seen, suppress(_Stop):
            self._run(batch)
        return with_remainders(self._translated, sites, seen)

    @torch.no_grad()
    def logits(self, batch: Batch, last: int | None = None) -> Float[Tensor, "batch seq vocab"]:
        batch = batch.to(self.device)
        kept: dict[str, Tensor] = {}
        if last is not None and self._keeps_logits:
            # as an index, not a number: told a number, Gemma 4 drops tokens before its last layers
            kept["logits_to_keep"] = torch.arange(-min(last, batch.ids.shape[1]), 0)
        with self._hooks(batch, [], whole):
            logits = self._run(batch, **kept)
        return logits if last is None else logits[:, -last:]

    @torch.no_grad()
    def generate(
        self, batch: Batch, max_new_tokens: int, stop_ids: Sequence[int], pad_id: int
    ) -> Int[Tensor, "batch new"]:
        batch = batch.to(self.device)
        # what the bridge's own hf_generate calls, which however cannot do without a tokenizer
        model = self.bridge.original_model
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, **whole_prompt(model)}
        plainly = plain_generation(model, max_new_tokens, stop_ids, pad_id)
        with self._hooks(batch, [], whole, counting=True), plainly:
            out = model.generate(**inputs)  # pyright: ignore[reportCallIssue]
        return out[:, batch.ids.shape[1] :]

    def _run(self, batch: Batch, **options: Tensor) -> Tensor:
        if batch.visible is not None:
            raise ValueError("the transformer_lens engine takes one prompt in a row, not several")
        if self._positions:
            options["position_ids"] = batch.positions
        return self.bridge(batch.ids, attention_mask=batch.mask, use_cache=False, **options)

    @contextmanager
    def _hooks(
        self, batch: Batch, sites: Sequence[Site], keep: Keep, counting: bool = False
    ) -> Iterator[dict[Site, Tensor]]:
        """Hook the edits in force and the reads; gives the dict the reads fill."""
        seen: dict[Site, Tensor] = {}
        fired: set[str] = set()
        shape = tuple(batch.ids.shape)
        step = -1 if counting else 0

        def where() -> Where:
            return batch.where(step)

        def count(h: Tensor) -> Tensor:
            nonlocal step
            step += 1
            return h

        # by the name of the hook point; counting comes first in the first block
        steps: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        if counting:
            steps[self._translated.blocks[0].points["resid_pre"].path] = [count]
        for edit in in_order(self._edits):
            for point, change in edit_steps(self._translated, edit, where):
                steps.setdefault(point.path, []).append(change)
        wanted = needed(self._translated, sites)
        for site in wanted:
            point = self._translated.point(site)

            def read(h: Tensor, site: Site = site, point: Point = point) -> Tensor:
                seen[site] = keep(_value(h, point, site, shape))
                return h

            steps.setdefault(point.path, []).append(read)

        def through(h: Tensor, hook: HookPoint) -> Tensor | None:
            name = str(hook.name)
            fired.add(name)
            # the bridge shows some tensors with their last axis split into heads
            split = h.dim() == 4 and not name.endswith("hook_pattern")
            row = new = h.flatten(2) if split else h
            for function in steps[name]:
                new = function(new)
            if wanted and len(seen) == len(wanted):
                raise _Stop
            return None if new is row else new.reshape(h.shape)

        with self.bridge.hooks(fwd_hooks=[(name, through) for name in steps]):
            yield seen
        silent = [] if wanted and len(seen) == len(wanted) else sorted(steps.keys() - fired)
        if silent:
            raise Unsupported(
                f"TransformerLens never reached {', '.join(silent)} when it ran "
                f"{self.layout.architecture}, so nothing is read or edited there; use the engine "
                "'transformers' for these sites"
            )


def unwrapped(bridge: TransformerBridge) -> nn.Module:
    """The transformers model inside a bridge without the bridge, over the same tensors.

    The bridge is not changed. What is given back is a model of its own: `resolve` finds its
    layout, and hooks on it are not hooks on the bridge. It keeps the bias of zeros that a bridge
    gives to a head without one.
    """
    model = _twin(bridge.original_model)
    for module in list(model.modules()):
        if isinstance(module, GeneralizedComponent):
            continue
        for name, child in module.named_children():
            while isinstance(child, GeneralizedComponent) and child.original_component is not None:
                child = child.original_component
            setattr(module, name, child)
    return model


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the modules and of the configuration over the same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in shared):
        raise Unsupported(
            "some weights are offloaded, and TransformerLens cannot share those: load the model on "
            "one device, or use the engine 'transformers'"
        )
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _bridge(model: nn.Module) -> TransformerBridge:
    twin: Any = _twin(model)
    architecture = type(model).__name__
    twin.config._attn_implementation = "eager"  # and so in the configurations inside it
    try:
        return build_bridge_from_module(twin, architecture, hf_config=twin.config)
    except Exception as error:  # an unknown architecture, or any failure inside its adapter
        raise Unsupported(
            f"TransformerLens cannot wrap {architecture} ({type(error).__name__}: {error}); use "
            "the engine 'transformers'"
        ) from error


def _translate(bridge: TransformerBridge, block: Block) -> Block:
    """The block with hook points for module ends, and parts without one among the refused."""
    points: dict[str, Point] = {}
    refused = dict(block.refused)
    ends = dict(block.points)
    if "pattern" not in refused:
        ends["pattern"] = replace(ends["attn_out"], path=block.attention, scale=1.0, split=None)
    for name, point in ends.items():
        hook, translated = _end(bridge, block, name, point)
        if hook is not None and hook.name and bridge.get_hook_point(hook.name) is hook:
            points[name] = replace(translated, path=hook.name)
        else:
            refused[name] = f"TransformerLens has no hook point at the {point.side} of {point.path}"
    return replace(block, points=MappingProxyType(points), refused=MappingProxyType(refused))


def _end(
    bridge: TransformerBridge, block: Block, name: str, point: Point
) -> tuple[HookPoint | None, Point]:
    """The hook point where a part passes, and how the part lies in the tensor there."""
    attention = _component(bridge, block.attention)
    if name == "pattern":
        return getattr(attention, "hook_pattern", None), point
    component = _component(bridge, point.path)
    if point.split is not None and component is getattr(attention, "qkv", None):
        # a fused projection is cut into three when it is wrapped, and only the pieces run
        if next(component.original_component.children(), None) is not None:
            raise Unsupported(
                f"TransformerLens would leave out the adapter on the fused projection {point.path}:"
                " merge it into the weights, or use the engine 'transformers'"
            )
        component = getattr(attention, name)
        point = replace(point, split=plain(point.split.n_heads, point.split.width))
    elif isinstance(component, nn.Dropout):  # not wrapped, and changes nothing
        component = attention if name == "attn_out" else _component(bridge, f"{block.path}.mlp")
    elif not isinstance(component, GeneralizedComponent):  # GPT-2's c_proj is wrapped elsewhere
        for other in attention.modules():
            if isinstance(other, GeneralizedComponent) and other.original_component is component:
                component = other
    return getattr(component, "hook_in" if point.side == "input" else "hook_out", None), point


def _component(bridge: TransformerBridge, path: str) -> Any:
    """What stands at a module path; components pass on the names of what they wrap."""
    found = bridge.original_model
    for piece in path.split("."):
        found = getattr(found, piece)
    return found
