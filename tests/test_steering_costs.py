"""Costs and judges: against independent computations, with what must and must not be found."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

from probes import HookedModel, Site, datasets
from probes.prompts import Prompt
from probes.refusals import refuses
from probes.scores import bca_bootstrap, wilson
from steering import Origin, Schedule, Steering, SteeringVector, costs, effects
from steering.costs import Reference
from steering.intervals import change_interval, mean_interval
from steering.judges import Disagreement, by_model, by_phrase, by_score, disagreement

PROMPTS = tiny.words(7, seed=5)


def vector(model: HookedModel, site: str = "1.resid_post", seed: int = 0) -> SteeringVector:
    at = Site.parse(site)
    drawn = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector({at: drawn}, Origin.of(model))


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return tiny.hooked("llama")


@pytest.fixture(scope="module")
def reference(model: HookedModel) -> Reference:
    return Reference.of(model, PROMPTS, 6)


def full_logits(model: HookedModel, ids: Sequence[int]) -> Tensor:
    """The plain model's logits of one row, no engine, no padding."""
    with torch.no_grad():
        return model.model(torch.tensor([list(ids)])).logits[0].double()


def added(model: HookedModel, site: str, shift: Tensor):
    """The same edit by a hook of torch's own."""
    layer = model.model.get_submodule(f"model.layers.{Site.parse(site).layer}")

    def hook(_module, _args, output):
        if isinstance(output, tuple):
            return (output[0] + shift, *output[1:])
        return output + shift

    return layer.register_forward_hook(hook)


# --- KL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_a_model_does_not_differ_from_itself(model: HookedModel, keep: bool) -> None:
    reference = Reference.of(model, PROMPTS, 6, keep=keep)
    assert (reference.logits is None) != keep
    for what in (None, Steering(vector(model), 0.0)):
        assert torch.equal(costs.kl(model, what, reference), torch.zeros(7).double())
    # and does when steered at all
    assert (costs.kl(model, Steering(vector(model), 0.01), reference) > 0).all()


def test_kl_is_the_full_computation(model: HookedModel, reference: Reference) -> None:
    what = Steering(vector(model), 0.5)
    found = costs.kl(model, what, reference)
    assert found.dtype == torch.float64
    assert (found > 0).all()
    for row, value in zip(reference.rows, found, strict=True):
        before = full_logits(model, row.ids)
        handle = added(model, "1.resid_post", 0.5 * what.what.vectors[Site(1, "resid_post")])
        try:
            after = full_logits(model, row.ids)
        finally:
            handle.remove()
        p, q = before.softmax(-1), after.softmax(-1)
        own = (p * (p / q).log()).sum(-1)[row.n_prompt - 1 : -1]
        assert len(own) == row.n_answer
        assert math.isclose(float(value), float(own.mean()), rel_tol=1e-4)
        # from steered to unsteered is another number
        other = (q * (q / p).log()).sum(-1)[row.n_prompt - 1 : -1].mean()
        assert not math.isclose(float(value), float(other), rel_tol=1e-4)


