"""Laws of attribution patching on tiny models: exact sums, exact zeros, and
agreement with finite differences, with plain hooks and with patches really made."""

from typing import Any

import pytest
import tiny
import tiny_copying
import tiny_lineage
import torch
from architectures import build
from torch import Tensor, nn

from analyses.mechanisms.agreement import Agreement, exact_changes
from analyses.mechanisms.attribution_patching import Attribution, attribute
from analyses.mechanisms.gradients import gradients
from analyses.patching import runs as runs_module
from analyses.patching.grid import patch_map
from analyses.patching.metrics import Divergence, LogitDifference, RefusalLogOdds
from analyses.patching.patcher import Patcher
from analyses.patching.sources import From, Mean, Zero
from probes import HookedModel
from probes.engines import Batch
from probes.sites import Site

CLEAN = [f"w{k} w{k + 1} w5 w6" + " w9" * (k % 3) for k in range(24)]
CORRUPT = [f"w{k} w{k + 70} w{k + 30} w6" + " w9" * (k % 3) for k in range(24)]
SOURCE = From(prompts=tuple(CORRUPT))
METRIC = RefusalLogOdds((20, 21, 22))
DIFFERENCE = LogitDifference((20,) * 24, (21,) * 24)
QUIET: dict[str, Any] = {"progress": False, "draws": 0, "resamples": 200}


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return tiny_lineage.hooked("one")


@pytest.fixture(scope="module")
def linear() -> HookedModel:
    """No norms, uniform attention, linear MLPs: logits are a linear function of the embeddings."""
    model = build("llama")
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        maps = [nn.Linear(64, 64, bias=False) for _ in range(3)]
    for block, mlp in zip(model.model.layers, maps, strict=True):
        nn.init.zeros_(block.self_attn.q_proj.weight)
        block.mlp = mlp
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
    model.model.norm = nn.Identity()
    return HookedModel(model.eval(), tiny.tokenizer(), name="linear")


@pytest.mark.parametrize("method", ["gradient", "activations", "inputs"])
def test_with_equal_source_and_target_everything_is_exactly_zero(
    llama: HookedModel, method: str
) -> None:
    itself = From(prompts=tuple(CLEAN))
    for source in (itself, From(model=tiny_lineage.hooked("two"))):
        found = attribute(llama, CLEAN, source, METRIC, method=method, steps=2, **QUIET)
        assert torch.equal(found.scores, torch.zeros(3, 4, 24))
        assert torch.equal(found.low, torch.zeros(3, 4))
        assert str(found).endswith("source and target are equal, every score is exactly 0")
    other = attribute(llama, CLEAN, SOURCE, METRIC, method=method, steps=2, **QUIET)
    assert bool((other.scores[:2] != 0).any(2).all())


@pytest.mark.parametrize("method", ["gradient", "activations", "inputs"])
def test_in_a_linear_model_scores_are_patches(
    linear: HookedModel, llama: HookedModel, method: str
) -> None:
    for kind in ("heads", "parts"):
        found = attribute(linear, CLEAN, SOURCE, DIFFERENCE, kind, method=method, steps=2, **QUIET)
        exact = exact_changes(linear, CLEAN, SOURCE, DIFFERENCE, kind, progress=False)
        assert error(found.scores, exact) < 1e-5
    found = attribute(llama, CLEAN, SOURCE, DIFFERENCE, method=method, steps=2, **QUIET)
    exact = exact_changes(llama, CLEAN, SOURCE, DIFFERENCE, progress=False)
    assert error(found.scores, exact) > 1e-3  # the control: where it is not linear


