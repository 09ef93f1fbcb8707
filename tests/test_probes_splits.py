"""Splits keep topics whole and strata even, and shuffles keep the topics' structure."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.splits import codes, folds, leave_one_out, shuffled, split, twins, warn_if_few

TOPICS = [f"t{i:02d}" for i in range(60) for _ in range(4)]
HAZARD = ["fraud" if i < 30 else "arms" if i < 50 else "drugs" for i in range(60) for _ in range(4)]


def names(rows: torch.Tensor, of: list[str]) -> set[str]:
    return {of[i] for i in rows.tolist()}


@settings(max_examples=30, deadline=None)
@given(
    owner=st.lists(st.integers(0, 25), min_size=40, max_size=80).filter(
        lambda x: len(set(x)) >= 20
    ),
    seed=st.integers(0, 999),
)
def test_every_row_once_and_no_topic_in_two_parts(owner, seed):
    groups = [f"t{i}" for i in owner]
    parts = split(groups, seed=seed)
    rows = torch.cat(list(parts.values()))
    assert sorted(rows.tolist()) == list(range(len(groups)))
    held = [names(part, groups) for part in parts.values()]
    assert sum(map(len, held)) == len(set(groups))


def test_strata_keep_their_proportions():
    parts = split(TOPICS, strata=HAZARD)
    for name, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        topics = names(parts[name], TOPICS)
        for hazard, size in (("fraud", 30), ("arms", 20), ("drugs", 10)):
            inside = sum(HAZARD[TOPICS.index(topic)] == hazard for topic in topics)
            assert abs(inside - share * size) <= 1, (name, hazard)
        assert abs(len(topics) - share * 60) <= 1
    # without strata the same seed is off by more somewhere, or strata do nothing
    plain = [names(split(TOPICS, seed=s)["test"], TOPICS) for s in range(20)]
    drugs = [sum(HAZARD[TOPICS.index(t)] == "drugs" for t in topics) for topics in plain]
    assert max(abs(d - 2) for d in drugs) > 1


def test_no_part_of_a_stratum_is_off_by_more_than_a_topic():
    generator = torch.Generator().manual_seed(0)
    worst_inside, worst_overall = 0.0, 0.0
    for seed in range(120):
        n, k = (int(torch.randint(a, b, (), generator=generator)) for a, b in ((20, 80), (1, 12)))
        groups = [f"t{i}" for i in range(n)]
        strata = [f"s{int(torch.randint(k, (), generator=generator))}" for _ in groups]
        share = (0.6, 0.2, 0.2) if seed % 2 else (0.7, 0.15, 0.15)
        parts = split(
            groups, strata=strata, fractions=dict(zip("abc", share, strict=True)), seed=seed
        )
        for part, wanted in zip(parts.values(), share, strict=True):
            worst_overall = max(worst_overall, abs(len(part) - wanted * n))
            for stratum in set(strata):
                held = sum(strata[i] == stratum for i in part.tolist())
                worst_inside = max(worst_inside, abs(held - wanted * strata.count(stratum)))
    assert worst_inside < 1 + 1e-9
    assert worst_overall < 1 + 1e-9


def test_many_strata_of_one_topic_still_fill_the_parts():
    groups = [f"t{i}" for i in range(30)]
    parts = split(groups, strata=groups)
    assert [len(part) for part in parts.values()] == [18, 6, 6]


def test_the_seed_decides():
    one, same, other = (split(TOPICS, strata=HAZARD, seed=s)["test"] for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_order_of_rows_does_not_matter():
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0)).tolist()
    parts = split(TOPICS, strata=HAZARD)
    again = split([TOPICS[i] for i in order], strata=[HAZARD[i] for i in order])
    for part, rows in parts.items():
        assert names(rows, TOPICS) == names(again[part], [TOPICS[i] for i in order])


def test_folds_test_every_row_once():
    found = folds(TOPICS, 5, strata=HAZARD)
    assert sorted(torch.cat([fold.test for fold in found]).tolist()) == list(range(240))
    for fold in found:
        assert not names(fold.train, TOPICS) & names(fold.test, TOPICS)
        assert len(fold.train) + len(fold.test) == 240
        assert len(names(fold.test, TOPICS)) == 12


def test_leave_one_out_tests_one_stratum_at_a_time():
    found = leave_one_out(HAZARD)
    assert set(found) == {"fraud", "arms", "drugs"}
    for hazard, fold in found.items():
        assert names(fold.test, HAZARD) == {hazard}
        assert hazard not in names(fold.train, HAZARD)


def test_few_groups_are_said():
    with pytest.warns(UserWarning, match=r"only 12 groups"):
        assert warn_if_few(TOPICS[:48]) == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_if_few(TOPICS) == 60


def test_codes_number_sorted_names():
    numbers, known = codes(["b", "a", "b"])
    assert numbers.tolist() == [1, 0, 1]
    assert known == ("a", "b")


def test_twins_exchange_their_classes_as_a_whole():
    groups = [f"t{i // 4}" for i in range(80)]
    labels = torch.arange(80) % 4 < 2
    drawn = shuffled(labels, groups, 400, torch.Generator().manual_seed(0))
    turned = (drawn != labels[:, None]).reshape(20, 4, 400)
    assert bool((turned == turned[:, :1]).all())
    assert abs(float(turned.double().mean()) - 0.5) < 0.03
    assert bool((drawn.sum(0) == 40).all())
    assert len({tuple(c) for c in drawn.T.tolist()}) > 390


def test_single_class_topics_exchange_labels_with_each_other():
    groups = [f"t{i // 3}" for i in range(60)]
    labels = torch.arange(60) < 24
    drawn = shuffled(labels, groups, 300, torch.Generator().manual_seed(0))
    blocks = drawn.reshape(20, 3, 300)
    assert bool((blocks == blocks[:, :1]).all())
    assert bool((blocks[:, 0].sum(0) == 8).all())
    assert abs(float(drawn[0].double().mean()) - 0.4) < 0.1


def test_twins_pair_the_classes_in_order():
    high, low = twins(torch.tensor([1, 0, 0, 1, 0, 1]).bool(), ["b", "b", "a", "a", "b", "b"])
    assert (high.tolist(), low.tolist()) == ([3, 0, 5], [2, 1, 4])


@pytest.mark.filterwarnings("ignore:only")
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: codes([]), "no group names"),
        (lambda: split(TOPICS, fractions={"a": 0.5, "b": 0.6}), "add up to 1"),
        (lambda: split(["a", "b"]), "2 groups leave"),
        (lambda: split(TOPICS, strata=["x"]), "240 examples came with 1 strata"),
        (lambda: folds(["a", "b"], 3), "3 folds were asked of 2 groups"),
        (lambda: leave_one_out(["x", "x"]), "one stratum only, 'x'"),
        (
            lambda: twins(torch.tensor([True, True, False]), ["a"] * 3),
            "2 positive and 1 negative examples",
        ),
    ],
)
def test_refusals(act, message):
    with pytest.raises(ValueError, match=r".") as caught:
        act()
    assert message in str(caught.value)