def test_kl_does_not_depend_on_what_is_kept_or_batched(
    model: HookedModel, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = Steering(vector(model), 0.5)
    found = costs.kl(model, what, reference)
    fresh = Reference.of(model, PROMPTS, 6, keep=False)
    assert fresh == reference and fresh.key == reference.key
    assert torch.equal(costs.kl(model, what, fresh), found)
    monkeypatch.setattr(effects, "_ELEMENTS", 1)  # one row at a time
    torch.testing.assert_close(costs.kl(model, what, fresh), found, rtol=1e-4, atol=0)


def test_the_answers_are_the_unsteered_greedy_ones(
    model: HookedModel, reference: Reference
) -> None:
    answers = model.generate_ids(PROMPTS, 6)
    assert [list(row.ids[row.n_prompt :]) for row in reference.rows] == answers
    assert Reference.of(model, PROMPTS, 5).key != reference.key


def test_steering_of_the_answer_alone_is_seen(model: HookedModel, reference: Reference) -> None:
    late = costs.kl(model, Steering(vector(model), 0.5, schedule=Schedule("generated")), reference)
    assert (
        0
        < float(late.mean())
        < float(costs.kl(model, Steering(vector(model), 0.5), reference).mean())
    )
    # the first token is predicted from the prompt, which stays unsteered
    only = Reference.of(model, PROMPTS, 1)
    same = costs.kl(model, Steering(vector(model), 0.5, schedule=Schedule("generated")), only)
    assert torch.equal(same, torch.zeros(7).double())


def test_a_reference_is_of_the_unsteered_model(model: HookedModel) -> None:
    what = Steering(vector(model), 0.5)
    with model.edit(what.edits(model)):
        with pytest.raises(ValueError, match=r"edits are in force on .*Reference\.of takes it"):
            Reference.of(model, PROMPTS, 3)
    with model.edit(Steering(vector(model), 0.0).edits(model)):  # which installs nothing
        Reference.of(model, PROMPTS, 3)


def test_a_reference_belongs_to_its_model(reference: Reference) -> None:
    with pytest.raises(ValueError, match=r"belongs to another model than tiny gpt2.*Reference\.of"):
        costs.kl(tiny.hooked("gpt2"), None, reference)


# --- perplexity, repetition, choices ------------------------------------------------------------


def test_perplexity_of_text_is_that_of_the_plain_model(model: HookedModel) -> None:
    texts = tiny.words(5, seed=9, shortest=4)
    found = costs.text_log_perplexity(model, None, texts)
    what = Steering(vector(model), 2.0, schedule=Schedule("generated"))
    steered = costs.text_log_perplexity(model, what, texts)
    for text, value in zip(texts, found, strict=True):
        ids = model.tokenizer(text)["input_ids"]
        steps = full_logits(model, ids).log_softmax(-1)[:-1]
        own = -steps.gather(1, torch.tensor(ids[1:])[:, None]).mean()
        assert math.isclose(float(value), float(own), rel_tol=1e-5)
    assert bool((steered != found).all())


def test_answers_are_written_steered_and_read_unsteered(model: HookedModel) -> None:
    what = Steering(vector(model), 3.0)
    found = costs.answer_log_perplexity(model, what, PROMPTS, tokens=5)
    assert model.generate_ids(PROMPTS, 5) != model.generate_ids(PROMPTS, 5, steer=what)
    rendered = model.template.render_all(PROMPTS)
    answers = model.generate_ids(PROMPTS, 5, steer=what)
    for r, answer, value in zip(rendered, answers, found, strict=True):
        steps = full_logits(model, [*r.ids, *answer]).log_softmax(-1)[len(r.ids) - 1 : -1]
        own = -steps.gather(1, torch.tensor(answer)[:, None]).mean()
        assert math.isclose(float(value), float(own), rel_tol=1e-5)
    # greedy answers of the model itself are what it finds least odd
    assert float(costs.answer_log_perplexity(model, None, PROMPTS, tokens=5).mean()) < float(
        found.mean()
    )


def test_repetition_counts_what_came_before() -> None:
    assert costs.repeated([1, 2, 3, 4, 5, 6]) == 0
    assert costs.repeated([1, 2, 3]) == 0
    assert costs.repeated([7] * 10) == pytest.approx(6 / 7)  # seven 4-grams, one of them new
    assert costs.repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert costs.repeated([1, 1, 2, 2], n=1) == 0.5


def test_repetition_reads_the_steered_answers(model: HookedModel) -> None:
    what = Steering(vector(model), 3.0)
    answers = model.generate_ids(PROMPTS, 12, steer=what)
    found = costs.repetition(model, what, PROMPTS, tokens=12)
    assert found.tolist() == [costs.repeated(a) for a in answers]


def test_a_reference_holds_answers_of_any_length() -> None:
    """Shapes are checked on one random element at a time: often enough, all would be met."""
    rows = tuple(effects.Row(tuple(range(4 + n)), 4) for n in (2, 5, 9))
    for _ in range(60):
        reference = Reference("model", rows, tuple(torch.zeros(row.n_answer, 7) for row in rows))
    assert len(reference.logits or ()) == 3


def test_choices_take_the_likeliest(model: HookedModel) -> None:
    items = [
        {"question": "w1 w2", "choices": ["w3", "w4 w5", "w6", "w7"], "answer": 1},
        {"question": "w8", "choices": ["w9", "w10"], "answer": 0},
    ]
    plain = HookedModel(model.model, model.tokenizer, template="none")
    right = []
    for item in items:
        asked = [f"Question: {item['question']}\nAnswer:"] * len(item["choices"])
        sums = [s.sum() for s in plain.logprobs(asked, [f" {c}" for c in item["choices"]])]
        right.append(float(torch.stack(sums).argmax() == item["answer"]))
    assert costs.mistakes(model, None, items).tolist() == [1 - r for r in right]
    with pytest.raises(ValueError, match="no questions"):
        costs.mistakes(model, None, [])


def test_answer_logprobs_are_the_models_own(model: HookedModel) -> None:
    answers = tiny.words(7, seed=6)
    own = torch.stack([s.double().sum() for s in model.logprobs(PROMPTS, answers)])
    torch.testing.assert_close(
        effects.answer_logprobs(model, None, PROMPTS, answers), own, rtol=1e-5, atol=1e-5
    )


def test_a_function_of_the_model_becomes_a_measure(model: HookedModel) -> None:
    own = effects.under(lambda m: m.logits(PROMPTS)[:, 3])
    what = Steering(vector(model), 1.0)
    assert torch.equal(own(model, None), model.logits(PROMPTS)[:, 3])
    with model.edit(what.edits(model)):
        expected = model.logits(PROMPTS)[:, 3]
    assert torch.equal(own(model, what), expected)
    assert not torch.equal(expected, model.logits(PROMPTS)[:, 3])


def test_an_empty_row_is_refused() -> None:
    with pytest.raises(ValueError, match="one token at least"):
        effects.Row((1, 2), 2)


# --- judges -------------------------------------------------------------------------------------


def test_refusals_are_judged_on_the_steered_answer(model: HookedModel) -> None:
    what = Steering(vector(model), 3.0)
    seen: list[list[str]] = []

    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[bool]:
        seen.append(list(answers))
        return [len(p) % 2 == 0 for p in prompts]

    found = effects.refusals(model, what, PROMPTS, tokens=4, judge=judge)
    assert seen == [model.generate(PROMPTS, 4, steer=what)]
    assert found.tolist() == [float(len(p) % 2 == 0) for p in PROMPTS]
    assert by_phrase(["", ""], ["I cannot help.", "Sure."]) == [True, False]
    assert by_score(lambda a: float(len(a)), 3.0)(["", ""], ["abc", "abcd"]) == [False, True]


def test_disagreement_is_scikit_learns_kappa(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(60, generator=generator) < 0.4
    noisy = torch.where(torch.rand(60, generator=generator) < 0.2, ~truth, truth)
    other = torch.rand(60, generator=generator) < 0.5
    verdicts = {"truth": truth, "noisy": noisy, "other": other}
    judges = {name: (lambda p, a, v=v: v.tolist()) for name, v in verdicts.items()}
    answers = [f"answer {i}" for i in range(60)]
    found = disagreement(judges, [f"w{i}" for i in range(60)], answers)
    names = list(verdicts)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            own = cohen_kappa_score(verdicts[a].numpy(), verdicts[b].numpy())
            assert float(found.kappa[i, j]) == pytest.approx(own, abs=1e-12)
    assert abs(float(found.kappa[0, 2])) < 0.3 < float(found.kappa[0, 1])
    row = found.frame().iloc[0]
    same = int((truth == noisy).sum())
    assert (row["agreement"], row["low"], row["high"]) == wilson(same, 60)
    assert row["only_judge"] + row["only_other"] == 60 - same
    cases = found.cases()
    split = [i for i in range(60) if len({bool(v[i]) for v in verdicts.values()}) > 1]
    assert cases["index"].tolist() == split
    assert cases["answer"].tolist() == [answers[i] for i in split]
    assert cases["noisy"].tolist() == [bool(noisy[i]) for i in split]
    assert "agree least" in str(found)
    loaded = Disagreement.load(found.save(tmp_path))
    assert torch.equal(loaded.verdicts, found.verdicts) and loaded.judges == found.judges
    found.plot()


def test_judges_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="1 judges, .* give two judges or more"):
        disagreement({"a": by_phrase}, ["x"], ["y"])
    with pytest.raises(ValueError, match=r"judge 'b' gave \(1,\) values for 2 answers"):
        disagreement({"a": by_phrase, "b": lambda p, a: [True]}, ["x", "x"], ["y", "z"])


def test_a_model_judges_by_its_next_token(model: HookedModel) -> None:
    judge = by_model(model, "{prompt} ? {answer} ?", yes="w1", no="w2")
    asked = ["w5 w6", [{"role": "user", "content": "w7"}]]
    shown = model.logits(["w5 w6 ? w8 {prompt} ?", "w7 ? w9 ?"])
    ids = [model.tokenizer.convert_tokens_to_ids(w) for w in ("w1", "w2")]
    expected = (shown[:, ids[0]] > shown[:, ids[1]]).tolist()
    assert judge(asked, ["w8 {prompt}", "w9"]) == expected
    flipped = by_model(model, "{prompt} ? {answer} ?", yes="w2", no="w1")
    assert flipped(asked, ["w8 {prompt}", "w9"]) == [not v for v in expected]
    with pytest.raises(ValueError, match="begin with the same token"):
        by_model(model, yes="w1", no="w1 w2")
    with pytest.raises(ValueError, match="never shows {answer}"):
        by_model(model, "{prompt}?")


# --- intervals ----------------------------------------------------------------------------------


def test_mean_interval_is_the_bootstrap_of_means() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(40, 3, generator=generator).double() ** 3
    groups = [f"t{int(i)}" for i in torch.randint(12, (40,), generator=generator)]
    found = mean_interval(values, groups, resamples=300, seed=4)
    for c in range(3):
        column = values[:, c]
        own = bca_bootstrap(
            lambda rows, column=column: float(column[rows].mean()), groups, resamples=300, seed=4
        )
        assert (float(found.value[c]), float(found.low[c]), float(found.high[c])) == pytest.approx(
            tuple(own), abs=1e-12
        )
    # single prompts as groups pretend to know more
    alone = mean_interval(values[:, :1], None, resamples=300, seed=4)
    assert alone.low.shape == (1,)
    with pytest.raises(ValueError, match="40 values came with 39 groups"):
        mean_interval(values, groups[1:])
    with pytest.raises(ValueError, match="one group only"):
        mean_interval(values, ["a"] * 40)


def test_changes_are_paired() -> None:
    generator = torch.Generator().manual_seed(3)
    before = 10 * torch.randn(50, generator=generator).double()
    after = before + 0.1 + 0.05 * torch.randn(50, generator=generator).double()
    found = change_interval(after[:, None], before)
    assert 0 < float(found.low) < float(after.mean() - before.mean()) < float(found.high) < 0.2
    # unpaired, such a change is lost in the spread of prompts
    unpaired = change_interval(after[torch.randperm(50, generator=generator), None], before)
    assert float(unpaired.low) < 0 < float(unpaired.high)


def test_rates_that_all_flip_have_an_interval() -> None:
    before = torch.zeros(10).double()
    found = change_interval(torch.ones(10, 1), before)
    assert float(found.value) == 1 == float(found.high)
    assert 0.5 < float(found.low) < 0.8
    more = change_interval(torch.ones(100, 1), torch.zeros(100).double())
    assert float(found.low) < float(more.low) < 1
    nothing = change_interval(torch.zeros(10, 1), before, rate=True)
    assert float(nothing.low) < 0 == float(nothing.value) < float(nothing.high)


def test_a_continuous_cost_that_never_arose_has_no_width() -> None:
    """All 0 is a rate only if it is said; a 1 anywhere says so."""
    before = torch.zeros(10).double()
    for after in (torch.zeros(10, 1), torch.full((10, 1), 0.25)):
        found = change_interval(after, before)
        assert float(found.low) == float(found.high) == float(after[0, 0])
    said = change_interval(torch.full((10, 1), 0.25), before, rate=True)
    assert float(said.low) == float(said.high)  # no rate, whatever is said
    fall = change_interval(torch.zeros(10, 1), torch.ones(10).double())
    assert float(fall.low) == -1 < float(fall.high) < -0.5


# --- the real model -----------------------------------------------------------------------------


def test_costs_of_a_real_model(base: HookedModel) -> None:
    """The unsteered model has the costs it should; a strong push has all of them."""
    items, asked = datasets.choices()[:12], datasets.general("validation")[:3]
    texts = [" ".join(t.split()[:40]) for t in datasets.paragraphs()[:2]]
    push = Steering(vector(base, "12.resid_post"), 20.0)
    measures = {
        "mistakes": partial(costs.mistakes, items=items),
        "text": partial(costs.text_log_perplexity, texts=texts),
        "answers": partial(costs.answer_log_perplexity, prompts=asked, tokens=16),
    }
    before = {name: float(m(base, None).mean()) for name, m in measures.items()}
    after = {name: float(m(base, push).mean()) for name, m in measures.items()}
    assert before["mistakes"] <= 0.4 and after["mistakes"] >= before["mistakes"]
    assert 1.5 < before["text"] < 5 and after["text"] > before["text"] + 1
    assert before["answers"] < 0.8 < after["answers"]
    assert not any(refuses(a) for a in base.generate(asked, 8))
    assert costs.benign_refusals(base, None, asked).tolist() == [0.0] * 3
