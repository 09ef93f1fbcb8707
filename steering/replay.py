"""A differentiable forward pass that starts in the middle of a model.

Where only upper blocks are trained, what enters them is the same in every epoch. It is computed
once per example and kept; a step then runs the model's own code with the lower blocks passing on
what was kept, so that masks, rotary tables and whatever else an architecture prepares for its
blocks are its own. Nothing is assumed to work: before training, answers' logits of a replay are
compared with those of plain forward passes, and where they differ whole passes are made instead.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.engines import Batch
from probes.engines.hooks import HookEngine
from probes.engines.modes import additive_mask
from probes.model import HookedModel
from probes.prompts import Rendered, pad_id_of
from probes.sites import Site
from steering.rows import Rows

CACHE_LIMIT = 2 * 2**30
"""Bytes of hidden states kept by default; beyond it nothing is kept and whole passes are made."""

ERROR = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative error of a logit vector against the plain forward pass; 0.05 in half
precision, where padding alone changes logits by a hundredth."""


class Replay:
    """Log-probabilities of given answers, differentiable, from block `first` on.

    The model's weights are to be frozen meanwhile (`frozen_weights` of `probes.engines.modes`);
    what is trained comes in by hooks at block `first` or later. Edits in force on the model's
    engine do not act here.
    """

    def __init__(
        self,
        model: HookedModel,
        sequences: Sequence[Rendered],
        first: int = 0,
        cache_limit: int = CACHE_LIMIT,
    ) -> None:
        if not 0 <= first < model.n_layers:
            raise ValueError(f"block {first} of {model.name}: expected 0 to {model.n_layers - 1}")
        if getattr(model.engine, "edited", False) or getattr(model.engine, "_edits", ()):
            raise ValueError(
                "edits are in force on this model and would not act in training: leave their "
                "block first"
            )
        self.sequences = list(sequences)
        self.notes: tuple[str, ...] = ()
        self._pad_id = pad_id_of(model.tokenizer)
        self._pass = Pass(model)
        self._hidden: list[Tensor] = []
        self.error, self.first, self.packed = self._choose(model, first, cache_limit)
        if self.first:
            self._fill()

    @property
    def cache_bytes(self) -> int:
        """Memory that the kept hidden states take."""
        return sum(h.numel() * h.element_size() for h in self._hidden)

    def logprobs(self, indices: Sequence[int]) -> Float[Tensor, " sequence"]:
        """Summed log-probability of the answers of these sequences, in nats."""
        rows = Rows.of([self.sequences[i] for i in indices], self._pad_id, self.packed)
        hidden = rows.spread([self._hidden[i] for i in indices]) if self.first else None
        return rows.summed(self._pass.logits(rows.batch, rows.read, self.first, hidden))

    @torch.no_grad()
    def all_logprobs(self, batch_size: int = 32) -> Float[Tensor, " sequence"]:
        """The same of all sequences, without gradient."""
        found = torch.zeros(0)
        order = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i].ids))
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            part = self.logprobs(chunk)
            if not start:
                found = part.new_zeros(len(order))
            found[chunk] = part
        return found

    def _choose(self, model: HookedModel, first: int, limit: int) -> tuple[float, int, bool]:
        """The fastest way that gives the plain model's logits: its error, block and packing."""
        size = sum(len(s.ids) for s in self.sequences) * model.d_model
        size *= torch.empty(0, dtype=model.dtype).element_size()
        if first and size > limit:
            self._note(
                f"{size / 2**20:.0f} MiB of hidden states are more than the limit of "
                f"{limit / 2**20:.0f} MiB: whole passes are made"
            )
            first = 0
        longest = max(len(s.ids) for s in self.sequences)
        ways = [(first, model.packs(longest)), (first, False), (0, False)]
        ways = [way for i, way in enumerate(ways) if way not in ways[:i]]
        trial = self._trial()
        plain = self._pass.plain(trial)
        said = "nothing ran"
        for way, after in pairwise([*ways, None]):
            assert way is not None
            try:
                error = self._compare(trial, plain, *way)
            except torch.OutOfMemoryError:  # another way would need as much
                raise
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as e:
                said = f"{type(e).__name__}: {e}"
            else:
                if error <= ERROR.get(model.dtype, 0.05):
                    if ways[0][1] and way == ways[1]:
                        self._note(
                            f"{type(self._pass.model).__name__} does not read several sequences in "
                            f"one row ({said.splitlines()[0][:200]}): rows are padded"
                        )
                    return (error, *way)
                said = f"relative error {error:.1e} of the logits"
            if after is not None and after[0] != way[0]:
                self._note(
                    f"{type(self._pass.model).__name__} cannot be entered at block {way[0]} "
                    f"({said.splitlines()[0][:200]}): whole passes are made"
                )
        raise RuntimeError(
            f"the logits at answers do not equal those of a plain forward pass ({said}): "
            f"{type(self._pass.model).__name__} cannot be trained here"
        )

    def _note(self, text: str) -> None:
        self.notes = (*self.notes, text)

    def _trial(self) -> list[Rendered]:
        """A few sequences to check with: the shortest, the longest, one between and its twin."""
        order = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i].ids))
        middle = order[len(order) // 2]
        prompt = self.sequences[middle].ids[: self.sequences[middle].n_prompt]
        twins = [i for i in order if self.sequences[i].ids[: len(prompt)] == prompt][:2]
        return [self.sequences[i] for i in dict.fromkeys([order[0], order[-1], middle, *twins])]

    @torch.no_grad()
    def _compare(
        self, trial: Sequence[Rendered], plain: Sequence[Tensor], first: int, packed: bool
    ) -> float:
        rows = Rows.of(trial, self._pad_id, packed)
        hidden = None
        if first:
            alone = [Rows.of([s], self._pad_id, False) for s in trial]
            hidden = rows.spread([self._pass.enter(r.batch, first)[0] for r in alone])
        got = self._pass.logits(rows.batch, rows.read, first, hidden).double()[rows.place]
        want = torch.cat(list(plain)).double()
        error = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)
        return float(error.nan_to_num(torch.inf).max())

    @torch.no_grad()
    def _fill(self) -> None:
        """Compute what enters block `first` for every sequence."""
        order = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i].ids))
        kept: dict[int, Tensor] = {}
        for start in range(0, len(order), 32):
            chunk = order[start : start + 32]
            rows = Rows.of([self.sequences[i] for i in chunk], self._pad_id, self.packed)
            entering = self._pass.enter(rows.batch, self.first)
            kept |= dict(zip(chunk, rows.gather(entering), strict=True))
        self._hidden = [kept[i] for i in range(len(order))]


