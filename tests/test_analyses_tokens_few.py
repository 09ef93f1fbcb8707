"""Groups of one prompt and of none, answers cut off, and the record of several contexts."""

from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from architectures import EOS

from analyses import Checkpoints, token_shift
from analyses.checkpoints import Checkpoint, compare
from analyses.tokens.in_context import context_shifts
from analyses.tokens.matrix import shift_matrix
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


@pytest.fixture
def lineage() -> Checkpoints:
    return compare(
        [Checkpoint("base", roomy("first")), Checkpoint("aligned", roomy("second", 1, 4))]
    )


def test_a_group_of_one_prompt_has_values_and_no_limits(lineage: Checkpoints) -> None:
    """Found out before: after everything was generated it would be too late to say no."""
    prompts, groups = PROMPTS[:4], ["one", "b", "b", "b"]
    pair = lineage.base, lineage.aligned
    options: Any = {"max_new_tokens": STEPS}
    shift = token_shift(*pair, prompts, groups, **options)
    own = shift.shares("one")
    assert float(own.value.sum()) == pytest.approx(1) and bool(own.low.isnan().all())
    assert not bool(shift.shares("b").low.isnan().any())
    assert str(shift).count("[") == 1 and "one " in str(shift)
    assert [len(c) for c in shift.plot_divergence().containers] == [3, 3]
    table = shift_matrix(lineage, prompts, groups, **options)
    found = context_shifts(*pair, prompts, groups, contexts=["minimal"], **options)
    for result, at in ((table, (1, 0, 0)), (found, (1, 0))):
        kl, low = getattr(result, "kl")[at], getattr(result, "kl_low")[at]  # noqa: B009
        assert float(kl) == pytest.approx(
            shift.mean("kl", "one").value if result is table else float(found.kl[1, 0])
        )
        assert bool(low.isnan()) and result.frame() is not None
        assert not bool(getattr(result, "kl_low")[..., 1].isnan().any())  # noqa: B009
    said = [text.get_text() for text in table.plot(group="one").texts]
    assert not any("nan" in text for text in said) and found.plot().get_legend() is not None


def test_a_group_without_a_token_is_unknown(
    lineage: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for item in lineage.items:

        def silent(*given: Any, _plain: Any = item.model.generate_ids, **named: Any) -> Any:
            return [[], *_plain(*given, **named)[1:]]

        monkeypatch.setattr(item.model, "generate_ids", silent)
    prompts, groups = PROMPTS[:3], ["none", "b", "b"]
    pair = lineage.base, lineage.aligned
    options: Any = {"max_new_tokens": 3}
    shift = token_shift(*pair, prompts, groups, **options)
    assert "none has no tokens" in str(shift) and len(shift.plot_divergence().containers) == 1
    table = shift_matrix(lineage, prompts, groups, **options)
    found = context_shifts(*pair, prompts, groups, contexts=[], **options)
    for result in (table, found):
        for kl in (result.kl, result.kl_low):
            assert bool(kl[..., 0].isnan().all()) and bool(kl[..., 1].isfinite().all())
        assert result.plot() is not None and len(result.frame()) > 1
    with pytest.raises(ValueError, match="0 prompts have tokens there"):
        shift.shares("none")


def test_the_record_of_contexts_names_seed_and_what_was_read(lineage: Checkpoints) -> None:
    found = context_shifts(
        lineage.base, lineage.aligned, PROMPTS, GROUPS, contexts=["minimal", "plain"],
        max_new_tokens=2, seed=7,
    )  # fmt: skip
    assert found.record.seeds == (7,)
    hashes = found.record.settings["base_prompts_hash"]
    assert list(hashes) == ["same", "minimal", "plain"] and len(set(hashes.values())) == 3
    assert found.record.settings["base_context"] == ["same", "minimal", "plain"]
    assert hashes["same"] == found.record.prompts_hash
    assert any("met the limit of 2 tokens" in note for note in found.notes)


def test_the_matrix_says_whose_answers_were_cut_off(lineage: Checkpoints) -> None:
    matrix = shift_matrix(lineage, PROMPTS, GROUPS, max_new_tokens=STEPS)
    said = [note for note in matrix.notes if f"met the limit of {STEPS} tokens" in note]
    assert {note.split(" answers of ")[1].split()[0] for note in said} <= set(matrix.models)
    assert said and all(" of 8 answers of " in note for note in said)
