"""LoFiT: laws of its two steps, a planted head found, agreement with other implementations."""

import copy
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from architectures import build
from torch import Tensor

from probes import HookedModel, Site
from probes.engines import Batch
from probes.engines.modes import frozen_weights
from steering import HeadOffsets, steer
from steering.head_parameters import HeadParameters, all_heads
from steering.head_selection import HeadSelection
from steering.lofit import (
    HeadTuning,
    LoFiT,
    fit_offsets,
    lofit,
    select_heads,
)
from steering.preferences import DPO, SFT, Answers, Preference, encode
from steering.tuning import Task, Training, train

QUICK = Training(epochs=2, batch_size=4)


def examples(n: int = 8, seed: int = 0) -> list[Preference]:
    texts = (tiny.words(n, seed), tiny.words(n, seed + 1, 1, 4), tiny.words(n, seed + 2, 1, 4))
    return [Preference(p, a, b) for p, a, b in zip(*texts, strict=True)]


def batch_of(model: HookedModel, prompts: list[str]) -> Batch:
    return model.batch(model.template.render_all(prompts))


# Losses


def test_dpo_is_log_two_at_the_reference() -> None:
    model = tiny.hooked("llama")
    with frozen_weights(model.model):
        task = Task(model, examples(), Training())
        v = HeadParameters(model, all_heads(model.layout), 0.0, 42)
        with v.acting(scale=False), torch.no_grad():
            loss = DPO(0.7)(task.answers(range(8)))
            assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
        v = HeadParameters(model, all_heads(model.layout), 0.3, 42)
        with v.acting(scale=False), torch.no_grad():
            moved = DPO(0.7)(task.answers(range(8)))
        assert abs(float(moved) - math.log(2)) > 1e-3


def test_losses_equal_numpy() -> None:
    g = torch.Generator().manual_seed(0)
    c, r, c0, r0 = (-10 * torch.rand(6, generator=g, dtype=torch.float64) for _ in range(4))
    n = torch.tensor([3, 1, 4, 1, 5, 9])
    answers = Answers(c, n, r, c0, r0)
    x = 0.3 * ((c - c0) - (r - r0)).numpy()
    assert float(DPO(0.3)(answers)) == pytest.approx(np.log1p(np.exp(-x)).mean(), rel=1e-12)
    assert float(SFT()(answers)) == pytest.approx(-c.numpy().sum() / n.numpy().sum(), rel=1e-12)
    assert float(DPO(0.3)(Answers(r, n, c, r0, c0))) != pytest.approx(float(DPO(0.3)(answers)))


def test_training_losses_equal_a_loop_of_ones_own() -> None:
    """DPO and SFT of the tiny model from logits of single rows, in numpy."""
    model = tiny.hooked("qwen3")
    given = examples()
    chosen, rejected = encode(model.template, given)
    assert rejected is not None

    def summed(rows: list) -> np.ndarray:
        found = []
        for row in rows:
            ids = torch.tensor([row.ids])
            logits = model.model(input_ids=ids).logits[0].double().detach().numpy()
            steps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            found.append(sum(steps[t - 1, row.ids[t]] for t in range(row.n_prompt, len(row.ids))))
        return np.array(found)

    c0, r0 = summed(chosen), summed(rejected)
    at = (1, 2)
    offset = torch.randn(24, generator=torch.Generator().manual_seed(3))
    point = model.layout.point(Site(1, "head_out"))
    module = model.model.get_submodule(point.path)

    def add(_module: object, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., 2 * 24 : 3 * 24] += offset
        return (z,)

    handle = module.register_forward_pre_hook(add)
    c, r = summed(chosen), summed(rejected)
    handle.remove()
    dpo = np.log1p(np.exp(-0.5 * ((c - c0) - (r - r0)))).mean()
    sft = -c.sum() / sum(len(row.ids) - row.n_prompt for row in chosen)
    for training, want in ((Training(), dpo), (Training(loss=SFT()), sft)):
        with frozen_weights(model.model):
            task = Task(model, given, training, 1)
            v = HeadParameters(model, [at], training.noise, 42)
            v.parameters[0].data[0] = offset
            with v.acting(scale=False), torch.no_grad():
                got = float(training.loss(task.answers(range(len(given)))))
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("loss", [DPO(0.5), SFT()])
def test_gradients_in_double_precision(loss: DPO | SFT, scale: bool) -> None:
    # GPT-2's norms compute in double precision; RMS norms go through float32
    model = HookedModel(build("gpt2").double(), tiny.tokenizer(), name="tiny double")
    training = Training(loss=loss, noise=0.1)
    with frozen_weights(model.model):
        task = Task(model, examples(3), training, 1)
        assert task.replay.error < 1e-12
        v = HeadParameters(model, [(1, 0), (2, 3)], training.noise, 42)
        assert v.parameters[0].dtype == torch.float64
        with v.acting(scale=scale):

            def f(*_: Tensor) -> Tensor:
                return loss(task.answers(range(3)))

            assert torch.autograd.gradcheck(f, v.parameters, fast_mode=False, atol=1e-6)