class Pass:
    """Forward passes of a plain transformers model with lower blocks left out."""

    def __init__(self, model: HookedModel) -> None:
        self.model: Any = model.model
        self.layout = model.layout
        self._engine = HookEngine(model.model, model.layout)
        self._blocks = [self.model.get_submodule(b.path) for b in model.layout.blocks]
        self._head = self.model.get_output_embeddings()
        self._lengths: list[int | None] = []

    def enter(self, batch: Batch, layer: int) -> Float[Tensor, "batch seq d_model"]:
        """The stream that enters a block; undefined at pads."""
        site = Site(layer, "resid_pre")
        return self._engine.read(batch, [site])[site]

    @torch.no_grad()
    def plain(self, sequences: Sequence[Rendered]) -> list[Float[Tensor, "_ vocab"]]:
        """Logits that predict each answer's tokens, one sequence at a time and nothing left out."""
        found = []
        for s in sequences:
            ids = torch.tensor([s.ids])
            logits = self._engine.logits(Batch(ids, torch.ones_like(ids)))
            found.append(logits[0, s.n_prompt - 1 : len(s.ids) - 1])
        return found

    def logits(
        self,
        batch: Batch,
        read: tuple[Tensor, Tensor],
        first: int = 0,
        hidden: Tensor | None = None,
    ) -> Float[Tensor, "place vocab"]:
        """Logits at the rows and columns `read`, differentiable.

        With `first` above 0, blocks below it do nothing and `hidden` is what enters it; `first`
        may be the number of blocks, which leaves the final norm and the head.
        """
        batch = batch.to(self._engine.device)
        inputs: dict[str, Any] = self._engine._inputs(batch)
        if batch.visible is not None:
            inputs["attention_mask"] = additive_mask(batch.visible, 0, self.model.dtype)
        rows, columns = (index.to(self._engine.device) for index in read)

        def picked(_module: nn.Module, args: tuple) -> tuple:
            return (args[0][rows, columns][None], *args[1:])

        with ExitStack() as stack:
            if first:
                assert hidden is not None
                stack.enter_context(self._skipping(first, hidden))
            stack.callback(self._head.register_forward_pre_hook(picked).remove)
            return self.model(**inputs, use_cache=False).logits[0]

    def tail(self, hidden: Float[Tensor, "place d_model"]) -> Float[Tensor, "place vocab"]:
        """Logits from what left the last block: the model's own final norm and head."""
        n = len(hidden)
        ids = torch.full((n, 1), 3, device=hidden.device)
        read = (torch.arange(n), torch.zeros(n, dtype=torch.long))
        batch = Batch(ids, torch.ones_like(ids))
        return self.logits(batch, read, len(self._blocks), hidden[:, None])

    @contextmanager
    def _skipping(self, first: int, hidden: Tensor) -> Iterator[None]:
        """Blocks below `first` pass on what they get, the last of them `hidden`."""
        if not self._lengths:
            self._lengths = self._outputs()
        with ExitStack() as stack:
            for i, block in enumerate(self._blocks[:first]):
                given = hidden if i == first - 1 else None
                stack.enter_context(_replaced(block, _passing(given, self._lengths[i])))
            yield

    @torch.no_grad()
    def _outputs(self) -> list[int | None]:
        """Length of the tuple each block returns, None for a tensor alone."""
        seen: dict[int, int | None] = {}

        def saw(i: int, output: Any) -> None:
            seen[i] = None if isinstance(output, Tensor) else len(output)

        ids = torch.full((1, 2), 3, device=self._engine.device)
        with ExitStack() as stack:
            for i, block in enumerate(self._blocks):
                hook = block.register_forward_hook(lambda _m, _a, out, i=i: saw(i, out))
                stack.callback(hook.remove)
            self.model(**self._engine._inputs(Batch(ids, torch.ones_like(ids))), use_cache=False)
        return [seen[i] for i in range(len(self._blocks))]


def _passing(given: Tensor | None, length: int | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        h = given
        if h is None:
            h = args[0] if args else kwargs["hidden_states"]
        return h if length is None else (h, *[None] * (length - 1))

    return forward


@contextmanager
def _replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` in a block's place; one that was put on the block before comes back."""
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before
