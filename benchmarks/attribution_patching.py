"""How fast is attribution patching beside exact patches, and how far do the two agree?

    python benchmarks/attribution_patching.py                  16 prompts, twin and checkpoint
    python benchmarks/attribution_patching.py --prompts 32     more of them

The task: refusal log-odds of the aligned built-in checkpoint on harmful test twins, all 270 heads,
all tokens, float32, one thread, CPU time. Values come from the harmless twin of as many tokens, or
from the base checkpoint on the same ids. Exact patches are those of `exact_changes`, which runs
heads together and skips the blocks below a patch; neither side draws a null. Printed are the CPU
seconds of each tool, exact over it, and its agreement with 95 % intervals over topics.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# a neighbour of this file has the name of a package it needs
sys.path.remove(str(Path(__file__).parent))

METHODS = {"gradient": {}, "inputs": {"method": "inputs", "steps": 4}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Agreement and speed of attribution patching.")
    parser.add_argument("--prompts", type=int, default=16)
    prompts = parser.parse_args().prompts
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # agreement below its threshold is what is printed
    print("| source | tool | CPU seconds | exact over it | rank correlation | Pearson | top 10 |")
    print("|---|---|---|---|---|---|---|")
    from analyses.mechanisms.agreement import exact_changes
    from analyses.mechanisms.attribution_patching import attribute

    for name, (given, topics) in tasks(prompts).items():
        exact, slow = timed(lambda given=given: exact_changes(*given, progress=False))
        print(f"| {name} | exact patches | {slow:.0f} | 1 | | | |", flush=True)
        for method, options in METHODS.items():
            if method == "inputs" and name == "base checkpoint":
                continue  # nearly equal embeddings: the same as the gradient
            found, seconds = timed(
                lambda given=given, options=options, topics=topics: attribute(
                    *given, topics=topics, draws=0, progress=False, **options
                )
            )
            said = found.agreement(exact)
            numbers = " | ".join(
                f"{value:.2f} [{low:.2f}, {high:.2f}]"
                for value, low, high in (
                    said.spearman.tolist(),
                    said.pearson.tolist(),
                    said.recall.tolist(),
                )
            )
            print(
                f"| {name} | {method} | {seconds:.0f} | {slow / seconds:.1f} | {numbers} |",
                flush=True,
            )


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return run(), time.process_time() - start


def tasks(n: int) -> dict[str, tuple[tuple[Any, ...], tuple[str, ...]]]:
    """By source: model, prompts, source and metric, with the topics."""
    from analyses.mechanisms.tasks import refusal_task
    from analyses.patching.sources import From
    from probes import HookedModel

    aligned = HookedModel.load("builtin:aligned", device="cpu")
    base = HookedModel.load("builtin:base", device="cpu", template=aligned.template.source)
    task = refusal_task(aligned, "test", n)
    sources = {
        "harmless twin": From(prompts=task.counterfactuals),
        "base checkpoint": From(model=base),
    }
    return {
        name: ((aligned, task.prompts, source, task.metric), task.topics)
        for name, source in sources.items()
    }


if __name__ == "__main__":
    main()
