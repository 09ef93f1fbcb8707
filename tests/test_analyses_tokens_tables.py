"""Shares, means, tables and figures of a token shift, against loops over hand-made answers."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from analyses.tokens.buckets import BUCKETS, DISCOURSE, REFUSAL, buckets_of
from analyses.tokens.paths import Steps
from analyses.tokens.shares import pooled, share_intervals
from analyses.tokens.shift import TokenShift
from probes.refusals import OPENERS
from probes.scores import bca_bootstrap

COUNTS = (4, 9, 6, 3, 7, 5)
GROUPS = ("a", "a", "a", "b", "b", "b")


def made(ranks: list[int] | None = None, words: list[list[str]] | None = None) -> TokenShift:
    """A shift of random numbers; the last token of every second answer stops it."""
    generator = torch.Generator().manual_seed(0)
    counts = COUNTS if words is None else tuple(map(len, words))
    n = sum(counts)
    drawn = torch.randint(1, 9, (n,), generator=generator)
    kl, reverse, js, entropies = torch.rand(4, n, generator=generator)
    ids = torch.randint(0, 6, (n,), generator=generator)
    tokens = words or [["t"] * count for count in counts]
    last = torch.tensor(counts).cumsum(0) - 1
    stops = torch.zeros(n, dtype=torch.bool)
    stops[last[::2]] = True
    top = torch.arange(3).repeat(n, 1)
    chances = torch.tensor([[0.5, 0.3, 0.2]]).repeat(n, 1)
    steps = Steps(
        torch.tensor(ranks) if ranks else drawn,
        torch.ones(n, dtype=torch.long),
        -kl,
        -js,
        kl,
        reverse,
        js,
        entropies,
        entropies,
        top,
        chances,
        top,
        chances,
        torch.ones(n, dtype=torch.bool),
    )
    tensors: dict[str, Any] = steps.tensors()
    return TokenShift(
        **tensors,
        prompts=tuple(f"p{i}" for i in range(len(counts))),
        groups=GROUPS[: len(counts)],
        tokens=tuple(map(tuple, tokens)),
        ids=ids,
        stops=stops,
        strings={str(i): f" w{i}" for i in range(6)},
        base="base",
        aligned="aligned",
    )


SHIFT = made()


def rows(shift: TokenShift, group: str, stops: bool, first: bool) -> list[list[int]]:
    """Indices of the tokens of each answer of the group, by a plain loop."""
    found, start = [], 0
    for i, count in enumerate(shift.counts):
        own = [
            start + t
            for t in range(count)
            if (first or t > 0) and (stops or not bool(shift.stops[start + t]))
        ]
        start += count
        if shift.groups[i] == group:
            found.append(own)
    return found


@pytest.mark.parametrize("per", ["token", "response"])
@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_shares_and_means_are_those_of_a_loop(per: Any, stops: bool, first: bool) -> None:
    for group in ("a", "b"):
        answers = rows(SHIFT, group, stops, first)
        flat = [[t for answer in answers for t in answer]] if per == "token" else answers
        share = SHIFT.shares(group, stops=stops, first=first, per=per)
        for k in range(3):
            each = [sum(int(SHIFT.kinds[t]) == k for t in a) / len(a) for a in flat]
            assert float(share.value[k]) == pytest.approx(sum(each) / len(each))
        for name in ("kl", "js", "p_base", "log_rank"):
            values = getattr(SHIFT, name).double()
            each = [sum(float(values[t]) for t in a) / len(a) for a in flat]
            mean = SHIFT.mean(name, group, stops=stops, first=first, per=per)
            assert mean.value == pytest.approx(sum(each) / len(each))
            assert mean.low <= mean.value <= mean.high


def test_averages_differ_where_answers_have_different_lengths() -> None:
    pooled_share = SHIFT.shares("a").value
    assert not torch.allclose(pooled_share, SHIFT.shares("a", per="response").value)
    even = made(words=[["t"] * 5] * 6)
    torch.testing.assert_close(even.shares("a").value, even.shares("a", per="response").value)


def test_intervals_are_those_of_the_general_bootstrap() -> None:
    """The same BCa limits, from a statistic that is called once a resample."""
    answers = rows(SHIFT, "a", True, True) + rows(SHIFT, "b", True, True)
    sums = torch.stack([SHIFT.kl[a].double().sum() for a in answers])
    counts = torch.tensor([len(a) for a in answers], dtype=torch.float64)

    def statistic(chosen: Tensor) -> float:
        return float(sums[chosen].sum() / counts[chosen].sum())

    expected = bca_bootstrap(statistic, [str(i) for i in range(6)], seed=3)
    found = SHIFT.mean("kl", None, seed=3)
    assert tuple(found) == pytest.approx(tuple(expected), rel=1e-6)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Answers of unequal length whose shifted share varies from prompt to prompt."""
    generator = torch.Generator().manual_seed(1)
    inside, trials = 0, 200
    for trial in range(trials):
        lengths = torch.randint(5, 30, (40,), generator=generator).double()
        rate = 0.1 + 0.4 * torch.rand(40, generator=generator).double()
        hits = torch.stack([rate * lengths, (1 - rate) * lengths], 1)
        found = share_intervals(pooled(hits, lengths, seed=trial))
        inside += bool(found.low[0] <= 0.3 <= found.high[0])
    assert 0.89 <= inside / trials <= 0.99


