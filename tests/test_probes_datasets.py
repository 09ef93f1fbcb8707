"""The prompt sets that ship, and the reading of a user's own."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from probes import Contrast, HookedModel, datasets
from probes.scores import wilson


def test_twins_are_as_documented() -> None:
    rows = datasets.twins()
    assert Counter(row["split"] for row in rows) == {"train": 320, "validation": 80, "test": 160}
    per_class = Counter(row["class"] for row in rows if row["split"] == "test")
    assert len(per_class) == 8 and set(per_class.values()) == {20}
    assert len({row["topic"] for row in rows}) == len(rows)


def test_no_prompt_stands_twice_or_in_two_splits() -> None:
    texts = [text.lower() for row in datasets.twins() for text in (row["harmful"], row["harmless"])]
    texts += [text.lower() for text in datasets.general()]
    assert len(set(texts)) == len(texts) == 2 * 560 + 240


def test_sizes_of_the_other_sets() -> None:
    assert len(datasets.formality()) == 200
    assert len(datasets.paragraphs()) == 100
    assert len(datasets.preferences()) == 40
    assert all(0.5 < row["rater_share"] <= 1 for row in datasets.preferences())
    assert len(datasets.dialogues()) == 30
    for messages in datasets.dialogues():
        assert messages[0]["role"] == "system" and messages[-1]["role"] == "user"


def test_choices_are_balanced_and_distinct() -> None:
    rows = datasets.choices()
    assert Counter(row["answer"] for row in rows) == {0: 50, 1: 50, 2: 50, 3: 50}
    assert all(len(set(row["choices"])) == 4 for row in rows)


def test_the_model_answers_choices_above_chance() -> None:
    model = HookedModel.load("builtin:base", template="none", device="cpu")
    rows = datasets.choices()[:40]
    prompts = [f"Question: {row['question']}\nAnswer:" for row in rows for _ in range(4)]
    answers = [f" {choice}" for row in rows for choice in row["choices"]]
    sums = torch.tensor([p.sum().item() for p in model.logprobs(prompts, answers, 80)])
    right = sums.view(-1, 4).argmax(1) == torch.tensor([row["answer"] for row in rows])
    assert wilson(int(right.sum()), 40).low > 0.4
    shuffled = sums.view(-1, 4).argmax(1).roll(1) == torch.tensor([row["answer"] for row in rows])
    assert wilson(int(shuffled.sum()), 40).low < 0.4  # the measure can fail


def test_pairs_are_read_from_jsonl_and_csv(tmp_path: Path) -> None:
    rows = [{"positive": f"a {i}", "negative": f"b {i}", "topic": f"t{i}"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = ["harmful,harmless,class", '"a, 0",b 0,x', "a 1,b 1,y"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    found = datasets.read(tmp_path / "pairs.jsonl")
    assert isinstance(found, Contrast)
    assert found.prompts[:2] == ("a 0", "b 0") and found.topics[:2] == ("t0", "t0")
    other = datasets.read(tmp_path / "pairs.csv")
    assert isinstance(other, Contrast)
    assert other.prompts[0] == "a, 0" and other.strata == ("x", "x", "y", "y")


def test_prompts_labels_and_messages_are_read(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\n two \n")
    assert datasets.read(tmp_path / "lines.txt") == ["one", "two"]
    rows = [{"text": "x", "label": 1}, {"text": "y", "label": 0}]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labelled = datasets.read(tmp_path / "labels.jsonl")
    assert isinstance(labelled, Contrast) and labelled.labels == (1, 0)
    talk = [{"role": "user", "content": "hi"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}))
    assert datasets.read(tmp_path / "talk.jsonl") == [talk]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("empty.txt", "\n \n", "the prompt set is empty"),
        ("bad.jsonl", "{not json", "is not valid JSONL"),
        ("odd.csv", "height,weight\n1,2", "has the columns height, weight: expected"),
        ("one.jsonl", '{"text": "x", "label": 1}', r"labels are \[1\]: a contrast needs both"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        datasets.read(tmp_path / name)


def test_a_missing_file_and_an_unknown_split_are_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"no such prompt file: nowhere\.jsonl"):
        datasets.read("nowhere.jsonl")
    with pytest.raises(ValueError, match="unknown split 'dev': choose one of train"):
        datasets.twins("dev")


def test_contrasts_split_by_topic_and_keep_strata() -> None:
    contrast = datasets.safety("train")
    parts = contrast.split(seed=1)
    topics = [set(part.topics) for part in parts.values()]
    assert not topics[0] & topics[1] and not topics[1] & topics[2] and not topics[0] & topics[2]
    assert sum(map(len, parts.values())) == len(contrast)
    assert contrast.split(seed=1)["test"].topics == parts["test"].topics
    assert contrast.split(seed=2)["test"].topics != parts["test"].topics
    for part in parts.values():
        assert part.strata is not None and len(set(part.strata)) == 8
        assert int(part.positive.sum()) * 2 == len(part)


def test_unequal_pairs_and_wrong_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="2 positive and 1 negative prompts: pairs need"):
        Contrast.of_pairs(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="the contrast is empty"):
        Contrast.of_pairs([], [])
    with pytest.raises(ValueError, match="2 prompts with 1 labels"):
        Contrast.labelled(["a", "b"], [1])


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Line ends inside a prompt are its own; a list of strings is a list of prompts."""
    odd = "one\u2028two\x0bthree"
    rows = [{"prompt": odd, "note": "first only"}, {"prompt": "b"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "odd.jsonl").write_text(lines, encoding="utf-8")
    assert datasets.read(tmp_path / "odd.jsonl") == [odd, "b"]
    (tmp_path / "lines.csv").write_text('prompt\n"first\nsecond"\n"a, b"\n')
    assert datasets.read(tmp_path / "lines.csv") == ["first\nsecond", "a, b"]
    (tmp_path / "list.json").write_text('["a prompt", "b"]')
    assert datasets.read(tmp_path / "list.json") == ["a prompt", "b"]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("a.json", '{"prompt": "a"}', "holds no list of prompts: expected objects or strings"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}', "row 2 of .* has no prompt, and row 1 has"),
        ("a.csv", "prompt,label\na,1\nb\n", "row 2 of .* has no label"),
        ("a.jsonl", '{"prompt": "a"', "is not valid JSONL"),
    ],
)
def test_files_that_are_not_prompts(file: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=said):
        datasets.read(tmp_path / file)
