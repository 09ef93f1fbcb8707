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
from analyses.subspaces import panels, selectivity, weight_panels
from analyses.subspaces.activations import SubspaceOverlap
from analyses.subspaces.concept import ConceptSubspace
from analyses.subspaces.difference_lens import DifferenceLens
from analyses.subspaces.erasure import Erasure
from analyses.subspaces.panel import distinct, folder_names
from analyses.subspaces.projection_energy import ProjectionEnergy
from analyses.subspaces.selectivity_result import Selectivity

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


def test_tuned_models_of_one_name_get_folders_of_their_own(run: Run, files: Path) -> None:
    for folder, block in (("runA", 0), ("runB", 2)):
        tiny_lineage.save(files / folder / "ckpt", block)
    given = ("--tuned", files / "runA/ckpt", "--tuned", "runB/ckpt", "--only", "weights")
    code, said = run("base", "aligned", *given, "--out", "alike")
    assert code == 0, said
    found = [path.name for path in (files / "alike").iterdir() if path.is_dir()]
    assert len(found) == 4
    energies = [ProjectionEnergy.load(files / "alike" / name) for name in found if "energy" in name]
    assert len({float(e.squares[0].sum()) for e in energies}) == 2
    assert len({e.update for e in energies}) == 2
    assert folder_names(["a/b", "/a/b", "c (2)"]) == {"a/b": "a-b", "/a/b": "a-b-2", "c (2)": "c-2"}
    assert distinct(["runA/ckpt", "base", "runA/ckpt"]) == ["ckpt (1)", "base", "ckpt (2)"]


def test_weights_that_are_left_out_are_said(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("activation_panels", "lens_panels"):
        monkeypatch.setattr(panels, name, lambda *given: [])
    few = ("--topics", 12, "--texts", 4)
    code, said = run("base", "aligned", "--prompts", "pairs.jsonl", *few, "--out", "no-tuned")
    assert code == 0, said
    summary = json.loads((files / "no-tuned" / "result.json").read_text())
    assert any(
        note.startswith("Weights were left out: without --tuned") for note in summary["notes"]
    )
    assert not any("weights" in name for name in summary["panels"])


def test_selectivity_is_a_panel_that_goes_on(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("base", "aligned", "--tuned", "tuned", "--only", "weights", "--selectivity")
    code, said = run(*given, "--draws", 2, "--dry-run", "--out", "sel")
    assert code == 0
    assert "--selectivity: 1 x 102 edited models, each answering 48 requests" in said
    real, asked = selectivity.selectivity, selectivity.behaviours
    cut = {"fractions": (0.25,), "parts": ("parallel",)}
    monkeypatch.setattr(weight_panels, "selectivity", lambda *a, **k: real(*a, **k, **cut))
    monkeypatch.setattr(weight_panels, "behaviours", lambda topics, texts: asked(topics, 4, texts))
    made = []
    edited = selectivity.edited_model
    monkeypatch.setattr(selectivity, "edited_model", lambda *a: made.append(1) or edited(*a))
    few = ("--topics", 5, "--texts", 4)
    code, said = run(*given, *few, "--draws", 2, "--out", "sel")
    assert code == 0, said
    assert "selectivity-tuned: selectivity of aligned - base for tuned - aligned" in said
    assert len(made) == 1 + 5 * 2
    folder = files / "sel" / "selectivity-tuned"
    names = {path.name for path in folder.iterdir()}
    assert {"result.json", "table.csv", "unmatched.png", "matched.svg", "tradeoff.png"} <= names
    found = Selectivity.load(folder)
    assert found.draws == 2 and len(found.groups[0]) == 5
    assert any("a claim needs 20" in note for note in found.notes)
    assert "selectivity-tuned" in set(pd.read_csv(files / "sel" / "table.csv")["panel"])
    # a second call measures only what is new
    made[:] = []
    assert run(*given, *few, "--draws", 3, "--out", "sel")[0] == 0
    assert len(made) == 2 * 2


def test_an_edited_model_is_written(run: Run, files: Path) -> None:
    given = ("--tuned", "tuned", "--only", "weights", "--out", "w", "--write-edited", "edited")
    code, said = run("base", "aligned", *given)
    assert code == 0, said
    assert (files / "edited" / "projection.json").is_file()
    record = json.loads((files / "w" / "record.json").read_text())
    assert [len(f) for f in record["fingerprints"]] == [64] * 3
    own = json.loads((files / "w" / "weights-overlap-tuned" / "record.json").read_text())
    assert own["fingerprints"] == [record["fingerprints"][i] for i in (1, 0, 2, 1)]
    # what cannot be written is said before anything is measured
    code, said = run("base", "aligned", *given[:5], "again", *given[6:])
    assert code == 2 and "something at edited already" in said
    code, said = run(
        "base", "aligned", *given[:5], "again", "--write-edited", "e2", "--fraction", 25
    )
    assert code == 2 and "--fraction 25: give a share above 0 and below 1" in said
    assert not (files / "again").exists() and not (files / "e2").exists()


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
    assert "2 checkpoints; activations, lens, erasure; the shipped twins" in said
    assert "Weights were left out: without --tuned MODEL" in said
    assert not (files / "dry").exists()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--only", "heads"), "--only heads: choose one of weights, activations, lens, erasure"),
        (("--only", "weights"), "give --tuned MODEL"),
        (("--write-edited", "x"), "--write-edited projects an update"),
        (("--selectivity",), "--selectivity projects an update of the aligned model: give --tuned"),
        (("--tuned", "tuned", "--draws", 3), "--draws 3: give 1 or more, with --selectivity"),
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
