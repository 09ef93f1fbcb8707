"""`alignlens sweep`"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analyses.commands.measures import (
    COSTS,
    EFFECTS,
    TRAINED,
    cost_of,
    effect_of,
    estimate,
    side_of,
    site_texts,
    splits_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from steering.effects import Measure


def sweep(
    model: Annotated[str, typer.Argument(help="Model name.")],
    contrast: Annotated[
        Path | None,
        typer.Argument(help="Pairs or labelled prompts (JSONL, CSV). Default: the shipped twins."),
    ] = None,
    vector: Annotated[
        Path | None,
        typer.Option(help="A saved vector. Default: the mean difference of the training topics."),
    ] = None,
    made_elsewhere: Annotated[
        bool,
        typer.Option(
            "--made-elsewhere",
            help="The saved vector was made without any prompt of the file; otherwise it must be "
            "that of the file's training topics (alignlens steer, same --seed).",
        ),
    ] = False,
    sites: Annotated[
        str | None,
        typer.Option(
            help="Sites, separated by spaces; each is a setting of its own. Default: every eighth "
            "of the depth of the residual stream, or those of the saved vector."
        ),
    ] = None,
    strengths: Annotated[str, typer.Option(help="Strengths, separated by spaces.")] = "0.5 1 2",
    unit: Annotated[str, typer.Option(help="raw, unit, fraction or sigma.")] = "raw",
    operations: Annotated[
        str, typer.Option(help="add, add_keep_norm, ablate; several separated by spaces.")
    ] = "add",
    on: Annotated[
        str, typer.Option(help="Prompts the effect is measured on: positive or negative.")
    ] = "negative",
    effects: Annotated[str, typer.Option(help="refusals, odds; the first is chosen by.")] = (
        "refusals"
    ),
    openers: Annotated[
        str, typer.Option(help="First words of a refusal, for odds, separated by spaces.")
    ] = "I",
    costs: Annotated[
        str, typer.Option(help="kl, perplexity, mistakes, repetition, benign_refusals.")
    ] = "kl",
    within: Annotated[
        float, typer.Option(help="The chosen setting may raise the first cost by this much.")
    ] = 0.1,
    fall: Annotated[
        bool, typer.Option("--fall", help="Choose the largest fall of the effect, not the rise.")
    ] = False,
    random: Annotated[
        int,
        typer.Option(
            help="Random directions, and shuffled-label vectors (20 at most), of the null."
        ),
    ] = 20,
    topics: Annotated[
        int, typer.Option(help="At most this many topics to choose on, and to test on.")
    ] = 32,
    trained: Annotated[
        int,
        typer.Option(help="At most this many training topics (--topics of alignlens steer)."),
    ] = TRAINED,
    positions: Annotated[
        str | None,
        typer.Option(help="Where prompts are read. Default: last, or as the saved vector's were."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to fill or to go on with.")] = Path("sweep"),
    seed: Annotated[int, typer.Option(help="Seed of splits and random directions.")] = 0,
    engine: Annotated[str, typer.Option(help="transformers, transformer_lens or nnsight.")] = (
        "transformers"
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say roughly what it takes, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> None:
    """Strength by site by operation: effect and cost on validation topics, the best on test topics.

    Beside every effect stand random directions of the same norm, shuffled-label vectors and an
    unrelated concept. Killed and run again, it goes on.

    \b
    alignlens sweep builtin:aligned --sites "14,20.resid_post" --strengths "0.5 1" --dry-run
    alignlens sweep builtin:aligned --operations ablate --strengths 1 --on positive --fall
    alignlens sweep org/model pairs.jsonl --costs "kl perplexity" --within 0.05
    """
    from probes import figures, files
    from probes.capturing import capture
    from probes.datasets import formality
    from probes.model import HookedModel
    from steering.edits import ADDING
    from steering.grid import Grid
    from steering.nulls import random_vectors, shuffled_vectors
    from steering.recipes import train_vector
    from steering.sweep import sweep as run
    from steering.vector import SteeringVector

    numbers = _numbers(strengths)
    wanted, paid = _known(effects, EFFECTS, "effect"), _known(costs, COSTS, "cost")
    if not wanted or not paid:
        raise ValueError("give one effect and one cost at least: the best setting weighs them")
    if on not in ("positive", "negative"):
        raise ValueError(f"--on is {on!r}: choose positive or negative")
    if random < 0:
        raise ValueError(f"--random is {random}: give 20 for a claim, at least 0")
    how, first = operations.split(), openers.split()
    if not first:
        raise ValueError("--openers is empty: give the first words of refusals, such as 'I Sorry'")
    by_operation = {op: _allowed(op, numbers, op in ADDING) for op in how}
    saved = None if vector is None else SteeringVector.load(vector)
    where_read = positions or "last"
    if saved is not None:
        where_read = saved.origin.positions or where_read
        if positions not in (None, where_read):
            raise ValueError(
                f"--positions is {positions!r} and the saved vector was made at {where_read!r}, "
                "where its nulls are read too: leave --positions out"
            )
    if made_elsewhere and (saved is None or contrast is None):
        raise ValueError("--made-elsewhere is said of a saved vector and a file: give both")
    parts = splits_of(contrast, seed, trained, topics)
    sides = {part: side_of(own, on == "positive") for part, own in parts.items()}
    loaded = HookedModel.load(model, engine, dtype=dtype)
    if saved is not None and sites is None:
        where = [str(s) for s in saved.sites]
    else:
        where = site_texts(loaded, sites)
    if dry_run:
        each = sum(len(own) for own in by_operation.values()) * len(where)
        steered = sum(s != 0 for own in by_operation.values() for s in own) * len(where)
        count = random + min(random, 20) + 1 if random else 0
        roughly = estimate(
            loaded, parts, sides, wanted, paid, sites=len(where), settings=steered, nulls=count
        )
        kept = sum(1 for folder in (out, out / "test") for _ in folder.glob("cells/*.json"))
        typer.echo(
            f"{each} settings with {count} nulls: about {roughly.passes} passes, "
            f"{roughly.tokens:,} tokens, {roughly.disk / 2**20:.0f} MB of disk and "
            f"{roughly.memory / 2**30:.1f} GB of memory; {kept} measurements are kept in {out}"
        )
        return
    acts = capture(loaded, parts["train"].prompts, where, where_read, progress=False)
    own = train_vector(loaded, parts["train"], where, activations=acts, positions=where_read)
    checked = contrast is not None and not made_elsewhere
    if saved is not None and checked and saved.origin.data_hash != own.origin.data_hash:
        raise ValueError(
            f"{vector} was not made from the training topics of {contrast} (--trained {trained}, "
            f"--seed {seed}), so it may have seen the prompts it would be tested on: give what "
            "`alignlens steer` was given as --topics and --seed (100 and 0 by default), or "
            "--made-elsewhere if no prompt of the file went into it"
        )
    made = own if saved is None else saved.at(where)
    nulls = {}
    if random:
        nulls["random"] = random_vectors(made, acts, random, seed, topics=parts["train"].topics)
        nulls["shuffled labels"] = shuffled_vectors(
            loaded, parts["train"], where, min(random, 20), seed,
            activations=acts, positions=where_read,
        )  # fmt: skip
        other = formality().limited(len(parts["train"]) // 2, seed)
        nulls["formality"] = [train_vector(loaded, other, where, positions=where_read)]

    def measured(part: str) -> "tuple[dict[str, Measure], dict[str, Measure]]":
        effect = {name: effect_of(name, list(sides[part].prompts), first) for name in wanted}
        return effect, {name: cost_of(name, loaded, part) for name in paid}

    grid = Grid({"vector": made}, by_operation, where, how, unit, nulls)
    effect, cost = measured("validation")
    found = run(
        loaded, grid, effect, cost, groups=dict.fromkeys(wanted, sides["validation"].topics), folder=out, seed=seed,
    )  # fmt: skip
    found.save(out)
    made.save(out / "vector.safetensors")
    files.write_text(out / "table.csv", found.frame().to_csv(index=False))
    record = dataclasses.asdict(found.record)
    figures.save(found.plot(), out / "pareto", record)
    figures.save(found.plot(kind="strength"), out / "strength", record)
    if len(how) == 1 and len(where) > 1:
        figures.save(found.plot(kind="layer"), out / "layer", record)
    best = found.best(within={paid[0]: within}, sign=-1 if fall else 1)
    one = dataclasses.replace(
        grid, strengths=[best.strength], sites=[best.site], operations=[best.operation]
    )
    effect, cost = measured("test")
    tested = run(
        loaded,
        one,
        effect,
        cost,
        groups=dict.fromkeys(wanted, sides["test"].topics),
        folder=out / "test",
        seed=seed,
    )
    tested.save(out / "test")
    table = tested.at(best, chosen_on=found)
    files.write_text(out / "test" / "table.csv", table.to_csv(index=False))
    if as_json:
        rows = {"validation": found.frame(), "test": table}
        # through pandas, because JSON has no NaN
        typer.echo(
            json.dumps({k: json.loads(str(v.to_json(orient="records"))) for k, v in rows.items()})
        )
        return
    typer.echo(f"{found}: {out}")
    for row in table.to_dict("records"):
        said = "beyond its null" if row["claimed"] else "not beyond its null"
        said = f", null {row['null_05']:.3g} to {row['null_95']:.3g}, {said}" if (
            row["role"] == "effect" and random
        ) else ""  # fmt: skip
        typer.echo(
            f"{best}, on {row['n']} test prompts: {row['measure']} {row['unsteered']:.3g} -> "
            f"{row['steered']:.3g}, change {row['change']:.3g} [{row['low']:.3g}, "
            f"{row['high']:.3g}]{said}"
        )


def _numbers(text: str) -> list[float]:
    try:
        return [float(piece) for piece in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(
            f"cannot read the strengths {text!r}: give numbers, for example '0.5 1 2'"
        ) from None


def _allowed(operation: str, strengths: "Sequence[float]", adds: bool) -> list[float]:
    """The strengths an operation can have; those left out are said."""
    kept = [s for s in strengths if adds or s <= 1]
    if not kept:
        raise ValueError(
            f"no strength is left for {operation}, whose strength is a share: give some up to 1"
        )
    if left := [f"{s:g}" for s in strengths if s not in kept]:
        said = f"{operation} mixes by a share, so strength {', '.join(left)} is left out there"
        typer.echo(f"note: {said}", err=True)
    return kept


def _known(text: str, names: tuple[str, ...], what: str) -> list[str]:
    found = text.replace(",", " ").split()
    for name in found:
        if name not in names:
            raise ValueError(f"unknown {what} {name!r}: choose {', '.join(names)}")
    return found