def test_integrated_gradients_add_up(llama: HookedModel) -> None:
    """The heads of a layer to what patching the layer does; the embeddings to the whole gap."""
    patcher = Patcher(llama, CLEAN, SOURCE, shorten=False)
    target, source = patcher.ends(METRIC)
    for layer in range(3):
        whole = METRIC(patcher.logits(f"{layer}.head_out")) - target
        errors = []
        for steps in (1, 4, 16):
            found = attribute(
                llama, CLEAN, SOURCE, METRIC, method="activations", steps=steps, layers=[layer],
                **QUIET,
            )  # fmt: skip
            errors.append(error(found.scores[0].sum(0), whole))
        assert errors[0] > errors[1] > errors[2] and errors[2] < 2e-3
        gradient = attribute(llama, CLEAN, SOURCE, METRIC, layers=[layer], **QUIET)
        assert error(gradient.scores[0].sum(0), whole) > 5 * errors[2]
    errors = []
    for steps in (2, 8, 32):
        found = attribute(
            llama, CLEAN, SOURCE, METRIC, "parts", columns=["resid_pre"], layers=[0],
            method="inputs", steps=steps, **QUIET,
        )  # fmt: skip
        errors.append(error(found.scores[0, 0], source - target))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox", "gemma2", "qwen3"])
def test_gradients_are_finite_differences(architecture: str) -> None:
    """Prompts of three lengths run padded together here, and one by one for the differences."""
    model = HookedModel(build(architecture), tiny.tokenizer())
    sites = ["1.resid_pre", "0.mlp_out", "1.head_out", "1.q", "2.v", "1.attn_out"]
    if architecture != "gpt-neox":
        sites.append("1.resid_mid")
    found = gradients(model, CLEAN[:5], sites, METRIC)
    generator = torch.Generator().manual_seed(0)
    for site, rows in found.items():
        slopes, differences = [], []
        for i in range(5):
            ids = torch.tensor([model.template.render(CLEAN[i]).ids])
            direction = torch.randn(ids.shape[1], *rows[i].shape[1:], generator=generator)
            direction += rows[i] / rows[i].norm() * direction.norm()  # something to measure
            step = 2e-3 * direction
            ends = []
            for sign in (1, -1):
                with model.edit({str(site): lambda h, w, move=sign * step: h + move}):
                    logits = model.engine.logits(Batch(ids, torch.ones_like(ids)), 1)[:, -1]
                ends.append(float(METRIC(logits)))
            slopes.append(float((rows[i] * step).sum()))
            differences.append((ends[0] - ends[1]) / 2)
        assert error(torch.tensor(slopes), torch.tensor(differences)) < 0.02
    one = gradients(model, CLEAN[:5], "1.head_out.2", METRIC)[Site(1, "head_out", 2)]
    assert torch.equal(one[3], found[Site(1, "head_out")][3][:, 2])


