"""`alignlens patch`"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from analyses.mechanisms.task import Task
    from analyses.patching.sources import From
    from probes.model import HookedModel

KINDS = ("heads", "parts", "positions")
COLUMNS: tuple[str, ...] = (
    "content", "tokens:-5:-4", "tokens:-4:-3", "tokens:-3:-2", "tokens:-2:-1", "last",
)  # fmt: skip
"""Positions of a map of positions: the request as a whole, then the last tokens one by one."""


def patch(
    model: Annotated[str, typer.Argument(help="Model that is run with foreign values in it.")] = (
        "builtin:aligned"
    ),
    source: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint the values come from, on the same tokens. Default: the same model on "
            "the counterfactual prompts."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="refusal, boxes, indirect-object or greater-than.")
    ] = "refusal",
    denoise: Annotated[
        bool,
        typer.Option(
            "--denoise", help="Values of the task's prompts into its counterfactuals instead."
        ),
    ] = False,
    kind: Annotated[str, typer.Option(help=f"What is mapped: {', '.join(KINDS)}.")] = "heads",
    part: Annotated[str, typer.Option(help="Part of the sites: head_out, q, k, v, resid_pre, ...")]
    | None = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Parts, or position rules, to map; repeat for several."),
    ] = None,
    positions: Annotated[str, typer.Option(help="Tokens patched in a map of heads or parts.")] = (
        "all"
    ),
    top: Annotated[int, typer.Option(help="Sites chosen from the map and measured together.")] = 10,
    topics: Annotated[
        int, typer.Option(help="Prompts of each part; 29 twins for validation have equal length.")
    ] = 29,
    out: Annotated[Path, typer.Option(help="Folder to fill or to go on with.")] = Path("patch"),
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    engine: Annotated[str, typer.Option(help="transformers, transformer_lens or nnsight.")] = (
        "transformers"
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say roughly what it takes, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Which heads, parts or positions carry a behaviour: each patched alone, the best together.

    The map is made on validation prompts; the sites it picks are measured on test prompts, beside
    as many others drawn at random. Killed and run again, it goes on.

    \b
    alignlens patch
    alignlens patch builtin:mixed --source builtin:aligned --kind parts
    alignlens patch org/instruct --kind positions --part resid_pre --columns content --columns last
    alignlens patch org/model --task indirect-object --denoise
    """
    from analyses.mechanisms.tasks import TASKS
    from probes import names

    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose {', '.join(KINDS)}")
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose {', '.join(TASKS)}")
    if source is not None and denoise:
        raise ValueError("--denoise exchanges prompts and --source models: give one of them")
    if top < 1 or topics < 1:
        raise ValueError(f"--top {top} and --topics {topics}: give at least 1 of each")
    for name in (model, *([source] if source else [])):
        names.parse(name)
    where = part or ("resid_pre" if kind == "positions" else "head_out")
    what = list(columns) if columns else list(COLUMNS) if kind == "positions" else None
    if dry_run:
        typer.echo(
            f"{2 if source else 1} checkpoints; every site of a map of {kind} is one run of {topics} "
            f"validation prompts from its layer on, then 21 runs of {topics} test prompts; memory: all "
            f"checkpoints at once and 1 GB of activations; disk: about 1 MB in {out}"
        )
        return
    from probes.model import HookedModel

    options: dict[str, Any] = {"engine": engine, "dtype": dtype}
    chat = task == "refusal"
    if not chat:
        options["template"] = "none"
    _say(f"loading {', '.join(filter(None, (model, source)))}")
    if source is None:
        target, other = HookedModel.load(model, **options), None
    else:
        target, other = (HookedModel.load(name, **options) for name in (model, source))
        if chat:
            target, other = _alike(target, other)
    _run(
        target, other, task, denoise, kind, where, what, positions, top, topics, out, seed, as_json
    )


def _run(
    model: "HookedModel",
    other: "HookedModel | None",
    task: str,
    denoise: bool,
    kind: str,
    part: str,
    columns: list[str] | None,
    positions: str,
    top: int,
    n: int,
    out: Path,
    seed: int,
    as_json: bool,
) -> None:
    from analyses.mechanisms.tasks import TASKS
    from analyses.patching.grid import patch_map
    from analyses.patching.patch import patch as patch_together
    from probes import figures, files

    # the task is made once, with the checkpoint whose behaviour it is
    made = {p: TASKS[task](other or model, p, n) for p in ("validation", "test")}
    prompts, source = _sides(made["validation"], other, denoise)
    read = made["validation"].metric
    found = patch_map(
        model, prompts, source, read, kind, part=part, columns=columns, positions=positions,
        topics=made["validation"].topics, folder=out / "layers", seed=seed,
    )  # fmt: skip
    found.save(out)
    files.write_text(out / "table.csv", found.frame().to_csv(index=False))
    figures.save(found.plot(), out / "map", dataclasses.asdict(found.record))
    lines, rows = [str(found)], found.frame().to_dict("records")
    if kind == "positions":
        layer, column = found.best()[0]
        sites, positions = [f"{layer}.{part}"], column
    else:
        joint = [f"{layer}.{part}.{c}" if kind == "heads" else f"{layer}.{c}"
                 for layer, c in found.best(top)]  # fmt: skip
        sites = sorted(joint)
    prompts, source = _sides(made["test"], other, denoise)
    chosen = patch_together(
        model, prompts, source, sites, made["test"].metric, positions=positions,
        topics=made["test"].topics, seed=seed,
    )  # fmt: skip
    chosen.save(out / "chosen")
    files.write_text(out / "chosen" / "table.csv", chosen.frame().to_csv(index=False))
    figures.save(chosen.plot(), out / "chosen" / "chosen", dataclasses.asdict(chosen.record))
    lines.append(f"chosen on validation, on test: {chosen}")
    if as_json:
        value, low, high = chosen.change.tolist()
        typer.echo(
            json.dumps(
                {"map": json.loads(json.dumps(rows, default=float)), "sites": chosen.sites}
                | {"change": value, "low": low, "high": high, "null_95": chosen.null_95}
            )
        )
        return
    for line in lines:
        typer.echo(line)
    typer.echo(f"patch: {out}")


def _alike(target: "HookedModel", other: "HookedModel") -> "tuple[HookedModel, HookedModel]":
    """Both with one chat template: the target's, or the other's where the target has none."""
    from analyses.checkpoints import Checkpoint, compare

    try:
        chat = target.template.chat
    except ValueError:
        chat = False
    ordered = [other, target] if chat else [target, other]
    pair = compare([Checkpoint("base", ordered[0]), Checkpoint("aligned", ordered[1])])
    return (pair.aligned, pair.base) if chat else (pair.base, pair.aligned)


def _sides(task: "Task", other: "HookedModel | None", denoise: bool) -> "tuple[tuple, From]":
    """The prompts that are run, and where the values come from."""
    from analyses.patching.sources import From

    if other is not None:
        return task.prompts, From(model=other)
    if denoise:
        return task.counterfactuals, From(prompts=task.prompts)
    return task.prompts, From(prompts=task.counterfactuals)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
