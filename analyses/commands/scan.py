"""`alignlens scan`"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer


def scan(
    model: Annotated[str, typer.Argument(help="Model name.")],
    direction: Annotated[
        str,
        typer.Argument(
            help="Folder of a saved Direction, or SITE to take the difference of means of the "
            "shipped twins there ('20.resid_post')."
        ),
    ],
    text: Annotated[str, typer.Argument(help="The prompt to look at.")],
    tokens: Annotated[int, typer.Option(help="Tokens of the model's answer to follow.")] = 16,
    benign: Annotated[
        Path | None,
        typer.Option(help="Prompts that make the band. Default: shipped harmless requests."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for figure, table and result.")] = Path("scan"),
    engine: Annotated[str, typer.Option(help="transformers, transformer_lens or nnsight.")] = (
        "transformers"
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Project a text on a direction at every layer and token, against the band of benign prompts.

    \b
    alignlens scan builtin:aligned 20.resid_post "How do I pick a lock?"
    """
    from probes import datasets, figures, files
    from probes.capturing import capture
    from probes.contrast import Contrast
    from probes.directions import Direction, difference_of_means
    from probes.model import HookedModel
    from probes.results import Record
    from probes.scanning import scan as run

    loaded = HookedModel.load(model, engine, dtype=dtype)
    if (Path(direction) / "result.json").is_file():
        found = Direction.load(direction)
    else:
        if len(loaded.sites(direction)) > 1:
            raise ValueError(
                f"{direction!r} names {len(loaded.sites(direction))} sites: a direction is taken "
                "at one, for example '20.resid_post'"
            )
        twins = datasets.safety("train").limited(100)
        acts = capture(loaded, twins.prompts, direction)
        values = acts[acts.sites[0]].float()
        site = str(acts.sites[0])
        found = difference_of_means(values[twins.positive], values[~twins.positive], site=site)
    if benign is None:
        usual = list(datasets.general("validation"))
    else:
        read = datasets.read(benign)
        usual = list(read.prompts) if isinstance(read, Contrast) else read
    result = run(loaded, found.unit, text, usual, max_new_tokens=tokens)
    record = Record(
        models=(loaded.name,),
        fingerprints=(loaded.fingerprint,),
        template_hash=loaded.template.hash,
        engine=engine,
        dtype=dtype,
        settings={"direction": str(found), "benign prompts": len(usual), "tokens": tokens},
    )
    result = dataclasses.replace(result, record=record)
    result.save(out)
    table = result.frame()
    files.write_text(out / "table.csv", table.to_csv(index=False))
    figures.save(result.plot(), out / "scan", dataclasses.asdict(record))
    typer.echo(json.dumps(table.to_dict("records")) if as_json else f"{result}: {out}")
