"""Two reports compared where one has no interval, or one that is no number."""

import json
import math
from pathlib import Path

import pytest

from analyses.differences import compare_reports

NAN = math.nan


def report(folder: Path, *rows: tuple[float, float | str, float | str]) -> Path:
    table = [
        {"panel": "d", "quantity": "c", "model": "m", "group": "", "layer": i}
        | {"value": value, "low": low, "high": high}
        for i, (value, low, high) in enumerate(rows)
    ]
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"table": table}))
    return folder


def test_limits_that_are_no_number_are_unsure(tmp_path: Path) -> None:
    one = report(
        tmp_path / "a",
        (NAN, NAN, NAN), (0.2, NAN, NAN), (0.5, 0.4, 0.6), (0.1, 0.0, 0.2), (NAN, NAN, NAN),
        (0.3, NAN, 0.4),
    )  # fmt: skip
    two = report(
        tmp_path / "b",
        (0.5, 0.4, 0.6), (0.5, 0.4, 0.6), (NAN, 0.1, 0.2), (0.9, 0.8, 1.0), (NAN, NAN, NAN),
        (0.3, 0.2, 0.4),
    )  # fmt: skip
    for first, second in ((one, two), (two, one)):
        found = compare_reports(first, second)
        assert [found.keys[i][4] for i in found.unsure] == ["0", "1", "2"]
        assert [found.keys[i][4] for i in found.moved] == ["3"]
        assert found.limits[:3] == (None, None, None) and found.limits[5] is None
        assert "1 of 6 shared numbers moved" in str(found) and "3 more differ" in str(found)
        assert found.frame()["moved"].tolist() == [True, False, False, False, False, False]


def test_other_folders_are_told_what_is_expected(tmp_path: Path) -> None:
    good = report(tmp_path / "a", (0.5, "", ""))
    other = tmp_path / "b"
    other.mkdir()
    (other / "result.json").write_text(json.dumps({"result": "ProbeSweep", "format": 1}))
    with pytest.raises(ValueError, match="give a folder of `alignlens report`"):
        compare_reports(good, other)
