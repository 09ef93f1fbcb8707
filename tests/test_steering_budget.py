"""Strength from a budget: the planted root is found, what is not reached is said."""

import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import tiny
import torch

from probes import HookedModel, Site, capture, datasets, difference_of_means
from steering import (
    Condition,
    HeadOffsets,
    Origin,
    Scale,
    Schedule,
    Steering,
    SteeringVector,
    costs,
)
from steering.applied import at_budget
from steering.budget import SolvedStrength, solve, solve_strength
from steering.costs import Reference

PROMPTS, HELD_OUT = tiny.words(6, seed=5), tiny.words(5, seed=6)
GRID = [2.0**i for i in range(-6, 7)]


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return tiny.hooked("llama")


@pytest.fixture(scope="module")
def vector(model: HookedModel) -> SteeringVector:
    drawn = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    site = Site(1, "resid_post")
    return SteeringVector({site: drawn}, Origin.of(model), scales={site: Scale(0.5, 2.0)})


# --- the solver alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("root", [0.003, 0.0625, 0.9, 1.0, 33.3])
def test_a_planted_root_is_found(root: float) -> None:
    found = solve(lambda s: (s / root) ** 2 * 0.05, 0.05, [2.0**i for i in range(-10, 7)])
    assert root <= found.strength * (1 + 1e-12) and found.strength <= root * 1.01
    assert found.cost >= 0.05 * (1 - 1e-12)
    tight = solve(lambda s: s, 0.7, GRID, rtol=1e-9)
    assert math.isclose(tight.strength, 0.7, rel_tol=1e-8) and tight.cost >= 0.7
    assert len(tight.tried) > len(found.tried)


def test_a_step_is_found_from_above() -> None:
    found = solve(lambda s: float(s >= 0.3), 1.0, GRID, rtol=1e-6)
    assert 0.3 <= found.strength <= 0.3 * (1 + 1e-6)
    assert all(cost == float(s >= 0.3) for s, cost in found.tried)


def test_the_smallest_strength_is_taken() -> None:
    """A cost that rises, falls and rises again has several roots; the first counts."""
    found = solve(lambda s: math.sin(s), 0.5, [0.25 * i for i in range(1, 40)], rtol=1e-6)
    assert math.isclose(found.strength, math.asin(0.5), rel_tol=1e-5)
    # a grid too coarse to see the first finds a later one
    coarse = solve(lambda s: math.sin(s), 0.5, [6.5, 7.0], rtol=1e-6)
    assert coarse.strength > 6


def test_not_reached_says_the_largest_seen() -> None:
    with pytest.raises(
        ValueError,
        match=r"budget of 0\.9 is not reached: the largest cost seen is 0\.5, at strength 1 of a "
        r"grid up to 4",
    ):
        solve(lambda s: 0.5 * math.exp(-((s - 1) ** 2)), 0.9, [0.5, 1.0, 4.0])
    with pytest.raises(ValueError, match=r"used up without steering, where the cost is 0\.2"):
        solve(lambda s: 0.2 + s, 0.1, GRID)
    for grid in ([], [1.0, 0.5], [0.0, 1.0]):
        with pytest.raises(ValueError, match="must grow and start above 0"):
            solve(lambda s: s, 1.0, grid)
    with pytest.raises(ValueError, match="rtol is 0"):
        solve(lambda s: s, 1.0, [1.0], rtol=0.0)


# --- on a model ---------------------------------------------------------------------------------


def test_the_budget_is_used_up_and_no_more(model: HookedModel, vector: SteeringVector) -> None:
    found = solve_strength(
        model, vector, kl=0.02, prompts=PROMPTS, held_out=HELD_OUT, tokens=5, rtol=0.001
    )
    reference = Reference.of(model, PROMPTS, 5)
    own = float(costs.kl(model, Steering(vector, found.strength), reference).mean())
    assert own == found.value >= 0.02
    below = costs.kl(model, Steering(vector, 0.998 * found.strength), reference).mean()
    assert float(below) < 0.02
    other = Reference.of(model, HELD_OUT, 5)
    values = costs.kl(model, Steering(vector, found.strength), other)
    assert found.held_out == float(values.mean())
    assert found.low < found.held_out < found.high
    assert (found.n, found.n_held_out, found.unit) == (6, 5, "raw")
    assert found.record.fingerprints == (model.fingerprint,)
    frame = found.frame()
    assert frame["kl"].max() >= 0.02 > frame["kl"].min()
    assert (frame["strength"] > 0).all()
    again = solve_strength(
        model, vector, kl=0.02, prompts=PROMPTS, held_out=HELD_OUT, tokens=5, rtol=0.001
    )
    assert torch.equal(again.values, found.values) and again.strength == found.strength


