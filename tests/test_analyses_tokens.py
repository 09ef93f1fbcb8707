"""Token shift against a plain loop over prompts: full softmax, full sort, no batches."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from architectures import EOS, VOCABULARY

from analyses import TokenShift, token_shift
from analyses.checkpoints import Checkpoint, compare
from analyses.tokens.matrix import shift_matrix
from analyses.tokens.paths import compared, pieces
from analyses.tokens.shift import KINDS
from probes import HookedModel, datasets

PROMPTS = tiny.words(14, seed=5)
GROUPS = ["a"] * 8 + ["b"] * 6
STEPS = 9


@pytest.fixture(scope="module")
def models() -> tuple[HookedModel, HookedModel]:
    """An aligned model that ends some of its answers, and its base."""
    aligned = tiny_lineage.weights(1, seed=4)
    with torch.no_grad():
        aligned.lm_head.weight[EOS] *= 2.5
    base = tiny_lineage.hooked("first")
    return base, HookedModel(aligned, tiny.tokenizer(), name="second")


@pytest.fixture(scope="module")
def shift(models: tuple[HookedModel, HookedModel]) -> TokenShift:
    return token_shift(*models, PROMPTS, GROUPS, max_new_tokens=STEPS, batch_size=4)


@torch.no_grad()
def greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    """The plainest greedy decoding there is, without a cache."""
    start = len(ids)
    for _ in range(steps):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == EOS:
            break
    return ids[start:]


@torch.no_grad()
def expected(
    base: Any, aligned: Any, ids: list[int], answer: list[int], size: int
) -> list[tuple[int, float, float]]:
    """Rank and probabilities of each answer token, one forward pass a token."""
    found = []
    for i, token in enumerate(answer):
        given = torch.tensor([[*ids, *answer[:i]]])
        p, q = (m(given).logits[0, -1, :size].double().softmax(0) for m in (base, aligned))
        order = p.sort(descending=True, stable=True).indices.tolist()
        found.append((order.index(token) + 1, float(p[token]), float(q[token])))
    return found


def rows_of(shift: TokenShift) -> list[list[tuple[int, float, float]]]:
    table = list(
        zip(shift.ranks.tolist(), shift.p_base.tolist(), shift.p_aligned.tolist(), strict=True)
    )
    found, start = [], 0
    for n in shift.counts:
        found.append(table[start : start + n])
        start += n
    return found


def test_ranks_and_probabilities_are_those_of_a_plain_loop(
    models: tuple[HookedModel, HookedModel], shift: TokenShift
) -> None:
    base, aligned = models
    ends, ranks = 0, []
    for i, (prompt, rows) in enumerate(zip(PROMPTS, rows_of(shift), strict=True)):
        ids = list(aligned.template.render(prompt).ids)
        answer = greedy(aligned.model, ids, STEPS)
        assert "".join(shift.tokens[i]) == aligned.tokenizer.decode(answer)
        truth = expected(base.model, aligned.model, ids, answer, VOCABULARY)
        assert [row[0] for row in rows] == [row[0] for row in truth]
        for column in (1, 2):
            assert [r[column] for r in rows] == pytest.approx([r[column] for r in truth], rel=1e-4)
        ends += answer[-1] == EOS
        ranks += [row[0] for row in truth]
    # a comparison that saw one kind, or no end of an answer, would show little
    assert 0 < ends < len(PROMPTS)
    kinds = [0 if r == 1 else 1 if r <= 3 else 2 for r in ranks]
    assert set(kinds) == {0, 1, 2}
    assert shift.kinds.tolist() == kinds


def test_the_end_of_an_answer_is_one_of_its_tokens(shift: TokenShift) -> None:
    ended = [answer for answer, n in zip(shift.tokens, shift.counts, strict=True) if n < STEPS]
    assert ended
    assert all("</s>" in answer[-1] for answer in ended)
    assert not any("</s>" in token for answer in shift.tokens for token in answer[:-1])


def test_a_model_is_not_shifted_against_itself(models: tuple[HookedModel, HookedModel]) -> None:
    _, aligned = models
    same = token_shift(aligned, aligned, PROMPTS, GROUPS, max_new_tokens=STEPS)
    assert same.ranks.eq(1).all()
    assert same.kinds.eq(0).all()
    assert torch.equal(same.p_base, same.p_aligned)
    for group in ("a", "b"):
        share = same.shares(group)
        assert share.value.tolist() == [1, 0, 0]
        # every resample is 1: the interval is that of as many prompts, and no point
        assert 0.5 < share.low[0] < 1
        assert share.high[0] == 1
        assert 0 < share.high[2] < 0.5


def test_shares_add_up_and_lie_in_their_intervals(shift: TokenShift) -> None:
    owner = [g for g, n in zip(GROUPS, shift.counts, strict=True) for _ in range(n)]
    for group in ("a", "b"):
        share = shift.shares(group)
        kinds = shift.kinds[torch.tensor([g == group for g in owner])]
        assert share.value.tolist() == pytest.approx(
            [float((kinds == k).double().mean()) for k in range(3)]
        )
        assert float(share.value.sum()) == pytest.approx(1)
        assert bool((share.low <= share.value).all())
        assert bool((share.value <= share.high).all())
        assert 0 <= float(share.low.min()) <= float(share.high.max()) <= 1
    first = shift.shares("a", range(1))
    own = [rows[0][0] for rows, g in zip(rows_of(shift), GROUPS, strict=True) if g == "a"]
    assert float(first.value[2]) == pytest.approx(sum(r > 3 for r in own) / len(own))


def test_too_few_prompts_have_no_interval(shift: TokenShift) -> None:
    with pytest.raises(ValueError, match="0 prompts have tokens there"):
        shift.shares("no such group")


def test_distributions_are_over_the_common_ids(models: tuple[HookedModel, HookedModel]) -> None:
    base, aligned = models
    size = 120
    cut = token_shift(base, aligned, PROMPTS, GROUPS, max_new_tokens=4, vocab_size=size)
    short = 0
    for prompt, rows in zip(PROMPTS, rows_of(cut), strict=True):
        ids = list(aligned.template.render(prompt).ids)
        answer = greedy(aligned.model, ids, 4)
        kept = answer[: next((i for i, t in enumerate(answer) if t >= size), len(answer))]
        short += len(kept) < len(answer)
        truth = expected(base.model, aligned.model, ids, kept, size)
        assert [row[0] for row in rows] == [row[0] for row in truth]
        assert [r[1] for r in rows] == pytest.approx([r[1] for r in truth], rel=1e-4)
    assert 0 < short < len(PROMPTS)


def test_an_aligned_model_with_more_rows_can_be_compared() -> None:
    """Its answers may hold ids that the base lacks, where the base can go no further."""
    base = tiny_lineage.hooked("first")
    grown = tiny_lineage.weights(1, vocab=VOCABULARY + 8)
    with torch.no_grad():
        grown.lm_head.weight[VOCABULARY:] *= 8
    aligned = HookedModel(grown, tiny.tokenizer(), name="grown")
    found = token_shift(base, aligned, PROMPTS, GROUPS, max_new_tokens=6)
    assert min(found.counts) < 6
    assert int(found.ranks.max()) <= VOCABULARY
    with torch.no_grad():
        whole = aligned.generate_ids(PROMPTS, 6)
    assert any(token >= VOCABULARY for answer in whole for token in answer)


def test_the_batch_size_changes_nothing(
    models: tuple[HookedModel, HookedModel], shift: TokenShift
) -> None:
    other = token_shift(*models, PROMPTS, GROUPS, max_new_tokens=STEPS, batch_size=64)
    assert torch.equal(other.ranks, shift.ranks)
    assert other.tokens == shift.tokens


def test_tokens_keep_blanks_and_whole_characters() -> None:
    class Bytes:
        """Decodes like byte-level tokenizers: a part of a character becomes a mark, and like
        sentence-piece ones: the first blank of a text is lost."""

        pieces = (b" I", b" am", b"\xe7\x81", b"\xab", b"!")

        def decode(self, ids: list[int], **_: Any) -> str:
            return b"".join(self.pieces[i] for i in ids).decode(errors="replace").lstrip()

    assert pieces(Bytes(), [0, 1, 2, 3, 4]) == ("I", " am", "", "火", "!")
    assert pieces(Bytes(), [0, 2]) == ("I", "\N{REPLACEMENT CHARACTER}")
    assert pieces(Bytes(), []) == ()


def test_saved_and_loaded_it_is_the_same(shift: TokenShift, tmp_path: Path) -> None:
    again = TokenShift.load(shift.save(tmp_path / "shift"))
    for name in ("prompts", "groups", "tokens", "base", "aligned"):
        assert getattr(again, name) == getattr(shift, name)
    for name in (*shift.tensors(), "ids", "stops"):
        assert torch.equal(getattr(again, name), getattr(shift, name))
    assert again.strings == shift.strings
    assert again.frame().equals(shift.frame())
    assert str(again) == str(shift)
    table: Any = shift.frame()
    assert len(table) == sum(shift.counts)
    assert set(table["kind"]) <= set(KINDS)
    assert table["position"].max() == max(shift.counts) - 1


def test_the_figure_says_what_it_shows(shift: TokenShift) -> None:
    ax = shift.plot()
    assert "position" in ax.get_xlabel()
    assert "first" in ax.get_ylabel()
    assert "second against first" in ax.get_title(loc="left")
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    heights = [container[0].get_ydata() for container in ax.containers]
    shares = [float(shift.shares(g, range(1)).value[2]) for g in ("a", "b")]
    assert [float(h[0]) for h in heights] == pytest.approx(shares)


def test_the_limits_of_the_kinds(shift: TokenShift) -> None:
    ranks = torch.ones_like(shift.ranks)
    ranks[:5] = torch.tensor([1, 2, 3, 4, 100])
    assert dataclasses.replace(shift, ranks=ranks).kinds[:5].tolist() == [0, 1, 1, 2, 2]


def test_a_model_that_is_its_own_base_is_said_to_be(
    models: tuple[HookedModel, HookedModel], shift: TokenShift
) -> None:
    _, aligned = models
    same = token_shift(aligned, aligned, PROMPTS, GROUPS, max_new_tokens=STEPS)
    assert same.identical and not shift.identical
    assert "the same distributions at all" in str(same) and "bit for bit" in str(same)
    for name in ("kl", "reverse_kl", "js"):
        assert not getattr(same, name).any()
    assert torch.equal(same.top_base, same.top_aligned)
    assert torch.equal(same.entropy_base, same.entropy_aligned)
    twin = HookedModel(copy.deepcopy(aligned.model), tiny.tokenizer(), name="twin")
    assert token_shift(twin, aligned, PROMPTS, GROUPS, max_new_tokens=STEPS).identical


def test_logits_that_differ_without_a_trace_are_not_called_the_same() -> None:
    """A token as good as certain: no divergence and no probability in float32 tells the two apart."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 3, 100, generator=generator)
    x[:, 0], y[:, 0] = 140.0, 145.0
    y[2] = x[2]
    steps = compared(x, y, torch.zeros(3, dtype=torch.long))
    assert not steps.js.any() and torch.equal(steps.logp_base, steps.logp_aligned)
    assert steps.differs.tolist() == [True, True, False]


