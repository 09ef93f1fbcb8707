"""`alignlens mechanism-diff`"""

import json
from pathlib import Path
from typing import Annotated

import typer

CONTROLS = ("builtin:aligned-s1", "builtin:aligned-s2")
"""Controls of the built-in lineage: other seeds of the same alignment."""


def mechanism_diff(
    reference: Annotated[str, typer.Argument(help="Checkpoint whose circuit it is.")] = (
        "builtin:aligned"
    ),
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints to compare. Default: the built-in fine-tunes."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="A checkpoint that differs by chance alone, such as another seed."),
    ] = None,
    circuit: Annotated[
        Path | None, typer.Option(help="A circuit saved before. Default: look for one.")
    ] = None,
    task: Annotated[str, typer.Option(help="refusal, or another task by its name.")] = "refusal",
    k: Annotated[int, typer.Option(help="Heads of the circuit, and of the top compared.")] = 10,
    ablation: Annotated[str, typer.Option(help="mean, zero, resample or counterfactual.")] = "mean",
    prompts: Annotated[int, typer.Option(help="Prompts to choose on.")] = 24,
    tests: Annotated[int, typer.Option(help="Prompts to measure on, of other topics.")] = 24,
    draws: Annotated[int, typer.Option(help="Draws of every null.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder to fill or to go on with.")] = Path(
        "mechanism-diff"
    ),
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
    """Do checkpoints do a task by the same heads: circuit, head scores, cross-model patching.

    The circuit of the reference is put to work in every other checkpoint; the scores of all heads
    are compared, beside another seed of the same training; and each checkpoint's circuit is patched
    into the reference.

    \b
    alignlens mechanism-diff
    alignlens mechanism-diff org/instruct org/fine-tuned --control org/other-seed
    alignlens mechanism-diff builtin:aligned builtin:drifted --circuit circuit/circuit
    """
    from analyses.commands.circuit import keep, loaded, say, task_named
    from probes import names

    own = reference == "builtin:aligned" and not models
    compared = list(models or (("builtin:drifted", "builtin:mixed") if own else ()))
    beside = list(control or (CONTROLS[:1] if own else ()))
    if not compared:
        raise ValueError("no checkpoint was given to compare with: name at least one")
    for name in (reference, *compared, *beside):
        names.parse(name)
    if circuit is not None and not (circuit / "result.json").is_file():
        raise ValueError(f"{circuit} holds no saved circuit: give the folder of one, or leave it")
    make = task_named(task)
    everything = [*compared, *beside]
    if dry_run:
        typer.echo(
            f"{1 + len(everything)} checkpoints in memory together; paths of every head on {tests} "
            f"prompts and about {2 * draws + 20} patched or ablated runs in each; disk: about 2 MB "
            f"in {out}"
        )
        return

    from analyses.mechanisms.circuit import Circuit
    from analyses.mechanisms.comparison import mechanism_diff as compare
    from analyses.mechanisms.discovery import Stage, discover

    options = {"engine": engine, "dtype": dtype}
    first = loaded(reference, task, **options)
    others = [loaded(name, task, **options) for name in everything]
    if circuit is not None:
        chosen = Circuit.load(circuit)
    else:
        say(f"looking for the circuit of {first.label}")
        stages = [Stage("writing the answer", k, at="last")]
        on = make(first, "train", prompts)
        chosen = discover(first, on, stages, draws=draws, folder=out / "layers", seed=seed).circuit
    chosen.save(out / "circuit")
    labels = [m.label for m in others[len(compared) :]]
    found = compare(
        first, others, make(first, "test", tests), chosen, controls=labels, senders_at="last", k=k,
        ablation=ablation, draws=draws, folder=out / "maps", seed=seed,
    )  # fmt: skip
    keep(found.transplant, out, transplant=found.transplant.plot)
    keep(found.overlap, out / "overlap", overlap=found.overlap.plot)
    for swapped in found.cmaps:
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in swapped.source_name)
        keep(swapped, out / f"cmap-{name}", cmap=swapped.plot)
    if as_json:
        table = found.transplant.frame().to_json(orient="records")
        typer.echo(json.dumps(json.loads(str(table))))
        return
    for line in (chosen, found.transplant, found.overlap, *found.cmaps):
        typer.echo(str(line))
    typer.echo(f"mechanism-diff: {out}")