def test_wrong_settings_and_examples_are_refused() -> None:
    model = tiny.hooked("llama")
    with pytest.raises(ValueError, match="DPO needs a rejected answer"):
        fit_offsets(model, [Preference("w1", "w2")], [(0, 0)], training=QUICK)
    with pytest.raises(ValueError, match="there is nothing to prefer"):
        encode(model.template, [Preference("w1", "w2", "w2")])
    with pytest.raises(ValueError, match="1 of 2 examples have a rejected answer"):
        encode(model.template, [Preference("w1", "w2", "w3"), Preference("w1", "w2")])
    with pytest.raises(ValueError, match="the chosen answer of example 0 has no tokens"):
        encode(model.template, [Preference("w1", "")])
    with pytest.raises(ValueError, match="no examples"):
        encode(model.template, [])
    with pytest.raises(ValueError, match="beta is 0.0"):
        DPO(0.0)
    with pytest.raises(ValueError, match="lr is 0.0"):
        Training(lr=0.0)
    with pytest.raises(ValueError, match="patience needs validation"):
        fit_offsets(model, examples(), [(0, 0)], training=Training(patience=1))
    with pytest.raises(ValueError, match="L1 factor"):
        select_heads(model, examples(), l1=-1.0)


# The parameters


def test_no_scaling_and_no_offset_change_nothing() -> None:
    model = tiny.hooked("llama")
    ids = batch_of(model, tiny.words(4, 0))
    plain = model.engine.logits(ids)
    v = HeadParameters(model, all_heads(model.layout), 0.0, 42)
    for scale in (True, False):
        with v.acting(scale=scale):
            assert torch.equal(plain, model.engine.logits(ids))
    v = HeadParameters(model, all_heads(model.layout), 0.1, 42)
    for scale in (True, False):
        with v.acting(scale=scale):
            assert not torch.equal(plain, model.engine.logits(ids))


@pytest.mark.parametrize("name", ["llama-head-dim", "falcon-7b", "gpt2", "deepseek-v3"])
def test_an_offset_moves_the_projection_by_its_columns(name: str) -> None:
    """The change of the output projection's output is W_O[:, head] v, at every token."""
    model = tiny.hooked(name)
    v = HeadParameters(model, [(1, 2)], 1.0, 42)
    vector = v.vectors()[1, 2]
    module = model.model.get_submodule(model.layout.point(Site(1, "head_out")).path)
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out))
    ids = batch_of(model, tiny.words(3, 0))
    model.engine.logits(ids)
    with v.acting(scale=False):
        model.engine.logits(ids)
    handle.remove()
    weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
    d = len(vector)
    want = weight[:, 2 * d : 3 * d] @ vector
    moved = (seen[1] - seen[0]).reshape(-1, seen[0].shape[-1])
    torch.testing.assert_close(moved, want.expand_as(moved), rtol=1e-4, atol=1e-5)


def test_a_scaling_multiplies_the_head() -> None:
    model = tiny.hooked("llama")
    v = HeadParameters(model, [(1, 2)], 1.0, 42)
    module = model.model.get_submodule(model.layout.point(Site(1, "head_out")).path)
    seen: list[Tensor] = []
    ids = batch_of(model, tiny.words(3, 0))

    def look() -> None:
        handle = module.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
        model.engine.logits(ids)
        handle.remove()

    look()
    with v.acting(scale=True):
        look()
    a, b = (z.unflatten(-1, (4, 16)) for z in seen)
    torch.testing.assert_close(b[..., 2, :], a[..., 2, :] * (1 + v.vectors()[1, 2]))
    others = [0, 1, 3]
    assert torch.equal(a[..., others, :], b[..., others, :])


