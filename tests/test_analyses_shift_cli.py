"""`alignlens shift` on tiny checkpoints saved to the disk: what it writes, says and refuses."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import tiny_lineage
import typer
from typer.testing import CliRunner

from analyses import TokenShift
from analyses.commands.shift import shift
from analyses.tokens import contexts
from analyses.tokens.in_context import ContextShifts
from analyses.tokens.matrix import ShiftMatrix
from analyses.tokens.ranking import RankingAccuracy
from analyses.tokens.released import ReleasedShift
from analyses.tokens.reward_ranking import RewardRanking

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("shift")(shift)


def run(*arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str, Path]:
    folder = tmp_path_factory.mktemp("models")
    rows = [
        {"topic": f"t{i}", "positive": f"w7 {t}", "negative": f"w8 {t}"}
        for i, t in enumerate(tiny.words(12, seed=3))
    ]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [tiny_lineage.save(folder / f"m{i}", first) for i, first in enumerate((None, 1, 2))]
    return names[0], names[1], names[2], pairs


@pytest.fixture(scope="module")
def written(lineage: tuple[str, str, str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    base, aligned, drifted, pairs = lineage
    out = tmp_path_factory.mktemp("run") / "out"
    result = run(
        base, aligned, "--prompts", pairs, "--topics", 8, "--tokens", 5, "--context", "minimal",
        "--context", "urial-0", "--rewards", "--released", "--matrix", "--drifted", drifted,
        "--out", out, "--seed", 3, "--pages", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return result, out


def test_everything_asked_is_written_and_can_be_loaded(written: Any) -> None:
    result, out = written
    kinds = {
        ".": TokenShift, "contexts": ContextShifts, "released": ReleasedShift,
        "matrix": ShiftMatrix, "rewards": RewardRanking, "ranking": RankingAccuracy,
    }  # fmt: skip
    for name, kind in kinds.items():
        found = kind.load(out / name)
        assert str(found) in result.output
        assert found.record.seeds == (3,) and len(found.record.fingerprints) >= 2
        assert len(pd.read_csv(out / name / "table.csv"))
    figures = {"shift", "divergence", "buckets", "contexts/contexts", "released/released",
               "matrix/matrix", "rewards/rewards", "ranking/ranking", "ranking/losses"}  # fmt: skip
    for name in figures:
        assert (out / f"{name}.png").stat().st_size > 5_000
        assert "fingerprints" in (out / f"{name}.svg").read_text(encoding="utf-8")
    assert len(list((out / "pages").glob("answer-*.html"))) == 4  # two of each group
    shift_ = TokenShift.load(out)
    assert set(shift_.groups) == {"positive", "negative"} and len(shift_.prompts) == 16
    assert max(shift_.counts) <= 5 and shift_.top_base.shape[1] == 30
    assert len(pd.read_csv(out / "tokens.csv")) == len(shift_.ids)
    page = (out / "pages" / "answer-0001.html").read_text(encoding="utf-8")
    assert "Jaccard@10" in page and "Jaccard@30" not in page
    assert f"shift: {out}" in result.output.replace("\n", "")


def test_the_defaults_are_quick_to_say_and_json_is_json(
    lineage: tuple[str, str, str, Path], tmp_path: Path
) -> None:
    base, aligned, _, _ = lineage
    plain = tmp_path / "plain.txt"
    plain.write_text("w1 w2\nw3 w4\nw5 w6\n")
    found = run(base, aligned, "--prompts", plain, "--tokens", 4, "--out", tmp_path / "o", "--json")
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout.splitlines()[-1])
    assert set(said) == {"shift"} and {row["group"] for row in said["shift"]} >= {"prompts"}
    assert not (tmp_path / "o" / "contexts").exists()
    again = run(base, aligned, "--prompts", plain, "--tokens", 4, "--out", tmp_path / "p", "--json")
    assert again.stdout == found.stdout
    for name in ("result.json", "result.safetensors", "table.csv", "shift.svg", "pages/index.html"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "p" / name).read_bytes()


def test_a_dry_run_loads_and_writes_nothing(tmp_path: Path) -> None:
    said = run("no/base", "no/aligned", "--dry-run", "--topics", 3, "--out", tmp_path / "o")
    assert said.exit_code == 0 and "6 prompts in 2 groups, 24 tokens each" in said.output
    assert re.search(r"about [\d,]+ tokens read and [\d,]+ written; memory: 2 models", said.output)
    more = run(
        "no/b", "no/a", "--dry-run", "--context", "all", "--topics", 3, "--matrix", "--rewards"
    )
    counts = [
        int(re.findall(r"about ([\d,]+)", x.output)[0].replace(",", "")) for x in (said, more)
    ]
    assert counts[1] > counts[0] * (len(contexts.CONTEXTS) + 1) / 2
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topics", 0], "--topics is 0: give 1 or more"),
        (["--tokens", 0], "--tokens is 0"),
        (["--context", "kind"], "unknown base context 'kind'"),
        (["--drifted", "x"], "--drifted is read by --matrix only"),
        (["--prompts", "nowhere.jsonl"], "no such prompt file"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_loaded(arguments: list, said: str) -> None:
    found = run("no/base", "no/aligned", *arguments)
    assert found.exit_code != 0 and isinstance(found.exception, ValueError | FileNotFoundError)
    assert said in str(found.exception)


def test_help_has_examples_and_nothing_heavy_is_imported() -> None:
    said = run("--help").output
    assert "alignlens shift org/base org/instruct" in said and "--context" in said
    import subprocess
    import sys

    code = (
        "import sys; import analyses.commands.shift; "
        "assert not {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
