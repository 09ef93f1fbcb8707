"""Finding the checkpoint at which a property broke, and comparing two reports."""

import json
import math
from pathlib import Path

import pytest
import tiny_lineage

from analyses.differences import Differences, compare_reports
from analyses.drift.bisect import Bisection, bisect, checkpoints_in
from analyses.drift.measured import ledger_property, refusal_property
from probes.scores import Interval

NAMES = [f"step-{i}" for i in range(20)]


class Played:
    """A property that breaks at a given step, and counts what is measured."""

    def __init__(self, breaks_at: int, width: float = 0.1) -> None:
        self.breaks_at, self.width = breaks_at, width
        self.asked: list[str] = []

    def __call__(self, name: str) -> Interval:
        self.asked.append(name)
        value = float(int(name.rpartition("-")[2]) >= self.breaks_at)
        return Interval(value, value - self.width, value + self.width)


@pytest.mark.parametrize("breaks_at", range(1, 20))
def test_the_first_broken_checkpoint_is_found_with_few_measurements(breaks_at: int) -> None:
    played = Played(breaks_at)
    found = bisect(NAMES, played, 0.5, what="drift")
    assert (found.last_holding, found.first_broken) == (NAMES[breaks_at - 1], NAMES[breaks_at])
    assert len(played.asked) <= 2 + math.ceil(math.log2(19)) and found.sure and found.monotone
    below = bisect(
        NAMES, lambda n: Interval(*(1 - x for x in played(n))), 0.5, what="x", breaks="below"
    )
    assert below.first_broken == NAMES[breaks_at]


def test_a_property_that_never_or_always_is_broken_is_said() -> None:
    never = bisect(NAMES, Played(99), 0.5, what="drift")
    assert never.first_broken is None and "drift holds to the last checkpoint (2 of 20" in str(
        never
    )
    always = bisect(NAMES, Played(0), 0.5, what="drift")
    assert always.last_holding is None and "broken in the first checkpoint already" in str(always)


def test_doubt_is_said() -> None:
    unsure = bisect(NAMES, Played(7, width=0.6), 0.5, what="drift")
    assert not unsure.sure and "so the place is not sure" in str(unsure)

    def back(name: str) -> Interval:
        value = float(name in ("step-5", "step-19"))
        return Interval(value, value, value)

    assert bisect(NAMES, back, 0.5, what="drift").first_broken == "step-19"  # halving cannot know
    every = bisect(NAMES, back, 0.5, what="drift", every=True)
    assert every.first_broken == "step-5" and not every.monotone
    assert "more than one crossing" in str(every)


def test_the_place_is_before_the_first_broken_one_where_the_course_is_not_monotone() -> None:
    def course(*states: int) -> Bisection:
        names = [f"c{i}" for i in range(len(states))]
        measure = lambda n: Interval(*[float(states[int(n[1:])])] * 3)  # noqa: E731
        return bisect(names, measure, 1.0, what="drift", every=True)

    back = course(0, 2, 0, 2)
    assert (back.last_holding, back.first_broken) == ("c0", "c1") and not back.monotone
    assert "breaks between c0 and c1" in str(back)
    assert "broken in the first checkpoint already" in str(course(2, 0, 2))


def test_measurements_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    one, two = Played(3), Played(5)
    bisect(NAMES, one, 0.5, what="drift", keep=path, settings={"prompts": "a", "seed": 0})
    with pytest.raises(ValueError, match="asked is .*'prompts': 'b'.*: give another folder"):
        bisect(NAMES, two, 0.5, what="drift", keep=path, settings={"prompts": "b", "seed": 0})
    assert two.asked == []
    again = Played(3)
    found = bisect(NAMES, again, 0.5, what="drift", keep=path, settings={"seed": 0, "prompts": "a"})
    assert again.asked == [] and found.first_broken == "step-3"


def test_a_limit_may_be_made_of_the_first_checkpoint(tmp_path: Path) -> None:
    path, played = tmp_path / "measured.json", Played(4)
    for _ in range(2):  # the second time nothing is measured, the limit's checkpoint neither
        found = bisect(NAMES, played, lambda at: at.value + 0.25, what="drift", keep=path)
        assert found.limit == 0.25 and found.first_broken == "step-4"
    assert len(played.asked) == len(set(played.asked))


def test_finished_measurements_are_not_made_again(tmp_path: Path) -> None:
    played = Played(13)

    def killed(name: str) -> Interval:
        if len(played.asked) == 3:
            raise KeyboardInterrupt
        return played(name)

    with pytest.raises(KeyboardInterrupt):
        bisect(NAMES, killed, 0.5, what="drift", keep=tmp_path / "measured.json")
    first = list(played.asked)
    found = bisect(NAMES, played, 0.5, what="drift", keep=tmp_path / "measured.json")
    assert found.first_broken == "step-13" and len(set(played.asked)) == len(played.asked)
    assert played.asked[:3] == first
    with pytest.raises(ValueError, match="with what 'drift', asked is 'refusals'"):
        bisect(NAMES, played, 0.5, what="refusals", keep=tmp_path / "measured.json")
    (tmp_path / "measured.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged .* delete it to measure again"):
        bisect(NAMES, played, 0.5, what="drift", keep=tmp_path / "measured.json")