def test_only_the_chosen_heads_are_trained() -> None:
    model = HookedModel(build("llama"), tiny.tokenizer(), name="tiny")
    before = {name: t.clone() for name, t in model.model.state_dict().items()}
    heads = [(2, 3), (1, 0), (2, 1)]
    tuning = fit_offsets(model, examples(), heads, training=QUICK, progress=False)
    assert tuning.curve.n_parameters == tuning.offsets.n_parameters == 3 * 16
    assert tuning.offsets.heads == ((1, 0), (2, 1), (2, 3))
    whole = tuning.offsets.layer(2)
    assert not whole[0].any() and not whole[2].any() and whole[1].any() and whole[3].any()
    assert not tuning.offsets.layer(0).any()
    assert all(torch.equal(t, before[n]) for n, t in model.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.model.parameters())
    assert tuning.curve.first_layer == 1
    assert tuning.curve.cache_bytes > 0


def test_heads_that_do_not_exist_are_refused() -> None:
    model = tiny.hooked("llama")  # four query heads over two key-value heads
    with pytest.raises(ValueError, match="layer 1 has 4 heads of head_out, 0 to 3"):
        fit_offsets(model, examples(), [(1, 4)], training=QUICK)
    with pytest.raises(ValueError, match="3 layers"):
        fit_offsets(model, examples(), [(3, 0)], training=QUICK)
    with pytest.raises(ValueError, match=r"head \(1, 2\) is given twice"):
        fit_offsets(model, examples(), [(1, 2), (1, 2)], training=QUICK)
    with pytest.raises(ValueError, match="no heads were given"):
        fit_offsets(model, examples(), [], training=QUICK)
    with pytest.raises(ValueError, match="32 wide and the first ones 24"):
        fit_offsets(tiny.hooked("gemma4-text"), examples(), [(1, 0)], training=QUICK)
    with pytest.raises(ValueError, match="have no attention heads: give some of"):
        select_heads(tiny.hooked("jamba"), examples(), layers=[0], training=QUICK)


# Live application


@pytest.mark.parametrize("engine", ["transformers", "transformer_lens", "nnsight"])
def test_steering_gives_the_logits_of_training(engine: str) -> None:
    plain = build("llama")
    model = HookedModel(plain, tiny.tokenizer(), name="tiny")
    training = Training(epochs=2, batch_size=4, noise=0.3)
    tuning = fit_offsets(model, examples(), [(1, 1), (2, 3)], training=training, progress=False)
    v = HeadParameters(model, [(1, 1), (2, 3)], training.noise, 42)
    for layer, p in zip((1, 2), v.parameters, strict=True):
        p.data[0] = tuning.offsets[layer, {1: 1, 2: 3}[layer]]
    with frozen_weights(plain):
        task = Task(model, examples(), training, 1)
        with v.acting(scale=False), torch.no_grad():
            trained = task.answers(range(8)).chosen
        unsteered = task.answers(range(8)).chosen
    live = HookedModel(plain, tiny.tokenizer(), engine=engine, name="tiny")
    prompts, answers = [e.prompt for e in examples()], [e.chosen for e in examples()]
    with steer(live, tuning.offsets):
        got = torch.stack([p.sum() for p in live.logprobs(prompts, answers)])
    torch.testing.assert_close(got, trained, rtol=1e-5, atol=1e-4)
    assert (unsteered - trained).abs().max() > 0.05


def test_steering_gives_the_training_forward_bit_for_bit() -> None:
    model = tiny.hooked("llama")
    heads = all_heads(model.layout)
    v = HeadParameters(model, heads, 0.3, 42)
    made = fit_offsets(model, examples(), heads, training=QUICK, progress=False).offsets
    offsets = HeadOffsets(v.vectors(), made.origin)
    ids = batch_of(model, tiny.words(4, 0))
    with v.acting(scale=False):
        trained = model.engine.logits(ids)
    with steer(model, offsets):
        assert torch.equal(model.engine.logits(ids), trained)


