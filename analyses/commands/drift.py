"""`alignlens drift`"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from analyses.drift.ledger import DriftLedger
    from probes.contrast import Contrast

CONTROLS = ("builtin:aligned-s1", "builtin:aligned-s2")
"""Controls of the built-in lineage: other seeds of the same alignment."""


def drift(
    base: Annotated[str, typer.Argument(help="Base model.")] = "builtin:base",
    aligned: Annotated[str, typer.Argument(help="Aligned model, the reference.")] = (
        "builtin:aligned"
    ),
    drifted: Annotated[
        list[str] | None,
        typer.Option(help="Drifted model; repeat for several. Default: the built-in two."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="A checkpoint that should not have drifted, such as another seed."),
    ] = None,
    course: Annotated[
        bool,
        typer.Option(
            "--course", help="The drifted models are the steps of one fine-tune, in order."
        ),
    ] = False,
    aqi: Annotated[
        bool, typer.Option("--aqi", help="The Alignment Quality Index of every checkpoint, too.")
    ] = False,
    attribution: Annotated[
        bool,
        typer.Option(
            "--attribution",
            help="Which layers and heads bring the behaviour of each drifted model back; slow.",
        ),
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Pairs (JSONL, CSV). Default: the shipped twins.")
    ] = None,
    topics: Annotated[int, typer.Option(help="At most this many test topics.")] = 80,
    resamples: Annotated[int, typer.Option(help="Resamples of the intervals.")] = 1000,
    out: Annotated[Path, typer.Option(help="Folder to fill or to go on with.")] = Path("drift"),
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
    """How far have checkpoints drifted from their alignment: the ledger, with nulls and controls.

    Weights, representation, tokens and behaviour, each in units of its own null, beside a bfloat16
    and an 8-bit round trip of the aligned model. Killed and run again, it goes on.

    \b
    alignlens drift
    alignlens drift org/base org/instruct --drifted org/fine-tuned --control org/other-seed
    alignlens drift builtin:base builtin:aligned --course --drifted builtin:mixed-2 --drifted builtin:mixed-4
    """
    from analyses.commands.measures import splits_of
    from probes import names

    own = (base, aligned) == ("builtin:base", "builtin:aligned")
    found = list(drifted or (("builtin:drifted", "builtin:mixed") if own else ()))
    if not found:
        raise ValueError("no drifted model was given: say which with --drifted")
    beside = list(control or (CONTROLS if own and not drifted else ()))
    for name in (base, aligned, *found, *beside):
        names.parse(name)
    if course and len(found) < 2:
        raise ValueError("--course needs the steps of a fine-tune: give --drifted twice or more")
    if attribution and prompts is not None:
        raise ValueError("--attribution reads the shipped requests: leave --prompts out")
    parts = splits_of(prompts, seed, topics, topics)
    models = 4 + len(found) + len(beside)
    if dry_run:
        n = len(parts["test"])
        typer.echo(
            f"{models} checkpoints (a bfloat16 and an 8-bit round trip among them), {n} prompts "
            f"each: about {25 * n * models * 2:,} tokens read and {10 * n * models:,} written; "
            f"memory: 3 models at once; disk: about 2 MB in {out}"
        )
        return
    listed = [(n, "drifted") for n in found] + [(n, "control") for n in beside]
    ledger = _ledger(
        base,
        aligned,
        listed,
        parts["test"],
        out,
        resamples,
        seed,
        {"engine": engine, "dtype": dtype},
    )
    _keep(ledger, out, ledger=ledger.plot, layers=ledger.plot_layers)
    lines = [str(ledger)]
    if course:
        from analyses.drift.course import DriftCourse

        steps = DriftCourse.of(ledger, [n for n, r in _roles(ledger) if r == "drifted"])
        _keep(steps, out / "course", course=steps.plot)
        lines.append(str(steps))
    if aqi or attribution:
        lines += _more(base, aligned, found, parts, out, seed, aqi, attribution, engine, dtype)
    if as_json:
        typer.echo(json.dumps(json.loads(str(ledger.frame().to_json(orient="records")))))
        return
    for line in lines:
        typer.echo(line)
    typer.echo(f"drift: {out}")


def _roles(ledger: "DriftLedger") -> list[tuple[str, str]]:
    return list(zip(ledger.labels, ledger.roles, strict=True))


def _ledger(
    base: str,
    aligned: str,
    listed: list[tuple[str, str]],
    contrast: "Contrast",
    out: Path,
    resamples: int,
    seed: int,
    options: dict[str, Any],
) -> "DriftLedger":
    """Measure what no earlier run of the same settings has left in the folder."""
    from analyses.checkpoints import unique_labels
    from analyses.drift.ledger import DriftLedger, joined
    from analyses.drift.round_trips import FORMATS, round_trip
    from analyses.drift.yardstick import METHOD, Yardstick
    from probes import files, names
    from probes.model import HookedModel
    from probes.prompts import prompts_hash

    _say(f"loading {base} and {aligned}")
    ends = [HookedModel.load(name, **options) for name in (base, aligned)]
    stick: Yardstick | None = None
    measured = []
    asked = prompts_hash(ends[1].template.render_all(contrast.prompts))
    given = [base, *(name for name, _ in listed)]
    labels = dict(
        zip(given, unique_labels([names.parse(n).label for n in given], given), strict=True)
    )
    for name, role in [(base, "base"), *listed, *((kind, "round trip") for kind in FORMATS)]:
        folder = out / "checkpoints" / _file_name(name)
        if role == "base":
            model = ends[0]
        elif role == "round trip":
            model = round_trip(ends[1], name)
        else:
            model = HookedModel.load(name, **options)
        label, of = labels.get(name, model.label), "control" if role == "round trip" else role
        settings = {
            "method": METHOD, "prompts": asked, "labels": list(map(bool, contrast.labels)),
            "label": label, "role": of,
            "checkpoint": model.fingerprint, "base": ends[0].fingerprint,
            "reference": ends[1].fingerprint, "topics": sorted(set(contrast.topics)),
            "resamples": resamples, "seed": seed, "engine": options["engine"],
        }  # fmt: skip
        kept = folder / "settings.json"
        if kept.is_file() and json.loads(kept.read_text()) == settings:
            measured.append(DriftLedger.load(folder))
            _say(f"{label}: measured before")
            continue
        if stick is None:
            _say(f"reading {ends[1].label} on {len(contrast)} prompts")
            stick = Yardstick.of(ends[0], ends[1], contrast, resamples=resamples, seed=seed)
        _say(f"measuring {label}")
        one = DriftLedger.of(stick, [stick.measure(model, of, label)])
        one.save(folder)
        files.write_json(kept, settings)  # last: without it the folder is measured again
        measured.append(one)
    return joined(measured)


def _more(
    base: str,
    aligned: str,
    found: list[str],
    parts: "dict[str, Contrast]",
    out: Path,
    seed: int,
    aqi: bool,
    attribution: bool,
    engine: str,
    dtype: str,
) -> list[str]:
    from analyses import checkpoints

    lineage = checkpoints.load(base, aligned, found, engine=engine, dtype=dtype)
    lines = []
    if aqi:
        from analyses.drift.aqi import lineage_aqi

        _say(f"AQI of {len(lineage.items)} checkpoints, each with 200 shuffles of the labels")
        models = [item.model for item in lineage.items]
        ordered = [models[1], models[0], *models[2:]]  # the first is what the others refer to
        index = lineage_aqi(ordered, parts["train"], parts["test"], seed=seed)
        _keep(index, out / "aqi", aqi=index.plot, alpha=index.plot_alpha)
        lines.append(str(index))
    if attribution:
        from analyses.drift.attribution import attribute_drift

        for item in lineage.drifted:
            _say(f"attributing {item.label}")
            folder = out / "attribution" / _file_name(item.label)
            which = attribute_drift(
                lineage.aligned, item.model, n_topics=40, max_new_tokens=10, seed=seed,
                folder=folder / "layers",
            )  # fmt: skip
            _keep(which, folder, attribution=which.plot, heads=which.plot_heads)
            lines.append(str(which))
    return lines


def _file_name(text: str) -> str:
    """A model's name or label as the name of a folder: never a path of its own."""
    return "".join(c if c.isalnum() or c == "-" else "_" for c in text)


def _keep(result: Any, folder: Path, **drawn: Any) -> None:
    from probes import figures, files

    result.save(folder)
    files.write_text(folder / "table.csv", result.frame().to_csv(index=False))
    for name, plot in drawn.items():
        figures.save(plot(), folder / name, dataclasses.asdict(result.record))


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
