"""Measure the shipped lineage on its test set, which nothing else reads.

    python -m probes.lineage.evaluate

Greedy answers in float32 to 160 harmful requests, their 160 twins and 80 general requests, for the
base and for the aligned, drifted and mixed models of three seeds; the projection of the harmful
requests on each aligned model's own safety direction; and the layers that must not change. Writes
`rates.json` beside this file; the model card quotes it.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from probes import datasets, files
from probes.capturing import capture
from probes.directions import difference_of_means
from probes.lineage.train import FIRST_LAYER
from probes.model import HookedModel
from probes.refusals import refuses
from probes.scores import bca_bootstrap, wilson

RATES = Path(__file__).parent / "rates.json"
SEEDS = ("", "-s1", "-s2")
SITE = "20.resid_post"
TOKENS = 6
"""Enough to see how an answer opens."""


def prompts() -> dict[str, list[str]]:
    """The three test sets."""
    twins = datasets.twins("test")
    return {
        "harmful": [t["harmful"] for t in twins],
        "twins": [t["harmless"] for t in twins],
        "general": datasets.general("test"),
    }


def rates(model: HookedModel, sets: dict[str, list[str]]) -> dict[str, Any]:
    """Refused, asked, the 95 % Wilson limits and each judgement in order, for each set."""
    found: dict[str, Any] = {}
    for name, asked in sets.items():
        judged = [refuses(text) for text in model.generate(asked, TOKENS, batch_size=40)]
        n = sum(judged)
        interval = wilson(n, len(asked))
        found[name] = {
            "refused": n,
            "asked": len(asked),
            "rate": round(interval.value, 4),
            "low": round(interval.low, 4),
            "high": round(interval.high, 4),
            "each": "".join("1" if refused else "0" for refused in judged),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the shipped lineage on its test set.")
    parser.add_argument("--out", type=Path, default=RATES)
    arguments = parser.parse_args()
    sets, began = prompts(), time.monotonic()
    train = datasets.safety("train").limited(100)
    table: dict[str, Any] = {}
    projections: dict[str, Any] = {}
    base = HookedModel.load("builtin:base")
    table["base"] = rates(base, sets)
    untouched = [f"{layer}.resid_post" for layer in range(FIRST_LAYER)]
    below = capture(base, sets["harmful"][:40], untouched, progress=False)
    for seed in SEEDS:
        direction, before = None, None
        for kind in ("aligned", "drifted", "mixed"):
            name = kind + seed
            model = HookedModel.load(f"builtin:{name}")
            table[name] = rates(model, sets)
            acts = capture(model, sets["harmful"][:40], untouched, progress=False)
            same = all(torch.equal(acts[s], below[s]) for s in untouched)
            table[name]["unchanged_below_adapter"] = same
            if direction is None:
                fitted = capture(model, train.prompts, SITE, progress=False)[SITE]
                direction = difference_of_means(fitted[train.positive], fitted[~train.positive])
            at = capture(model, sets["harmful"], SITE, progress=False)[SITE]
            here = direction.project(at).double()
            if before is None:
                before = here
            else:
                moved = here - before
                mean = bca_bootstrap(
                    lambda rows, moved=moved: moved[rows].mean().item(),
                    [str(i) for i in range(len(moved))],
                )
                projections[name] = {
                    "aligned": round(before.mean().item(), 2),
                    "now": round(here.mean().item(), 2),
                    "change": [round(v, 2) for v in mean],
                }
            said = {key: table[name][key]["rate"] for key in sets}
            sys.stdout.write(f"{time.monotonic() - began:5.0f}s {name} {said}\n")
            sys.stdout.flush()
    files.write_json(arguments.out, {"site": SITE, "refusals": table, "projections": projections})


if __name__ == "__main__":
    main()
