"""The commands a report prints are read by the command line as what the report was made with."""

import dataclasses
import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_lineage
import typer

from analyses.cli import app
from analyses.pairs import SHIPPED, pairs
from analyses.report import SIZES, Report, Size, measure
from analyses.reproducing import commands

MODELS = ("org/base model", "org/aligned", "org/drifted", "org/other")


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def small() -> Report:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* groups")
        parts = tiny_lineage.pairs().split(seed=3)
        limits = {"train": 24, "validation": 8, "test": 12}
        parts = {part: parts[part].limited(n, 3) for part, n in limits.items()}
        size = Size(**limits, answered=6, shifted=5, tokens=6, steered=4, permutations=20, every=3)
        found = tiny_lineage.checkpoints()
        return measure(
            found, parts, ("a", "b"), "words", size, 3, base_context="minimal",
        )  # fmt: skip


def given(small: Report, size: Size, contrast: str = "words", **record: Any) -> Report:
    """The report as if it had been made of these."""
    settings = {**small.record.settings, **record.pop("settings", {})}
    changed = dataclasses.replace(small.record, **{"models": MODELS, **record}, settings=settings)
    return dataclasses.replace(small, size=size, contrast=contrast, record=changed)


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """The verb and its options, as the command line reads them."""
    program, verb, *words = shlex.split(command)
    assert program == "alignlens"
    group: Any = typer.main.get_command(app)
    with group.commands[verb].make_context(verb, words) as context:
        return verb, dict(context.params)


def test_the_whole_report_is_asked_for_again(
    small: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run through the command itself: what reaches `run` is what the report was made with."""
    asked: dict[str, Any] = {}

    def run(*models: Any, **options: Any) -> None:
        asked.update(options, models=models)
        raise Stopped

    monkeypatch.setattr("analyses.report.run", run)
    for name, size in SIZES.items():
        there = dataclasses.replace(size, train=18)  # the file had no more
        report = given(
            small, there, settings={"prompts": "own pairs.csv"}, seeds=(3,), engine="nnsight",
            dtype="bfloat16",
        )  # fmt: skip
        (panel, command), *_ = commands(report)
        assert panel == "all, the same numbers"
        _, *words = shlex.split(command)
        with pytest.raises(Stopped):
            app(words, standalone_mode=False)
        assert asked["models"] == (*MODELS[:2], MODELS[2:])
        assert asked["prompts"] == "own pairs.csv" and asked["base_context"] == "minimal"
        assert asked["size"] == size, name
        assert (asked["seed"], asked["engine"], asked["dtype"]) == (3, "nnsight", "bfloat16")


def test_every_command_carries_the_settings(small: Report) -> None:
    report = given(small, SIZES["default"], settings={"prompts": "own.jsonl"}, seeds=(3,))
    found = dict(commands(report))
    verbs = dict(parsed(command) for command in found.values())
    assert set(verbs) == {"report", "shift", "probe", "subspace", "sweep", "drift"}
    for verb, params in verbs.items():
        file = params["contrast"] if verb in ("probe", "sweep") else params["prompts"]
        assert str(file) == "own.jsonl" and params["seed"] == 3, verb
        assert MODELS[1] in (params.get("aligned"), params.get("model")), verb
    size = SIZES["default"]
    drift, shift, sweep = verbs["drift"], verbs["shift"], verbs["sweep"]
    assert drift["topics"] == size.answered == 40 and tuple(drift["drifted"]) == MODELS[2:]
    assert (shift["number"], shift["tokens"]) == (size.shifted, size.tokens)
    assert shift["context"] == ["minimal"]
    assert sweep["sites"] == small.steering.sites[0] and sweep["strengths"] == "0.5 1"
    assert (sweep["topics"], sweep["trained"]) == (size.steered, size.train)
    assert verbs["probe"]["permutations"] == size.permutations
    layers = ",".join(str(n) for n in small.sweeps[1][1].layers.tolist())
    assert verbs["probe"]["sites"] == f"{layers}.resid_post"  # every third layer


def test_shipped_prompts_need_no_file_and_an_unknown_one_is_marked(small: Report) -> None:
    shipped = commands(given(small, SIZES["quick"], SHIPPED))
    assert not any("--prompts" in command for _, command in shipped)
    assert parsed(shipped[0][1])[1]["quick"] is True
    unknown = commands(given(small, SIZES["quick"]))
    assert parsed(unknown[0][1])[1]["prompts"] == Path("FILE OF words")


def test_a_size_without_an_option_becomes_python(
    small: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("analyses.report.run", lambda *a, **o: asked.update(o, models=a))
    monkeypatch.setattr("analyses.page.write", lambda found, folder: None)
    builtin = ("builtin:base", "builtin:aligned")
    fewer = dataclasses.replace(SIZES["default"], test=20)
    cases = [
        given(small, small.size, settings={"prompts": "own.jsonl"}),
        given(small, fewer, SHIPPED),
        given(small, SIZES["default"], SHIPPED, models=builtin),  # the verb would add two models
    ]
    for report in cases:
        program, option, code = shlex.split(commands(report)[0][1])
        assert (program, option) == ("python", "-c")
        exec(code, {})
        models = report.record.models
        assert asked["models"] == (*models[:2], list(models[2:]))
        assert asked["size"] == report.size and asked["base_context"] == "minimal"
        assert asked["prompts"] == (None if report.contrast == SHIPPED else "own.jsonl")
    assert not any("drift" in panel for panel, _ in commands(cases[2]))


def test_two_paraphrases_of_a_topic_are_refused(tmp_path: Path) -> None:
    """Also where the numbers of prompts and of topics are those of pairs."""
    rows = [{"topic": f"t{i}", "positive": f"w7 w{i}", "negative": f"w8 w{i}"} for i in range(40)]
    good, twice, lop = (tmp_path / f"{name}.jsonl" for name in ("good", "twice", "lop"))
    good.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [*rows, {**rows[5], "positive": "w7 w90", "negative": "w8 w90"}]
    twice.write_text("".join(json.dumps(row) + "\n" for row in more))
    labelled = [
        {"prompt": f"w{i}{j}", "label": (i % 2), "topic": f"t{i}"}
        for i in range(40) for j in range(2)
    ]  # fmt: skip
    lop.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    parts, _, _ = pairs(str(good), SIZES["quick"], 0)
    assert len(parts["test"]) == 16
    with pytest.raises(ValueError, match="its topic 't5' has 2 positive and 2 negative prompts"):
        pairs(str(twice), SIZES["quick"], 0)
    with pytest.raises(ValueError, match="its topic 't0' has 0 positive and 2 negative prompts"):
        pairs(str(lop), SIZES["quick"], 0)
