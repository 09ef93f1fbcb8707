"""The self-check catches an engine that lies, forgets or leaves something behind."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import ARCHITECTURES, build
from torch import Tensor

from probes import HookedModel, Site, selfcheck
from probes.engines import Batch, Edit, whole
from probes.engines.hooks import HookEngine
from probes.layout import resolve


class OffByOne(HookEngine):
    """Gives the stream that enters a block for the one that leaves it."""

    def read(self, batch: Batch, sites: Sequence[Site], *args: Any, **kwargs: Any) -> Any:
        wrong = {s: Site(s.layer, "resid_pre") if s.part == "resid_post" else s for s in sites}
        seen = super().read(batch, list(dict.fromkeys(wrong.values())), *args, **kwargs)
        return {site: seen[wrong[site]] for site in sites}


class SwappedHeads(HookEngine):
    def read(self, batch: Batch, sites: Sequence[Site], *args: Any, **kwargs: Any) -> Any:
        seen = super().read(batch, sites, *args, **kwargs)
        return {s: h.flip(2) if s == Site(1, "head_out") else h for s, h in seen.items()}


class SlightlyOff(HookEngine):
    def read(self, batch: Batch, sites: Sequence[Site], *args: Any, **kwargs: Any) -> Any:
        seen = super().read(batch, sites, *args, **kwargs)
        return {s: h * (1 + 1e-4) if s.layer == 2 else h for s, h in seen.items()}


class Nowhere(HookEngine):
    def read(self, batch: Batch, sites: Sequence[Site], *args: Any, **kwargs: Any) -> Any:
        seen = super().read(batch, sites, *args, **kwargs)
        return {s: h * float("nan") if s.layer == 1 else h for s, h in seen.items()}


class Deaf(HookEngine):
    """Takes edits and ignores them."""

    @contextmanager
    def edit(self, edits: Sequence[Edit]) -> Iterator[None]:
        yield


class Clumsy(HookEngine):
    """An edit that changes nothing changes the logits."""

    def logits(self, batch: Batch, *args: Any) -> Tensor:
        return super().logits(batch, *args) * (1.01 if self.edited else 1.0)


class Untidy(HookEngine):
    """Leaves a hook behind."""

    def read(self, batch: Batch, sites: Sequence[Site], *args: Any, **kwargs: Any) -> Any:
        self.model.get_submodule("model.layers.0").register_forward_hook(lambda *_: None)
        return super().read(batch, sites, *args, **kwargs)


class Meddling(HookEngine):
    def read(self, batch: Batch, sites: Sequence[Site], *args: Any, **kwargs: Any) -> Any:
        self.model.config.pad_token_id = 7
        return super().read(batch, sites, *args, **kwargs)


def check(kind: type[HookEngine], fingerprint: str = "f", tokenizer: Any = None) -> Any:
    model = build("llama")
    layout = resolve(model)
    return selfcheck.check(model, kind(model, layout), layout, tokenizer, fingerprint)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OffByOne, "engine disagrees with the plain model at"),
        (SwappedHeads, "disagrees with the plain model at 1.head_out: relative error"),
        (SlightlyOff, r"disagrees with the plain model at 2\.\w+: relative error 1.0e-04, allowed"),
        (Nowhere, r"disagrees with the plain model at 1\.\w+: relative error nan"),
        (Deaf, "an edit at 1.resid_post did not change the logits"),
        (Clumsy, "an edit that changes nothing at 1.resid_post changed the logits"),
        (Untidy, "changed the caller's hooks"),
        (Meddling, "changed the caller's configuration"),
    ],
)
def test_a_lie_is_an_error(kind: type[HookEngine], said: str, own_cache: Path) -> None:
    with pytest.raises(RuntimeError, match=said):
        check(kind)
    assert not list(own_cache.rglob("*.json"))  # and is not remembered as good
    assert check(HookEngine).error < 1e-6


def test_a_tokenizer_that_was_changed(own_cache: Path) -> None:
    tokenizer = tiny.tokenizer()

    class Padding(HookEngine):
        def read(self, *args: Any, **kwargs: Any) -> Any:
            tokenizer.padding_side = "left"
            return super().read(*args, **kwargs)

    with pytest.raises(RuntimeError, match="changed the caller's tokenizer"):
        check(Padding, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_reference_engine_passes(name: str, dtype: torch.dtype, own_cache: Path) -> None:
    model = build(name).to(dtype)
    layout = resolve(model)
    found = selfcheck.check(model, HookEngine(model, layout), layout, None, name)
    assert found.error == 0 or found.error < 1e-6
    assert found.edit_effect > 0
    assert found.dtype == str(dtype).removeprefix("torch.")
    if name in ("mamba", "jamba", "qwen3-next"):
        assert not found.packs


def test_it_is_remembered_by_model_engine_and_way(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    run = selfcheck._run
    monkeypatch.setattr(selfcheck, "_run", lambda *a: runs.append("run") or run(*a))
    first = check(HookEngine, "a")
    assert check(HookEngine, "a") == first
    assert len(runs) == 1
    check(HookEngine, "b")
    assert len(runs) == 2
    model = build("llama")
    model.set_attn_implementation("eager")
    layout = resolve(model)
    selfcheck.check(model, HookEngine(model, layout), layout, None, "a")
    assert len(runs) == 3
    saved = sorted(own_cache.glob("checks/*.json"))
    assert len(saved) == 3
    for path in saved:
        assert json.loads(path.read_text())["engine"] == "transformers"
        path.write_text("{")
    check(HookEngine, "a")
    assert len(runs) == 4


def test_a_broken_model_is_a_sentence_of_its_own(own_cache: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match="output of model.layers.1 on a few arbitrary tokens holds"
    ):
        HookedModel(model, tiny.tokenizer())


def test_packing_is_refused_where_it_is_wrong(own_cache: Path) -> None:
    class Blind(HookEngine):
        """Lets packed prompts see each other."""

        def read(
            self, batch: Batch, sites: Sequence[Site], keep: Callable = whole, **o: Any
        ) -> Any:
            return super().read(Batch(batch.ids, batch.mask), sites, keep, **o)

    assert not check(Blind, "blind").packs
    assert check(HookEngine, "seeing").packs


def test_the_measure() -> None:
    a, b = Site(0, "resid_post"), Site(1, "resid_post")
    x = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    real = torch.tensor([[True, False]])
    y = x.clone()
    y[0, 0, 0] += 0.05
    y[0, 1] = 100.0  # a pad
    error, where = selfcheck.compare({a: x, b: y}, {a: x, b: x}, real)
    assert error == pytest.approx(0.01)
    assert where == b
    nan = x * float("nan")
    error, where = selfcheck.compare({a: nan, b: y}, {a: x, b: x}, real)
    assert error != error
    assert where == a