def test_a_head_that_differs_beyond_float32_is_not_identical(
    models: tuple[HookedModel, HookedModel],
) -> None:
    _, aligned = models
    sure = copy.deepcopy(aligned.model)
    with torch.no_grad():  # one token certain in both, the rest another
        sure.lm_head.weight *= 1e7  # pyright: ignore
    other = copy.deepcopy(sure)
    with torch.no_grad():
        other.lm_head.weight *= 1.5  # pyright: ignore
    pair = [HookedModel(m, tiny.tokenizer(), name=n) for m, n in ((sure, "p"), (other, "q"))]
    found = token_shift(pair[0], pair[1], PROMPTS[:3], ["a"] * 3, max_new_tokens=2)
    assert not found.js.any() and torch.equal(found.logp_base, found.logp_aligned)
    assert not found.identical and "bit for bit" not in str(found)
    lineage = compare([Checkpoint("base", pair[0]), Checkpoint("aligned", pair[1])])
    table = shift_matrix(lineage, PROMPTS[:3], ["a"] * 3, max_new_tokens=2)
    assert torch.equal(table.identical, torch.eye(2).bool())


def test_answers_cut_off_are_counted(
    models: tuple[HookedModel, HookedModel], shift: TokenShift
) -> None:
    """The fixture's models end some answers and not others."""
    tokens = [
        greedy(models[1].model, list(models[1].template.render(p).ids), STEPS) for p in PROMPTS
    ]
    cut = sum(answer[-1] != EOS for answer in tokens)
    assert 0 < cut < len(PROMPTS) and shift.truncated == cut
    (said,) = [note for note in shift.notes if "without a stop" in note]
    assert said.startswith(f"{cut} of {len(PROMPTS)} answers of second met the limit of {STEPS}")
    stopping = dataclasses.replace(shift, stops=torch.ones_like(shift.stops))
    assert stopping.truncated == 0 and not any("stop" in note for note in stopping.notes)
    table: Any = shift.frame()
    for i, own in table.groupby("prompt"):
        n = shift.counts[int(i)]
        assert set(own["length"]) == {n}
        assert own["relative"].tolist() == pytest.approx([t / n for t in range(1, n + 1)])


@pytest.mark.slow
def test_the_built_in_pair_shifts_where_it_was_trained_to(base: HookedModel) -> None:
    aligned = HookedModel.load("builtin:aligned", device="cpu")
    twins = datasets.safety("test").limited(10)
    groups = ["harmful" if label else "harmless" for label in twins.labels]
    found = token_shift(base, aligned, twins.prompts, groups, max_new_tokens=16)
    assert found.agreement >= 0.99
    harmful, harmless = found.shares("harmful"), found.shares("harmless")
    assert float(harmless.low[0]) > float(harmful.high[0])
    assert found.mean("kl", "harmful").low > 5 * found.mean("kl", "harmless").high
    # the decision to refuse falls in the first token; those that follow from it are less new
    by_place: Any = found.by_position("kl", "harmful").set_index("start")["value"]
    assert by_place[0] == by_place[by_place.index < 12].max()
    assert by_place[0] > 1.5 * by_place[1]
    own = token_shift(aligned, aligned, twins.prompts[:4], groups[:4], max_new_tokens=4)
    assert own.identical and own.ranks.eq(1).all()
    assert not any("\ufffd" in text for text in found.strings.values())
