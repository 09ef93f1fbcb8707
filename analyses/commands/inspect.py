"""`alignlens inspect`"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    file: Annotated[Path, typer.Argument(help="A steering file, an export, a model folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what is in a steering file: whose it is, which convention it follows, what is unknown.

    Nothing in the file is run. A model folder is loaded, to see whether all of it arrives.

    \b
    alignlens inspect happy.gguf
    alignlens inspect vector.safetensors
    """
    from steering.export.inspecting import inspect_file

    found = inspect_file(file)
    typer.echo(json.dumps(dataclasses.asdict(found)) if as_json else str(found))
