"""`HookedModel` around every kind of model, and what it computes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import build

from probes import Edit, HookedModel, Site, capture
from probes.engines import ENGINES
from probes.scanning import monitor

PROMPTS = tiny.words(5, seed=3)


def plain(name: str = "llama") -> Any:
    return build(name)


def agree(a: HookedModel, b: HookedModel, tolerance: float = 1e-5) -> None:
    for site in ("0.resid_post", "2.resid_post", "1.head_out"):
        x, y = (capture(model, PROMPTS, site, progress=False)[site] for model in (a, b))
        assert ((x - y).norm() / y.norm()) <= tolerance


def test_a_bridge_in_memory_is_taken_with_its_engine() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = plain()
    config = copy.deepcopy(model.config)
    bridge = build_bridge_from_module(copy.deepcopy(model), "LlamaForCausalLM", hf_config=config)
    hooked = HookedModel(bridge, tiny.tokenizer())
    assert hooked.engine.name == "transformer_lens"
    agree(hooked, HookedModel(model, tiny.tokenizer()))
    with pytest.raises(ValueError, match="whose engine is 'transformer_lens'"):
        HookedModel(bridge, tiny.tokenizer(), engine="nnsight")


def test_an_nnsight_model_in_memory_is_taken_with_its_engine() -> None:
    import beartype  # noqa: F401  (before nnsight, which mounts .save on every object)
    import nnsight

    model = plain()
    hooked = HookedModel(nnsight.NNsight(model), tiny.tokenizer())
    assert hooked.engine.name == "nnsight"
    agree(hooked, HookedModel(model, tiny.tokenizer()))


def test_a_live_adapter_is_read_through() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        wrapped = get_peft_model(plain(), config).eval()
    hooked = HookedModel(wrapped, tiny.tokenizer())
    merged = HookedModel(
        copy.deepcopy(wrapped).merge_and_unload(),  # pyright: ignore[reportCallIssue]
        tiny.tokenizer(),
    )
    agree(hooked, merged)
    bare = HookedModel(plain(), tiny.tokenizer())
    with pytest.raises(AssertionError):
        agree(hooked, bare)


def test_weights_on_disk_are_read_with_the_plain_engine(tmp_path: Path) -> None:
    from accelerate import disk_offload

    whole = HookedModel(plain(), tiny.tokenizer())
    model = plain()
    disk_offload(model, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in model.model.layers.parameters())
    agree(HookedModel(model, tiny.tokenizer()), whole)
    with pytest.raises(ValueError, match="device_map needs engine='transformers'"):
        HookedModel.load("builtin:base", "nnsight", device_map="auto")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a transformers model, a TransformerBridge"):
        HookedModel(torch.nn.Linear(2, 2))
    model = plain()
    model.train()
    with pytest.raises(ValueError, match="training mode, where dropout changes values: call"):
        HookedModel(model)
    with pytest.raises(ValueError, match="was given without a tokenizer"):
        HookedModel(plain()).logits(["w1 w2"])
    with pytest.raises(ValueError, match="unknown dtype 'float33': use float32"):
        HookedModel.load("builtin:base", dtype="float33")


def test_logprobs_are_those_of_the_whole_text(llama: HookedModel) -> None:
    answers = ["w3 w4", "w5", "w6 w7 w8"]
    found = llama.logprobs(PROMPTS[:3], answers, batch_size=2)
    for prompt, answer, one in zip(PROMPTS, answers, found, strict=False):
        rendered = llama.template.render(prompt, answer)
        ids = torch.tensor([rendered.ids])
        with torch.no_grad():
            logs = llama.model(ids).logits[0].log_softmax(-1)
        truth = [logs[i - 1, ids[0, i]] for i in range(rendered.n_prompt, ids.shape[1])]
        assert torch.allclose(one, torch.stack(truth), atol=1e-5)
    first = llama.logits(PROMPTS[:3])
    assert first.shape == (3, llama.layout.vocab_size)
    assert torch.allclose(
        first[0].log_softmax(-1)[llama.template.render(PROMPTS[0], answers[0]).ids[-2]],
        found[0][0],
        atol=1e-5,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_of_answers_are_asked_for_at_one_position_a_prompt(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every position a vocabulary of 150,000 would be most of the memory."""
    hooked = HookedModel(plain(), tiny.tokenizer(), engine=engine)
    batch = hooked.batch(hooked.template.render_all(PROMPTS))
    logits, columns = hooked.engine.logits, []

    def counting(*given: Any) -> torch.Tensor:
        found = logits(*given)
        columns.append(found.shape[1])
        return found

    monkeypatch.setattr(hooked.engine, "logits", counting)
    found = hooked.logits(PROMPTS)
    assert columns == [1]
    everywhere = logits(batch)
    assert everywhere.shape[1] > 1  # the control: there was more to ask for
    torch.testing.assert_close(found, everywhere[:, -1])


def test_generation_ignores_the_defaults_a_checkpoint_ships(llama: HookedModel) -> None:
    plainly = llama.generate_ids(PROMPTS, 6)
    shipped = llama.model.generation_config
    shipped.repetition_penalty, shipped.do_sample, shipped.temperature = 5.0, True, 3.0
    assert llama.generate_ids(PROMPTS, 6) == plainly
    assert llama.model.generation_config is shipped
    assert llama.generate_ids(PROMPTS, 6, batch_size=1) == plainly  # batches change nothing


def test_edits_given_to_generate_act_and_are_gone(llama: HookedModel) -> None:
    before = llama.generate_ids(PROMPTS, 6)
    turned = llama.generate_ids(PROMPTS, 6, edits={"all.mlp_out": lambda h, _: -2 * h})
    assert turned != before
    assert llama.generate_ids(PROMPTS, 6) == before
    with pytest.raises(ValueError, match="edit scope 'answer': expected"):
        Edit(Site(0, "mlp_out"), lambda h, _: h, "answer")


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_monitor_hears_every_step_and_changes_nothing(
    llama: HookedModel, batch_size: int
) -> None:
    unit = torch.nn.functional.normalize(
        torch.randn(llama.d_model, generator=torch.Generator().manual_seed(1)), dim=0
    )
    quiet = llama.generate_ids(PROMPTS, 4, batch_size=batch_size)
    heard: list[tuple[int, torch.Tensor]] = []
    with monitor(llama, 3 * unit, 1, lambda step, p: heard.append((step, p))):
        assert llama.generate_ids(PROMPTS, 4, batch_size=batch_size) == quiet
    steps = [step for step, _ in heard]
    assert steps[:3] == [0, 1, 2]
    if batch_size == 5:
        order = sorted(range(5), key=lambda i: len(llama.template.render(PROMPTS[i]).ids))
        truth = capture(llama, [PROMPTS[i] for i in order], "1.resid_post", progress=False)
        assert torch.allclose(heard[0][1], truth["1.resid_post"] @ unit, atol=1e-4)


@pytest.mark.parametrize(
    ("unit", "sentence"),
    [
        (torch.ones(3), r"shape \(3,\), expected"),
        (torch.zeros(64), "the direction is zero"),
        (torch.full((64,), float("nan")), "NaN or infinite"),
    ],
)
def test_a_bad_direction_is_refused(llama: HookedModel, unit: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), monitor(llama, unit, 1, lambda *_: None):
        pass
