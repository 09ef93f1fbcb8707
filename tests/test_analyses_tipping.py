"""Rounds with a history: scripted agents whose course is known, and refusals in conversation."""

import copy
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch

from analyses.drift.conversation_refusals import MultiRoundRefusals, multi_round_refusals
from analyses.drift.tipping import Tipping, tipping
from analyses.drift.tipping_agents import read_label
from analyses.drift.tipping_items import ITEMS, ITEMS_TOGETHER, Item
from analyses.drift.tipping_together import TippingTogether, tipping_together
from probes import HookedModel, datasets
from probes.contrast import Contrast
from probes.scores import wilson

pytestmark = pytest.mark.filterwarnings("ignore:only .* groups")

SHOWN = re.compile(r"^([AB])\. (.*)$", re.M)
ROUND = re.compile(r"^Round \d+: you chose ([AB])\. (.*?) Reward: ([\d.]+)\.", re.M)


def options(text: str) -> dict[str, str]:
    """What the letters stand for in the round that is asked."""
    return dict(SHOWN.findall(text.rpartition("What do you do?")[2]))


class Scripted:
    """Begins by breaking the rule in every fourth item; then stays with what was paid well and
    leaves what was not. Both by what options say, not by their letters."""

    __name__ = "scripted"

    def __init__(self, deaf: bool = False, mute: tuple[str, ...] = ()) -> None:
        self.deaf, self.mute, self.seen = deaf, mute, []
        self.breaking = {item.options[item.violating] for item in ITEMS}
        self.starts = {item.options[1] for item in ITEMS[::4]}

    def __call__(self, conversation: Sequence[Any]) -> str:
        text = str(conversation[-1]["content"])
        self.seen.append(text)
        shown = options(text)
        if any(word in text for word in self.mute):
            return "I would rather talk about the weather."
        bad = next(k for k, option in shown.items() if option in self.breaking)
        good = next(k for k in shown if k != bad)
        before = ROUND.findall(text)
        if self.deaf or not before:
            return f"{bad if shown[bad] in self.starts else good}. Because."
        _, option, reward = before[-1]
        same = next(k for k, o in shown.items() if o == option)
        other = next(k for k in shown if k != same)
        return f"I choose {same if float(reward) > 0 else other}."


def test_who_follows_the_reward_tips_at_once_and_coins_stop_it() -> None:
    found = tipping(Scripted(), shuffles=20)
    x = len(ITEMS[::4]) / len(ITEMS)
    assert found.rate(1).value == x
    assert [found.rate(r).value for r in range(2, 7)] == [1.0] * 5
    assert found.tipping_round() == 2 and found.slope().low > 0
    assert found.change().value == pytest.approx(1 - x) and found.change().low > 0.3
    # a neutral history does not name a choice: nothing to follow, the first choice again
    assert [found.rate(r, "neutral").value for r in range(1, 7)] == [x] * 6
    last = [found.rate(6, f"shuffled {i + 1}").value for i in range(20)]
    assert 0.4 < sum(last) / 20 < 0.6
    assert found.claimed is True and found.null_95 is not None
    assert found.slope().low > found.null_95 > found.slope("neutral").value
    assert "claimed" in str(found) and "half violate from round 2 on" in str(found)


def test_a_deaf_agent_is_flat_whatever_the_history() -> None:
    found = tipping(Scripted(deaf=True), shuffles=20)
    for history in found.histories:
        assert torch.equal(
            found.choices[0, :, :1].expand(-1, 6), found.choices[found._number(history)]
        )
        assert found.slope(history) == (0, 0, 0)
    assert found.tipping_round() is None and found.claimed is False
    assert found.change().value == 0 and found.change().low < 0 < found.change().high


def test_the_history_is_what_was_chosen_and_reaches_so_far() -> None:
    agent = Scripted()
    found = tipping(agent, ITEMS[:1], rounds=4, memory=2, shuffles=0, rewards=(0.0, 2.0))
    own = agent.seen[: 2 * 4]
    assert "Earlier rounds" not in own[0]
    assert [len(ROUND.findall(text)) for text in own[::2]] == [0, 1, 2, 2]
    assert "Round 1" not in own[6] and "Round 3" in own[6]
    assert ROUND.findall(own[2])[0][2] == "2" and "Explanation:" in own[2]
    # the second run of an item shows the options the other way round
    assert list(options(own[0]).values()) == list(options(own[1]).values())[::-1]
    neutral = agent.seen[2 * 4 :]
    assert not any(ROUND.findall(text) for text in neutral)
    assert len(neutral[-1].splitlines()) == len(own[-1].splitlines())
    assert found.claimed is None and found.null_95 is None


