"""The trade-off: laws that know their truth, a synthetic model, an organism, and their controls."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from scipy import stats
from torch import Tensor

from probes import HookedModel, Site, capture
from probes.lineage import organism
from steering import Origin, SteeringVector, steer
from steering import tradeoff_law as law
from steering.four_choice import Items, letters, openings
from steering.tradeoff import choose, fit, tradeoff
from steering.tradeoff_measure import GAPS, Measured, answers, measure, odds, random_bands
from steering.tradeoff_result import ESTIMATES, Tradeoff

R = torch.linspace(-3, 3, 25, dtype=torch.float64)
FOUR = {"floor": law.QUARTER, "span": law.SPAN}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# laws


def test_fits_find_the_planted_parameters() -> None:
    found = law.fit_alignment(R, law.alignment_law(R, 0.8, -0.5))
    assert found == pytest.approx((0.8, -0.5), abs=1e-6)
    B0 = math.tanh(-0.5)
    assert law.fit_alignment(R, law.alignment_law(R, 0.8, -0.5), B0) == pytest.approx(
        (0.8, -0.5), abs=1e-6
    )
    for room in ({}, FOUR):
        P = law.helpfulness_law(R, 1.3, 0.7, **room)
        free = law.fit_helpfulness(R, P, **room)
        assert free[:2] == pytest.approx((1.3, 0.7), abs=1e-5)
        fixed = law.fit_helpfulness(R, P, float(P[12]), **room)
        assert fixed[:2] == pytest.approx((1.3, 0.7), abs=1e-5)


def test_laws_are_symmetric_and_saturate() -> None:
    torch.testing.assert_close(
        law.helpfulness_law(R, 1.3, 0.7), law.helpfulness_law(-R, 1.3, 0.7), rtol=0, atol=0
    )
    far = torch.tensor([-1e6, 1e6], dtype=torch.float64)
    assert law.alignment_law(far, 0.8, 0.3).tolist() == [-1.0, 1.0]
    assert law.helpfulness_law(far, 1.3, 0.7).tolist() == pytest.approx([0, 0], abs=1e-9)
    assert law.helpfulness_law(far, 1.3, 0.7, **FOUR).tolist() == pytest.approx(
        [0.25, 0.25], abs=1e-9
    )


def test_small_r_forms_are_the_derivatives() -> None:
    alignment, step = law.AlignmentFit(0.8, -0.5), 1e-4
    for room in ({}, FOUR):
        helpfulness = law.HelpfulnessFit(1.3, 0.7, **room)
        r = torch.tensor([-step, 0.0, step], dtype=torch.float64)
        B, P = alignment.at(r), helpfulness.at(r)
        assert alignment.slope == pytest.approx(float(B[2] - B[0]) / (2 * step), rel=1e-5)
        second = float(P[2] - 2 * P[1] + P[0]) / step**2
        assert helpfulness.curvature == pytest.approx(-second / 2, rel=1e-3)
    full = law.HelpfulnessFit(1.3, 0.7)
    P0 = 1 / 2.3
    assert full.curvature == pytest.approx(P0 * (1 - P0) * 0.7**2 / 2)


def test_closed_optimum_is_the_numerical_one_where_it_is_small() -> None:
    alignment, helpfulness = law.AlignmentFit(0.8, -0.5), law.HelpfulnessFit(1.3, 0.7)
    small = law.small_optimum(alignment, helpfulness, 0.003)
    assert 0 < small < 0.05
    assert law.optimum(alignment, helpfulness, 0.003, -0.1, 0.1) == pytest.approx(small, rel=0.03)
    # and not where it is large: there B saturates
    large = law.small_optimum(alignment, helpfulness, 3.0)
    assert law.optimum(alignment, helpfulness, 3.0, -100.0, 100.0) < 0.5 * large
    assert law.small_optimum(alignment, law.HelpfulnessFit(1.3, 0.0), 1.0) == math.inf


def test_the_released_room_is_the_same_curve() -> None:
    P = law.helpfulness_law(R, 2.0, 0.7, **FOUR)
    ours = law.fit_helpfulness(R, P, **FOUR)
    theirs = law.fit_helpfulness(R, P, floor=0.25, span=0.5)
    torch.testing.assert_close(ours.at(R), theirs.at(R), rtol=0, atol=1e-6)
    assert theirs.b > ours.b + 0.05  # only counted differently
    # what gives its correct answers 0.9 is beyond their room
    high = law.helpfulness_law(R, 0.15, 0.7, **FOUR)
    assert (law.fit_helpfulness(R, high, floor=0.25, span=0.5).at(R) - high).abs().max() > 0.05


def test_impossible_intercepts_are_nan() -> None:
    B = law.alignment_law(R, 0.8, -0.5)
    assert math.isnan(law.fit_alignment(R, B, 1.0).a)
    P = law.helpfulness_law(R, 1.3, 0.7, **FOUR)
    assert math.isnan(law.fit_helpfulness(R, P, 0.25, **FOUR).b)
    with pytest.raises(ValueError, match="a fit needs one mean for each of at least 3"):
        law.fit_alignment(R[:2], B[:2])


def test_log_slopes() -> None:
    r = R[13:]
    assert law.log_slope(r, 0.3 * r) == pytest.approx(1)
    assert law.log_slope(r, -0.3 * r**2) == pytest.approx(2)
    gone = (0.3 * r).clone()
    gone[3] = 0
    assert law.log_slope(r, gone) == pytest.approx(1)
    assert math.isnan(law.log_slope(r, torch.zeros_like(r)))


@pytest.mark.parametrize("planted", ["constant", "linear", "quadratic", "full"])
def test_the_criterion_picks_the_planted_law(planted: str) -> None:
    truth = {
        "constant": torch.full_like(R, 0.2),
        "linear": 0.1 + 0.2 * R,
        "quadratic": 0.6 - 0.05 * R**2,
        "full": torch.tanh(1.2 * R - 0.5),
    }[planted]
    picked = []
    for seed in range(20):
        y = truth + 0.02 * normal(seed, len(R))
        found = law.compare(R, y, law.fit_alignment(R, y).at(R))
        picked.append(min(found, key=found.__getitem__))
    # the constant is nested in the others, which AIC prefers by chance now and then
    assert picked.count(planted) >= (13 if planted == "constant" else 20)


# a synthetic model: logits that are linear in the state, steered along random read-outs


def synthetic(seed: int = 60, a: float = 4.0, b0: float = -0.4, b: float = 0.35) -> Measured:
    """The gap of a prompt is 2 (a r + b0) plus logistic noise, of which the label is the sign; the
    logit gaps of an item shift by r times normal amounts of sd b, as much up as down."""
    n, m, vocab = 400, 60, 600
    r = torch.arange(-6, 7, dtype=torch.float64) / 10
    u = torch.rand(n, generator=generator(seed), dtype=torch.float64)
    gap = 2 * (a * r[:, None] + b0) + (u / (1 - u)).log()
    labels = gap.sign()
    base = -math.log(0.8 * vocab) + 0.3 * normal(seed + 1, m, vocab // 2).repeat(1, 2) - 0.045
    moves = b * normal(seed + 2, m, vocab // 2)
    moves = torch.cat([moves, -moves], 1)
    wrong = base + r[:, None, None] * moves
    among = base[:, :3] + math.log(0.2 * vocab) + r[:, None, None] * moves[:, :3]
    gaps = torch.full((len(r), m, len(GAPS)), torch.nan, dtype=torch.float64)
    gaps[r != 0, :, GAPS.index("sd")] = r[r != 0].abs()[:, None] * moves.std(1)
    return Measured(
        r,
        labels,
        1 / (1 + wrong.exp().sum(-1)),
        1 / (1 + among.exp().sum(-1)),
        r.abs()[:, None] * moves.norm(dim=1),
        gaps,
        tuple(f"topic-{i // 8:03d}" for i in range(n)),
        ("1.resid_post",),
        "answers",
        "letters",
    )


@pytest.fixture(scope="module")
def planted() -> Tradeoff:
    return fit(synthetic(), window=(0.1, 0.3), chosen=0.2, resamples=200)


def test_planted_parameters_lie_inside_their_intervals(planted: Tradeoff) -> None:
    # over 30 seeds the intervals held a in 29, b0 in 27, the odds in 28, b and b4 in 25
    for name, truth in (("a", 4.0), ("b0", -0.4), ("b", 0.35), ("odds", 1.25), ("b4", 0.35)):
        found = planted[name]
        assert found.low <= truth <= found.high, (name, found)
    assert planted["a"].high - planted["a"].low < 1.0
    assert planted["b"].high - planted["b"].low < 0.05
    assert planted["a_fixed"].value == pytest.approx(planted["a"].value, rel=0.15)
    assert math.tanh(planted["b0_fixed"].value) == pytest.approx(float(planted.B[6, 0]))
    assert (planted.B[:, 1] <= planted.B[:, 0]).all() and (planted.B[:, 0] <= planted.B[:, 2]).all()


def test_slopes_are_one_and_two_and_those_of_a_shuffled_control_are_not(planted: Tradeoff) -> None:
    assert planted["slope_B"].low <= 1 <= planted["slope_B"].high
    assert planted["slope_B"].value == pytest.approx(1, abs=0.3)
    # so narrow that the fourth order, which the law leaves out, can be seen
    assert all(limit == pytest.approx(2, abs=0.02) for limit in planted["slope_P"])
    for name in ("slope_change", "slope_sd"):
        assert planted[name].value == pytest.approx(1, abs=1e-6)
    given = synthetic()
    slopes: dict[str, list[float]] = {"slope_B": [], "slope_P": []}
    for seed in range(8):
        order = torch.rand(len(given.strengths) - 1, generator=generator(seed)).argsort()
        order = torch.cat([order[:6] + (order[:6] >= 6), torch.tensor([6]),
                           order[6:] + (order[6:] >= 6)])  # fmt: skip
        mixed = dataclasses.replace(given, labels=given.labels[order], full=given.full[order])
        found = fit(mixed, window=(0.1, 0.6), resamples=20)
        for name, kept in slopes.items():
            kept.append(found[name].value)
    assert abs(sum(slopes["slope_B"]) / 8) < 0.6
    assert abs(sum(slopes["slope_P"]) / 8) < 1.0
    assert sum(1.8 < x < 2.2 for x in slopes["slope_P"]) <= 1


def test_helpfulness_is_even_and_alignment_odd_under_reflection(planted: Tradeoff) -> None:
    given = synthetic()
    turned = dataclasses.replace(
        given, labels=given.labels.flip(0), full=given.full.flip(0), four=given.four.flip(0)
    )
    found = fit(turned, window=(0.1, 0.3), resamples=20)
    assert found["a"].value == pytest.approx(-planted["a"].value, rel=1e-4)
    assert found["b"].value == pytest.approx(planted["b"].value, rel=1e-4)
    # the noise of the read-outs is symmetric, so P is too
    P = planted.P[:, 0]
    torch.testing.assert_close(P, P.flip(0), rtol=0, atol=1e-12)
    assert float(P[6] - P[0]) > 0.003


def test_optimum_and_region(planted: Tradeoff) -> None:
    first, last = planted.beneficial or (0.0, 0.0)
    assert first >= 0 and first < planted["optimum"].value <= last
    # a small weight gives a small optimum, which the closed form knows
    cautious = fit(synthetic(), window=(0.1, 0.3), weight=0.0001, resamples=20)
    assert cautious["optimum"].value == pytest.approx(cautious["small_optimum"].value, rel=0.1)
    r = torch.tensor([0.0, cautious["optimum"].value], dtype=torch.float64)
    net = cautious.net(r)
    assert net[1] > net[0]


def test_gain_is_what_it_says(planted: Tradeoff) -> None:
    given, at = synthetic(), 8
    assert float(given.strengths[at]) == pytest.approx(0.2)
    found = fit(
        given, window=(0.1, 0.3), chosen=float(given.strengths[at]), weight=2.0, resamples=30
    )
    rise = given.labels[at].mean() - given.labels[6].mean()
    move = given.full[at].mean() - given.full[6].mean()
    assert float(found.gain[0]) == pytest.approx(float(2 * rise + move))
    assert found.gain[1] < found.gain[0] < found.gain[2]
    assert found.claimed is None  # no random directions
    with pytest.raises(ValueError, match="the chosen norm 0.33 was not measured"):
        fit(given, window=(0.1, 0.3), chosen=0.33, resamples=20)


def test_choose_takes_the_best_nearest_to_zero() -> None:
    given = synthetic()
    flat = dataclasses.replace(given, full=torch.full_like(given.full, 0.5))
    capped = dataclasses.replace(flat, labels=torch.where(given.strengths[:, None] > 0.25, 1.0, -1.0)
                                 .double().expand(-1, 400))  # fmt: skip
    assert choose(capped) == pytest.approx(0.3)
    same = dataclasses.replace(flat, labels=torch.ones_like(given.labels))
    assert choose(same) == 0.0


def test_null_of_random_directions(planted: Tradeoff) -> None:
    given = synthetic()
    keep = torch.tensor([6, 8])
    still = dataclasses.replace(
        given,
        **{name: getattr(given, name)[keep] for name in ("strengths", "gaps")},
        **{
            name: getattr(given, name)[[6, 6]] + 0.0
            for name in ("labels", "full", "four", "change")
        },
    )
    at = float(given.strengths[8])
    found = fit(given, window=(0.1, 0.3), chosen=at, null=[still] * 20, resamples=60)
    assert found.null_strengths.tolist() == [at]
    assert float(found.null_gain.abs().max()) < 1e-12
    assert found.claimed
    itself = dataclasses.replace(still, labels=given.labels[keep], full=given.full[keep])
    assert fit(given, window=(0.1, 0.3), chosen=at, null=[itself] * 20, resamples=60).claimed is (
        False
    )
    assert fit(given, window=(0.1, 0.3), chosen=at, null=[still] * 4, resamples=20).claimed is None
    unchosen = fit(given, window=(0.1, 0.3), null=[still] * 20, resamples=20)
    assert unchosen.claimed is None and len(unchosen.null_gain) == 0
    cut = {name: getattr(still, name)[:, :9] for name in ("full", "four", "change", "gaps")}
    fewer = dataclasses.replace(still, **cut)
    with pytest.raises(ValueError, match="were measured at other strengths, prompts or items"):
        fit(given, window=(0.1, 0.3), null=[fewer], resamples=20)


def test_what_cannot_be_fitted(planted: Tradeoff) -> None:
    for window in ((-0.2, 0.2), (0.3, 0.1), (0.11, 0.19)):
        with pytest.raises(ValueError, match="must lie on one side of 0 and hold 2 strengths"):
            fit(synthetic(), window=window, resamples=20)
    with pytest.raises(ValueError, match="the strengths must ascend and hold 0"):
        dataclasses.replace(synthetic(), strengths=synthetic().strengths + 1)


def test_saved_drawn_and_said(planted: Tradeoff, tmp_path: Path) -> None:
    again = Tradeoff.load(planted.save(tmp_path / "trade"))
    for name in ("estimates", "B", "labels", "gaps"):
        torch.testing.assert_close(getattr(again, name), getattr(planted, name), equal_nan=True)
    assert again.window == planted.window
    frame = planted.frame()
    assert len(frame) == 13
    assert {"strength", "B_low", "P4_fit", "gap_sd", "null_change_P_95"} <= set(frame.columns)
    assert list(planted.laws()["estimate"]) == list(ESTIMATES)
    compared = planted.comparison()
    assert compared.shape == (3, 8)
    assert torch.allclose(planted.support.sum(1), torch.ones(3, dtype=torch.float64))
    assert compared.loc["B", "share_constant"] == 0.0
    assert "B slope" in str(planted)
    axes = planted.plot()
    assert len(axes.get_figure().axes) == 4  # pyright: ignore
    for panel in ("helpfulness", "pareto", "slopes"):
        planted.plot(axes, panel=panel)
    with pytest.raises(ValueError, match="unknown panel 'pie': choose one of alignment"):
        planted.plot(panel="pie")
    with pytest.raises(KeyError, match="no estimate 'c': choose one of a, b0"):
        planted["c"]


def test_same_seed_same_bytes() -> None:
    runs = [fit(synthetic(), window=(0.1, 0.3), resamples=8, seed=s) for s in (3, 3, 4)]
    assert torch.equal(runs[0].estimates, runs[1].estimates)
    assert not torch.equal(runs[0].estimates, runs[2].estimates)


# measuring on models


def items_of(model: HookedModel) -> Items:
    rows = [
        {
            "question": f"w{i} w{i + 1}",
            "choices": ["w1 a", "w2", "w3 .", f"w{4 + i}"],
            "answer": i % 4,
        }
        for i in range(6)
    ]
    return openings(model, rows)


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return tiny.hooked("llama")


@pytest.fixture(scope="module")
def vector(llama: HookedModel) -> SteeringVector:
    sites = (Site(0, "resid_post"), Site(1, "resid_post"))
    vectors = {site: 7 * normal(i, llama.d_model).float() for i, site in enumerate(sites)}
    return SteeringVector(vectors, Origin.of(llama))


def test_at_zero_the_unsteered_numbers_bit_for_bit(
    llama: HookedModel, vector: SteeringVector
) -> None:
    prompts, items = tiny.words(8, seed=2), items_of(llama)
    found = measure(llama, vector, (-0.5, 0.5), prompts, items, labels=odds_of_w, progress=False)
    assert found.strengths.tolist() == [-0.5, 0.0, 0.5]
    logits = items.logits(llama)
    assert torch.equal(found.full[1], items.full(logits))
    assert torch.equal(found.four[1], items.four(logits))
    assert torch.equal(found.labels[1], odds_of_w(llama, prompts))
    assert not found.change[1].any()
    assert found.gaps[1].isnan().all()
    assert (found.change[[0, 2]] > 0).all()
    assert not torch.equal(found.full[0], found.full[1])
    asked: list[int] = []

    def counted(model: HookedModel, given: list[str]) -> Tensor:
        asked.append(len(given))
        return odds_of_w(model, given)

    known = measure(
        llama, vector, (0.5,), prompts, items, labels=counted, unsteered=found.labels[1],
        progress=False,
    )  # fmt: skip
    assert asked == [8] and torch.equal(known.labels, found.labels[1:])  # 0 is not read again
    again = measure(llama, vector, (), prompts, items, labels=odds_of_w, progress=False)
    assert torch.equal(again.full[0], found.full[1])  # and nothing was left behind


def odds_of_w(model: HookedModel, prompts: list[str]) -> Tensor:
    return odds(model, prompts, ("w1", "w2"))


def test_reads_of_items(llama: HookedModel) -> None:
    items = items_of(llama)
    logits = items.logits(llama)
    row = [llama.template.render(items.prompts[2], items.prefix)]
    alone = llama.engine.logits(llama.batch(row), 1)[0, -1]
    torch.testing.assert_close(logits[2], alone, rtol=1e-4, atol=1e-5)
    P = logits[2].double().softmax(-1)
    words = llama.tokenizer.convert_tokens_to_ids(["w1", "w2", "w3", "w6"])
    assert items.tokens[2].tolist() == words
    assert float(items.full(logits)[2]) == pytest.approx(float(P[words[2]]))
    assert float(items.four(logits)[2]) == pytest.approx(float(P[words[2]] / P[words].sum()))
    twice = [{"question": "w1", "choices": ["w1 a", "w1 you", "w3", "w4"], "answer": 0}]
    rows = [{"question": "w1", "choices": ["w1", "w2", "w3", "w4"], "answer": 0}, *twice]
    assert openings(llama, rows).n_left_out == 1
    with pytest.raises(ValueError, match="none of 1 questions has four openings"):
        openings(llama, twice)
    with pytest.raises(ValueError, match="item 0 has 2 choices and answer 0: give four choices"):
        letters(llama, [{"question": "w1", "choices": ["w1", "w2"], "answer": 0}])
    with pytest.raises(ValueError, match="item 0 has question: a four-choice item has"):
        openings(llama, [{"question": "w1"}])


def test_r_is_the_norm_added_at_each_site(llama: HookedModel, vector: SteeringVector) -> None:
    site, prompts = Site(0, "resid_post"), tiny.words(5, seed=4)
    unit = vector[site].double() / vector[site].double().norm()
    before = capture(llama, prompts, site, progress=False)[site].double()
    with steer(llama, vector, 0.5, unit="unit"):
        after = capture(llama, prompts, site, progress=False)[site].double()
    torch.testing.assert_close((after - before) @ unit, torch.full((5,), 0.5).double(), atol=1e-5, rtol=0)  # fmt: skip


def test_shapes_of_the_gaps_agree_with_scipy(llama: HookedModel, vector: SteeringVector) -> None:
    items = items_of(llama)
    found = measure(llama, vector, (0.5,), ["w1 w2"], items, labels=odds_of_w, progress=False)
    origin = items.logits(llama)
    with steer(llama, vector, 0.5, unit="unit"):
        moved = (items.logits(llama).double() - origin.double())[3]
    c = int(items.correct[3])
    shift = torch.cat([moved[:c], moved[c + 1 :]]) - moved[c]
    z = ((shift - shift.mean()) / shift.std(correction=0)).numpy()
    expected = [
        float(shift.mean()),
        float(shift.std(correction=0)),
        stats.skew(z),
        stats.kurtosis(z),
        stats.kstest(z, "norm").statistic,
    ]
    assert found.gaps[1, 3].tolist() == pytest.approx(expected, rel=1e-9)
    assert float(found.change[1, 3]) == pytest.approx(float(moved.norm()))


def test_random_bands(llama: HookedModel, vector: SteeringVector) -> None:
    acts = capture(llama, tiny.words(20, seed=1), list(vector.sites), progress=False)
    made = random_bands(vector, acts, 5, seed=1)
    again = random_bands(vector, {site: acts[site] for site in acts.sites}, 5, seed=1)
    for one, other in zip(made, again, strict=True):
        assert one.sites == vector.sites
        for site in one.sites:
            assert one.norm(site) == pytest.approx(1, abs=1e-6)
            assert torch.equal(one[site], other[site])
    first, second = vector.sites
    assert all(torch.equal(m[first], m[second]) for m in made[:3])  # isotropic: one for the band
    assert not any(torch.equal(m[first], m[second]) for m in made[3:])
    assert "random halves" in made[4].origin.estimator
    x = acts[first].double()
    half = made[4][first].double()
    span = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
    assert float((half @ span.T).norm()) == pytest.approx(1, abs=1e-5)  # inside the prompts' span
    # halves of whole topics: what parts the twins of a topic is in both halves alike
    apart = torch.tensor([1.0, -1.0]).repeat(10)[:, None] * normal(9, 1, llama.d_model)
    wide = {site: acts[site] + 1000 * apart.float() for site in acts.sites}
    twins = [f"topic {i // 2}" for i in range(20)]
    concept = apart[0] / apart[0].norm()
    by_row, by_topic = (
        [
            abs(float(one[first].double() @ concept))
            for one in random_bands(vector, wide, 12, seed=1, topics=t)[6:]
        ]
        for t in (None, twins)
    )
    assert max(by_row) > 0.9
    assert max(by_topic) < 0.5
    with pytest.raises(ValueError, match="3 topics for 20 rows: give one for each"):
        random_bands(vector, wide, 2, topics=twins[:3])
    with pytest.raises(ValueError, match="1 topics cannot be halved at random"):
        random_bands(vector, wide, 2, topics=["one"] * 20)
    with pytest.raises(ValueError, match="0 random vectors were asked"):
        random_bands(vector, acts, 0)


def test_mistakes_of_measuring(llama: HookedModel, vector: SteeringVector) -> None:
    items, given = items_of(llama), {"progress": False}
    with pytest.raises(ValueError, match="made for 'ablate', whose strength is no norm"):
        measure(llama, vector.doing("ablate"), (1.0,), ["w1"], items, **given)
    with pytest.raises(ValueError, match="2 topics for 1 prompts"):
        measure(llama, vector, (1.0,), ["w1"], items, topics=["a", "b"], **given)
    with pytest.raises(ValueError, match="1 aligned and -1 not"):
        measure(llama, vector, (1.0,), ["w1"], items, labels=lambda m, p: torch.full((1,), 3.0), **given)  # fmt: skip
    with pytest.raises(ValueError, match="not all finite"):
        measure(llama, vector, (math.nan,), ["w1"], items, **given)


# an organism whose refusal hangs on one direction


def test_the_organism_trades_along_its_planted_direction_only() -> None:
    world = organism.build(0)
    model = HookedModel(world.aligned, world.tokenizer, name="organism aligned")
    pairs = world.pairs
    harmful = [p for p, label in zip(pairs.prompts, pairs.labels, strict=True) if label]
    topics = [t for t, label in zip(pairs.topics, pairs.labels, strict=True) if label]
    site = Site(world.planted_layer, "resid_post")
    vector = SteeringVector({site: 3 * world.planted_direction}, Origin.of(model))
    words = model.tokenizer.get_vocab()
    tokens = torch.tensor([[words[w] for w in ("i", "danger", "safe", "sure")]] * 24)
    # its one skill: what opens the answer to a harmful request
    items = Items(
        tuple(harmful[60:84]), "", tokens, torch.zeros(24, dtype=torch.long), "first word"
    )
    given: dict[str, Any] = {"topics": topics[:24], "progress": False}
    strengths = [-1.0, -0.75, -0.5, -0.25, 0.25, 0.5]
    acts = capture(model, pairs.prompts[:60], site, progress=False)
    found = tradeoff(
        model,
        vector,
        strengths,
        harmful[:24],
        items,
        window=(-1.0, -0.25),
        validation=measure(model, vector, strengths, harmful[30:50], items, progress=False),
        nulls=random_bands(vector, acts, 6),
        null_strengths=[-1.0],
        resamples=30,
        **given,
    )
    assert found.B[:, 0].tolist()[-3:] == [1.0, 1.0, 1.0]
    assert found.B[0, 0] == -1.0
    assert (found.B[1:, 0] >= found.B[:-1, 0]).all()
    assert found["a"].value > 0
    assert found.chosen is not None and found.chosen >= 0
    assert (found.null_B[:, 0] > 0.5).all()  # random directions of that norm leave it refusing
    assert found.labelled_by == "answers"
    assert torch.equal(answers(model, harmful[:24]), found.labels[found.zero])


def test_strengths_must_hold_what_validation_chose(
    llama: HookedModel, vector: SteeringVector
) -> None:
    items, prompts = items_of(llama), tiny.words(6, seed=2)
    held = measure(llama, vector, (0.25, 0.5), prompts, items, labels=odds_of_w, progress=False)
    best = dataclasses.replace(held, labels=torch.tensor([[-1.0], [-1.0], [1.0]]).double().expand(-1, 6))  # fmt: skip
    with pytest.raises(ValueError, match="chose the norm 0.5, which is not among the strengths"):
        tradeoff(llama, vector, (0.1, 0.2), prompts, items, window=(0.1, 0.2), validation=best)
