"""Multiple-choice scores: against numpy, against whole passes, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from probes import HookedModel, Site
from probes.engines import Batch
from steering import HeadOffsets, Origin, Schedule, Steering, SteeringVector
from steering import choices as module
from steering.choices import ChoiceScores, multiple_choice, score_choices
from steering.questions import Question, truthfulqa

DATA = Path(__file__).parent / "data"
PRIMER = "w1 w2 w3 w4 w5 . w6 w7 w8 . "


def questions(n: int = 6, seed: int = 0) -> list[Question]:
    texts = [tiny.words(n, seed + i, 1, 5) for i in range(5)]
    return [Question(q, (a, b), (c, d), b) for q, a, b, c, d in zip(*texts, strict=True)]


def offsets(model: HookedModel, size: float = 0.5) -> HeadOffsets:
    g = torch.Generator().manual_seed(0)
    vectors = {at: size * torch.randn(16, generator=g) for at in ((0, 1), (2, 2))}
    return HeadOffsets(vectors, Origin.of(model))


def by_hand(model: HookedModel, asked: list[Question]) -> np.ndarray:
    """Scores from single rows of the plain model, in numpy; one row a question."""
    found = []
    for q in asked:
        for answer in q.answers:
            prompt = model.tokenizer(f"{PRIMER}Q: {q.question}\nA:").input_ids
            ids = prompt + model.tokenizer(f" {answer}").input_ids
            row = torch.tensor([ids])
            logits = model.engine.logits(Batch(row, torch.ones_like(row)))[0]
            x = logits.double().numpy()
            steps = x - np.log(np.exp(x).sum(-1, keepdims=True))
            found.append(sum(steps[t - 1, ids[t]] for t in range(len(prompt), len(ids))))
    return np.array(found).reshape(len(asked), -1)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "mamba"])
def test_scores_and_measures_equal_numpy(name: str, share: bool) -> None:
    model, asked = tiny.hooked(name), questions()
    want = by_hand(model, asked)
    found = score_choices(model, asked, primer=PRIMER, share=share, batch_tokens=60)
    np.testing.assert_allclose(found.scores.reshape(6, 4), want, rtol=1e-4)
    p = np.exp(want)
    np.testing.assert_allclose(found.mc2, p[:, :2].sum(1) / p.sum(1), rtol=1e-3)
    assert found.mc1.tolist() == (want[:, 1] > want[:, 2:].max(1)).tolist()
    assert found.n_tokens.reshape(6, 4)[0].tolist() == [
        len(model.tokenizer(a).input_ids) for a in asked[0].answers
    ]


@pytest.mark.parametrize("engine", ["transformers", "transformer_lens", "nnsight"])
def test_steered_scores_are_those_of_steered_passes(engine: str) -> None:
    plain, asked = tiny.hooked("llama"), questions()
    model = HookedModel(plain.model, tiny.tokenizer(), engine=engine, name="tiny")
    steer = offsets(plain)
    with plain.edit(steer.edits(plain)):
        want = by_hand(plain, asked)
    found = score_choices(model, asked, primer=PRIMER, steer=steer)
    np.testing.assert_allclose(found.scores.reshape(6, 4), want, rtol=1e-4)
    unsteered = score_choices(model, asked, primer=PRIMER)
    assert (found.scores - unsteered.scores).abs().max() > 0.1
    assert model.logits(["w1"]).equal(model.logits(["w1"]))


def test_the_beginning_runs_once_where_that_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny.hooked("llama"), questions()
    whole: list[int] = []
    slow = module._whole
    monkeypatch.setattr(
        module, "_whole", lambda m, rendered: (whole.append(len(rendered)), slow(m, rendered))[1]
    )
    vector = SteeringVector({Site(1, "resid_post"): torch.ones(64)}, Origin.of(model))
    early = Steering(vector, 1.0, schedule=Schedule("generated"))

    def runs_whole(steer: object) -> bool:
        whole.clear()
        score_choices(model, asked, primer=PRIMER, steer=steer)  # pyright: ignore
        return bool(whole)

    assert not runs_whole(None)
    assert not runs_whole(offsets(model))
    assert not runs_whole(Steering(vector, 2.0))
    assert runs_whole(early)
    with model.edit(vector.edits(model)):
        assert runs_whole(None)


@pytest.mark.parametrize("measure", ["mc1", "mc2"])
def test_as_a_measure_it_is_the_same_number(measure: str) -> None:
    model, asked = tiny.hooked("llama"), questions()
    for what in (None, offsets(model)):
        scored = score_choices(model, asked, primer=PRIMER, steer=what)
        found = multiple_choice(model, what, asked, measure=measure, primer=PRIMER)
        assert torch.equal(found, scored.values(measure))
    with pytest.raises(ValueError, match="unknown measure 'mc3': choose one of mc1, mc2"):
        multiple_choice(model, None, asked, measure="mc3")


def test_a_tail_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny.hooked("llama"), questions()
    want = score_choices(model, asked, primer=PRIMER).scores
    tail = module.Pass.tail
    monkeypatch.setattr(module.Pass, "tail", lambda self, h: tail(self, h * 1.01) + h[:, :1])
    torch.testing.assert_close(score_choices(model, asked, primer=PRIMER).scores, want)


def made(
    scores: list[float], question: list[int], true: list[int], best: list[int]
) -> ChoiceScores:
    return ChoiceScores(
        torch.tensor(scores),
        torch.tensor(question),
        torch.tensor(true).bool(),
        torch.tensor(best).bool(),
        torch.ones(len(scores), dtype=torch.long),
    )


def test_measures_of_given_scores() -> None:
    found = made(
        [-1.0, -9.0, -2.0, -5000.0, -5001.0, -3.0, -3.0],
        [0, 0, 0, 1, 1, 2, 2],
        [1, 1, 0, 1, 0, 1, 0],
        [1, 0, 0, 1, 0, 1, 0],
    )
    assert found.mc1.tolist() == [1, 1, 0]  # a tie is not a win
    e = np.exp
    assert found.mc2[0] == pytest.approx((e(-1) + e(-9)) / (e(-1) + e(-9) + e(-2)))
    assert found.mc2[1] == pytest.approx(1 / (1 + e(-1)))  # no underflow
    assert found.mc2[2] == pytest.approx(0.5)
    shifted = made(
        (found.scores - 7).tolist(),
        found.question.tolist(),
        [1, 1, 0, 1, 0, 1, 0],
        [1, 0, 0, 1, 0, 1, 0],
    )
    torch.testing.assert_close(shifted.mc2, found.mc2, rtol=1e-4, atol=1e-4)


def test_intervals_are_over_questions(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    n = 60
    question = torch.arange(n).repeat_interleave(3).tolist()
    kinds = [1, 0, 0] * n
    before = made((-10 * torch.rand(3 * n, generator=g)).tolist(), question, kinds, kinds)
    better = before.scores + 3.0 * torch.tensor(kinds)
    after = made(better.tolist(), question, kinds, kinds)
    mean, low, high = before.interval("mc1")
    assert mean == pytest.approx(float(before.mc1.mean()))
    assert low < mean < high
    gain = after.gain(before, "mc2")
    assert 0 < gain.low < gain.value < gain.high
    assert before.gain(before, "mc1").value == 0
    other = made([-1.0, -2.0], [0, 0], [1, 0], [1, 0])
    with pytest.raises(ValueError, match="different questions"):
        after.gain(other, "mc1")
    with pytest.raises(ValueError, match="unknown measure"):
        after.interval("mc3")
    back = ChoiceScores.load(after.save(tmp_path))
    assert torch.equal(back.mc2, after.mc2)
    assert list(back.frame()["answers"]) == [3] * n
    assert "of 60 questions" in str(back)
    assert back.plot().get_ylabel().startswith("MC2")


def test_questions_are_checked() -> None:
    q = Question("why", ("a.",), ("b.",), "c.")
    assert q.true == ("c.", "a.")
    with pytest.raises(ValueError, match="is given as true and as false"):
        Question("why", ("a.",), ("a.", "b."), "a.")
    with pytest.raises(ValueError, match="needs a best and a false answer"):
        Question("why", ("a.",), (), "a.")
    with pytest.raises(ValueError, match="there are no questions"):
        score_choices(tiny.hooked("llama"), [])


def test_truthfulqa_is_read(tmp_path: Path) -> None:
    found = truthfulqa(DATA / "truthfulqa_train.csv", DATA / "truthfulqa_val.csv")
    assert len(found) == 408
    assert len({q.question for q in found}) == 408
    first = found[0]
    assert first.best == "No, pigs cannot fly." and first.best in first.true
    assert all(a.endswith(".") and a == a.strip() for q in found for a in q.answers)
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("Question,Answer\nwhy,so\n")
    with pytest.raises(ValueError, match="no table of TruthfulQA"):
        truthfulqa(wrong)
