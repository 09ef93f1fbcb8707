"""`alignlens circuit`"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from probes.model import HookedModel


def circuit(
    model: Annotated[str, typer.Argument(help="Model name.")] = "builtin:aligned",
    task: Annotated[str, typer.Option(help="refusal, or another task by its name.")] = "refusal",
    k: Annotated[int, typer.Option(help="Heads of the first group.")] = 10,
    feeding: Annotated[
        int, typer.Option(help="Heads that feed the queries of the first group; 0: none.")
    ] = 5,
    ablation: Annotated[str, typer.Option(help="mean, zero, resample or counterfactual.")] = "mean",
    prompts: Annotated[int, typer.Option(help="Prompts to choose on.")] = 24,
    tests: Annotated[int, typer.Option(help="Prompts to measure on, of other topics.")] = 24,
    draws: Annotated[int, typer.Option(help="Draws of every null.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder to fill or to go on with.")] = Path("circuit"),
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
    """Which heads do a task: path patching in stages, then faithfulness on unseen prompts.

    The first group are the heads with the largest direct effect on the answer, the second those
    with the largest effect on its queries. The circuit is chosen on training prompts; what it does
    alone, beside random circuits of its size, is measured on test prompts.

    \b
    alignlens circuit
    alignlens circuit builtin:drifted --k 20 --feeding 10
    alignlens circuit org/model --task indirect-object
    """
    from probes import names

    names.parse(model)
    if k < 1 or feeding < 0 or prompts < 2 or tests < 2:
        raise ValueError(
            f"--k {k}, --feeding {feeding}, --prompts {prompts} and --tests {tests} were given: "
            "expected at least 1 head and 2 prompts of each kind"
        )
    make = task_named(task)
    check_null(ablation, draws)
    if dry_run:
        typer.echo(
            f"paths of every head on {prompts} prompts, {2 if feeding else 1} stages, then about "
            f"{(draws + 1) * 6} ablated runs of {tests} prompts; disk: about 2 MB in {out}"
        )
        return
    found, alone, curve = _measured(
        model, task, make, k, feeding, ablation, prompts, tests, draws, out, seed,
        {"engine": engine, "dtype": dtype},
    )  # fmt: skip
    keep(found, out, paths=found.plot_all, circuit=found.circuit.plot)
    found.circuit.save(out / "circuit")
    keep(alone, out / "faithfulness", faithfulness=alone.plot)
    keep(curve, out / "curve", curve=curve.plot)
    say_notes(found, alone, curve)
    if as_json:
        typer.echo(json.dumps(json.loads(str(found.frame().to_json(orient="records")))))
        return
    for line in (found, alone, curve):
        typer.echo(str(line))
    typer.echo(f"circuit: {out}")


def task_named(name: str) -> Any:
    """The function that makes a task."""
    from analyses.mechanisms.tasks import TASKS

    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def check_null(ablation: str, draws: int) -> None:
    """Refuse before anything long is begun what would be refused after it."""
    from analyses.mechanisms.ablation import KINDS

    if ablation not in KINDS:
        raise ValueError(f"unknown ablation {ablation!r}: choose one of {', '.join(KINDS)}")
    if draws < 1:
        raise ValueError(f"--draws {draws} leaves nothing to compare with: give at least 1")


def loaded(names: Sequence[str], task: str, **options: Any) -> "list[HookedModel]":
    """Models with the template that the task needs: the first one's for all of them; tasks but
    refusal are plain text. Labels are made different."""
    from analyses.checkpoints import Checkpoint, compare
    from probes.model import HookedModel

    if task != "refusal":
        options["template"] = "none"
    found = []
    for name in names:
        say(f"loading {name}")
        found.append(HookedModel.load(name, **options))
    if len(found) == 1:
        return found
    roles = ["aligned", "base"] + ["drifted"] * (len(found) - 2)
    items = [Checkpoint(role, model) for role, model in zip(roles, found, strict=True)]
    second, first, *others = compare([items[1], items[0], *items[2:]]).items
    return [item.model for item in (first, second, *others)]


def _measured(
    name: str,
    task: str,
    make: Any,
    k: int,
    feeding: int,
    ablation: str,
    prompts: int,
    tests: int,
    draws: int,
    out: Path,
    seed: int,
    options: dict[str, Any],
) -> tuple[Any, Any, Any]:
    from analyses.mechanisms.discovery import Stage, discover
    from analyses.mechanisms.faithfulness import faithfulness, faithfulness_curve

    (model,) = loaded([name], task, **options)
    stages = [Stage("writing the answer", k, at="last")]
    if feeding:
        stages.append(Stage("feeding their queries", feeding, stages[0].name, "q", at="last"))
    chosen_on, measured_on = make(model, "train", prompts), make(model, "test", tests)
    found = discover(model, chosen_on, stages, draws=draws, folder=out / "layers", seed=seed)
    more = {"ablation": ablation, "reference": chosen_on.counterfactuals, "seed": seed}
    alone = faithfulness(model, measured_on, found.circuit, draws=draws, **more)
    n = len(found.ranked)
    sizes = sorted({min(n, s) for s in (5, 20, 80, n // 2, n)})
    curve = faithfulness_curve(model, measured_on, found.ranked, sizes, **more)
    return found, alone, curve


def keep(result: Any, folder: Path, **drawn: Any) -> None:
    """Write a result with its table and its figures."""
    from probes import figures, files

    result.save(folder)
    files.write_text(folder / "table.csv", result.frame().to_csv(index=False))
    for name, plot in drawn.items():
        figures.save(plot(), folder / name, dataclasses.asdict(result.record))


def say_notes(*results: Any) -> None:
    """What results note about themselves, each note once, on stderr."""
    for note in dict.fromkeys(n for result in results for n in result.notes):
        say(note)


def say(line: str) -> None:
    """A line on stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
