"""Writers and readers, contexts in one run, and the released analysis for comparison."""

import math
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from architectures import EOS

from analyses import Checkpoints, TokenShift, token_shift
from analyses.checkpoints import Checkpoint, compare
from analyses.tokens.contexts import CONTEXTS
from analyses.tokens.in_context import ContextShifts, compare_contexts, context_shifts
from analyses.tokens.matrix import ALL, ShiftMatrix, shift_matrix
from analyses.tokens.released import SEARCHED, ReleasedShift, released
from probes import HookedModel

PROMPTS = tiny.words(8, seed=6)
GROUPS = ["a"] * 5 + ["b"] * 3
STEPS = 6


def roomy(name: str, first_changed: int | None = None, seed: int = 0) -> HookedModel:
    weights = tiny_lineage.weights(first_changed, seed)
    weights.config.max_position_embeddings = 2048
    with torch.no_grad():
        weights.lm_head.weight[EOS] *= 2.0
    return HookedModel(weights, tiny.tokenizer(), name=name)


@pytest.fixture(scope="module")
def lineage() -> Checkpoints:
    """The drifted one is the aligned one again, under another name."""
    return compare(
        [
            Checkpoint("base", roomy("first")),
            Checkpoint("aligned", roomy("second", 1, 4)),
            Checkpoint("drifted", roomy("again", 1, 4)),
        ]
    )


@pytest.fixture(scope="module")
def matrix(lineage: Checkpoints) -> ShiftMatrix:
    return shift_matrix(lineage, PROMPTS, GROUPS, max_new_tokens=STEPS, batch_size=3)


def test_every_cell_is_the_token_shift_of_its_pair(
    lineage: Checkpoints, matrix: ShiftMatrix
) -> None:
    assert matrix.groups == ("a", "b", ALL) and matrix.prompts == (5, 3, 8)
    models = [item.model for item in lineage.items]
    for w, writer in enumerate(models):
        for r, reader in enumerate(models):
            pair = token_shift(reader, writer, PROMPTS, GROUPS, max_new_tokens=STEPS, batch_size=3)
            for g, group in enumerate(("a", "b", None)):
                assert int(matrix.tokens[w, g]) == int(pair.among(group).sum())
                share, kl = pair.shares(group), pair.mean("kl", group)
                for name, ends in (("shifted", [e[2] for e in share]), ("kl", kl)):
                    for end, value in zip(("", "_low", "_high"), ends, strict=True):
                        found = float(getattr(matrix, name + end)[w, r, g])
                        assert found == pytest.approx(float(value), rel=1e-5, abs=1e-7)


def test_who_reads_as_it_writes_has_exactly_nothing(matrix: ShiftMatrix) -> None:
    equal = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]]).bool()
    assert torch.equal(matrix.identical, equal)
    for name in ("kl", "kl_low", "kl_high", "shifted", "shifted_low"):
        assert not getattr(matrix, name)[equal].any()
    assert bool((matrix.kl[~equal] > 0).all()) and bool((matrix.shifted[~equal] > 0).all())
    assert not torch.allclose(matrix.kl, matrix.kl.transpose(0, 1), atol=1e-3)
    assert "second read by again 0.0% (identical)" in str(matrix)


