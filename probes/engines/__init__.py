"""The contract every engine keeps: read, edit, generate, logits. Values agree between engines.

An engine knows one library (plain transformers hooks, TransformerLens, nnsight) and nothing of
tokenisers, prompts or stores. Engines are opened by name, so that only the one asked for is
imported. A fourth, vLLM, reads a model that a server runs, and refuses what a server cannot do.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.layout import Layout
from probes.sites import Site

ENGINES = ("transformers", "transformer_lens", "nnsight")
"""Engines around a model in memory."""

REMOTE = ("vllm",)
"""Engines of a model that a server runs; they read only."""


@dataclass(frozen=True)
class Batch:
    """Token ids with their mask. Pads may stand on either side; positions follow the mask."""

    ids: Int[Tensor, "batch seq"]
    mask: Int[Tensor, "batch seq"]
    """1 at real tokens, 0 at pads."""
    depth: Int[Tensor, "batch seq"] | None = None
    """Position of each token in its own prompt, where a row packs several prompts."""
    visible: Bool[Tensor, "batch seq seq"] | None = None
    """Which earlier tokens of its row each token sees, where a row packs several prompts."""
    n_prompt: Int[Tensor, " batch"] | None = None
    """Real tokens of each row before its answer, where rows hold answers; None: no answers."""

    @property
    def positions(self) -> Int[Tensor, "batch seq"]:
        """Position of each token in its own prompt, 0 at pads before it."""
        if self.depth is not None:
            return self.depth
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def to(self, device: torch.device | str) -> "Batch":
        tensors = (self.ids, self.mask, self.depth, self.visible, self.n_prompt)
        return Batch(*(None if t is None else t.to(device) for t in tensors))  # pyright: ignore[reportArgumentType]

    def where(self, step: int = 0) -> "Where":
        """What edits are told when this batch (step 0) or a token generated after it is read."""
        if step > 0:
            one = self.mask.new_ones(len(self.mask), 1)
            return Where(step, one.bool(), one * step)
        mask = self.mask.bool()
        if self.n_prompt is None:
            return Where(step, mask, torch.zeros_like(self.mask))
        answer = self.positions - self.n_prompt[:, None] + 1
        return Where(step, mask, answer.clamp(min=0) * self.mask)


@dataclass(frozen=True)
class Where:
    """What an edit is told about the pass it acts in."""

    step: int
    """0 when the prompt is read; i >= 1 when the i-th generated token is."""
    mask: Bool[Tensor, "batch seq"]
    """Real tokens among those in this pass."""
    generated: Int[Tensor, "batch seq"]
    """0 at tokens of the prompt, i at the i-th token of the answer: the step that reads it when
    it is generated, also where a given answer is read in one pass with its prompt."""


EditFunction = Callable[[Tensor, Where], Tensor]
"""Takes `[batch, seq, width]` (or `[batch, seq, head, width]` for a whole part with heads) and
gives a new tensor of the same shape; the input must not be changed in place."""


@dataclass(frozen=True)
class Edit:
    """A change of one activation. What flows on through the model is `function(h, where)`."""

    site: Site
    function: EditFunction
    scope: str = "all"
    """"all", "prompt" or "generated": the tokens at which it acts. The tokens of a given answer
    (`logprobs`, `capture` with answers) count as generated."""

    def __post_init__(self) -> None:
        if self.scope not in ("all", "prompt", "generated"):
            raise ValueError(
                f"edit scope {self.scope!r}: expected 'all', 'prompt' or 'generated' tokens"
            )

    def acts(self, where: Where) -> bool:
        """Whether any token of this pass is in scope."""
        if self.scope == "prompt":
            return where.step <= 0
        return self.scope == "all" or where.step > 0 or bool(where.generated.any())

    def apply(self, h: Tensor, where: Where) -> Tensor:
        """The edited activation; a result of another shape is an error, not a broadcast."""
        new = self.function(h, where)
        if new.shape != h.shape:
            raise ValueError(
                f"the edit at {self.site} returned shape {tuple(new.shape)}, expected "
                f"{tuple(h.shape)}: return a tensor of the shape that came in"
            )
        new = new.to(h.dtype)
        if self.scope == "all" or where.step > 0 or not where.generated.any():
            return new
        inside = (where.generated > 0) == (self.scope == "generated")
        return torch.where(inside.reshape(*inside.shape, *[1] * (h.ndim - 2)), new, h)


Keep = Callable[[Tensor], Tensor]


def whole(h: Tensor) -> Tensor:
    """Keep everything; a copy, because some blocks add into their own tensors later."""
    return h.clone()


@runtime_checkable  # so that test runs can check annotations
class Engine(Protocol):
    """Runs one model. All tensors live on the model's device, in its dtype."""

    name: str
    layout: Layout

    @property
    def edited(self) -> bool:
        """Whether any edit of `edit` is in force."""
        ...

    def read(self, batch: Batch, sites: Sequence[Site], keep: Keep = whole) -> dict[Site, Tensor]:
        """Activations in one forward pass that ends at the deepest site.

        `[batch, seq, d_model]`; for parts with heads `[batch, seq, head, width]` or, when the
        site names a head, `[batch, seq, width]`. The width of `pattern` is the key position, so
        it reads `[batch, query, head, key]`. Values at pads are undefined. Edits in force are
        seen. `keep` takes each of these tensors during the pass and gives what is kept of it, so
        that a read never holds more than it was asked for.
        """
        ...

    def edit(self, edits: Sequence[Edit]) -> AbstractContextManager[None]:
        """While open, every read, logits and generate runs with these edits, in this order."""
        ...

    def logits(self, batch: Batch, last: int | None = None) -> Float[Tensor, "batch seq vocab"]:
        """Next-token logits at every position, or at the `last` positions of each row only."""
        ...

    def generate(
        self, batch: Batch, max_new_tokens: int, stop_ids: Sequence[int], pad_id: int
    ) -> Int[Tensor, "batch new"]:
        """Greedy continuation of left-padded prompts, filled with `pad_id` after a stop id."""
        ...


def open_engine(name: str, model: nn.Module, layout: Layout) -> Engine:
    """The engine of that name around a loaded transformers model."""
    if name == "transformers":
        from probes.engines.hooks import HookEngine

        return HookEngine(model, layout)
    if name == "transformer_lens":
        from probes.engines.lens import LensEngine

        return LensEngine(model, layout)
    if name == "nnsight":
        from probes.engines.trace import TraceEngine

        return TraceEngine(model, layout)
    raise ValueError(unknown(name))


def unknown(name: str) -> str:
    """What is said to a name that no engine around a model in memory has."""
    if name in REMOTE:
        return (
            f"engine={name!r} reads a running server, not a model in memory: use "
            f"HookedModel.load(name, engine={name!r}, server='http://127.0.0.1:8000')"
        )
    return f"unknown engine {name!r}: choose one of {', '.join((*ENGINES, *REMOTE))}"
