"""`alignlens steer`"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analyses.commands.measures import TRAINED, splits_of

if TYPE_CHECKING:
    from steering.recipes import Recipe

RECIPES = ("mean", "pca", "logistic", "lda", "whitened")


def steer(
    model: Annotated[str, typer.Argument(help="Model name.")],
    contrast: Annotated[
        Path | None,
        typer.Argument(help="Pairs or labelled prompts (JSONL, CSV). Default: the shipped twins."),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            help="Where: '20.resid_post', or several sites separated by spaces. Default: the "
            "residual stream at five eighths of the depth, or the sites of the saved vector."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="mean, pca, logistic, lda or whitened. Default: mean.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Where prompts are read. Default: last.")
    ] = None,
    topics: Annotated[
        int | None, typer.Option(help="At most this many training topics. Default: 100.")
    ] = None,
    vector: Annotated[
        Path | None, typer.Option(help="A saved vector, instead of training one.")
    ] = None,
    operation: Annotated[
        str | None,
        typer.Option(help="add, add_keep_norm or ablate. Default: add, or the saved vector's own."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How strong, in the unit; negative: the other way.")
    ] = None,
    unit: Annotated[str, typer.Option(help="raw, unit, fraction or sigma.")] = "raw",
    kl: Annotated[
        float | None,
        typer.Option(
            help="Solve the strength: the smallest that moves answers to benign requests by this "
            "many nats. Default, if no strength is given: 0.05."
        ),
    ] = None,
    backwards: Annotated[
        bool, typer.Option("--backwards", help="With --kl: away from the positive class.")
    ] = False,
    benign: Annotated[int, typer.Option(help="Benign requests a KL budget is solved on.")] = 32,
    scope: Annotated[str, typer.Option(help="all, prompt or generated tokens.")] = "all",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt to try it on; repeat for several.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts to try it on.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    out: Annotated[Path, typer.Option(help="Folder for vector, figure and table.")] = Path("steer"),
    seed: Annotated[int, typer.Option(help="Seed of splits and draws.")] = 0,
    engine: Annotated[str, typer.Option(help="transformers, transformer_lens or nnsight.")] = (
        "transformers"
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    """Train a steering vector, save it, and show answers before and after.

    It is trained on the training topics alone, three of five of a file, so that `alignlens sweep`
    with the same --seed can test it on others.

    \b
    alignlens steer builtin:aligned --site 20.resid_post --kl 0.05
    alignlens steer org/model pairs.jsonl --site "8-12.resid_post" --strength 2 --prompt "Hello"
    alignlens steer org/model --vector steer/vector.safetensors --strength -1
    """
    from probes import datasets, figures, files
    from probes.contrast import Contrast
    from probes.model import HookedModel
    from probes.results import Record
    from steering.applied import Steering
    from steering.budget import solve_strength
    from steering.schedule import Schedule
    from steering.vector import SteeringVector

    if strength is not None and kl is not None:
        raise ValueError("--strength and --kl exclude each other: give one of them")
    if backwards and strength is not None:
        raise ValueError("--backwards goes with --kl: give a negative --strength instead")
    if vector is not None and contrast is not None:
        raise ValueError(f"a saved vector ({vector}) is used as it is: give no contrast with it")
    training = {"recipe": recipe, "positions": positions, "topics": topics}
    if vector is not None and (said := [f"--{k}" for k, v in training.items() if v is not None]):
        raise ValueError(
            f"{', '.join(said)} is of training, and a saved vector ({vector}) is used as it is: "
            "leave it out, or give no --vector"
        )
    topics = TRAINED if topics is None else topics
    if not 1 <= benign <= 32:
        raise ValueError(f"--benign is {benign}: give 1 to 32, the requests shipped for it")
    if scope not in ("all", "prompt", "generated"):
        raise ValueError(f"--scope is {scope!r}: choose all, prompt or generated")
    chosen = estimator(recipe or "mean")
    schedule = Schedule(scope)  # pyright: ignore[reportArgumentType]
    budget = (0.05 if kl is None else kl) if strength is None else None
    asked = list(prompt or [])
    if prompts is not None:
        read = datasets.read(prompts)
        asked += list(read.prompts) if isinstance(read, Contrast) else read
    asked = asked or datasets.general("test")[-3:]
    if dry_run:
        solving = f"up to 20 passes over {benign} answers, " if budget is not None else ""
        made = "a saved vector" if vector is not None else f"up to {2 * topics} prompts read"
        typer.echo(f"{made}, {solving}{2 * len(asked)} answers of {tokens} tokens")
        return
    loaded = HookedModel.load(model, engine, dtype=dtype)
    if vector is not None:
        made = SteeringVector.load(vector)
        made = made if site is None else made.at(site.split())
    else:
        from steering.recipes import train_vector

        train = splits_of(contrast, seed, topics, topics)["train"]
        where = f"{5 * loaded.n_layers // 8}.resid_post" if site is None else site.split()
        made = train_vector(loaded, train, where, recipe=chosen, positions=positions or "last")
    made = made if operation in (None, made.operation) else made.doing(operation)
    if budget is not None:
        solved = solve_strength(
            loaded, made, kl=budget, unit=unit, sign=-1 if backwards else 1, schedule=schedule,
            prompts=datasets.general("validation")[:benign],
            held_out=datasets.general("test")[:benign], seed=seed,
        )  # fmt: skip
        solved.save(out / "strength")
        figures.save(solved.plot(), out / "strength", dataclasses.asdict(solved.record))
        strength, said = solved.strength, str(solved)
    else:
        said = None
    assert strength is not None
    applied = Steering(made, strength, unit, schedule)
    applied.edits(loaded)  # a wrong unit is said before answers are generated
    made.save(out / "vector.safetensors")
    before = loaded.generate(asked, tokens)
    after = loaded.generate(asked, tokens, steer=applied)
    rows = [
        {"prompt": p if isinstance(p, str) else p[-1]["content"], "before": b, "after": a}
        for p, b, a in zip(asked, before, after, strict=True)
    ]
    record = Record(
        models=(loaded.name,),
        fingerprints=(loaded.fingerprint,),
        template_hash=loaded.template.hash,
        seeds=(seed,),
        engine=engine,
        dtype=dtype,
        settings={"steering": str(applied), "scope": scope, "tokens": tokens, "budget": budget},
    )
    import pandas as pd

    files.write_text(out / "table.csv", pd.DataFrame(rows).to_csv(index=False))
    done = {"strength": strength, "unit": unit, "solved": said, "answers": rows}
    files.write_json(out / "result.json", done)
    files.write_json(out / "record.json", dataclasses.asdict(record))
    if as_json:
        typer.echo(json.dumps(done))
        return
    if said is not None:
        typer.echo(said)
    for row in rows:
        for name, text in row.items():
            typer.echo(f"{name:>6}: {' '.join(text.split())}")
    typer.echo(f"{applied}: {out}")


def estimator(recipe: str) -> "Recipe":
    """The estimator of a direction by its name on the command line."""
    from probes import directions
    from probes.linear import logistic_direction

    found = {
        "mean": directions.difference_of_means,
        "pca": directions.pca_of_pairs,
        "logistic": logistic_direction,
        "lda": directions.lda,
        "whitened": directions.whitened_mean,
    }
    if recipe not in found:
        raise ValueError(f"unknown recipe {recipe!r}: choose {', '.join(RECIPES)}")
    return found[recipe]
