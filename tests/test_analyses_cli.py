"""The command line on tiny models: what it writes, what it says, and what it says to mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import commanding
import pytest
import tiny
import tiny_lineage
from commanding import Run
from typer.testing import CliRunner

from analyses import cli
from probes import HookedModel, ProbeSweep, capture, difference_of_means
from probes.scanning import Scan

VERBS = ("report", "capture", "probe", "scan", "models")
HEAVY = ("torch", "transformers", "pandas", "matplotlib", "sklearn", "scipy", "umap", "numpy")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, one without a chat template, plain prompts and pairs."""
    root = tmp_path_factory.mktemp("cli")
    tiny_lineage.save(root / "first")
    tiny_lineage.save(root / "second", 1)
    tiny_lineage.save(root / "bare", template=False)
    (root / "prompts.txt").write_text("\n".join(tiny.words(20, seed=1)) + "\n")
    (root / "empty.txt").write_text("\n\n")
    contrast = tiny_lineage.pairs(100)
    rows = zip(contrast.prompts[::2], contrast.prompts[1::2], strict=True)
    text = "".join(json.dumps({"positive": a, "negative": b}) + "\n" for a, b in rows)
    (root / "pairs.jsonl").write_text(text)
    return root


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`alignlens ...` in this process, in the folder of the files."""
    monkeypatch.chdir(files)
    return commanding.runner(monkeypatch, capfd, quiet=False)


def started(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """`alignlens ...` as a process of its own."""
    program = Path(sys.executable).with_name("alignlens")
    return subprocess.run(
        [program, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def test_help_imports_nothing_heavy() -> None:
    asked = (
        "import sys\nsys.argv = ['alignlens', '--help']\nfrom analyses.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], 'typer' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[] True"
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_an_example(verb: str) -> None:
    done = CliRunner().invoke(cli.app, [verb, "--help"])
    assert done.exit_code == 0
    examples = [line for line in done.output.splitlines() if f"  alignlens {verb}" in line]
    assert examples
    if verb == "models":
        assert "org/name[@revision]" in done.output  # and not markup


def test_capture_goes_on_where_it_stopped(files: Path) -> None:
    given = ("capture", "first", "prompts.txt", "--sites", "0-1.resid_post", "--out", "acts")
    first = started(*given, "--json", folder=files)
    assert first.returncode == 0, first.stderr
    done = json.loads(first.stdout)
    assert done["prompts"] == 20
    assert done["sites"] == ["0.resid_post", "1.resid_post"]
    written = {p: p.stat().st_mtime_ns for p in (files / "acts").rglob("*.safetensors")}
    assert written
    again = started(*given, "--json", folder=files)
    assert json.loads(again.stdout) == done
    assert {p: p.stat().st_mtime_ns for p in (files / "acts").rglob("*.safetensors")} == written
    # another model's vectors do not belong into this store
    other = started(
        "capture", "second", "prompts.txt", "--sites", "0.resid_post", "--out", "acts", folder=files
    )
    assert other.returncode == 2
    assert "Traceback" not in other.stderr
    assert other.stderr.splitlines()[-1].startswith("error: ")


def test_capture_only_says_what_it_would_do(files: Path, run: Run) -> None:
    said = run("capture", "first", "prompts.txt", "--dry-run", "--out", "nowhere")
    assert said.code == 0
    assert said.out.startswith("20 prompts, ")
    assert "20 vectors at 3 sites" in said.out
    assert not (files / "nowhere").exists()


def test_probe_writes_a_folder(files: Path, run: Run) -> None:
    given = ("probe", "first", "pairs.jsonl", "--permutations", 20, "--out", "probed")
    said = run(*given)
    assert said.code == 0, said.err
    assert said.out.count("\n") == 1
    assert said.out.rstrip().endswith(": probed")
    names = {p.name for p in (files / "probed").iterdir()}
    wanted = {"probe.png", "probe.svg", "table.csv", "result.json", "record.json"}
    assert wanted <= names
    loaded = ProbeSweep.load(files / "probed")
    assert loaded.sites == ("0.resid_post", "1.resid_post", "2.resid_post")
    assert loaded.record.models == ("first",)
    table = json.loads(run(*given, "--json").out)
    assert [row["site"] for row in table] == list(loaded.sites)


def test_probe_takes_the_shipped_splits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from probes import datasets, sweeps

    seen: dict[str, set[str]] = {}
    kept = sweeps.sweep

    def watched(values: object, labels: object, topics: list[str], **rest: object) -> ProbeSweep:
        for part in datasets.SPLITS:
            seen[part] = {topics[i] for i in rest[part].tolist()}  # pyright: ignore
        return kept(values, labels, topics, **rest)  # pyright: ignore

    monkeypatch.setattr(sweeps, "sweep", watched)
    given = ("--topics", 70, "--permutations", 2, "--kind", "mean", "--sites", "1.resid_post")
    assert run("probe", "first", *given, "--out", "twins").code == 0
    assert {part: len(topics) for part, topics in seen.items()} == {
        "train": 40,
        "validation": 10,
        "test": 20,
    }
    for part, topics in seen.items():
        assert topics <= {row["topic"] for row in datasets.twins(part)}


def test_scan_with_a_saved_direction(files: Path, run: Run) -> None:
    model = HookedModel.load(str(files / "first"), device="cpu")
    contrast = tiny_lineage.pairs(30)
    values = capture(model, contrast.prompts, "1.resid_post")["1.resid_post"]
    positive = contrast.positive
    found = difference_of_means(values[positive], values[~positive], site="1.resid_post")
    found.save(files / "direction")
    given = ("scan", "first", "direction", "w1 w2 w3", "--benign", "prompts.txt", "--tokens", 4)
    said = run(*given, "--out", "scanned")
    assert said.code == 0, said.err
    result = Scan.load(files / "scanned")
    assert result.layers == (0, 1, 2)
    assert result.projection.shape == (3, len(result.tokens))
    assert {"scan.png", "scan.svg", "table.csv"} <= {p.name for p in (files / "scanned").iterdir()}
    rows = json.loads(run(*given, "--out", "scanned", "--json").out)
    assert len(rows) == 3 * len(result.tokens)


def test_scan_with_a_site(run: Run) -> None:
    given = ("w1 w2", "--tokens", 2, "--benign", "prompts.txt", "--out", "at-site")
    assert run("scan", "first", "1.resid_post", *given).code == 0
    several = run("scan", "first", "all.resid_post", *given)
    assert several.code == 2
    assert "names 3 sites" in several.err


def test_models(run: Run) -> None:
    said = run("models")
    assert said.code == 0
    assert "builtin:base" in said.out
    listed = json.loads(run("models", "--json").out)
    assert listed["builtin"][0] == "builtin:base"


def test_report_of_two_folders(files: Path, run: Run) -> None:
    given = ("report", "--base", "first", "--aligned", "second", "--prompts", "pairs.jsonl")
    dry = run(*given, "--quick", "--dry-run", "--out", "not-yet")
    assert dry.code == 0
    assert "2 checkpoints; pairs: " in dry.out
    assert not (files / "not-yet").exists()
    said = run(*given, "--quick", "--json", "--out", "reported")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result == json.loads((files / "reported" / "result.json").read_text())
    assert (files / "reported" / "report.html").is_file()
    measured = {row["model"] for row in result["table"]}
    assert measured == {"first", "second", "second, bf16", "second, int8"}  # two round trips
    assert result["base_context"] == "same"
    assert "token shift" in said.err  # progress, apart from the numbers


def test_report_with_a_context_for_the_base(files: Path, run: Run) -> None:
    given = ("report", "--base", "first", "--aligned", "second", "--prompts", "pairs.jsonl")
    said = run(*given, "--quick", "--json", "--out", "bare", "--base-context", "plain")
    assert said.code == 0, said.err
    assert json.loads(said.out)["base_context"] == "plain"
    record = json.loads((files / "bare" / "record.json").read_text())
    assert record["settings"]["base_context"] == "plain"
    # a written context that does not fit into the 128 tokens of these models
    long = run(*given, "--quick", "--out", "unwritten", "--base-context", "urial")
    assert long.code == 2
    assert "error: the base context 'urial' makes prompts of up to" in long.err
    assert not (files / "unwritten").exists()


MISTAKES = {
    "unknown built-in": (("capture", "builtin:nope", "prompts.txt"), "unknown model"),
    "no such folder": (("capture", "./nope", "prompts.txt"), "no such model folder"),
    "not on the hub": (("capture", "nobody/nothing", "prompts.txt"), "cannot load"),
    "no template": (("capture", "bare", "prompts.txt"), "has no chat template"),
    "no prompts": (("capture", "first", "empty.txt"), "prompt set is empty"),
    "no such file": (("capture", "first", "nope.txt"), "no such prompt file"),
    "site out of range": (
        ("capture", "first", "prompts.txt", "--sites", "9.resid_post"),
        "out of range",
    ),
    "wrong part": (("capture", "first", "prompts.txt", "--sites", "1.nose"), "unknown part"),
    "wrong site": (("capture", "first", "prompts.txt", "--sites", "here"), "cannot read site"),
    "wrong position": (
        ("capture", "first", "prompts.txt", "--positions", "nowhere"),
        "unknown position",
    ),
    "wrong engine": (("capture", "first", "prompts.txt", "--engine", "steam"), "unknown engine"),
    "wrong dtype": (("probe", "first", "pairs.jsonl", "--dtype", "float33"), "unknown dtype"),
    "wrong kind": (("probe", "first", "pairs.jsonl", "--kind", "tarot"), "unknown kind of probe"),
    "no classes": (("probe", "first", "prompts.txt"), "holds plain prompts"),
    "wrong base context": (("report", "--base-context", "nope"), "unknown base context 'nope'"),
    "wrong base context, dry": (
        ("report", "--dry-run", "--base-context", "nope"),
        "unknown base context 'nope'",
    ),
    "full and quick": (("report", "--full", "--quick"), "exclude each other"),
    "report without pairs": (("report", "--prompts", "prompts.txt"), "holds plain prompts"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake: str, run: Run) -> None:
    arguments, expected = MISTAKES[mistake]
    said = run(*arguments, *(() if arguments[0] == "report" else ("--out", "unwritten")))
    assert said.code == 2
    lines = [line for line in said.err.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("loading ")]  # report's progress
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert "Traceback" not in said.err
    assert said.out == ""


def test_a_mistake_ends_the_process_with_code_2(files: Path) -> None:
    done = started("capture", "builtin:nope", "prompts.txt", folder=files)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown model 'builtin:nope'")
    assert done.stderr.count("\n") == 1
    shown = started("capture", "builtin:nope", "prompts.txt", "--debug", folder=files)
    assert shown.returncode != 0
    assert "Traceback (most recent call last)" in shown.stderr
    assert "unknown model 'builtin:nope'" in shown.stderr


def test_a_warning_is_one_line(files: Path) -> None:
    few = ("--topics", 25, "--permutations", 5, "--sites", "1.resid_post", "--out", "few")
    done = started("probe", "first", "pairs.jsonl", *few, folder=files)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert any(line.startswith("warning: only 5 groups") for line in lines)
    assert all(line.startswith("warning: ") for line in lines), done.stderr


def test_a_wrong_option_is_a_usage_error(run: Run) -> None:
    said = run("probe", "--no-such-option")
    assert said.code == 2
    assert "No such option" in said.err
    assert "Traceback" not in said.err
