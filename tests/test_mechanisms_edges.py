"""Laws of edge scores on tiny models: what all edges of a component add up to."""

from typing import Any

import pytest
import tiny
import tiny_copying
import tiny_lineage
import torch
from architectures import build

from analyses.mechanisms.attribution_patching import attribute
from analyses.mechanisms.edges import EdgeScores, edge_scores
from analyses.patching.metrics import LogitDifference, RefusalLogOdds
from analyses.patching.sources import From, Zero
from probes import HookedModel

CLEAN = [f"w{k} w{k + 1} w5 w6" + " w9" * (k % 3) for k in range(24)]
CORRUPT = [f"w{k} w{k + 70} w{k + 30} w6" + " w9" * (k % 3) for k in range(24)]
SOURCE = From(prompts=tuple(CORRUPT))
METRIC = RefusalLogOdds((20, 21, 22))
QUIET: dict[str, Any] = {"progress": False, "draws": 0, "resamples": 200}


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return tiny_lineage.hooked("one")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox", "qwen3"])
def test_edges_add_up(architecture: str) -> None:
    """All edges into the logits to the direct attribution, all edges of a writer to its own."""
    model = HookedModel(build(architecture), tiny.tokenizer())
    given = (CLEAN[:6], From(prompts=tuple(CORRUPT[:6])), METRIC)
    edges = edge_scores(model, *given, null=False, progress=False, resamples=100, batch_size=3)
    into = edges.score.nan_to_num(0.0)
    nodes = attribute(
        model, *given, "parts", columns=["resid_pre", "resid_post", "mlp_out"], **QUIET
    )
    heads = attribute(model, *given, **QUIET)
    assert float(into[:, -1].sum()) == pytest.approx(float(nodes.score[2, 1]), rel=1e-3, abs=1e-5)
    own = {"embedding": nodes.score[0, 0]}
    for layer in range(3):
        own |= {f"{layer}.head_out.{h}": heads.score[layer, h] for h in range(4)}
        own[f"{layer}.mlp_out"] = nodes.score[layer, 2]
    assert tuple(own) == edges.writers
    assert torch.allclose(into.sum(1), torch.stack(list(own.values())), rtol=1e-3, atol=1e-5)
    # what enters a block is read by its attention, by its MLP where the two are parallel, or goes by
    u, v = edges.writers.index("1.mlp_out"), edges.readers.index("1.q.0")
    assert edges.score[u, v].isnan() and bool(edges.score[u, -1].isfinite())
    same_block = edges.score[edges.writers.index("1.head_out.0"), edges.readers.index("1.mlp")]
    assert bool(same_block.isnan()) == (architecture == "gpt-neox")


def test_edges_of_integrated_inputs_and_of_another_checkpoint(llama: HookedModel) -> None:
    """Into the logits: the change of the last stream times its mean gradient on the way."""
    texts, source = CLEAN[:6], From(prompts=tuple(CORRUPT[:6]))
    edges = edge_scores(
        llama, texts, source, METRIC, method="inputs", steps=3, progress=False, resamples=100
    )
    node = attribute(
        llama, texts, source, METRIC, "parts", columns=["resid_post"], layers=[2],
        method="inputs", steps=3, **QUIET,
    )  # fmt: skip
    direct = float(edges.score[:, -1].sum())
    assert direct == pytest.approx(float(node.score[0, 0]), rel=1e-3)
    assert bool(edges.null.isfinite().any()) and edges.null_95 > 0
    other = tiny_lineage.hooked("source", 1, seed=1)
    edges = edge_scores(llama, texts, From(model=other), METRIC, null=False, progress=False)
    node = attribute(
        llama, texts, From(model=other), METRIC, "parts", columns=["resid_post"], **QUIET
    )
    assert float(edges.score[:, -1].sum()) == pytest.approx(float(node.score[2, 0]), rel=1e-3)
    assert not edges.score[edges.writers.index("embedding")].nan_to_num(0.0).any()


@pytest.mark.parametrize("method", ["gradient", "inputs"])
def test_with_equal_source_and_target_every_edge_is_exactly_zero(
    llama: HookedModel, method: str
) -> None:
    given: dict[str, Any] = {"method": method, "steps": 2, "null": False, "progress": False}
    itself = From(prompts=tuple(CLEAN[:6]))
    edges = edge_scores(llama, CLEAN[:6], itself, METRIC, **given)
    assert bool((edges.score.nan_to_num(0.0) == 0).all())
    assert str(edges) == "edges: source and target are equal, every score is exactly 0"
    other = edge_scores(llama, CLEAN[:6], From(prompts=tuple(CORRUPT[:6])), METRIC, **given)
    some = other.score[other.score.isfinite()] != 0  # the last token is the same in both
    assert float(some.double().mean()) > 0.9


def test_the_planted_path_is_found() -> None:
    model = HookedModel(tiny_copying.copying(), tiny.tokenizer())
    words = [(i % 12, (i + 5) % 12) for i in range(12)]
    base, other = (
        [f"w60 {tiny_copying.word(pair[k])} w6{i % 9} w2" for i, pair in enumerate(words)]
        for k in (0, 1)
    )
    ids = [tuple(tiny_copying.WORDS[pair[k]] for pair in words) for k in (0, 1)]
    source, metric = From(prompts=tuple(other)), LogitDifference(ids[1], ids[0])
    edges = edge_scores(model, base, source, metric, progress=False, resamples=200)
    assert set(edges.best(2)) == {("embedding", "1.v.1"), ("1.head_out.2", "logits")}


def test_forms(llama: HookedModel, tmp_path) -> None:
    edges = edge_scores(llama, CLEAN[:4], From(prompts=tuple(CORRUPT[:4])), METRIC, progress=False)
    assert str(EdgeScores.load(edges.save(tmp_path / "edges"))) == str(edges)
    assert len(edges.frame()) == int(edges.score.isfinite().sum())
    assert edges.frame()["score"].abs().is_monotonic_decreasing
    assert edges.plot().get_xlabel() == "layer that writes"


def test_what_is_refused(llama: HookedModel) -> None:
    with pytest.raises(ValueError, match="give From"):
        edge_scores(llama, CLEAN, Zero(), METRIC)
    gemma = HookedModel(build("gemma2"), tiny.tokenizer(), name="gemma")
    with pytest.raises(ValueError, match="passes .*post_attention_layernorm before it joins"):
        edge_scores(gemma, CLEAN, SOURCE, METRIC, progress=False)
    other = HookedModel(build("gpt2"), tiny.tokenizer(), name="shifted")
    biased: Any = build("gpt2")
    with torch.no_grad():
        for block in biased.transformer.h:
            block.attn.c_proj.bias += 1.0
    source = From(model=HookedModel(biased, tiny.tokenizer(), name="biased"))
    with pytest.raises(ValueError, match="of the stream's change unexplained .biases that differ"):
        edge_scores(other, CLEAN[:3], source, METRIC, progress=False)
