"""`alignlens offsets`"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from probes.model import HookedModel
    from steering.applied import Steering


def offsets(
    model: Annotated[str, typer.Argument(help="Model name.")],
    data: Annotated[
        Path | None,
        typer.Argument(
            help="lofit: examples, JSONL with prompt, chosen and optionally rejected. iti: pairs or "
            "labelled prompts (JSONL, CSV). Default: the shipped twins, to be told apart or refused."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="lofit or iti.")] = "lofit",
    heads: Annotated[int, typer.Option(help="Number of heads.")] = 27,
    loss: Annotated[str, typer.Option(help="lofit: sft, or dpo (needs rejected answers).")] = "sft",
    lr: Annotated[float, typer.Option(help="lofit: learning rate of the offsets.")] = 2e-2,
    epochs: Annotated[int, typer.Option(help="lofit: rounds over the examples, each step.")] = 5,
    l1: Annotated[float, typer.Option(help="lofit: penalty that selects heads.")] = 5e-4,
    alpha: Annotated[float, typer.Option(help="iti: strength in standard deviations.")] = 5.0,
    topics: Annotated[int, typer.Option(help="Topics of the shipped data to learn from.")] = 96,
    tried: Annotated[int, typer.Option(help="Shipped test topics it is tried on; 0: none.")] = 20,
    random: Annotated[
        int, typer.Option(help="Random offsets of the same norms that it is compared with.")
    ] = 20,
    permutations: Annotated[int, typer.Option(help="iti: label shuffles of the null.")] = 200,
    out: Annotated[Path, typer.Option(help="Folder for offsets, figures and table.")] = Path(
        "offsets"
    ),
    seed: Annotated[int, typer.Option(help="Seed of starting numbers, order and folds.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Choose attention heads and give each an offset (LoFiT, ITI); save them, try them.

    \b
    alignlens offsets builtin:base
    alignlens offsets org/model examples.jsonl --loss dpo --heads 16
    alignlens offsets builtin:base --method iti --alpha 8
    """
    from probes import datasets, figures, files
    from probes.contrast import Contrast
    from probes.model import HookedModel
    from steering.applied import Steering
    from steering.iti import rank_heads
    from steering.lofit import lofit
    from steering.preferences import DPO, SFT
    from steering.refusal_task import read_examples, refusal_examples
    from steering.tuning import Training

    if method not in ("lofit", "iti"):
        raise ValueError(f"unknown method {method!r}: choose lofit or iti")
    if loss not in ("sft", "dpo"):
        raise ValueError(f"unknown loss {loss!r}: choose sft or dpo")
    if method == "iti" and alpha == 0:
        raise ValueError("alpha 0 changes nothing: give a strength in sigmas, for example 5")
    if tried < 0 or topics < 1 or random < 0:
        raise ValueError(
            f"--topics {topics} --tried {tried} --random {random}: give 1 or more topics, and 0 or "
            "more of the others"
        )
    if dry_run:
        work = f"{2 * epochs} rounds over" if method == "lofit" else "one reading of"
        given = f"the examples of {data}" if data else f"{2 * topics} shipped prompts"
        typer.echo(
            f"{work} {given}; {4 * tried} answers of 12 tokens and {(random + 2) * tried} first "
            f"tokens; about 40 tokens each; memory: the model, and the hidden states of the "
            f"examples once; disk: about 1 MB in {out}"
        )
        return
    contrast = None
    if method == "iti":
        read = datasets.safety("train").limited(topics, seed) if data is None else None
        found = datasets.read(data) if data is not None else read
        if not isinstance(found, Contrast):
            raise ValueError(f"{data} holds plain prompts: ITI needs pairs or labels")
        contrast = found
    examples = None if method == "iti" or data is None else read_examples(data)
    loaded = HookedModel.load(model, dtype=dtype)
    if contrast is not None:
        ranking = rank_heads(loaded, contrast, permutations=permutations, seed=seed)
        made = ranking.offsets(loaded, heads)
        applied, result = Steering(made, alpha, "sigma"), ranking
        figures.save(ranking.plot(), out / "heads", dataclasses.asdict(ranking.record))
        table = ranking.frame()
    else:
        examples = examples or refusal_examples(loaded, "train", topics, rejected=loss == "dpo")
        training = Training(DPO() if loss == "dpo" else SFT(), lr, epochs, seed=seed)
        fitted = lofit(
            loaded,
            examples,
            heads,
            selecting=dataclasses.replace(training, lr=min(lr, 5e-3)),
            training=training,
            l1=l1,
        )
        made, result = fitted.offsets, fitted.tuning.curve
        applied = Steering(made)
        figures.save(fitted.selection.plot(), out / "heads", dataclasses.asdict(result.record))
        figures.save(result.plot(), out / "training", dataclasses.asdict(result.record))
        table = fitted.selection.frame()
    result.save(out)
    made.save(out / "offsets.safetensors")
    files.write_text(out / "table.csv", table.to_csv(index=False))
    rates = _rates(loaded, applied, tried) if tried else {}
    change = _change(loaded, applied, tried, random, seed) if tried > 1 else {}
    files.write_json(out / "rates.json", {**rates, "log-odds": change})
    if as_json:
        typer.echo(json.dumps({"result": str(result), "rates": rates, "log-odds": change}))
        return
    typer.echo(str(result))
    for name, row in rates.items():
        typer.echo(
            f"{name:>8} refused: {row['before'][0]:.0%} before, {row['after'][0]:.0%} "
            f"[{row['after'][1]:.0%}, {row['after'][2]:.0%}] after, {row['n']} test prompts"
        )
    if change:
        null = change["null"]
        beside = f"; random offsets {min(null):.2f} to {max(null):.2f}" if null else ""
        value, low, high = change["change"]
        typer.echo(
            f"refusal log-odds of harmful prompts change by {value:.2f} [{low:.2f}, {high:.2f}] "
            f"nats{beside}"
        )
    typer.echo(f"{applied}: {out}")