def test_sign_and_unit(model: HookedModel, vector: SteeringVector) -> None:
    def solved(**options: object) -> float:
        return solve_strength(
            model, vector, kl=0.02, prompts=PROMPTS, held_out=HELD_OUT, tokens=5, rtol=1e-4,
            **options,  # pyright: ignore[reportArgumentType]
        ).strength  # fmt: skip

    raw = solved()
    assert solved(sign=-1) < 0 < raw
    flipped = solve_strength(
        model, -vector, kl=0.02, prompts=PROMPTS, held_out=HELD_OUT, tokens=5, rtol=1e-4
    )
    assert flipped.strength == -solved(sign=-1) != raw
    norm = vector.norm("1.resid_post")
    assert solved(unit="unit") == pytest.approx(raw * norm, rel=1e-3)
    assert solved(unit="fraction") == pytest.approx(raw * norm / 2.0, rel=1e-3)
    assert solved(unit="sigma") == pytest.approx(raw * norm / 0.5, rel=1e-3)


def test_the_schedule_and_head_offsets_are_solved_too(
    model: HookedModel, vector: SteeringVector
) -> None:
    given = {"kl": 0.02, "prompts": PROMPTS, "held_out": HELD_OUT, "tokens": 5}
    everywhere = solve_strength(model, vector, **given)  # pyright: ignore[reportArgumentType]
    late = solve_strength(model, vector, schedule=Schedule("generated"), **given)  # pyright: ignore[reportArgumentType]
    assert late.strength > everywhere.strength
    origin = Origin.of(model)
    offsets = HeadOffsets({(1, 0): torch.ones(origin.head_dim)}, origin)
    found = solve_strength(model, offsets, **given)  # pyright: ignore[reportArgumentType]
    assert found.value >= 0.02 and "head" in found.what


def test_a_share_goes_from_0_to_1(model: HookedModel, vector: SteeringVector) -> None:
    ablation = vector.doing("ablate")
    full = float(costs.kl(model, Steering(ablation, 1.0), Reference.of(model, PROMPTS, 5)).mean())
    found = solve_strength(
        model, ablation, kl=full / 2, prompts=PROMPTS, held_out=HELD_OUT, tokens=5
    )
    assert 0 < found.strength < 1
    with pytest.raises(ValueError, match=r"not reached: .* at strength 1 of a grid up to 1"):
        solve_strength(model, ablation, kl=50 * full, prompts=PROMPTS, held_out=HELD_OUT, tokens=5)


