"""The nnsight engine: the same reads and edits as the reference engine, made by trace and edit.

A pass is a list of visits to module ends in the order in which the model reaches them; nnsight
runs the list beside the model and stops it after the last visit of a read.

What nnsight itself does stays done. Wrapping gives every module of the model a `forward` attribute
that does nothing outside a trace; parameters, configuration and outputs are as before. Importing
nnsight replaces `torch.Tensor.backward` and gives every Python object a method `save`. Its switch
for the latter, PYMOUNT, works from nnsight's configuration file only: the method is there before
other code can reach the switch, and taking it away again would break a user's own traces.

nnsight compiles the traced blocks from the source of this file, which must be there at run time.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

with suppress(ImportError):
    # it cannot be imported any more once every object has a `save`
    import beartype  # noqa: F401
import nnsight
import torch
from jaxtyping import Float, Int
from nnsight import Envoy
from torch import Tensor, nn

from probes.engines import Batch, Edit, Keep, Where, whole
from probes.engines.modes import eager_attention, plain_generation, whole_prompt
from probes.engines.points import (
    check_edits,
    edit_steps,
    in_order,
    needed,
    part,
    with_remainders,
)
from probes.layout import Layout, Point, resolve
from probes.sites import Site, Unsupported


@dataclass
class _Clock:
    """Tells edits which step of a generation they act in."""

    batch: Batch
    step: int = 0

    def where(self) -> Where:
        return self.batch.where(self.step)


@dataclass
class _Visit:
    """One end of one module: the changes made there, then the reads of what flows on."""

    envoy: Any
    side: str
    order: int
    changes: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    reads: list[Callable[[Tensor, Any], None]] = field(default_factory=list)
    """Given the tensor and the whole value that the module takes or gives."""

    def __call__(self) -> None:
        """Wait for the model to get here, read, and put back what was changed."""
        if self.side == "input":
            # `.input` would be the first argument, which need not be a tensor
            args, kwargs = self.envoy.inputs
            if args and isinstance(args[0], Tensor):
                new = self._through(args[0], (args, kwargs))
                if new is not args[0]:
                    self.envoy.inputs = ((new, *args[1:]), kwargs)
                return
            name = next(k for k, value in kwargs.items() if isinstance(value, Tensor))
            new = self._through(kwargs[name], (args, kwargs))
            if new is not kwargs[name]:
                self.envoy.inputs = (args, {**kwargs, name: new})
            return
        output = self.envoy.output
        if isinstance(output, Tensor):
            new = self._through(output, output)
            if new is not output:
                self.envoy.output = new
            return
        new = self._through(output[0], output)
        if new is not output[0]:
            self.envoy.output = (new, *output[1:])

    def _through(self, h: Tensor, value: Any) -> Tensor:
        for change in self.changes:
            h = change(h)
        for read in self.reads:
            read(h, value)
        return h


class TraceEngine:
    """Reads and edits a transformers model through nnsight.

    Not thread-safe: nnsight keeps one set of running blocks for a wrapped model.
    """

    name = "nnsight"

    def __init__(self, model: nn.Module, layout: Layout, wrapped: Envoy | None = None) -> None:
        """`wrapped` is the nnsight model around `model`, if there is one already."""
        _check_in_memory(model)
        self.model = model
        self.layout = layout
        # the plain wrapper: TransformersModel would set the padding side of the user's tokenizer
        self.root: Any = nnsight.NNsight(model) if wrapped is None else wrapped
        self._envoys: dict[str, Envoy] = dict(self.root.named_modules())
        self._edits: tuple[Edit, ...] = ()
        takes = inspect.signature(model.forward).parameters
        self._positions, self._keeps_logits = "position_ids" in takes, "logits_to_keep" in takes

    @classmethod
    def of_nnsight(cls, wrapped: Envoy, layout: Layout | None = None) -> "TraceEngine":
        """The engine of an nnsight model in memory; its own edits are seen by every pass."""
        model = wrapped._module
        _check_in_memory(model)
        return cls(model, resolve(model) if layout is None else layout, wrapped)

    @property
    def device(self) -> torch.device:
        """Where nnsight puts what the model is given."""
        return next(self.model.parameters()).device

    @property
    def edited(self) -> bool:
        """Whether any edit of `edit` is in force."""
        return bool(self._edits)

    @contextmanager
    def edit(self, edits: Sequence[Edit]) -> Iterator[None]:
        check_edits(self.layout, edits)
        before, self._edits = self._edits, (*self._edits, *edits)
        try:
            yield
        finally:
            self._edits = before

    @torch.no_grad()
    def read(self, batch: Batch, sites: Sequence[Site], keep: Keep = whole) -> dict[Site, Tensor]:
        patterns = [site for site in sites if site.part == "pattern"]
        found: dict[Site, Tensor] = {}
        if patterns:
            with eager_attention(self.model):
                found |= self._run(batch, patterns, keep)
        if rest := [site for site in sites if site.part != "pattern"]:
            found |= self._run(batch, rest, keep)
        return {site: found[site] for site in sites}

    @torch.no_grad()
    def logits(self, batch: Batch, last: int | None = None) -> Float[Tensor, "batch seq vocab"]:
        batch = batch.to(self.device)
        inputs = self._inputs(batch)
        if last is not None and self._keeps_logits:
            # as an index: told a number, Gemma 4 drops tokens from its last blocks
            inputs["logits_to_keep"] = torch.arange(-min(last, batch.ids.shape[1]), 0)
        visits = self._visits(_Clock(batch))
        with self.root.trace(**inputs):
            for visit in visits:
                visit()
            logits = nnsight.save(self.root.output.logits)
        return logits if last is None else logits[:, -last:]

    @torch.no_grad()
    def generate(
        self, batch: Batch, max_new_tokens: int, stop_ids: Sequence[int], pad_id: int
    ) -> Int[Tensor, "batch new"]:
        batch = batch.to(self.device)
        clock = _Clock(batch)
        visits = self._visits(clock)
        idle = {0: "generated"}
        steps = [
            i
            for i in range(max_new_tokens)
            if any(edit.scope != idle.get(i, "prompt") for edit in self._edits)
        ]
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, **whole_prompt(self.model)}
        plain = plain_generation(self.model, max_new_tokens, stop_ids, pad_id)
        with plain, warnings.catch_warnings():
            # said when every prompt met a stop id before the last step: nothing is lost
            warnings.filterwarnings("ignore", message=".* was never reached: the loop asked for")
            with self.root.trace(fn="generate") as tracer:
                with tracer.invoke(**inputs):
                    for step in tracer.iter[steps]:
                        clock.step = step
                        for visit in visits:
                            visit()
                # a block of its own: a loop that outlasts the run ends the block it stands in
                with tracer.invoke():
                    out = nnsight.save(tracer.result)
        return out[:, batch.ids.shape[1] :]

    def _run(self, batch: Batch, sites: Sequence[Site], keep: Keep) -> dict[Site, Tensor]:
        batch = batch.to(self.device)
        seen: dict[Site, Tensor] = {}
        visits = self._visits(_Clock(batch), needed(self.layout, sites), keep, seen)
        # edits of the user's own may wait for a place behind the deepest site
        stops = not self.root._edits
        with self.root.trace(**self._inputs(batch)) as tracer:
            for visit in visits:
                visit()
            if stops:
                tracer.stop()
        return with_remainders(self.layout, sites, seen)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        if batch.visible is not None:
            raise Unsupported(
                "the nnsight engine reads one prompt a row: pack prompts for the 'transformers' "
                "engine only"
            )
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
        # learned positions need them, rotary ones are only shifted: always say them
        return inputs | ({"position_ids": batch.positions} if self._positions else {})

    def _visits(
        self,
        clock: _Clock,
        sites: Sequence[Site] = (),
        keep: Keep = whole,
        seen: dict[Site, Tensor] | None = None,
    ) -> list[_Visit]:
        """The edits in force and the reads, which fill `seen`, in the order of a forward pass.

        With sites, nothing behind the deepest of them is visited.
        """
        visits: dict[tuple[str, str], _Visit] = {}
        shape = tuple(clock.batch.ids.shape)

        def visit(path: str, side: str, order: int) -> _Visit:
            envoy = self._envoys[f"{self.root.path}.{path}"]
            return visits.setdefault((path, side), _Visit(envoy, side, order))

        for edit in in_order(self._edits):
            for point, change in edit_steps(self.layout, edit, clock.where):
                visit(point.path, point.side, point.order).changes.append(change)
        if seen is None:
            return sorted(visits.values(), key=lambda one: one.order)
        for site in sites:
            if site.part == "pattern":
                # after all ends inside attention, before the end of a norm behind it
                order = self.layout.order(site) - 1
                end = visit(self.layout.blocks[site.layer].attention, "output", order)
                end.reads.append(_pattern_reader(site, keep, seen))
            else:
                point = self.layout.point(site)
                end = visit(point.path, point.side, point.order)
                end.reads.append(_reader(site, point, shape, keep, seen))
        deepest = max(one.order for one in visits.values() if one.reads)
        ahead = [one for one in visits.values() if one.order <= deepest]
        return sorted(ahead, key=lambda one: one.order)


def _reader(
    site: Site, point: Point, shape: tuple[int, ...], keep: Keep, seen: dict[Site, Tensor]
) -> Callable[[Tensor, Any], None]:
    def read(h: Tensor, _value: Any) -> None:
        seen[site] = keep(part(h, point, site, shape))

    return read


def _pattern_reader(
    site: Site, keep: Keep, seen: dict[Site, Tensor]
) -> Callable[[Tensor, Any], None]:
    def read(_h: Tensor, value: Any) -> None:
        pattern = value[1].transpose(1, 2)
        seen[site] = keep(pattern if site.head is None else pattern[:, :, site.head])

    return read


def _check_in_memory(model: nn.Module) -> None:
    if next(model.parameters()).device.type == "meta":
        raise ValueError(
            f"the first weights of {type(model).__name__} are not in memory, so nnsight has no "
            "device to put token ids on: call `dispatch()` on an nnsight model, or load without "
            "offloading (the 'transformers' engine runs offloaded models)"
        )
