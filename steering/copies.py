"""A copy of a model whose weights are edited, and the proof that the edit is the one meant.

The proof compares logits: of the copy, and of the same edit made live on the model before. In half
precision rounding alone moves logits more than many an edit does, so there the copy is widened to
float32 while it is edited and compared, and rounded back at the end.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probes.engines import Batch, Edit, Engine
from probes.engines.hooks import HookEngine
from probes.model import HookedModel
from steering.writers import check_plain

TOLERANCE = 1e-4
"""Largest allowed relative difference of a token's logits in float32."""

ROUNDING = 1e-5
"""Relative difference of logits that says nothing in float32: an edit of no more effect cannot be
told from none."""

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Agreement:
    """How far an edited copy is from the live edit: ||a - b|| / ||b|| of a token's logits."""

    error: float
    """Largest over the tokens tried, copy against live edit."""
    allowed: float
    effect: float
    """The same of the live edit against no edit: what the error is small beside."""

    @property
    def holds(self) -> bool:
        """Small by itself and beside the effect: a copy left unedited is off by the whole effect,
        however small that is."""
        return self.error <= min(self.allowed, max(0.5 * self.effect, ROUNDING))

    def __str__(self) -> str:
        return (
            f"edited weights differ from the live edit by {self.error:.1e} of the logits' norm "
            f"(allowed {self.allowed:.0e}, and half of what the edit does); the edit itself moves "
            f"them by {self.effect:.2g}"
        )


def agreement(model: HookedModel, edits: Sequence[Edit], edited: HookedModel) -> Agreement:
    """Compare `edited` without hooks with `model` under live edits, on a few arbitrary tokens.

    In bfloat16 and float16, where rounding the weights alone moves logits, 16 units of the
    dtype's precision are allowed; an edit of little effect can then fail by rounding alone.
    """
    allowed = 16 * torch.finfo(model.dtype).eps if model.dtype in HALF else TOLERANCE
    live, plain = _logits(model.engine, edits), _logits(model.engine, ())
    found = _logits(edited.engine, ())
    return Agreement(_distance(found, live), allowed, _distance(live, plain))


class EditedCopy:
    """A copy to be edited in place (`model`), float32 meanwhile, and what it must then give."""

    def __init__(self, of: HookedModel, live: Sequence[Edit]) -> None:
        check_plain(of.model)
        self.of = of
        self.model: Any = copy.deepcopy(of.model)
        self._dtypes = _widen(self.model)
        # sites are names, so edits made for the model act on its twin as well
        engine = HookEngine(self.model, of.layout) if self._dtypes else of.engine
        self._live, self._plain = _logits(engine, live), _logits(engine, ())

    def checked(self, how: str) -> HookedModel:
        """The copy as a model of the same engine and template, if it does what the live edit did."""
        if self._dtypes:
            self._check(HookEngine(self.model, self.of.layout))
            _narrow(self.model, self._dtypes)
        of = self.of
        template = of.template if of.tokenizer is not None else None
        edited = HookedModel(
            self.model,
            of.tokenizer,
            engine=of.engine.name,
            template=None if template is None else template.source,
            template_arguments=None if template is None else template.arguments,
            name=f"{of.name} ({how})",
        )
        edited.label = f"{of.label} ({how})"
        if not self._dtypes:
            self._check(edited.engine)
        return edited

    def _check(self, engine: Engine) -> None:
        error = _distance(_logits(engine, ()), self._live)
        found = Agreement(error, TOLERANCE, _distance(self._live, self._plain))
        if not found.holds:
            raise RuntimeError(
                f"{type(self.model).__name__} after the edit: {found}. Its weights reach the "
                "stream in a way that is not known here: steer it live, and report the architecture"
            )


def _widen(model: nn.Module) -> dict[tuple[str, str], torch.dtype]:
    """Make weights and buffers of half precision float32, one by one; gives what each was."""
    before = {
        (path, name): tensor.dtype
        for path, module in model.named_modules()
        for name, tensor in _own(module)
        if tensor.dtype in HALF
    }
    for path, name in before:
        _cast(model.get_submodule(path), name, torch.float32)
    return before


def _narrow(model: nn.Module, dtypes: dict[tuple[str, str], torch.dtype]) -> None:
    """Undo `_widen`. A whole-model `.to` would round what was float32 before, rotary frequencies."""
    for path, module in model.named_modules():
        for name, _ in list(_own(module)):
            # a bias made by the edit is not known: it follows its weight
            dtype = dtypes.get((path, name)) or (
                dtypes.get((path, "weight")) if name == "bias" else None
            )
            if dtype is not None:
                _cast(module, name, dtype)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    held = {**module._parameters, **module._buffers}
    return [(name, tensor) for name, tensor in held.items() if tensor is not None]


def _cast(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    tensor = getattr(module, name)
    tensor.data = tensor.data.to(dtype)  # the same object, so that tied weights stay tied


def _logits(engine: Engine, edits: Sequence[Edit]) -> Tensor:
    """Logits of a few arbitrary tokens, one row padded, under edits."""
    ids = (torch.arange(26).view(2, 13) * 7 + 5) % min(engine.layout.vocab_size, 180)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with engine.edit(edits):
        return engine.logits(Batch(ids, mask)).cpu()[mask.bool()].double()


def _distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)).max())
