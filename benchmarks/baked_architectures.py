"""Which baked checkpoints does llama.cpp run, and are they then what was meant?

    make serve-llamacpp && python benchmarks/baked_architectures.py

For every architecture a small random model with SmolLM2's tokenizer gets a constant offset at the
output of its middle block (or, where that has no exact bias, offsets at two heads), is baked,
converted by llama.cpp's own converter to a float32 GGUF, and run by its C library. Printed is the
verdict: equal, different, ignored, or what the converter or loader says.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "SmolLM3": {},
    "Granite": {},
    "GPT2": {"n_embd": 256, "n_head": 4, "n_layer": 4, "n_positions": 512, "n_ctx": 512},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 512, "word_embed_proj_dim": 256},
    "Cohere2": {},
    "Falcon": {"bias": True, "alibi": False},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 64},
    "Mamba": {"state_size": 16},
}
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.05,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Baked checkpoints in llama.cpp.")
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    warnings.filterwarnings("ignore")
    for family in parser.parse_args().only:
        print(f"{family:10} {outcome(family)}", flush=True)


def outcome(family: str) -> str:
    import torch

    from probes import HookedModel, Site
    from probes.sites import Unsupported
    from steering import HeadOffsets, Origin, Steering, SteeringVector
    from steering.export.checkpoint import bake
    from steering.export.proving import prompts_for, prove

    model = HookedModel(random_model(family), tokenizer(), name=family)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(model.d_model, generator=generator)
    what: Any = SteeringVector({Site(1, "resid_post"): 2 * v / v.std()}, Origin.of(model))
    place = "resid_post"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = bake(model, what, Path(scratch) / "baked")
        except Unsupported:
            place, width = "head_out", model.layout.blocks[1].widths["head_out"]
            rows = {(1, h): torch.randn(width, generator=generator) for h in (0, 3)}
            what = HeadOffsets({key: 3 * row for key, row in rows.items()}, Origin.of(model))
            try:
                done = bake(model, what, Path(scratch) / "heads")
            except Unsupported as error:
                return f"no exact bias: {error}"
        try:
            found = prove(
                model, Steering(what), done.folder, "checkpoint", "llama.cpp",
                prompts=prompts_for(model, 2), n_tokens=3,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            return f"{place}, {done.architecture}: {str(error).rpartition('.gguf: ')[2][:150]}"
    return (
        f"{place}, {done.architecture}: {found.outcome}, off by "
        f"{found.gaps['as it was made']:.1e} of an effect of {found.effect:.2g}; unsteered off by "
        f"{'?' if found.floor is None else format(found.floor, '.1e')}"
    )


def random_model(family: str) -> Any:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    kind = getattr(transformers, f"{family}Config")
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    own = tokenizer()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    ids = {"vocab_size": len(own), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**{**sizes, **ids, **FAMILIES[family]}))
    return model.float().eval()


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from probes.lineage.base import base_folder

    return AutoTokenizer.from_pretrained(base_folder())


if __name__ == "__main__":
    main()
