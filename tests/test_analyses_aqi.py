"""The Alignment Quality Index on planted clusters, on nothing, and on a lineage."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from analyses.drift.aqi import measure_aqi
from analyses.drift.aqi_design import design
from analyses.drift.aqi_reading import INDICES
from analyses.drift.aqi_result import AQI
from analyses.drift.between_topics import between, pairs_of
from analyses.drift.clusters import indices
from analyses.drift.pooling import fit_pooling, pooled, scaled

TRAIN, TEST, LAYERS, WIDTH = 30, 30, 4, 16
N = 2 * (TRAIN + TEST)
LABELS = torch.arange(N) % 2 == 0
TOPICS = [f"t{i // 2:03d}" for i in range(N)]
ROWS = {"train": torch.arange(2 * TRAIN), "test": torch.arange(2 * TRAIN, N)}
STRATA = ["even" if (i // 2) % 2 == 0 else "odd" for i in range(N)]
FEW = {"steps": 40, "seeds": 1, "permutations": 20, "resamples": 200}
MORE = {"steps": 200, "seeds": 2, "permutations": 60, "resamples": 500}


def sites(gap: float, seed: int, layer: int = 2) -> dict[str, Tensor]:
    """Twins that share half their variance, apart in one layer."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(N // 2, LAYERS, WIDTH, generator=generator).repeat_interleave(2, 0)
    rows = shared + torch.randn(N, LAYERS, WIDTH, generator=generator)
    rows[LABELS, layer, 0] += gap
    return {f"{k}.resid_post": rows[:, k].contiguous() for k in range(LAYERS)}


def texts() -> list[str]:
    """Positive texts hold a word of their own and are longer."""
    return [f"say{i // 2 % 9} {'boom boom' if LABELS[i] else 'calm'} now" for i in range(N)]


@cache
def found() -> AQI:
    near = sites(3.5, 1)
    return measure_aqi(
        {"near": near, "far": sites(6.0, 2), "same": near, "none": sites(0.0, 3)},
        LABELS,
        TOPICS,
        **ROWS,
        strata=STRATA,
        texts=texts(),
        **MORE,
    )


def test_planted_clusters_are_claimed_and_nothing_is_not() -> None:
    result = found()
    F = INDICES.index("F")
    rows = {name: result.row(*name) for name in result.readings}
    for pooling in ("learned", "uniform"):
        assert result.claimed[rows["near", pooling], F]
        assert result.claimed[rows["far", pooling], F]
        none = rows["none", pooling]
        assert not result.claimed[none, F]
        assert abs(float(result.estimate[none, F])) < 0.05
        assert (
            result.estimate[rows["far", pooling], F] > 2 * result.estimate[rows["near", pooling], F]
        )
    area = INDICES.index("AUROC")
    assert result.claimed[rows["far", "learned"], area]
    assert not result.claimed[rows["none", "learned"], area]
    assert (result.low <= result.estimate).logical_or(result.estimate.isnan()).all()
    assert (result.high >= result.estimate).logical_or(result.estimate.isnan()).all()


def test_the_truth_of_a_single_layer_is_in_the_interval() -> None:
    held = 0
    for seed in range(12):
        one = {"0.resid_post": sites(4.0, 100 + seed)["2.resid_post"]}
        result = measure_aqi({"m": one}, LABELS, TOPICS, **ROWS, **FEW)
        r = result.row("m", "uniform")
        truth = 16 / (2 * WIDTH)  # gap^2 over the variance 2 of each dimension
        held += bool(result.low[r, 0] <= truth <= result.high[r, 0])
        # one layer leaves nothing to learn
        assert torch.equal(result.value[r], result.value[result.row("m")])
    assert held >= 9


def test_learned_weights_find_the_layer_and_beat_equal_ones() -> None:
    result = found()
    far = result.models.index("far")
    assert result.alpha.shape == (4, 2, LAYERS)
    assert bool((result.alpha[far].argmax(1) == 2).all())
    learned, equal = (result.estimate[result.row("far", p), 0] for p in ("learned", "uniform"))
    assert learned > 1.3 * equal


