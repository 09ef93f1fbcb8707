"""`alignlens lens`"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

PARTS = ("train", "validation", "test")


def lens(
    model: Annotated[str, typer.Argument(help="Model to look into.")] = "builtin:aligned",
    other: Annotated[
        str | None,
        typer.Argument(help="Second checkpoint; the model is then also compared with it."),
    ] = None,
    task: Annotated[
        str, typer.Option(help="refusal, boxes, indirect-object or greater-than.")
    ] = "refusal",
    part: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    prompts: Annotated[int, typer.Option(help="Prompts of the task.")] = 40,
    position: Annotated[
        str, typer.Option(help="Token the lens reads: last, or a place of the task.")
    ] = "last",
    tuned: Annotated[
        Path | None,
        typer.Option(help="Translators of a tuned lens (safetensors: 3.weight, 3.bias, ...)."),
    ] = None,
    contrast: Annotated[
        bool,
        typer.Option("--contrast", help="Attribute prompts minus counterfactuals, not prompts."),
    ] = False,
    resamples: Annotated[int, typer.Option(help="Resamples of the intervals.")] = 1000,
    out: Annotated[Path, typer.Option(help="Folder to fill.")] = Path("lens"),
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
    """Where in depth the answer appears, and which heads and MLPs write it.

    The logit lens reads every layer's stream as a next token; direct attribution splits the final
    logits into what each head and each MLP wrote. With a second checkpoint both are shown as
    differences, too. Every number has its interval over topics and its null. It takes a minute for
    a small model; run again, it starts anew.

    \b
    alignlens lens builtin:aligned builtin:drifted
    alignlens lens builtin:base --task indirect-object --part validation
    """
    from analyses.commands.circuit import keep, loaded, say, say_notes, task_named
    from probes import names

    make = task_named(task)
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}: choose one of {', '.join(PARTS)}")
    if prompts < 2 or resamples < 1:
        raise ValueError(
            f"--prompts {prompts} and --resamples {resamples} were given: expected at least 2 "
            "prompts and 1 resample"
        )
    if tuned is not None and not tuned.is_file():
        raise ValueError(f"there is no file {tuned}: give a safetensors file of translators")
    given = [model] if other is None else [model, other]
    for name in given:
        names.parse(name)
    if dry_run:
        typer.echo(
            f"{len(given)} checkpoints in memory together, {prompts} prompts and their "
            f"counterfactuals read about {3 * len(given)} times each; disk: about 2 MB in {out}"
        )
        return

    from analyses.mechanisms.direct import direct_attribution
    from analyses.mechanisms.lens_difference import lens_difference
    from analyses.mechanisms.logit_lens import logit_lens
    from analyses.mechanisms.tasks import accuracy

    models = loaded(given, task, engine=engine, dtype=dtype)
    made = make(models[0], part, prompts)
    drawn: dict[str, Any] = {"resamples": resamples, "seed": seed}
    lenses, parts, lines = [], {}, []
    for place, m in zip(("model", "other"), models, strict=False):
        say(f"reading {m.label} on {len(made)} prompts")
        right = accuracy(m, made)
        seen = logit_lens(m, made, position=position, translators=tuned, **drawn)
        terms = direct_attribution(m, made, contrast=contrast, **drawn)
        keep(right, out / place / "accuracy", accuracy=right.plot)
        keep(
            seen,
            out / place / "lens",
            lens=seen.plot,
            probability=lambda seen=seen: seen.plot(measure="probability"),
            rank=lambda seen=seen: seen.plot(measure="log rank"),
        )
        keep(terms, out / place / "terms", terms=terms.figure)
        lenses.append(seen)
        lines += [str(right), str(seen), str(terms)]
        parts[m.label] = {"lens": seen.frame(), "terms": terms.strongest(20)}
    if len(models) == 2:
        say(f"comparing {models[0].label} with {models[1].label}")
        changed = lens_difference(*lenses, **drawn)
        both = direct_attribution(models[0], made, other=models[1], contrast=contrast, **drawn)
        keep(changed, out / "difference" / "lens", lens=changed.plot)
        keep(both, out / "difference" / "terms", terms=both.figure)
        lines += [str(changed), str(both)]
        parts["difference"] = {"lens": changed.frame(), "terms": both.strongest(20)}
    say_notes(*lenses)
    if as_json:
        tables = {
            name: {k: json.loads(str(t.to_json(orient="records"))) for k, t in found.items()}
            for name, found in parts.items()
        }
        typer.echo(json.dumps(tables))
        return
    for line in lines:
        typer.echo(line)
    typer.echo(f"lens: {out}")
