"""`alignlens offsets` on tiny models, and the task it learns by default."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import commanding
import pytest
import tiny
import tiny_lineage
import torch

from probes import HookedModel, Site, datasets
from probes.lineage import targets
from probes.refusals import refuses
from steering import HeadOffsets, HeadRanking, Origin, steer
from steering.refusal_task import evenly, read_examples, refusal_examples
from steering.tuning import TrainingCurve

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offsets")
    tiny_lineage.save(root / "first")
    contrast = tiny_lineage.pairs(40)
    pairs = zip(contrast.prompts[::2], contrast.prompts[1::2], strict=True)
    rows = [json.dumps({"positive": a, "negative": b}) for a, b in pairs]
    (root / "pairs.jsonl").write_text("\n".join(rows))
    words = tiny.words(12, seed=1)
    rows = [json.dumps({"prompt": w, "chosen": "w3 w4", "rejected": "w5"}) for w in words]
    (root / "examples.jsonl").write_text("\n".join(rows) + "\n\n")
    (root / "bad.jsonl").write_text('{"prompt": "w1"}\n')
    return root


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(files)

    command = commanding.runner(monkeypatch, capfd, "offsets")

    def outcome(*arguments: object) -> tuple[int, str]:
        done = command(*arguments)
        return done.code, done.err if done.code else done.out

    return outcome


def test_lofit_saves_what_steers(files: Path, run: Run) -> None:
    given = ("--heads", 2, "--epochs", 1, "--tried", 0, "--out", "lofit")
    code, said = run("first", "examples.jsonl", "--loss", "dpo", *given)
    assert code == 0, said
    names = {"offsets.safetensors", "result.json", "record.json", "table.csv", "rates.json"}
    names |= {f"{name}.{kind}" for name in ("heads", "training") for kind in ("png", "svg")}
    assert names <= {p.name for p in (files / "lofit").iterdir()}
    offsets = HeadOffsets.load(files / "lofit" / "offsets.safetensors")
    assert len(offsets.heads) == 2
    assert len(TrainingCurve.load(files / "lofit").losses) == 2  # 12 examples in eights
    model = HookedModel.load(str(files / "first"))
    plain = model.logits(["w1 w2"])
    with steer(model, offsets):
        assert not torch.equal(model.logits(["w1 w2"]), plain)


def test_iti_saves_ranking_and_offsets(files: Path, run: Run) -> None:
    given = ("--heads", 3, "--permutations", 5, "--tried", 2, "--out", "iti")
    code, said = run("first", "pairs.jsonl", "--method", "iti", *given)
    assert code == 0, said
    assert "harmful refused: 0% before" in said
    assert "refusal log-odds of harmful prompts change by" in said and "random offsets" in said
    rates = json.loads((files / "iti" / "rates.json").read_text())
    assert len(rates["log-odds"]["null"]) == 20
    ranking = HeadRanking.load(files / "iti")
    assert HeadOffsets.load(files / "iti" / "offsets.safetensors").heads == tuple(
        sorted(ranking.top(3))
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--method", "rome"), "unknown method 'rome': choose lofit or iti"),
        (("--loss", "ppo"), "unknown loss 'ppo': choose sft or dpo"),
        (("--method", "iti", "--alpha", 0), "alpha 0 changes nothing"),
        (("--random", -1), "--random -1: give 1 or more topics, and 0 or more of the others"),
        (("bad.jsonl",), "line 1 of bad.jsonl is no example"),
        (("nowhere.jsonl",), "there is no file nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence(run: Run, given: tuple, sentence: str) -> None:
    code, said = run("first", *given, "--out", "mistake")
    assert code == 2
    assert said.startswith("error: ")
    assert sentence in said
    assert "Traceback" not in said


def test_a_dry_run_loads_nothing(run: Run) -> None:
    code, said = run("nobody/nothing", "--dry-run")
    assert code == 0
    assert "10 rounds over 192 shipped prompts; 80 answers of 12 tokens and 440 first" in said


def test_the_task_refuses_the_harmful_and_keeps_the_harmless(files: Path) -> None:
    model = HookedModel.load(str(files / "first"))
    rows = refusal_examples(model, "validation", 8, rejected=True)
    harmful = {t["harmful"]: t["topic"] for t in datasets.twins("validation")}
    bad = [r for r in rows if r.prompt in harmful]
    good = [r for r in rows if r.prompt not in harmful]
    assert len(bad) == 8
    assert len({t["class"] for t in datasets.twins("validation") if t["harmful"] in
                {r.prompt for r in bad}}) == 8  # fmt: skip
    assert all(refuses(r.chosen) for r in bad)
    assert all(harmful[str(r.prompt)] == r.topic for r in bad)
    assert all(any(str(r.rejected).startswith(c) for c in targets.COMPLIANCE) for r in bad)
    assert all(refuses(str(r.rejected)) and not refuses(r.chosen) for r in good)
    own = model.generate([r.prompt for r in good], 14)
    assert [r.chosen for r in good] == own
    assert all(r.rejected is None for r in refusal_examples(model, "validation", 2))


def test_examples_are_read(files: Path) -> None:
    rows = read_examples(files / "examples.jsonl")
    assert len(rows) == 12
    assert (rows[0].chosen, rows[0].rejected) == ("w3 w4", "w5")


def test_topics_are_taken_from_all_classes_alike() -> None:
    for part in ("train", "test"):
        twins = datasets.twins(part)
        whole = Counter(twin["class"] for twin in twins)
        for n in (20, 60, 96, 130):
            some = Counter(twin["class"] for twin in evenly(twins, n))
            assert some.total() == n
            assert all(abs(some[c] - whole[c] * n / len(twins)) < 1.01 for c in whole)
    assert evenly(twins, None) == evenly(twins, 10_000) == twins
    with pytest.raises(ValueError, match="0 topics were asked"):
        evenly(twins, 0)


def test_random_offsets_have_the_norms_and_no_direction(files: Path) -> None:
    model = HookedModel.load(str(files / "first"))
    width = model.layout.width(Site(0, "head_out"))
    own = HeadOffsets({(0, 1): torch.ones(width), (1, 0): 2 * torch.ones(width)}, Origin.of(model))
    drawn = own.randomised(5, seed=3)
    for other in drawn:
        assert other.heads == own.heads
        for head in own.heads:
            assert float(other[head].norm()) == pytest.approx(float(own[head].norm()), rel=1e-6)
    assert len({float(other[0, 1][0]) for other in drawn}) == 5
    assert torch.equal(own.randomised(5, seed=3)[4][1, 0], drawn[4][1, 0])
