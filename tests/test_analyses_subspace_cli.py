"""`alignlens subspace` on tiny checkpoints."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import tiny_lineage
import typer

from analyses import cli
from analyses.commands.subspace import subspace
from analyses.subspaces.activations import SubspaceOverlap
from analyses.subspaces.concept import ConceptSubspace
from analyses.subspaces.difference_lens import DifferenceLens
from analyses.subspaces.erasure import Erasure

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("subspace")
    tiny_lineage.save(root / "base")
    tiny_lineage.save(root / "aligned", 1)
    tiny_lineage.save(root / "tuned", 2)
    contrast = tiny_lineage.pairs(60)
    pairs = zip(contrast.prompts[::2], contrast.prompts[1::2], strict=True)
    rows = [json.dumps({"positive": a, "negative": b}) for a, b in pairs]
    (root / "pairs.jsonl").write_text("\n".join(rows))
    (root / "plain.jsonl").write_text('{"prompt": "w1"}\n{"prompt": "w2"}\n')
    return root


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(files)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("subspace")(subspace)
    app.callback()(lambda: None)
    monkeypatch.setattr(cli, "app", app)  # whatever else the command line knows

    def outcome(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["alignlens", "subspace", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                cli.main()
            except SystemExit as end:
                code = int(end.code or 0)
        said = capfd.readouterr()
        return code, said.err if code else said.out

    return outcome


SMALL = ("--topics", 20, "--texts", 6)


def test_every_panel_writes_its_folder(files: Path, run: Run) -> None:
    code, said = run(
        "base", "aligned", "--tuned", "tuned", "--prompts", "pairs.jsonl", *SMALL, "--out", "all"
    )
    assert code == 0, said
    root = files / "all"
    found = {path.name for path in root.iterdir() if path.is_dir()}
    assert found >= {
        "weights-energy-tuned", "weights-overlap-tuned", "activations", "geometry", "concept",
        "erasure-base", "erasure-aligned", "erasure-tuned", "lens-aligned", "lens-tuned",
    }  # fmt: skip
    for folder in found:
        names = {path.name for path in (root / folder).iterdir()}
        assert {"result.json", "record.json", "table.csv"} <= names
        assert (
            {Path(n).stem for n in names if n.endswith("png")}
            == {Path(n).stem for n in names if n.endswith("svg")}
            != set()
        )
    summary = json.loads((root / "result.json").read_text())
    assert set(summary["panels"]) == found
    assert set(pd.read_csv(root / "table.csv", low_memory=False)["panel"]) == found
    record = json.loads((root / "record.json").read_text())
    assert record["models"] == ["base", "aligned", "tuned"] and record["prompts_hash"]
    overlap = SubspaceOverlap.load(root / "activations")
    assert overlap.record.prompts_hash == record["prompts_hash"]
    concept = ConceptSubspace.load(root / "concept")
    assert concept.models == ("aligned", "base", "tuned")
    lens = DifferenceLens.load(root / "lens-aligned")
    assert (lens.model, lens.reference) == ("aligned", "base")
    assert not lens.difference[0].any() and lens.difference[-1].any()
    erasure = Erasure.load(root / "erasure-base")
    assert len(erasure.topics) == 3 and erasure.refitted[1].eq(0.5).all()
    # the tuned model differs from the base one in its last block alone
    assert concept.unchanged[1].tolist()[0] is True
    assert not concept.unchanged[1].all()


def test_only_one_panel_and_json(run: Run, files: Path) -> None:
    code, said = run(
        "base", "aligned", "--only", "erasure", "--prompts", "pairs.jsonl", *SMALL, "--out",
        "one", "--json",
    )  # fmt: skip
    assert code == 0, said
    assert set(json.loads(said)["panels"]) == {"erasure-base", "erasure-aligned"}
    assert any("topics in test" in note for note in json.loads(said)["notes"])


def test_an_edited_model_is_written(run: Run, files: Path) -> None:
    given = ("--tuned", "tuned", "--only", "weights", "--out", "w", "--write-edited", "edited")
    code, said = run("base", "aligned", *given)
    assert code == 0, said
    assert (files / "edited" / "projection.json").is_file()


def test_identical_models_are_said(run: Run, files: Path) -> None:
    code, said = run(
        "base", "base", "--only", "lens", "--words", "w1 w2", *SMALL, "--out", "same"
    )  # fmt: skip
    assert code == 0, said
    assert "the models are identical, every difference is exactly zero" in said
    assert not (files / "same" / "lens-steered").exists()
    (folder,) = (files / "same").glob("lens-*")
    assert DifferenceLens.load(folder).words == ("w1", "w2")


def test_a_dry_run_loads_nothing(run: Run, files: Path) -> None:
    code, said = run("nobody/nothing", "nobody/other", "--dry-run", "--out", "dry")
    assert code == 0
    assert "2 checkpoints; weights, activations, lens, erasure; the shipped twins" in said
    assert not (files / "dry").exists()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--only", "heads"), "--only heads: choose one of weights, activations, lens, erasure"),
        (("--only", "weights"), "give --tuned MODEL"),
        (("--write-edited", "x"), "--write-edited projects an update"),
        (("--topics", 2), "--topics 2 and --texts 32: give at least 4 of each"),
        (("--words", " "), "--words is empty"),
        (("--prompts", "plain.jsonl"), "plain.jsonl holds plain prompts"),
        (("--prompts", "none.jsonl"), "no such prompt file"),
    ],
)
def test_a_mistake_is_one_sentence(run: Run, given: tuple, sentence: str) -> None:
    code, said = run("base", "aligned", *given, "--out", "mistake")
    assert code == 2
    assert sentence in said
    assert "Traceback" not in said
