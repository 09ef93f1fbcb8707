"""`alignlens verify`"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def verify(
    exported: Annotated[
        Path,
        typer.Argument(help="Folder of an export; or a file, together with --vector and --to."),
    ],
    model: Annotated[
        str | None, typer.Option(help="The unsteered model. Default: the vector's own.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="The program: llama.cpp, llama-server, vllm, vllm-server, transformers, "
            "transformers-serve, or format, which runs nothing. Default: the first that is here."
        ),
    ] = None,
    vector: Annotated[
        Path | None, typer.Option(help="What was meant, for a file that stands alone.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="With --vector: what the file is for, as in export --to.")
    ] = None,
    strength: Annotated[float, typer.Option(help="With --vector: the strength meant.")] = 1.0,
    unit: Annotated[str, typer.Option(help="With --vector: its unit.")] = "raw",
    scope: Annotated[str, typer.Option(help="With --vector: the tokens meant.")] = "all",
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts to replay. Default: shipped requests.")
    ] = None,
    n: Annotated[int, typer.Option(help="How many prompts.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer; 2 at least.")] = 4,
    gguf_model: Annotated[
        Path | None, typer.Option(help="A GGUF of the model. Default: a float32 one is made.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="The llama-server program, or a vLLM server's address.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the verdict. Default: EXPORT-verdict.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Prove an export on the program that serves it.

    Prompts are answered by the real program with and without the export, and by our own model under
    the edit that was meant; their distributions are compared. The verdict is one of: applied and
    equal; applied but different (with the fault that explains it); NOT APPLIED; another model;
    cannot tell; or, where the program is not here, format checked, not run. The exit code is 0 for
    the first and for a checked format, else 1. A float32 copy of the model that a program needs
    (four bytes a parameter) is kept in the cache folder.

    \b
    alignlens verify shipped
    alignlens verify shipped --target llama-server
    alignlens verify vector.gguf --vector vector.safetensors --to gguf --strength 2
    """
    from probes import datasets
    from probes.contrast import Contrast
    from probes.model import HookedModel
    from steering.applied import Steering
    from steering.export.exports import as_baked, load_artefact, read_export
    from steering.export.proving import ids_of, prompts_for, prove
    from steering.export.verdict import Verdict
    from steering.export.verdict_page import write_verdict
    from steering.schedule import Schedule

    if tokens < 2:
        raise ValueError(
            f"--tokens is {tokens}: give 2 at least, or prompt and generated tokens are one"
        )
    if n < 1:
        raise ValueError(f"--n is {n}: give one prompt at least")
    if (vector is None) != (to is None):
        raise ValueError("--vector and --to go together: what was meant, and what the file is for")
    if vector is not None and to is not None:
        schedule = Schedule(scope)  # pyright: ignore[reportArgumentType]
        steering = Steering(load_artefact(vector), strength, unit, schedule)
        path, kind = exported, to
    else:
        said = read_export(exported)
        steering, path, kind = said.steering, said.path, said.target
    whole = exported.resolve()
    folder = out or whole.with_name(f"{whole.name}-verdict")
    if (folder / "result.json").is_file():
        Verdict.load(folder)  # one of another kind is not written over
    loaded = HookedModel.load(model or steering.what.origin.model, device="cpu")
    if kind == "checkpoint":
        steering = dataclasses.replace(steering, what=as_baked(steering.what, loaded))
    ids = None
    if prompts is not None:
        read = datasets.read(prompts)
        asked = list(read.prompts) if isinstance(read, Contrast) else read
        if not asked[:n]:
            raise ValueError(f"{prompts} and -n {n} leave no prompt to replay: give at least one")
        ids = ids_of(loaded, asked[:n])
    found = prove(
        loaded, steering, path, kind, target,
        prompts=prompts_for(loaded, n) if ids is None else ids, n_tokens=tokens, gguf_model=gguf_model, server=server,
    )  # fmt: skip
    command = shlex.join(["alignlens", *sys.argv[1:]])
    found = dataclasses.replace(found, record=dataclasses.replace(found.record, command=command))
    page = write_verdict(found, folder)
    if as_json:
        typer.echo(json.dumps({"outcome": found.outcome, "said": str(found), "page": str(page)}))
    else:
        typer.echo(str(found))
        for note in found.notes:
            typer.echo(f"  {note}")
        typer.echo(f"verdict: {page}")
    if found.outcome not in ("equal", "format checked"):
        raise typer.Exit(1)
