"""What the base reads before an answer: texts written out here, and a plain loop over prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from architectures import BOS, EOS, VOCABULARY

from analyses import TokenShift, token_shift
from analyses.tokens import contexts
from analyses.tokens.contexts import CONTEXTS, EXAMPLES, INSTRUCTION
from probes import HookedModel, datasets
from probes.prompts import Prompt
from probes.refusals import refuses

PROMPTS = tiny.words(10, seed=5)
GROUPS = ["a"] * 6 + ["b"] * 4
STEPS = 7
OTHERS = [name for name in CONTEXTS if name != "same"]
TALK = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4 w5"},
]
SYSTEM = {"role": "system", "content": "w9 w9"}
MINIMAL = "# Query:\n```\nw1 w2\n```\n\n# Answer:\n```\n"


def roomy(name: str, first_changed: int | None = None, seed: int = 0) -> HookedModel:
    """A tiny model with a context long enough for the written examples."""
    weights = tiny_lineage.weights(first_changed, seed)
    weights.config.max_position_embeddings = 2048
    return HookedModel(weights, tiny.tokenizer(), name=name)


@pytest.fixture(scope="module")
def models() -> tuple[HookedModel, HookedModel]:
    aligned = roomy("second", 1, seed=4)
    with torch.no_grad():
        aligned.model.lm_head.weight[EOS] *= 2.5  # pyright: ignore
    return roomy("first"), aligned


@pytest.fixture(scope="module")
def shifts(models: tuple[HookedModel, HookedModel]) -> dict[str, TokenShift]:
    options: Any = {"max_new_tokens": STEPS, "batch_size": 4}
    return {
        name: token_shift(*models, PROMPTS, GROUPS, base_context=name, **options)
        for name in CONTEXTS
    }


def written(prompt: Prompt, context: str, tokenizer: Any = None, **more: Any) -> str:
    """Text of a context around a prompt."""
    own = tiny.tokenizer() if tokenizer is None else tokenizer
    model = HookedModel(tiny_lineage.weights(), own, name="m", **more)
    return contexts.render(model.template, prompt, context).text


def text_by_hand(prompt: str, context: str) -> str:
    turn = f"# Query:\n```\n{prompt}\n```\n\n# Answer:\n```\n"
    if context == "plain":
        return prompt
    if context == "minimal":
        return turn
    shown = EXAMPLES[: {"urial": 3, "urial-3": 3, "urial-1": 1, "urial-0": 0}[context]]
    told = "".join(f"# Query:\n```\n{q}\n```\n\n# Answer:\n```\n{a}\n```\n\n" for q, a in shown)
    return f"# Instruction\n\n{INSTRUCTION}\n\n{told}{turn}"


def test_without_a_context_nothing_is_new(
    models: tuple[HookedModel, HookedModel], shifts: dict[str, TokenShift]
) -> None:
    default = token_shift(*models, PROMPTS, GROUPS, max_new_tokens=STEPS, batch_size=4)
    assert default.base_context == "same"
    for name in ("ranks", "p_base", "p_aligned"):
        assert torch.equal(getattr(default, name), getattr(shifts["same"], name))
    for name in OTHERS:
        assert not torch.equal(default.p_base, shifts[name].p_base)
    template = models[1].template
    assert contexts.render(template, PROMPTS[0]) == template.render(PROMPTS[0])


@pytest.fixture
def heard(
    models: tuple[HookedModel, HookedModel], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[tuple[int, ...]]]:
    """Rows of token ids, without pads, that each model is made to read in batches."""
    rows: dict[str, list[tuple[int, ...]]] = {"first": [], "second": []}
    for model in models:
        plain = model.engine.read

        def listening(batch: Any, *args: Any, _plain: Any = plain, _name: str = model.name) -> Any:
            if not args[1:]:  # the look at what lies behind the last block
                return _plain(batch, *args)
            for ids, mask in zip(batch.ids, batch.mask, strict=True):
                assert mask.sort().values.equal(mask)  # pads on the left: the ends line up
                rows[_name].append(tuple(ids[mask.bool()].tolist()))
            return _plain(batch, *args)

        monkeypatch.setattr(model.engine, "read", listening)
    return rows


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_answer_is_the_same_ids_right_behind_the_context(
    context: str,
    models: tuple[HookedModel, HookedModel],
    heard: dict[str, list[tuple[int, ...]]],
) -> None:
    _, aligned = models
    tokenizer = aligned.tokenizer
    answers = aligned.generate_ids(PROMPTS, STEPS)
    # decoded and encoded again they would be others, which this comparison would see
    assert any(
        tokenizer(tokenizer.decode(a), add_special_tokens=False)["input_ids"] != a for a in answers
    )
    token_shift(*models, PROMPTS, GROUPS, max_new_tokens=STEPS, base_context=context)
    for name in ("first", "second"):
        expected = []
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            if context == "same" or name == "second":
                before = aligned.template.render(prompt).ids
            else:
                before = tokenizer(text_by_hand(prompt, context))["input_ids"]
            expected.append((*before, *answer))
        assert sorted(heard[name]) == sorted(expected)
    assert (sorted(heard["first"]) == sorted(heard["second"])) == (context == "same")


@torch.no_grad()
@pytest.mark.parametrize("context", OTHERS)
def test_ranks_are_those_of_a_plain_loop(
    context: str, models: tuple[HookedModel, HookedModel], shifts: dict[str, TokenShift]
) -> None:
    base, aligned = models
    ranks, chances = [], []
    for prompt, answer in zip(PROMPTS, aligned.generate_ids(PROMPTS, STEPS), strict=True):
        before = aligned.tokenizer(text_by_hand(prompt, context))["input_ids"]
        for i, token in enumerate(answer):
            given = torch.tensor([[*before, *answer[:i]]])
            p = base.model(given).logits[0, -1, :VOCABULARY].double().softmax(0)
            order = p.sort(descending=True, stable=True).indices.tolist()
            ranks.append(order.index(token) + 1)
            chances.append(float(p[token]))
    found = shifts[context]
    assert found.ranks.tolist() == ranks
    assert found.p_base.tolist() == pytest.approx(chances, rel=1e-4)
    assert shifts["same"].ranks.tolist() != ranks


def test_the_aligned_model_is_not_touched(shifts: dict[str, TokenShift]) -> None:
    for name in OTHERS:
        assert shifts[name].tokens == shifts["same"].tokens
        assert torch.equal(shifts[name].p_aligned, shifts["same"].p_aligned)


def test_only_the_same_context_makes_a_model_its_own_equal(
    models: tuple[HookedModel, HookedModel],
) -> None:
    _, aligned = models
    for name in CONTEXTS:
        own = token_shift(
            aligned, aligned, PROMPTS, GROUPS, max_new_tokens=STEPS, base_context=name
        )
        assert bool(own.ranks.eq(1).all()) == (name == "same")
        for group in ("a", "b"):
            assert float(own.shares(group).value.sum()) == pytest.approx(1)


def test_the_texts() -> None:
    assert written("w1 w2", "minimal") == MINIMAL
    assert written("w1 w2", "plain") == "w1 w2"
    full = written("w1 w2", "urial")
    assert full.startswith("# Instruction\n\n") and full.endswith("\n```\n\n" + MINIMAL)
    assert full.count("# Answer:\n```\n") == len(EXAMPLES) + 1 == 4
    for name in ("urial", "urial-1", "urial-0", "urial-3"):
        assert written("w1 w2", name) == text_by_hand("w1 w2", name)
    assert written("w1 w2", "urial-3") == full
    assert contexts.check("urial-3") == "urial"
    assert contexts.sentence("urial-3", "x", "y") == contexts.sentence("urial", "x", "y")
    for name in CONTEXTS:  # the template's default system prompt belongs to the template
        assert ("you are helpful" in written("w1 w2", name)) == (name == "same")


def test_one_example_refuses_and_none_is_measured() -> None:
    assert [refuses(answer) for _, answer in EXAMPLES] == [False, True, False]
    shipped = {p for part in datasets.SPLITS for p in datasets.safety(part).prompts}
    assert len(shipped) > 500
    assert not shipped & {request for request, _ in EXAMPLES}


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_text_opens_with_one_bos_where_the_tokenizer_has_one(
    context: str, bos_tokenizer: Any
) -> None:
    own = HookedModel(tiny_lineage.weights(), bos_tokenizer, name="m")
    ids = contexts.render(own.template, "w1 w2", context).ids
    assert ids[0] == BOS and ids.count(BOS) == 1
    without = HookedModel(tiny_lineage.weights(), tiny.tokenizer(), name="m")
    assert BOS not in contexts.render(without.template, "w1 w2", context).ids
    # a bare request that brings its own; encoded carelessly, it would have two
    brought = contexts.render(own.template, "<s> w1 w2", "plain").ids
    assert brought.count(BOS) == 1
    assert bos_tokenizer("<s> w1 w2")["input_ids"].count(BOS) == 2


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_request_is_known_in_the_text(context: str, tokenizer: Any) -> None:
    own = HookedModel(tiny_lineage.weights(), tokenizer, name="m")
    found = contexts.render(own.template, "w1 w2", context)
    start, stop = found.content
    assert found.text[start:stop] == "w1 w2"
    assert found.n_prompt == len(found.ids)


def test_earlier_turns_become_answered_queries() -> None:
    turn = "# Query:\n```\nw1 w2\n```\n\n# Answer:\n```\nw3\n```\n\n"
    last = "# Query:\n```\nw4 w5\n```\n\n# Answer:\n```\n"
    assert written(TALK, "minimal") == turn + last
    assert written([SYSTEM, *TALK], "minimal") == f"# Instruction\n\nw9 w9\n\n{turn}{last}"
    full = written(TALK, "urial")
    assert full.endswith("\n```\n\n" + turn + last)
    told = written([SYSTEM, *TALK], "urial")
    assert told == full.replace(INSTRUCTION, INSTRUCTION + "\n\nw9 w9")
    for name in CONTEXTS:
        assert written(TALK[:1], name) == written("w1 w2", name)


@pytest.mark.parametrize(
    ("prompt", "context", "said"),
    [
        (TALK, "plain", "conversation of user, assistant, user: use same, minimal or urial"),
        ([SYSTEM, TALK[0]], "plain", "one bare request and cannot hold a conversation of system"),
        (TALK[:2], "minimal", "the last a request, and cannot hold a conversation of user, ass"),
        ([SYSTEM], "urial", "cannot hold a conversation of system: use same"),
        ([TALK[0], TALK[0]], "urial", "cannot hold a conversation of user, user: use same"),
        ([TALK[0], SYSTEM, TALK[0]], "minimal", "conversation of user, system, user: use same"),
        ([], "minimal", "a conversation is a list of"),
        ("", "plain", "the prompt '' has no tokens"),
        ("w1", "nope", "unknown base context 'nope': choose one of same, minimal, plain, urial"),
    ],
)
def test_what_a_context_cannot_hold_is_refused(prompt: Prompt, context: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        written(prompt, context)
    assert "\n" not in str(error.value)


def test_conversations_are_ranked_too(models: tuple[HookedModel, HookedModel]) -> None:
    prompts = [TALK, [SYSTEM, *TALK]]
    for name in ("same", "minimal", "urial"):
        found = token_shift(*models, prompts, ["a", "a"], max_new_tokens=3, base_context=name)
        assert found.prompts == ("w4 w5", "w4 w5")
        assert found.base_context == name
    with pytest.raises(ValueError, match="one bare request"):
        token_shift(*models, prompts, ["a", "a"], max_new_tokens=3, base_context="plain")


def test_without_a_template_plain_is_the_same(models: tuple[HookedModel, HookedModel]) -> None:
    one, other = (
        HookedModel(m.model, tiny.tokenizer(), name=m.name, template="none") for m in models
    )
    same, plain, minimal = (
        token_shift(one, other, PROMPTS, GROUPS, max_new_tokens=4, base_context=name)
        for name in ("same", "plain", "minimal")
    )
    assert torch.equal(same.p_base, plain.p_base)
    assert not torch.equal(same.p_base, minimal.p_base)


def test_a_context_that_does_not_fit_is_one_sentence() -> None:
    pair = tiny_lineage.hooked("first"), tiny_lineage.hooked("second", 1)
    with pytest.raises(ValueError, match=r"'urial' makes prompts of up to \d+ tokens, with 5 for"):
        token_shift(*pair, PROMPTS, GROUPS, max_new_tokens=5, base_context="urial")
    room = 128 - len(contexts.render(pair[1].template, "w1 w2", "minimal").ids)
    two = ["w1 w2", "w3 w4"]
    token_shift(*pair, two, ["a", "a"], max_new_tokens=room, base_context="minimal")
    with pytest.raises(ValueError, match="'minimal' makes prompts"):
        token_shift(*pair, two, ["a", "a"], max_new_tokens=room + 1, base_context="minimal")


def test_the_result_says_its_context(shifts: dict[str, TokenShift], tmp_path: Path) -> None:
    assert shifts["same"].reader == "first"
    for name in OTHERS:
        found = shifts[name]
        assert f"(context {name})" in str(found)
        ax = found.plot()
        assert name in ax.get_ylabel() and name in ax.get_title(loc="left")
        assert TokenShift.load(found.save(tmp_path / name)).base_context == name
    assert "context" not in str(shifts["same"])
    assert "context" not in shifts["same"].plot().get_ylabel()


def test_a_result_saved_before_contexts_was_of_the_same(
    shifts: dict[str, TokenShift], tmp_path: Path
) -> None:
    folder = shifts["same"].save(tmp_path / "old")
    old = json.loads((folder / "result.json").read_text())
    del old["base_context"]
    (folder / "result.json").write_text(json.dumps(old))
    assert TokenShift.load(folder).base_context == "same"


@pytest.mark.slow
def test_the_built_in_pair_in_every_context(base: HookedModel) -> None:
    aligned = HookedModel.load("builtin:aligned", device="cpu")
    twins = datasets.safety("test").limited(2)
    groups = ["harmful" if label else "harmless" for label in twins.labels]
    found = {
        name: token_shift(base, aligned, twins.prompts, groups, max_new_tokens=8, base_context=name)
        for name in CONTEXTS
    }
    for shift in found.values():
        assert shift.tokens == found["same"].tokens
        for group in ("harmful", "harmless"):
            assert float(shift.shares(group).value.sum()) == pytest.approx(1)
    values = [tuple(shift.p_base.tolist()) for shift in found.values()]
    assert len(set(values)) == len(CONTEXTS)
    # three answered queries teach the base how a refusal opens; the bare request does not
    first = {name: float(s.shares("harmful", range(1)).value[2]) for name, s in found.items()}
    assert first["urial"] < first["plain"]
    ids = [contexts.render(aligned.template, twins.prompts[0], name).ids for name in CONTEXTS]
    assert len(ids[3]) > 400 > len(ids[1]) > len(ids[2])