def test_models_generate_and_read_as_often_as_needed(
    lineage: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote, read = [], []
    for item in lineage.items:
        model = item.model
        generate, reads = model.engine.generate, model.engine.read
        monkeypatch.setattr(
            model.engine,
            "generate",
            lambda *a, g=generate, n=model.label: (wrote.append(n), g(*a))[1],
        )
        monkeypatch.setattr(
            model.engine,
            "read",
            lambda *a, g=reads, n=model.label: (read.append(n) if a[2:] else None, g(*a))[1],
        )
    shift_matrix(lineage, PROMPTS, GROUPS, max_new_tokens=2, batch_size=8)
    assert sorted(wrote) == ["again", "first", "second"]
    assert sorted(read) == sorted(["again", "first", "second"] * 3)


def test_the_heat_map_and_the_table(matrix: ShiftMatrix, tmp_path: Any) -> None:
    table: Any = matrix.frame()
    assert len(table) == 3 * 3 * 3
    row = table[
        (table["writer"] == "second") & (table["reader"] == "first") & (table["group"] == "b")
    ]
    assert float(row["kl"].iloc[0]) == pytest.approx(float(matrix.kl[1, 0, 1]))
    ax = matrix.plot(quantity="kl", group="b")
    shown = ax.images[0].get_array()
    assert shown is not None
    assert shown[1].tolist() == pytest.approx(matrix.kl[1, :, 1].tolist())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("reader", "writer of the answers")
    assert "nats" in ax.get_title(loc="left")
    again = ShiftMatrix.load(matrix.save(tmp_path / "m"))
    assert again.frame().equals(table) and str(again) == str(matrix)
    assert any("only 3 prompts of b" in note for note in matrix.notes)
    with pytest.raises(ValueError, match="'js' was asked: choose one of shifted, kl"):
        matrix.plot(quantity="js")
    with pytest.raises(ValueError, match="no group 'c': choose one of a, b, all prompts"):
        matrix.plot(group="c")


def test_each_prompt_has_a_group(lineage: Checkpoints) -> None:
    with pytest.raises(ValueError, match="8 prompts came with 1 groups"):
        shift_matrix(lineage, PROMPTS, ["a"])


@pytest.fixture(scope="module")
def in_contexts(lineage: Checkpoints) -> ContextShifts:
    return context_shifts(
        lineage.base, lineage.aligned, PROMPTS, GROUPS, max_new_tokens=STEPS, batch_size=3
    )


def test_every_context_is_the_token_shift_with_it(
    lineage: Checkpoints, in_contexts: ContextShifts
) -> None:
    assert in_contexts.contexts == tuple(CONTEXTS)
    for c, context in enumerate(CONTEXTS):
        one = token_shift(
            lineage.base, lineage.aligned, PROMPTS, GROUPS,
            max_new_tokens=STEPS, batch_size=3, base_context=context,
        )  # fmt: skip
        for g, group in enumerate(("a", "b")):
            assert torch.equal(in_contexts.shares[c, g], one.shares(group).value.float())
            assert torch.equal(in_contexts.shares_high[c, g], one.shares(group).high.float())
            assert float(in_contexts.kl[c, g]) == pytest.approx(one.mean("kl", group).value)
            moved = in_contexts.shares[c, g, 2] - in_contexts.shares[0, g, 2]
            assert float(in_contexts.difference[c, g]) == pytest.approx(float(moved), abs=1e-6)


def test_same_differs_from_itself_by_nothing(in_contexts: ContextShifts) -> None:
    for end in ("", "_low", "_high"):
        assert not getattr(in_contexts, "difference" + end)[0].any()
    assert bool((in_contexts.difference_low <= in_contexts.difference).all())
    assert bool((in_contexts.difference <= in_contexts.difference_high).all())


def test_a_paired_interval_is_narrower_than_an_unpaired_one() -> None:
    """Prompts of very different difficulty, and a context that helps all of them a little."""
    from analyses.tokens.shares import pooled

    generator = torch.Generator().manual_seed(2)
    counts = torch.full((40,), 20.0, dtype=torch.float64)
    hard = 20 * torch.rand(40, 1, generator=generator).double()
    helped = hard - 1 - 0.5 * torch.rand(40, 1, generator=generator).double()
    before, after = pooled(hard, counts, seed=1), pooled(helped, counts, seed=1)
    found = after.minus(before).interval()
    assert float(found.high) < 0 and float(found.value) == pytest.approx(-1.25 / 20, abs=0.01)
    other = pooled(helped, counts, seed=2).minus(before)  # other prompts: not paired
    wide = other.interval()
    assert float(wide.high - wide.low) > 5 * float(found.high - found.low)


def test_contexts_are_read_once_each(
    lineage: Checkpoints, engine_calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, aligned = engine_calls(lineage.base), engine_calls(lineage.aligned)
    found = context_shifts(
        lineage.base, lineage.aligned, PROMPTS, GROUPS,
        contexts=["urial-0", "plain", "urial-0"], max_new_tokens=2, batch_size=8,
    )  # fmt: skip
    assert found.contexts == ("same", "urial-0", "plain")
    prompts = [rows for rows, _ in aligned if rows > 1]
    assert prompts == [8]
    assert [rows for rows, _ in base if rows > 1] == [8, 8, 8]


def test_the_figure_and_the_table_of_contexts(in_contexts: ContextShifts, tmp_path: Any) -> None:
    ax = in_contexts.plot()
    assert [t.get_text() for t in ax.get_xticklabels()] == list(CONTEXTS)
    for g, container in enumerate(ax.containers):
        drawn = container[0].get_ydata().tolist()
        assert drawn == pytest.approx(in_contexts.shares[:, g, 2].tolist())
    assert "first" in ax.get_xlabel() and "second" in ax.get_ylabel()
    table = in_contexts.frame()
    assert len(table) == len(CONTEXTS) * 2
    sums = table["unshifted"] + table["marginal"] + table["shifted"]
    assert sums.tolist() == pytest.approx([1] * len(table))
    again = ContextShifts.load(in_contexts.save(tmp_path / "c"))
    assert again.frame().equals(table) and str(again) == str(in_contexts)


def test_only_shifts_of_the_same_answers_are_compared(lineage: Checkpoints) -> None:
    one = token_shift(
        lineage.base, lineage.aligned, PROMPTS, GROUPS, max_new_tokens=2, base_context="plain"
    )
    for given in ([], [one]):
        with pytest.raises(ValueError, match="expected those of the same answers in several"):
            compare_contexts(given)


@pytest.fixture(scope="module")
def wide(lineage: Checkpoints) -> TokenShift:
    return token_shift(lineage.base, lineage.aligned, PROMPTS, GROUPS, max_new_tokens=STEPS, top=30)


class Exact:
    """Every id decodes to a string of its own."""

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


class Colliding:
    """Ids decode to one of four strings, as parts of characters do."""

    def decode(self, ids: list[int]) -> str:
        return "abcd"[ids[0] % 4]


def test_the_released_analysis_over_distinct_strings(wide: TokenShift) -> None:
    found = released(wide, Exact())
    agree = wide.aligned_ranks == 1
    assert torch.equal(found.ranks[agree], (wide.ranks[agree] - 1).clamp(max=SEARCHED))
    assert torch.equal(found.kinds[agree], wide.kinds[agree])
    p = dict(zip(wide.top_base[0].tolist(), wide.top_base_p[0].tolist(), strict=True))
    q = dict(zip(wide.top_aligned[0].tolist(), wide.top_aligned_p[0].tolist(), strict=True))
    P, Q = sum(p.values()), sum(q.values())
    expected = sum(p[i] / P * math.log(p[i] / P * Q / q[i]) for i in p.keys() & q.keys())
    assert float(found.truncated_kl[0]) == pytest.approx(expected, rel=1e-4)
    # truncated and renormalised over different lists, it is no divergence
    assert bool((found.truncated_kl < 0).any())


def test_colliding_strings_count_unshifted_too_often(wide: TokenShift, tmp_path: Any) -> None:
    found = released(wide, Colliding())
    table = found.frame()
    for row in table.to_dict(orient="records"):
        assert row["unshifted_released"] > row["unshifted"] + 0.05
    assert bool((found.kinds < wide.kinds).any())
    assert ReleasedShift.load(found.save(tmp_path / "r")).frame().equals(table)
    assert "unshifted/marginal/shifted, by token id" in str(found)
    assert found.plot().get_ylabel() == "share of tokens"


def test_the_released_analysis_needs_thirty_ids(lineage: Checkpoints) -> None:
    short = token_shift(lineage.base, lineage.aligned, PROMPTS, GROUPS, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"holds the 10 .* reads 30: measure it with token_shift"):
        released(short, Exact())
