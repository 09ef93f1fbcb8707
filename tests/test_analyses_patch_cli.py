"""`alignlens patch`: a map on validation prompts, its choice on test prompts, what it refuses."""

import json
from pathlib import Path

import commanding
import pytest
import tiny
import torch
from commanding import Run

from analyses.mechanisms import tasks
from analyses.mechanisms.task import Task
from analyses.patching.grid import PatchMap
from analyses.patching.metrics import LogitDifference
from analyses.patching.patch import Patched
from probes.model import HookedModel


def made(model: HookedModel, part: str, n: int) -> Task:
    """Prompts of four words and their counterfactuals, another set for each part."""
    seed = {"train": 0, "validation": 1, "test": 2}[part]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(tiny.N_WORDS, (n, 4), generator=generator).tolist()
    prompts = tuple(" ".join(f"w{w}" for w in row) for row in drawn)
    other = tuple(" ".join(f"w{(w + 1) % tiny.N_WORDS}" for w in row) for row in drawn)
    return Task(
        "words", prompts, other, "every word", (9,) * n, (10,) * n,
        tuple(f"{part}-{i}" for i in range(n)), LogitDifference((9,) * n, (10,) * n), True,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "refusal", made)

    import tiny_lineage

    for name, first in (("base", None), ("aligned", 1)):
        tiny_lineage.save(tmp_path / name, first)
    return commanding.runner(monkeypatch, capfd)


@pytest.mark.parametrize("kind", ["heads", "parts", "positions"])
def test_a_map_and_its_choice_are_written(run: Run, tmp_path: Path, kind: str) -> None:
    said = run("patch", "aligned", "--kind", kind, "--topics", 6, "--top", 2, "--out", "p")
    assert said.code == 0, said.err
    assert f"map of {kind}" in said.out and "chosen on validation, on test" in said.out
    found = PatchMap.load(tmp_path / "p")
    chosen = Patched.load(tmp_path / "p" / "chosen")
    assert found.kind == kind and len(chosen.target) == 6
    for name in ("map.png", "map.svg", "table.csv", "chosen/chosen.png", "chosen/table.csv"):
        assert (tmp_path / "p" / name).stat().st_size > 0
    # the choice is the map's, the prompts are others
    want = 1 if kind == "positions" else 2
    assert len(chosen.sites) == want
    assert found.record.prompts_hash != chosen.record.prompts_hash


def test_another_checkpoint_gives_the_values(run: Run, tmp_path: Path) -> None:
    said = run("patch", "base", "--source", "aligned", "--topics", 4, "--json", "--out", "p")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    # base and aligned differ from layer 1 on, and so do the values of heads above it only
    changes = {(row["layer"], row["head"]): row["change"] for row in found["map"]}
    assert all(value == 0 for (layer, _), value in changes.items() if layer < 1)
    assert any(value != 0 for (layer, _), value in changes.items() if layer >= 1)
    same = run("patch", "base", "--source", "base", "--topics", 4, "--out", "q")
    assert same.code == 0 and "every change is exactly 0" in same.out


def test_denoising_exchanges_the_prompts(run: Run, tmp_path: Path) -> None:
    for name, more in (("noise", ()), ("denoise", ("--denoise",))):
        assert run("patch", "aligned", "--topics", 4, *more, "--out", name).code == 0
    noise, denoise = (PatchMap.load(tmp_path / name) for name in ("noise", "denoise"))
    assert torch.equal(noise.target, denoise.source) and torch.equal(noise.source, denoise.target)


def test_mistakes_are_one_sentence(run: Run) -> None:
    for arguments, said in (
        (("--kind", "neurons"), "unknown kind 'neurons': choose heads"),
        (("--task", "chess"), "unknown task 'chess': choose refusal"),
        (("--source", "base", "--denoise"), "--denoise exchanges prompts and --source models"),
        (("--top", 0), "give at least 1 of each"),
        (("--part", "resid_mid"), "has no heads"),
    ):
        outcome = run("patch", "aligned", "--topics", 4, *arguments)
        assert outcome.code == 2 and said in outcome.err, (arguments, outcome)


def test_a_dry_run_loads_nothing(run: Run, tmp_path: Path) -> None:
    said = run("patch", "nowhere", "--dry-run", "--out", "none")
    assert said.code == 0 and "1 checkpoints" in said.out and not (tmp_path / "none").exists()
