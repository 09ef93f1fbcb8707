"""`alignlens drift`, `bisect` and `diff` on tiny checkpoints: what they write, keep and refuse."""

import json
import shutil
from pathlib import Path

import commanding
import pytest
import tiny
import tiny_lineage
from commanding import Run

from analyses.drift import yardstick
from analyses.drift.bisect import Bisection
from analyses.drift.course import DriftCourse
from analyses.drift.ledger import DriftLedger


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints, and twins in a file."""
    root = tmp_path_factory.mktemp("drift")
    for name, first in (("base", None), ("aligned", 1), ("step-1", 2), ("step-2", 0)):
        tiny_lineage.save(root / name, first)
    rows = [{"positive": f"w7 {t}", "negative": f"w8 {t}"} for t in tiny.words(60, seed=3)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(files)
    return commanding.runner(monkeypatch, capfd)


ASKED = ("--drifted", "step-1", "--drifted", "step-2", "--prompts", "pairs.jsonl",
         "--resamples", 50)  # fmt: skip


def test_the_ledger_is_written_and_measured_once(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("drift", "base", "aligned", *ASKED, "--course", "--out", "ledger")
    assert first.code == 0, first.err
    assert "drift from aligned" in first.out and "beyond its null first" in first.out
    out = files / "ledger"
    for name in (
        "ledger.png",
        "ledger.svg",
        "layers.png",
        "table.csv",
        "result.json",
        "record.json",
    ):
        assert (out / name).stat().st_size > 0, name
    ledger = DriftLedger.load(out)
    assert ledger.labels == ("base", "step-1", "step-2", "aligned, bf16", "aligned, int8")
    assert DriftCourse.load(out / "course").steps == ("step-1", "step-2")

    def measured(*_: object, **__: object) -> None:
        raise AssertionError("measured twice")

    with monkeypatch.context() as patch:
        patch.setattr(yardstick.Yardstick, "measure", measured)
        again = run("drift", "base", "aligned", *ASKED, "--out", "ledger", "--json")
    assert again.code == 0 and "step-1: measured before" in again.err
    assert len(json.loads(again.out)) == 5 * 5
    shutil.rmtree(out / "checkpoints" / "step-1")  # as if killed before it was finished
    third = run("drift", "base", "aligned", *ASKED, "--out", "ledger")
    assert "measuring step-1" in third.err and "step-2: measured before" in third.err
    assert str(DriftLedger.load(out)) == str(ledger)


def test_other_prompts_and_roles_are_measured_anew(run: Run, files: Path) -> None:
    asked = ("--drifted", "step-1", "--resamples", 20, "--topics", 12, "--out", "kept")
    rows = [{"positive": f"w3 {t}", "negative": f"w4 {t}"} for t in tiny.words(60, seed=9)]
    (files / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("drift", "base", "aligned", *asked, "--prompts", "pairs.jsonl").code == 0
    first = DriftLedger.load(files / "kept")
    other = run("drift", "base", "aligned", *asked, "--prompts", "others.jsonl")
    assert other.code == 0 and "measured before" not in other.err
    assert DriftLedger.load(files / "kept").record.prompts_hash != first.record.prompts_hash
    role = run(
        "drift", "base", "aligned", "--drifted", "step-2", "--control", "step-1", *asked[2:],
        "--prompts", "others.jsonl",
    )  # fmt: skip
    assert role.code == 0 and "measuring step-1" in role.err
    found = DriftLedger.load(files / "kept")
    assert dict(zip(found.labels, found.roles, strict=True))["step-1"] == "control"


def test_checkpoints_of_one_name_are_told_apart(run: Run, files: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(
            files / f"step-{1 if name == 'one' else 2}", files / f"run-{name}" / "final"
        )
    said = run("drift", "base", "aligned", "--drifted", "run-one/final", "--drifted", "run-two/final",
               "--prompts", "pairs.jsonl", "--resamples", 20, "--topics", 12, "--out", "twice",
               )  # fmt: skip
    assert said.code == 0, said.err
    assert DriftLedger.load(files / "twice").labels[1:3] == ("run-one/final", "run-two/final")


def test_a_rate_of_zero_cannot_break_below_its_half(run: Run) -> None:
    said = run("bisect", "aligned", "step-1", "--prompts", "pairs.jsonl", "--out", "zero")
    assert said.code == 2 and "refuses none of the prompts" in said.err


def test_a_dry_run_says_what_it_takes(run: Run, files: Path) -> None:
    said = run("drift", "base", "aligned", *ASKED, "--dry-run", "--out", "none")
    assert said.code == 0 and "6 checkpoints" in said.out and not (files / "none").exists()
    said = run("bisect", "aligned", "step-1", "step-2", "--dry-run", "--prompts", "pairs.jsonl")
    assert said.code == 0 and "3 checkpoints, 3 of them measured at most" in said.out


def test_a_property_is_bisected(run: Run, files: Path) -> None:
    said = run(
        "bisect", "aligned", "step-1", "step-2", "--base", "base", "--property", "headline",
        "--limit", 0.0001, "--prompts", "pairs.jsonl", "--out", "broke",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "breaks between aligned and step-1" in said.out
    found = Bisection.load(files / "broke")
    assert found.first_broken == "step-1" and (files / "broke" / "bisect.png").is_file()
    rates = run("bisect", "aligned", "step-1", "--prompts", "pairs.jsonl", "--limit", 0.5,
                "--json", "--out", "rates")  # fmt: skip
    assert rates.code == 0 and json.loads(rates.out)["measured"][0]["value"] == 0.0


def test_mistakes_are_one_sentence(run: Run) -> None:
    for arguments, said in (
        (("drift", "base", "aligned"), "no drifted model was given: say which with --drifted"),
        (("drift", "base", "aligned", "--drifted", "step-1", "--course"), "--course needs"),
        (("drift", "base", "nowhere/at/all", "--drifted", "step-1"), "nowhere/at/all"),
        (("bisect", "aligned", "step-1", "--property", "mood"), "unknown property 'mood'"),
        (("bisect", "aligned", "step-1", "--property", "token"), "say it with --base"),
        (("diff", "base", "aligned"), "holds no result.json"),
    ):
        outcome = run(*arguments)
        assert outcome.code == 2 and said in outcome.err, (arguments, outcome)
        assert len(outcome.err.strip().splitlines()) == 1, outcome.err


def test_two_reports_are_compared(run: Run, files: Path) -> None:
    for name, value in (("one", 0.2), ("two", 0.6)):
        (files / name).mkdir()
        row = {"panel": "a", "quantity": "rate", "model": "m", "group": "", "layer": "",
               "value": value, "low": value - 0.1, "high": value + 0.1}  # fmt: skip
        (files / name / "result.json").write_text(json.dumps({"table": [row]}))
    said = run("diff", "one", "two", "--out", "difference")
    assert said.code == 0 and "1 of 1 shared numbers moved" in said.out
    assert (files / "difference" / "differences.png").is_file()
    rows = json.loads(run("diff", "one", "one", "--json").out)["table"]
    assert [row["moved"] for row in rows] == [False]


def test_help_is_light(run: Run) -> None:
    for verb in ("drift", "bisect", "diff"):
        assert run(verb, "--help").code == 0
