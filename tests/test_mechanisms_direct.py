"""Direct attribution: terms add up everywhere, a planted head is found, weights agree with runs."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
import tiny_tasks
import torch
from architectures import build

from analyses.mechanisms.direct import DirectAttribution, direct_attribution
from analyses.mechanisms.frozen import frozen_norm, linear_map
from analyses.mechanisms.writing import output_heads, value_heads, writing_directions
from probes import HookedModel
from probes.directions import Direction
from probes.engines import ENGINES, Batch
from probes.sites import Site, Unsupported

TASK = tiny_tasks.task()
FAST: dict[str, Any] = {"draws": 2, "resamples": 50}
KINDS = (
    "llama", "gpt2", "gemma2", "gemma4-text", "olmo2", "opt", "gpt-neox", "falcon", "cohere2",
    "granite", "phi3", "stablelm", "gpt-oss", "jamba", "mamba",
)  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_terms_add_up_to_the_models_own_logits(name: str) -> None:
    model = tiny.hooked(name)
    found = direct_attribution(model, TASK, **FAST)
    assert found.error < 1e-5
    logits = model.logits(TASK.prompts).double()
    cap = getattr(model.model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    torch.testing.assert_close(found.total, TASK.metric(logits).float(), rtol=1e-3, atol=1e-4)
    heads = model.layout.supported("head_out")
    split = found.heads.nansum(1) + found.bias
    for layer in heads:
        torch.testing.assert_close(split[layer], found.attention[layer], rtol=1e-3, atol=2e-5)
    assert bool(found.remainder.any()) == (name == "gemma4-text")
    biased = name in ("gpt2", "opt", "gpt-neox", "gpt-oss")
    assert bool(found.bias.nan_to_num(0).abs().max() > 1e-4) == biased
    if name == "mamba":
        assert found.heads.shape[1] == 0 and not found.mlp.any()
        assert set(found.strongest(3)["kind"]) <= {"attention", "MLP"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma4-text", "gpt-neox"])
@pytest.mark.parametrize("layer", [None, 1])
def test_the_terms_add_up_to_a_coordinate(name: str, layer: int | None) -> None:
    model = tiny.hooked(name)
    v = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    found = direct_attribution(model, TASK, v, layer=layer, position="before", **FAST)
    assert found.error < 1e-5 and not found.constant.any()
    assert len(found.attention) == (model.n_layers if layer is None else 2)
    i = 4
    r = TASK.rendered(model)[0][i]
    out: Any = model.model(torch.tensor([r.ids]), output_hidden_states=True)
    h = out.hidden_states[0 if layer is None else layer + 1][0, -2]
    value = float(h.detach() @ v)
    mine = float(found.total[i] if layer is not None else found.embedding[i])
    assert mine == pytest.approx(value, rel=1e-4, abs=1e-4)


def test_scale_and_centring_are_those_of_the_run() -> None:
    """A term taken out of the stream, with the norm's scale held, takes its number with it."""
    model = tiny.hooked("gpt2")
    found = direct_attribution(model, TASK, **FAST)
    plain: Any = model.model
    norm, W = plain.transformer.ln_f, plain.lm_head.weight.double()
    rows = TASK.rendered(model)[0]
    sites = [Site(2, "resid_post"), Site(1, "mlp_out")]
    for i in (0, 7):
        seen = model.engine.read(model.batch([rows[i]]), sites)
        h, term = (seen[site][0, -1].double() for site in sites)
        scale = (h.var(unbiased=False) + norm.eps).sqrt()
        said = [
            float(
                (W[TASK.answers[i]] - W[TASK.others[i]])
                @ ((state - state.mean()) / scale * norm.weight.double() + norm.bias.double())
            )
            for state in (h, h - term)
        ]
        assert said[0] - said[1] == pytest.approx(float(found.mlp[1, i]), abs=1e-4)


def test_norms_are_found_from_their_values() -> None:
    x = 3 * torch.randn(9, 16, generator=torch.Generator().manual_seed(0)) + 1
    layer, rms = torch.nn.LayerNorm(16), torch.nn.RMSNorm(16, eps=1e-5)
    with torch.no_grad():
        for norm in (layer, rms):
            norm.weight.normal_(generator=torch.Generator().manual_seed(1))
        layer.bias.normal_(generator=torch.Generator().manual_seed(2))
    for norm, centred in ((layer, True), (rms, False)):
        found = frozen_norm(norm, x)
        assert found.centred == centred
        torch.testing.assert_close(found.gain.float(), norm.weight.data, rtol=1e-4, atol=1e-5)
        v = torch.randn(9, 16, generator=torch.Generator().manual_seed(3)).double()
        bias = v @ found.bias if centred else 0
        torch.testing.assert_close(
            ((found.pulled(v) * x).sum(-1) + bias).float(), (v * norm(x)).sum(-1).float(),
            rtol=1e-3, atol=1e-4,
        )  # fmt: skip
    with pytest.raises(Unsupported, match="odd is a Linear, which is no gain times the state"):
        frozen_norm(torch.nn.Linear(16, 16), x, "odd")
    W, b = linear_map(torch.nn.Linear(16, 4), 16)
    assert W.shape == (16, 4) and b.shape == (4,)


