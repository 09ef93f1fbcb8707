"""One template, one vocabulary: what makes checkpoints comparable, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
from architectures import VOCABULARY, build

from analyses import checkpoints, token_shift
from analyses.checkpoints import Checkpoint, compare
from probes import HookedModel


def pair(base: HookedModel, aligned: HookedModel) -> list[Checkpoint]:
    return [Checkpoint("base", base), Checkpoint("aligned", aligned)]


def other_tokenizer() -> Any:
    """The same words, two of them with their ids exchanged."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = tiny.tokenizer()
    parts = json.loads(made.backend_tokenizer.to_str())
    vocab = parts["model"]["vocab"]
    vocab["w3"], vocab["w5"] = vocab["w5"], vocab["w3"]
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    changed.chat_template = made.chat_template
    return changed


def test_a_base_without_template_is_prompted_with_the_aligned_models() -> None:
    base = tiny_lineage.hooked("first", tokenizer=tiny.tokenizer(template=None))
    aligned = tiny_lineage.hooked("second", 1)
    with pytest.raises(ValueError, match="has no chat template"):
        _ = base.template
    found = compare(pair(base, aligned))
    assert found.notes == ("first has no chat template; it was prompted with that of second.",)
    assert found.base.template.hash == aligned.template.hash
    ids = [model.template.render("w1 w2").ids for model in (found.base, found.aligned, aligned)]
    assert ids[0] == ids[1] == ids[2]
    shift = token_shift(found.base, found.aligned, ["w1 w2", "w4"], ["a", "b"], max_new_tokens=3)
    assert len(shift.ranks) == sum(shift.counts)


def test_another_template_is_replaced_and_said() -> None:
    own = tiny.tokenizer(template=tiny.TEMPLATE.replace("helpful", "a"))
    aligned = tiny_lineage.hooked("second", 1)
    base = tiny_lineage.hooked("first", tokenizer=own)
    assert base.template.render("w1").ids != aligned.template.render("w1").ids
    found = compare(pair(base, aligned))
    assert "first has another chat template" in found.notes[0]
    assert found.base.template.render("w1").ids == aligned.template.render("w1").ids


def test_equal_checkpoints_need_no_note() -> None:
    assert tiny_lineage.checkpoints().notes == ()


def test_without_a_template_no_note_speaks_of_one() -> None:
    models = [
        HookedModel(tiny_lineage.weights(), tiny.tokenizer(), name=name, template="none")
        for name in ("first", "second")
    ]
    found = compare(pair(*models))
    assert found.notes == ()
    assert not found.base.template.chat


def test_the_models_given_stay_as_they_are() -> None:
    own = tiny.tokenizer(template=None)
    base = tiny_lineage.hooked("same", tokenizer=own)
    aligned = tiny_lineage.hooked("same", 1)
    found = compare(pair(base, aligned))
    assert base.tokenizer is own
    assert base.label == aligned.label == "same"
    with pytest.raises(ValueError, match="has no chat template"):
        _ = base.template
    assert found.base.model is base.model  # the weights are shared, not copied
    assert found.base.fingerprint == base.fingerprint


def test_labels_are_told_apart(tmp_path: Path) -> None:
    models = [tiny_lineage.hooked("same", i) for i in range(3)]
    items = [*pair(*models[:2]), Checkpoint("drifted", models[2])]
    found = compare(items)
    assert found.labels == ("same (1)", "same (2)", "same (3)")
    assert tuple(item.model.label for item in found.items) == found.labels
    # folders of one name: the whole path tells them apart
    names = [tiny_lineage.save(tmp_path / run / "model", i) for i, run in enumerate("ab")]
    found = checkpoints.load(*names, device="cpu")
    assert found.labels == tuple(names)


def test_one_id_with_two_meanings_is_refused() -> None:
    base = tiny_lineage.hooked("first", tokenizer=other_tokenizer())
    with pytest.raises(ValueError, match=r"id \d+ means 'w[35]' in one and 'w[35]' in the other"):
        compare(pair(base, tiny_lineage.hooked("second")))


def test_other_shapes_are_refused() -> None:
    from transformers import LlamaForCausalLM

    config = build("llama").config
    config.num_hidden_layers = 2
    shallow = HookedModel(LlamaForCausalLM(config).eval(), tiny.tokenizer(), name="shallow")
    with pytest.raises(ValueError, match="shallow has 2 layers of width 64, second has 3"):
        compare(pair(shallow, tiny_lineage.hooked("second")))


def test_roles_out_of_order_are_refused() -> None:
    base, aligned = tiny_lineage.hooked("first"), tiny_lineage.hooked("second")
    with pytest.raises(ValueError, match="expected base, aligned, then drifted"):
        compare(pair(base, aligned)[::-1])
    with pytest.raises(ValueError, match="expected base, aligned"):
        compare(pair(base, aligned)[:1])


@pytest.mark.parametrize("larger", ["base", "aligned"])
def test_a_larger_vocabulary_is_cut_and_noted(larger: str) -> None:
    rows = VOCABULARY + 24
    base = tiny_lineage.hooked("first", vocab=rows if larger == "base" else None)
    aligned = tiny_lineage.hooked("second", 1, vocab=rows if larger == "aligned" else None)
    found = compare(pair(base, aligned))
    assert found.vocab_size == VOCABULARY
    assert any(f"{rows}" in note and "24 rows" in note for note in found.notes)


def test_a_template_the_base_has_no_rows_for_is_refused() -> None:
    grown = tiny.tokenizer(template=None)
    grown.add_special_tokens({"additional_special_tokens": [f"<new{i}>" for i in range(60)]})
    new = grown.convert_tokens_to_ids("<new59>")
    assert new >= VOCABULARY
    grown.chat_template = "<new59>" + tiny.TEMPLATE
    aligned = tiny_lineage.hooked("second", 1, vocab=len(grown), tokenizer=grown)
    with pytest.raises(ValueError, match=f"hold '<new59>', id {new}, .* {VOCABULARY} rows"):
        compare(pair(tiny_lineage.hooked("first"), aligned))