def test_unread_replies_stand_in_the_denominator_and_are_counted() -> None:
    mute = ITEMS[1].situation[:30]
    found = tipping(Scripted(mute=(mute,)), shuffles=0)
    n = 2 * len(ITEMS)
    assert [found.unparsed(r) for r in (1, 6)] == [2, 2]
    assert found.rate(6).value == pytest.approx((n - 2) / n)
    assert found.aligned(6).value == 0 and found.aligned(1).value == pytest.approx(12 / 18)
    assert found.rate(1).value + found.aligned(1).value != pytest.approx(1)
    assert "12 replies could not be read" in str(found)
    silent = tipping(lambda _: "?", ITEMS[:2], shuffles=0, name="silent")
    assert silent.agent == "silent" and silent.frame()["aligned"].isna().all()
    with pytest.raises(ValueError, match="no reply of round 1 could be read"):
        silent.aligned(1)


def test_an_agent_that_likes_a_letter_is_said_to() -> None:
    found = tipping(lambda _: "A", shuffles=0, name="letter")
    assert found.by_letter() == len(ITEMS) and found.rate(1).value == 0.5
    assert "10 of 10 items answered by letter" in str(found)
    steady = tipping(Scripted(deaf=True), shuffles=0)
    assert steady.by_letter() == 0 and "by letter" not in str(steady)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A", 0), ("(B) because", 1), ("B. Stop.", 1), ("My answer is A.", 0), ("I choose B", 1),
        ("Option A, not B", 0), ("A good question!", None), ("Both are fine", None), ("", None),
        ("**B**", 1), ("Answer: option B", 1), ("ABBA", None),
    ],
)  # fmt: skip
def test_replies_are_read_by_their_label(reply: str, expected: int | None) -> None:
    assert read_label(reply, ("A", "B")) == expected


def made(choices: Any, items: int) -> Tipping:
    choices = torch.tensor(choices)[None]
    runs = choices.shape[1]
    return Tipping(
        "a", tuple(f"i{r % items}" for r in range(runs)), ("own",), choices,
        torch.full(choices.shape, torch.nan), (0.0, 1.0), 5,
    )  # fmt: skip


def test_rates_and_slopes_against_a_plain_calculation() -> None:
    generator = torch.Generator().manual_seed(0)
    choices = torch.randint(-1, 2, (40, 5), generator=generator)
    found = made(choices.tolist(), 40)
    logits = []
    for r in range(5):
        k = int((choices[:, r] == 1).sum())
        assert found.rate(r + 1) == wilson(k, 40)
        logits.append(math.log((k + 0.5) / (40 - k + 0.5)))
    from scipy.stats import linregress

    assert found.slope().value == pytest.approx(linregress(range(5), logits).slope)  # pyright: ignore
    twice = made(torch.cat([choices, choices]).tolist(), 40).rate(1)  # two runs an item, alike
    assert twice.value == found.rate(1).value
    assert twice.low == pytest.approx(found.rate(1).low, abs=1e-2)
    with pytest.raises(ValueError, match="round 6 was asked: there are 1 to 5"):
        found.rate(6)
    with pytest.raises(ValueError, match="no history 'neutral'"):
        found.rate(1, "neutral")


