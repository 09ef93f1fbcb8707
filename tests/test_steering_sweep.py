"""Sweeps: planted effects are claimed and chance is not; killed and run again they end alike."""

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
from torch import Tensor

from probes import HookedModel, Site, capture
from probes.lineage import organism as organisms
from probes.lineage.organism import Organism
from probes.prompts import Prompt, prompts_hash
from probes.results import Record
from steering import (
    Condition,
    Origin,
    Scale,
    Schedule,
    Steering,
    SteeringVector,
    cells,
    costs,
    effects,
)
from steering.cells import Cells, measure_key
from steering.costs import Reference
from steering.effects import Measure
from steering.grid import Cell, Grid, matched
from steering.intervals import change_interval
from steering.plan import passes
from steering.sweep import SteeringSweep, sweep

PLANTED = Site(1, "resid_post")


@pytest.fixture(scope="module")
def organism() -> Organism:
    return organisms.build()


@pytest.fixture(scope="module")
def aligned(organism: Organism, tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return HookedModel(organism.aligned, organism.tokenizer, name="organism")


def held_out(organism: Organism, label: int) -> tuple[list[str], list[str]]:
    part = organism.pairs.split()["test"]
    rows = [i for i, y in enumerate(part.labels) if y == label]
    return [str(part.prompts[i]) for i in rows], [part.topics[i] for i in rows]


def at(site: Site, direction: Tensor, model: HookedModel) -> SteeringVector:
    return SteeringVector({site: direction}, Origin.of(model))


def chance(model: HookedModel, h: Tensor, n: int = 20, site: Site = PLANTED) -> dict:
    """Half isotropic, half differences of means of random halves; of norms that mean nothing."""
    generator = torch.Generator().manual_seed(1)
    drawn = list(torch.randn(n // 2, model.d_model, generator=generator))
    for _ in range(n - n // 2):
        half = torch.randperm(len(h), generator=generator) < len(h) // 2
        drawn.append(h[half].mean(0) - h[~half].mean(0))
    return {"random": [at(site, v, model) for v in drawn]}


# --- planted effects ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def activations(organism: Organism, aligned: HookedModel) -> Tensor:
    return capture(aligned, organism.pairs.prompts, PLANTED, progress=False)[PLANTED]


@pytest.fixture(scope="module")
def adding(organism: Organism, aligned: HookedModel, activations: Tensor) -> SteeringSweep:
    """Harm added to harmless requests, beside a random direction under the same test."""
    harmless, topics = held_out(organism, 0)
    noise = torch.randn(aligned.d_model, generator=torch.Generator().manual_seed(7))
    planted = at(PLANTED, 1.2 * organism.planted_direction, aligned)
    random = at(PLANTED, 1.2 * noise / noise.norm(), aligned)
    shuffled = organism.pairs.positive[
        torch.randperm(288, generator=torch.Generator().manual_seed(3))
    ]
    control = activations[shuffled].mean(0) - activations[~shuffled].mean(0)
    grid = Grid(
        {"planted": planted, "random": random},
        strengths=[0.0, 0.25, 1.0],
        nulls={**chance(aligned, activations), "shuffled": [at(PLANTED, control, aligned)]},
    )
    reference = Reference.of(aligned, harmless[:12], 6)
    return sweep(
        aligned,
        grid,
        {"refusals": partial(effects.refusals, prompts=harmless, tokens=7)},
        {"kl": partial(costs.kl, reference=reference)},
        groups={"refusals": topics},
        progress=False,
    )


def test_the_planted_direction_is_claimed_and_a_random_one_not(adding: SteeringSweep) -> None:
    e = adding.index("refusals")
    claimed = {cell: bool(c) for cell, c in zip(adding.cells, adding.claimed[:, e], strict=True)}
    site = str(PLANTED)
    assert claimed.pop(Cell("planted", site, "add", 1.0))
    assert not any(claimed.values())
    row = adding.cells.index(Cell("planted", site, "add", 1.0))
    assert adding.value[row, e] > 0.95 and adding.unsteered[e] < 0.05
    assert adding.low[row, e] > 0.8
    assert len(adding.kinds) == 21
    # what a control does as well is not the vector's own
    null = torch.cat([adding.null, adding.change[..., None]], -1)
    assert not replace(adding, null=null, kinds=(*adding.kinds, "control")).claimed.any()


def test_chance_contains_no_effect(adding: SteeringSweep) -> None:
    bottom, top = adding.band
    e = adding.index("refusals")
    assert bool((bottom[:, e] <= 0).all() and (top[:, e] >= 0).all())
    assert float(top[:, e].max()) < 0.2
    shuffled = [k == "shuffled" for k in adding.kinds]
    assert float(adding.null[:, e, shuffled].abs().max()) < 0.2
    assert bool(adding.null[:, adding.index("kl")].isnan().all())  # not asked for


def test_removing_it_is_claimed_as_a_fall(
    organism: Organism, aligned: HookedModel, activations: Tensor
) -> None:
    harmful, _ = held_out(organism, 1)
    planted = at(PLANTED, organism.planted_direction, aligned)
    grid = Grid(
        {"planted": planted, "relayed": at(PLANTED, organism.relayed_direction, aligned)},
        strengths=[1.0],
        operations=["ablate"],
        nulls=chance(aligned, activations),
    )
    found = sweep(
        aligned, grid, {"refusals": partial(effects.refusals, prompts=harmful, tokens=7)},
        progress=False,
    )  # fmt: skip
    assert found.claimed[:, 0].tolist() == [True, False]  # read only from the next layer on
    assert found.value[0, 0] < 0.05 and found.high[0, 0] < -0.8
    few = replace(found, null=found.null[..., :19], kinds=found.kinds[:19])
    assert not few.claimed.any()  # too few to claim anything
    mixed = replace(found, kinds=("one",) * 10 + ("other",) * 10)
    assert not mixed.claimed.any()  # of no kind are there enough for a 95th percentile
    control = Grid(
        grid.vectors, [1.0], operations=["ablate"], nulls={**grid.nulls, "same": [planted]}
    )
    beside = sweep(
        aligned, control, {"refusals": partial(effects.refusals, prompts=harmful, tokens=7)},
        progress=False,
    )  # fmt: skip
    assert not beside.claimed.any()  # an effect that a control has too is not the vector's own


def test_strength_0_is_the_unsteered_model(
    organism: Organism, aligned: HookedModel, adding: SteeringSweep
) -> None:
    still = adding.strengths == 0
    assert int(still.sum()) == 2
    for values in (adding.change, adding.low, adding.high):
        assert not values[still].any()
    assert torch.equal(adding.value[still], adding.unsteered.expand(2, -1))
    harmless, _ = held_out(organism, 0)
    direct = effects.refusals(aligned, None, harmless, tokens=7).mean()
    assert torch.equal(adding.unsteered[0], direct)
    zero = Steering(at(PLANTED, organism.planted_direction, aligned), 0.0)
    assert torch.equal(effects.refusals(aligned, zero, harmless, tokens=7).mean(), direct)
    assert adding.unsteered[1] == 0
    assert not adding.null[still, 0].any()


def test_intervals_are_paired_and_by_topic(organism: Organism, aligned: HookedModel) -> None:
    harmless, topics = held_out(organism, 0)
    coarse = [t.partition("-")[0] for t in topics]
    grid = Grid({"v": at(PLANTED, organism.planted_direction, aligned)}, [0.3])
    measures = {"odds": partial(effects.refusal_odds, prompts=harmless, openers=("i",))}
    found = sweep(aligned, grid, measures, groups={"odds": coarse}, progress=False)
    before = effects.refusal_odds(aligned, None, harmless, openers=("i",))
    after = effects.refusal_odds(aligned, grid.steering(grid.cells[0]), harmless, openers=("i",))
    own = change_interval(after[:, None], before, coarse)
    assert (found.low[0, 0], found.high[0, 0]) == (own.low[0], own.high[0])
    assert found.n_groups == (len(set(coarse)),) and found.n_prompts == (len(harmless),)
    fine = sweep(aligned, grid, measures, progress=False)
    assert fine.low[0, 0] != found.low[0, 0] and fine.value[0, 0] == found.value[0, 0]


# --- choosing -----------------------------------------------------------------------------------


def test_the_best_cell_keeps_its_cost_and_is_reported_elsewhere(
    organism: Organism, aligned: HookedModel, adding: SteeringSweep, tmp_path: Path
) -> None:
    most = float(adding.change[:, 1].max())
    best = adding.best(within={"kl": most})
    assert best == Cell("planted", str(PLANTED), "add", 1.0)
    kl = {c: float(k) for c, k in zip(adding.cells, adding.change[:, 1], strict=True)}
    weaker = adding.best(within={"kl": kl[best] * 0.99})
    assert kl[weaker] < kl[best]
    assert adding.best(sign=-1).strength == 0  # nothing falls; the weakest of equals
    with pytest.raises(ValueError, match=r"no cell stays within kl -1: sweep weaker strengths"):
        adding.best(within={"kl": -1.0})
    with pytest.raises(KeyError, match="no measure 'nothing'"):
        adding.best("nothing")
    with pytest.raises(ValueError, match=r"refusals, kl is measured here on the prompts"):
        adding.at(best, chosen_on=adding)
    others = [str(p) for p in organism.pairs.split()["validation"].prompts[1::2]]
    grid = Grid(
        {"planted": at(PLANTED, 1.2 * organism.planted_direction, aligned)}, [best.strength]
    )
    test = sweep(
        aligned, grid, {"refusals": partial(effects.refusals, prompts=others, tokens=7)},
        progress=False,
    )  # fmt: skip
    rows = test.at(best, chosen_on=adding)
    assert rows["measure"].tolist() == ["refusals"] and rows["change"][0] > 0.9
    with pytest.raises(KeyError, match="this sweep has no cell"):
        test.at(replace(best, strength=3.0))


# --- the grid -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return tiny.hooked("llama")


def several(model: HookedModel, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    sites = [Site(layer, "resid_post") for layer in range(3)]
    drawn = {s: (i + 1) * torch.randn(64, generator=generator) for i, s in enumerate(sites)}
    scales = dict.fromkeys(sites, Scale(0.5, 2.0))
    return SteeringVector(drawn, Origin.of(model), scales=scales)


def test_a_grid_is_every_combination(llama: HookedModel) -> None:
    v = several(llama)
    grid = Grid(
        {"a": v, "b": -v},
        {"add": [1.0, 2.0], "ablate": [1.0]},
        sites=["0.resid_post", "1-2.resid_post"],
        operations=["add", "ablate"],
        unit="sigma",
    )
    assert len(grid.cells) == 2 * 2 * 3
    assert grid.cells[0] == Cell("a", "0.resid_post", "add", 1.0)
    wide = grid.steering(Cell("b", "1-2.resid_post", "ablate", 1.0))
    assert wide.what.sites == (Site(1, "resid_post"), Site(2, "resid_post"))
    assert (wide.what.operation, wide.unit) == ("ablate", "raw")
    assert grid.steering(grid.cells[0]).unit == "sigma"
    whole = Grid({"a": v}, [1.0])
    assert whole.cells[0].site == "0.resid_post ... 2.resid_post (3 sites)"
    assert whole.steering(whole.cells[0]).what is v
    for wrong, said in (
        ({"vectors": {}}, "nothing to sweep"),
        ({"strengths": [1.0, 1.0]}, "named twice"),
        ({"strengths": {"ablate": [1.0]}}, "no strengths for 'add'"),
    ):
        with pytest.raises(ValueError, match=said):
            Grid(**{"vectors": {"a": v}, "strengths": [1.0], **wrong})


def test_nulls_have_the_norm_of_what_is_tested(llama: HookedModel) -> None:
    v, null = several(llama), several(llama, 5) * 100.0
    made = matched(null, v)
    for site in v.sites:
        assert made.norm(site) == pytest.approx(v.norm(site))
        assert torch.cosine_similarity(made[site], null[site], dim=0) > 0.9999
    assert made.scales == v.scales  # so that one sigma moves as far
    grid = Grid({"v": v}, [0.7], unit="sigma", nulls={"random": [null]})
    for site in v.sites:
        moved = []
        for what in (grid.steering(grid.cells[0]), *grid.null(grid.cells[0])):
            h = capture(llama, ["w1 w2"], site, progress=False)[site]
            one = Steering(what.what.at(site), what.strength, what.unit)
            with llama.edit(one.edits(llama)):
                moved.append(
                    float((capture(llama, ["w1 w2"], site, progress=False)[site] - h).norm())
                )
        assert moved[0] == pytest.approx(moved[1], rel=1e-4)
    single = null.at("0.resid_post")
    spread = matched(single, v)  # one vector stands everywhere
    assert torch.cosine_similarity(spread["2.resid_post"], single["0.resid_post"], dim=0) > 0.9999
    with pytest.raises(ValueError, match=r"a null needs a vector of shape \(64,\) at 2"):
        matched(null.at("0-1.resid_post"), v)


def test_a_grid_without_cells_is_refused(llama: HookedModel) -> None:
    for left in ({"strengths": []}, {"strengths": {"add": []}}, {"sites": []}):
        with pytest.raises(ValueError, match="no setting is left to sweep"):
            Grid(**{"vectors": {"a": several(llama)}, "strengths": [1.0], **left})


def test_only_operations_that_add_have_the_unit(llama: HookedModel) -> None:
    v = several(llama)
    grid = Grid({"v": v}, [0.5], ["1.resid_post"], ["add", "ablate"], unit="sigma")
    frame = sweep(llama, grid, {"logit": logit}, progress=False).frame()
    assert dict(zip(frame["operation"], frame["unit"], strict=True)) == {
        "add": "sigma", "ablate": "share",
    }  # fmt: skip


def test_the_record_says_condition_and_prompts(llama: HookedModel) -> None:
    v, prompts = several(llama), ["w1 w2", "w3"]
    unit = v["0.resid_post"] / v.norm("0.resid_post")
    condition = Condition(Site(0, "resid_post"), unit, 0.25)
    measures = {"odds": partial(effects.refusal_odds, prompts=prompts, openers=("w1",))}
    reference = Reference.of(llama, prompts, 2)

    def record(**options: object) -> Record:
        grid = Grid({"v": v.at("1.resid_post")}, [1.0], **options)  # pyright: ignore[reportArgumentType]
        kl = {"kl": partial(costs.kl, reference=reference), "own": logit}
        return sweep(llama, grid, measures, kl, progress=False).record

    plain, gated = record(), record(condition=condition)
    assert plain.settings["condition"] == "None"
    assert "threshold=0.25" in gated.settings["condition"]
    said = prompts_hash(llama.template.render_all(prompts))
    assert plain.prompts_hash == said
    assert plain.settings["prompts"] == {"odds": said, "kl": reference.key, "own": ""}


def test_groups_are_named_by_their_measure(llama: HookedModel) -> None:
    topics = ["a", "a", "b", "b", "c", "c"]
    sweep(llama, small(llama), {"logit": logit}, groups={"logit": topics}, progress=False)
    with pytest.raises(ValueError, match=r"groups are given for 'logits' and the measures are 'lo"):
        sweep(llama, small(llama), {"logit": logit}, groups={"logits": topics}, progress=False)


def test_only_a_rate_of_zeros_has_width(llama: HookedModel) -> None:
    def none(model: HookedModel, what: Steering | None) -> Tensor:
        return torch.zeros(10)

    def width(measure: Measure) -> float:
        found = sweep(llama, small(llama), {"m": measure}, progress=False)
        return float((found.high - found.low)[-1, 0])

    assert width(none) == 0
    none.rate = True  # pyright: ignore[reportFunctionMemberAccess]
    assert width(partial(none)) > 0.1
    never = partial(costs.benign_refusals, prompts=tiny.words(4, 1), tokens=2)
    assert width(never) > 0.1


# --- measurements kept --------------------------------------------------------------------------

WORDS = tiny.words(6, seed=8)


def logit(model: HookedModel, what: Steering | None) -> Tensor:
    with effects.applied(model, what):
        return model.logits(WORDS)[:, 3].double()


def small(model: HookedModel) -> Grid:
    return Grid(
        {"v": several(model)},
        [0.0, 1.0, 2.0],
        sites=["0.resid_post", "2.resid_post"],
        nulls={"random": [several(model, seed) for seed in range(1, 4)]},
    )


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


# --- showing ------------------------------------------------------------------------------------


def test_the_result_is_kept_and_shown(adding: SteeringSweep, tmp_path: Path) -> None:
    loaded = SteeringSweep.load(adding.save(tmp_path))
    assert torch.equal(loaded.claimed, adding.claimed)
    assert torch.equal(loaded.null.nan_to_num(9), adding.null.nan_to_num(9))
    assert loaded.cells == adding.cells
    frame = adding.frame()
    assert len(frame) == 6 * 2 and frame["claimed"].sum() == 1
    assert set(frame["role"]) == {"effect", "cost"}
    assert "in 1 an effect is beyond its null (21 vectors)" in str(adding)
    assert adding.plot().get_xlabel() == "cost: change of kl (nats)"
    drawn = adding.plot(kind="strength")
    assert drawn.get_ylabel() == "change of refusals (share of prompts)"
    assert drawn.get_xlabel() == "strength (times the vector)"
    turned = replace(adding, operations=("ablate",) * len(adding.cells))
    assert turned.plot(kind="strength").get_xlabel() == "strength (share)"
    with pytest.raises(ValueError, match="one vector and one operation"):
        adding.plot(kind="layer")
    with pytest.raises(ValueError, match="unknown plot 'pie'"):
        adding.plot(kind="pie")  # pyright: ignore[reportArgumentType]


def test_a_map_of_layers(llama: HookedModel) -> None:
    found = sweep(
        llama, small(llama), {"logit": logit}, {"kl": logit}, null_costs=True, progress=False
    )
    ax = found.plot(kind="layer")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "2"]
    assert ax.get_xlabel() == "layer (resid_post)"
    assert bool(found.null.isfinite().all())
    found.plot(effect="logit", cost="kl")
