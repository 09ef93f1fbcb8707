"""Shares of a gap: their limits, gaps that lie in one topic, and what is said where no null is."""

import warnings
from typing import Any

import numpy as np
import pytest
import tiny_lineage
import torch
from torch import Tensor

from analyses.drift.attribution import attribute_drift
from analyses.patching.grid import patch_map
from analyses.patching.metrics import gap_note, share_interval
from analyses.patching.patch import patch
from analyses.patching.sources import From
from analyses.patching.spans import Spans

CLEAN = [f"w{k} w{k + 1} w5 w6" for k in range(0, 48, 2)]


def drawn(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of a gap that varies from group to group, and noise."""
    noise = torch.randn(2, n, generator=generator, dtype=torch.float64)
    gap = 1 + 0.8 * noise[0]
    return 0.5 * gap + 0.3 * noise[1], gap


def test_limits_are_those_of_the_linear_ratio_by_scipy() -> None:
    from scipy import stats

    change, gap = drawn(12, torch.Generator().manual_seed(3))
    found = share_interval(change, gap, [str(i) for i in range(12)], resamples=20000, seed=0)
    value = float(change.mean() / gap.mean())
    assert float(found.value) == pytest.approx(value, rel=1e-12)
    rest = ((change - value * gap) / gap.mean()).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = stats.bootstrap(
            (rest,), lambda x, axis: x.mean(axis), n_resamples=20000, method="BCa",
            rng=np.random.default_rng(0),
        )  # fmt: skip
    wider = stats.t.ppf(0.975, 11) / stats.norm.ppf(0.975) * (12 / 11) ** 0.5
    want = [value + wider * float(x) for x in made.confidence_interval]
    width = want[1] - want[0]
    assert [float(found.low), float(found.high)] == pytest.approx(want, abs=0.03 * width)
    # a change that is so much of the gap moves the limits by just that
    moved = share_interval(change + 2 * gap, gap, [str(i) for i in range(12)],
                           resamples=20000, seed=0)  # fmt: skip
    assert float(moved.low) == pytest.approx(float(found.low) + 2, rel=1e-9)
    assert float(moved.high) == pytest.approx(float(found.high) + 2, rel=1e-9)


def test_limits_hold_the_share_about_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(7)
    topics = [str(i) for i in range(12)]
    inside = 0
    for trial in range(300):
        change, gap = drawn(12, generator)
        found = share_interval(change, gap, topics, resamples=400, seed=trial)
        inside += bool(found.low <= 0.5 <= found.high)
    assert 0.93 <= inside / 300 <= 0.985  # BCa limits of the ratio itself: 0.90


def test_a_gap_in_one_topic_has_shares_without_limits() -> None:
    topics = [str(i) for i in range(12)]
    gap = torch.tensor([5.0] + [0.0] * 11)
    change = torch.stack([torch.full((12,), 0.1), gap])
    found = share_interval(change, gap, topics, resamples=200, seed=0)
    assert found.value.tolist() == pytest.approx([0.24, 1])
    assert found.low.isnan().all() and found.high.isnan().all()
    assert gap_note(gap, topics) == (
        "The gap lies in one of 12 topics: shares of it have no limits.",
    )
    two = torch.tensor([5.0, 4.0] + [0.0] * 10)
    assert share_interval(change, two, topics, resamples=200, seed=0).low.isfinite().all()
    assert gap_note(two, topics) == (
        "The gap is not told from 0 over 12 topics: limits of its shares are rough.",
    )
    assert gap_note(torch.arange(1.0, 13), topics) == ()
    assert gap_note(torch.zeros(12), topics) == gap_note(torch.full((12,), torch.nan), topics) == ()


class OneTopic:
    """1 in the first prompt of a run whose logits are the second model's, else 0."""

    name, unit = "hits", "share"

    def __init__(self, reference: Tensor) -> None:
        self.reference = reference

    def __call__(self, logits: Tensor) -> Tensor:
        hit = (logits[0] - self.reference[0]).abs().max() < 1e-3
        return torch.tensor([float(hit)] + [0.0] * (len(logits) - 1))


def test_a_metric_of_0_and_1_can_differ_in_one_topic() -> None:
    target, source = tiny_lineage.hooked("target"), tiny_lineage.hooked("source", 1, seed=1)
    metric = OneTopic(source.logits(CLEAN))
    found = patch(target, CLEAN, From(model=source), "2.resid_post", metric, draws=2,
                  progress=False)  # fmt: skip
    assert float(found.share[0]) == 1 and found.share[1:].isnan().all()
    assert found.change.isfinite().all()
    said = "The gap lies in one of 24 topics: shares of it have no limits."
    assert found.notes == (said,)
    many = patch_map(target, CLEAN, From(model=source), metric, "parts", columns=["resid_post"],
                     draws=2, progress=False)  # fmt: skip
    assert many.share.isfinite().all() and many.share_low.isnan().all() and said in many.notes
    which = attribute_drift(
        source, target, validation=CLEAN, test=[f"w9 {p}" for p in CLEAN], heads=1, draws=2,
        metric=OneTopic(source.logits(CLEAN)), progress=False,
    )  # fmt: skip
    assert said in which.notes and which.single_low.isnan().all()


def test_spans_have_no_null_and_the_map_says_so() -> None:
    target, source = tiny_lineage.hooked("target"), tiny_lineage.hooked("source", 1, seed=1)
    first = {"first": [p.split()[0] for p in CLEAN]}
    options: dict[str, Any] = {"kind": "parts", "draws": 3, "progress": False}
    metric = OneTopic(source.logits(CLEAN))
    found = patch_map(target, CLEAN, From(model=source), metric, positions=Spans(first, first),
                      **options)  # fmt: skip
    assert not len(found.null_change) and found.record is not None
    assert found.notes[0] == (
        "No null was drawn: values of another prompt cannot follow named spans."
    )
    assert found.record.settings["draws"] == 0
    rule = patch_map(target, CLEAN, From(model=source), metric, **options)
    assert len(rule.null_change) == 3 and rule.record is not None
    assert rule.record.settings["draws"] == 3 and "No null" not in " ".join(rule.notes)
    one = patch(target, CLEAN, From(model=source), "1.mlp_out", metric, null=None, progress=False)
    assert one.record is not None and one.record.settings["draws"] == 0
