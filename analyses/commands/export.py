"""`alignlens export`"""

from pathlib import Path
from typing import Annotated

import typer


def export(
    vector: Annotated[
        Path | None,
        typer.Argument(help="A saved steering vector or head offsets; none to merge an adapter."),
    ] = None,
    *,
    to: Annotated[
        str,
        typer.Option(help="gguf, vllm-lens, easysteer, vllm-hook, lm-eval or checkpoint."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the export; must not exist.")],
    strength: Annotated[
        float, typer.Option(help="How strong, in the unit; it is multiplied in.")
    ] = 1.0,
    unit: Annotated[str, typer.Option(help="raw, unit, fraction or sigma.")] = "raw",
    site: Annotated[
        str | None, typer.Option(help="Only these of the vector's sites, e.g. '12.resid_post'.")
    ] = None,
    scope: Annotated[
        str, typer.Option(help="all, prompt or generated tokens; only EasySteer can be told.")
    ] = "all",
    model: Annotated[
        str | None, typer.Option(help="The model, for --to checkpoint. Default: the vector's own.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of a checkpoint: float32, bfloat16, float16 or auto.")
    ] = "auto",
    hub: Annotated[
        str | None, typer.Option(help="Upload it to the Hub too, as org/name (private).")
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="With --hub: folder of a sweep, for effect and null.")
    ] = None,
) -> None:
    """Write steering for a program that serves it.

    What a program cannot hold exactly is refused, with the target that can. Beside the files stands
    what they were made from, so that `alignlens verify` can prove them.

    \b
    gguf         llama.cpp control vector; repeng and EasySteer read it too
    vllm-lens    JSON for requests to vLLM with vllm-lens
    easysteer    GGUF and request of EasySteer
    vllm-hook    JSON and tensor file of vLLM-Hook
    lm-eval      file for the `steered` model of lm-evaluation-harness
    checkpoint   model folder with the edit in its weights, for any program

    \b
    alignlens export steer/vector.safetensors --to gguf --out shipped
    alignlens export steer/vector.safetensors --to vllm-lens --strength 2 --unit sigma --out shipped
    alignlens export offsets/offsets.safetensors --to checkpoint --out model-steered
    alignlens export --to checkpoint --model org/model+org/adapter --out merged
    """
    from steering.export import exports
    from steering.export.exports import load_artefact
    from steering.offsets import HeadOffsets

    if sweep is not None and hub is None:
        raise ValueError("--sweep goes with --hub: its numbers are for the card")
    from steering.sweep_result import SteeringSweep

    if vector is None:
        if to != "checkpoint" or model is None:
            raise ValueError(
                "give a vector; without one a model is merged and written: --to checkpoint --model "
                "MODEL+ADAPTER"
            )
        from probes.model import HookedModel
        from steering.export.checkpoint import bake

        typer.echo(str(bake(HookedModel.load(model, dtype=dtype), None, out)))
        return
    measured = None if sweep is None else SteeringSweep.load(sweep)
    what = load_artefact(vector)
    if site is not None:
        if isinstance(what, HeadOffsets):
            raise ValueError("--site chooses sites of a vector, and these are head offsets")
        what = what.at(site.split())
    loaded = None
    if to == "checkpoint":
        from probes.model import HookedModel

        loaded = HookedModel.load(model or what.origin.model, dtype=dtype)
    elif model is not None:
        raise ValueError(f"--model is for --to checkpoint; {to} needs the vector only")
    done = exports.export(what, to, out, strength=strength, unit=unit, scope=scope, model=loaded)
    typer.echo(f"{what} at strength {strength:g}{'' if unit == 'raw' else ' ' + unit}")
    typer.echo(f"written for {to}: {done.path}")
    if to == "checkpoint" or getattr(what, "operation", "add") == "add":
        typer.echo(f"prove it: alignlens verify {out}")
    if hub is not None:
        from steering.export.hub import push

        typer.echo(f"uploaded: {push(out, hub, sweep=measured)}")
