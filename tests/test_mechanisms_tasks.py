"""Tasks: right answers by construction, no collisions, parts apart, and honest refusals to make."""

from collections.abc import Callable

import pytest
import tiny
import tiny_tasks
import torch

from analyses.mechanisms.boxes import OBJECTS, boxes
from analyses.mechanisms.greater_than import NOUNS, MassDifference, greater_than
from analyses.mechanisms.indirect_objects import NAMES, indirect_object
from analyses.mechanisms.task import Task
from analyses.mechanisms.tasks import TASKS, TaskAccuracy, accuracy, refusal_task
from analyses.mechanisms.words import PARTS, continuation, single_tokens
from probes import HookedModel
from probes.scores import wilson

PLAIN = ("boxes", "indirect-object", "greater-than")


def words_at(model: HookedModel, task: Task, place: str, changed: bool = False) -> list[str]:
    """What stands at a place of the prompts, or of the counterfactuals."""
    rows = task.rendered(model)[changed]
    return [
        model.tokenizer.decode([r.ids[at[0]]])
        for r, at in zip(rows, task.places[place], strict=True)
    ]


@pytest.mark.parametrize("name", PLAIN)
def test_a_task_is_the_same_every_time_and_its_parts_share_nothing(name: str) -> None:
    model = tiny_tasks.plain()
    made = {part: TASKS[name](model, part, 20) for part in PARTS}
    assert made["test"].prompts == TASKS[name](model, "test", 20).prompts
    assert len({p for task in made.values() for p in task.prompts}) == 60
    told = {
        part: set(" ".join(map(str, t.prompts)).replace(",", "").split())
        for part, t in made.items()
    }
    dealt = set({"boxes": OBJECTS, "indirect-object": NAMES, "greater-than": NOUNS}[name])
    for a in PARTS:
        assert told[a] & dealt
        for b in PARTS:
            assert a == b or not told[a] & told[b] & dealt


@pytest.mark.parametrize("counterfactual", ["query", "example"])
@pytest.mark.parametrize("size", [2, 4])
def test_boxes_are_answered_by_the_label(size: int, counterfactual: str) -> None:
    model = tiny_tasks.plain()
    task = boxes(model, "train", 30, boxes=size, counterfactual=counterfactual)
    for prompt, answer, other in zip(task.prompts, task.answers, task.others, strict=True):
        stated, asked = str(prompt).split(". Box ")
        label = asked.split()[0]
        inside = {s.split()[-1]: s.split()[1] for s in stated.split(", ")}
        assert len(inside) == size
        assert model.tokenizer.decode([answer]) == inside[label]
        said = model.tokenizer.decode([other])
        assert (said in inside.values()) == (counterfactual == "query") and said != inside[label]
        assert str(prompt).replace(",", "").replace(".", "").split().count(label) == 2
    labels = [str(p).split()[-3] for p in task.prompts]
    assert words_at(model, task, "query label") == labels
    assert words_at(model, task, "previous label") == labels
    assert words_at(model, task, "object") == [model.tokenizer.decode([a]) for a in task.answers]
    assert set(words_at(model, task, "last")) == {"the"}
    earlier = zip(task.places["previous label"], task.places["query label"], strict=True)
    assert all(a < b for a, b in earlier)
    changed = words_at(model, task, "query label", changed=True)
    assert all(a != b for a, b in zip(labels, changed, strict=True))


@pytest.mark.parametrize("counterfactual", ["swap", "ABC"])
def test_the_indirect_object_is_the_name_that_stands_once(counterfactual: str) -> None:
    model = tiny_tasks.plain()
    task = indirect_object(model, "validation", 30, counterfactual=counterfactual)
    people = zip(
        words_at(model, task, "subject1"),
        words_at(model, task, "subject2"),
        words_at(model, task, "object"),
        words_at(model, task, "subject2", changed=True),
        task.answers,
        task.others,
        strict=True,
    )
    for first, second, receiver, put, answer, other in people:
        assert first == second == model.tokenizer.decode([other])
        assert receiver == model.tokenizer.decode([answer]) != first
        assert (put == receiver) == (counterfactual == "swap") and put != first
    order = [a < b for a, b in zip(task.places["subject1"], task.places["object"], strict=True)]
    assert 10 <= sum(order) <= 20  # either name comes first
    assert len({str(p).split()[0] for p in task.prompts}) == 5  # every template


@pytest.mark.parametrize("digits", [1, 2])
def test_greater_than_counts_what_lies_above(digits: int) -> None:
    model = tiny_tasks.plain(digits)
    task = greater_than(model, "test", 24)
    assert isinstance(task.metric, MassDifference)
    decode = model.tokenizer.decode
    for i, prompt in enumerate(task.prompts):
        year, stem = str(prompt).split()[-5], str(prompt).split()[-1]
        assert len(year) == 4 and year == stem + year[-digits:]
        start = int(year[-digits:])
        above = {int(decode([t])) for t in task.metric.answers[i]}
        below = {int(decode([t])) for t in task.metric.others[i]}
        assert above == set(range(start + 1, 10**digits)) and below == set(range(start + 1))
        assert int(decode([task.answers[i]])) == start + 1
        assert int(decode([task.others[i]])) == start - 1
        ids = model.template.render(prompt).ids
        assert int(decode([ids[task.places["start"][i][0]]])) == start
    even = torch.zeros(len(task), model.layout.vocab_size)
    sizes = [
        (len(a) - len(b)) / even.shape[1]
        for a, b in zip(task.metric.answers, task.metric.others, strict=True)
    ]
    assert torch.allclose(task.metric(even), torch.tensor(sizes, dtype=torch.float64))
    few = task.only([3, 1])  # the metric follows
    assert few.metric(even[:2])[0] == pytest.approx(sizes[3])
    with pytest.raises(ValueError, match="answers for 24 prompts, the run has 2"):
        task.metric(even[:2])


