"""What is claimed of rounds, how replies are read, and what is kept of how it was run."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import tiny_lineage
import torch

from analyses.drift.conversation_refusals import multi_round_refusals
from analyses.drift.tipping import Tipping, tipping
from analyses.drift.tipping_agents import read_label
from analyses.drift.tipping_items import ITEMS, ITEMS_TOGETHER
from analyses.drift.tipping_together import tipping_together
from probes import HookedModel
from probes.prompts import prompts_hash

AB = ("A", "B")


def made(own: Sequence[Sequence[int]], items: int) -> Tipping:
    """The same choices in each run of an item; 20 flat histories for a null."""
    rows = torch.tensor(own)
    flat = torch.zeros_like(rows)
    choices = torch.stack([rows, flat, *[flat] * 20])
    names = ("own", "neutral", *(f"shuffled {i + 1}" for i in range(20)))
    of = tuple(f"i{i % items:02d}" for i in range(len(rows)))
    return Tipping("a", of, names, choices, torch.full(choices.shape, torch.nan), (0.0, 1.0), 5)


@pytest.mark.parametrize("items", [2, 30])
def test_items_that_move_alike_claim_nothing(items: int) -> None:
    found = made([[0, 1, 1]] * (2 * items), items)
    slope, change = found.slope(), found.change()
    assert slope.value == slope.low == slope.high > (found.null_95 or 0.0)
    assert change.low < change.value == 1  # what can be said of them
    assert found.claimed is False
    assert ", not claimed" in str(found) and "no resample of the items" in str(found)
    mixed = made([[0, 1, 1]] * 57 + [[0, 1, 0]] * 3, 30)
    assert mixed.claimed is True and "no resample" not in str(mixed)


def test_few_items_are_said_with_the_number() -> None:
    few = made([[0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0]], 4)
    assert few.notes == ("only 4 items: intervals over fewer than 20 are too narrow",)
    assert str(few).endswith(few.notes[0])
    many = made([[0, 1, 1], [0, 0, 0]] * 20, 40)
    assert many.notes == () and "only" not in str(many)
    one = made([[0, 1, 1]] * 2, 1)
    assert one.claimed is False and one.slope().low != one.slope().low  # NaN
    assert "only 1 items" in str(one)


def test_several_agents_over_few_items_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="only 4 groups"):
        found = tipping_together(lambda _: "A", rounds=1, name="letter")
    assert "only 4 items" in str(found)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("B is better. Option A would take too long.", 1),
        ("A is better. Option B would take too long.", 0),
        ("I would not choose A, I take B", 1),
        ("I would not choose A.", None),
        ("The answer is A or B? B.", None),
        ("B because it is faster", 1),
        ("A because it is faster", 0),
        ("A is slower, so my answer: B", 1),
        ("B is slower, so my answer is A.", 0),
        ("Option A would take too long, so B.", None),
        ("Option A breaks the rule, option B keeps it.", None),
        ("Option B is right", 1),
        ("Option A is right", 0),
        ("A or B", None),
        ("A and B are both fine.", None),
        ("Should I choose A? No. I choose B.", 1),
        ("I choose A over B", 0),
        ("If I choose A, I lose; I choose B.", 1),
        ("A quick note: choose option B.", 1),
        ("I like A. I like B.", None),
        ("My choice is option A.", 0),
    ],
)
def test_what_a_reply_names(reply: str, expected: int | None) -> None:
    assert read_label(reply, AB) == expected
    # neither label is read more often than the other, but for the article
    mirror = reply.translate(str.maketrans("AB", "BA"))
    if not mirror.startswith(("A quick", "B quick")):
        assert read_label(mirror, AB) == (None if expected is None else 1 - expected)


def test_only_a_is_an_article() -> None:
    assert read_label("A good question!", AB) is None
    assert read_label("2 good reasons", ("1", "2")) == 1
    assert read_label("B good", AB) == 1


def test_records_say_what_was_run(llama: HookedModel) -> None:
    with pytest.warns(UserWarning, match="only 4 groups"):
        many = tipping_together(lambda _: "X", rounds=1, labels=("X", "Y"), rewards=(3.0, 2.0, 1.0))
    assert many.record.settings["rewards"] == [3.0, 2.0, 1.0]
    assert many.record.settings["labels"] == ["X", "Y"]
    assert [item["name"] for item in many.record.settings["items"]] == [
        item.name for item in ITEMS_TOGETHER
    ]
    hashes = set()
    for items, labels in ((ITEMS[:2], AB), (ITEMS[2:4], AB), (ITEMS[:2], ("X", "Y"))):
        with pytest.warns(UserWarning, match="only 2 groups"):
            one = tipping(lambda _: "A", items, rounds=2, shuffles=0, labels=labels)
        hashes.add(one.record.prompts_hash)
        assert one.record.settings["items"][0]["violating"] == items[0].violating
        assert one.record.settings["labels"] == list(labels)
    assert len(hashes) == 3 and "" not in hashes


@pytest.mark.filterwarnings("ignore:only .* groups")
def test_the_record_of_a_model_hashes_what_it_read(llama: HookedModel) -> None:
    twins = tiny_lineage.pairs().split(seed=0)
    model = copy.copy(llama)

    def generate(given: Sequence[Any], *_: Any, **__: Any) -> list[str]:
        return ["I can't do that."] * len(given)

    model.generate = generate  # pyright: ignore
    asked = twins["test"]
    options: Any = {"past": twins["train"], "pasts": ("refusals",), "turns": (1,)}
    found = multi_round_refusals(model, asked, **options)
    assert found.record.prompts_hash == prompts_hash(model.template.render_all(asked.prompts))
    settings = found.record.settings
    past = prompts_hash(model.template.render_all(twins["train"].prompts))
    assert settings["past_hash"] == past and settings["prompts"] == "words"
    assert settings["pasts"] == ["refusals"] and settings["max_new_tokens"] == 10
    other = multi_round_refusals(model, twins["validation"], **options)
    assert other.record.prompts_hash != found.record.prompts_hash
