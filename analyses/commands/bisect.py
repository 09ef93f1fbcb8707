"""`alignlens bisect`"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from probes.scores import Interval

PROPERTIES = ("refusals", "benign-refusals", "representation", "token", "behaviour", "headline")


def bisect(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="One folder of checkpoints or adapters, or model names in order."),
    ],
    model: Annotated[
        str | None, typer.Option(help="What the adapters of a folder go on top of.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base of the alignment, for the terms of the ledger. Default: the model."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Aligned reference of the ledger's terms. Default: the first checkpoint."
        ),
    ] = None,
    what: Annotated[
        str, typer.Option("--property", help=f"What is measured: {', '.join(PROPERTIES)}.")
    ] = "refusals",
    limit: Annotated[
        float | None,
        typer.Option(
            help="Where it breaks. Default: half of the first checkpoint's refusal rate, twice its "
            "benign refusals (5 % at least), or 1 null of a term."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Pairs (JSONL, CSV). Default: the shipped twins.")
    ] = None,
    topics: Annotated[int, typer.Option(help="At most this many test topics.")] = 80,
    every: Annotated[
        bool, typer.Option("--every", help="Measure all, to see whether it broke once.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder to fill or to go on with.")] = Path("bisect"),
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    engine: Annotated[str, typer.Option(help="transformers, transformer_lens or nnsight.")] = (
        "transformers"
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find the checkpoint of a fine-tune at which a property broke. Killed and run again, it goes on.

    \b
    alignlens bisect builtin:aligned builtin:mixed-{1..6}
    alignlens bisect run/checkpoints --model org/instruct --property headline
    alignlens bisect run/checkpoints --property refusals --limit 0.5 --every
    """
    import hashlib
    import math

    from analyses.commands.measures import splits_of
    from analyses.drift.bisect import bisect as run
    from analyses.drift.bisect import checkpoints_in
    from analyses.drift.measured import ledger_property, refusal_property
    from analyses.drift.yardstick import METHOD
    from probes import figures, files, names
    from probes.results import Record

    if what not in PROPERTIES:
        raise ValueError(f"unknown property {what!r}: choose {', '.join(PROPERTIES)}")
    alone = len(checkpoints) == 1 and Path(checkpoints[0]).is_dir()
    listed = checkpoints_in(checkpoints[0], model) if alone else list(checkpoints)
    for name in listed:
        names.parse(name)  # a wrong last name is said before the first model is loaded
    contrast = splits_of(prompts, seed, topics, topics)["test"]
    if dry_run:
        most = len(listed) if every else 2 + math.ceil(math.log2(max(1, len(listed) - 1)))
        typer.echo(
            f"{len(listed)} checkpoints, {most} of them measured at most: each answers "
            f"{len(contrast)} prompts; memory: one model at a time"
            + ("" if what in PROPERTIES[:2] else ", base and reference beside it")
        )
        return
    options: dict[str, Any] = {"engine": engine, "dtype": dtype}
    side = ("harmful" if prompts is None else "positive") if what == "refusals" else "benign"
    if what in ("refusals", "benign-refusals"):
        measure = refusal_property(contrast, what == "refusals", **options)
        breaks, said = (
            "below" if what == "refusals" else "above",
            f"share of {side} prompts refused",
        )
        from_, first = "", ""
    else:
        first = reference or listed[0]
        from_ = base or _base_of(first, model)
        measure = ledger_property(from_, first, contrast, what, seed=seed, **options)
        breaks, said = "above", f"{what} drift from {names.parse(first).label} (nulls)"

    def usual(at_first: "Interval") -> float:
        if what == "refusals" and at_first.value == 0:
            raise ValueError(
                f"{listed[0]} refuses none of the prompts, so nothing can break below half of it: "
                "say with --limit what counts as broken"
            )
        if what in PROPERTIES[2:]:
            return 1.0
        return at_first.value / 2 if what == "refusals" else max(0.05, 2 * at_first.value)

    asked = hashlib.sha256(repr(contrast.prompts).encode()).hexdigest()
    settings = {
        "method": METHOD, "prompts": asked, "labels": list(contrast.labels),
        "seed": seed, "base": from_, "reference": first, "engine": engine, "dtype": dtype,
        "files": {name: _stamp(name) for name in (*listed, *filter(None, (from_, first)))},
    }  # fmt: skip
    record = Record(
        models=tuple(listed), prompts_hash=asked, seeds=(seed,), dtype=dtype,
        engine=engine, settings={"property": what, "base": from_, "reference": first},
    )  # fmt: skip
    found = run(
        listed, measure, usual if limit is None else limit, what=said, breaks=breaks, every=every,
        keep=out / "measured.json", settings=settings, record=record,
    )  # fmt: skip
    found.save(out)
    files.write_text(out / "table.csv", found.frame().to_csv(index=False))
    figures.save(found.plot(), out / "bisect", dataclasses.asdict(found.record))
    if as_json:
        rows = found.frame().to_dict("records")
        typer.echo(json.dumps({"first_broken": found.first_broken, "measured": rows}))
    else:
        typer.echo(f"{found}: {out}")


def _stamp(name: str) -> list[list[object]]:
    """Size and time of the files of a local model: another checkpoint under an old name is seen."""
    from probes import names

    parsed = names.parse(name)
    folders = [Path(part) for part in (parsed.base, parsed.adapter) if part and Path(part).is_dir()]
    return [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]


def _base_of(reference: str, model: str | None) -> str:
    if model is not None:
        return model
    if reference.startswith("builtin:"):
        return "builtin:base"
    raise ValueError(
        "the terms of the ledger need the base that the reference was aligned from: say it with "
        "--base, or use --property refusals"
    )
