"""Files are whole or absent; results come back as they went, and foreign ones are refused."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from probes import files
from probes.progress import progress
from probes.results import Record, Result, check_finite, versions

# ---- files ------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("at", ["fsync", "replace", "write"])
def test_a_failed_write_leaves_the_old_file(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    if at == "write":
        with pytest.raises(ValueError, match="NaN|JSON compliant"):
            files.write_json(path, {"a": float("nan")})
    else:
        with monkeypatch.context() as patch:
            patch.setattr(*((os, "fsync") if at == "fsync" else (Path, "replace")), fail)
            with pytest.raises(OSError, match="disk full"):
                files.write_json(path, {"a": 2})
    assert path.read_bytes() == before
    assert names(tmp_path) == ["value.json"]


def test_writes_replace_and_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    files.write_json(path, {"b": [1, 2], "a": "ä"})
    first = path.read_bytes()
    files.write_json(path, {"a": "ä", "b": [1, 2]})
    assert path.read_bytes() == first
    assert first.endswith(b"\n")
    files.write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    assert names(path.parent) == ["value.json"]


def test_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "in" / "model"

    def fail() -> None:
        with files.folder(target) as folder:
            (folder / "half").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(target.parent) == []
    with files.folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("one")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "one"
    with files.folder(target) as folder:  # somebody was faster
        (folder / "other").write_text("two")
    assert names(target) == ["sub"]
    assert names(target.parent) == ["model"]


def test_hashes_follow_the_content(tmp_path: Path, own_cache: Path) -> None:
    path, twin = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"1234")
    twin.write_bytes(b"1234")
    first = files.sha256(path)
    assert first == files.sha256(twin)
    assert first == "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4"
    path.write_bytes(b"1235")
    os.utime(path, ns=(0, 1))
    assert files.sha256(path) != first
    for memo in (own_cache / "hashes").iterdir():  # a memo torn by another program
        memo.write_text("03ac")
    assert files.sha256(twin) == first


def test_the_cache_folder_can_be_chosen(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.cache_dir() == own_cache
    monkeypatch.delenv("ALIGNLENS_CACHE")
    assert files.cache_dir().name == "alignlens"


# ---- results ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example(Result):
    """A result with every kind of field."""

    values: Tensor
    name: str
    pair: tuple[int, ...]
    nested: dict[str, Any]
    extra: Tensor | None = None

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame({"value": self.values.tolist()})

    def __str__(self) -> str:
        return f"{self.name} <b>"


@dataclass(frozen=True)
class Other(Result):
    name: str = "other"


RECORD = Record(models=("a", "b"), seeds=(1, 2), settings={"layers": (1, 2), "share": True})


def example(**changes: Any) -> Example:
    given: dict[str, Any] = {
        "values": torch.arange(6.0).view(2, 3).T,  # not contiguous
        "name": "naïve",
        "pair": (1, 2),
        "nested": {"a": (1.5, None), "b": {"c": (True, "x")}},
        "record": RECORD,
    }
    return Example(**{**given, **changes})


def message(act: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


def test_a_result_comes_back_as_it_went(tmp_path: Path) -> None:
    first = example()
    assert first.save(tmp_path / "run") == tmp_path / "run"
    second = Example.load(tmp_path / "run")
    assert torch.equal(second.values, first.values)
    assert second.values.dtype == torch.float32
    for field in ("name", "pair", "nested", "extra", "record"):
        assert getattr(second, field) == getattr(first, field), field
    assert names(tmp_path / "run") == ["record.json", "result.json", "result.safetensors"]
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    second.save(tmp_path / "run")
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_saving_again_leaves_nothing_of_the_old_result(tmp_path: Path) -> None:
    example().save(tmp_path)
    Other().save(tmp_path)
    assert Other.load(tmp_path) == Other()
    assert names(tmp_path) == ["record.json", "result.json"]


def test_foreign_and_damaged_results_are_refused(tmp_path: Path) -> None:
    assert "holds no result.json: give the folder of a saved run" in (
        message(lambda: Example.load(tmp_path), FileNotFoundError)
    )
    example().save(tmp_path)
    assert "holds a Example, expected a Other" in message(lambda: Other.load(tmp_path))
    good = json.loads((tmp_path / "result.json").read_text())

    def with_json(text: str) -> str:
        (tmp_path / "result.json").write_text(text)
        return message(lambda: Example.load(tmp_path))

    assert "has format 9, this version reads 1" in with_json(json.dumps({**good, "format": 9}))
    assert "result.json is missing or damaged" in with_json("{")
    assert "is no saved result: it holds a list" in with_json("[1]")
    assert "the Example in" in with_json(json.dumps({**good, "unknown": 1}))
    missing = {key: value for key, value in good.items() if key != "name"}
    assert "is damaged" in with_json(json.dumps(missing))
    (tmp_path / "result.json").write_text(json.dumps(good))
    data = (tmp_path / "result.safetensors").read_bytes()
    (tmp_path / "result.safetensors").write_bytes(data[:-5])
    assert "is damaged" in message(lambda: Example.load(tmp_path))
    (tmp_path / "result.safetensors").write_bytes(data)
    (tmp_path / "record.json").unlink()
    assert "record.json is missing or damaged" in message(lambda: Example.load(tmp_path))


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    assert "a result field holds set: use a tensor or plain values" in (
        message(lambda: example(nested={"a": {1}}).save(tmp_path), TypeError)
    )
    assert "JSON compliant" in message(lambda: example(nested={"a": float("inf")}).save(tmp_path))


def test_results_show_themselves_safely() -> None:
    shown = example()._repr_html_()
    assert "naïve &lt;b&gt;" in shown
    assert "<table" in shown
    assert "Other has no table" in message(lambda: Other().frame(), NotImplementedError)


def test_records_know_the_versions() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] in torch.__version__
    assert found["python"].startswith("3.")
    assert Record().versions == found


def test_check_finite() -> None:
    check_finite(torch.ones(2, 2), "it")
    bad = torch.ones(2, 3)
    bad[1, 2], bad[0, 1] = float("nan"), float("-inf")
    with pytest.raises(ValueError, match=r"it holds 2 values that are NaN .* at index \(0, 1\)"):
        check_finite(bad, "it")


# ---- progress ---------------------------------------------------------------------------------


def test_progress_is_quiet_for_short_jobs_and_plain_for_long_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress(10, "working") as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with progress(10, "working") as advance:
        advance(3)
        now += 6
        advance(1)
        advance(1)
    assert capsys.readouterr() == ("", "working: 4 of 10\n")
    with progress(10, "working", enabled=False) as advance:
        now += 60
        advance(3)
    assert capsys.readouterr() == ("", "")