def test_words_are_looked_up_behind_others_and_collisions_are_left_out() -> None:
    model = tiny_tasks.plain()
    found = single_tokens(model, ("apple", "book", "zebra", "apple book", "apple"))
    assert set(found) == {"apple", "book"}  # unknown ones and two tokens are none
    assert continuation(model, "the apple", " book") == [found["book"]]
    assert continuation(model, "the year 1", "743") is None  # 17 43 is another cut


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: boxes(tiny.hooked(), "test", 4), "is plain text and tiny llama was loaded with a "),
    (lambda: boxes(tiny_tasks.plain(), "tset", 4), "unknown part 'tset': choose one of train"),
    (lambda: boxes(tiny_tasks.plain(), boxes=1), "1 boxes leave nothing to tell apart"),
    (lambda: boxes(tiny_tasks.plain(), boxes=25), "box labels as single tokens and the task"),
    (lambda: boxes(tiny_tasks.plain(), n=0), "0 examples of the task 'boxes' were asked"),
    (lambda: boxes(tiny_tasks.plain(), counterfactual="x"), "choose one of query, example"),
    (lambda: indirect_object(tiny_tasks.plain(), counterfactual="x"), "choose one of swap, ABC"),
    (lambda: greater_than(tiny_tasks.plain(), digits=3), "digits=3: give 2, 1, or None"),
    (lambda: greater_than(tiny_tasks.plain(1), digits=2), "no two-digit numbers as single .* try"),
    (
        lambda: boxes(tiny_tasks.plain(2, "Box")),
        "gave 0 different examples of the 60 asked with this tokenizer",
    ),
    (lambda: refusal_task(tiny_tasks.plain(), "test", 2), "loaded without a chat template"),
]


@pytest.mark.parametrize(("make", "said"), MISTAKES)
def test_what_a_tokenizer_cannot_say_is_an_error_with_advice(
    make: Callable[[], object], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_accuracy_is_counted_over_prompts() -> None:
    model = tiny_tasks.plain()
    task = boxes(model, "test", 20, boxes=2)
    found = accuracy(model, task)
    logits = model.logits(task.prompts)
    beats = [float(row[a] > row[b]) for row, a, b in zip(logits, task.answers, task.others)]  # noqa: B905
    top = [int(row.argmax()) == a for row, a in zip(logits, task.answers, strict=True)]
    assert found.hits[1].tolist() == beats and found.hits[2].tolist() == top
    assert found.hits[0].equal(found.hits[1])  # the metric is the logit difference
    limits = wilson(int(sum(beats)), 20)
    assert found.shares[1].tolist() == pytest.approx([sum(beats) / 20, limits.low, limits.high])
    assert found.chance[:2] == (0.5, 0.5) and "20 prompts" in str(found)
    assert list(found.frame()["measure"]) == ["favoured", "beats", "top"]
    assert found.plot().get_ylabel() == "share of prompts"
    swapped = Task(**{**vars(task), "answers": task.others, "others": task.answers})
    assert accuracy(model, swapped).hits[1].equal(~found.hits[1])


def test_any_number_above_is_right_for_greater_than(tmp_path) -> None:
    model = tiny_tasks.plain(1)
    task = greater_than(model, "test", 20)
    assert isinstance(task.metric, MassDifference)
    found = accuracy(model, task)
    top = model.logits(task.prompts).argmax(-1).tolist()
    right = [t in a for t, a in zip(top, task.metric.answers, strict=True)]
    assert found.hits[2].tolist() == right
    assert TaskAccuracy.load(found.save(tmp_path)).shares.equal(found.shares)


@pytest.mark.slow
def test_the_built_in_model_refuses_and_its_base_finds_the_indirect_object() -> None:
    model = HookedModel.load("builtin:aligned")
    with pytest.raises(ValueError, match="500 twins of the part test were asked and 57 have"):
        refusal_task(model, "test", 500)
    task = refusal_task(model, "test", 16)
    clean, changed = task.rendered(model)
    assert [len(a.ids) for a in clean] == [len(b.ids) for b in changed]
    assert not set(task.others) & set(task.answers)
    assert accuracy(model, task).shares[0, 0] > 0.6
    base = HookedModel.load("builtin:base", template="none")
    for name, n in (("indirect-object", 16), ("greater-than", 16)):
        assert accuracy(base, TASKS[name](base, "validation", n)).shares[0, 1] > 0.5
