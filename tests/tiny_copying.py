"""A two-layer Llama in which one head copies a content word to the answer, and all others write
where no answer is read."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = range(30, 42)
"""Ids of the content words w7 to w18 of `tiny.tokenizer`."""

HEAD = (1, 2)
"""Layer and head of the copying head; its values come from key-value head 1."""


def word(k: int) -> str:
    """The k-th content word, as text of `tiny.tokenizer`."""
    import tiny

    return tiny.tokenizer().convert_ids_to_tokens(WORDS[k])


def copying(linear: bool = False) -> Any:
    """Words are one-hot in dimensions 0 to 11, answers in 12 to 23, everything else in the rest.

    With `linear` there are no norms, attention is uniform and MLPs are linear maps.
    """
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=200,
                hidden_size=64,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=128,
                initializer_range=0.15,
                tie_word_embeddings=False,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ).eval()
        maps = [nn.Linear(64, 64, bias=False) for _ in model.model.layers]
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, :24] = 0
        head.zero_()
        for k, token in enumerate(WORDS):
            embedding[token] = 0
            embedding[token, k] = 4
            head[token, 12 + k] = 1
        for layer, block in enumerate(model.model.layers):
            _elsewhere(block.self_attn.o_proj.weight)
            _elsewhere(block.mlp.down_proj.weight)
            block.self_attn.q_proj.weight.mul_(0 if linear else 1)
            if layer == HEAD[0]:
                values, out = block.self_attn.v_proj.weight, block.self_attn.o_proj.weight
                values[16:].zero_()
                out[:, 32:48].zero_()
                for k in range(12):
                    values[16 + k, k] = 1
                    out[12 + k, 32 + k] = 30
                # the copying head looks at all tokens alike
                block.self_attn.q_proj.weight[32:48].zero_()
            if linear:
                _elsewhere(maps[layer].weight)
                block.mlp = maps[layer]
                block.input_layernorm = block.post_attention_layernorm = nn.Identity()
        if linear:
            model.model.norm = nn.Identity()
    return model.eval()


def _elsewhere(weight: Tensor) -> None:
    """Let a map write into dimensions 24 and up only."""
    weight[:24] = 0