def test_perplexity_and_refusals_are_budgets_too(
    model: HookedModel, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = solve_strength(
        model, vector, perplexity=1.005, prompts=PROMPTS, held_out=HELD_OUT, rtol=0.001
    )
    before = costs.text_log_perplexity(model, None, PROMPTS).mean()
    after = costs.text_log_perplexity(model, Steering(vector, found.strength), PROMPTS).mean()
    assert float((after - before).exp()) == pytest.approx(found.value)
    assert 1.005 <= found.value < 1.0051
    assert found.low < found.held_out < found.high

    def refusals(
        model: HookedModel, what: Steering, prompts: list[str], **_: object
    ) -> torch.Tensor:
        share = min(1.0, what.strength / 10)
        return (torch.arange(len(prompts)) < share * len(prompts)).double()

    monkeypatch.setattr(costs, "benign_refusals", refusals)
    half = solve_strength(
        model, vector, benign_refusals=0.5, prompts=tiny.words(10, 1), held_out=tiny.words(9, 2)
    )
    assert half.value == 0.5 and 4 < half.strength < 4.1
    assert half.low < half.held_out < half.high
    assert (half.kind, half.budget) == ("benign_refusals", 0.5)


def test_steering_at_a_budget(model: HookedModel, vector: SteeringVector) -> None:
    steering = at_budget(model, vector, 0.02, prompts=PROMPTS, held_out=HELD_OUT)
    assert isinstance(steering, Steering) and steering.what is vector
    reference = Reference.of(model, PROMPTS)
    assert 0.02 <= float(costs.kl(model, steering, reference).mean()) < 0.0206
    assert model.generate(PROMPTS[:1], 3, steer=steering)
    texts = at_budget(model, vector, perplexity=1.005, prompts=PROMPTS, held_out=HELD_OUT)
    before = costs.text_log_perplexity(model, None, PROMPTS).mean()
    ratio = (costs.text_log_perplexity(model, texts, PROMPTS).mean() - before).exp()
    assert 1.005 <= float(ratio) < 1.006
    with pytest.raises(ValueError, match="2 budgets were given"):
        at_budget(model, vector, 0.02, benign_refusals=0.1)


def test_a_solved_strength_is_ready_to_apply(
    model: HookedModel, vector: SteeringVector, tmp_path: Path
) -> None:
    late = Schedule("generated", generated=(0, 3), decay=0.5)
    found = solve_strength(
        model, vector, kl=0.005, prompts=PROMPTS, held_out=HELD_OUT, tokens=5, schedule=late,
        unit="sigma", sign=-1,
    )  # fmt: skip
    assert found.steering(vector) == Steering(vector, found.strength, "sigma", late)
    loaded = SolvedStrength.load(found.save(tmp_path))
    assert loaded.steering(vector) == found.steering(vector)
    value = costs.kl(model, loaded.steering(vector), Reference.of(model, PROMPTS, 5)).mean()
    assert float(value) == found.value
    with pytest.raises(ValueError, match="give the same, or solve again"):
        found.steering(vector.doing("ablate"))
    unit = vector.vectors[Site(1, "resid_post")]
    condition = Condition(Site(0, "resid_post"), unit / unit.norm(), 0.0)
    with pytest.raises(ValueError, match="give the same, or solve again"):
        found.steering(vector, condition)


def test_mistakes_are_said_before_anything_runs(model: HookedModel, vector: SteeringVector) -> None:
    given = {"prompts": PROMPTS, "held_out": HELD_OUT}
    for options, said in (
        ({}, "0 budgets were given"),
        ({"kl": 0.1, "perplexity": 2.0}, "2 budgets were given"),
        ({"kl": 0.0}, "budget of kl is 0: give one above 0"),
        ({"perplexity": 0.9}, "budget of perplexity is 0.9: give one above 1"),
        ({"kl": 0.1, "sign": 0}, "sign is 0: give 1 or -1"),
        ({"kl": 0.1, "unit": "metres"}, "unknown unit of strength 'metres'"),
        ({"kl": 0.1, "held_out": [*HELD_OUT, PROMPTS[0]]}, "1 held-out prompts also decide"),
    ):
        with pytest.raises(ValueError, match=said):
            solve_strength(model, vector, **{**given, **options})  # pyright: ignore[reportArgumentType]
    bare = SteeringVector(dict(vector.vectors), vector.origin)
    with pytest.raises(ValueError, match="needs the sigma of projections"):
        solve_strength(model, bare, kl=0.1, unit="sigma", **given)  # pyright: ignore[reportArgumentType]


def test_the_result_is_kept(model: HookedModel, vector: SteeringVector, tmp_path: Path) -> None:
    found = solve_strength(
        model, vector, kl=0.02, prompts=PROMPTS, held_out=HELD_OUT, tokens=4, sign=-1
    )
    loaded = SolvedStrength.load(found.save(tmp_path))
    assert torch.equal(loaded.values, found.values)
    assert (loaded.strength, loaded.held_out, loaded.low) == (
        found.strength, found.held_out, found.low,
    )  # fmt: skip
    ax = found.plot()
    assert ax.get_xlabel() == "-strength" and "nats" in ax.get_ylabel()
    assert str(found).startswith("strength -")
    with pytest.raises(FrozenInstanceError):
        found.strength = 1.0  # pyright: ignore[reportAttributeAccessIssue]


# --- the lineage --------------------------------------------------------------------------------


def refusal_vector(model: HookedModel) -> SteeringVector:
    twins = datasets.safety("train").limited(40)
    site = Site(20, "resid_post")
    h = capture(model, twins.prompts, [site], progress=False)[site]
    found = difference_of_means(h[twins.positive], h[~twins.positive])
    return SteeringVector({site: found.raw}, Origin.of(model))


def test_a_real_vector_uses_up_its_budget() -> None:
    """Few prompts and tokens; 8 unseen requests cost between 0.5 and 2 times the budget."""
    model = HookedModel.load("builtin:aligned", device="cpu")
    found = solve_strength(
        model, refusal_vector(model), kl=0.05, rtol=0.05, tokens=8, grid=[0.05, 0.1, 0.2, 0.4, 0.8],
        prompts=datasets.general("validation")[:8], held_out=datasets.general("test")[:8],
    )  # fmt: skip
    assert 0.05 <= found.value < 0.06
    assert 0.025 < found.held_out < 0.1


@pytest.mark.long
def test_the_budget_of_the_shipped_prompts_holds_on_others() -> None:
    """All 32 validation requests decide; the 80 of test stay within half the budget of it."""
    model = HookedModel.load("builtin:aligned", device="cpu")
    found = solve_strength(model, refusal_vector(model), kl=0.05)
    assert 0.05 <= found.value < 0.052
    assert 0.025 < found.low < found.held_out < found.high < 0.075
