"""`alignlens mechanism-diff`"""

import json
from pathlib import Path
from typing import Annotated, Any

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
    cross: Annotated[
        bool,
        typer.Option(help="Patch each checkpoint's circuit into the reference, the slow part."),
    ] = True,
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
    from analyses.commands.circuit import check_null, keep, loaded, say, say_notes, task_named
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
    if k < 1 or prompts < 2 or tests < 2:
        raise ValueError(
            f"--k {k}, --prompts {prompts} and --tests {tests} were given: expected at least 1 head "
            "and 2 prompts of each kind"
        )
    make = task_named(task)
    check_null(ablation, draws)
    everything = [*compared, *beside]
    if dry_run:
        crossed = f", then {len(everything)} times {4 * draws + 16} patched runs" if cross else ""
        typer.echo(
            f"{1 + len(everything)} checkpoints in memory together; {draws + 2} ablated runs of "
            f"{tests} prompts and the paths of every head in each{crossed}; disk: about 2 MB in "
            f"{out}"
        )
        return

    from analyses.mechanisms.circuit import Circuit, heads_of
    from analyses.mechanisms.cmap import cmap
    from analyses.mechanisms.comparison import transplant
    from analyses.mechanisms.discovery import Stage, discover
    from analyses.mechanisms.overlap import mechanism_overlap
    from analyses.mechanisms.paths import path_map

    chosen = None if circuit is None else Circuit.load(circuit)
    first, *others = loaded([reference, *everything], task, engine=engine, dtype=dtype)
    if k >= (n := sum(heads_of(first))):
        raise ValueError(f"--k {k} of {n} heads leaves none to tell them from: give fewer")
    if chosen is None:
        say(f"looking for the circuit of {first.label}")
        stages = [Stage("writing the answer", k, at="last")]
        train = make(first, "train", prompts)
        chosen = discover(
            first, train, stages, draws=draws, folder=out / "layers", seed=seed
        ).circuit
    chosen.save(out / "circuit")
    labels = [m.label for m in others[len(compared) :]]
    on = make(first, "test", tests)
    # each part is kept when it is done: the last takes longest
    moved = transplant(
        [first, *others], on, chosen, controls=labels, ablation=ablation, draws=draws, seed=seed
    )
    keep(moved, out, transplant=moved.plot)
    maps = [
        path_map(m, on, senders_at="last", null=None, folder=out / "maps" / f"map-{n}", seed=seed)
        for n, m in enumerate([first, *others])
    ]
    shared = mechanism_overlap(maps, moved.names, controls=labels, k=k, seed=seed)
    keep(shared, out / "overlap", overlap=shared.plot)
    parts: list[Any] = [moved, shared]
    for m in others if cross else ():
        say(f"patching {m.label} into {first.label}")
        found = cmap(first, m, on, chosen, draws=draws, seed=seed)
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in m.label)
        keep(found, out / f"cmap-{name}", cmap=found.plot)
        parts.append(found)
    say_notes(*parts)
    if as_json:
        typer.echo(json.dumps(json.loads(str(moved.frame().to_json(orient="records")))))
        return
    for line in (chosen, *parts):
        typer.echo(str(line))
    typer.echo(f"mechanism-diff: {out}")