def test_cached_decoding_equals_reading_it_all_again() -> None:
    model = tiny.hooked("llama")
    training = Training(epochs=2, batch_size=4, noise=0.5)
    offsets = fit_offsets(
        model, examples(), [(0, 1), (2, 3)], training=training, progress=False
    ).offsets
    prompts = tiny.words(3, 5)
    plain = model.generate_ids(prompts, 8)
    steered = model.generate_ids(prompts, 8, steer=offsets)
    assert plain != steered
    with steer(model, offsets):
        for prompt, found in zip(prompts, steered, strict=True):
            ids = list(model.template.render(prompt).ids)
            for token in found:
                row = torch.tensor([ids])
                logits = model.engine.logits(Batch(row, torch.ones_like(row)))
                assert int(logits[0, -1].argmax()) == token
                ids.append(token)


# Selection


def planted(at: tuple[int, int]) -> tuple[HookedModel, list[Preference], list[Preference]]:
    """Answers of a model in which one head counts six times, to be learned by the model where it
    counts once; and random answers to the same prompts."""
    model = HookedModel(build("llama"), tiny.tokenizer(), name="tiny")
    scaled = copy.deepcopy(model.model)
    layer, head = at
    scaled.model.layers[layer].self_attn.o_proj.weight.data[:, head * 16 : (head + 1) * 16] *= 6
    teacher = HookedModel(scaled, tiny.tokenizer(), name="teacher")
    prompts = tiny.words(48, 0)
    true = [
        Preference(prompt, f" {text}")
        for prompt, text in zip(prompts, teacher.generate(prompts, 4), strict=True)
        if text.strip()
    ]
    chance = tiny.words(len(true), 9, 4, 4)
    return model, true, [Preference(t.prompt, a) for t, a in zip(true, chance, strict=True)]


@pytest.mark.parametrize("at", [(0, 2), (1, 3), (2, 0)])
def test_the_planted_head_ranks_first_and_random_answers_do_not_find_it(
    at: tuple[int, int],
) -> None:
    model, true, random = planted(at)
    training = Training(loss=SFT(), lr=2e-2, epochs=6, batch_size=12)

    def lead(examples: list[Preference]) -> float:
        """The planted head's norm over the largest other."""
        norms = select_heads(
            model, examples, training=training, l1=5e-3, progress=False
        ).norms.clone()
        planted_norm = float(norms[at])
        norms[at] = 0
        return planted_norm / float(norms.max())

    assert lead(true) > 1.1
    assert lead(random) < 1.05


def test_a_huge_penalty_leaves_noise_and_says_so() -> None:
    model = tiny.hooked("llama")
    training = Training(lr=1e-4, epochs=40, batch_size=8)
    with pytest.warns(UserWarning, match="the ranking is noise"):
        found = select_heads(model, examples(), training=training, l1=1e4, progress=False)
    free = select_heads(model, examples(), training=training, l1=0.0, progress=False)
    begun = 1e-3 * 16**0.5
    assert float(found.norms.max()) < 0.5 * begun
    assert float(free.norms.max()) > begun
    assert "the ranking is noise" in found.notes[-1]
    assert not free.notes
    short = Training(lr=5e-3, epochs=1, batch_size=24)  # every number moves by one step, no more
    with pytest.warns(UserWarning, match="the ranking is noise"):
        select_heads(model, examples(), training=short, l1=1e2, progress=False)


def test_a_penalty_concentrates_the_norms() -> None:
    model, true, _ = planted((1, 3))
    training = Training(loss=SFT(), lr=2e-2, epochs=4, batch_size=12)
    loose, tight = (
        select_heads(model, true, training=training, l1=l1, progress=False).concentration
        for l1 in (0.0, 5e-3)
    )
    assert tight > loose


def selection(norms: Tensor) -> HeadSelection:
    return HeadSelection(
        losses=torch.tensor([1.0, 0.5]),
        validation=torch.zeros(0),
        kept_epoch=1,
        n_parameters=1,
        first_layer=0,
        cache_bytes=0,
        replay_error=0.0,
        notes=(),
        norms=norms,
    )


