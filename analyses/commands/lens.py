"""`alignlens lens`"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


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
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Where in depth the answer appears, and which heads and MLPs write it.

    The logit lens reads every layer's stream as a next token; direct attribution splits the final
    logits into what each head and each MLP wrote. With a second checkpoint both are shown as
    differences, too. Every number has its interval over topics and its null.

    \b
    alignlens lens builtin:aligned builtin:drifted
    alignlens lens builtin:base --task indirect-object --part validation
    """
    from analyses.mechanisms.direct import direct_attribution
    from analyses.mechanisms.lens_difference import lens_difference
    from analyses.mechanisms.logit_lens import logit_lens
    from analyses.mechanisms.tasks import TASKS, accuracy
    from probes import names
    from probes.model import HookedModel

    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    for name in (model, other):
        if name is not None:
            names.parse(name)
    options: dict[str, Any] = {"engine": engine, "dtype": dtype}
    if task != "refusal":
        options["template"] = "none"
    loaded = [HookedModel.load(model, **options)]
    if other is not None:
        if task == "refusal":  # a base has no template of its own
            options["template"] = loaded[0].template.source
        loaded.append(HookedModel.load(other, **options))
    made = TASKS[task](loaded[0], part, prompts)
    lenses, parts, lines = [], {}, []
    for place, m in zip(("model", "other"), loaded, strict=False):
        _say(f"reading {m.label} on {len(made)} prompts")
        kept = (
            accuracy(m, made),
            logit_lens(
                m, made, position=position, translators=tuned, resamples=resamples, seed=seed
            ),
        )
        terms = direct_attribution(m, made, contrast=contrast, resamples=resamples, seed=seed)
        _keep(kept[0], out / place / "accuracy", accuracy=kept[0].plot)
        _keep(
            kept[1],
            out / place / "lens",
            lens=kept[1].plot,
            probability=lambda found=kept[1]: found.plot(measure="probability"),
            rank=lambda found=kept[1]: found.plot(measure="log rank"),
        )
        _keep(terms, out / place / "terms", terms=terms.figure)
        lenses.append(kept[1])
        lines += [str(kept[0]), str(kept[1]), str(terms)]
        parts[m.label] = {"lens": kept[1].frame(), "terms": terms.strongest(20)}
    if len(loaded) == 2:
        _say(f"comparing {loaded[0].label} with {loaded[1].label}")
        changed = lens_difference(*lenses, resamples=resamples, seed=seed)
        both = direct_attribution(
            loaded[0],
            made,
            other=loaded[1],
            contrast=contrast,
            resamples=resamples,
            seed=seed,
        )
        _keep(changed, out / "difference" / "lens", lens=changed.plot)
        _keep(both, out / "difference" / "terms", terms=both.figure)
        lines += [str(changed), str(both)]
        parts["difference"] = {"lens": changed.frame(), "terms": both.strongest(20)}
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


def _keep(result: Any, folder: Path, **drawn: Any) -> None:
    from probes import figures, files

    result.save(folder)
    files.write_text(folder / "table.csv", result.frame().to_csv(index=False))
    for name, plot in drawn.items():
        figures.save(plot(), folder / name, dataclasses.asdict(result.record))


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
