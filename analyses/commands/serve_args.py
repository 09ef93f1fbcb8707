"""`alignlens serve-args`"""

from pathlib import Path
from typing import Annotated

import typer


def serve_args(
    exported: Annotated[Path, typer.Argument(help="Folder of an export.")],
    target: Annotated[
        str | None, typer.Option(help="llama.cpp or vllm. Default: what the export is for.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="What the server is given: a GGUF file, a folder, a Hub name."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the server.")] = 8000,
) -> None:
    """Print the command line that serves an export, with the reason of each unusual argument.

    \b
    alignlens serve-args shipped --model model.gguf
    alignlens serve-args shipped --target vllm
    """
    from steering.export.exports import read_export
    from steering.export.serve_args import serve_args as arguments

    typer.echo(str(arguments(read_export(exported), target, model, port)))