def planted(answer: int, other: int) -> HookedModel:
    """A tiny Llama in which head 1.2 writes the answer wherever it is."""
    model = build("llama")
    hooked = HookedModel(model, tiny.tokenizer(), name="planted")
    rows = TASK.rendered(hooked)[0]
    site = Site(1, "head_out", 2)
    z = torch.stack([hooked.engine.read(hooked.batch([r]), [site])[site][0, -1] for r in rows])
    mean = z.mean(0)
    with torch.no_grad():
        W: Any = model.lm_head.weight
        gain: Any = model.model.norm.weight  # pyright: ignore[reportAttributeAccessIssue]
        toward = gain * (W[answer] - W[other])
        projection: Any = model.model.layers[1].self_attn.o_proj.weight  # pyright: ignore
        at = slice(2 * len(mean), 3 * len(mean))
        projection[:, at] += 20 * torch.outer(toward / toward.norm(), mean / mean.square().sum())
    return HookedModel(model, tiny.tokenizer(), name="planted")


def test_a_planted_head_is_found_and_only_for_what_it_writes() -> None:
    model = planted(33, 120)
    task = tiny_tasks.task(answer=33, other=120)
    found = direct_attribution(model, task, draws=40)
    best = found.strongest(1).iloc[0]
    assert (best["term"], best["claimed"], best["mean"] > 0) == ("head 1.2", True, True)
    second = found.strongest(2).iloc[1]
    assert best["mean"] > 5 * abs(second["mean"])
    elsewhere = direct_attribution(model, tiny_tasks.task(answer=50, other=101), draws=40)
    rows = elsewhere.frame().to_dict("records")
    assert [r["claimed"] for r in rows if r["term"] == "head 1.2"] == [False]
    # against the model without it, and by its weights
    pair = direct_attribution(model, task, other=tiny.hooked("llama"), resamples=200)
    assert pair.strongest(1).iloc[0]["term"] == "head 1.2"
    # the block before the change writes the same, and only the norm's scale is another
    ratio = found.mlp[0] / (found.mlp[0] - pair.mlp[0])
    torch.testing.assert_close(
        ratio, found.embedding / (found.embedding - pair.embedding), rtol=1e-3, atol=1e-3
    )
    plain: Any = model.model
    toward = plain.model.norm.weight * (plain.lm_head.weight[33] - plain.lm_head.weight[120])
    scan = writing_directions(model, toward.detach())
    assert "1.2" in scan.claimed() and "most of all 1.2" in str(scan)


def test_identical_checkpoints_have_nothing_to_attribute(tmp_path: Path) -> None:
    a, b = (HookedModel(build("gpt2"), tiny.tokenizer(), name=n) for n in "ab")
    pair = direct_attribution(a, TASK, other=b, **FAST)
    assert pair.identical and not pair.total.any() and not pair.heads.any()
    assert "exactly equal" in str(pair) and not pair.frame()["claimed"].any()
    same = tiny_tasks.Task(**{**vars(TASK), "counterfactuals": TASK.prompts})
    assert direct_attribution(a, same, contrast=True, **FAST).identical
    scan = writing_directions(a, torch.ones(a.d_model), other=b)
    assert not scan.write.any() and not scan.gain.any() and "exactly alike" in str(scan)
    assert DirectAttribution.load(pair.save(tmp_path)).total.equal(pair.total)


def test_differences_are_differences_of_single_numbers() -> None:
    models = [tiny_lineage.hooked(n, f, seed=f) for n, f in (("a", 1), ("b", 2))]
    one, two = (direct_attribution(m, TASK, **FAST) for m in models)
    pair = direct_attribution(models[0], TASK, other=models[1], **FAST)
    torch.testing.assert_close(pair.heads, one.heads - two.heads, rtol=1e-4, atol=1e-5)
    assert pair.error < 1e-5 and "a minus b" in pair.said
    turned = tiny_tasks.Task(
        **{**vars(TASK), "prompts": TASK.counterfactuals, "counterfactuals": TASK.prompts}
    )
    cause = direct_attribution(models[0], TASK, contrast=True, **FAST)
    back = direct_attribution(models[0], turned, contrast=True, **FAST)
    torch.testing.assert_close(cause.mlp, -back.mlp)
    both = direct_attribution(models[0], TASK, other=models[1], contrast=True, **FAST)
    its = direct_attribution(models[1], TASK, contrast=True, **FAST)
    torch.testing.assert_close(both.mlp, cause.mlp - its.mlp, rtol=1e-4, atol=1e-5)


