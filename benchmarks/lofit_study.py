"""What the two LoFiT studies share: cells that are computed once, methods tuned alike, tables.

A method has a grid of settings, its strength `a` by a second knob `b`. With the first seed every
setting is fitted and scored on the validation part; the best is fitted with the second seed too,
and only these are scored on the test part.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SEEDS = (42, 43)
Grid = tuple[tuple[float, ...], tuple[float, ...]]


class Cells:
    """Finished pieces of work, a folder each; what is finished is read, not made again."""

    def __init__(self, out: Path, settings: dict[str, Any], limit: int | None = None) -> None:
        from probes import files

        self.folder, self.left = out / "cells", limit
        path, settings = out / "settings.json", json.loads(json.dumps(settings))
        if not path.is_file():
            files.write_json(path, settings)
        elif (known := json.loads(path.read_text())) != settings:
            other = [key for key in settings if known.get(key) != settings[key]]
            raise SystemExit(f"{out} was made with other {', '.join(other)}: give another --out")

    def kept(self, name: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The cell of that name: read if it is finished, else made and written."""
        from probes import files

        path = self.folder / name
        if (path / "cell.json").is_file():
            return json.loads((path / "cell.json").read_text())
        if self.left == 0:
            raise SystemExit("as many cells as asked for are finished; run again for the next")
        cpu = time.process_time()
        found = make(path)
        found["cpu_seconds"] = round(time.process_time() - cpu, 1)
        files.write_json(path / "cell.json", found)
        self.left = None if self.left is None else max(self.left - 1, 0)
        print(f"{name:44} {found['cpu_seconds']:7.0f} CPU s  {found.get('said', '')}", flush=True)
        return found


class Study:
    """A task, the methods on it, and what each gives on validation and test.

    A task says what is learned (`examples`, `training`, `contrast`), how it is measured (`measure`:
    lists of one number an item, by name) and which number a setting is chosen by (`merit`).
    """

    model: Any
    cells: Cells
    grid: dict[str, Grid]
    n_heads: dict[str, int]
    """Heads of each method that has some."""
    quick = False

    def examples(self) -> list[Any]:
        raise NotImplementedError

    def training(self, seed: int, lr: float, knob: float | None = None) -> Any:
        """`knob` is the second knob of LoRA, if that is one of training."""
        raise NotImplementedError

    def contrast(self) -> tuple[Any, list[str] | None]:
        """What ITI's probes read: a contrast, and answers behind its prompts."""
        raise NotImplementedError

    def measure(self, steer: Any, part: str) -> dict[str, list[float]]:
        raise NotImplementedError

    def merit(self, found: dict[str, list[float]]) -> float:
        raise NotImplementedError

    def lora_options(self, knob: float) -> dict[str, Any]:
        return {}

    def heads(self, method: str, seed: int, b: float) -> Sequence[tuple[int, int]]:
        """LoFiT's by step A under the L1 factor b; else drawn by chance, b counting the draws."""
        from steering.baselines import random_heads
        from steering.head_selection import HeadSelection
        from steering.lofit import select_heads

        k = self.n_heads[method]
        if method.startswith("random"):
            return random_heads(self.model, k, 1000 * seed + int(b))
        name = f"selection seed={seed} l1={b:g}"

        def make(path: Path) -> dict[str, Any]:
            found = select_heads(
                self.model,
                self.examples(),
                training=self.training(seed, 5e-3),
                l1=b,
                progress=False,
            )
            found.save(path)
            return {"said": str(found), "concentration": found.concentration}

        self.cells.kept(name, make)
        return HeadSelection.load(self.cells.folder / name).top(k)

    def fitted(self, method: str, seed: int, a: float, b: float) -> tuple[Any, Any, int]:
        """What a setting applies, its training curve if it has one, and the numbers it holds."""
        from steering.applied import Steering
        from steering.baselines import LoraTuning, fit_lora
        from steering.iti import fit_iti
        from steering.lofit import HeadTuning, fit_offsets
        from steering.offsets import HeadOffsets

        if method == "unmodified":
            return None, None, 0
        name = f"{method} seed={seed} a={a:g} b={b:g} fit"
        if method == "iti":
            name = f"{method} seed={seed} b={b:g} fit"  # for all strengths

        def make(path: Path) -> dict[str, Any]:
            if method == "iti":
                contrast, answers = self.contrast()
                found = fit_iti(self.model, contrast, int(b), answers=answers, seed=seed)
                found.save(path / "offsets.safetensors")
                return {"said": str(found)}
            if method == "lora":
                training = self.training(seed, a, b)
                options = {"training": training, "progress": False, **self.lora_options(b)}
                tuned = fit_lora(self.model, self.examples(), **options)
            else:
                heads, training = self.heads(method, seed, b), self.training(seed, a)
                tuned = fit_offsets(
                    self.model, self.examples(), heads, training=training, progress=False
                )
            tuned.save(path)
            return {"said": str(tuned.curve)}

        self.cells.kept(name, make)
        folder = self.cells.folder / name
        if method == "iti":
            offsets = HeadOffsets.load(folder / "offsets.safetensors")
            return Steering(offsets, a, "sigma"), None, offsets.n_parameters
        if method == "lora":
            lora = LoraTuning.load(folder)
            return lora, lora.curve, lora.n_parameters
        tuned = HeadTuning.load(folder)
        return tuned.offsets, tuned.curve, tuned.offsets.n_parameters

    def scored(self, method: str, seed: int, a: float, b: float, part: str) -> dict[str, Any]:
        """What a setting gives on a part, one number an item."""
        from steering.baselines import LoraTuning

        name = f"{method} seed={seed} a={a:g} b={b:g} {part}"

        def make(path: Path) -> dict[str, Any]:
            steer, _, _ = self.fitted(method, seed, a, b)
            if isinstance(steer, LoraTuning):
                with steer.applied(self.model):
                    found = self.measure(None, part)
            else:
                found = self.measure(steer, part)
            means = {key: round(sum(v) / len(v), 4) for key, v in found.items()}
            return {"values": found, "said": means}

        return self.cells.kept(name, make)["values"]

    def chosen(self, method: str) -> tuple[float, float]:
        """The setting with the highest merit on validation under the first seed."""
        strengths, knobs = self.grid[method]
        if self.quick:
            strengths, knobs = strengths[1:2] or strengths, knobs[:1]
        settings = [(a, b) for a in strengths for b in knobs]
        found = {s: self.merit(self.scored(method, SEEDS[0], *s, "validation")) for s in settings}
        return max(settings, key=lambda s: found[s])  # of several the first, which is the weakest