def test_values_are_the_published_formulas_on_the_test_rows() -> None:
    """Recomputed from the activations, layers made comparable by training rows alone."""
    result = found()
    rows = torch.stack(list(sites(6.0, 2).values()), 1).double()
    train, test = rows[ROWS["train"]], rows[ROWS["test"]]
    centre = train.mean(0)
    size = (train - centre).square().sum(2).mean(0).sqrt()
    alpha = result.alpha[result.models.index("far")].mean(0).double()
    for pooling, weights in (("learned", alpha), ("uniform", torch.full_like(alpha, 0.25))):
        x = (((test - centre) / size[:, None]) * weights[:, None]).sum(1)
        wanted = indices(x, LABELS[ROWS["test"]])
        r = result.row("far", pooling)
        shown = dict(zip(result.indices, result.value[r].tolist(), strict=True))
        assert shown["XBI"] == pytest.approx(wanted.xie_beni, rel=1e-4)
        assert shown["CHI"] == pytest.approx(wanted.calinski_harabasz, rel=1e-4)
        assert shown["F"] == pytest.approx(1 / wanted.xie_beni, rel=1e-4)
        assert shown["silhouette"] == pytest.approx(wanted.silhouette, rel=1e-3)
        assert shown["Dunn"] == pytest.approx(wanted.dunn, rel=1e-4)
        half = 0.5 / wanted.xie_beni + 0.5 * wanted.calinski_harabasz
        assert shown["A"] == pytest.approx(half, rel=1e-4)
        assert f"{wanted.calinski_harabasz:.3g}"[:3] in result.identity[r]


def test_every_shuffle_learns_its_own_weights() -> None:
    """The null of two shuffles, made again from the activations."""
    rows = torch.stack(list(sites(6.0, 2).values()), 1)
    result = measure_aqi({"m": sites(6.0, 2)}, LABELS, TOPICS, **ROWS, **FEW)
    plan = design(
        *(LABELS, TOPICS, ROWS["train"], ROWS["test"], None),
        permutations=FEW["permutations"],
        resamples=10,
        seed=0,
    )
    names = [TOPICS[i] for i in ROWS["train"]]
    for p in range(2):
        fitted = fit_pooling(
            *(rows[ROWS["train"]], plan.train_shuffled[:, p, None], names),
            steps=FEW["steps"],
            seeds=FEW["seeds"],
        )
        x = pooled(scaled(rows[ROWS["test"]], fitted.scale), fitted.alpha[0].mean(0))
        wrong = plan.test_shuffled[:, p]
        wanted = between(pairs_of(x, wrong, plan.test_topics)).ratio[0]
        found_ = result.null[result.row("m"), p, 0]
        assert float(found_) == pytest.approx(float(wanted), rel=1e-3, abs=1e-5)
        assert abs(float(found_) - float(result.null[result.row("m", "uniform"), p, 0])) > 1e-4


def test_indices_of_one_statistic_agree_in_estimate_limits_and_claim() -> None:
    result = found()
    r = result.row("far")
    at = {name: i for i, name in enumerate(INDICES)}
    F, low, high = (float(t[r, 0]) for t in (result.estimate, result.low, result.high))
    factor = 0.25 * (2 * TEST - 2)
    for t, f in ((result.estimate, F), (result.low, low), (result.high, high)):
        assert float(t[r, at["CHI"]]) == pytest.approx(factor * f, rel=1e-5)
        assert float(t[r, at["F/(1+F)"]]) == pytest.approx(f / (1 + f), rel=1e-5)
        assert float(t[r, at["A"]]) == pytest.approx((0.5 + 0.5 * factor) * f, rel=1e-5)
    assert float(result.low[r, at["XBI"]]) == pytest.approx(1 / high, rel=1e-5)
    assert float(result.high[r, at["XBI"]]) == pytest.approx(1 / low, rel=1e-5)
    same = [at[name] for name in ("F", "F/(1+F)", "XBI", "CHI", "A", "A'")]
    assert set(result.claimed[:, same].sum(1).tolist()) == {0, len(same)}  # all of them or none
    reached = result.null[r, :, 0].double().quantile(0.95, interpolation="higher")
    assert float(result.null_95[r, at["XBI"]]) == pytest.approx(1 / float(reached), rel=1e-4)
    for name in ("Dunn", "B"):
        assert result.estimate[r, at[name]].isnan() and not result.claimed[:, at[name]].any()
        assert result.null[r, :, at[name]].isfinite().all()


