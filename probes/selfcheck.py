"""Does an engine tell the truth about this model? Checked once per model and engine, remembered.

Four questions: do its activations equal those of plain forward hooks on the same model; does an
edit change the logits; does an edit that changes nothing change nothing; are model, configuration
and tokenizer left as they were? A "no" is an error that names the layer, never a warning.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probes import files, plan
from probes.engines import Batch, Edit, Engine
from probes.engines.modes import eager_attention
from probes.layout import Layout
from probes.layout_trace import first_tensor
from probes.results import check_finite, versions
from probes.sites import Site
from probes.state import state_of

TOLERANCE = 1e-5
"""Largest allowed relative error of an activation vector in float32."""


@dataclass(frozen=True)
class Check:
    """What the check measured; NaN for a model that a server runs, where there is nothing to
    measure against."""

    engine: str
    dtype: str
    error: float
    """Largest ||a - b|| / ||b|| over sites and real tokens, against the plain model with the same
    attention implementation."""
    own_error: float
    """The same between the plain model's own eager and default attention."""
    cosine: float
    """Smallest cosine between the engine's vectors and the plain model's."""
    packs: bool
    """Whether prompts may share a row under a mask of their own and give the same values."""
    edit_effect: float
    """Largest change of a logit under an edit that doubles the middle layer's output."""


def check(
    model: nn.Module, engine: Engine, layout: Layout, tokenizer: Any, fingerprint: str
) -> Check:
    """Check the engine on this model, or read what an earlier check found."""
    key = hashlib.sha256(
        json.dumps([fingerprint, engine.name, versions(), _dtype(model), *_way(model)]).encode()
    ).hexdigest()[:32]
    path = files.cache_dir() / "checks" / f"{key}.json"
    if path.is_file():
        try:
            return Check(**json.loads(path.read_text()))
        except (TypeError, ValueError):
            path.unlink(missing_ok=True)
    before = _state(model, tokenizer)
    found = _run(model, engine, layout)
    if (after := _state(model, tokenizer)) != before:
        changed = [name for name in before if before[name] != after.get(name)]
        raise RuntimeError(
            f"the {engine.name} engine changed the caller's {', '.join(changed)}: this is a bug "
            "in alignlens or in the engine's library; use engine='transformers'"
        )
    files.write_json(path, asdict(found))
    return found


def _dtype(model: nn.Module) -> str:
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return str(kinds[0]).removeprefix("torch.") if kinds else "float32"


def _way(model: nn.Module) -> list[str]:
    """What decides how the model computes and is no part of its fingerprint."""
    devices = {p.device.type for p in model.parameters()}
    return [*sorted(devices), str(getattr(model.config, "_attn_implementation", ""))]


