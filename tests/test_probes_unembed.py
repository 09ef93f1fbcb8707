"""The part behind the last block against the model's own logits, on every architecture."""

import copy
from typing import Any

import pytest
import tiny
import torch
from architectures import ARCHITECTURES, EXTRA, ORDINARY_TOKENS, build
from torch import Tensor

from probes import HookedModel, unembed
from probes.engines import Batch
from probes.prompts import pad
from probes.sites import Site
from probes.unembed import FORMS, Unembedding, head_of, unembedding

EVERY = [*ARCHITECTURES, *EXTRA]
LOGITS = {
    "gemma4-text": ("c * tanh(h / c)", 30.0),
    "gemma2": ("c * tanh(h / c)", 30.0),
    "cohere2": ("h * c", 0.5),
    "granite": ("h / c", 2.0),
}


def batch(side: str = "left") -> Batch:
    generator = torch.Generator().manual_seed(3)
    rows = [
        torch.randint(ORDINARY_TOKENS[0], ORDINARY_TOKENS[-1], (n,), generator=generator).tolist()
        for n in (4, 11, 7)
    ]
    return pad(rows, 0, side)


def both(model: HookedModel) -> tuple[Tensor, Tensor]:
    """States that leave the last block and the model's logits, at real tokens."""
    given = batch()
    site = Site(model.n_layers - 1, "resid_post")
    real = given.mask.bool()
    return model.engine.read(given, [site])[site][real], model.engine.logits(given)[real]


@pytest.mark.parametrize("name", EVERY)
def test_logits_are_those_of_the_model(name: str) -> None:
    model = tiny.hooked(name)
    found = unembedding(model)
    assert not found.slow
    states, expected = both(model)
    with torch.no_grad():
        logits = found(states)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head_of(model)(states), expected, rtol=1e-4, atol=1e-5)
    # a norm or a head left out would be seen: logits are not those of other states
    with torch.no_grad():
        assert not torch.allclose(found(states.flip(0)), expected, atol=0.1)


@pytest.mark.parametrize("name", LOGITS)
def test_what_becomes_of_the_heads_output_is_found(name: str) -> None:
    found = unembedding(tiny.hooked(name))
    assert (found.form, found.constant) == LOGITS[name]
    assert found.form in FORMS


def test_the_modules_are_named_in_order() -> None:
    assert unembedding(tiny.hooked("llama")).steps == ("model.norm", "lm_head")
    assert unembedding(tiny.hooked("gpt2")).steps == ("transformer.ln_f", "lm_head")


def test_any_number_of_rows_and_axes(llama: HookedModel) -> None:
    found = unembedding(llama)
    states, expected = both(llama)
    with torch.no_grad():
        one = torch.stack([found(row) for row in states])
        many = found(states[:20].reshape(2, 5, 2, -1))
    assert many.shape == (2, 5, 2, expected.shape[-1])
    torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(many.reshape(20, -1), expected[:20], rtol=1e-5, atol=1e-5)


def test_states_of_another_width_are_refused(llama: HookedModel) -> None:
    with pytest.raises(ValueError, match="width 63 and tiny llama has d_model 64: give what"):
        unembedding(llama)(torch.zeros(2, 63))


def test_gradients_reach_the_states_and_no_weight(llama: HookedModel) -> None:
    found = unembedding(llama)
    states = both(llama)[0].detach()
    assert not found(states).requires_grad
    asked = states.clone().requires_grad_()
    (slope,) = torch.autograd.grad(found(asked)[:, 7].sum(), asked)
    with torch.no_grad():
        step = 1e-2 * slope / slope.norm()
        risen = (found(states + step)[:, 7] - found(states - step)[:, 7]).sum()
    assert float(risen) == pytest.approx(2 * float((slope * step).sum()), rel=1e-2)


@pytest.mark.parametrize("engine", ["transformer_lens", "nnsight"])
def test_it_agrees_with_every_engine(engine: str) -> None:
    model = HookedModel(build("gemma2"), tiny.tokenizer(), engine=engine, name="m")
    found = unembedding(model)
    states, expected = both(model)
    with torch.no_grad():
        torch.testing.assert_close(found(states), expected, rtol=1e-4, atol=1e-4)
    assert not found.slow


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba"])
def test_half_precision_is_the_models_own(name: str) -> None:
    model = HookedModel(build(name).bfloat16(), tiny.tokenizer(), name="half")
    found = unembedding(model)
    assert not found.slow
    states, expected = both(model)
    with torch.no_grad():
        logits = found(states)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.float(), rtol=2e-2, atol=2e-2)


class Odd(torch.nn.Module):
    """A head with something behind it that no form describes."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, h: Tensor) -> Tensor:
        return self.head(h)


def bent() -> HookedModel:
    """A Llama that adds to every logit, outside any module, the square of it."""
    plain = build("llama")
    forward = plain.forward

    def bending(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + 0.1 * out.logits.square()
        return out

    plain.forward = bending
    bending.__signature__ = __import__("inspect").signature(forward)  # pyright: ignore
    return HookedModel(plain, tiny.tokenizer(), name="bent")


def test_what_is_not_understood_takes_the_slow_way_and_is_right() -> None:
    model = bent()
    found = unembedding(model)
    assert found.slow and found.steps == ()
    states, expected = both(model)
    torch.testing.assert_close(found(states), expected, rtol=1e-4, atol=1e-5)
    shaped = found(states[:8].reshape(2, 4, -1))
    torch.testing.assert_close(shaped.reshape(8, -1), expected[:8], rtol=1e-4, atol=1e-5)


def test_a_wrong_find_is_not_used(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = unembedding(llama)
    wrong = Unembedding(right.steps, "h * c", 1.01, llama, right.dtypes)
    monkeypatch.setattr(unembed, "_found", lambda model: wrong)
    found = unembedding(llama)
    assert found.slow
    states, expected = both(llama)
    torch.testing.assert_close(found(states), expected, rtol=1e-4, atol=1e-5)


def test_a_module_around_the_head_is_one_step(llama: HookedModel) -> None:
    plain = copy.deepcopy(llama.model)
    plain.lm_head = Odd(plain.lm_head)
    model = HookedModel(plain, tiny.tokenizer(), name="wrapped")
    found = unembedding(model)
    assert found.steps == ("model.norm", "lm_head")
    states, expected = both(llama)
    with torch.no_grad():
        torch.testing.assert_close(found(states), expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_behind(llama: HookedModel) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules())

    before = hooks()
    unembedding(llama)
    assert hooks() == before
