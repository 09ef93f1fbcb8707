"""`alignlens tradeoff` on a tiny model: what it writes, what it says, and what it says to mistakes."""

import json
from pathlib import Path

import commanding
import pytest
import tiny_lineage
from commanding import Run
from typer.testing import CliRunner

from analyses import cli
from analyses.commands import tradeoff as command
from probes import datasets
from steering.tradeoff_result import Tradeoff

ITEMS = [
    {"question": f"w{i} w{i + 3}", "choices": ["w1", "w2 a", "w3", "w4 ."], "answer": i % 4}
    for i in range(12)
]
QUICK = command.Size(topics=30, prompts=8, items=6, steps=4, nulls=3, resamples=30)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tradeoff")
    tiny_lineage.save(root / "first")
    contrast = tiny_lineage.pairs(100)
    rows = zip(contrast.prompts[::2], contrast.prompts[1::2], strict=True)
    text = "".join(json.dumps({"positive": a, "negative": b}) + "\n" for a, b in rows)
    (root / "pairs.jsonl").write_text(text)
    (root / "prompts.txt").write_text("w1 w2\nw3\n")
    return root


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`alignlens tradeoff ...` in this process, in the folder of the files, on few word items."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(datasets, "choices", lambda: ITEMS)
    monkeypatch.setitem(command.SIZES, "quick", QUICK)
    return commanding.runner(monkeypatch, capfd, "tradeoff", quiet=False)


GIVEN = ("first", "pairs.jsonl", "--quick", "--sites", "0-1.resid_post", "--labels", "odds")


def test_it_writes_a_folder_and_says_one_line(files: Path, run: Run) -> None:
    code, out, err = run(*GIVEN, "--largest", 0.8, "--out", "done")
    assert code == 0, err
    assert out.count("\n") == 1
    assert out.startswith("trade-off at 0.resid_post, 1.resid_post: B slope ")
    assert out.rstrip().endswith(": done")
    assert "3 random directions show no claim; it takes 20" in err
    names = {p.name for p in (files / "done").iterdir()}
    tables = {"table.csv", "laws.csv", "comparison.csv"}
    assert names >= tables | {"tradeoff.png", "tradeoff.svg", "result.json", "record.json"}
    loaded = Tradeoff.load(files / "done")
    assert loaded.strengths.tolist() == pytest.approx([k / 5 for k in range(-4, 5)])
    assert loaded.labels.shape == (9, 8)
    assert loaded.full.shape == (9, 6)
    assert loaded.chosen in loaded.strengths.tolist()
    assert loaded.null_B.shape == (3, 1)
    assert loaded.labelled_by == "odds"
    assert loaded.record.models == ("first",)
    # half of the strengths, on the side with more room: the tiny model hardly opens with "I"
    assert loaded.window == pytest.approx((0.2, 0.4))
    assert loaded.record.settings["random directions"] == 3


def test_json_is_json(run: Run) -> None:
    given = ("--largest", 0.8, "--window=-0.8:-0.2", "--json", "--out", "told", "--read", "four")
    code, out, err = run(*GIVEN, *given)
    assert code == 0, err
    said = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(said["table"]) == 9
    assert said["table"][4]["strength"] == 0
    assert said["table"][4]["change_norm"] == 0
    assert {row["estimate"] for row in said["laws"]} >= {"slope_B", "slope_P", "optimum"}


def test_largest_defaults_to_a_share_of_the_stream(files: Path, run: Run) -> None:
    code, _, err = run(*GIVEN, "--out", "share")
    assert code == 0, err
    assert Tradeoff.load(files / "share").strengths[-1] > 0


def test_only_says_what_it_would_do(files: Path, run: Run) -> None:
    code, out, _ = run(*GIVEN, "--dry-run", "--out", "nowhere")
    assert code == 0
    assert "9 norms of 14 test and 7 validation prompts and items; 3 random directions" in out
    assert not (files / "nowhere").exists()


MISTAKES = {
    "window": (("--window", "half"), "cannot read the window 'half': expected LOW:HIGH"),
    "window over 0": (("--largest", 0.8, "--window=-0.4:0.4"), "must lie on one side of 0"),
    "labels": (("--labels", "votes"), "unknown --labels 'votes': choose answers or odds"),
    "items": (("--items", "numbers"), "unknown --items 'numbers': choose openings or letters"),
    "read": (("--read", "half"), "unknown --read 'half': choose full or four"),
    "weight": (("--weight", 0), "the weight is 0: give a number above 0"),
    "largest": (("--largest", -1), "the largest norm is -1: give a number above 0"),
    "site": (("--sites", "9.resid_post"), "out of range"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake: str, run: Run) -> None:
    arguments, expected = MISTAKES[mistake]
    code, out, err = run("first", "pairs.jsonl", "--quick", *arguments, "--out", "unwritten")
    assert code == 2
    assert out == ""
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and expected in said[0]
    assert "Traceback" not in err


def test_plain_prompts_are_refused(run: Run) -> None:
    code, _, err = run("first", "prompts.txt", "--quick")
    assert code == 2
    assert "error: prompts.txt holds plain prompts: a trade-off needs pairs or labels" in err


def test_help_shows_an_example() -> None:
    done = CliRunner().invoke(cli.app, ["tradeoff", "--help"])
    assert done.exit_code == 0
    assert "  alignlens tradeoff builtin:aligned --quick" in done.output


@pytest.mark.parametrize(("layers", "band"), [(32, "10-14"), (30, "9-13"), (3, "1-1")])
def test_the_band_is_that_of_the_paper(layers: int, band: str) -> None:
    assert command._band(layers) == f"{band}.resid_post"
