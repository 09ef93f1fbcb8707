"""`alignlens probe`"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, get_args

import typer


def probe(
    model: Annotated[str, typer.Argument(help="Model name.")],
    contrast: Annotated[
        Path | None,
        typer.Argument(help="Pairs or labelled prompts (JSONL, CSV). Default: the shipped twins."),
    ] = None,
    sites: Annotated[str, typer.Option(help="Sites, separated by spaces.")] = "all.resid_post",
    kind: Annotated[str, typer.Option(help="logistic, mean, whitened or ccs.")] = "logistic",
    positions: Annotated[str, typer.Option(help="Where prompts are read.")] = "last",
    topics: Annotated[int, typer.Option(help="At most this many topics.")] = 250,
    permutations: Annotated[int, typer.Option(help="Label shuffles of the null.")] = 200,
    out: Annotated[Path, typer.Option(help="Folder for figure, table and result.")] = Path("probe"),
    seed: Annotated[int, typer.Option(help="Seed of splits and shuffles.")] = 0,
    engine: Annotated[str, typer.Option(help="transformers, transformer_lens or nnsight.")] = (
        "transformers"
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Fit one probe per site, with intervals and a shuffled-label null on held-out topics.

    \b
    alignlens probe builtin:base
    alignlens probe org/model pairs.jsonl --sites "all.head_out" --kind mean
    """
    import torch

    from probes import datasets, figures, files
    from probes.capturing import capture
    from probes.contrast import Contrast
    from probes.model import HookedModel
    from probes.sweeps import Kind, sweep

    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind of probe {kind!r}: choose {', '.join(get_args(Kind))}")
    given = datasets.safety() if contrast is None else datasets.read(contrast)
    if not isinstance(given, Contrast):
        raise ValueError(f"{contrast} holds plain prompts: a probe needs pairs or labels")
    if contrast is None:  # its test topics were written apart and made nothing
        shipped = {part: datasets.safety(part) for part in datasets.SPLITS}
        share = min(1.0, 2 * topics / len(given))
        parts = {
            part: own.limited(max(1, round(share * len(own) / 2)), seed)
            for part, own in shipped.items()
        }
    else:
        parts = given.limited(topics, seed).split(seed=seed)
    everyone = [p for part in parts.values() for p in part.prompts]
    bounds = torch.tensor([0, *(len(part) for part in parts.values())]).cumsum(0).tolist()
    rows = {name: torch.arange(bounds[i], bounds[i + 1]) for i, name in enumerate(parts)}
    loaded = HookedModel.load(model, engine, dtype=dtype)
    acts = capture(loaded, everyone, sites.split(), positions)
    values: dict[str, torch.Tensor] = {}
    for site in acts.sites:
        tensor = acts[site].float()
        if tensor.dim() == 3:  # a part with heads: a probe for each
            values |= {f"{site}.{head}": tensor[:, head] for head in range(tensor.shape[1])}
        else:
            values[str(site)] = tensor
    result = sweep(
        values,
        torch.cat([part.positive for part in parts.values()]),
        [topic for part in parts.values() for topic in part.topics],
        train=rows["train"],
        test=rows["test"],
        validation=rows["validation"],
        kind=kind,  # pyright: ignore[reportArgumentType]
        permutations=permutations,
        seed=seed,
    )
    settings = {"kind": kind, "contrast": given.name, "permutations": permutations}
    result = dataclasses.replace(
        result, record=dataclasses.replace(acts.record, seeds=(seed,), settings=settings)
    )
    result.save(out)
    table = result.frame()
    files.write_text(out / "table.csv", table.to_csv(index=False))
    figures.save(result.plot(), out / "probe", dataclasses.asdict(result.record))
    typer.echo(json.dumps(table.to_dict("records")) if as_json else f"{result}: {out}")