def test_a_bisection_is_saved_drawn_and_loaded(tmp_path: Path) -> None:
    found = bisect(NAMES, Played(4), 0.5, what="drift (nulls)")
    again = Bisection.load(found.save(tmp_path))
    assert str(again) == str(found) and found.plot().get_ylabel() == "drift (nulls)"
    assert found.frame()["broken"].sum() == sum(found.broken(i) for i in range(len(found.measured)))


def test_wrong_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="1 checkpoints were given: give 2 or more"):
        bisect(["a"], Played(1), 0.5, what="x")
    with pytest.raises(ValueError, match="named twice"):
        bisect(["a", "a"], Played(1), 0.5, what="x")
    with pytest.raises(ValueError, match="expected 'above' or 'below'"):
        bisect(NAMES, Played(1), 0.5, what="x", breaks="beside")
    with pytest.raises(ValueError, match="x of step-0 is not a number"):
        bisect(NAMES, lambda _: Interval(math.nan, 0, 1), 0.5, what="x")


def test_folders_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for n in (100, 20, 3):
        (tmp_path / f"checkpoint-{n}").mkdir()
        (tmp_path / f"checkpoint-{n}" / "adapter_config.json").write_text("{}")
    (tmp_path / "logs").mkdir()
    with pytest.raises(ValueError, match="say with --model what they go on top of"):
        checkpoints_in(tmp_path)
    found = checkpoints_in(tmp_path, "org/model")
    assert [name.rpartition("-")[2] for name in found] == ["3", "20", "100"]
    assert found[0].startswith("org/model+")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="keep one kind in a folder"):
        checkpoints_in(tmp_path, "org/model")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        checkpoints_in(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds 0 checkpoints"):
        checkpoints_in(tmp_path / "empty")


def test_properties_of_named_checkpoints(tmp_path: Path) -> None:
    names = [tiny_lineage.save(tmp_path / f"m{i}", first) for i, first in enumerate((None, 1, 2))]
    contrast = tiny_lineage.pairs(20)
    rate = refusal_property(contrast, True)(names[0])
    assert rate.value == 0.0 and rate.high > 0.1  # random words refuse nothing
    measure = ledger_property(names[0], names[1], contrast, "headline")
    assert measure(names[1]) == (0.0, 0.0, 0.0) and measure(names[2]).value > 0
    assert ledger_property(names[0], names[1], contrast, "weight")(names[0]).low > 1
    with pytest.raises(ValueError, match="unknown term 'mood'"):
        ledger_property(names[0], names[1], contrast, "mood")


def report(folder: Path, rows: dict[str, tuple], **record: object) -> Path:
    table = []
    for quantity, (value, *limits) in rows.items():
        low, high = limits or ("", "")
        row = {"panel": "a", "quantity": quantity, "model": "m", "group": "", "layer": ""}
        table.append(row | {"value": value, "low": low, "high": high})
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"table": table}))
    (folder / "record.json").write_text(json.dumps({"seconds": 3, **record}))
    return folder


def test_numbers_that_moved_beyond_their_intervals_are_told(tmp_path: Path) -> None:
    before = report(
        tmp_path / "a",
        {"far": (0.1, 0.05, 0.15), "near": (0.5, 0.4, 0.6), "bare": (1.0,), "same": (2.0,), "old": (1.0,)},
        engine="x", settings={"seed": 1},
    )  # fmt: skip
    after = report(
        tmp_path / "b",
        {"far": (0.3, 0.25, 0.35), "near": (0.6, 0.5, 0.7), "bare": (1.5,), "same": (2.0,), "new": (1.0,)},
        engine="y", settings={"seed": 2},
    )  # fmt: skip
    found = compare_reports(before, after)
    moved = [found.keys[i][1] for i in found.moved]
    assert moved == ["far"] and [found.keys[i][1] for i in found.unsure] == ["bare"]
    low, high = found.limits[0] or (0, 0)
    assert (low, high) == pytest.approx((0.2 - 0.05 * 2**0.5, 0.2 + 0.05 * 2**0.5))
    assert found.settings == (("engine", "x", "y"), ("settings.seed", "1", "2"))
    assert "1 of 4 shared numbers moved" in str(found) and "1 more differ" in str(found)
    assert found.frame()["moved"].tolist() == [True, False, False, False]
    assert Differences.load(found.save(tmp_path / "c")).limits == found.limits
    assert len(found.plot().get_yticklabels()) == 1
    same = compare_reports(before, before)
    assert not same.moved and "none of 5 shared numbers moved beyond its interval" in str(same)


def test_folders_that_are_no_reports_are_refused(tmp_path: Path) -> None:
    good = report(tmp_path / "a", {"x": (1.0,)})
    other = report(tmp_path / "b", {"y": (1.0,)})
    with pytest.raises(FileNotFoundError, match="holds no result.json"):
        compare_reports(good, tmp_path)
    with pytest.raises(ValueError, match="share no number"):
        compare_reports(good, other)
    (other / "result.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="holds no table of numbers"):
        compare_reports(good, other)
