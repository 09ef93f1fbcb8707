"""What a sweep applies: every combination, nulls of the same norm, groups and units by name."""

from functools import partial

import pytest
import tiny
import torch
from swept import logit, several, small
from torch import Tensor

from probes import HookedModel, Site, capture
from probes.prompts import prompts_hash
from probes.results import Record
from steering import (
    Condition,
    Steering,
    costs,
    effects,
)
from steering.costs import Reference
from steering.effects import Measure
from steering.grid import Cell, Grid, matched
from steering.sweep import sweep


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return tiny.hooked("llama")


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