def test_ranking_breaks_ties_by_layer_and_head() -> None:
    found = selection(torch.tensor([[1.0, 2.0], [2.0, torch.nan], [2.0, 3.0]]))
    assert found.ranked == ((2, 1), (0, 1), (1, 0), (2, 0), (0, 0))
    assert found.top(2) == ((2, 1), (0, 1))
    with pytest.warns(UserWarning, match="9 heads were asked for and 5 are ranked"):
        assert found.top(9) == found.ranked
    with pytest.raises(ValueError, match="ask for 1 or more"):
        found.top(0)


def test_layers_left_out_are_not_ranked_and_lower_blocks_run_once() -> None:
    model = tiny.hooked("llama")
    found = select_heads(model, examples(), training=QUICK, layers=[1, 2], progress=False)
    assert found.norms[0].isnan().all()
    assert found.first_layer == 1
    assert len(found.ranked) == 8
    last = select_heads(model, examples(), training=QUICK, layers=[-1, 0], progress=False)
    assert {layer for layer, _ in last.ranked} == {0, model.n_layers - 1}
    with pytest.raises(ValueError, match="site 7.head_out is out of range"):
        select_heads(model, examples(), training=QUICK, layers=[7], progress=False)
    with pytest.raises(ValueError, match="have no attention heads"):
        select_heads(model, examples(), training=QUICK, layers=[], progress=False)


# The loop


def test_the_same_seed_gives_the_same_bytes() -> None:
    model = tiny.hooked("llama")
    a, b = (
        lofit(model, examples(), 3, training=QUICK, selecting=QUICK, progress=False) for _ in "ab"
    )
    other = Training(epochs=2, batch_size=4, seed=1)
    c = lofit(model, examples(), 3, training=other, selecting=other, progress=False)
    assert torch.equal(a.selection.norms, b.selection.norms)
    assert torch.equal(a.tuning.curve.losses, b.tuning.curve.losses)
    assert all(torch.equal(a.offsets[at], b.offsets[at]) for at in a.offsets.heads)
    assert not torch.equal(a.selection.norms, c.selection.norms)


@pytest.mark.parametrize("loss", [SFT(), DPO()])
def test_the_loss_of_all_examples_has_no_batches(loss: SFT | DPO) -> None:
    model = tiny.hooked("llama")
    with frozen_weights(model.model):
        task = Task(model, examples(), Training(loss=loss))
        found = [task.loss(loss, size) for size in (1, 4, 32)]
        whole = float(loss(task.answers(range(task.n))))
    assert found == pytest.approx([whole] * 3, rel=1e-5)


def test_what_validates_is_not_trained_on() -> None:
    model, given = tiny.hooked("llama"), examples()
    with pytest.raises(ValueError, match="is in training and validation: hold others back"):
        fit_offsets(model, given, [(0, 0)], validation=given[:1], progress=False)
    first, other = (Preference(p, "w1", "w2", "theft") for p in ("w3 w4", "w5"))
    with pytest.raises(ValueError, match="the topic 'theft' is in training and validation"):
        fit_offsets(model, [*given, first], [(0, 0)], validation=[other], progress=False)


def test_patience_keeps_the_best_epoch() -> None:
    model = tiny.hooked("llama")
    held = [Preference(e.prompt, str(e.rejected), e.chosen) for e in examples()]  # the opposite
    training = Training(lr=0.05, epochs=6, batch_size=4, patience=2)
    heads = all_heads(model.layout)
    best = fit_offsets(
        model, examples(), heads, training=training, validation=held, progress=False
    ).curve
    assert best.kept_epoch == int(best.validation.argmin())
    assert len(best.validation) == 1 + best.kept_epoch + 2  # stopped after two without gain
    last = fit_offsets(
        model,
        examples(),
        heads,
        training=Training(epochs=3, batch_size=4),
        validation=held,
        progress=False,
    ).curve
    assert last.kept_epoch == 3
    assert len(last.validation) == 4


