"""`alignlens report`"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    base: Annotated[str, typer.Option(help="Base model.")] = "builtin:base",
    aligned: Annotated[str, typer.Option(help="Aligned model.")] = "builtin:aligned",
    drifted: Annotated[
        list[str] | None,
        typer.Option(
            help="Drifted model; repeat for several. Without --base and --aligned: the built-in "
            "drifted and mixed."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Pairs (JSONL or CSV with positive/negative or harmful/harmless). Default: the "
            "shipped twins."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("alignlens-report"),
    full: Annotated[bool, typer.Option("--full", help="All prompts and layers; slow.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few prompts, to try it out.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    base_context: Annotated[
        str,
        typer.Option(
            help="What the base reads before the answers of panel b: same (the aligned model's "
            "template), minimal (query and answer headings), plain (the bare request), urial "
            "(an instruction and three answered queries), urial-1 or urial-0."
        ),
    ] = "same",
    engine: Annotated[str, typer.Option(help="transformers, transformer_lens or nnsight.")] = (
        "transformers"
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Compare checkpoints of one model: one offline page, figures, a table.

    \b
    alignlens report
    alignlens report --base org/base --aligned org/instruct --out my-report
    alignlens report --base m --aligned m+adapter --drifted m+other --prompts pairs.jsonl
    """
    from analyses.pairs import pairs
    from analyses.report import DEFAULT, SIZES, run
    from analyses.tokens import contexts

    if full and quick:
        raise ValueError("--full and --quick exclude each other: give one of them")
    contexts.check(base_context)
    size = SIZES["full" if full else "quick" if quick else "default"]
    own = (base, aligned) == DEFAULT[:2]
    others = tuple(drifted) if drifted else (DEFAULT[2] if own else ())
    source = None if prompts is None else str(prompts)
    if dry_run:
        parts, _, name = pairs(source, size, seed)
        n = sum(map(len, parts.values()))
        models = 2 + len(others)
        typer.echo(
            f"{models} checkpoints; {name}: {n} prompts captured per checkpoint (about "
            f"{25 * n * models:,} tokens after sharing), {2 * size.answered} answered by each, "
            f"{2 * size.shifted} answered at length; {size.steered} read about 50 times while the "
            f"aligned model is steered; memory: all {models} models at once and "
            f"{n} vectors per layer and checkpoint; disk: about 3 MB in {out}"
        )
        return

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    found = run(
        base, aligned, others, prompts=source, size=size, seed=seed, engine=engine, say=say,
        dtype=dtype, base_context=base_context,
    )  # fmt: skip
    from analyses.page import write

    page = write(found, out)
    if as_json:
        typer.echo(json.dumps(json.loads((out / "result.json").read_text())))
    else:
        typer.echo(f"report: {page} ({found.seconds:.0f} s)")
