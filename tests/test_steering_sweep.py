"""Sweeps: planted effects are claimed and chance is not; killed and run again they end alike."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from swept import at, logit, small
from torch import Tensor

from probes import HookedModel, Site, capture
from probes.lineage import organism as organisms
from probes.lineage.organism import Organism
from steering import (
    Steering,
    costs,
    effects,
)
from steering.costs import Reference
from steering.grid import Cell, Grid
from steering.intervals import change_interval
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


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return tiny.hooked("llama")


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
