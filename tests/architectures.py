"""Tiny random models, one for each architecture that the engines are tested on.

Every model is built from its configuration alone: nothing is read from a disk or a hub. Weights
are float32 and the same on every call. They are scaled so that attention is far from uniform, and
whatever an architecture initialises to a constant (norm weights, biases, scales) carries a little
noise, so that an engine which skips one of them gives visibly different numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 200
PAD, BOS, EOS = 0, 1, 2
# The ids above this range are the placeholders of images and audio in the multimodal models.
ORDINARY_TOKENS = range(3, 190)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"


def _config(family: str, **settings: Any) -> Any:
    """The family's configuration: the common settings that it knows, and the given ones."""
    kind = getattr(transformers, f"{family}Config")
    # An unknown setting would be kept as a plain attribute: GPT-2 would claim to have kv heads.
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    common = {name: value for name, value in _COMMON.items() if name in known}
    return kind(**{**common, **settings})


def _perturb(model: PreTrainedModel) -> None:
    """Move every constant tensor of the model away from the value it was initialised to."""
    generator = torch.Generator().manual_seed(1)
    scalars = []
    for name, value in model.state_dict().items():
        if name.endswith("layer_scalar"):
            scalars.append(value)
        elif value.is_floating_point() and value.isfinite().all() and value.min() == value.max():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    for value, scalar in zip(scalars, torch.linspace(0.8, 1.2, len(scalars)), strict=True):
        value.fill_(scalar)


def _model(construct: Callable[..., PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = construct(config).float()
    _perturb(model)
    return model.eval()


def _causal(family: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    """A builder of the family's causal language model."""
    return lambda: _model(AutoModelForCausalLM.from_config, _config(family, **settings))


# Sliding layers have heads of 24, full ones of 32; the last two layers reuse the keys and values
# of the first two, as in the published small models.
_GEMMA4_TEXT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": [_SLIDING, _FULL] * 2,
    "num_kv_shared_layers": 2,
    "head_dim": 24,
    "global_head_dim": 32,
    "sliding_window": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": 30.0,
}
_GEMMA3_TEXT: dict[str, Any] = {
    "layer_types": [_SLIDING, _FULL, _SLIDING],
    "head_dim": 24,
    "query_pre_attn_scalar": 24,
    "sliding_window": 4,
}


# Both towers are as deep as the language model beside them: a search for the list of
# num_hidden_layers modules has to tell them apart by more than its length.
def _gemma4_conditional() -> PreTrainedModel:
    vision = transformers.Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=4,
        position_embedding_size=64,
    )
    audio = transformers.Gemma4AudioConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        subsampling_conv_channels=[8, 8],
        output_proj_dims=32,
    )
    config = transformers.Gemma4Config(
        text_config=_config("Gemma4Text", **_GEMMA4_TEXT),
        vision_config=vision,
        audio_config=audio,
        boi_token_id=193,
        eoi_token_id=194,
        image_token_id=195,
        video_token_id=196,
        boa_token_id=197,
        eoa_token_index=198,
        audio_token_id=199,
        initializer_range=0.15,
    )
    return _model(transformers.Gemma4ForConditionalGeneration, config)


def _gemma3_conditional() -> PreTrainedModel:
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    config = transformers.Gemma3Config(
        text_config=_config("Gemma3Text", **_GEMMA3_TEXT),
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=197,
        eoi_token_index=198,
        image_token_index=199,
        initializer_range=0.15,
    )
    return _model(transformers.Gemma3ForConditionalGeneration, config)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _causal("Llama"),
    "llama-head-dim": _causal("Llama", head_dim=24),
    "mistral": _causal("Mistral", sliding_window=4),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3", head_dim=24),
    "qwen3-moe": _causal("Qwen3Moe", head_dim=24, num_experts=4, **_EXPERTS),
    "mixtral": _causal("Mixtral", num_local_experts=4),
    "gemma2": _causal("Gemma2", head_dim=24, query_pre_attn_scalar=24, sliding_window=4),
    "gemma3-text": _causal("Gemma3Text", **_GEMMA3_TEXT),
    "gemma4-text": _causal("Gemma4Text", **_GEMMA4_TEXT),
    "gemma4-conditional": _gemma4_conditional,
    "phi3": _causal("Phi3"),
    "gpt2": _causal("GPT2"),
    "gpt-neox": _causal("GPTNeoX"),
    "opt": _causal("OPT", ffn_dim=128, init_std=0.15),
    "falcon": _causal("Falcon", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=128),
    "olmo2": _causal("Olmo2"),
    "cohere2": _causal(
        "Cohere2", sliding_window=4, layer_types=[_SLIDING, _FULL, _SLIDING], logit_scale=0.5
    ),
    "stablelm": _causal("StableLm", use_qkv_bias=True),
    "smollm3": _causal("SmolLM3", no_rope_layer_interval=2),
    "gpt-oss": _causal(
        "GptOss",
        head_dim=24,
        sliding_window=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=32,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    ),
    "granite": _causal(
        "Granite",
        embedding_multiplier=6.0,
        attention_multiplier=0.2,
        residual_multiplier=0.6,
        logits_scaling=2.0,
    ),
    "deepseek-v3": _causal(
        "DeepseekV3",
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_mtp_layers=0,
        **_EXPERTS,
    ),
    "mamba": _causal("Mamba", state_size=8),
    # Every pairing occurs once: Mamba or attention, with or without experts.
    "jamba": _causal(
        "Jamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=3,
        expert_layer_offset=0,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
    ),
    "qwen3-next": _causal(
        "Qwen3Next",
        num_hidden_layers=4,
        layer_types=[_LINEAR, _LINEAR, _FULL, _LINEAR],
        mlp_only_layers=[0],
        head_dim=24,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        shared_expert_intermediate_size=32,
        num_experts=4,
        **_EXPERTS,
    ),
    "gemma3-conditional": _gemma3_conditional,
}

EXTRA: dict[str, Callable[[], PreTrainedModel]] = {
    "falcon-7b": _causal("Falcon", multi_query=True, parallel_attn=True, ffn_hidden_size=128),
    # As in Falcon-RW: the residual stream is sequential and every linear layer has a bias.
    "falcon-mha": _causal(
        "Falcon", multi_query=False, parallel_attn=False, bias=True, ffn_hidden_size=128
    ),
    "gpt-neox-sequential": _causal("GPTNeoX", use_parallel_residual=False),
}


def build(name: str) -> PreTrainedModel:
    """The named model, of `ARCHITECTURES` or `EXTRA`."""
    return {**ARCHITECTURES, **EXTRA}[name]()
