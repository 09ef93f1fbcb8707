"""A model that a vLLM server runs: configuration and tokenizer are read here, the weights are not."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from probes import names
from probes.engines.vllm import ELSEWHERE, VllmEngine
from probes.layout import Block, Layout
from probes.names import Name
from probes.servers import Refused, post
from probes.sites import PARTS

START = (
    "start one with `vllm serve MODEL --no-enable-prefix-caching` in a Python that has vllm-lens, "
    "and pass its address: HookedModel.load(name, engine='vllm', server='http://127.0.0.1:8000')"
)

_SAMPLE = "What is 17 + 25?\n\nDer Zug f\u00e4hrt um 9:05 ab."
"""A text on which tokenizers differ."""


def connect(
    name: Name,
    server: str | None,
    dtype: str | torch.dtype,
    device: str | None,
    options: Mapping[str, Any],
) -> tuple[VllmEngine, Any, str]:
    """The engine of the model that a server runs, its tokenizer and its fingerprint.

    The fingerprint is that of the files behind `name` with the served name: which weights the
    server has cannot be asked. `dtype` float32, the default elsewhere, takes what the server has.
    """
    if server is None:
        raise ValueError(f"engine='vllm' reads a running server: {START}")
    if odd := [*({"device"} if device else ()), *sorted(set(options) - {"served", "concurrency"})]:
        raise ValueError(
            f"with engine='vllm' the server loads the model: {', '.join(odd)} cannot be chosen "
            "here, only served (the model's name there) and concurrency"
        )
    model, tokenizer = names.outline(name)
    engine = VllmEngine(model, outline(model), server, **options)
    if dtype not in ("auto", torch.float32, model.dtype):
        raise ValueError(
            f"{engine.served!r} runs in {engine.check.dtype}, asked for was {dtype}: start the "
            "server with another --dtype, or leave dtype out"
        )
    check_tokenizer(engine, tokenizer)
    files = names.fingerprint_files(name) or names.fingerprint_memory(model, tokenizer)
    return engine, tokenizer, f"{files}-{engine.check.dtype}-{engine.served}"


def check_tokenizer(engine: VllmEngine, tokenizer: Any) -> None:
    """Refuse a tokenizer that gives other ids than the server's, where the server has one."""
    body = {"model": engine.served, "prompt": _SAMPLE, "add_special_tokens": False}
    try:
        there = post(f"{engine.address}/tokenize", body).get("tokens")
    except Refused:  # started without a tokenizer or this route: ids are all it gets anyway
        return
    here = list(tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"])
    if there != here:
        raise ValueError(
            f"the tokenizer of {engine.served!r} at {engine.address} gives other token ids than "
            f"the one loaded here ({str(there)[:60]} and {str(here)[:60]}): load the model that the "
            "server runs"
        )


def outline(model: Any) -> Layout:
    """The sizes of a model from its configuration, with the parts that a server returns.

    The numbers of heads are there because they say which models a vector fits.
    """
    text = model.config.get_text_config()
    width: int = text.hidden_size
    n_heads = getattr(text, "num_attention_heads", None)
    readable = {"resid_pre", "resid_post"}
    heads: dict[str, int] = {}
    widths = dict.fromkeys(readable, width)
    if isinstance(n_heads, int) and n_heads:
        own: list[Any] = [getattr(text, name, None) for name in ("v_head_dim", "head_dim")]
        n_kv = getattr(text, "num_key_value_heads", None)
        heads = {"head_out": n_heads, "k": n_kv if isinstance(n_kv, int) else n_heads}
        widths["head_out"] = next((d for d in own if isinstance(d, int)), width // n_heads)
        readable.add("head_out")  # refused by the engine: the model has it
    refused = dict.fromkeys([part for part in PARTS if part not in readable], ELSEWHERE)
    blocks = tuple(
        Block(
            path=f"layers.{layer}",
            attention="",
            points=MappingProxyType({}),
            refused=MappingProxyType(refused if layer else {**refused, "resid_pre": ELSEWHERE}),
            heads=MappingProxyType(heads),
            widths=MappingProxyType(widths),
            sums=False,
        )
        for layer in range(text.num_hidden_layers)
    )
    architecture, kind = type(model).__name__, model.config.model_type
    return Layout(blocks, width, text.vocab_size, architecture, False, kind)
