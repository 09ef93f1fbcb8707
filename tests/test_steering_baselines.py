"""What LoFiT is compared with: counted parameters, the same loop, models left as they were."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from architectures import build

from probes import HookedModel
from steering.baselines import (
    LoraTuning,
    by_offset_norm,
    fit_all_heads,
    fit_lora,
    random_heads,
)
from steering.choices import score_choices
from steering.lofit import fit_offsets
from steering.preferences import Preference
from steering.questions import Question
from steering.tuning import Task, Training

QUICK = Training(lr=1e-2, epochs=3, batch_size=4)


def examples(n: int = 8, seed: int = 0) -> list[Preference]:
    texts = (tiny.words(n, seed), tiny.words(n, seed + 1, 1, 4), tiny.words(n, seed + 2, 1, 4))
    return [Preference(p, a, b) for p, a, b in zip(*texts, strict=True)]


def fresh() -> HookedModel:
    return HookedModel(build("llama"), tiny.tokenizer(), name="tiny")


def test_random_heads_are_drawn_by_seed() -> None:
    model = tiny.hooked("llama")
    assert random_heads(model, 5, 0) == random_heads(model, 5, 0)
    assert random_heads(model, 5, 0) != random_heads(model, 5, 1)
    assert len(set(random_heads(model, 12, 3))) == 12
    counts = torch.zeros(3, 4)
    for seed in range(300):
        for at in random_heads(model, 3, seed):
            counts[at] += 1
    assert (counts / 300 - 0.25).abs().max() < 0.1
    with pytest.raises(ValueError, match="13 heads of 12"):
        random_heads(model, 13, 0)


def test_all_heads_are_tuned_and_ranked_by_their_offsets() -> None:
    model = fresh()
    found = fit_all_heads(model, examples(), training=QUICK, progress=False)
    assert found.curve.n_parameters == found.offsets.n_parameters == 12 * 16
    top = by_offset_norm(found.offsets, 3)
    norms = [float(found.offsets[at].norm()) for at in top]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] == max(float(v.norm()) for v in found.offsets.vectors.values())
    given = fit_offsets(model, examples(), top, training=QUICK, progress=False)
    assert set(given.offsets.heads) == set(top)
    with pytest.raises(ValueError, match="13 heads of 12"):
        by_offset_norm(found.offsets, 13)


def test_lora_learns_is_counted_and_leaves_the_model_as_it_was() -> None:
    model = fresh()
    prompts = tiny.words(5, 3)
    before, state = model.logits(prompts), dict(model.model.state_dict())
    named = [name for name, _ in model.model.named_modules()]
    own = set(vars(model.model))
    found = fit_lora(model, examples(), training=QUICK, progress=False)
    assert float(found.curve.losses[0]) == pytest.approx(0.6931, abs=1e-3)  # B starts at 0
    assert found.curve.losses[-2:].mean() < 0.5
    # q: 64 to 64, v: 64 to 32, three layers
    assert found.n_parameters == found.curve.n_parameters == 3 * 8 * (64 + 64 + 64 + 32)
    assert torch.equal(before, model.logits(prompts))
    assert set(vars(model.model)) == own
    assert [name for name, _ in model.model.named_modules()] == named
    assert all(torch.equal(t, state[n]) for n, t in model.model.state_dict().items())
    assert all(p.requires_grad for p in model.model.parameters())
    with found.applied(model):
        assert not torch.allclose(before, model.logits(prompts), atol=1e-2)
        again = Task(model, examples(), QUICK).replay.all_logprobs()
    plain = Task(model, examples(), QUICK).replay.all_logprobs()
    margin = (again - plain)[:8] - (again - plain)[8:]
    assert margin.mean() > 0.5
    assert torch.equal(before, model.logits(prompts))


def test_an_applied_adapter_equals_merged_weights(tmp_path: Path) -> None:
    model = fresh()
    found = fit_lora(model, examples(), training=QUICK, dropout=0.5, progress=False)
    merged = fresh()
    scale = found.alpha / found.rank
    for name, A in found.adapter.items():
        if "lora_A" not in name:
            continue
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = found.adapter[name.replace("lora_A", "lora_B")]
        merged.model.get_submodule(path).weight.data += scale * B @ A
    prompts = tiny.words(4, 7)
    with found.applied(model):
        torch.testing.assert_close(
            model.logits(prompts), merged.logits(prompts), rtol=1e-4, atol=1e-5
        )
        live = score_choices(model, [Question("w1", ("w2",), ("w3",), "w2")])
    want = score_choices(merged, [Question("w1", ("w2",), ("w3",), "w2")])
    torch.testing.assert_close(live.scores, want.scores, rtol=1e-4, atol=1e-4)
    folder = found.save(tmp_path / "lora")
    back = LoraTuning.load(folder)
    assert (back.rank, back.alpha, back.dropout, back.targets) == (8, 8.0, 0.5, found.targets)
    assert back.n_parameters == found.n_parameters
    assert all(torch.equal(back.adapter[name], found.adapter[name]) for name in found.adapter)
    assert torch.equal(back.curve.losses, found.curve.losses)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (
        8,
        8.0,
        ["q_proj", "v_proj"],
    )
    from peft import PeftModel

    reread = PeftModel.from_pretrained(build("llama"), str(folder))
    with found.applied(model):
        here = model.logits(prompts)
    other = HookedModel(reread, tiny.tokenizer(), name="reread")
    torch.testing.assert_close(here, other.logits(prompts), rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_steps_only_and_seeds_decide() -> None:
    with_drop, again, without = (
        fit_lora(
            fresh(),
            examples(),
            training=QUICK,
            dropout=p,
            validation=examples(4, 9),
            progress=False,
        )
        for p in (0.5, 0.5, 0.0)
    )
    assert torch.equal(with_drop.curve.losses, again.curve.losses)
    assert not torch.equal(with_drop.curve.losses, without.curve.losses)
    model = fresh()
    with with_drop.applied(model):  # the loss held out is that of the adapter without dropout
        task = Task(model, examples(4, 9), QUICK)
        moved = task.replay.all_logprobs()
    plain = Task(model, examples(4, 9), QUICK).replay.all_logprobs()
    gain = (moved - plain)[:4] - (moved - plain)[4:]
    want = -torch.nn.functional.logsigmoid(0.5 * gain).mean()
    assert float(with_drop.curve.validation[-1]) == pytest.approx(float(want), abs=1e-4)


def test_lora_refuses_what_it_cannot_do() -> None:
    model = fresh()
    with pytest.raises(ValueError, match="has no modules named query"):
        fit_lora(model, examples(), targets=("query",), training=QUICK)
    lens = HookedModel(build("llama"), tiny.tokenizer(), engine="nnsight", name="tiny")
    with pytest.raises(ValueError, match="load the model with engine='transformers'"):
        fit_lora(lens, examples(), training=QUICK)
    found = fit_lora(model, examples(), training=QUICK, progress=False)
    wrong = {f"base_model.model.x.{name}": t for name, t in found.adapter.items()}
    other = LoraTuning(wrong, 8, 8.0, 0.1, ("q_proj", "v_proj"), found.curve)
    with pytest.raises(ValueError, match="belongs to another model"), other.applied(model):
        pass
    assert not any("lora" in name for name, _ in model.model.named_modules())
