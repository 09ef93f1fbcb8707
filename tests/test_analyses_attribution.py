"""Weights and activations of one checkpoint in another: exact undo, and where a drift is found."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import build
from torch import Tensor

from analyses.drift.attribution import DriftAttribution, attribute_drift
from analyses.patching.metrics import RefusalLogOdds
from analyses.patching.patcher import Patcher
from analyses.patching.restoring import choose, explore
from analyses.patching.runs import Runs
from analyses.patching.sources import From
from analyses.patching.swaps import WeightSwap
from analyses.patching.weights import patched_weights, replacement
from probes import HookedModel
from probes.sites import Unsupported

VALIDATION, TEST = tiny.words(24, seed=4), tiny.words(22, seed=5)
METRIC = RefusalLogOdds((20, 21, 22))
SMALL: dict[str, Any] = {
    "validation": VALIDATION,
    "test": TEST,
    "metric": METRIC,
    "window": 1,
    "heads": 2,
    "draws": 6,
    "progress": False,
}


def hooked(name: str, architecture: str = "llama", **options: Any) -> HookedModel:
    return HookedModel(build(architecture), tiny.tokenizer(), name=name, **options)


def moved(name: str, parts: dict[str, float], architecture: str = "llama", **options: Any) -> Any:
    """A model with noise on the weights named."""
    model = build(architecture)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            for part, size in parts.items():
                if path.startswith(part):
                    weight += size * weight.std() * torch.randn(weight.shape, generator=generator)
    return HookedModel(model, tiny.tokenizer(), name=name, **options)


def state(model: HookedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox", "phi3", "gemma2"])
def test_weights_come_back_bit_for_bit(architecture: str) -> None:
    target = hooked("target", architecture)
    source = moved("source", {"": 0.3}, architecture)
    before, given = state(target), state(source)
    logits = target.logits(VALIDATION[:3])
    with patched_weights(target, source, "all.resid_post"):
        inside = state(target)
        assert not torch.equal(target.logits(VALIDATION[:3]), logits)
    assert same(state(target), before)
    blocks = [n for n in before if n.startswith(target.layout.blocks[0].path.rpartition(".")[0])]
    assert all(torch.equal(inside[n], given[n]) for n in blocks)
    assert all(torch.equal(inside[n], before[n]) for n in set(before) - set(blocks))
    with pytest.raises(RuntimeError, match="inside"):
        with patched_weights(target, source, "1.attn_out"):
            raise RuntimeError("inside")
    assert same(state(target), before) and same(state(source), given)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox", "phi3", "falcon"])
def test_all_heads_are_the_attention(architecture: str) -> None:
    """Slices of all heads make the whole; one head changes its own activation and no other."""
    target = hooked("target", architecture)
    source = moved("source", {"": 0.3}, architecture)
    layout = target.layout.blocks[1]
    slices = [f"1.{part}.{h}" for part in ("q", "k", "v") for h in range(layout.heads[part])]
    whole = replacement(target, source, ["1.q", "1.k", "1.v"])
    apart = replacement(target, source, slices)
    assert whole.keys() == apart.keys() and all(torch.equal(whole[n], apart[n]) for n in whole)
    sites = target.sites(["1.q", "1.k", "1.v", "1.head_out"])
    batch = target.batch(target.template.render_all(VALIDATION[:3]))
    before = target.engine.read(batch, sites)
    with patched_weights(target, source, "1.q.2"):
        after = target.engine.read(batch, sites)
    changed = {str(s): (after[s] != before[s]).flatten(0, 1).any(-1).any(0) for s in sites}
    assert changed["1.q"].nonzero().flatten().tolist() == [2]
    assert not changed["1.k"].any() and not changed["1.v"].any()
    assert changed["1.head_out"].nonzero().flatten().tolist() == [2]


def test_columns_of_the_output_projection_belong_to_their_head() -> None:
    """With one head's columns replaced, what attention adds changes by that head's part alone."""
    target, source = hooked("target"), moved("source", {"": 0.3})
    (out, heads) = target.sites(["1.head_out", "1.attn_out"])
    batch = target.batch(target.template.render_all(VALIDATION[:3]))
    before = target.engine.read(batch, [heads, out])
    with patched_weights(target, source, "1.head_out.3"):
        after = target.engine.read(batch, [out])[out]
    W: Any = [m.model.model.layers[1].self_attn.o_proj.weight[:, 48:64] for m in (target, source)]
    want = before[out] + before[heads][:, :, 3] @ (W[1] - W[0]).T
    assert torch.allclose(after, want, atol=1e-5)
    assert not torch.allclose(after, before[out], atol=1e-3)


def test_weights_that_cannot_be_patched_are_refused() -> None:
    target = hooked("target")
    with pytest.raises(ValueError, match="other heads or head widths than target"):
        replacement(target, hooked("wide", "llama-head-dim"), "1.q")
    with pytest.raises(
        Unsupported, match=r"1\.resid_pre has no weights of its own: name resid_post"
    ):
        replacement(target, hooked("other"), "1.resid_pre")
    with pytest.raises(ValueError, match="out of range"):
        replacement(target, hooked("other"), "1.q.4")
    lens = hooked("lens", "gpt2", engine="transformer_lens")
    with pytest.raises(Unsupported, match="copies the fused projection"):
        replacement(lens, moved("source", {"": 0.3}, "gpt2"), "1.q")
    assert replacement(target, hooked("equal"), "all.resid_post") == {}


@pytest.mark.parametrize("engine", ["transformers", "transformer_lens", "nnsight"])
def test_all_blocks_of_weights_are_the_source(engine: str) -> None:
    target = hooked("target", engine=engine)
    source = moved("source", {"model.layers.": 0.3})
    swap = WeightSwap(source, target, VALIDATION, METRIC, 32, None, lambda n: None)
    blocks = tuple(target.sites("all.resid_post"))
    change = swap.change([blocks, blocks[1:]], "any")
    assert torch.allclose(change[0], swap.gap, atol=1e-5)
    assert not torch.allclose(change[1], swap.gap, atol=1e-3)


@pytest.mark.parametrize("how", ["activations", "weights"])
def test_a_drift_planted_in_one_layer_is_found_there(how: str) -> None:
    aligned, drifted = hooked("aligned"), moved("drifted", {"model.layers.1.": 0.4})
    found = attribute_drift(aligned, drifted, how, **{**SMALL, "heads": 1})
    if how == "weights":  # the layer's weights are the drift, neither more nor less
        assert found.window == (1, 1)
        assert found.window_share.tolist() == pytest.approx([1, 1, 1], abs=1e-4)
        assert found.single[0, [0, 2]].eq(0).all()
        assert found.below.tolist() == pytest.approx([0, 1, 1], abs=1e-4)
        assert found.above.tolist() == pytest.approx([1, 1, 0], abs=1e-4)
        assert {text[0] for text in found.chosen_heads} == {"1"}
        assert found.window_null.unique().tolist() == pytest.approx([0], abs=1e-6)
        assert found.claimed()
    else:  # layer 2 reads another stream, so it differs too; layer 0 does not
        assert found.single[:, 0].eq(0).all() and found.single[:, 1].ne(0).all()
        assert found.below.tolist() == pytest.approx([0, 1, 1], abs=1e-4)
        assert found.above[:2].tolist() == pytest.approx([1, 1], abs=1e-4)
        assert found.heads[0].eq(0).all() and found.heads[1:].ne(0).all()
    assert found.everything_share.tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert found.levels[1] - found.levels[0] == pytest.approx(
        float((METRIC(aligned.logits(TEST)) - METRIC(drifted.logits(TEST))).mean()), rel=1e-4
    )


def test_activations_of_an_attribution_are_patches_one_by_one() -> None:
    aligned, drifted = hooked("aligned"), moved("drifted", {"model.layers.": 0.3})
    found = attribute_drift(aligned, drifted, **SMALL)
    patcher = Patcher(drifted, VALIDATION, From(model=aligned), shorten=False)
    target, source = patcher.ends(METRIC)
    for k, part in enumerate(("attn_out", "mlp_out")):
        for layer in range(3):
            change = METRIC(patcher.logits(f"{layer}.{part}")) - target
            assert float(found.single[k, layer]) == pytest.approx(float(change.mean()), abs=1e-5)
    head = METRIC(patcher.logits("2.head_out.1")) - target
    share = float(head.mean() / (source - target).mean())
    assert float(found.heads[2, 1]) == pytest.approx(share, abs=1e-4)


def test_what_is_chosen_does_not_see_the_test_prompts() -> None:
    aligned, drifted = hooked("aligned"), moved("drifted", {"model.layers.": 0.3})
    one = attribute_drift(aligned, drifted, "weights", **SMALL)
    other = attribute_drift(
        aligned, drifted, "weights", **{**SMALL, "test": tiny.words(22, seed=9)}
    )
    assert (one.window, one.chosen_heads) == (other.window, other.chosen_heads)
    assert torch.equal(one.single, other.single)
    assert not torch.equal(one.window_share, other.window_share)
    again = attribute_drift(aligned, drifted, "weights", **SMALL)
    assert torch.equal(one.window_null, again.window_null) and str(one) == str(again)


def test_the_choice_is_the_largest_share() -> None:
    aligned, drifted = hooked("aligned"), moved("drifted", {"model.layers.": 0.3})
    swap = WeightSwap(aligned, drifted, VALIDATION, METRIC, 32, None, lambda n: None)
    explored = explore(swap, 2, [str(i) for i in range(24)], 200, 0)
    assert explored.windows.shape == (2,)
    choice = choose(explored, 3)
    assert choice is not None and choice.window[0] == int(explored.windows.argmax())
    chosen = [float(explored.heads[int(t[0]), int(t[2])]) for t in choice.heads]
    assert sorted(chosen) == explored.heads.flatten().sort().values[-3:].tolist()


def test_equal_checkpoints_have_nothing_to_attribute() -> None:
    found = attribute_drift(hooked("one"), hooked("two"), max_new_tokens=2, **SMALL)
    assert found.single.eq(0).all() and found.single_share.isnan().all()
    assert found.window is None and found.rates == () and not found.claimed()
    assert str(found) == (
        "one and two are equal on these prompts: every change is exactly 0 and there is nothing "
        "to attribute"
    )
    found.plot(), found.plot_heads()


def test_the_result_is_saved_and_drawn(tmp_path: Path) -> None:
    aligned, drifted = hooked("aligned"), moved("drifted", {"model.layers.1.": 0.4})
    found = attribute_drift(aligned, drifted, max_new_tokens=3, **SMALL)
    again = DriftAttribution.load(found.save(tmp_path / "found"))
    assert str(again) == str(found) and again.frame().equals(found.frame())
    assert [name for name, _, n in found.rates if n == 22] == [
        "drifted",
        "aligned",
        "window",
        "heads",
    ]
    assert 0 <= found.rate("window").low <= found.rate("window").high <= 1
    ax = found.plot()
    assert "layer" in ax.get_xlabel() and "% of the gap" in ax.get_ylabel()
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names[0] == "chosen window" and "all layers up to this" in names
    heads = found.plot_heads()
    assert len(heads.lines) == 4 and "head" in heads.get_xlabel()
    assert found.test_frame()["what"].tolist() == ["window", "heads", "all layers"]
    assert "layers" in str(found) and "null at most" in str(found)


def test_patched_answers_begin_as_the_patched_logits_say() -> None:
    aligned, drifted = hooked("aligned"), moved("drifted", {"model.layers.": 0.5})
    patcher = Patcher(drifted, TEST, From(model=aligned))
    cell = drifted.sites("2.resid_post")
    from analyses.patching.cells import Cell

    answers = patcher.generate(Cell(cell), 1)
    ids = patcher.source_logits.argmax(-1) if patcher.source_logits is not None else []
    want = [drifted.tokenizer.decode([int(i)], skip_special_tokens=True) for i in ids]
    assert answers == want
    assert answers != drifted.generate(TEST, 1)


def test_mistakes_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = hooked("one"), hooked("two")
    with pytest.raises(ValueError, match="choose 'activations' or 'weights'"):
        attribute_drift(one, two, "both", **SMALL)
    with pytest.raises(ValueError, match="a window of 4 layers and 2 heads: give 1 to 3"):
        attribute_drift(one, two, **{**SMALL, "window": 4})
    with pytest.raises(ValueError, match="24 validation prompts came with 1 topics"):
        attribute_drift(one, two, validation_topics=["a"], **SMALL)
    plain = hooked("plain", template="none")
    with pytest.raises(ValueError, match="have different chat templates"):
        attribute_drift(one, plain, **SMALL)
    with pytest.raises(ValueError, match="engine makes whole passes only"):
        Runs(hooked("lens", engine="nnsight"), [(3, 4)], resume=True)
    jamba = hooked("jamba", "jamba")
    with pytest.raises(ValueError, match="checkpoints of one model|layers of width"):
        attribute_drift(one, jamba, **SMALL)
    mamba, other = hooked("mamba", "mamba"), moved("other", {"backbone.layers.1": 0.4}, "mamba")
    found = attribute_drift(mamba, other, **SMALL)
    assert found.heads.shape == (3, 0) and found.chosen_heads == () and found.window is not None
    assert found.single[1].isnan().all()  # no MLP
    found.plot()
    with pytest.raises(ValueError, match="other has no attention heads to draw"):
        found.plot_heads()


@pytest.mark.slow
def test_the_built_in_drift_lies_where_its_adapter_does() -> None:
    """The adapters touch queries and values of blocks 10 to 29 only."""
    aligned, drifted = HookedModel.load("builtin:aligned"), HookedModel.load("builtin:mixed")
    found = attribute_drift(
        aligned, drifted, "weights", n_topics=8, window=20, heads=5, draws=2, resamples=200,
        progress=False,
    )  # fmt: skip
    assert found.single[0, :10].eq(0).all() and found.single[0, 10:].ne(0).all()
    assert found.window == (10, 29)
    assert float(found.window_share[0]) == pytest.approx(1, abs=1e-4)
    assert found.levels[1] > found.levels[0]