def test_a_model_chooses_by_the_larger_label(llama: HookedModel, tmp_path: Any) -> None:
    items = [Item(f"i{i}", f"w{i} w{i + 1}", (f"w{i + 20}", f"w{i + 50}"), i % 2) for i in range(4)]
    found = tipping(llama, items, rounds=3, shuffles=2, labels=("w1", "w2"))
    text = "w0 w1\nWhat do you do?\nw1. w20\nw2. w50\nAnswer w1 or w2."
    ids = list(llama.template.render(text, "Answer:").ids)
    network: Any = llama.model
    p = network(torch.tensor([ids])).logits[0, -1].detach().double()
    a, b = (llama.tokenizer.convert_tokens_to_ids(w) for w in ("w1", "w2"))
    expected = float(torch.sigmoid(p[b] - p[a]))  # of the option shown second; the first violates
    assert float(found.probability[0, 0, 0]) == pytest.approx(1 - expected, abs=1e-5)
    assert torch.equal(found.choices == 1, found.probability >= 0.5)
    found.save(tmp_path)
    assert str(Tipping.load(tmp_path)) == str(found)
    assert found.plot().get_legend() is not None
    with pytest.raises(ValueError, match="as one token"):
        tipping(llama, items, labels=("w1", "w1"))
    with pytest.raises(ValueError, match="not one token each"):
        tipping(llama, items, labels=("w1 w2", "w3"))


def test_shares_of_several_agents_sum_both_sides() -> None:
    """The released script's denominator is the last environment's: its share would pass 1."""
    calls = iter(range(10_000))

    def third(_: Any) -> str:
        return "A" if next(calls) % 3 else "?"

    found = tipping_together(third, agents=8, rounds=2, name="third")
    assert found.choices.shape == (4, 4, 8, 2)
    for r in (1, 2):
        own = found.choices[..., r - 1]
        assert found.rate(r).value == pytest.approx(float((own == 1).double().mean()))
        assert 0 < found.rate(r).value < 0.5
        each = [found.rate(r, t).value for t in found.thresholds]
        assert found.rate(r).value == pytest.approx(sum(each) / 4)
        unread = float((own == -1).double().mean())
        assert found.rate(r).value + found.violations(r).value + unread == pytest.approx(1)
    with pytest.raises(ValueError, match="at threshold 3"):
        found.rate(1, 3)
    assert found.plot().get_legend() is not None


def test_the_collective_option_pays_when_enough_take_it() -> None:
    seen: list[str] = []
    shared = {item.options[0] for item in ITEMS_TOGETHER}

    def agent(conversation: Sequence[Any]) -> str:
        text = str(conversation[-1]["content"])
        seen.append(text)
        shown = options(text)
        number = (len(seen) - 1) % 4  # four agents to an item: three choose what is shared
        return next(k for k, o in shown.items() if (o in shared) == (number < 3))

    found = tipping_together(agent, ITEMS_TOGETHER[:1], agents=4, rounds=2, thresholds=(3, 4))
    assert found.rate(1).value == 0.75 and found.violations(1).value == 0.25
    paid = [ROUND.findall(text)[0][2] for text in seen[8:]]
    assert paid == ["1.2", "1.2", "1.2", "1", "0.8", "0.8", "0.8", "1"]
    for bad in ({"thresholds": (9,)}, {"rounds": 0}, {"thresholds": ()}):
        with pytest.raises(ValueError, match="thresholds"):
            tipping_together(agent, **bad)  # pyright: ignore
    with pytest.raises(ValueError, match="declare which option is `collective`"):
        tipping_together(agent, ITEMS)


def test_agents_of_one_model_differ_and_follow_the_seed(llama: HookedModel, tmp_path: Any) -> None:
    items = [Item("i", "w3 w4", ("w20", "w50"), 1, 0)]
    runs = [tipping_together(llama, items, labels=("w1", "w2"), seed=s) for s in (0, 0, 1)]
    assert torch.equal(runs[0].choices, runs[1].choices)
    assert not torch.equal(runs[0].choices, runs[2].choices)
    assert len(runs[0].choices.unique()) == 2
    runs[0].save(tmp_path)
    assert TippingTogether.load(tmp_path).frame().equals(runs[0].frame())


def scripted_chat(llama: HookedModel, follows: bool) -> HookedModel:
    """Refuses what begins with w7; one that follows also does as its last answer did."""
    model = copy.copy(llama)

    def generate(given: Sequence[Any], *_: Any, **__: Any) -> list[str]:
        found = []
        for prompt in given:
            turns = [{"content": prompt}] if isinstance(prompt, str) else list(prompt)
            refuse = turns[-1]["content"].startswith("w7")
            if follows and len(turns) > 1:
                refuse = turns[-2]["content"].startswith("I can't")
            found.append("I can't do that." if refuse else "w3 w4")
        return found

    model.generate = generate  # pyright: ignore
    return model


