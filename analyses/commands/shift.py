"""`alignlens shift`"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from analyses.checkpoints import Checkpoints
    from probes.prompts import Prompt
    from probes.results import Result

PAIRS = 40
"""Preference pairs that ship."""


def shift(
    base: Annotated[str, typer.Argument(help="Base model.")] = "builtin:base",
    aligned: Annotated[str, typer.Argument(help="Aligned model.")] = "builtin:aligned",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts (JSONL, CSV, TXT), pairs or plain. Default: the shipped twins, test part."
        ),
    ] = None,
    number: Annotated[
        int, typer.Option("--topics", help="At most this many topics, or plain prompts.")
    ] = 20,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer, at most.")] = 24,
    context: Annotated[
        list[str] | None,
        typer.Option(
            help="What else the base reads before the answers: minimal, plain, urial, urial-1, "
            "urial-0, or all; repeat for several. The answers stay the same."
        ),
    ] = None,
    rewards: Annotated[
        bool,
        typer.Option(
            "--rewards",
            help="Rank the shipped preference pairs by log-ratio rewards and by probability.",
        ),
    ] = False,
    released: Annotated[
        bool,
        typer.Option("--released", help="Beside ours, the numbers of the released analysis."),
    ] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Every checkpoint's answers, read by every other.")
    ] = False,
    drifted: Annotated[
        list[str] | None,
        typer.Option(help="Drifted model for --matrix; repeat for several."),
    ] = None,
    pages: Annotated[
        int, typer.Option(help="Prompts of each group that get a page of their own.")
    ] = 20,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("shift"),
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
    """Which of the aligned model's tokens would the base not have chosen?

    The aligned model answers, and every token is ranked by the base at the same place. A page for
    each prompt shows both models' most probable tokens.

    \b
    alignlens shift
    alignlens shift org/base org/instruct --prompts pairs.jsonl --context all
    alignlens shift builtin:base builtin:aligned --matrix --drifted builtin:drifted --rewards
    """
    from analyses.tokens import contexts

    for what, n in (("--topics", number), ("--tokens", tokens), ("--pages", pages)):
        if n < 1:
            raise ValueError(f"{what} is {n}: give 1 or more")
    if drifted and not matrix:
        raise ValueError("--drifted is read by --matrix only: give both, or neither")
    asked = list(contexts.CONTEXTS) if "all" in (context or []) else list(context or [])
    names = list(dict.fromkeys(["same", *map(contexts.check, asked)]))
    given, groups = _prompts(prompts, number, seed)
    models = 2 + len(drifted or [])
    if dry_run:
        reads = len(names) + 1 + (models**2 if matrix else 0)
        words = len(given) * (60 + tokens)
        extra = 4 * PAIRS * 90 * 2 if rewards else 0
        typer.echo(
            f"{len(given)} prompts in {len(set(groups))} groups, {tokens} tokens each at most: "
            f"about {words * reads + extra:,} tokens read and "
            f"{len(given) * tokens * (1 + models * matrix):,} written; memory: {models} models at "
            f"once; disk: about {0.3 + 0.0012 * len(given) * tokens:.0f} MB in {out}"
        )
        return

    from analyses import checkpoints

    _say(f"loading {models} models")
    lineage = checkpoints.load(base, aligned, drifted or (), engine=engine, dtype=dtype)
    for note in lineage.notes:
        _say(note)
    said = _measure(
        lineage, given, groups, names, tokens, out, seed,
        rewards=rewards, released=released, matrix=matrix, pages=pages,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(said["table"]))
        return
    for line in said["lines"]:
        typer.echo(line)
    typer.echo(f"shift: {out}, pages: {out / 'pages' / 'index.html'}")


def _measure(
    lineage: "Checkpoints",
    given: "Sequence[Prompt]",
    groups: "Sequence[str]",
    names: "Sequence[str]",
    tokens: int,
    out: Path,
    seed: int,
    *,
    rewards: bool,
    released: bool,
    matrix: bool,
    pages: int,
) -> dict[str, Any]:
    """Everything that was asked, written; the lines to print and the tables as JSON."""
    from analyses.tokens.in_context import compare_contexts
    from analyses.tokens.matrix import shift_matrix
    from analyses.tokens.pages import write_pages
    from analyses.tokens.released import LISTED
    from analyses.tokens.released import released as as_released
    from analyses.tokens.shift import measured
    from probes import files
    from probes.progress import progress

    found: dict[str, Result] = {}
    tables: dict[str, Any] = {}

    def keep(name: str, result: "Result", **drawn: Any) -> None:
        record = dataclasses.replace(result.record, seeds=(seed,))
        result = dataclasses.replace(result, record=record)
        found[name] = result
        folder = out if name == "shift" else out / name
        result.save(folder)
        table = result.summary() if name == "shift" else result.frame()  # pyright: ignore
        files.write_text(folder / "table.csv", table.to_csv(index=False))
        tables[name] = json.loads(str(table.to_json(orient="records")))  # JSON has no NaN
        _draw(folder, drawn, dataclasses.asdict(record))

    with progress(len(given), "answers read") as step:
        shifts = measured(
            lineage.base, lineage.aligned, given, groups, names, max_new_tokens=tokens,
            batch_size=16, vocab_size=lineage.vocab_size, top=LISTED if released else 10,
            progress=step,
        )  # fmt: skip
    first = shifts[0]
    several = len(given) > 1
    drawn = {
        "shift": first.plot,
        "divergence": first.plot_divergence,
        "buckets": first.plot_buckets,
    }
    keep("shift", first, **(drawn if several else {}))
    files.write_text(out / "tokens.csv", first.frame().to_csv(index=False))
    write_pages(first, out / "pages", found["shift"].record, limit=pages)
    if len(names) > 1:
        _say(f"{len(names)} contexts of the base")
        by_context = compare_contexts(shifts, seed)
        keep("contexts", by_context, contexts=by_context.plot)
    if released:
        theirs = as_released(first, lineage.aligned.tokenizer)
        keep("released", theirs, released=theirs.plot)
    if matrix:
        _say(f"{len(lineage.items)} checkpoints read each other")
        with progress(len(given) * len(lineage.items), "answers of the matrix") as step:
            table = shift_matrix(
                lineage, given, groups, max_new_tokens=tokens, seed=seed, progress=step
            )
        keep("matrix", table, matrix=table.plot)
    if rewards:
        from analyses.tokens.ranking import ranking_accuracy
        from analyses.tokens.reward_ranking import rank_by_reward
        from probes import datasets

        _say(f"{PAIRS} preference pairs")
        pairs = datasets.preferences()
        ranked = rank_by_reward(lineage.aligned, lineage.base, pairs)
        keep("rewards", ranked, rewards=ranked.plot)
        accuracy = ranking_accuracy(lineage.aligned, lineage.base, pairs)
        keep("ranking", accuracy, ranking=accuracy.plot, losses=accuracy.plot_losses)
    return {"lines": [str(result) for result in found.values()], "table": tables}


def _draw(folder: Path, drawn: "Mapping[str, Any]", record: "Mapping[str, Any]") -> None:
    from probes import figures

    for name, plot in drawn.items():
        figures.save(plot(), folder / name, record)


def _prompts(source: Path | None, topics: int, seed: int) -> "tuple[list[Prompt], list[str]]":
    """Prompts with the group of each: the classes of pairs, or `prompts` where there are none."""
    from probes import datasets
    from probes.contrast import Contrast

    found = datasets.safety("test") if source is None else datasets.read(source)
    if not isinstance(found, Contrast):
        return list(found)[:topics], ["prompts"] * min(topics, len(found))
    names = ("harmless", "harmful") if source is None else ("negative", "positive")
    chosen = found.limited(topics, seed)
    return list(chosen.prompts), [names[label] for label in chosen.labels]


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