def test_training_lowers_the_loss_and_the_rate_falls_to_zero() -> None:
    model = tiny.hooked("llama")
    training = Training(lr=0.05, epochs=10, batch_size=4)
    with frozen_weights(model.model):
        task = Task(model, examples(), training)
        v = HeadParameters(model, all_heads(model.layout), training.noise, 42)
        steps: list[Tensor] = []
        with v.acting(scale=False):
            before = task.loss(training.loss)

            def remember() -> Tensor:
                steps.append(v.parameters[0].detach().clone())
                return v.size() * 0

            found = train(v.parameters, task, training, penalty=remember, progress=False)
            after = task.loss(training.loss)
    assert after < 0.5 * before
    assert len(found.losses) == 20
    moves = [float((b - a).abs().max()) for a, b in pairwise(steps)]
    assert moves[0] == pytest.approx(0.05, rel=0.05)  # Adam's first step is the rate
    assert moves[-1] < 0.02


def test_a_loss_that_breaks_is_an_error() -> None:
    model = tiny.hooked("llama")
    training = Training(loss=lambda answers: answers.chosen.sum() * torch.nan)
    with pytest.raises(RuntimeError, match="the loss became nan in step 1"):
        fit_offsets(model, examples(), [(1, 1)], training=training, progress=False)


def test_batches_are_of_one_length_where_rows_are_padded() -> None:
    model = tiny.hooked("mistral")  # its window is shorter than the prompts: nothing is packed
    task = Task(model, examples(64), Training())
    assert not task.replay.packed
    found = list(task.batches(8, torch.Generator().manual_seed(0)))
    assert sorted(i for batch in found for i in batch) == list(range(64))
    lengths = [[task._lengths[i] for i in batch] for batch in found]
    assert max(max(one) - min(one) for one in lengths) <= 4
    assert lengths != sorted(lengths)


# Results


def test_results_are_saved_and_shown(tmp_path: Path) -> None:
    model = tiny.hooked("llama")
    found = lofit(
        model,
        examples(),
        3,
        training=QUICK,
        selecting=QUICK,
        validation=examples(4, 9),
        progress=False,
    )
    back = LoFiT.load(found.save(tmp_path / "lofit"))
    assert back.selection.ranked == found.selection.ranked
    assert torch.equal(back.tuning.curve.losses, found.tuning.curve.losses)
    assert all(torch.equal(back.offsets[at], found.offsets[at]) for at in found.offsets.heads)
    assert isinstance(back.tuning, HeadTuning)
    settings = back.selection.record.settings
    assert settings["step"] == "A" and settings["training"]["loss"] == "DPO(beta=0.5)"
    assert back.tuning.curve.record.seeds == (42,)
    frame = found.selection.frame()
    assert list(frame["rank"]) == list(range(1, 13))
    assert frame["norm"].is_monotonic_decreasing
    assert len(found.tuning.curve.frame()) == 4
    assert "12 heads ranked" in str(found.selection)
    assert "48 numbers trained in 4 steps" in str(found)
    heads = found.frame()
    assert heads["used"].sum() == 3 and list(heads["used"][:3]) == [True] * 3
    assert len(found.tuning.frame()) == 3 and "<table" in found._repr_html_()
    assert found.tuning.plot().get_xlabel() == found.plot().get_xlabel() == "head"
    axes = found.selection.plot()
    assert axes.get_xlabel() == "head"
    for drawn in (found.tuning.curve.plot(), found.selection.plot_losses()):
        assert drawn.get_ylabel() == "loss (nats)"


@pytest.mark.slow
def test_offsets_teach_a_real_model_a_preference(base: HookedModel) -> None:
    """Eight heads of upper layers learn to prefer one word; held-out prompts follow."""
    asked = [f"Name a colour that goes with {x}." for x in "red blue grey pink white black".split()]
    given = [Preference(text, "Green.", "Yellow.") for text in asked]
    heads = [(layer, 1) for layer in range(20, 28)]
    training = Training(lr=2e-2, epochs=4, batch_size=3)
    tuning = fit_offsets(base, given, heads, training=training, progress=False)
    assert tuning.curve.first_layer == 20
    assert tuning.curve.replay_error < 1e-4
    assert float(tuning.curve.losses[-1]) < 0.4 < float(tuning.curve.losses[0])
    held = ["Name a colour that goes with brown."] * 2

    def margin() -> float:
        a, b = (float(p.sum()) for p in base.logprobs(held, ["Green.", "Yellow."]))
        return a - b

    before = margin()
    with steer(base, tuning.offsets):
        assert margin() > before + 1