def test_paired_differences_of_one_thing_are_nothing() -> None:
    chosen = SHIFT.among()
    own = SHIFT.over_prompts((SHIFT.kinds == 2)[:, None], chosen, seed=1)
    limits = own.minus(own).interval()
    assert [float(limit) for limit in limits] == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: SHIFT.mean("nope"), "'nope' was asked: choose one of kl, reverse_kl, js"),
        (lambda: SHIFT.shares("a", range(100, 200)), "0 prompts have tokens there"),
        (lambda: SHIFT.frequent(by="size"), "by='size': order the tokens by 'count' or by 'rate'"),
        (lambda: SHIFT.frequent(minimum=0), "minimum=0: ask for 1 occurrence or more"),
    ],
)
def test_what_cannot_be_averaged_is_said(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_few_prompts_and_disagreement_are_noted() -> None:
    assert SHIFT.notes[0].startswith("There are only 3 prompts of a: intervals over fewer than 20")
    assert len(SHIFT.notes) == 2
    ranks = torch.ones_like(SHIFT.aligned_ranks)
    ranks[:2] = 2
    other = dataclasses.replace(SHIFT, aligned_ranks=ranks)
    assert other.agreement == pytest.approx(1 - 2 / sum(COUNTS))
    assert other.notes[-1].startswith("Only 94.1% of the tokens aligned wrote are its most")


def test_the_table_of_words_counts_them() -> None:
    table: Any = SHIFT.frequent(minimum=2)
    kinds, ids = SHIFT.kinds.tolist(), SHIFT.ids.tolist()
    expected = {}
    for i in set(ids):
        own = [k for k, j in zip(kinds, ids, strict=True) if j == i]
        if len(own) >= 2 and 2 in own:
            expected[i] = (len(own), own.count(2), own.count(2) / len(own))
    found = {
        r["id"]: (r["count"], r["shifted"], r["rate"]) for r in table.to_dict(orient="records")
    }
    assert found == expected and len(expected) > 2
    assert table["shifted"].is_monotonic_decreasing
    assert SHIFT.frequent(by="rate")["rate"].is_monotonic_decreasing
    assert table["token"].tolist() == [f" w{i}" for i in table["id"]]
    assert set(SHIFT.frequent("a", minimum=1)["count"]) != set(table["count"])
    assert len(SHIFT.frequent(minimum=1000)) == 0


def test_positions_are_read_in_ranges() -> None:
    table = SHIFT.by_position("kl", "a")
    assert table["start"].tolist() == [0, 1, 2]  # two answers of three reach position 4
    for row in table.to_dict(orient="records"):
        own = [
            float(SHIFT.kl[t])
            for answer in rows(SHIFT, "a", True, True)
            for t in answer[row["start"] : max(row["stop"], row["start"])]
        ]
        assert row["value"] == pytest.approx(sum(own) / len(own), rel=1e-5)
    rank = float(SHIFT.by_position("rank", "a")["value"].tolist()[0])
    firsts = [float(SHIFT.ranks[a[0]]) for a in rows(SHIFT, "a", True, True)]
    assert rank == pytest.approx(math.exp(sum(map(math.log, firsts)) / 3), rel=1e-5)
    nothing: Any = SHIFT.by_position("shifted", "no such group")
    assert nothing.empty


WORDS = [
    "Here", " is", " a", ":", "\n", "1", ".", " **", "However", "**", ",", " I", " can", "'t", " 42",
    " %", " help", "\n\n", "-", " first", "ly", " sec", "ure", "", " -", "</s>",
]  # fmt: skip
KINDS_OF_WORDS = [
    "opener", "opener", "opener", "punctuation", "format", "format", "format", "format",
    "discourse", "format", "punctuation", "refusal", "refusal", "refusal", "digits",
    "punctuation", "content", "format", "format", "discourse", "discourse", "content", "content",
    "content", "punctuation", "end of turn",
]  # fmt: skip


def test_the_buckets_of_an_answer() -> None:
    stops = [False] * (len(WORDS) - 1) + [True]
    found = [BUCKETS[b] for b in buckets_of(WORDS, stops)]
    assert list(zip(WORDS, found, strict=True)) == list(zip(WORDS, KINDS_OF_WORDS, strict=True))
    assert set(found) == set(BUCKETS)
    # an earlier rule wins: a stop among the first three is no opener, a refusal there no refusal
    assert [BUCKETS[b] for b in buckets_of(["Sorry", "</s>"], [False, True])] == [
        "opener",
        "end of turn",
    ]
    curly = ["a", "b", "c", " can", "\N{RIGHT SINGLE QUOTATION MARK}t"]
    assert [BUCKETS[b] for b in buckets_of(curly, [False] * 5)][3:] == ["refusal", "refusal"]
    # digits with a full stop are a list mark at the start of a line only
    inline = ["a", "b", "c", " in", " 3", ".", " So"]
    assert [BUCKETS[b] for b in buckets_of(inline, [False] * 7)][4:] == [
        "digits",
        "punctuation",
        "content",
    ]
    # a phrase inside a longer word is none
    longer = ["a", "b", "c", " sure", "ty", " un", "sure", " harmful", "ness"]
    assert {BUCKETS[b] for b in buckets_of(longer, [False] * 9)[3:]} == {"content"}
    assert buckets_of([], []) == []


def test_the_lexica_are_lower_case_and_hold_the_refusal_rule() -> None:
    for lexicon in (REFUSAL, DISCOURSE):
        assert all(phrase == phrase.lower().strip() for phrase in lexicon)
    assert not set(REFUSAL) & set(DISCOURSE)
    for opener in OPENERS:
        found = buckets_of(["a ", "b ", "c ", opener.rstrip(",")], [False] * 4)
        assert BUCKETS[found[-1]] == "refusal"


def test_buckets_add_up_to_the_whole() -> None:
    words = [[*tiny.words(1, seed=i)[0].split(), "However", "!", " 7"] for i in range(6)]
    shift = made(words=words)
    table: Any = shift.by_bucket()
    assert table["tokens"].sum() == len(shift.ids)
    assert table["of_tokens"].sum() == pytest.approx(1)
    assert table["of_shifted"].sum() == pytest.approx(1)
    weighted = (table["shifted"] * table["of_tokens"]).sum()
    assert weighted == pytest.approx(float((shift.kinds == 2).double().mean()))
    assert (table["kl"] * table["of_tokens"]).sum() == pytest.approx(float(shift.kl.mean()))
    assert table["bucket"].tolist() == [b for b in BUCKETS if b in set(table["bucket"])]
    lone = table[table["prompts"] < 2]
    assert lone["low"].isna().all()


def test_the_summary_has_every_choice() -> None:
    table = SHIFT.summary()
    assert len(table) == 2 * 2 * 2 * 2
    for row in table.to_dict(orient="records"):
        assert row["unshifted"] + row["marginal"] + row["shifted"] == pytest.approx(1)
        assert row["kl_low"] <= row["kl"] <= row["kl_high"]
    without = table[~table["stops"] & ~table["first"] & (table["per"] == "token")]
    assert without["tokens"].tolist() == [
        sum(map(len, rows(SHIFT, g, False, False))) for g in ("a", "b")
    ]


def test_figures_show_what_their_tables_say() -> None:
    shift = made(words=[["t"] * 9 for _ in range(6)])
    for quantity in ("kl", "js", "rank", "p_base"):
        ax = shift.plot_position(quantity)
        drawn = [c[0].get_ydata().tolist() for c in ax.containers]
        tables = [shift.by_position(quantity, g)["value"].tolist() for g in ("a", "b")]
        assert drawn == [pytest.approx(t) for t in tables]
        assert ("nats" in ax.get_ylabel()) == (quantity in ("kl", "js"))
    ax = shift.plot_divergence()
    assert [c[0].get_ydata()[0] for c in ax.containers] == [
        pytest.approx(shift.mean("kl", g).value) for g in ("a", "b")
    ]
    assert "nats" in ax.get_ylabel() and ax.get_ylim()[0] == 0
    ax = shift.plot_buckets()
    assert [label.get_text() for label in ax.get_yticklabels()] == list(BUCKETS)
    for c, group in zip(ax.containers, ("a", "b"), strict=True):
        assert c[0].get_xdata().tolist() == pytest.approx(
            shift.by_bucket(group)["shifted"].tolist()
        )
    legend = ax.get_legend()
    assert legend is not None and len(legend.get_texts()) == 2


def test_a_lone_prompt_is_told_without_an_interval() -> None:
    shift = made(words=[["t"] * 4, ["t"] * 3])
    single = dataclasses.replace(shift, groups=("a", "b"))
    assert str(single).count("% shifted") == 2 and "[" not in str(single)
    assert single.summary().empty
