"""`alignlens capture`"""

import json
from pathlib import Path
from typing import Annotated

import typer


def capture(
    model: Annotated[str, typer.Argument(help="Model name (alignlens models lists the forms).")],
    prompts: Annotated[Path, typer.Argument(help="JSONL, CSV or text file.")],
    out: Annotated[Path, typer.Option(help="Store to fill or to go on with.")] = Path(
        "activations"
    ),
    sites: Annotated[
        str, typer.Option(help="Sites, separated by spaces: '8-20.resid_post 7.head_out.3'.")
    ] = "all.resid_post",
    positions: Annotated[
        str, typer.Option(help="last, all, content, instruction_end, after:TEXT, mean:content ...")
    ] = "last",
    batch_size: Annotated[int, typer.Option(help="Prompts per batch.")] = 32,
    engine: Annotated[
        str, typer.Option(help="transformers, transformer_lens, nnsight or vllm.")
    ] = "transformers",
    server: Annotated[
        str | None,
        typer.Option(help="With --engine vllm: address of a running server with vllm-lens."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    template: Annotated[
        str | None, typer.Option(help="'none' to use prompts as they are; default: the model's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say tokens, disk and memory, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Read activations of prompts into a store; run it again after a crash to go on.

    \b
    alignlens capture builtin:aligned prompts.txt --sites "10-20.resid_post" --out acts
    alignlens capture org/model corpus.jsonl --engine vllm --server http://127.0.0.1:8000
    """
    from probes import datasets
    from probes import plan as plans
    from probes.capturing import capture as run
    from probes.contrast import Contrast
    from probes.model import HookedModel

    given = datasets.read(prompts)
    texts = list(given.prompts) if isinstance(given, Contrast) else given
    if engine == "vllm":
        dtype = "auto"  # the server's own
    loaded = HookedModel.load(model, engine, dtype=dtype, template=template, server=server)
    if dry_run:
        from probes import positions as places

        rendered = loaded.template.render_all(texts)
        found = loaded.sites(sites.split())
        prefix = plans.common_prefix(rendered) if loaded.layout.shares_prefix else 0
        total = sum(len(r.ids) for r in rendered)
        where = places.parse(positions)
        vectors = sum(1 if where.mean else len(where.indices(r)) for r in rendered)
        size = sum(loaded.layout.width(s) * _heads(loaded, s) for s in found) * vectors
        typer.echo(
            f"{len(texts)} prompts, {total:,} tokens, {total - prefix * (len(texts) - 1):,} after "
            f"sharing {prefix} common ones; {vectors:,} vectors at {len(found)} sites, "
            f"{size * loaded.dtype.itemsize / 2**20:.1f} MiB on disk; the model holds "
            f"{sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 2**20:.0f} MiB"
        )
        return
    acts = run(loaded, texts, sites.split(), positions, store=out, batch_size=batch_size)
    done = {
        "store": str(out),
        "prompts": len(acts),
        "sites": [str(site) for site in acts.sites],
        "positions": acts.positions,
        "notes": list(acts.notes),
    }
    for note in acts.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(json.dumps(done) if as_json else f"{acts}: {out}")


def _heads(model, site) -> int:
    if site.head is not None:
        return 1
    return model.layout.blocks[site.layer].heads.get(site.part, 1)
