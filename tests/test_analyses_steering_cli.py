"""`alignlens steer` and `alignlens sweep` on tiny models: what they write, say and refuse."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import commanding
import pytest
import tiny
import tiny_lineage
from commanding import Run
from typer.testing import CliRunner

from analyses import cli
from analyses.commands.measures import site_texts, splits_of
from probes import HookedModel
from steering import Steering, SteeringVector, train_vector
from steering.budget import SolvedStrength
from steering.effects import refusal_odds
from steering.grid import matched
from steering.nulls import shuffled_vectors
from steering.sweep import SteeringSweep

HEAVY = ("torch", "transformers", "pandas", "matplotlib", "numpy")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, pairs and plain prompts."""
    root = tmp_path_factory.mktemp("steering")
    tiny_lineage.save(root / "first")
    contrast = tiny_lineage.pairs(40)
    rows = zip(contrast.prompts[::2], contrast.prompts[1::2], strict=True)
    text = "".join(json.dumps({"positive": a, "negative": b}) + "\n" for a, b in rows)
    (root / "pairs.jsonl").write_text(text)
    (root / "prompts.txt").write_text("\n".join(tiny.words(3, seed=1)) + "\n")
    return root


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`alignlens ...` in this process, in the folder of the files."""
    monkeypatch.chdir(files)
    return commanding.runner(monkeypatch, capfd)


@pytest.mark.parametrize("verb", ["steer", "sweep"])
def test_help_shows_examples_and_imports_nothing_heavy(verb: str) -> None:
    done = CliRunner().invoke(cli.app, [verb, "--help"])
    assert done.exit_code == 0
    assert any(line.startswith(f"  alignlens {verb}") for line in done.output.splitlines())
    asked = (
        f"import sys\nsys.argv = ['alignlens', '{verb}', '--help']\n"
        "from analyses.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stdout.splitlines()[-1] == "[]"


# --- steer --------------------------------------------------------------------------------------


def test_steer_trains_saves_and_shows(files: Path, run: Run) -> None:
    given = ("steer", "first", "pairs.jsonl", "--site", "1.resid_post", "--tokens", 6)
    said = run(*given, "--strength", 4, "--prompts", "prompts.txt", "--prompt", "w1", "--out", "s")
    assert said.code == 0, said.err
    assert said.out.count("before:") == said.out.count(" after:") == 4
    assert said.out.splitlines()[-1].endswith("strength 4: s")
    vector = SteeringVector.load(files / "s" / "vector.safetensors")
    assert vector.origin.estimator == "difference_of_means"
    rows = json.loads((files / "s" / "result.json").read_text())["answers"]
    model = HookedModel.load(str(files / "first"), device="cpu")
    prompts = ["w1", *tiny.words(3, seed=1)]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["before"] for row in rows] == model.generate(prompts, 6)
    after = model.generate(prompts, 6, steer=vector * 4.0)
    assert [row["after"] for row in rows] == after != model.generate(prompts, 6)
    assert (files / "s" / "table.csv").is_file() and (files / "s" / "record.json").is_file()
    again = run(
        "steer", "first", "--vector", "s/vector.safetensors", "--strength", 4, "--tokens", 6,
        "--prompts", "prompts.txt", "--json", "--out", "t",
    )  # fmt: skip
    assert [row["after"] for row in json.loads(again.out)["answers"]] == after[1:]


def test_steer_solves_a_budget(files: Path, run: Run) -> None:
    given = ("steer", "first", "pairs.jsonl", "--site", "1.resid_post", "--tokens", 4)
    said = run(*given, "--kl", 0.001, "--backwards", "--benign", 3, "--out", "solved", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    solved = SolvedStrength.load(files / "solved" / "strength")
    assert found["strength"] == solved.strength < 0
    assert solved.value >= 0.001 and (solved.n, solved.n_held_out) == (3, 3)
    assert found["solved"] == str(solved)
    assert (files / "solved" / "strength.png").is_file()
    missed = run(*given, "--kl", 50, "--benign", 2, "--out", "missed")
    assert missed.code == 2
    assert "budget of 50 is not reached: the largest cost seen is" in missed.err
    assert not (files / "missed").exists()


def test_steer_only_says_what_it_would_do(files: Path, run: Run) -> None:
    said = run("steer", "first", "pairs.jsonl", "--dry-run", "--out", "nowhere")
    assert said.code == 0
    assert said.out.startswith("up to 200 prompts read, up to 20 passes over 32 answers, 6 answers")
    assert not (files / "nowhere").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--strength", 1, "--kl", 0.1), "--strength and --kl exclude each other"),
        (("--strength", 1, "--backwards"), "--backwards goes with --kl"),
        (("--recipe", "magic"), "unknown recipe 'magic': choose mean, pca"),
        (("--scope", "never"), "--scope is 'never': choose all, prompt or generated"),
        (("--benign", 0), "--benign is 0: give 1 to 32"),
        (("--site", "9.resid_post"), "site 9.resid_post is out of range"),
        (("--strength", 1, "--unit", "metres"), "unknown unit of strength 'metres'"),
        (("--vector", "none.safetensors"), "is used as it is: give no contrast with it"),
    ],
)
def test_mistakes_of_steer_are_one_sentence(run: Run, options: tuple, said: str) -> None:
    found = run("steer", "first", "pairs.jsonl", *options)
    assert found.code == 2
    assert said in found.err
    assert "Traceback" not in found.err
    assert found.err.strip().splitlines()[-1].startswith("error: ")


# --- sweep --------------------------------------------------------------------------------------

SWEEP = (
    "sweep", "first", "pairs.jsonl", "--sites", "0-1.resid_post", "--strengths", "0 1", "--effects",
    "odds refusals", "--random", 2, "--topics", 8, "--within", 10, "--out", "swept",
)  # fmt: skip


def test_sweep_writes_a_folder_and_goes_on(files: Path, run: Run) -> None:
    # 3 measures unsteered; 2 sites at strength 1: kl, and 2 effects under 1 vector and 5 nulls;
    # the same on test prompts at one of the sites
    total, tested = 3 + 2 * (1 + 2 * 6), 3 + 1 + 2 * 6
    said = run(*SWEEP)
    assert said.code == 0, said.err
    assert len(said.out.strip().splitlines()) == 1 + 3
    assert "test prompts: odds" in said.out and "not beyond its null" in said.out
    folder = files / "swept"
    names = {p.name for p in folder.iterdir()}
    assert {"vector.safetensors", "table.csv", "result.json", "record.json", "pareto.png"} <= names
    assert {"strength.svg", "layer.png", "cells", "test"} <= names
    found, test = SteeringSweep.load(folder), SteeringSweep.load(folder / "test")
    assert found.sites == ("0.resid_post",) * 2 + ("1.resid_post",) * 2
    assert found.kinds == (*["random"] * 2, *["shuffled labels"] * 2, "formality")
    assert test.cells == (found.best(within={"kl": 10.0}),)
    assert not set(test.keys) & set(found.keys)
    assert not found.claimed.any()  # two random directions are too few
    kept = [len([*f.glob("cells/*.json")]) for f in (folder, folder / "test")]
    assert kept[0] == total and kept[1] in (tested, 3)  # at strength 0 only the unsteered model
    written = {p: p.stat().st_mtime_ns for p in folder.rglob("cells/*.json")}
    dry = run(*SWEEP, "--dry-run").out
    assert dry.startswith(f"4 settings with 5 nulls: about {total + tested} passes, ")
    assert dry.endswith(f" {sum(kept)} measurements are kept in swept\n")
    table = json.loads(run(*SWEEP, "--json").out)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("cells/*.json")} == written
    assert len(table["validation"]) == 12 and len(table["test"]) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--strengths", "much"), "cannot read the strengths 'much'"),
        (("--effects", "joy"), "unknown effect 'joy': choose refusals, odds"),
        (("--costs", ""), "give one effect and one cost at least"),
        (("--on", "both"), "--on is 'both': choose positive or negative"),
        (("--random", -1), "--random is -1"),
        (("--operations", "melt"), "unknown operation 'melt'"),
        (("--operations", "ablate", "--strengths", "2 4"), "no strength is left for ablate"),
        (("--openers", " "), "--openers is empty"),
        (("--made-elsewhere",), "is said of a saved vector and a file: give both"),
        (("--within", -1.0, "--strengths", "1"), "no cell stays within kl -1"),
    ],
)
def test_mistakes_of_sweep_are_one_sentence(run: Run, options: tuple, said: str) -> None:
    given = ("sweep", "first", "pairs.jsonl", "--sites", "1.resid_post", "--random", 0)
    found = run(*given, "--topics", 4, "--effects", "odds", "--out", "wrong", *options)
    assert found.code == 2
    assert said in found.err
    assert "Traceback" not in found.err
    assert found.err.strip().splitlines()[-1].startswith("error: ")


def test_a_dry_run_neither_trains_nor_generates(
    files: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was called")

    made: list[HookedModel] = []
    load = HookedModel.load.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def loaded(cls: type[HookedModel], *given: object, **options: object) -> HookedModel:
        made.append(load(cls, *given, **options))
        for name in ("read", "logits", "generate"):  # behind the self-check of its first use
            monkeypatch.setattr(made[-1].engine, name, never)
        return made[-1]

    monkeypatch.setattr(HookedModel, "load", classmethod(loaded))
    every = ("--costs", "kl perplexity mistakes repetition benign_refusals", "--out", "nowhere")
    dry = run(*SWEEP, *every, "--dry-run")
    assert dry.code == 0, dry.err
    assert made and not (files / "nowhere").exists()
    tokens = int(dry.out.partition(" passes, ")[2].partition(" tokens")[0].replace(",", ""))
    fewer = run(*SWEEP, "--out", "nowhere", "--dry-run").out
    assert int(fewer.partition(" passes, ")[2].partition(" tokens")[0].replace(",", "")) < tokens
    assert "MB of disk and" in dry.out and "GB of memory; 0 measurements" in dry.out
    with pytest.raises(AssertionError, match="it was called"):
        run(*SWEEP)


def test_a_saved_vector_is_not_tested_on_what_it_was_trained_on(files: Path, run: Run) -> None:
    given = ("--strength", 1, "--tokens", 1, "--prompt", "w1", "--site", "1.resid_post")
    trained = ("steer", "first", "pairs.jsonl", *given, "--positions", "mean:content", "--out", "v")
    assert run(*trained, "--topics", 8).code == 0
    swept = (
        "sweep", "first", "pairs.jsonl", "--vector", "v/vector.safetensors", "--strengths", "0.5",
        "--effects", "odds", "--openers", "w3 w4", "--random", 1, "--within", 10, "--out", "of-v",
    )  # fmt: skip
    ok = run(*swept, "--topics", 8, "--trained", 8)
    assert ok.code == 0, ok.err
    vector = SteeringVector.load(files / "v" / "vector.safetensors")
    train = splits_of(files / "pairs.jsonl", 0, 8, 8)["train"]
    model = HookedModel.load(str(files / "first"), device="cpu")
    own = train_vector(model, train, "1.resid_post", positions="mean:content")
    assert vector.origin.data_hash == own.origin.data_hash
    # the effect asked for these openers, and nulls were read where the vector was
    found = SteeringSweep.load(files / "of-v")
    asked = splits_of(files / "pairs.jsonl", 0, 8, 8)["validation"].prompts[1::2]
    odds = refusal_odds(model, None, asked, openers=("w3", "w4"))
    assert float(found.unsteered[0]) == pytest.approx(float(odds.mean()), abs=1e-5)
    (null,) = shuffled_vectors(model, train, "1.resid_post", 1, positions="mean:content")
    what = Steering(matched(null, vector), 0.5)
    moved = refusal_odds(model, what, asked, openers=("w3", "w4")) - odds
    at = found.kinds.index("shuffled labels")
    assert float(found.null[0, 0, at]) == pytest.approx(float(moved.mean()), abs=1e-5)
    for wrong in (("--trained", 7), ("--trained", 8, "--seed", 1)):
        said = run(*swept, *wrong)
        assert said.code == 2
        assert "was not made from the training topics of pairs.jsonl" in said.err
    assert run(*swept, "--topics", 7, "--made-elsewhere", "--out", "else").code == 0
    other = run(*swept, "--trained", 8, "--positions", "last")
    assert other.code == 2 and "was made at 'mean:content'" in other.err


def test_strengths_a_mixing_operation_lacks_are_said(run: Run) -> None:
    given = ("--operations", "add ablate", "--strengths", "1 2", "--dry-run", "--random", 0)
    said = run("sweep", "first", "pairs.jsonl", "--sites", "1.resid_post", *given)
    assert said.code == 0 and said.out.startswith("3 settings with 0 nulls")
    assert "note: ablate mixes by a share, so strength 2 is left out there" in said.err


@pytest.mark.parametrize("layers", [1, 2, 3, 24])
def test_default_sites_exist_at_any_depth(layers: int) -> None:
    model = SimpleNamespace(n_layers=layers)
    found = site_texts(model, None)  # pyright: ignore[reportArgumentType]
    assert found and all(0 <= int(text.partition(".")[0]) < layers for text in found)


def test_steer_has_a_default_site_and_a_saved_vector_its_operation(files: Path, run: Run) -> None:
    given = ("--strength", 1, "--tokens", 1, "--prompt", "w1")
    made = run("steer", "first", "pairs.jsonl", *given, "--out", "d")
    assert made.code == 0, made.err
    path = files / "d" / "vector.safetensors"
    n = HookedModel.load(str(files / "first"), device="cpu").n_layers
    assert [str(s) for s in SteeringVector.load(path).sites] == [f"{5 * n // 8}.resid_post"]
    turned = run("steer", "first", "--vector", path, *given, "--operation", "ablate", "--out", "e")
    assert turned.code == 0, turned.err
    assert SteeringVector.load(files / "e" / "vector.safetensors").operation == "ablate"
    kept = run("steer", "first", "--vector", "e/vector.safetensors", *given, "--out", "f")
    assert kept.code == 0, kept.err
    assert SteeringVector.load(files / "f" / "vector.safetensors").operation == "ablate"
    for option in (("--recipe", "pca"), ("--positions", "last"), ("--topics", 3)):
        refused = run("steer", "first", "--vector", path, *given, *option)
        assert refused.code == 2 and f"{option[0]} is of training" in refused.err


def test_plain_prompts_train_no_vector(run: Run) -> None:
    for verb in ("steer", "sweep"):
        found = run(verb, "first", "prompts.txt")
        assert found.code == 2
        assert "holds plain prompts: a steering vector needs pairs or labels" in found.err
