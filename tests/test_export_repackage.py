"""Architectures that keep no bias: written as Llama where that computes the same, or refused."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import build
from baked import assert_equal_live, offsets_of, vector_at
from tiny import hooked, tokenizer
from torch import nn

from probes import HookedModel
from probes.sites import Unsupported
from steering.export.checkpoint import bake
from steering.export.repackage import flags_for

EXACTLY = "what holds it exactly: a control vector of llama.cpp or a vector for vllm-lens"


def renamed(name: str, **settings: Any) -> HookedModel:
    """The tiny model with other settings of its sliding window."""
    config = copy.deepcopy(build(name).config)
    for key, value in settings.items():
        setattr(config, key, value)
    model: Any = type(build(name))(config)
    model.load_state_dict(build(name).state_dict())
    return HookedModel(model.eval(), tokenizer(), name=f"tiny {name}")


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
@pytest.mark.parametrize("kind", ["vector", "heads"])
def test_llama_by_another_name_is_written_as_llama(name: str, kind: str, tmp_path: Path) -> None:
    window = {"sliding_window": None} if name == "mistral" else {}
    rotation = {"rope_type": "default", "rope_theta": 500.0}
    model = renamed(name, **window, rope_parameters=rotation, rms_norm_eps=1e-3)
    what = vector_at(model, "1.resid_post") if kind == "vector" else offsets_of(model)
    baked = bake(model, what, tmp_path / "out")
    loaded = assert_equal_live(baked, model, what)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert baked.how.endswith(", written as LlamaForCausalLM")
    assert loaded.config.attention_bias == (name == "qwen2" or kind == "heads")
    own, held = model.model.state_dict(), loaded.state_dict()
    assert all(torch.equal(held[key], t) for key, t in own.items())
    zeros = held.get("model.layers.0.self_attn.o_proj.bias")
    assert zeros is None or not bool(zeros.any())
    plain = bake(model, None, tmp_path / "plain")  # nothing to keep: the class stays
    assert plain.architecture == type(model.model).__name__


def sliding(layers: int) -> HookedModel:
    kinds = ["sliding_attention"] * layers + ["full_attention"] * (3 - layers)
    return renamed("qwen2", use_sliding_window=True, sliding_window=5, layer_types=kinds)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mistral", r"MistralConfig keeps .*1.mlp.down_proj.bias .* sliding window of 4 tokens"),
        ("gemma2", r"puts a norm \(.*\) between its projections and the residual stream"),
        ("gemma3-text", r"puts a norm \(.*\) between its projections and the residual stream"),
        ("olmo2", r"puts a norm \(.*\) between its projections and the residual stream"),
        ("mixtral", "mixture of experts without biases"),
        ("phi3", r"no setting of Phi3Config keeps model.layers.1.mlp.down_proj.bias on loading"),
        ("stablelm", "no setting of StableLmConfig keeps"),
        ("qwen3", "no setting of Qwen3Config keeps"),
    ],
)
def test_where_no_checkpoint_holds_a_vector_that_is_said(
    name: str, why: str, tmp_path: Path
) -> None:
    model = hooked(name)
    kind = type(model.model).__name__
    with pytest.raises(
        Unsupported, match=f"a checkpoint of {kind} cannot hold a vector at 1.resid_post: .*{why}"
    ) as refused:
        bake(model, vector_at(model, "1.resid_post"), tmp_path / "out")
    assert EXACTLY in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_other_refusals(tmp_path: Path) -> None:
    out, llama = tmp_path / "out", hooked("llama")
    bake(sliding(0), vector_at(sliding(0), "1.resid_post"), tmp_path / "held")  # the control
    shutil.rmtree(tmp_path / "held")
    with pytest.raises(Unsupported, match="cannot hold a vector .* window of 5 tokens is one"):
        bake(sliding(1), vector_at(sliding(1), "1.resid_post"), out)
    with pytest.raises(Unsupported, match=r"hold offsets at 3 heads: .*; steer it live \(`ste"):
        bake(hooked("mixtral"), offsets_of(hooked("mixtral")), out)
    with pytest.raises(Unsupported, match="Olmo2ForCausalLM cannot hold ablation at every write"):
        bake(hooked("olmo2"), vector_at(hooked("olmo2"), "1.resid_post", "ablate"), out)
    with pytest.raises(Unsupported, match=r"0.resid_pre is the embedding itself"):
        bake(llama, vector_at(llama, "0.resid_pre"), out)
    vector = vector_at(llama, "1.resid_post")
    with pytest.raises(Unsupported, match="'clamp' depends on the activation .* for 'add' or 'ab"):
        bake(llama, vector.doing("clamp", 0.0), out)
    with pytest.raises(ValueError, match="strength 0 changes nothing"):
        bake(llama, vector, out, 0.0)
    with pytest.raises(ValueError, match="leave them out to write the model as it is"):
        bake(llama, None, out, 2.0)
    with pytest.raises(ValueError, match="one vector is ablated everywhere, this has 2"):
        bake(llama, (vector + vector_at(llama, "0.resid_post")).doing("ablate"), out)
    with pytest.raises(ValueError, match="come from tiny llama .* the model given is"):
        bake(hooked("granite"), vector, out)
    int8 = HookedModel(build("llama"), tokenizer())
    weight = int8.model.get_submodule("model.layers.1.mlp.down_proj").weight
    weight.requires_grad_(False).data = weight.data.char()
    with pytest.raises(Unsupported, match=r"down_proj.weight \(int8\) is quantised"):
        bake(int8, None, out)
    assert not list(tmp_path.iterdir())


class Settings:
    """A configuration of flags alone."""

    def __init__(self) -> None:
        self.all_bias = self.out_bias = self.gate_bias = self.other = False

    def get_text_config(self) -> "Settings":
        return self

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Layers(nn.Module):
    """`out` gets a bias from two settings; one of them gives `more` a bias too."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.out = nn.Linear(2, 2, bias=config.all_bias or config.out_bias or config.other)
        self.more = nn.Linear(2, 2, bias=config.all_bias)
        if config.gate_bias:  # with a weight of its own, which has no neutral value
            self.gate = nn.Linear(2, 2)


def test_the_fewest_settings_with_the_fewest_other_biases_are_taken() -> None:
    weights = {"out.weight", "more.weight"}
    assert flags_for(Layers, Settings(), weights) == ()
    assert flags_for(Layers, Settings(), {*weights, "out.bias"}) == ("out_bias",)
    assert flags_for(Layers, Settings(), {*weights, "more.bias"}) == ("all_bias",)
    assert flags_for(Layers, Settings(), {*weights, "gate.bias"}) is None
    assert flags_for(Layers, Settings(), {*weights, "nowhere.bias"}) is None
