"""The drift ledger on tiny lineages and on the real one."""

import math
import warnings
from pathlib import Path

import pytest
import tiny
import tiny_lineage
import torch
from architectures import build

from analyses.drift.course import DriftCourse
from analyses.drift.ledger import DriftLedger, drift_ledger, headline, joined
from analyses.drift.readings import compare_weights
from analyses.drift.round_trips import bf16, int8, round_trip
from analyses.drift.terms import TERMS
from analyses.drift.yardstick import Yardstick
from probes import HookedModel, datasets
from probes.contrast import Contrast

PAIRS = 24


@pytest.fixture(scope="module")
def models() -> dict[str, HookedModel]:
    return {
        "base": tiny_lineage.hooked("base"),
        "aligned": tiny_lineage.hooked("aligned", 1, seed=1),
        "other": tiny_lineage.hooked("other", 1, seed=2),
        "near": tiny_lineage.hooked("near", 2, seed=3),
    }


@pytest.fixture(scope="module")
def ledger(models: dict[str, HookedModel]) -> DriftLedger:
    return drift_ledger(
        models["base"],
        models["aligned"],
        [models["aligned"], models["other"]],
        tiny_lineage.pairs(PAIRS),
        resamples=100,
        progress=False,
    )


def test_the_reference_has_not_drifted_from_itself(ledger: DriftLedger) -> None:
    i = ledger.labels.index("aligned")
    for values in (ledger.value, ledger.low, ledger.high, ledger.statistic):
        assert not values[i].any()
    assert ledger.headline("aligned") == (0.0, 0.0, 0.0)
    assert "aligned 0 (identical)" in str(ledger)
    assert not ledger.projection[i].any()


def test_the_base_is_the_alignment_taken_back(ledger: DriftLedger) -> None:
    i = ledger.labels.index("base")
    assert float(ledger.statistic[i, 0]) == pytest.approx(-1.0)
    assert ledger.details[i]["alignment taken back"][0] == pytest.approx(1.0)
    assert "weight" in ledger.claimed("base") and ledger.roles[i] == "base"


def test_round_trips_lie_inside_every_null(ledger: DriftLedger) -> None:
    for label in ("aligned, bf16", "aligned, int8"):
        i = ledger.labels.index(label)
        assert ledger.roles[i] == "control" and not ledger.claimed(label)
        assert bool((ledger.value[i] < 1).all()), (label, ledger.value[i])
        assert ledger.details[i]["relative weight change"][0] > 0  # there was a round trip


def test_layers_below_the_first_change_do_not_move(ledger: DriftLedger) -> None:
    i = ledger.labels.index("other")
    assert not ledger.projection[i, :, 0].any() and bool(ledger.projection[i, :, 1:].any())


def test_the_ledger_is_saved_shown_and_loaded(ledger: DriftLedger, tmp_path: Path) -> None:
    again = DriftLedger.load(ledger.save(tmp_path))
    assert str(again) == str(ledger) and again.details == ledger.details
    table = ledger.frame()
    assert len(table) == len(ledger.labels) * (len(TERMS) + 1)
    assert {"value", "low", "high", "null_95", "claimed"} <= set(table.columns)
    names = [t.get_text() for t in ledger.plot().get_yticklabels()]
    assert "aligned, bf16 (control)" in names
    assert ledger.plot_layers().get_legend() is not None


def test_a_comparison_is_the_difference_with_its_sign(ledger: DriftLedger) -> None:
    there, back = ledger.compare("other", "base"), ledger.compare("base", "other")
    for name in (*TERMS, "headline"):
        assert there[name].value == pytest.approx(-back[name].value)
        assert there[name].low == pytest.approx(-back[name].high)
    assert ledger.compare("other", "other")["token"] == (0.0, 0.0, 0.0)