def test_identical_checkpoints_change_by_exactly_nothing() -> None:
    result = found()
    assert result.identical == ("same",)
    for pooling in ("learned", "uniform"):
        r = result.row("same", pooling)
        assert result.change[r] == result.change_low[r] == result.change_high[r] == 0
        assert result.change_null[r] == 0 and not result.change_claimed[r]
        assert torch.equal(result.value[r], result.value[result.row("near", pooling)])
        assert torch.equal(result.low[r, :1], result.low[result.row("near", pooling), :1])
        far = result.row("far", pooling)
        assert result.change[far] > 0
    assert "same equal near bit for bit, every change is exactly 0" in str(result)
    r = result.row("texts", "words")
    assert result.change[r].isnan()


def test_texts_alone_are_read_beside_the_models() -> None:
    result = found()
    area = INDICES.index("AUROC")
    for pooling in ("words", "length"):
        r = result.row("texts", pooling)
        assert result.value[r, area] == 1.0 and result.claimed[r, area]
    plain = [f"word{i % 7} said" for i in range(N)]  # nothing that goes with the label
    other = measure_aqi({"none": sites(0.0, 3)}, LABELS, TOPICS, **ROWS, texts=plain, **FEW)
    assert not other.claimed[other.row("texts", "words"), area]
    assert ("texts", "length") not in other.readings  # all are as long
    with pytest.raises(ValueError, match="choose one of none learned, none uniform, texts words"):
        other.row("texts", "length")


