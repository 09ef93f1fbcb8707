"""How long does a map of all heads take beside a plain loop?

    python benchmarks/patching.py                 all parts
    python benchmarks/patching.py --rounds 5      more rounds of each layer

The task: every head of every layer of SmolLM2-135M patched alone, 32 chat prompts of the shipped
test twins, float32, one thread, CPU time. The values come from a checkpoint that differs in every
layer ("all layers differ"), or from the aligned built-in checkpoint into the mixed one, which are
equal below layer 10 ("equal below 10"). The plain loop makes one batched forward pass a head with
a hook that writes the head's values at every token, and asks the model for the last token's logits
only; the lens loop does the same through a TransformerLens bridge. Values are read once for all
tools and not counted, and neither are the two passes a map needs for them.

The maps are not run whole: a few layers are measured, all heads of them by alignlens, which runs
heads together, and one by the loops; rounds of all tools alternate, and seconds a layer are
interpolated between those measured and summed over 30 layers.
The ratio, plain loop over ours, is formed in each round; printed is its median with the range.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# a neighbour of this file has the name of a package it needs
sys.path.remove(str(Path(__file__).parent))

LAYERS, HEADS, PROMPTS = (0, 7, 15, 22, 29), 9, 32


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds for a map of all heads.")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| source | tool | CPU seconds for 270 heads | plain loop over it |")
    print("|---|---|---|---|")
    for name, tools in tasks().items():
        found: dict[str, list[float]] = {tool: [] for tool in tools}
        for _ in range(rounds):
            for tool, run in tools.items():
                each = 1 if tool == "alignlens" else HEADS
                found[tool].append(whole_map([each * seconds(run, layer) for layer in LAYERS]))
        for tool, totals in found.items():
            ratios = sorted(p / t for p, t in zip(found["plain loop"], totals, strict=True))
            said = f"{ratios[len(ratios) // 2]:.1f} [{ratios[0]:.1f}, {ratios[-1]:.1f}]"
            print(f"| {name} | {tool} | {sorted(totals)[rounds // 2]:.0f} | {said} |", flush=True)


def seconds(run: Callable[[int], object], layer: int) -> float:
    start = time.process_time()
    run(layer)
    return time.process_time() - start


def whole_map(measured: list[float]) -> float:
    """Seconds of all layers from those of a few."""
    total = 0.0
    for layer in range(LAYERS[-1] + 1):
        k = max(i for i, known in enumerate(LAYERS[:-1]) if known <= layer)
        share = (layer - LAYERS[k]) / (LAYERS[k + 1] - LAYERS[k])
        total += (1 - share) * measured[k] + share * measured[k + 1]
    return total


def tasks() -> dict[str, dict[str, Callable[[int], object]]]:
    """By source: tools, each a function that patches heads of a layer and gives head 4's logits."""
    from probes import HookedModel, datasets

    mixed = HookedModel.load("builtin:mixed", device="cpu")
    prompts = [twin["harmful"] for twin in datasets.twins("test")][:: 160 // PROMPTS]
    other: Any = copy.deepcopy(mixed.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in other.model.layers:
            for weight in block.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight += 0.02 * weight.std() * noise if weight.dim() > 1 else 0
    noisy = HookedModel(other, mixed.tokenizer, name="noisy")
    aligned = HookedModel.load("builtin:aligned", device="cpu")
    return {
        "all layers differ": task(mixed, noisy, prompts, lens=True),
        "equal below 10": task(mixed, aligned, prompts),
    }


def task(
    target: Any, source: Any, prompts: list[str], lens: bool = False
) -> dict[str, Callable[[int], object]]:
    from analyses.patching.patcher import Cell, Patcher
    from analyses.patching.sources import From
    from probes.sites import Site

    patcher = Patcher(target, prompts, From(model=source), batch_size=PROMPTS)
    cells = {
        layer: [Cell((Site(layer, "head_out", head),)) for head in range(HEADS)] for layer in LAYERS
    }
    held = patcher._load([cell for row in cells.values() for cell in row])
    assert patcher.runs.resume
    assert not patcher.notes

    def ours(layer: int) -> torch.Tensor:
        return list(patcher._run(cells[layer], held))[4]

    rendered = target.template.render_all(prompts)
    batch = target.batch(rendered)
    sites = [Site(layer, "head_out") for layer in LAYERS]
    given = source.engine.read(batch, sites)
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "position_ids": batch.positions,
        "use_cache": False,
    }
    keep = {"logits_to_keep": 1}

    @torch.no_grad()
    def plain(layer: int) -> torch.Tensor:
        values = given[Site(layer, "head_out")]

        def put(_module: Any, args: tuple) -> tuple:
            h = args[0].clone()
            h[..., 4 * 64 : 5 * 64] = values[:, :, 4]
            return (h,)

        projection = target.model.model.layers[layer].self_attn.o_proj
        hook = projection.register_forward_pre_hook(put)
        try:
            return target.model(**inputs, **keep).logits[:, -1]
        finally:
            hook.remove()

    for layer in LAYERS:  # the same patch, or the comparison means nothing
        error = (ours(layer) - plain(layer)).norm() / plain(layer).norm()
        assert error < 1e-5, f"layer {layer}: relative error {error:.1e}"
    tools: dict[str, Callable[[int], object]] = {"plain loop": plain, "alignlens": ours}
    if lens:
        tools["TransformerLens loop"] = lens_loop(target, batch, given)
    return tools


def lens_loop(target: Any, batch: Any, given: dict) -> Callable[[int], object]:
    from probes.engines.lens import LensEngine
    from probes.sites import Site

    bridge = LensEngine(target.model, target.layout).bridge

    @torch.no_grad()
    def run(layer: int) -> torch.Tensor:
        values = given[Site(layer, "head_out")][:, :, 4]

        def put(z: torch.Tensor, hook: object) -> torch.Tensor:
            new = z.clone().flatten(2)
            new[..., 4 * 64 : 5 * 64] = values
            return new.reshape(z.shape)

        name = f"blocks.{layer}.attn.hook_z"
        with bridge.hooks(fwd_hooks=[(name, put)]):
            return bridge(
                batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
                logits_to_keep=1,
            )[:, -1]

    return run


if __name__ == "__main__":
    main()
