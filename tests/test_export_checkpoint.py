"""A baked folder, loaded by plain transformers, does what the live edit does, or is not written."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import build
from baked import assert_equal_live, drawn, offsets_of, vector_at
from safetensors.torch import load_file, save_file
from tiny import hooked, tokenizer
from transformer_lens.model_bridge.sources import build_bridge_from_module

from probes import HookedModel, Site
from probes.engines import ENGINES
from steering import Origin, SteeringVector
from steering.edits import Scale
from steering.export import checkpoint, repackage
from steering.export.checkpoint import bake

DOWN = r"bias of model\.layers\.1\.mlp\.down_proj \(mlp_bias=True\)"
HELD = {
    "llama": DOWN,
    "smollm3": DOWN,
    "granite": DOWN,
    "gpt2": r"bias of transformer\.h\.1\.mlp\.c_proj",
    "gpt-neox": r"bias of gpt_neox\.layers\.1\.mlp\.dense_4h_to_h",
    "opt": r"bias of model\.decoder\.layers\.1\.fc2",
    "cohere2": r"bias of model\.layers\.1\.self_attn\.o_proj \(attention_bias=True\)",
    "falcon": r"bias of transformer\.h\.1\.mlp\.dense_4h_to_h \(bias=True\)",
    "gpt-oss": r"bias of model\.layers\.1\.mlp\.experts\.down_proj",
    "mamba": r"bias of backbone\.layers\.1\.mixer\.out_proj \(use_bias=True\)",
}
"""Architectures that keep a constant at `1.resid_post`, and where."""


@pytest.mark.parametrize("name", HELD)
def test_a_baked_vector_is_the_live_edit(name: str, tmp_path: Path) -> None:
    model = hooked(name)
    vector = vector_at(model, "1.resid_post")
    before = {key: t.clone() for key, t in model.model.state_dict().items()}
    config = str(model.model.config)
    baked = bake(model, vector, tmp_path / "out", 1.5)
    loaded = assert_equal_live(baked, model, vector, 1.5)
    assert type(loaded) is type(model.model)
    assert re.fullmatch(HELD[name], baked.how), baked.how
    after = model.model.state_dict()  # the caller's is as it was
    assert after.keys() == before.keys() and str(model.model.config) == config
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_biases_that_a_setting_brings_along_are_zeros(tmp_path: Path) -> None:
    model = hooked("llama")
    bake(model, vector_at(model, "1.resid_post"), tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    own = model.model.state_dict()
    assert held.keys() - own.keys() == {
        f"model.layers.{layer}.mlp.{part}.bias"
        for layer in range(3)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    for name, tensor in held.items():
        if name in own:
            assert torch.equal(tensor, own[name])
        else:
            assert bool(tensor.any()) == (name == "model.layers.1.mlp.down_proj.bias")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", r"model.layers.1.self_attn.o_proj, .*2.self_attn.o_proj (attention_bias=True)"),
        ("gpt2", "transformer.h.1.attn.c_proj, transformer.h.2.attn.c_proj"),
        ("qwen3", r"1.self_attn.o_proj, .*2.self_attn.o_proj (attention_bias=True)"),
        ("gemma2", r"1.self_attn.o_proj, .*2.self_attn.o_proj (attention_bias=True)"),
    ],
)
def test_baked_head_offsets_are_the_live_ones(name: str, how: str, tmp_path: Path) -> None:
    model = hooked(name)
    offsets = offsets_of(model)
    baked = bake(model, offsets, tmp_path / "out", -0.8)
    assert_equal_live(baked, model, offsets, -0.8)
    for piece in how.split(".*"):
        assert piece in baked.how


def test_several_sites_need_both_settings_and_units_are_kept(tmp_path: Path) -> None:
    model = hooked("llama-head-dim")
    vectors = {
        Site(0, "head_out", 3): drawn(24),
        Site(0, "resid_post"): drawn(64, seed=1),
        Site(1, "resid_pre"): drawn(64, seed=2),
        Site(2, "attn_out"): drawn(64, seed=3),
    }
    scales = {site: Scale(sigma=2.0 + site.layer) for site in vectors}
    vector = SteeringVector(vectors, Origin.of(model), scales=scales)
    baked = bake(model, vector, tmp_path / "out", 1.3, "sigma")
    assert_equal_live(baked, model, vector, 1.3, "sigma")
    assert baked.how.endswith("(attention_bias=True, mlp_bias=True)")


def test_in_parallel_blocks_attention_carries_what_the_mlp_cannot(tmp_path: Path) -> None:
    model = hooked("cohere2")
    vectors = {
        Site(1, "attn_out"): drawn(64),
        Site(1, "mlp_out"): drawn(64, seed=1),
        Site(2, "resid_pre"): drawn(64, seed=2),
        Site(2, "resid_post"): drawn(64, seed=3),
    }
    scales = {site: Scale(norm=6.0 + i) for i, site in enumerate(vectors)}
    vector = SteeringVector(vectors, Origin.of(model), scales=scales)
    baked = bake(model, vector, tmp_path / "out", 0.9, "fraction")
    assert_equal_live(baked, model, vector, 0.9, "fraction")


def tied_llama() -> HookedModel:
    config = copy.deepcopy(build("llama").config)
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return HookedModel(model.eval(), tokenizer(), name="tied llama")


def test_baked_ablation_is_the_live_one_with_embeddings_untied(tmp_path: Path) -> None:
    model = tied_llama()
    vector = vector_at(model, "1.resid_post", "ablate")
    baked = bake(model, vector, tmp_path / "out")
    loaded = assert_equal_live(baked, model, vector.everywhere(model))
    assert "at every write to the residual stream, in 7 weights" in baked.how
    assert baked.how.endswith("(tie_word_embeddings=False)")
    own = model.model.get_submodule("model.embed_tokens").weight.detach()
    assert torch.equal(loaded.lm_head.weight, own)  # it reads, and is left alone
    unit = drawn(64) / drawn(64).norm()
    assert float((loaded.model.embed_tokens.weight.detach() @ unit).abs().max()) < 1e-5
    assert float((own @ unit).abs().max()) > 0.01  # the control
    assert model.model.config.tie_word_embeddings  # pyright: ignore
    again = bake(model, vector.everywhere(model), tmp_path / "again")  # the same, said in full
    assert again.how == baked.how and again.error == baked.error


def test_a_share_of_an_ablation(tmp_path: Path) -> None:
    model = hooked("opt")
    vector = vector_at(model, "0.resid_pre", "ablate")
    baked = bake(model, vector, tmp_path / "out", 0.6)
    assert_equal_live(baked, model, vector.everywhere(model), 0.6)


@pytest.mark.parametrize("engine", ENGINES)
def test_models_of_every_engine_are_baked(engine: str, tmp_path: Path) -> None:
    model = HookedModel(build("llama"), tokenizer(), engine=engine)
    vector = vector_at(model, "1.resid_post")
    assert_equal_live(bake(model, vector, tmp_path / "out"), model, vector)


@pytest.mark.parametrize("spoil", ["flag", "bits", "setting"])
def test_a_folder_that_fails_the_proof_is_not_left(
    spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hooked("llama")
    write, message = checkpoint.write, "loaded again is .* off the live edit in a logit"
    if spoil == "flag":  # the bias is forgotten, and everything that is written is loaded
        monkeypatch.setattr(repackage, "flags_for", lambda *_: ())
    elif spoil == "bits":
        message = r"model.norm.weight of tiny llama is loaded with other values than were written"

        def altered(*given: Any) -> None:
            write(*given)
            file = given[-1] / "model.safetensors"
            held = load_file(file)
            held["model.norm.weight"][3] += 1e-6
            save_file(held, file, {"format": "pt"})

        monkeypatch.setattr(checkpoint, "write", altered)
    else:
        message = 'does not load as it was written, so none was: .* set "mlp_bias": true'

        def lost(*given: Any) -> None:
            write(*given)
            file = given[-1] / "config.json"
            file.write_text(file.read_text().replace('"mlp_bias": true', '"mlp_bias": false'))

        monkeypatch.setattr(checkpoint, "write", lost)
    with pytest.raises(RuntimeError, match=message):
        bake(model, vector_at(model, "1.resid_post"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_smollm2_from_a_file_of_llama_cpp(base: HookedModel, tmp_path: Path) -> None:
    """A real model, dequantised on loading, which transformers alone would not save."""
    vector = vector_at(base, "12.resid_post", size=2.0)
    baked = bake(base, vector, tmp_path / "out")
    assert baked.how == "bias of model.layers.12.mlp.down_proj (mlp_bias=True)"
    assert baked.error < 1e-4 and baked.effect > 3
    loaded = assert_equal_live(baked, base, vector)
    assert not hasattr(loaded.config, "quantization_config")
    words = transformers.AutoTokenizer.from_pretrained(baked.folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    given = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = loaded.generate(**given, max_new_tokens=8, do_sample=False)
    text = words.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    asked = ["What is the capital of France?"]
    assert text == base.generate(asked, 8, steer=vector)[0] != base.generate(asked, 8)[0]


def test_a_bridge_in_memory_is_written_without_its_bias_of_zeros(tmp_path: Path) -> None:
    original = build("llama")
    bridge = build_bridge_from_module(original, "LlamaForCausalLM", hf_config=original.config)
    model = HookedModel(bridge, tokenizer())
    assert "lm_head.bias" in model.model.state_dict()  # as a bridge has it
    vector = vector_at(model, "1.resid_post")
    baked = bake(model, vector, tmp_path / "out")
    assert_equal_live(baked, model, vector)
    assert re.fullmatch(HELD["llama"], baked.how)