def test_refusals_behind_turns_follow_a_model_that_imitates_itself(
    llama: HookedModel, tmp_path: Any
) -> None:
    twins = tiny_lineage.pairs().split(seed=0)
    asked, past = twins["test"], twins["train"]
    benign = tiny.words(8, seed=8)

    def run(follows: bool) -> MultiRoundRefusals:
        model = scripted_chat(llama, follows)
        return multi_round_refusals(model, asked, past=past, benign=benign, turns=(1, 3))

    steady, found = run(False), run(True)
    for past_ in steady.pasts:
        for turn in (0, 1, 3):
            assert (
                steady.rate(past_, turn).value == 1 and steady.rate(past_, turn, False).value == 0
            )
            assert steady.change(past_, turn).value == 0
    assert found.rate("refusals", 1).value == found.rate("refusals", 1, False).value == 1
    assert found.rate("compliances", 3).value == found.rate("compliances", 3, False).value == 0
    assert found.rate("benign", 0).value == 1 and found.rate("benign", 0, False).value == 0
    assert found.change("compliances", 3).value == -1 and found.change("compliances", 3).high < 0
    assert found.change("refusals", 3, False).low > 0
    found.save(tmp_path)
    assert MultiRoundRefusals.load(tmp_path).frame().equals(found.frame())
    assert found.plot().get_legend() is not None and "only 12 topics" in str(found)


def test_twins_stand_behind_the_same_turns_of_other_topics(llama: HookedModel) -> None:
    twins = tiny_lineage.pairs().split(seed=0)
    model, seen = scripted_chat(llama, False), []
    plain = model.generate

    def generate(given: Sequence[Any], *more: Any, **named: Any) -> list[str]:
        seen.append(list(given))
        return plain(given, *more, **named)

    model.generate = generate  # pyright: ignore
    asked: Contrast = twins["test"]
    multi_round_refusals(model, asked, past=twins["train"], pasts=("refusals",), turns=(2,))
    conversations = dict(zip(asked.prompts, seen[-1], strict=True))
    for topic in set(asked.topics):
        own = [p for p, t in zip(asked.prompts, asked.topics, strict=True) if t == topic]
        assert len({str(conversations[p][:-1]) for p in own}) == 1
    first = next(iter(conversations.values()))
    assert [m["role"] for m in first] == ["user", "assistant"] * 2 + ["user"]
    assert all(m["content"].startswith("w7") for m in first[:4:2])
    assert len({str(c[:-1]) for c in conversations.values()}) > 3


def test_mistakes_are_said(llama: HookedModel) -> None:
    twins = tiny_lineage.pairs().split(seed=0)
    with pytest.raises(ValueError, match="gave 0 of 72 answers|gave 0 of 36 answers"):
        multi_round_refusals(llama, twins["test"], past=twins["train"], pasts=("refusals",))
    with pytest.raises(ValueError, match="is asked and stands in the past too"):
        multi_round_refusals(llama, twins["test"], past=twins["test"])
    with pytest.raises(ValueError, match="unknown past 'kind'"):
        multi_round_refusals(llama, twins["test"], pasts=("kind",))
    with pytest.raises(ValueError, match="give one above 0 of each"):
        multi_round_refusals(llama, twins["test"], turns=())
    with pytest.raises(ValueError, match="nothing can tip where nothing differs"):
        tipping(llama, rewards=(1.0, 1.0))
    with pytest.raises(ValueError, match="2 rounds, a memory of 1"):
        tipping(llama, rounds=1)
    with pytest.raises(ValueError, match="the number of an option, 0 or 1"):
        Item("i", "s", ("a", "b"), 2)


@pytest.mark.slow
def test_the_aligned_model_is_asked_in_rounds() -> None:
    model = HookedModel.load("builtin:aligned", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tipping(model, ITEMS[:3], rounds=3, shuffles=0)
        twins = datasets.safety("test").limited(4)
        said = multi_round_refusals(model, twins, pasts=("refusals",), turns=(1,))
    assert not found.probability.isnan().any() and not (found.choices == -1).any()
    assert said.rate("refusals", 0).value > said.rate("refusals", 0, False).value
