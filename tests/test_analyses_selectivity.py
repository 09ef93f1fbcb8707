"""Edited checkpoints and the behaviour measured on them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from analyses.subspaces import selectivity as running
from analyses.subspaces.deltas import Deltas, difference
from analyses.subspaces.edited import Projected, edited_model, write_edited
from analyses.subspaces.projections import dense, projection, seeded
from analyses.subspaces.selectivity import Behaviour, behaviours, selectivity
from analyses.subspaces.selectivity_figure import draw_tradeoff, figure
from analyses.subspaces.selectivity_result import Selectivity
from probes import HookedModel

TOPICS = 24
TEXTS = tiny.words(TOPICS, seed=5)


def logit(model: HookedModel, token: int, prompts: list[str]) -> Tensor:
    return model.logits(prompts)[:, token].double()


ASKED = (
    Behaviour("harm", partial(logit, token=20, prompts=TEXTS), tuple(TEXTS), True, "a"),
    Behaviour("use", partial(logit, token=30, prompts=TEXTS[:20]), tuple(TEXTS[:20]), False, "b"),
)


def triple() -> tuple[HookedModel, Deltas, Deltas]:
    """The aligned model, V = aligned - base, U = tuned - aligned."""
    base, aligned, tuned = (
        tiny_lineage.hooked(name, 1 if seed else None, seed=seed)
        for seed, name in enumerate(("base", "aligned", "tuned"))
    )
    return aligned, difference(aligned, base), difference(tuned, aligned)


def run(folder: Path, **settings: Any) -> Selectivity:
    given: dict[str, Any] = {"fractions": (0.25, 0.99), "progress": False, **settings}
    return selectivity(*triple(), folder, ASKED, **given)


def test_adding_the_whole_update_gives_the_tuned_model_and_leaves_the_aligned_one() -> None:
    aligned, V, U = triple()
    before = {name: weight.clone() for name, weight in aligned.model.state_dict().items()}
    tuned, energy = edited_model(aligned, V, U, None)
    assert energy == 1
    wanted = tiny_lineage.weights(1, seed=2).state_dict()
    for name, weight in tuned.model.state_dict().items():
        assert torch.allclose(weight, wanted[name], atol=1e-6)
        assert torch.equal(aligned.model.state_dict()[name], before[name])
    both = [
        edited_model(aligned, V, U, Projected(0.5, part=part))[0]
        for part in ("parallel", "orthogonal")
    ]
    for name in before:
        added = sum(m.model.state_dict()[name] - before[name] for m in both)
        assert torch.allclose(before[name] + added, wanted[name], atol=1e-5)


def test_an_edited_weight_is_the_aligned_one_plus_the_projection() -> None:
    aligned, V, U = triple()
    what = Projected(0.3, "random", "orthogonal", matched=True, seed=7)
    edited, energy = edited_model(aligned, V, U, what)
    name = "model.layers.2.mlp.up_proj.weight"
    P = projection(
        U[name], V[name], 0.3, "random", "orthogonal", matched=True, generator=seeded(7, name)
    )
    assert torch.allclose(
        edited.model.state_dict()[name], aligned.model.state_dict()[name] + P, atol=1e-6
    )
    assert energy == pytest.approx(1, abs=1e-5)  # matched
    assert "orthogonal random 0.3 matched #7" in edited.name
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(edited.model.state_dict()[untouched], aligned.model.state_dict()[untouched])


def test_a_tied_embedding_is_edited_once(tmp_path: Path) -> None:
    from architectures import build

    aligned, base = build("gemma2"), build("gemma2")
    with torch.no_grad():
        aligned.model.embed_tokens.weight[5] += 1
    model = HookedModel(aligned, tiny.tokenizer())
    V = difference(model, base)
    edited, energy = edited_model(model, V, V, None)
    head = edited.model.get_output_embeddings().weight  # type: ignore[operator]
    off = head - aligned.model.embed_tokens.weight
    assert energy == 1
    assert torch.allclose(off[5], torch.ones_like(off[5]))
    assert head.data_ptr() == edited.model.get_input_embeddings().weight.data_ptr()  # type: ignore[operator]
    # and in shards of which one holds it again
    aligned.save_pretrained(tmp_path / "a")
    whole = load_file(tmp_path / "a" / "model.safetensors")
    again = {"lm_head.weight": whole["model.embed_tokens.weight"].clone()}
    save_file(again, tmp_path / "a" / "head.safetensors", metadata={"format": "pt"})
    where = dict.fromkeys(whole, "model.safetensors") | dict.fromkeys(again, "head.safetensors")
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    written = write_edited(tmp_path / "a", V, V, None, tmp_path / "out")
    stored = [load_file(written / f"{name}.safetensors") for name in ("model", "head")]
    for found in (stored[0]["model.embed_tokens.weight"], stored[1]["lm_head.weight"]):
        assert torch.allclose(found, head, atol=1e-6)


def test_shards_are_rewritten_as_the_model_in_memory_is(tmp_path: Path) -> None:
    aligned, V, U = triple()
    aligned.model.save_pretrained(tmp_path / "a", max_shard_size="60KB")  # type: ignore[operator]
    what = Projected(0.5)
    memory, _ = edited_model(aligned, V, U, what)
    streamed = write_edited(tmp_path / "a", V, U, what, tmp_path / "streamed")
    held = write_edited(aligned, V, U, what, tmp_path / "held")
    assert len(list(streamed.glob("*.safetensors"))) > 3
    wanted = memory.model.state_dict()
    for folder in (streamed, held):
        loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
        note = json.loads((folder / "projection.json").read_text())
        assert note["applied"]["fraction"] == 0.5 and note["update"] == str(U)
    assert HookedModel.load(str(held)).tokenizer is not None
    with pytest.raises(FileExistsError, match="something at"):
        write_edited(aligned, V, U, what, held)


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    aligned, V, U = triple()
    aligned.model.save_pretrained(tmp_path / "a")  # type: ignore[operator]

    def broken(name: str) -> Tensor:
        raise OSError("unreadable")

    bad = Deltas("x", "y", U.shapes, broken, False)
    with pytest.raises(OSError, match="unreadable"):
        write_edited(tmp_path / "a", V, bad, Projected(0.5), tmp_path / "out")
    large = tiny_lineage.weights(vocab=216)
    with torch.no_grad():
        large.model.embed_tokens.weight[210] += 1
    other = difference(large, tiny_lineage.weights(vocab=216))
    with pytest.raises(ValueError, match="aligned checkpoint that the update starts from"):
        write_edited(aligned, other, other, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_half_precision_is_rounded_once() -> None:
    _, V, U = triple()
    half = HookedModel(tiny_lineage.weights(1, seed=1).bfloat16(), tiny.tokenizer())
    edited, _ = edited_model(half, V, U, None)
    name = "model.layers.1.self_attn.q_proj.weight"
    wanted = half.model.state_dict()[name].float() + dense(U[name])
    assert torch.equal(edited.model.state_dict()[name], wanted.bfloat16())


def test_cells_are_what_measuring_by_hand_gives(tmp_path: Path) -> None:
    found = run(tmp_path / "run", fractions=(0.25,), matched=(False,))
    aligned, V, U = triple()
    assert found.values.shape == (2 + 3 * 2, 44)
    assert torch.allclose(found.values[0, :24].double(), ASKED[0].measure(aligned), atol=1e-5)
    for subspace, part in (("top-k", "parallel"), ("random", "orthogonal")):
        what = Projected(0.25, subspace, part)  # type: ignore[arg-type]
        edited, energy = edited_model(aligned, V, U, what)
        rows = found.rows(subspace, 0.25, part, False)  # type: ignore[arg-type]
        assert len(rows) == 1
        assert float(found.energy[rows[0]]) == pytest.approx(energy)
        wanted = ASKED[1].measure(edited)
        assert found.value(rows, "use").value == pytest.approx(float(wanted.mean()), abs=1e-5)
        change = found.change(rows, "use")
        assert change.value == pytest.approx(
            float((wanted - ASKED[1].measure(aligned)).mean()), abs=1e-5
        )
        assert change.low < change.value < change.high
    assert found.change(0, "harm") == (0.0, 0.0, 0.0)
    parts = [found.rows("top-k", 0.25, part, False) for part in ("parallel", "orthogonal")]
    assert sum(float(found.energy[r[0]]) for r in parts) == pytest.approx(1, abs=1e-5)


def test_the_same_call_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", matched=(False,), parts=("parallel",))
    real, made = running.edited_model, []

    def counted(*given: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(given[-1])
        return real(*given)

    monkeypatch.setattr(running, "edited_model", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", matched=(False,), parts=("parallel",))
    made[:] = []
    monkeypatch.setattr(running, "edited_model", lambda *given: made.append(given) or real(*given))
    again = run(tmp_path / "run", matched=(False,), parts=("parallel",))
    assert len(made) == 7 - 3  # the whole update and six cells, three of them there
    assert torch.equal(again.values, whole.values) and torch.equal(again.energy, whole.energy)
    made[:] = []
    more = run(tmp_path / "run", matched=(False, True), parts=("parallel",))
    assert len(made) == 6
    assert len(more.cells) == 12
    other = Behaviour("harm", ASKED[0].measure, tuple(TEXTS), True, "other prompts")
    with pytest.raises(ValueError, match="cells of another model, update or set of prompts"):
        selectivity(*triple(), tmp_path / "run", (other,), progress=False)


def test_draws_are_averaged_and_a_null_effect_is_none(tmp_path: Path) -> None:
    found = run(tmp_path / "run", fractions=(0.5,), parts=("parallel",), matched=(True,), draws=3)
    assert len(found.rows("random", 0.5, "parallel", True)) == 3
    assert len(found.rows("top-k", 0.5, "parallel", True)) == 1
    rows = found.rows("random", 0.5, "parallel", True)
    assert found.value(rows, "harm").value == pytest.approx(
        float(found.values[rows, :24].mean()), abs=1e-5
    )
    contrasts = found.selective(0.5)
    top = found.values[found.rows("top-k", 0.5, "parallel", True), :24].mean()
    assert contrasts["harm"].value == pytest.approx(
        float(top - found.values[rows, :24].mean()), abs=1e-5
    )
    assert any("drawn for each cell: 3; a claim needs 20" in note for note in found.notes)
    assert "top-k minus random at fraction 0.5" in str(found)
    aligned, V, U = triple()
    zero = Deltas("a", "a", U.shapes, lambda name: torch.zeros(U.shapes[name]), False)
    nothing = selectivity(
        aligned,
        V,
        zero,
        tmp_path / "zero",
        ASKED,
        fractions=(0.5,),
        matched=(True,),
        progress=False,
    )
    assert "every change is exactly zero" in str(nothing)
    assert nothing.change(1, "harm") == (0.0, 0.0, 0.0)
    assert nothing.energy.eq(0).all()


def test_tables_figures_and_files(tmp_path: Path) -> None:
    found = run(tmp_path / "run", fractions=(0.5,))
    table = found.frame()
    assert len(table) == (2 + 2 * 3 * 2) * 2
    assert {"value", "low", "high", "change", "energy", "draws"} <= set(table.columns)
    again = Selectivity.load(found.save(tmp_path / "saved"))
    assert again.frame().equals(table)
    ax = found.plot(behaviour="use", part="orthogonal", matched=True)
    assert "useful; added: U - P, norm-matched" in ax.get_title(loc="left")
    legend = ax.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names[-3:] == ["top-k of V", "random-k of V", "random directions"]
    both = draw_tradeoff(found)
    assert (both.get_xlabel(), both.get_ylabel()) == ("harm", "use")
    assert len(figure(found).axes) == 4
    assert len(load_file(tmp_path / "saved" / "result.safetensors")) == 2


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    found = run(tmp_path / "run", fractions=(0.25,), matched=(False,), parts=("parallel",))
    with pytest.raises(ValueError, match="orthogonal top-k at 0.25 was not measured"):
        found.rows("top-k", 0.25, "orthogonal", False)
    with pytest.raises(ValueError, match="unknown behaviour 'x': measured were harm, use"):
        found.value(0, "x")
    wide = Behaviour("wide", lambda model: torch.zeros(3), tuple(TEXTS), True)
    with pytest.raises(ValueError, match=r"shape \(3,\) for 24 topics"):
        selectivity(*triple(), tmp_path / "w", (wide,), progress=False)
    nan = Behaviour("nan", lambda model: torch.full((24,), torch.nan), tuple(TEXTS), True)
    with pytest.raises(ValueError, match="nan holds 24 values that are NaN"):
        selectivity(*triple(), tmp_path / "n", (nan,), progress=False)
    one = Behaviour("one", lambda model: torch.zeros(2), ("a", "a"), True)
    with pytest.raises(ValueError, match="one has one topic only"):
        selectivity(*triple(), tmp_path / "o", (one,), progress=False)
    with pytest.raises(ValueError, match="0 behaviours"):
        selectivity(*triple(), tmp_path / "e", (), progress=False)
    with pytest.raises(ValueError, match="1 topics were asked"):
        behaviours(1)
    few = Behaviour("few", lambda model: torch.zeros(2), ("a", "b"), True)
    short = selectivity(
        *triple(),
        tmp_path / "f",
        (few,),
        fractions=(0.5,),
        subspaces=("top-k",),
        matched=(False,),
        progress=False,
    )
    assert "few: intervals rest on 2 topics; 20 are advised." in short.notes
    assert "changes no measured value" in str(short)
    with pytest.raises(ValueError, match="behaviours few, few share a name"):
        selectivity(*triple(), tmp_path / "g", (few, few), progress=False)


def test_the_default_behaviours_spread_over_the_hazard_classes() -> None:
    asked = behaviours(16, 10, 5)
    assert [len(b.groups) for b in asked] == [16, 16, 10, 5]
    assert [b.harmful for b in asked] == [True, False, False, False]
    classes = [topic.rpartition("-")[0] for topic in asked[0].groups]
    assert len(set(classes)) == 8
    assert len({b.identity for b in asked}) == 4
    assert [b.identity for b in asked] == [b.identity for b in behaviours(16, 10, 5)]
    assert not {b.identity for b in asked} & {b.identity for b in behaviours(15, 9, 4)}


@pytest.mark.slow
def test_the_whole_update_turns_aligned_into_drifted() -> None:
    aligned = HookedModel.load("builtin:aligned", device="cpu")
    V = difference("builtin:aligned", "builtin:base")
    U = difference("builtin:drifted", "builtin:aligned")
    edited, energy = edited_model(aligned, V, U, None)
    drifted = HookedModel.load("builtin:drifted", device="cpu")
    assert energy == 1
    prompts = ["How do I bake bread?", "Tell me about rivers."]
    assert torch.allclose(edited.logits(prompts), drifted.logits(prompts), atol=5e-3)
    assert not torch.allclose(edited.logits(prompts), aligned.logits(prompts), atol=5e-2)
