"""`alignlens subspace`"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from analyses.subspaces.panel import Panel
    from probes.results import Record

ONLY = ("weights", "activations", "lens", "erasure")
BUILTIN = ("builtin:base", "builtin:aligned")
TUNED, AGAIN = ("builtin:drifted", "builtin:mixed"), "builtin:aligned-s1"


def subspace(
    base: Annotated[str, typer.Argument(help="Base model.")] = BUILTIN[0],
    aligned: Annotated[str, typer.Argument(help="Aligned model.")] = BUILTIN[1],
    tuned: Annotated[
        list[str] | None,
        typer.Option(
            help="Model tuned further from the aligned one; repeat for several. For the built-in "
            "models: drifted and mixed."
        ),
    ] = None,
    again: Annotated[
        str | None,
        typer.Option(
            help="The aligned model trained again with another seed, for the lens's null. For the "
            "built-in models: aligned-s1."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="weights, activations (with the concept), lens or erasure.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Pairs (JSONL or CSV). Default: the shipped twins.")
    ] = None,
    topics: Annotated[int, typer.Option(help="Training and test topics each, at most.")] = 48,
    texts: Annotated[int, typer.Option(help="Unrelated texts of the lens.")] = 32,
    words: Annotated[
        str | None,
        typer.Option(help="Words the lens counts, separated by blanks. Default: of refusals."),
    ] = None,
    selectivity: Annotated[
        bool,
        typer.Option(
            "--selectivity",
            help="Also measure what parts of each update do to behaviour: refusals of the shipped "
            "twins, questions, text. Takes long, and goes on where it stopped.",
        ),
    ] = False,
    draws: Annotated[
        int, typer.Option(help="Random subspaces a cell of --selectivity; a claim needs 20.")
    ] = 1,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("alignlens-subspace"),
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    write_edited: Annotated[
        Path | None,
        typer.Option(help="Also write the aligned model with a projected first update there."),
    ] = None,
    fraction: Annotated[float, typer.Option(help="Of directions kept by --write-edited.")] = 0.25,
    engine: Annotated[str, typer.Option(help="transformers, transformer_lens or nnsight.")] = (
        "transformers"
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Look for safety subspaces: in weights, in activations, in differences, and erase them.

    \b
    alignlens subspace
    alignlens subspace org/base org/instruct --tuned org/tuned --only weights
    alignlens subspace m m+adapter --prompts pairs.jsonl --out my-subspaces
    alignlens subspace --only weights --selectivity --draws 20
    """
    from analyses.pairs import pairs
    from analyses.subspaces import panels, weight_panels
    from analyses.subspaces.edited import check_new
    from probes.model import HookedModel
    from probes.results import Record

    if only is not None and only not in ONLY:
        raise ValueError(f"--only {only}: choose one of {', '.join(ONLY)}")
    if topics < 4 or texts < 4:
        raise ValueError(f"--topics {topics} and --texts {texts}: give at least 4 of each")
    if words is not None and not words.split():
        raise ValueError("--words is empty: give words, or leave it out for those of refusals")
    own = (base, aligned) == BUILTIN
    others = list(tuned) if tuned else list(TUNED if own else ())
    again = again or (AGAIN if own else None)
    if only == "weights" and not others:
        raise ValueError("--only weights compares updates with the alignment: give --tuned MODEL")
    if (selectivity or write_edited is not None) and not others:
        given = "--selectivity" if selectivity else "--write-edited"
        raise ValueError(f"{given} projects an update of the aligned model: give --tuned MODEL")
    if draws < 1 or (draws > 1 and not selectivity):
        raise ValueError(f"--draws {draws}: give 1 or more, with --selectivity")
    if not 0 < fraction < 1:
        raise ValueError(
            f"--fraction {fraction:g}: give a share above 0 and below 1 (0.25 for 25 %)"
        )
    if write_edited is not None:
        check_new(write_edited)
    notes: list[str] = []
    wanted = ONLY if only is None else (only,)
    if "weights" in wanted and not others:
        wanted = tuple(name for name in wanted if name != "weights")
        notes.append("Weights were left out: without --tuned MODEL there is no update to compare.")
    size = panels.Size(topics, max(4, 2 * topics // 3), topics, texts)
    source = None if prompts is None else str(prompts)
    if dry_run:
        parts, _, name = pairs(source, size, seed)
        n = sum(map(len, parts.values())) + size.test
        models = 2 + len(others)
        typer.echo(
            f"{models} checkpoints; {', '.join(wanted)}; {name}: {n} prompts captured per "
            f"checkpoint (about {25 * n * models:,} tokens), {texts} texts read by each in the "
            f"lens; memory: all {models} models at once; disk: about 5 MB in {out}"
        )
        for note in notes:
            typer.echo(note)
        if selectivity:
            from analyses.subspaces.selectivity import cells_of

            typer.echo(
                f"--selectivity: {len(others)} x {2 + len(cells_of(draws=draws))} edited models, "
                f"each answering {2 * min(24, size.test)} requests with 12 tokens and 60 questions "
                f"and reading {min(24, texts)} texts; memory: one model more, 1 GiB of directions"
            )
        return

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    for note in notes:
        say(note)
    found: list[Panel] = []
    record = Record(models=(base, aligned, *others), seeds=(seed,))
    loaded = None

    def keep(made: "list[Panel]") -> None:
        """Written at once, so that a run that is stopped leaves what it had."""
        found.extend(_save(panel, out, record) for panel in made)

    if "weights" in wanted:
        record = dataclasses.replace(record, fingerprints=weight_panels.described(record.models))
        keep(weight_panels.weight_panels(base, aligned, others, say))
    if set(wanted) - {"weights"}:
        pairs(source, size, seed)  # a wrong file is said before anything is loaded
        say("loading " + ", ".join((base, aligned, *others)))
        loaded = panels.load(base, aligned, others, engine=engine, dtype=dtype)
        record = panels.described_as_loaded(loaded, seed)
        for note in loaded.notes:
            say(note)
        if {"activations", "erasure"} & set(wanted):
            lineage = panels.capture_lineage(loaded, source, size, seed, say)
            record = lineage.record
            if "activations" in wanted:
                keep(panels.activation_panels(lineage, seed, say))
            if "erasure" in wanted:
                keep(panels.erasure_panels(lineage, seed, say))
        if "lens" in wanted:
            repeated = panels.repeated(loaded, again, engine=engine, dtype=dtype)
            counted = None if words is None else words.split()
            keep(panels.lens_panels(loaded, repeated, size, seed, say, counted))
    if selectivity:
        model = loaded.aligned if loaded else HookedModel.load(aligned, engine, dtype=dtype)
        for name, V, U in weight_panels.updates(base, aligned, others):
            say(f"selectivity of {V} for {U}")
            folder = out / f"selectivity-{name}"
            keep([weight_panels.selectivity_panel(model, V, U, folder, size, draws, seed)])
    summary = _summarise(found, out, record, notes)
    if write_edited is not None:
        from analyses.subspaces.edited import Projected
        from analyses.subspaces.edited import write_edited as write

        _, V, U = next(weight_panels.updates(base, aligned, others))
        say(f"wrote {write(aligned, V, U, Projected(fraction), write_edited)}")
    if as_json:
        typer.echo(json.dumps(summary))
        return
    for panel in found:
        typer.echo(f"{panel.name}: {panel.result}")
    typer.echo(f"subspace: {len(found)} panels in {out}")


def _save(panel: "Panel", out: Path, record: "Record") -> "Panel":
    """Result, record, table and figures of a panel in its own folder."""
    from probes import figures, files

    own = panel.result.record
    if not own.models:  # measured on activations: as they were captured
        own = dataclasses.replace(record, settings={**record.settings, **own.settings})
    result = dataclasses.replace(panel.result, record=own)
    folder = result.save(out / panel.name)
    files.write_text(folder / "table.csv", result.frame().to_csv(index=False))
    for name, axes in panel.figures.items():
        figures.save(axes, folder / name, dataclasses.asdict(own))
    return dataclasses.replace(panel, result=result)


def _summarise(
    found: "list[Panel]", out: Path, record: "Record", said: list[str]
) -> dict[str, object]:
    """One table, one list of sentences and one record above the panels' folders."""
    import pandas as pd

    from probes import files

    tables = [panel.result.frame().assign(panel=panel.name) for panel in found]
    table = pd.concat(tables)
    table.insert(0, "panel", table.pop("panel"))
    files.write_text(out / "table.csv", table.to_csv(index=False))
    notes = [*said, *(n for panel in found for n in getattr(panel.result, "notes", ()))]
    summary: dict[str, object] = {
        "panels": {panel.name: str(panel.result) for panel in found},
        "notes": list(dict.fromkeys(notes)),
    }
    files.write_json(out / "result.json", summary)
    files.write_json(out / "record.json", dataclasses.asdict(record))
    return summary
