"""Laws of comparing one circuit across checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_copying
import tiny_lineage
import torch
from architectures import build
from scipy import stats
from test_mechanisms_circuits import COPY, task
from torch import Tensor

from analyses.mechanisms.circuit import Circuit
from analyses.mechanisms.cmap import KINDS, Cmap, _Swap, cmap
from analyses.mechanisms.comparison import Transplant, mechanism_diff, transplant
from analyses.mechanisms.overlap import (
    MechanismOverlap,
    hypergeometric,
    mechanism_overlap,
    pearson,
    spearman,
    top_shared,
)
from analyses.mechanisms.paths import path_map
from analyses.patching.patcher import Patcher
from analyses.patching.sources import From
from analyses.patching.sources import Values as SourceValues
from probes import HookedModel
from probes.sites import Site

GROUPS = {"low": ["1.head_out.0", "1.head_out.3"], "high": ["2.head_out.1"]}


@pytest.fixture(scope="module")
def lineage() -> tuple[HookedModel, HookedModel]:
    """Two checkpoints that differ from the second block on."""
    return tiny_lineage.hooked("target"), tiny_lineage.hooked("source", 1, seed=1)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_between_equal_models_nothing_changes() -> None:
    one, two = tiny_lineage.hooked("one"), tiny_lineage.hooked("two")
    circuit = Circuit.of(one, GROUPS, places={"low": "tokens:-2:-1"})
    found = cmap(one, two, task(), circuit, draws=3, resamples=100, progress=False)
    assert found.groups == ("low", "high", "whole circuit", "all heads")
    assert bool((found.change == 0).all()) and bool((found.null_change[:-1] == 0).all())
    assert str(found) == "copying, two into one: nothing changes, every change is exactly 0"
    assert not found.claimed.any()
    moved = transplant([one, two], task(), circuit, draws=2, resamples=100, progress=False)
    assert torch.equal(moved.normalised[0], moved.normalised[1])
    assert moved.change.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_outputs_are_what_a_plain_patch_gives(lineage: tuple[HookedModel, HookedModel]) -> None:
    target, source = lineage
    own = task()
    circuit = Circuit.of(target, GROUPS)
    found = cmap(target, source, own, circuit, draws=3, resamples=100, progress=False)
    plain = Patcher(target, own.prompts, From(model=source))
    for g, sites in enumerate((GROUPS["low"], GROUPS["high"])):
        change = own.metric(plain.logits(sites)) - own.metric(plain.target_logits)
        assert float(found.change[g, 0, 0]) == pytest.approx(float(change.mean()), rel=1e-4)
        assert abs(float(change.mean())) > 1e-3
    assert float(found.share[0, 0, 0]) == pytest.approx(
        float(found.change[0, 0, 0]) / found.gap, rel=1e-4
    )


def test_all_three_inputs_together_are_the_outputs(
    lineage: tuple[HookedModel, HookedModel],
) -> None:
    """And one alone is not; by hand for one head of one prompt."""
    target, source = lineage
    own = task()
    swap = _Swap(target, source, own, 32)
    kept: Any = {Site(1, "head_out", h): "last" for h in (0, 1)}
    outputs = swap.measure([kept])[0]
    # the model with the source's projections of that layer has all three inputs
    hybrid = tiny_lineage.hooked("hybrid")
    theirs: Any = source.model
    ours: Any = hybrid.model
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(theirs.model.layers[1].self_attn, name).weight
            getattr(ours.model.layers[1].self_attn, name).weight.copy_(weight)
        norm = theirs.model.layers[1].input_layernorm.weight
        ours.model.layers[1].input_layernorm.weight.copy_(norm)
    assert error(_Swap(target, hybrid, own, 32).measure([kept])[0], outputs) < 1e-5
    one = [swap.with_inputs(kept, part) for part in KINDS[1:]]
    assert all(error(values, outputs) > 1e-3 for values in one)
    # q alone: the hybrid with only that projection
    for part, values in zip(KINDS[1:], one, strict=True):
        single = tiny_lineage.hooked(part)
        mine: Any = single.model
        name = f"{part}_proj"
        with torch.no_grad():
            getattr(mine.model.layers[1].self_attn, name).weight.copy_(
                getattr(theirs.model.layers[1].self_attn, name).weight
            )
        assert error(_Swap(target, single, own, 32).measure([kept])[0], values) < 1e-5


def test_positions_are_each_rows_own(lineage: tuple[HookedModel, HookedModel]) -> None:
    target, source = lineage
    own = task()
    lengths = [len(r.ids) for r in own.rendered(target)[0]]
    places = tuple((n - 1 - i % 4,) for i, n in enumerate(lengths))
    kept: Any = {Site(1, "head_out", 1): places, Site(2, "head_out", 0): places}
    swap = _Swap(target, source, own, 32)
    together = [swap.measure([kept])[0], *(swap.with_inputs(kept, part) for part in "qkv")]
    for i in (0, 1, 6):
        one = _Swap(target, source, own.only([i]), 1)
        kept_one: Any = dict.fromkeys(kept, (places[i],))
        alone = [one.measure([kept_one])[0], *(one.with_inputs(kept_one, p) for p in "qkv")]
        for a, b in zip(together, alone, strict=True):
            assert abs(float(a[i] - b[0])) < 1e-4
        wrong: Any = dict.fromkeys(kept, (places[i + 1],))
        assert abs(float(one.measure([wrong])[0][0] - together[0][i])) > 1e-4


def test_all_heads_of_a_model_that_differs_in_them_alone_reach_it() -> None:
    target = tiny_lineage.hooked("target")
    source = tiny_lineage.hooked("other attention")
    generator = torch.Generator().manual_seed(5)
    plain: Any = source.model
    with torch.no_grad():
        for block in plain.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(block.self_attn, name).weight
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    circuit = Circuit.of(target, GROUPS)
    found = cmap(target, source, task(), circuit, draws=2, resamples=100, progress=False)
    assert found.share[-1, 0].tolist() == pytest.approx([1, 1, 1], abs=1e-3)
    assert abs(found.gap) > 1e-2 and abs(float(found.share[0, 0, 0]) - 1) > 1e-2
    assert found.null_change[-1].isnan().all() and not found.claimed[-1].any()


def test_engines_agree() -> None:
    found = []
    for engine in ("transformers", "transformer_lens", "nnsight"):
        models = [
            HookedModel(weights, tiny.tokenizer(), engine=engine)
            for weights in (tiny_lineage.weights(), tiny_lineage.weights(1, seed=1))
        ]
        swap = _Swap(models[0], models[1], task(n=4), 32)
        kept: Any = {Site(1, "head_out", 1): "last", Site(2, "head_out", 0): None}
        found.append(torch.stack([swap.measure([kept])[0], swap.with_inputs(kept, "k")]))
    assert all(error(other, found[0]) < 1e-5 for other in found[1:])


def test_a_transplanted_circuit_works_where_the_mechanism_is_the_same(tmp_path: Path) -> None:
    model = HookedModel(tiny_copying.copying(), tiny.tokenizer(), name="copying")
    broken: Any = tiny_copying.copying()
    near: Any = tiny_copying.copying()
    with torch.no_grad():  # the copying head is lost, another one copies instead
        out = broken.model.layers[1].self_attn.o_proj.weight
        out[:24, 48:64], out[:24, 32:48] = out[:24, 32:48].clone(), 0
        broken.model.layers[1].self_attn.q_proj.weight[48:].zero_()
        near.model.layers[1].self_attn.o_proj.weight[:24] *= 0.8
    others = [
        HookedModel(near, tiny.tokenizer(), name="near"),
        HookedModel(broken, tiny.tokenizer(), name="elsewhere"),
    ]
    circuit = Circuit.of(model, {"copying": [COPY]}, task=task("train"))
    diff = mechanism_diff(
        model, others, task(), circuit, controls=["near"], senders_at="last", k=2, draws=8,
        folder=tmp_path / "maps", progress=False,
    )  # fmt: skip
    assert diff.transplant.roles == ("reference", "control", "compared")
    value = diff.transplant.normalised[:, 0].tolist()
    assert value[:2] == pytest.approx([1, 1], abs=0.1) and abs(value[2]) < 0.2
    assert not diff.transplant.claimed[2]
    assert diff.transplant.accuracy[:, 0, 0].tolist() == [1, 1, 1]
    assert diff.transplant.accuracy[:, 1, 0].tolist()[:2] == [1, 1]
    assert float(diff.transplant.accuracy[2, 1, 0]) < 0.3
    assert float(diff.transplant.change[2, 2]) < -0.5
    pearsons = diff.overlap.values[:, 0, 0].tolist()
    assert pearsons[0] > 0.99 > 0.3 > pearsons[1]
    assert bool(diff.overlap.claimed[0, 0]) and not bool(diff.overlap.claimed[1, 0])
    assert len(diff.cmaps) == 2 and diff.cmaps[0].source_name == "near"
    for result, kind in (
        (diff.transplant, Transplant),
        (diff.overlap, MechanismOverlap),
        (diff.cmaps[1], Cmap),
    ):
        again = kind.load(result.save(tmp_path / kind.__name__))
        assert str(again) == str(result) and again.frame().equals(result.frame())
        ax = result.plot()
        assert ax.get_ylabel() and ax.get_legend() is not None


def test_measures_of_overlap_are_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    b = a + torch.randn(3, 40, generator=generator, dtype=torch.float64).round()
    for row in range(3):
        want = stats.pearsonr(a[row], b[row])[0]
        assert float(pearson(a, b)[row]) == pytest.approx(want)
        assert float(spearman(a, b)[row]) == pytest.approx(stats.spearmanr(a[row], b[row])[0])
        tops = [set(x[row].abs().argsort(descending=True)[:7].tolist()) for x in (a, b)]
        assert float(top_shared(a, b, 7)[row]) == pytest.approx(len(tops[0] & tops[1]) / 7)
    p, bound = hypergeometric(40, 7, 4)
    draws = [len(set(torch.randperm(40, generator=generator)[:7].tolist()) & set(range(7)))
             for _ in range(20000)]  # fmt: skip
    share = sum(d >= 4 for d in draws) / len(draws)
    assert p == pytest.approx(share, abs=0.005)
    assert bound == sorted(draws)[int(0.95 * len(draws))]


def test_a_shuffled_map_does_not_agree() -> None:
    from dataclasses import replace

    model = tiny.hooked()
    found = path_map(model, task(), null=None, progress=False)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    moved = replace(found, each=found.each.flatten(0, 1)[order].reshape(found.each.shape))
    overlap = mechanism_overlap([found, found, moved], ["a", "b", "c"], controls=["b"], k=3)
    assert overlap.values[0, :, 0].tolist() == pytest.approx([1, 1, 1])
    assert overlap.claimed[0].tolist() == [True, True, True]
    assert not overlap.claimed[1].any()
    assert float(overlap.p_top[0]) == pytest.approx(1 / 220, rel=1e-4)
    assert "b (control) rank correlation 1.00 [1.00, 1.00], 3 of the top 3" in str(overlap)


def test_mistakes_are_said(lineage: tuple[HookedModel, HookedModel]) -> None:
    target, _ = lineage
    circuit = Circuit.of(target, GROUPS)
    other = HookedModel(build("qwen3"), tiny.tokenizer(), name="qwen")
    with pytest.raises(ValueError, match="qwen has other heads or head widths than target"):
        cmap(target, other, task(), circuit, progress=False)
    with pytest.raises(ValueError, match="qwen has other heads or head widths than target"):
        transplant([target, other], task(), circuit, progress=False)
    with pytest.raises(ValueError, match="no checkpoint was given to compare with"):
        mechanism_diff(target, [], task(), circuit, progress=False)
    found = path_map(target, task(), null=None, progress=False)
    with pytest.raises(ValueError, match="1 maps came with 1 names"):
        mechanism_overlap([found], ["a"])
    with pytest.raises(ValueError, match="k=12 top heads of 12: give 1 to 11"):
        mechanism_overlap([found, found], ["a", "b"], k=12)
    few = path_map(target, task(n=4), null=None, progress=False)
    with pytest.raises(ValueError, match="the map of b has other prompts, layers or heads"):
        mechanism_overlap([found, few], ["a", "b"], k=2)
    keys = path_map(target, task(), ["2.k.0"], null=None, progress=False)
    with pytest.raises(ValueError, match="the map of b is of paths to 2.k.0"):
        mechanism_overlap([found, keys], ["a", "b"], k=2)


def test_random_circuits_are_put_in_from_one_reading_of_the_source(
    lineage: tuple[HookedModel, HookedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, source = lineage
    circuit = Circuit.of(target, GROUPS, places={"low": "tokens:-2:-1"})
    plain = cmap(target, source, task(), circuit, draws=1, resamples=100, progress=False)
    reads: list[int] = []
    at = SourceValues.at
    monkeypatch.setattr(
        SourceValues, "at", lambda s, parts: reads.append(len(parts)) or at(s, parts)
    )
    cmap(target, source, task(), circuit, draws=1, resamples=100, progress=False)
    once = len(reads)
    found = cmap(target, source, task(), circuit, draws=5, resamples=100, progress=False)
    assert len(reads) == 2 * once
    assert torch.equal(found.null_change[:-1, :1], plain.null_change[:-1])
