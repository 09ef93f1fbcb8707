"""Norms and heads as linear maps: what each term of the stream adds once the norm's scale is held.

A norm divides by a number that depends on the whole state. Held at the value that the run had, the
norm is linear, and what it gives is the sum of what it gives for each term. Gain, bias and centring
are found from the values of the module, not from its class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.layout_trace import first_tensor
from probes.model import HookedModel
from probes.sites import Unsupported
from probes.unembed import FORMS, Unembedding, unembedding

LINEAR = ("h", "h * c", "h / c")
"""Forms of the logits (`probes.unembed.FORMS`) under which terms still add up."""

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative error of a norm found from values; 0.05 in half precision."""


@dataclass(frozen=True)
class FrozenNorm:
    """`gain * (h - mean(h)) * inverse + bias`, with or without the centring, of each row."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    inverse: Float[Tensor, " row"]
    """One over the scale that each row was divided by."""

    def pulled(
        self, v: Float[Tensor, "*target row d_model"]
    ) -> Float[Tensor, "*target row d_model"]:
        """The vectors that states before the norm have the same product with as those behind it
        with `v`, the bias aside."""
        w = v * self.gain * self.inverse[:, None]
        return w - w.mean(-1, keepdim=True) if self.centred else w


def identity(rows: int, width: int) -> FrozenNorm:
    """No norm at all."""
    one = torch.ones(width, dtype=torch.float64)
    return FrozenNorm(one, torch.zeros_like(one), False, torch.ones(rows, dtype=torch.float64))


@torch.no_grad()
def frozen_norm(
    module: nn.Module, states: Float[Tensor, "row d_model"], name: str = "norm"
) -> FrozenNorm:
    """The norm at these states with its scale held; float64 on the CPU.

    A module whose output is not of the form `gain * h / scale + bias` is an error.
    """
    weight = next((p for p in module.parameters()), None)
    like = states if weight is None else weight

    def run(h: Tensor) -> Tensor:
        out = first_tensor(module(h.to(like)[None]))
        assert out is not None
        return out[0].double().cpu()

    d = states.shape[-1]
    # of mean 0 and far above the norm's epsilon: centred or not, the gain is what is left
    signs = torch.ones(2, d, dtype=torch.float64)
    signs[:, 1::2] = -1
    if d % 2:
        signs[0, -1] = signs[1, 0] = 0
        signs[1, 1:] *= -1
    odd, even = _halves(run, 1e3 * signs)
    rms = signs.square().mean(-1, keepdim=True).sqrt()
    gains = torch.where(signs == 0, torch.nan, odd * rms / torch.where(signs == 0, 1, signs))
    gain, bias = gains.nanmean(0), even.mean(0)
    near, _ = _halves(run, signs)
    if torch.allclose(1e3 * near, odd, rtol=0.05):  # linear: a dropout stands here, not a norm
        gain = gain / (1e3 * rms[0])
    own, _ = _halves(run, states)
    h = states.double().cpu()
    found = None
    for centred in (False, True):
        plain = gain * (h - h.mean(-1, keepdim=True) if centred else h)
        inverse = (own * plain).sum(-1) / plain.square().sum(-1).clamp_min(1e-300)
        error = float(
            (own - plain * inverse[:, None]).norm(dim=-1).div(own.norm(dim=-1)).nan_to_num(0).max()
        )
        if found is None or error < found[0]:
            found = error, FrozenNorm(gain, bias, centred, inverse)
    assert found is not None
    if not found[0] <= ROUNDING.get(like.dtype, 0.05):
        raise Unsupported(
            f"{name} is a {type(module).__name__}, which is no gain times the state over a scale "
            f"(relative error {found[0]:.1g}): terms cannot be added up behind it"
        )
    return found[1]


def _halves(run, h: Tensor) -> tuple[Tensor, Tensor]:
    """Odd and even half of what a module gives: the even one is its bias."""
    there, back = run(h), run(-h)
    return (there - back) / 2, (there + back) / 2


@dataclass(frozen=True)
class FrozenHead:
    """What lies behind the last block, at given states with the scale of the norm held: the logit
    of one token minus another is `constant + <state, direction>`."""

    direction: Float[Tensor, "row d_model"]
    constant: Float[Tensor, " row"]
    """What biases of the norm and of the head add."""
    form: str
    """What the architecture does to these logits afterwards; a soft cap ("c * tanh(h / c)") is
    left out, so that the sum holds for the logits before it."""
    number: float
    """The number c of the form."""


def frozen_head(
    model: HookedModel,
    states: Float[Tensor, "row d_model"],
    answers: Sequence[int],
    others: Sequence[int],
) -> FrozenHead:
    """Logit(answer) - logit(other) of each state as a linear map of the state, float64."""
    head = unembedding(model)
    if head.slow:
        raise Unsupported(
            f"what {model.name} does behind its last block was not understood, so logits cannot be "
            "split into terms: attribute to a direction of the stream instead"
        )
    norm, first = _final_norm(model, head, states)
    width = states.shape[-1] if norm is None else len(norm.gain)
    W, constant = _rows(model, head, first, width, states, answers, others)
    held = identity(len(states), width) if norm is None else norm
    return FrozenHead(held.pulled(W), constant + (W * held.bias).sum(-1), head.form, head.constant)


def _final_norm(
    model: HookedModel, head: Unembedding, states: Tensor
) -> tuple[FrozenNorm | None, int]:
    """The norm behind the last block, and the first step after it."""
    if len(head.steps) == 1:
        return None, 0
    module = model.model.get_submodule(head.steps[0])
    return frozen_norm(module, states.to(model.device), head.steps[0]), 1


def _rows(
    model: HookedModel,
    head: Unembedding,
    first: int,
    width: int,
    states: Tensor,
    answers: Sequence[int],
    others: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Difference of two rows of the head for each state, and of their biases."""
    with torch.enable_grad():
        zero = torch.zeros(len(states), width, device=model.device, requires_grad=True)
        h = zero[None]
        for path, dtype in list(zip(head.steps, head.dtypes, strict=True))[first:]:
            found = first_tensor(model.model.get_submodule(path)(h.to(dtype)))
            assert found is not None
            h = found
        if head.form in LINEAR:
            h = FORMS[head.form](h, head.constant)
        scores = h[0]
        index = torch.arange(len(states), device=scores.device)
        chosen = [torch.tensor(list(ids), device=scores.device) for ids in (answers, others)]
        difference = scores[index, chosen[0]].double() - scores[index, chosen[1]].double()
        (grad,) = torch.autograd.grad(difference.sum(), zero)
    return grad.double().cpu(), difference.detach().cpu()


@torch.no_grad()
def linear_map(module: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Matrix `[width, out]` and bias `[out]` of a linear module, whatever its class, float64."""
    weight = next(p for p in module.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    eye = torch.eye(width, dtype=dtype, device=weight.device)
    given = torch.cat([torch.zeros_like(eye[:1]), eye])[None]
    out = first_tensor(module(given))
    assert out is not None
    out = out[0].double().cpu()
    return out[1:] - out[0], out[0]
