"""Measurements that are kept: known by their content, and the same bytes however often killed."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from swept import at, logit, several, small
from torch import Tensor

from probes import HookedModel, Site
from probes.prompts import Prompt
from steering import (
    Schedule,
    Steering,
    cells,
    effects,
)
from steering.cells import Cells, measure_key
from steering.effects import Measure
from steering.grid import Grid
from steering.plan import passes
from steering.sweep import SteeringSweep, sweep


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return tiny.hooked("llama")


def test_only_what_is_missing_is_run(llama: HookedModel, tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(model: HookedModel, what: Steering | None) -> Tensor:
        calls.append(str(what))
        return logit(model, what)

    counted.key = "counted"  # pyright: ignore[reportFunctionMemberAccess]
    grid, given = small(llama), {"logit": counted}
    # 1 unsteered, and 2 sites x 2 strengths x (1 + 3 nulls); strength 0 is the unsteered run
    assert passes(llama, grid, given, folder=tmp_path) == (17, 0)
    first = sweep(llama, grid, given, folder=tmp_path, progress=False)
    assert len(calls) == 17 and calls[0] == "None"
    assert passes(llama, grid, given, folder=tmp_path) == (17, 17)
    again = sweep(llama, grid, given, folder=tmp_path, progress=False)
    assert len(calls) == 17
    assert torch.equal(again.change, first.change) and torch.equal(again.null, first.null)
    memory = sweep(llama, grid, given, progress=False)
    assert torch.equal(memory.low, first.low)
    next((tmp_path / "cells").glob("*.json")).unlink()
    sweep(llama, grid, given, folder=tmp_path, progress=False)
    assert len(calls) == 17 + 17 + 1
    more = replace(grid, strengths=[0.0, 1.0, 2.0, 3.0])
    assert passes(llama, more, given, folder=tmp_path) == (25, 17)
    assert (
        passes(llama, replace(grid, schedule=Schedule("prompt")), given, folder=tmp_path).done == 1
    )
    assert passes(tiny.hooked("gpt2"), _of(tiny.hooked("gpt2")), given, folder=tmp_path).done == 0
    costly = passes(llama, grid, given, {"cost": counted}, folder=tmp_path)
    assert costly == (17 + 5, 17)
    assert passes(llama, grid, given, {"cost": counted}, null_costs=True).total == 34


def test_another_release_measures_anew(
    llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, given = small(llama), {"logit": logit}
    sweep(llama, grid, given, folder=tmp_path, progress=False)
    assert passes(llama, grid, given, folder=tmp_path) == (17, 17)
    other = {**cells.versions(), "torch": "0.1"}
    monkeypatch.setattr(cells, "_versions", lambda: other)
    assert passes(llama, grid, given, folder=tmp_path) == (17, 0)


@pytest.mark.parametrize("act", [sweep, passes])
def test_a_steered_model_is_not_swept(llama: HookedModel, act: Callable) -> None:
    edits = Steering(several(llama), 1.0).edits(llama)
    with llama.edit(edits), pytest.raises(ValueError, match="edits are in force on .*a sweep"):
        act(llama, small(llama), {"logit": logit})
    assert passes(llama, small(llama), {"logit": logit}).total == 17


def _of(model: HookedModel) -> Grid:
    v = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    return Grid({"v": at(Site(0, "resid_post"), v, model)}, [1.0])


def test_a_measure_is_known_by_its_content() -> None:
    def named(prompts: Sequence[Prompt]) -> Measure:
        return lambda model, what: torch.tensor([float(len(p)) for p in prompts])

    same, other = measure_key(named(["a"])), measure_key(named(["b"]))
    assert same == measure_key(named(["a"])) != other
    refused = partial(effects.refusals, prompts=["a"])
    assert measure_key(refused) == measure_key(partial(effects.refusals, prompts=["a"]))
    assert measure_key(refused) != measure_key(partial(effects.refusals, prompts=["a"], tokens=9))
    judge = partial(effects.refusals, prompts=["a"], judge=lambda p, a: [x > "m" for x in a])
    other_judge = partial(effects.refusals, prompts=["a"], judge=lambda p, a: [x < "m" for x in a])
    assert len({measure_key(m) for m in (refused, judge, other_judge)}) == 3
    opaque = object()
    with pytest.raises(ValueError, match="holds a object, whose content cannot be seen"):
        measure_key(lambda model, what: opaque)


def test_an_opaque_measure_needs_no_key_without_a_folder(
    llama: HookedModel, tmp_path: Path
) -> None:
    opaque = object()

    def mine(model: HookedModel, what: Steering | None) -> Tensor:
        assert opaque
        return logit(model, what)

    assert sweep(llama, small(llama), {"mine": mine}, progress=False).keys == ("",)
    with pytest.raises(ValueError, match="give that object a text attribute `key`"):
        sweep(llama, small(llama), {"mine": mine}, folder=tmp_path, progress=False)


def test_wrong_measures_and_settings_are_said(llama: HookedModel, tmp_path: Path) -> None:
    grid = small(llama)

    def run(measure: Callable[[HookedModel, Steering | None], Tensor]) -> SteeringSweep:
        return sweep(llama, grid, {"m": measure}, progress=False)

    with pytest.raises(ValueError, match="m of the unsteered model holds 1 values that are NaN"):
        run(lambda model, what: torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match=r"values of shape \(2, 1\)"):
        run(lambda model, what: torch.ones(2, 1))
    with pytest.raises(ValueError, match="m gave 2 values at v .* and 3 unsteered"):
        run(lambda model, what: torch.ones(3 if what is None else 2))
    with pytest.raises(ValueError, match="no effect was given"):
        sweep(llama, grid, {}, progress=False)
    with pytest.raises(ValueError, match="m is effect and cost"):
        sweep(llama, grid, {"m": logit}, {"m": logit}, progress=False)
    with pytest.raises(KeyError, match="no vector at 1.mlp_out"):
        sweep(llama, replace(grid, sites=["1.mlp_out"]), {"m": logit}, progress=False)
    sweep(llama, grid, {"m": logit}, folder=tmp_path, progress=False)
    path = next((tmp_path / "cells").glob("*.json"))
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="is damaged .* delete it and run again"):
        Cells(tmp_path).get(path.stem)


def stop_at_rename(number: int, tell: int) -> None:
    """In this process, stop for good at the number-th file: written, but without its name yet."""
    seen, rename = 0, Path.replace

    def stopping(self: Path, target: Path) -> Path:
        nonlocal seen
        seen += 1
        if seen == number:
            os.write(tell, b"x")
            time.sleep(600)
        return rename(self, target)

    Path.replace = stopping  # type: ignore[method-assign, assignment]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones and temporaries too."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_killed_in_the_middle_it_ends_in_the_same_bytes(llama: HookedModel, tmp_path: Path) -> None:
    def run(folder: Path) -> None:
        found = sweep(llama, small(llama), {"logit": logit}, folder=folder, progress=False)
        found.save(folder)

    run(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert sum("cells/" in name for name in expected) == 17
    for kill_at in (1, 6, 13):
        folder = tmp_path / f"killed-{kill_at}"
        hear, tell = os.pipe()
        child = os.fork()
        if not child:
            stop_at_rename(kill_at, tell)
            run(folder)
            os._exit(1)
        assert os.read(hear, 1) == b"x"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(hear), os.close(tell)
        left = contents(folder)
        assert sum(name.endswith(".tmp") for name in left) == 1
        assert len(left) == kill_at
        run(folder)
        assert contents(folder) == expected