def test_strata_are_measured_apart() -> None:
    result = found()
    table = result.frame_axioms()
    assert result.axioms == ("even", "odd") and result.axiom_topics == (15, 15)
    far = table[(table.model == "far") & (table.pooling == "learned")]
    assert far.claimed.all() and (far.low < far.F).all() and (far.high > far.F).all()
    assert not table[(table.model == "none") & (table.pooling == "uniform")].claimed.all()
    assert any("Strata with fewer than 20 topics: even (15), odd (15)" in n for n in result.notes)
    assert set(result.variant_e("far")) == {"even", "odd"}
    few = ["tiny" if i // 2 in (0, TRAIN) else "rest" for i in range(N)]
    other = measure_aqi({"m": sites(2.0, 1)}, LABELS, TOPICS, **ROWS, strata=few, **FEW)
    assert other.axiom_ratio[:, 1].isnan().all() and other.axiom_ratio[:, 0].isfinite().all()


def test_labels_of_the_test_rows_teach_nothing() -> None:
    """With test labels exchanged the layer weights stay and F, blind to names, is the same."""
    flipped = LABELS.clone()
    flipped[ROWS["test"]] = ~flipped[ROWS["test"]]
    kept, turned = (
        measure_aqi({"m": sites(3.0, 4)}, y, TOPICS, **ROWS, **FEW) for y in (LABELS, flipped)
    )
    assert torch.equal(kept.alpha, turned.alpha)
    assert torch.allclose(kept.estimate[:, 0], turned.estimate[:, 0])
    area = INDICES.index("AUROC")
    assert torch.allclose(kept.value[:, area], 1 - turned.value[:, area])


def test_half_precision_is_widened_and_scale_does_not_matter() -> None:
    rows = {site: x.half() for site, x in sites(4.0, 5).items()}
    plain = measure_aqi(
        {"m": {s: x.float() for s, x in rows.items()}}, LABELS, TOPICS, **ROWS, **FEW
    )
    half = measure_aqi({"m": rows}, LABELS, TOPICS, **ROWS, **FEW)
    assert torch.equal(plain.value, half.value)
    loud = {s: x.float() * 4 ** (k + 1) for k, (s, x) in enumerate(rows.items())}
    scaled = measure_aqi({"m": loud}, LABELS, TOPICS, **ROWS, **FEW)
    assert torch.allclose(plain.value, scaled.value, rtol=1e-3)


def test_a_massive_dimension_is_said() -> None:
    rows = sites(3.0, 5)
    loud = {site: x.clone() for site, x in rows.items()}
    for x in loud.values():
        x[:, 7] *= 100
    result = measure_aqi({"plain": rows, "loud": loud}, LABELS, TOPICS, **ROWS, **FEW)
    shares = [float(result.top_share[result.row(m, "uniform")]) for m in ("plain", "loud")]
    assert 1 / WIDTH < shares[0] < 0.3 and shares[1] > 0.99
    plain, loud_ = (result.row(m, "uniform") for m in ("plain", "loud"))
    assert result.estimate[loud_, 0] < 0.1 * result.estimate[plain, 0]  # distances see nothing else
    area = INDICES.index("AUROC")
    # the probe standardises, and sees through it
    assert abs(float(result.value[loud_, area] - result.value[plain, area])) < 0.05


def test_what_cannot_be_measured_is_refused() -> None:
    x = sites(1.0, 1)

    def measure(activations=None, labels=LABELS, topics=TOPICS, **more):
        return measure_aqi(
            {"m": x} if activations is None else activations, labels, topics, **(ROWS | FEW | more)
        )

    with pytest.raises(ValueError, match="topic 't000' .1 such. is in training and in test"):
        measure(test=torch.cat([ROWS["test"], torch.tensor([0])]))
    with pytest.raises(ValueError, match="the test part has 0 topics with a negative prompt: both"):
        measure(labels=LABELS | (torch.arange(N) >= 2 * TRAIN))
    with pytest.raises(ValueError, match="the train.* part has 2 topics .* at least 4 topics each"):
        measure(train=torch.arange(4))
    with pytest.raises(ValueError, match="no activations were given"):
        measure({})
    with pytest.raises(ValueError, match="read all checkpoints at the same sites"):
        measure({"m": x, "n": {"0.resid_post": x["0.resid_post"]}})
    with pytest.raises(ValueError, match="pooling needs .prompt, d_model. of one width"):
        measure({"m": {**x, "1.resid_post": torch.zeros(N, 3)}})
    with pytest.raises(ValueError, match="reference 'q' is none of m"):
        measure(reference="q")
    with pytest.raises(ValueError, match="120 prompts with 1 texts"):
        measure(texts=["a"])
    with pytest.raises(ValueError, match="10 permutations were asked: ask for at least 20"):
        measure(permutations=10)
    bad = {s: t.clone() for s, t in x.items()}
    bad["1.resid_post"][4, 2] = math.nan
    with pytest.raises(ValueError, match="site 1.resid_post of m holds 1 values that are NaN"):
        measure({"m": bad})
    with pytest.warns(UserWarning, match="only 5 groups"):
        few = measure(test=torch.arange(2 * TRAIN, 2 * TRAIN + 10))
    assert any("There are only 5 test topics" in note for note in few.notes)


def test_results_are_saved_and_repeat(tmp_path: Path) -> None:
    result = found()
    again = AQI.load(result.save(tmp_path / "aqi"))
    assert again.frame().equals(result.frame())
    assert again.frame_relative().equals(result.frame_relative())
    assert torch.equal(again.alpha, result.alpha) and str(again) == str(result)
    one, two = (measure_aqi({"m": sites(2.0, 1)}, LABELS, TOPICS, **ROWS, **FEW) for _ in range(2))
    assert one.frame().equals(two.frame())


def test_figures_say_what_they_show() -> None:
    result = found()
    for index in ("F/(1+F)", "AUROC", "XBI", "Dunn"):
        ax = result.plot(index=index)
        assert ax.get_ylabel() and ax.get_xlabel() == "checkpoint"
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert any("shuffled labels" in n for n in names) and "learned" in names
    with pytest.raises(ValueError, match="there is no index 'AQI'"):
        result.plot(index="AQI")
    alpha = result.plot_alpha()
    assert "layer" in alpha.get_xlabel() and "adds up to 1" in alpha.get_ylabel()
    heights = [p.get_height() for p in alpha.containers[1].patches]
    assert sum(heights) == pytest.approx(1, abs=1e-5)
    apart = result.plot_separation("far")
    assert "standard deviations" in apart.get_xlabel() and apart.get_ylabel() == "test prompts"
    r = result.row("far")
    positive = result.projection[r][result.positive]
    assert positive.mean() > 0 > result.projection[r][~result.positive].mean()
