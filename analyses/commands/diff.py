"""`alignlens diff`"""

import json
from pathlib import Path
from typing import Annotated

import typer


def diff(
    first: Annotated[Path, typer.Argument(help="Folder of a report.")],
    second: Annotated[Path, typer.Argument(help="Folder of another report.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for table and figure. Default: only print.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print the numbers that did not move, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Tell which numbers of two reports moved beyond their intervals.

    \b
    alignlens diff report-monday report-friday
    alignlens diff a b --out difference --all
    """
    from analyses.differences import compare_reports
    from probes import figures, files

    found = compare_reports(first, second)
    table = found.frame()
    if out is not None:
        found.save(out)
        files.write_text(out / "table.csv", table.to_csv(index=False))
        figures.save(found.plot(), out / "differences")
    if as_json:
        rows = json.loads(str(table.to_json(orient="records")))
        typer.echo(json.dumps({"settings": found.settings, "table": rows}))
        return
    for name, was, now in found.settings:
        typer.echo(f"{name}: {was} -> {now}")
    shown = table if everything else table[table["moved"]]
    if len(shown):
        typer.echo(shown.drop(columns="moved").to_string(index=False, float_format="%.4g"))
    typer.echo(str(found) + (f": {out}" if out is not None else ""))
