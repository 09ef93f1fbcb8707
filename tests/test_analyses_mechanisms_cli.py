"""`alignlens circuit`, `lens` and `mechanism-diff` on tiny checkpoints: what they write, keep and
refuse."""

import json
import math
from pathlib import Path

import commanding
import pytest
import tiny
import tiny_lineage
import torch
from commanding import Run
from safetensors.torch import save_file

from analyses.mechanisms import tasks
from analyses.mechanisms.circuit import Circuit, heads_of
from analyses.mechanisms.cmap import Cmap
from analyses.mechanisms.comparison import Transplant
from analyses.mechanisms.direct import DirectAttribution
from analyses.mechanisms.discovery import Discovery
from analyses.mechanisms.faithfulness import Faithfulness, FaithfulnessCurve
from analyses.mechanisms.lens_difference import LensDifference
from analyses.mechanisms.logit_lens import LogitLens
from analyses.mechanisms.overlap import MechanismOverlap
from analyses.mechanisms.task import Task
from analyses.patching import cells
from analyses.patching.metrics import LogitDifference
from probes.model import HookedModel


def made(model: HookedModel, part: str, n: int) -> Task:
    """Prompts of four words and their counterfactuals, other topics for each part."""
    seed = {"train": 0, "validation": 1, "test": 2}[part]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(tiny.N_WORDS, (n, 4), generator=generator).tolist()
    prompts = tuple(" ".join(f"w{w}" for w in row) for row in drawn)
    other = tuple(" ".join(f"w{(w + 1) % tiny.N_WORDS}" for w in row) for row in drawn)
    return Task(
        "words", prompts, other, "every word", (9,) * n, (10,) * n,
        tuple(f"{part}-{i}" for i in range(n)), LogitDifference((9,) * n, (10,) * n), True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints; the base has no chat template of its own."""
    root = tmp_path_factory.mktemp("mechanisms")
    for name, first in (("base", None), ("aligned", 1), ("drifted", 2), ("other-seed", 0)):
        tiny_lineage.save(root / name, first, template=name != "base")
    return root


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(files)
    monkeypatch.setitem(tasks.TASKS, "refusal", made)
    return commanding.runner(monkeypatch, capfd)


FEW = ("--k", 5, "--prompts", 6, "--tests", 6, "--draws", 3)


def test_a_circuit_is_chosen_kept_and_measured_on_other_prompts(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run("circuit", "aligned", *FEW, "--feeding", 1, "--out", "c")
    assert said.code == 0, said.err
    assert "6 heads chosen" in said.out and "have a faithfulness of" in said.out
    assert said.err.count("Only 6 topics") == 1
    out = files / "c"
    for name in (
        "paths.png", "paths.svg", "circuit.png", "table.csv", "record.json", "circuit/result.json",
        "faithfulness/faithfulness.png", "faithfulness/table.csv", "curve/curve.png",
    ):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    found, alone = Discovery.load(out), Faithfulness.load(out / "faithfulness")
    kept, curve = Circuit.load(out / "circuit"), FaithfulnessCurve.load(out / "curve")
    assert [len(found.groups[name]) for name in found.names] == [5, 1] and len(kept) == 6
    assert alone.circuit == tuple(map(str, kept.sites)) and len(alone.random) == 3
    # chosen on topics that it was not measured on
    assert set(kept.chosen_on) == {f"train-{i}" for i in range(6)}
    assert found.record.prompts_hash != alone.record.prompts_hash
    # all heads are the whole model, exactly
    assert curve.sizes[-1] == len(curve.ranked) == sum(kept.heads)
    assert curve.normalised[-1].tolist() == [1, 1, 1]

    table = (out / "table.csv").read_text()

    def measured(kept: cells.Kept, *_: object) -> None:
        assert kept.folder is None, "a layer was measured twice"

    with monkeypatch.context() as patch:
        patch.setattr(cells.Kept, "write", measured)
        again = run("circuit", "aligned", *FEW, "--feeding", 1, "--out", "c", "--json")
    assert again.code == 0, again.err
    assert (out / "table.csv").read_text() == table
    assert {r["site"] for r in json.loads(again.out) if r["chosen"]} == set(alone.circuit)
    # other prompts may not be mixed with what is there
    other = run("circuit", "aligned", *FEW, "--prompts", 5, "--feeding", 1, "--out", "c")
    assert other.code == 2 and "give an empty folder" in other.err
    assert len(other.err.strip().splitlines()) == 2, other.err  # "loading" and the error


def test_without_a_second_stage_there_is_one_group(run: Run, files: Path) -> None:
    said = run(
        "circuit", "aligned", *FEW, "--feeding", 0, "--ablation", "counterfactual", "--out", "e"
    )
    assert said.code == 0, said.err
    assert Discovery.load(files / "e").names == ("writing the answer",)
    assert Faithfulness.load(files / "e" / "faithfulness").ablation == "counterfactual"


def test_the_lens_of_one_checkpoint_and_of_two(run: Run, files: Path) -> None:
    asked = ("--prompts", 6, "--resamples", 50)
    said = run("lens", "aligned", "base", *asked, "--out", "l")
    assert said.code == 0, said.err
    assert "logit lens of aligned" in said.out and "of aligned minus base" in said.out
    assert said.err.count("only 6 topics") == 1
    out = files / "l"
    for name in (
        "model/lens/lens.png", "model/lens/probability.png", "model/lens/rank.svg",
        "model/terms/terms.png", "model/accuracy/accuracy.png", "other/lens/table.csv",
        "difference/lens/lens.png", "difference/terms/terms.png", "difference/terms/table.csv",
    ):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    # the base has no template of its own and reads the aligned one's
    seen = [LogitLens.load(out / which / "lens") for which in ("model", "other")]
    assert seen[0].record.prompts_hash == seen[1].record.prompts_hash
    changed = LensDifference.load(out / "difference" / "lens")
    mean = seen[0].mean[:, :, 0].double() - seen[1].mean[:, :, 0].double()
    assert torch.allclose(changed.difference[..., 0].double(), mean, atol=1e-4)
    assert not bool(changed.difference[2, 0].any())  # block 0 and all below it are the same
    both = DirectAttribution.load(out / "difference" / "terms")
    assert both.other == "base" and both.error < 1e-4
    same = run("lens", "aligned", "aligned", *asked, "--json", "--out", "same")
    parts = json.loads(same.out)
    assert len(parts) == 3 and set(parts["difference"]) == {"lens", "terms"}
    assert all(row["logit difference"] == 0 for row in parts["difference"]["lens"])
    assert all(row["mean"] == 0 for row in parts["difference"]["terms"])


def test_a_file_of_translators_is_read(run: Run, files: Path) -> None:
    width = HookedModel.load("aligned").d_model
    save_file(
        {"0.weight": torch.eye(width), "0.bias": torch.zeros(width)}, files / "same.safetensors"
    )
    for name, more in (("plain", ()), ("tuned", ("--tuned", "same.safetensors"))):
        said = run("lens", "aligned", "--prompts", 4, "--resamples", 20, *more, "--out", name)
        assert said.code == 0, said.err
    plain, tuned = (LogitLens.load(files / n / "model" / "lens") for n in ("plain", "tuned"))
    assert tuned.tuned and not plain.tuned
    assert torch.allclose(plain.values, tuned.values, atol=1e-5)


def test_one_circuit_is_put_to_work_in_other_checkpoints(run: Run, files: Path) -> None:
    asked = ("base", "drifted", "--control", "other-seed", *FEW)
    said = run("mechanism-diff", "aligned", *asked, "--out", "m")
    assert said.code == 0, said.err
    assert "faithfulness of the circuit of aligned" in said.out
    assert "looking for the circuit of aligned" in said.err and "Only 6 topics" in said.err
    out = files / "m"
    for name in (
        "transplant.png", "transplant.svg", "table.csv", "overlap/overlap.png",
        "circuit/result.json", "cmap-base/cmap.png", "cmap-drifted/table.csv",
        "cmap-other-seed/cmap.svg",
    ):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    found, shared = Transplant.load(out), MechanismOverlap.load(out / "overlap")
    assert found.names == ("aligned", "base", "drifted", "other-seed")
    assert found.roles == ("reference", "compared", "compared", "control")
    assert shared.names == found.names[1:] and shared.k == 5
    assert found.change[0].tolist() == [0, 0, 0] and bool((found.change[1:, 0] != 0).all())

    # a circuit found before, and a checkpoint beside itself
    fast = run("mechanism-diff", "aligned", "drifted", "--circuit", "m/circuit", *FEW,
               "--no-cross", "--out", "fast")  # fmt: skip
    assert fast.code == 0 and not list((files / "fast").glob("cmap-*")), fast.err
    same = run("mechanism-diff", "aligned", "aligned", "--circuit", "m/circuit", *FEW,
               "--json", "--out", "n")  # fmt: skip
    assert same.code == 0 and "looking for" not in same.err, same.err
    rows = json.loads(same.out)
    assert [row["role"] for row in rows] == ["reference", "compared"]
    assert rows[0]["normalised"] == rows[1]["normalised"] and rows[1]["change"] == 0
    assert math.isclose(rows[0]["normalised"], float(found.normalised[0, 0]), rel_tol=1e-5)
    assert len({row["model"] for row in rows}) == 2
    assert "every change is exactly 0" in str(Cmap.load(next((files / "n").glob("cmap-*"))))


def test_mistakes_are_one_sentence(run: Run, files: Path) -> None:
    run("lens", "aligned", "--prompts", 4, "--resamples", 20, "--out", "kept")
    for arguments, said in (
        (("circuit", "aligned", "--task", "chess"), "unknown task 'chess': choose one of refusal"),
        (("circuit", "aligned", "--k", 0), "expected at least 1 head"),
        (("circuit", "aligned", "--ablation", "noise"), "unknown ablation 'noise': choose one"),
        (("circuit", "aligned", "--draws", 0), "give at least 1"),
        (("circuit", "nowhere/at/all"), "nowhere/at/all"),
        (("lens", "aligned", "--task", "chess"), "unknown task 'chess': choose one of refusal"),
        (("lens", "aligned", "--part", "exam"), "unknown part 'exam': choose one of train"),
        (("lens", "aligned", "--prompts", 1), "expected at least 2"),
        (("lens", "aligned", "--tuned", "no.safetensors"), "there is no file no.safetensors"),
        (("lens", "aligned", "nowhere/at/all"), "nowhere/at/all"),
        (("mechanism-diff", "aligned"), "no checkpoint was given to compare with"),
        (("mechanism-diff", "aligned", "base", "--circuit", "none"), "none holds no saved circuit"),
        (
            ("mechanism-diff", "aligned", "base", "--circuit", "kept/model/lens"),
            "holds a LogitLens",
        ),
        (("mechanism-diff", "aligned", "base", "--k", 0), "expected at least 1 head"),
        (("mechanism-diff", "aligned", "base", "--ablation", "noise"), "unknown ablation 'noise'"),
        (("mechanism-diff", "aligned", "nowhere/at/all"), "nowhere/at/all"),
    ):
        outcome = run(*arguments)
        assert outcome.code == 2 and said in outcome.err, (arguments, outcome)
        assert len(outcome.err.strip().splitlines()) == 1, outcome.err


def test_what_only_the_model_knows_is_said_before_it_is_measured(run: Run) -> None:
    heads = sum(heads_of(HookedModel.load("aligned")))
    for arguments, said in (
        (("lens", "aligned", "--prompts", 4, "--position", "middle"), "middle"),
        (("lens", "base", "aligned", "--prompts", 4), "template"),
        (("circuit", "aligned", *FEW, "--k", 1, "--out", "first"), "all lie in the first block"),
        (
            ("mechanism-diff", "aligned", "base", *FEW, "--k", heads),
            f"--k {heads} of {heads} heads",
        ),
    ):
        outcome = run(*arguments)
        lines = [x for x in outcome.err.strip().splitlines() if not x.startswith("loading")]
        assert outcome.code == 2 and said in outcome.err, (arguments, outcome)
        assert len([x for x in lines if x.startswith("error")]) == 1 and len(lines) < 3, lines


def test_a_dry_run_loads_nothing(run: Run, files: Path) -> None:
    for arguments, said in (
        (("circuit", "nowhere"), "2 stages"),
        (("circuit", "nowhere", "--feeding", 0), "1 stages"),
        (("lens", "nowhere", "elsewhere"), "2 checkpoints"),
        (("mechanism-diff", "nowhere", "elsewhere", "--control", "there"), "3 checkpoints"),
        (("mechanism-diff",), "4 checkpoints"),
    ):
        outcome = run(*arguments, "--dry-run", "--out", "none")
        assert outcome.code == 0 and said in outcome.out, (arguments, outcome)
    assert not (files / "none").exists()


def test_help_is_light(run: Run) -> None:
    for verb in ("circuit", "lens", "mechanism-diff"):
        assert run(verb, "--help").code == 0