def test_the_engines_agree() -> None:
    seen = []
    for engine in ENGINES:
        model = HookedModel(build("llama"), tiny.tokenizer(), engine=engine)
        seen.append(direct_attribution(model, TASK, **FAST))
    for other in seen[1:]:
        torch.testing.assert_close(seen[0].heads, other.heads, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(seen[0].mlp, other.mlp, rtol=1e-3, atol=1e-5)


# ---- weights ----------------------------------------------------------------------------------


def test_writes_and_gains_are_products_of_weights() -> None:
    model = tiny.hooked("llama")  # four heads, two groups of keys and values
    generator = torch.Generator().manual_seed(4)
    d, back = torch.randn(2, model.d_model, generator=generator).double()
    found = writing_directions(model, d.float(), back.float())
    d, back = d / d.norm(), back / back.norm()
    for layer, block in enumerate(model.model.model.layers):  # pyright: ignore
        O, V = (getattr(block.self_attn, n).weight.double() for n in ("o_proj", "v_proj"))  # noqa: E741
        for head in range(4):
            W = O[:, 16 * head : 16 * head + 16]
            own = V[16 * (head // 2) : 16 * (head // 2) + 16]
            assert float(found.write[layer, head]) == pytest.approx(float((W.T @ d).norm()), 1e-4)
            gain = float(d @ W @ own @ back)
            assert float(found.gain[layer, head]) == pytest.approx(gain, rel=1e-3, abs=1e-6)
    assert len(found.frame()) == 12 and found.plot(what="gain").get_xlabel() == "head"


@pytest.mark.parametrize("name", ["llama", "phi3", "falcon", "falcon-7b", "falcon-mha", "smollm3"])
def test_a_single_token_goes_through_the_heads_as_the_weights_say(name: str) -> None:
    """Alone it attends to itself, so attention is the sum of the heads' maps of what it reads."""
    model = tiny.hooked(name)
    d = torch.randn(model.d_model, generator=torch.Generator().manual_seed(2)).double()
    value, out = model.layout.point(Site(1, "v")), model.layout.point(Site(1, "head_out"))
    given: list[torch.Tensor] = []
    module = model.model.get_submodule(value.path)
    handle = module.register_forward_pre_hook(lambda _m, args: given.append(args[0].detach()))
    ids = torch.tensor([[17]])
    try:
        seen = model.engine.read(Batch(ids, torch.ones_like(ids)), [Site(1, "attn_out")])
    finally:
        handle.remove()
    V = value_heads(model, 1)
    assert V is not None and value.split is not None
    bias = value.split.read(linear_map(module, model.d_model)[1])
    v = torch.einsum("d,dhw->hw", given[0].reshape(-1, model.d_model)[0].double(), V)
    v = v + bias.repeat_interleave(len(v) // len(bias), 0)
    end = linear_map(model.model.get_submodule(out.path), v.numel())[1]
    total = float((output_heads(model, 1)(d[None])[0] * v).sum() + end @ d)
    written = float(seen[Site(1, "attn_out")][0, 0].double() @ d)
    assert total == pytest.approx(written, rel=1e-3, abs=1e-4)


def test_random_directions_are_claimed_as_often_as_chance_says() -> None:
    model = tiny.hooked("llama")
    hits = []
    for seed in range(40):
        d = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
        hits.append(len(writing_directions(model, d, draws=60, seed=1000 + seed).claimed()))
    assert 0.01 < sum(hits) / (12 * 40) < 0.12


def test_mistakes_are_sentences() -> None:
    model = tiny.hooked("llama")
    v = torch.ones(64)
    with pytest.raises(ValueError, match="answers are said at the last token; give a direction"):
        direct_attribution(model, TASK, position="before")
    with pytest.raises(ValueError, match="target='x', layer=None: give 'answers' without a layer"):
        direct_attribution(model, TASK, "x")
    with pytest.raises(ValueError, match=r"shape \(3,\).*vector of width 64 that is not 0"):
        direct_attribution(model, TASK, torch.ones(3))
    with pytest.raises(ValueError, match="0 draws are no null"):
        direct_attribution(model, TASK, v, draws=0)
    with pytest.raises(ValueError, match="5 random directions give no 95th percentile"):
        writing_directions(model, v, draws=5)
    with pytest.raises(ValueError, match="has no attention heads: there is nothing to scan"):
        writing_directions(tiny.hooked("mamba"), v)
    template = tiny.TEMPLATE.replace("helpful", "w3")
    other = HookedModel(build("llama"), tiny.tokenizer(template=template), name="b")
    with pytest.raises(ValueError, match="different templates"):
        direct_attribution(model, TASK, other=other)
    with pytest.raises(ValueError, match="use plot_layers"):
        direct_attribution(tiny.hooked("mamba"), TASK, **FAST).plot()
    unit = v / 8
    known = Direction(unit, 1.0, 1.0, 1.0, 0.0, 4, "difference_of_means", "1.resid_post")
    a, b = (direct_attribution(model, TASK, t, **FAST) for t in (known, unit))
    assert a.mlp.equal(b.mlp) and a.unit == "activation"
    made = direct_attribution(model, TASK, **FAST).figure()
    assert len(made.axes) == 3  # map, its scale, bars