def _run(model: nn.Module, engine: Engine, layout: Layout) -> Check:
    n, vocab = 9, layout.vocab_size
    ids = (torch.arange(2 * n).view(2, n) * 7 + 5) % min(vocab, 180)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    batch = Batch(ids, mask)
    sites = [Site(layer, "resid_post") for layer in range(layout.n_layers)]
    sites += [Site(layer, "head_out") for layer in layout.supported("head_out")]
    mine = _read(engine, batch, sites)
    with eager_attention(model):
        eager = plain_reads(model, layout, batch, sites)
    default = plain_reads(model, layout, batch, sites)
    reference = eager if engine.name == "transformer_lens" else default
    real = mask.bool()
    for site, values in reference.items():
        check_finite(values[real], f"the model's own activation at {site}")
    error, where = compare(mine, reference, real)
    own, _ = compare(eager, default, real)
    own = 0.0 if math.isnan(own) else own  # eager attention of float64 gives NaN beside pads
    cosine = min(_cosine(mine[s][real], reference[s][real]) for s in mine)
    dtype = _dtype(model)
    allowed = TOLERANCE if dtype in ("float32", "float64") else max(1.5 * own, TOLERANCE)
    if not error <= allowed or (dtype in ("float16", "bfloat16") and not cosine >= 0.995):
        raise RuntimeError(
            f"the {engine.name} engine disagrees with the plain model at {where}: relative error "
            f"{error:.1e}, allowed {allowed:.1e} in {dtype}. Use engine='transformers', and report "
            "the architecture"
        )
    middle = Site(layout.n_layers // 2, "resid_post")
    plain = engine.logits(batch)
    with engine.edit([Edit(middle, lambda h, _: h + 0)]):
        same = engine.logits(batch)
    # a constant would be removed by a norm with a mean; alternating signs are not
    push = torch.ones(layout.d_model).index_fill(0, torch.arange(0, layout.d_model, 2), -1.0)
    size = mine[middle][real].float().norm(dim=-1).mean() / layout.d_model**0.5
    with engine.edit([Edit(middle, lambda h, _: h + (size * push).to(h))]):
        moved = engine.logits(batch)
    if not torch.equal(plain[real], same[real]):
        raise RuntimeError(f"an edit that changes nothing at {middle} changed the logits")
    effect = (moved - plain)[real].float().abs().max().item()
    if not effect > 0:
        raise RuntimeError(
            f"an edit at {middle} did not change the logits: the {engine.name} engine does not "
            "reach this model's computation"
        )
    packs = (
        layout.shares_prefix and engine.name == "transformers" and _packs(engine, layout, allowed)
    )
    return Check(engine.name, dtype, error, own, cosine, packs, effect)


def _packs(engine: Engine, layout: Layout, allowed: float) -> bool:
    """Two sequences with a common beginning in one row, against each alone."""
    a, b = [5, 17, 8, 11, 9], [5, 17, 23, 7]
    row = plan.Packed.make([a, b])
    sites = [Site(layer, "resid_post") for layer in range(layout.n_layers)]
    try:
        packed = engine.read(plan.batch_of([row], 0), sites)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # this architecture takes no mask of that form
    for ids, columns in ((a, row.columns[0]), (b, row.columns[1])):
        alone = engine.read(plan.batch_of([plan.Packed.make([ids])], 0), sites)
        picked = {site: h[:, list(columns)] for site, h in packed.items()}
        error, _ = compare(picked, alone, torch.ones(1, len(ids), dtype=torch.bool))
        if not error <= allowed:
            return False
    return True


def _read(engine: Engine, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
    from probes.sites import Unsupported

    try:
        return engine.read(batch, sites)
    except Unsupported:  # this engine lacks some heads; the streams are checked all the same
        return engine.read(batch, [s for s in sites if s.part == "resid_post"])


@torch.no_grad()
def plain_reads(
    model: nn.Module, layout: Layout, batch: Batch, sites: Sequence[Site]
) -> dict[Site, Tensor]:
    """Block outputs and head outputs by the shortest possible means: the independent reference."""
    import inspect

    seen: dict[Site, Tensor] = {}
    handles = []
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    batch = batch.to(device or "cpu")
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = batch.positions

    def keep(site: Site, value: Any) -> None:
        tensor = first_tensor(value)
        assert tensor is not None
        tensor = tensor.detach().clone().cpu()
        if site.part == "head_out":
            heads = layout.blocks[site.layer].heads["head_out"]
            tensor = tensor.reshape(*tensor.shape[:-1], heads, -1)
        seen[site] = tensor

    try:
        for site in sites:
            point = layout.point(site)
            module = model.get_submodule(point.path)
            if point.side == "output":

                def after(_module: nn.Module, _args: Any, output: Any, site: Site = site) -> None:
                    keep(site, output)

                handles.append(module.register_forward_hook(after))
            else:

                def before(_module: nn.Module, args: Any, site: Site = site) -> None:
                    keep(site, args)

                handles.append(module.register_forward_pre_hook(before))
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def compare(
    a: dict[Site, Tensor], b: dict[Site, Tensor], real: Tensor
) -> tuple[float, Site | None]:
    """Largest relative error of a vector at a real token over the sites of `a`, and its site."""
    worst, where = 0.0, None
    for site in a:
        x, y = a[site].cpu()[real].double(), b[site].cpu()[real].double()
        x, y = x.flatten(1), y.flatten(1)
        error = ((x - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=1e-12)).max().item()
        if math.isnan(error):  # compares as neither larger nor smaller
            return error, site
        if error > worst:
            worst, where = error, site
    return worst, where


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.cpu().flatten(1).double(), b.cpu().flatten(1).double()
    return nn.functional.cosine_similarity(a, b, dim=-1).min().item()


def _state(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """What must not change: parameter names, hooks, configuration, tokenizer settings."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    state = {
        "parameters": list(state_of(model)),
        "hooks": hooks,
        "configuration": str(getattr(model, "config", "")),
        "training mode": model.training,
    }
    if tokenizer is not None:
        names = ("padding_side", "pad_token", "eos_token", "bos_token", "chat_template")
        state["tokenizer"] = {name: getattr(tokenizer, name, None) for name in names}
    return state