def summarise(study: Study, out: Path, methods: Sequence[str], items: Sequence[str]) -> None:
    """Tables of all methods, of their differences item by item, and figures.

    `items` are the groups of the test items. Intervals are BCa bootstraps over groups of the mean
    over seeds, so they say what other items would give, not what other seeds would.
    """
    import pandas as pd
    import torch

    from probes import figures, files
    from probes.scores import bca_bootstrap

    seeds = SEEDS[:1] if study.quick else SEEDS
    rows, each, curves = [], {}, {}
    for method in methods:
        a, b = study.chosen(method)
        cells = [study.scored(method, seed, a, b, "test") for seed in seeds]
        _, curve, parameters = study.fitted(method, seeds[0], a, b)
        if curve is not None:
            curves[method] = curve
        each[method] = {
            name: torch.tensor([cell[name] for cell in cells]).double() for name in cells[0]
        }
        row: dict[str, Any] = {"method": method, "a": a, "b": b, "parameters": parameters}
        for name, values in each[method].items():
            found = _interval(bca_bootstrap, values.mean(0), items)
            row |= {name: found[0], f"{name} low": found[1], f"{name} high": found[2]}
            row[f"{name} seeds"] = " ".join(f"{v:.3f}" for v in values.mean(1).tolist())
        rows.append(row)
    differences = []
    for one in methods:
        for other in methods:
            wanted = other == "unmodified" or (one.startswith("lofit") and one != other)
            if one == other or one == "unmodified" or not wanted:
                continue
            for name in each[one]:
                gap = (each[one][name] - each[other][name]).mean(0)
                value, low, high = _interval(bca_bootstrap, gap, items)
                differences.append(
                    {"method": one, "less": other, "measure": name, "difference": value,
                     "low": low, "high": high}
                )  # fmt: skip
    table, gaps = pd.DataFrame(rows), pd.DataFrame(differences)
    files.write_text(out / "table.csv", table.to_csv(index=False))
    files.write_text(out / "differences.csv", gaps.to_csv(index=False))
    files.write_json(out / "summary.json", {"methods": rows, "differences": differences})
    with pd.option_context("display.width", 200, "display.max_columns", 30):
        print(table.to_string(index=False))
        print(gaps.to_string(index=False))
    from matplotlib.figure import Figure

    names = list(each[methods[0]])
    with figures.theme():
        figure = Figure(figsize=(3.8 * len(names), 3.2), layout="constrained")
        for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for i, row in enumerate(rows):
                low, high = row[f"{name} low"], row[f"{name} high"]
                ax.plot([low, high], [i, i], color=figures.PALETTE[i])
                ax.plot(row[name], i, ls="", **figures.style(i))
            ax.set_yticks(range(len(rows)), [row["method"] for row in rows])
            ax.set(xlabel=f"{name} (share), 95 % interval over items")
        figures.save(figure, out / "scores")
        if curves:
            figure = Figure(figsize=(2.9 * len(curves), 2.8), layout="constrained")
            axes = figure.subplots(1, len(curves), squeeze=False)[0]
            for ax, (method, curve) in zip(axes, curves.items(), strict=True):
                curve.plot_losses(ax).set_title(method)
            figures.save(figure, out / "losses")


def _interval(bootstrap: Any, values: Any, items: Sequence[str]) -> list[float]:
    found = bootstrap(lambda i: float(values[i].mean()), items)
    return [round(x, 4) for x in found]