def _rates(model: "HookedModel", applied: "Steering", topics: int) -> dict:
    """Refusal rates of shipped test twins, with Wilson limits, without and with the offsets."""
    from probes import datasets
    from probes.scores import wilson
    from steering.effects import refusals
    from steering.refusal_task import evenly

    rows = evenly(datasets.twins("test"), topics)
    found = {}
    for kind in ("harmful", "harmless"):
        prompts = [row[kind] for row in rows]
        rate = {
            name: wilson(int(refusals(model, what, prompts).sum()), len(prompts))
            for name, what in (("before", None), ("after", applied))
        }
        found[kind] = {name: list(interval) for name, interval in rate.items()}
        found[kind]["n"] = len(prompts)
    return found


def _change(
    model: "HookedModel", applied: "Steering", topics: int, random: int, seed: int
) -> dict[str, list[float]]:
    """Change of the refusal log-odds of harmful test prompts in nats, and that of random offsets."""
    from probes import datasets
    from steering.first_token import FirstToken
    from steering.intervals import change_interval
    from steering.judges import first_tokens, log_odds
    from steering.offsets import HeadOffsets
    from steering.refusal_task import evenly

    rows = evenly(datasets.twins("test"), topics)
    readout, tokens = FirstToken(model, [row["harmful"] for row in rows]), first_tokens(model)
    before = log_odds(readout([]), tokens)
    after = log_odds(readout(applied.edits(model)), tokens)
    found = change_interval(after[:, None], before, [row["topic"] for row in rows])
    assert isinstance(applied.what, HeadOffsets)
    null = []
    for other in applied.what.randomised(random, seed):
        moved = dataclasses.replace(applied, what=other).edits(model)
        null.append(float((log_odds(readout(moved), tokens) - before).mean()))
    return {"change": [float(limit[0]) for limit in found], "null": null}
