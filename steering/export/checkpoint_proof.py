"""The proof of a checkpoint: logits of its files, loaded by plain transformers, and of a live edit.

Everything is compared in float32. Half-precision weights are widened for it, which changes none of
their values, because rounding inside the forward pass alone moves logits more than many an edit.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from probes.engines import Batch, Edit
from probes.engines.hooks import HookEngine
from probes.model import HookedModel
from steering.copies import HALF
from steering.export.checkpoint_check import Loading, load
from steering.export.repackage import Form

TOLERANCE = 1e-4
"""Largest allowed difference of a logit in float32, for logits up to 10; beyond, in proportion."""

UNITS = 16
"""Units of the precision of half-precision weights by which rounding them may move a logit, as a
share of the largest."""


class Reference(NamedTuple):
    """Logits of a few arbitrary tokens, `[token, vocab]`, float64 on the CPU."""

    live: Tensor
    """Under the live edit."""
    plain: Tensor
    """Without it."""


def reference(model: HookedModel, edits: Sequence[Edit]) -> Reference:
    """What the checkpoint must give, and what it would give without the edits."""
    engine = model.engine
    if model.dtype in HALF:
        wide = copy.deepcopy(model.model)
        for tensor in (*wide.parameters(), *wide.buffers()):
            if tensor.dtype in HALF:
                tensor.data = tensor.data.float()
        engine = HookEngine(wide, model.layout)
    batch, found = _batch(model), []
    for these in (edits, ()):
        with engine.edit(these), torch.no_grad():
            found.append(engine.logits(batch).cpu()[batch.mask.bool()].double())
    return Reference(*found)


def prove(
    model: HookedModel, form: Form, folder: Path, expected: Reference, edited: bool
) -> tuple[Loading, float, float]:
    """Load the folder and compare: the loading report, the error and the effect of the edit.

    Error and effect are the largest absolute differences of a logit, between the folder and the
    live edit, and between the live edit and none. `RuntimeError` unless every weight is loaded
    bit for bit and the error is small, by itself and (if `edited`) beside the effect.
    """
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    try:
        reloaded, loading = load(folder, dtype)
    except (OSError, RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"the checkpoint of {model.name} cannot be loaded again, so none was written: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if not loading.clean or loading.architecture != form.architecture.__name__:
        raise RuntimeError(
            f"the checkpoint of {model.name}, a {form.architecture.__name__}, does not load as it "
            f"was written, so none was: {loading}"
        )
    held = reloaded.state_dict()
    for name, tensor in form.state.items():
        if not torch.equal(held[name].to(dtype), tensor.cpu().to(dtype)):
            raise RuntimeError(
                f"{name} of {model.name} is loaded with other values than were written, so no "
                "checkpoint was written: report the architecture"
            )
    batch = _batch(model).to(model.device)
    with torch.no_grad():
        out = reloaded.to(model.device)(input_ids=batch.ids, attention_mask=batch.mask)
    found = out.logits.cpu()[batch.mask.cpu().bool()].double()
    error, effect = _largest(found, expected.live), _largest(expected.live, expected.plain)
    _check(model, error, effect, float(expected.live.abs().max()), edited)
    return loading, error, effect


def _check(model: HookedModel, error: float, effect: float, largest: float, edited: bool) -> None:
    scale, half = max(10.0, largest), model.dtype in HALF
    allowed = scale * (UNITS * torch.finfo(model.dtype).eps if half else TOLERANCE / 10)
    if edited:  # an edit left undone is off by the whole effect, however small that is
        allowed = min(allowed, max(0.5 * effect, scale * TOLERANCE / 100))
    if error <= allowed:
        return
    hint = (
        f": rounding to {str(model.dtype).removeprefix('torch.')} may be more than the edit, so "
        "load the model with dtype='float32'"
        if half
        else ": report the architecture"
    )
    raise RuntimeError(
        f"the checkpoint of {model.name} loaded again is {error:.1e} off the live edit in a logit "
        f"(allowed {allowed:.0e}; the edit moves them by {effect:.2g}), so none was written{hint}"
    )


def _batch(model: HookedModel) -> Batch:
    """Two rows of arbitrary tokens, one padded on the right, where positions need no telling."""
    ids = (torch.arange(26).view(2, 13) * 7 + 5) % min(model.layout.vocab_size, 180)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return Batch(ids, mask)


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
