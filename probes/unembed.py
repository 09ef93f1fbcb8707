"""From the state that leaves the last block to logits: the model's own norm, head, scale and cap.

What lies behind the last block is found as `probes.layout` finds what lies in it, by values. One
short forward pass is watched: the next step is the module that takes exactly the tensor reached so
far, and what the architecture does to the head's output (nothing, a factor, a soft cap) is the
expression in one number of the configuration that gives the model's logits. What was found must
reproduce the logits of the model's engine, or it is not used.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.engines import Batch, Edit, Where
from probes.layout_trace import N_TOKENS, first_tensor
from probes.model import HookedModel
from probes.sites import Site

FORMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "h": lambda h, c: h,
    "h * c": lambda h, c: h * c,
    "h / c": lambda h, c: h / c,
    "c * tanh(h / c)": lambda h, c: torch.tanh(h / c) * c,
}
"""What architectures do to the output of their head, in the order in which it is tried."""


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The logits a model gives for states `[*row, d_model]` that leave its last block.

    Called with states of any floating dtype, it computes in the model's own dtype and gives
    float32 on the model's device. Rows do not see each other; the caller splits them where
    `[*row, vocab]` would be too large. Gradients reach the states if these ask for them (never the
    weights), except on the slow way.
    """

    steps: tuple[str, ...]
    """Paths of the modules that are run in turn; empty where there is only the slow way."""
    form: str
    """What becomes of the head's output `h`: one of `FORMS`."""
    constant: float
    """The number c of the form, from the model's configuration; 1 where the form has none."""
    model: HookedModel = field(repr=False)
    dtypes: tuple[torch.dtype, ...] = field(default=(), repr=False)
    """What each step is given."""

    @property
    def slow(self) -> bool:
        """Whether every call runs all blocks, because what lies behind them was not understood."""
        return not self.steps

    def __call__(self, states: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocab"]:
        if states.shape[-1] != self.model.d_model:
            raise ValueError(
                f"the states have width {states.shape[-1]} and {self.model.name} has d_model "
                f"{self.model.d_model}: give what leaves its last block (resid_post)"
            )
        if self.slow:
            flat = states.reshape(-1, states.shape[-1])
            logits = head_of(self.model)(flat).to(self.model.device)
            return logits.reshape(*states.shape[:-1], logits.shape[-1])
        # rows as one sequence, the shape every head knows
        h = states.reshape(1, -1, states.shape[-1]).to(self.model.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and states.requires_grad):
            for path, dtype in zip(self.steps, self.dtypes, strict=True):
                h = first_tensor(self.model.model.get_submodule(path)(h.to(dtype)))
                assert h is not None
            h = FORMS[self.form](h, self.constant).float()
        return h.reshape(*states.shape[:-1], h.shape[-1])


def unembedding(model: HookedModel) -> Unembedding:
    """Find what the model does behind its last block, by one forward pass over six tokens.

    Another pass checks it against `engine.logits`, to rounding. Where it cannot be found, or does
    not agree, every call takes the slow and always right way of `head_of`.
    """
    found = _found(model)
    if found is not None and _agrees(model, found):
        return found
    return Unembedding((), "h", 1.0, model)


def head_of(model: HookedModel) -> Callable[[Tensor], Tensor]:
    """`[row, d_model] -> [row, vocab]`, float32 on the CPU: the states are put in place of what
    leaves the last block, and the model does with them what it does.

    Nothing has to be known of the architecture, but every call runs all blocks.
    """
    site = Site(model.n_layers - 1, "resid_post")
    size = min(64, model.context_length or 64)

    def decode(h: Tensor) -> Tensor:
        rows = []
        for chunk in h.split(size):

            def put(old: Tensor, _where: Where, chunk: Tensor = chunk) -> Tensor:
                return chunk.to(old)[None]

            ids = torch.zeros(1, len(chunk), dtype=torch.long)
            with model.edit([Edit(site, put)]):
                logits = model.engine.logits(Batch(ids, torch.ones_like(ids)))
            rows.append(logits[0].float().cpu())
        return torch.cat(rows)

    return decode


def _ids(model: HookedModel) -> Tensor:
    ids = torch.arange(5, 5 + N_TOKENS)[None] % model.layout.vocab_size
    return ids.to(model.device)


@torch.no_grad()
def _found(model: HookedModel) -> Unembedding | None:
    """The modules behind the last block and the form of the logits; None if they are not clear."""
    last = model.layout.blocks[-1].path
    seen = _watched(model, last)
    if seen is None:
        return None
    reached, logits, calls = seen
    steps: list[tuple[str, torch.dtype]] = []
    while (n := next((i for i, c in enumerate(calls) if _takes(c[1], reached)), None)) is not None:
        path, given, reached = calls[n]
        steps.append((path, given.dtype))
        calls = calls[n + 1 :]
    if not steps or reached.shape != logits.shape:
        return None
    form = _form(model, reached, logits)
    if form is None:
        return None
    paths, dtypes = zip(*steps, strict=True)
    return Unembedding(paths, *form, model, dtypes)


def _watched(
    model: HookedModel, last: str
) -> tuple[Tensor, Tensor, list[tuple[str, Tensor, Tensor]]] | None:
    """The last block's output, the logits, and (path, input, output) of every module called
    between them, in the order of the calls, those around others first."""
    plain = model.model
    done: list[Tensor] = []
    calls: list[tuple[str, Tensor]] = []
    outputs: dict[str, Tensor] = {}
    handles = []

    def before(path: str, args: tuple, kwargs: dict) -> None:
        given = first_tensor(args)
        given = first_tensor(list(kwargs.values())) if given is None else given
        if done and given is not None and given.is_floating_point():
            calls.append((path, given.clone()))

    def after(path: str, output: object) -> None:
        out = first_tensor(output)
        if out is None:
            return
        if path == last:
            done.append(out.clone())
        elif done:
            outputs[path] = out.clone()

    def watch(path: str, module: nn.Module) -> Iterator[Any]:
        yield module.register_forward_pre_hook(
            lambda _m, args, kwargs: before(path, args, kwargs), with_kwargs=True
        )
        yield module.register_forward_hook(lambda _m, _args, out: after(path, out))

    ids = _ids(model)
    try:
        for path, module in plain.named_modules():
            if path and not path.startswith(f"{last}."):
                handles.extend(watch(path, module))
        logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if len(done) != 1:
        return None
    ended = [(path, given, outputs[path]) for path, given in calls if path in outputs]
    return done[0], logits, ended


def _takes(given: Tensor, reached: Tensor) -> bool:
    return given.numel() == reached.numel() and torch.equal(
        given.reshape(reached.shape), reached.to(given.dtype)
    )


def _form(model: HookedModel, head: Tensor, logits: Tensor) -> tuple[str, float] | None:
    """The first form that gives the logits exactly, or else the one nearest within rounding."""
    config = model.model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    numbers = {
        float(value)
        for value in config.to_dict().values()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    nearest: tuple[float, str, float] = (math.inf, "", 1.0)
    for form, function in FORMS.items():
        for c in [1.0] if form == "h" else sorted(n for n in numbers if 0 < n < math.inf):
            error = _error(function(head, c), logits)
            nearest = min(nearest, (error, form, c), key=lambda found: found[0])
    error, form, c = nearest
    return (form, c) if error <= _rounding(head.dtype) else None


@torch.no_grad()
def _agrees(model: HookedModel, found: Unembedding) -> bool:
    """Whether the engine's last states give the engine's logits."""
    ids = _ids(model)
    batch = Batch(ids, torch.ones_like(ids))
    site = Site(model.n_layers - 1, "resid_post")
    states = model.engine.read(batch, [site])[site]
    return _error(found(states), model.engine.logits(batch)) <= _rounding(model.dtype)


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference at one token, relative to the largest logit there; NaN counts as wrong."""
    a, b = found.double(), expected.double().to(found.device)
    error = ((a - b).abs().amax(-1) / b.abs().amax(-1).clamp(min=1e-30)).max().item()
    return error if error == error else math.inf


def _rounding(dtype: torch.dtype) -> float:
    return 16 * torch.finfo(dtype).eps