def test_agreement_with_plain_hooks_one_by_one(
    llama: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same scores from autograd on the modules' own inputs, without batches or padding."""
    monkeypatch.setattr(runs_module, "PADDING", 1.0)  # lengths mix in a batch
    found = attribute(llama, CLEAN, SOURCE, METRIC, batch_size=5, **QUIET)
    assert len({len(r.ids) for r in llama.template.render_all(CLEAN)}) == 3
    plain: Any = llama.model
    for i in range(0, 24, 2):
        runs = []
        for text in (CLEAN[i], CORRUPT[i]):
            seen: list[Tensor] = []

            def keep(_module: nn.Module, args: tuple, seen: list[Tensor] = seen) -> None:
                seen.append(args[0])
                args[0].retain_grad()

            hooks = [b.self_attn.o_proj.register_forward_pre_hook(keep) for b in plain.model.layers]
            METRIC(plain(torch.tensor([llama.template.render(text).ids])).logits[:, -1]).backward()
            for hook in hooks:
                hook.remove()
            runs.append(seen)
        plain.zero_grad(set_to_none=True)
        for layer, (own, given) in enumerate(zip(*runs, strict=True)):
            score = ((given - own).detach() * own.grad)[0].reshape(-1, 4, 16).sum((0, 2))
            assert torch.allclose(found.scores[layer, :, i], score, rtol=1e-3, atol=1e-5)


def test_the_planted_head_is_found_and_no_other() -> None:
    model = HookedModel(tiny_copying.copying(), tiny.tokenizer())
    words = [
        (i % 12, (5 * i + 1) % 12 if (5 * i + 1 - i) % 12 else (i + 2) % 12) for i in range(24)
    ]
    base, other = (
        [f"w60 {tiny_copying.word(pair[k])} w6{i % 9} w2" for i, pair in enumerate(words)]
        for k in (0, 1)
    )
    ids = [tuple(tiny_copying.WORDS[pair[k]] for pair in words) for k in (0, 1)]
    metric = LogitDifference(ids[1], ids[0])
    source = From(prompts=tuple(other))
    exact = exact_changes(model, base, source, metric, progress=False)
    for method in ("gradient", "activations", "inputs"):
        found = attribute(model, base, source, metric, method=method, progress=False, draws=8)
        assert found.best() == ((1, "2"),)
        rest = found.score.abs().flatten().sort(descending=True).values[1]
        assert float(found.score[1, 2]) > 20 * float(rest)
        assert bool(found.claimed[1, 2]) and "layer 1, 2" in str(found)
        assert torch.allclose(found.score, exact.mean(-1), rtol=0.3, atol=0.2)


def test_agreement_is_that_of_scipy(llama: HookedModel, tmp_path) -> None:
    from scipy.stats import pearsonr, spearmanr

    found = attribute(llama, CLEAN, SOURCE, METRIC, **QUIET)
    exact = exact_changes(llama, CLEAN, SOURCE, METRIC, progress=False)
    result = found.agreement(exact, k=3, resamples=100)
    a, b = found.scores.double().mean(-1).flatten(), exact.double().mean(-1).flatten()
    told = (a != 0) | (b != 0)
    a, b = a[told].numpy(), b[told].numpy()
    assert float(result.pearson[0]) == pytest.approx(pearsonr(a, b)[0], abs=1e-6)
    assert float(result.spearman[0]) == pytest.approx(spearmanr(a, b)[0], abs=1e-6)
    top = set(abs(a).argsort()[-3:]) & set(abs(b).argsort()[-3:])
    assert float(result.recall[0]) == pytest.approx(len(top) / 3)
    assert bool(
        (result.spearman[1] <= result.spearman[0]) & (result.spearman[0] <= result.spearman[2])
    )
    assert result.jointly and "rank correlation" in str(result)
    assert str(Agreement.load(result.save(tmp_path / "agreement"))) == str(result)
    assert "exact change" in result.plot().get_xlabel() and len(result.frame()) == len(a)
    made = patch_map(llama, CLEAN, SOURCE, METRIC, progress=False, draws=0, resamples=100)
    assert torch.allclose(made.change, exact.mean(-1), atol=1e-5)
    by_map = found.agreement(made, k=3, resamples=100)
    assert float(by_map.pearson[0]) == pytest.approx(float(result.pearson[0]), abs=1e-4)
    assert not by_map.jointly
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(12, generator=generator)
    wrong = exact.flatten(0, 1)[order].reshape(exact.shape)
    with pytest.warns(
        UserWarning, match=r"rank correlation -?0.\d+, below 0.8: rank sites by exact"
    ):
        bad = found.agreement(wrong, resamples=100)
    assert str(bad).endswith("do not rely on it") and not bad.reliable
    with pytest.raises(ValueError, match=r"shape \(3, 4, 5\) for scores of shape \(3, 4, 24\)"):
        found.agreement(exact[..., :5])
    parts = patch_map(llama, CLEAN, SOURCE, METRIC, "parts", progress=False, draws=0, resamples=50)
    with pytest.raises(ValueError, match="have columns"):
        found.agreement(parts)


def test_intervals_nulls_and_forms(llama: HookedModel, tmp_path) -> None:
    topics = [f"topic {i // 2}" for i in range(24)]
    found = attribute(llama, CLEAN, SOURCE, METRIC, topics=topics, progress=False, resamples=200)
    assert len(found.null_score) == 20 and len(set(found.null_score.tolist())) > 10
    assert found.notes == ("Only 12 topics: intervals over so few are too narrow; 20 are needed.",)
    assert bool((found.low <= found.score).all() & (found.score <= found.high).all())
    again = Attribution.load(found.save(tmp_path / "attribution"))
    assert str(again) == str(found) and again.frame().equals(found.frame())
    assert "head of head_out" in found.plot().get_xlabel()
    # a null that runs the path again, and sources without a run
    path = attribute(
        llama, CLEAN, SOURCE, METRIC, method="activations", steps=2, draws=3, progress=False
    )
    assert len(path.null_score) == 3
    for source in (Zero(), Mean(tuple(CLEAN))):
        none = attribute(llama, CLEAN, source, METRIC, progress=False)
        assert not len(none.null_score) and "No null was drawn" in none.notes[-1]
        exact = exact_changes(llama, CLEAN, source, METRIC, progress=False)
        assert bool((none.scores * exact).mean() > 0)
    same = attribute(
        llama, CLEAN, From(model=tiny_lineage.hooked("source", 1, seed=1)), METRIC,
        method="inputs", steps=2, **QUIET,
    )  # fmt: skip
    assert "equal embeddings" in same.notes[-1]


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model = tiny_lineage.hooked("own")
    frozen = next(model.model.parameters())
    frozen.requires_grad_(False)

    def state() -> tuple:
        modules = list(model.model.modules())
        return (
            [p.requires_grad for p in model.model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
            [m.training for m in modules],
            [p.grad is None for p in model.model.parameters()],
            torch.is_grad_enabled(),
        )

    before, logits = state(), model.logits(CLEAN[:3])
    attribute(model, CLEAN[:4], From(prompts=tuple(CORRUPT[:4])), METRIC, **QUIET)
    assert state() == before
    calls = []

    def broken(logits: Tensor) -> Tensor:
        calls.append(1)
        return logits[:, 3].double() * (torch.nan if len(calls) > 2 else 1.0)

    with pytest.raises(ValueError, match="the metric 'broken' is nan for prompt 0"):
        attribute(model, CLEAN[:4], From(prompts=tuple(CORRUPT[:4])), broken, **QUIET)
    assert state() == before and torch.equal(model.logits(CLEAN[:3]), logits)
    assert not model.engine.edited


def test_what_is_refused(llama: HookedModel) -> None:
    for engine in ("transformer_lens", "nnsight"):
        other = HookedModel(build("llama"), tiny.tokenizer(), engine=engine, name="other")
        with pytest.raises(ValueError, match=f"plain engine and other uses {engine}"):
            attribute(other, CLEAN, SOURCE, METRIC, **QUIET)
    with pytest.raises(ValueError, match="method='exact': choose 'gradient', 'activations'"):
        attribute(llama, CLEAN, SOURCE, METRIC, method="exact", **QUIET)
    with pytest.raises(ValueError, match="kind='positions': choose 'heads' or 'parts'"):
        attribute(llama, CLEAN, SOURCE, METRIC, "positions", **QUIET)
    with pytest.raises(ValueError, match="part='mlp_out' has no heads"):
        attribute(llama, CLEAN, SOURCE, METRIC, part="mlp_out", **QUIET)
    with pytest.raises(ValueError, match="0 integration steps"):
        attribute(llama, CLEAN, SOURCE, METRIC, method="inputs", steps=0, **QUIET)
    with pytest.raises(ValueError, match="picks 10 tokens of target prompt 0"):
        attribute(llama, ["w1 w2", *CLEAN[1:]], SOURCE, METRIC, **QUIET)
    with pytest.raises(ValueError, match="cannot be differentiated: compute it from"):
        attribute(llama, CLEAN, SOURCE, lambda x: x[:, 0].detach(), **QUIET)
    with pytest.raises(ValueError, match="1.pattern can be read but has no gradient"):
        gradients(llama, CLEAN, "1.pattern", METRIC)
    llama.model.train()
    try:
        with pytest.raises(ValueError, match="one is in training mode"):
            gradients(llama, CLEAN, "1.q", METRIC)
    finally:
        llama.model.eval()
    kl = attribute(llama, CLEAN, SOURCE, "kl", **QUIET)  # a metric that holds logits of all prompts
    assert kl.metric == Divergence(torch.zeros(1, 1)).name and bool((kl.score < 0).any())