def test_the_headline_leaves_the_weights_out_and_is_one_at_the_nulls() -> None:
    at = torch.tensor([[900.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])
    assert headline(at).tolist() == pytest.approx([1.0, 0.0, 4 ** (1 / 3) - 1])


def test_weights_are_compared_tensor_by_tensor(models: dict[str, HookedModel]) -> None:
    found = compare_weights(models["base"], models["aligned"], models["other"])
    states = [dict(m.model.state_dict()) for m in models.values()]
    name = found.names[-1]
    for i, name in enumerate(found.names):
        V = states[1][name].double() - states[0][name].double()
        U = states[2][name].double() - states[1][name].double()
        assert float(found.dot[i]) == pytest.approx(float((U * V).sum()), abs=1e-12)
        assert float(found.alignment[i]) == pytest.approx(float(V.square().sum()), abs=1e-12)
    assert int(found.size.sum()) == sum(p.numel() for p in models["base"].model.parameters())


def test_tied_embeddings_count_once() -> None:
    tied = build("gemma2")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    model = HookedModel(tied, tiny_lineage.tiny.tokenizer(), name="tied")
    found = compare_weights(model, model, model)
    assert "lm_head.weight" not in found.names or "model.embed_tokens.weight" not in found.names


def test_checkpoints_of_other_shapes_are_refused(models: dict[str, HookedModel]) -> None:
    biased = HookedModel(build("qwen2"), tiny_lineage.tiny.tokenizer(), name="qwen")
    with pytest.raises(ValueError, match="qwen has 9 tensors that aligned lacks, first model.lay"):
        compare_weights(models["base"], models["aligned"], biased)
    with pytest.raises(ValueError, match="base has no floating point tensor .*q_proj.bias"):
        compare_weights(models["base"], biased, biased)
    wide = tiny_lineage.hooked("wide", vocab=232)
    narrow = len(models["base"].model.get_input_embeddings().weight)
    rows = compare_weights(models["base"], models["aligned"], wide)
    assert narrow == 200 and int(rows.size[0]) % narrow == 0


def test_too_few_topics_and_no_alignment_are_said(models: dict[str, HookedModel]) -> None:
    few = tiny_lineage.pairs(3)
    with pytest.raises(ValueError, match="prompts of 3 topics: the nulls need 4 or more, and 20"):
        Yardstick.of(models["base"], models["aligned"], few)
    with pytest.warns(UserWarning, match="only 6 topics"):
        stick = Yardstick.of(models["aligned"], models["aligned"], tiny_lineage.pairs(6))
    with pytest.raises(ValueError, match="base and aligned have equal weights"):
        stick.measure(models["other"])
    same = Contrast.of_pairs(["w1 w2"] * 6, ["w1 w2"] * 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="both classes have the same states"):
            Yardstick.of(models["base"], models["aligned"], same)


def test_a_base_with_fewer_rows_than_the_reference_is_read(models: dict[str, HookedModel]) -> None:
    """Rows that only the aligned model has change no probability of the ids that both share."""
    small = tiny_lineage.hooked("small")
    wide = tiny_lineage.hooked("wide", vocab=small.layout.vocab_size + 6)
    other = tiny_lineage.hooked("other", 1, seed=1, vocab=small.layout.vocab_size + 6)
    found = drift_ledger(
        small, other, [wide], tiny_lineage.pairs(PAIRS), resamples=50, progress=False
    )
    i, j = found.labels.index("small"), found.labels.index("wide")
    kl = "KL(reference‖checkpoint), positive, nats"
    assert found.details[i][kl][0] >= 0
    # the same weights over the same ids, with and without six more rows
    assert found.details[i][kl][0] == pytest.approx(found.details[j][kl][0], rel=1e-3)


def test_two_checkpoints_of_one_label_are_refused(models: dict[str, HookedModel]) -> None:
    stick = Yardstick.of(models["base"], models["aligned"], tiny_lineage.pairs(PAIRS), resamples=50)
    drift = stick.measure(models["near"])
    with pytest.raises(ValueError, match="two checkpoints of a ledger are called 'near'"):
        DriftLedger.of(stick, [drift, drift])
    one = DriftLedger.of(stick, [drift])
    with pytest.raises(ValueError, match="two checkpoints of a ledger are called 'near'"):
        joined([one, one])


def test_unpaired_topics_of_one_class_are_halved_evenly(models: dict[str, HookedModel]) -> None:
    """Few topics of a class must not all fall into one half, where no mean is left."""
    texts = tiny.words(24, seed=5)
    given = Contrast.labelled(texts, [1] * 6 + [0] * 18)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stick = Yardstick.of(models["base"], models["aligned"], given, resamples=50)
        found = stick.measure(models["near"])
    assert all(math.isfinite(term.value) for term in found.terms)
    assert bool(stick.nulls[0].cells.isfinite().all())


def test_round_trips_are_the_formats() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bf16(bf16(weight)), bf16(weight)) and not torch.equal(bf16(weight), weight)
    error = (int8(weight) - weight).abs()
    assert bool((error <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all())
    assert len(int8(weight)[0].unique()) < 40 and torch.equal(int8(weight[0]), weight[0])
    assert torch.equal(int8(torch.zeros(2, 3)), torch.zeros(2, 3))
    model = tiny_lineage.hooked("m")
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    round_trip(model, "int8")
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    with pytest.raises(ValueError, match="unknown round trip 'fp4': choose one of bf16, int8"):
        round_trip(model, "fp4")


def course(lows: list[list[float]]) -> DriftCourse:
    low = torch.tensor([[*row, 0.0] for row in lows], dtype=torch.float64)
    return DriftCourse("aligned", tuple(f"s{i}" for i in range(len(lows))), low + 1, low, low + 2)


def test_the_order_is_that_of_leaving_the_null_for_good() -> None:
    found = course([[0.5, 0.1, 1.5, 0.2], [2.0, 0.1, 0.9, 0.2], [9.0, 0.1, 1.2, 1.1]])
    assert found.order == (
        ("weight", "s1"),
        ("token", "s2"),  # further out at the same step
        ("behaviour", "s2"),
        ("representation", None),
    )
    assert found.first("token") == "s2"  # s0 was outside, s1 inside again
    assert str(found).endswith("representation never")
    assert found.plot().get_ylim()[0] < 0 and len(found.frame()) == 15


def test_a_course_knows_its_steps(ledger: DriftLedger) -> None:
    with pytest.raises(ValueError, match="'nobody' is not in the ledger"):
        DriftCourse.of(ledger, ["nobody"])
    found = DriftCourse.of(ledger, ["aligned", "other"])
    assert not found.value[0].any() and math.isfinite(float(found.value[1, 4]))


@pytest.mark.slow
def test_the_two_drifts_of_equal_weight_change_are_told_apart_and_from_round_trips() -> None:
    def load(name: str) -> HookedModel:
        return HookedModel.load(f"builtin:{name}", device="cpu")

    found = drift_ledger(
        load("base"),
        load("aligned"),
        [load("drifted"), load("mixed")],
        datasets.safety("test").limited(30),
        resamples=300,
        with_base=False,
        progress=False,
    )
    drifted, mixed = found.details[:2]
    size = "weight change over alignment's"
    assert drifted[size][0] == pytest.approx(mixed[size][0], rel=1e-3)
    apart = found.compare("mixed", "drifted")
    assert apart["weight"].low > 0 and apart["representation"].low > 0 and apart["headline"].low > 0
    for label in found.labels[2:]:
        assert not found.claimed(label) and found.headline(label).high < 0.5
        assert found.compare("drifted", label)["headline"].low > 0
        assert found.compare("mixed", label)["headline"].low > 0
