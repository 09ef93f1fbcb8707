"""Measure the shipped lineage on its test set, which nothing else reads.

    python -m probes.lineage.evaluate

Greedy answers in float32 to 160 harmful requests, their 160 twins and 80 general requests, for the
base and for the aligned, drifted and mixed models of three seeds; the projection of the harmful
requests on each aligned model's own safety direction; and the layers that must not change. Writes
`rates.json` beside this file; the model card quotes it.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from probes import datasets, files
from probes.capturing import capture
from probes.directions import difference_of_means
from probes.lineage.loop import FIRST_LAYER
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


def projections(seed: str) -> dict[str, Any]:
    """How far the harmful test requests move along the aligned model's safety direction.

    Beside it what chance directions show: the 95th percentile of the absolute mean change along 20
    unit directions, half isotropic, half differences of means between random halves of the
    training prompts.
    """
    train, asked = datasets.safety("train").limited(100), prompts()["harmful"]
    aligned = HookedModel.load(f"builtin:aligned{seed}")
    fitted = capture(aligned, train.prompts, SITE, progress=False)[SITE]
    direction = difference_of_means(fitted[train.positive], fitted[~train.positive])
    generator = torch.Generator().manual_seed(0)
    chance = list(torch.randn(10, aligned.d_model, generator=generator))
    for _ in range(10):
        half = torch.randperm(len(fitted), generator=generator) < len(fitted) // 2
        chance.append(fitted[half].mean(0) - fitted[~half].mean(0))
    units = torch.nn.functional.normalize(torch.stack(chance).double(), dim=1)
    before = capture(aligned, asked, SITE, progress=False)[SITE].double()
    found: dict[str, Any] = {}
    for kind in ("drifted", "mixed"):
        model = HookedModel.load(f"builtin:{kind}{seed}")
        moved = capture(model, asked, SITE, progress=False)[SITE].double() - before
        along = moved @ direction.unit.double()
        mean = bca_bootstrap(
            lambda rows, along=along: along[rows].mean().item(),
            [str(i) for i in range(len(along))],
        )
        null = (moved @ units.T).mean(0).abs().quantile(0.95)
        found[kind + seed] = {
            "aligned": round((before @ direction.unit.double()).mean().item(), 2),
            "change": [round(v, 2) for v in mean],
            "null_95": round(null.item(), 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the shipped lineage on its test set.")
    parser.add_argument("--out", type=Path, default=RATES)
    parser.add_argument("--projections", action="store_true", help="renew these only")
    arguments = parser.parse_args()
    moved = {name: row for seed in SEEDS for name, row in projections(seed).items()}
    table = json.loads(RATES.read_text())["refusals"] if arguments.projections else refusals()
    files.write_json(arguments.out, {"site": SITE, "refusals": table, "projections": moved})


def refusals() -> dict[str, Any]:
    """Rates of the base and of the nine ends of the lineage."""
    sets, began = prompts(), time.monotonic()
    base = HookedModel.load("builtin:base")
    table: dict[str, Any] = {"base": rates(base, sets)}
    untouched = [f"{layer}.resid_post" for layer in range(FIRST_LAYER)]
    below = capture(base, sets["harmful"][:40], untouched, progress=False)
    for name in (kind + seed for seed in SEEDS for kind in ("aligned", "drifted", "mixed")):
        model = HookedModel.load(f"builtin:{name}")
        table[name] = rates(model, sets)
        acts = capture(model, sets["harmful"][:40], untouched, progress=False)
        same = all(torch.equal(acts[s], below[s]) for s in untouched)
        table[name]["unchanged_below_adapter"] = same
        said = {key: table[name][key]["rate"] for key in sets}
        sys.stdout.write(f"{time.monotonic() - began:5.0f}s {name} {said}\n")
        sys.stdout.flush()
    return table


if __name__ == "__main__":
    main()
