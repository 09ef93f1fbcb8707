"""Maps of patches: a planted circuit is found, positions pair off, mistakes are said."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from architectures import build
from torch import Tensor

from analyses.patching.grid import PatchMap, patch_map
from analyses.patching.metrics import (
    Divergence,
    LogitDifference,
    LogProbability,
    Probability,
    RefusalLogOdds,
    normalised,
    share_interval,
)
from analyses.patching.patch import patch
from analyses.patching.patcher import Patcher
from analyses.patching.sources import From, Mean, Resampled, Zero
from analyses.patching.spans import Spans, align
from probes import HookedModel
from probes.sites import Unsupported

CLEAN = [f"w{k} w{k + 1} w5 w6" for k in range(0, 48, 2)]
CORRUPT = [f"w{k} w{k + 70} w5 w6" for k in range(0, 48, 2)]
METRIC = RefusalLogOdds((20, 21, 22))


def one_head_circuit() -> HookedModel:
    """Two layers whose MLPs write nothing and whose heads write nothing but head 1.2, which looks
    at the second token of the prompt by its position and copies it to the logits."""
    model: Any = build("gpt2")
    model.config.n_layer = 2
    del model.transformer.h[2:]
    generator = torch.Generator().manual_seed(0)
    width, each, head = 64, 16, 2
    tokens = torch.randn(200, each, generator=generator)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        for block in model.transformer.h:
            block.ln_1.weight.fill_(1)
            block.ln_2.weight.fill_(1)
        model.transformer.ln_f.weight.fill_(1)
        # the token in the first 16 axes, "I am place 2" in axis 16, its copy goes to 32 ... 47
        model.transformer.wte.weight[:, :each] = tokens
        model.transformer.wpe.weight[2, 16] = 8.0
        attention = model.transformer.h[1].attn
        q, k, v = 0, width, 2 * width
        attention.c_attn.bias[q + head * each] = 8.0
        attention.c_attn.weight[16, k + head * each] = 8.0
        attention.c_attn.weight[:each, v + head * each : v + (head + 1) * each] = torch.eye(each)
        attention.c_proj.weight[head * each : (head + 1) * each, 32:48] = 3 * torch.eye(each)
        # the unembedding is tied to the embedding: read both places
        model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.clone())
        model.lm_head.weight[:, :each] = 0
        model.lm_head.weight[:, 32:48] = tokens
    return HookedModel(model, tiny.tokenizer(template=None), template="none")


def test_a_planted_head_is_found_and_no_other() -> None:
    model = one_head_circuit()
    clean = [f"w3 w4 w{n} w6 w7" for n in range(20, 44)]
    corrupt = [f"w3 w4 w{n + 50} w6 w7" for n in range(20, 44)]
    ids = [[model.tokenizer(t.split()[2])["input_ids"][0] for t in s] for s in (clean, corrupt)]
    metric = LogitDifference(tuple(ids[0]), tuple(ids[1]))
    found = patch_map(model, corrupt, From(prompts=tuple(clean)), metric, progress=False)
    planted = torch.zeros(2, 4)
    planted[1, 2] = 1
    assert torch.allclose(found.share, planted, atol=1e-5)
    assert found.change[planted == 0].eq(0).all()
    assert found.best() == ((1, "2"),)
    assert found.claimed.nonzero().tolist() == [[1, 2]]
    assert float(found.share_low[1, 2]) > 0.99
    # it reads place 2 and writes at the last: values and output only there
    at = patch_map(
        model, corrupt, From(prompts=tuple(clean)), metric, "positions", part="v", draws=0,
        columns=[f"tokens:{n}:{n + 1}" for n in range(5)], progress=False,
    )  # fmt: skip
    assert at.share[1].tolist() == pytest.approx([0, 0, 1, 0, 0], abs=1e-5)
    out = patch_map(
        model, corrupt, From(prompts=tuple(clean)), metric, "positions", part="head_out", draws=0,
        columns=[f"tokens:{n}:{n + 1}" for n in range(5)], progress=False,
    )  # fmt: skip
    assert out.share[1].tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-5)
    # the control: with the prompts shuffled against each other the head restores nothing
    wrong = [*clean[7:], *clean[:7]]
    answer = Probability(tuple(ids[0]))
    right = patch_map(model, corrupt, From(prompts=tuple(clean)), answer, draws=0, progress=False)
    shuffled = patch_map(
        model, corrupt, From(prompts=tuple(wrong)), answer, draws=0, progress=False
    )
    assert float(right.change[1, 2]) > 0.9
    assert abs(float(shuffled.change[1, 2])) < 0.05


def test_noising_and_denoising_mirror_each_other_in_the_circuit() -> None:
    model = one_head_circuit()
    clean = [f"w3 w4 w{n} w6 w7" for n in range(20, 44)]
    corrupt = [f"w3 w4 w{n + 50} w6 w7" for n in range(20, 44)]
    metric = LogProbability(tuple(model.tokenizer(f"w{n}")["input_ids"][0] for n in range(20, 44)))
    denoised = patch(
        model, corrupt, From(prompts=tuple(clean)), "1.head_out.2", metric, progress=False
    )
    noised = patch(
        model, clean, From(prompts=tuple(corrupt)), "1.head_out.2", metric, progress=False
    )
    assert float(denoised.change[0]) == pytest.approx(-float(noised.change[0]), rel=1e-4)
    assert denoised.claimed and noised.claimed
    assert float(denoised.change[0]) > 0 > float(noised.change[0])


def test_a_map_is_its_patches_one_by_one(tmp_path: Path) -> None:
    model, source = tiny_lineage.hooked("target"), tiny_lineage.hooked("source", 1, seed=2)
    found = patch_map(model, CLEAN, From(model=source), METRIC, draws=4, progress=False)
    assert found.change.shape == (3, 4) and found.change[0].eq(0).all()
    for layer, head in ((1, 3), (2, 0)):
        alone = patch(
            model, CLEAN, From(model=source), f"{layer}.head_out.{head}", METRIC, null=None,
            progress=False,
        )  # fmt: skip
        assert float(found.change[layer, head]) == pytest.approx(float(alone.change[0]), rel=1e-4)
        assert float(found.share_low[layer, head]) == pytest.approx(float(alone.share[1]), rel=1e-3)
    parts = patch_map(model, CLEAN, From(model=source), "kl", "parts", draws=0, progress=False)
    assert parts.columns == ("attn_out", "mlp_out") and parts.unit == "nats"
    again = PatchMap.load(found.save(tmp_path / "map"))
    assert again.frame().equals(found.frame()) and str(again) == str(found)
    ax = found.plot()
    assert "head" in ax.get_xlabel() and "layer" in ax.get_ylabel()
    assert "%" in ax.figure.axes[1].get_ylabel()


def test_prompts_of_other_lengths_serve_the_null_as_far_as_they_go() -> None:
    model, source = tiny_lineage.hooked("target"), tiny_lineage.hooked("source", 1, seed=2)
    prompts = ["w1 w2", "w3 w4 w5", "w6 w7 w8 w9", "w1 w2 w3 w4 w5 w6"]
    found = patch_map(
        model, prompts, From(model=source), "kl", "positions", part="resid_post",
        columns=["content", "last"], draws=6, progress=False,
    )  # fmt: skip
    assert len(found.null_change) == 6 and found.null_change.ne(0).all()
    drawn = Patcher(model, prompts, Resampled(From(model=source))).alignment
    for t, s, j in zip(drawn.target, drawn.source, drawn.partner, strict=True):
        assert len(t) == len(s) == min(len(t), len(model.template.render(prompts[j]).ids))
        # the template before and behind the request stands at both ends
        assert (t[0], s[0]) == (0, 0) and s[-1] == len(model.template.render(prompts[j]).ids) - 1


def test_a_stopped_map_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = tiny_lineage.hooked("target"), tiny_lineage.hooked("source", 1, seed=2)
    want = patch_map(model, CLEAN, From(model=source), METRIC, draws=0, progress=False)
    ran: list[int] = []
    run = Patcher._pass

    def counting(self: Patcher, cells: Any, first: int, held: Any) -> Any:
        ran.append(first)
        if len(ran) == 6:
            raise KeyboardInterrupt
        return run(self, cells, first, held)

    monkeypatch.setattr(Patcher, "_pass", counting)
    options: dict[str, Any] = {"draws": 0, "progress": False, "folder": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        patch_map(model, CLEAN, From(model=source), METRIC, **options)
    assert ran == [1, 1, 1, 1, 2, 2]
    ran.clear()
    found = patch_map(model, CLEAN, From(model=source), METRIC, **options)
    assert ran == [2, 2, 2, 2]
    assert found.frame().equals(want.frame())
    with pytest.raises(ValueError, match="holds the layers of another map"):
        patch_map(model, CLEAN[1:], From(model=source), METRIC, **options)


def test_spans_pair_prompts_of_different_length() -> None:
    model = tiny_lineage.hooked("one")
    target, source = ["w1 w2 w3 w9"], ["w4 w1 w2 w8 w7 w9"]
    rows = [model.template.render_all(p) for p in (target, source)]
    spans = Spans({"a": ["w1 w2"], "b": ["w9"]}, {"a": ["w1 w2"], "b": ["w9"]})
    found = align(*rows, spans)
    texts = [
        [model.tokenizer.decode(r[0].ids[k]) for k in picked[0]]
        for r, picked in zip(rows, (found.target, found.source), strict=True)
    ]
    assert texts == [["w1", "w2", "w9"]] * 2
    uneven = Spans({"a": ["w1 w2 w3"]}, {"a": ["w1 w2"]})
    with pytest.raises(ValueError, match="has 3 tokens in the target and 2 in the source"):
        align(*rows, uneven)
    last = align(*rows, Spans({"a": ["w1 w2 w3"]}, {"a": ["w1 w2"]}, last_token_only=True))
    assert len(last.target[0]) == 1
    with pytest.raises(
        ValueError, match=r"\(12 tokens long\) and 14 of its source prompt \(14 tokens long\)"
    ):
        align(*rows)
    result = patch(model, target, From(prompts=tuple(source)), "1.resid_post", METRIC,
                   positions=spans, null=None, progress=False)  # fmt: skip
    assert result.positions == "spans a, b" and result.notes[0].startswith("Only 1 topic")


def test_metrics_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, 30, generator=generator)
    p, q = (x.double().softmax(-1) for x in (logits, other))
    assert torch.allclose(Probability((3,) * 5)(logits), p[:, 3])
    assert torch.allclose(LogProbability((3,) * 5)(logits), p[:, 3].log())
    want = (logits[:, 3] - logits[:, 4]).double()
    assert torch.allclose(LogitDifference((3,) * 5, (4,) * 5)(logits), want)
    kl = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)
    assert torch.allclose(Divergence(logits)(other), kl)
    assert Divergence(logits)(logits).eq(0).all()
    odds = (p[:, 3] + p[:, 7]).log() - (1 - p[:, 3] - p[:, 7]).log()
    assert torch.allclose(RefusalLogOdds((3, 7))(logits), odds)


def test_shares_by_hand_and_without_a_gap() -> None:
    gap = torch.tensor([1.0, 2.0, 3.0, 4.0] * 10)
    change = torch.stack([0.5 * gap, torch.ones(40), torch.full((40,), torch.nan)])
    topics = [str(i // 2) for i in range(40)]
    found = share_interval(change, gap, topics, resamples=500, seed=0)
    assert found.value[:2].tolist() == pytest.approx([0.5, 0.4])
    assert float(found.low[0]) == pytest.approx(0.5) == pytest.approx(float(found.high[0]))
    assert float(found.low[1]) < 0.4 < float(found.high[1])
    assert all(t[2].isnan() for t in found)
    nothing = share_interval(change[:2], torch.zeros(40), topics, resamples=50, seed=0)
    assert all(t.isnan().all() for t in nothing)
    effect = normalised(
        torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0])
    )
    assert effect[0] == 2 and effect[1].isnan()


def infinite(logits: Tensor) -> Tensor:
    values = logits[:, 3].clone()
    values[2] = torch.nan
    return values


def test_mistakes_are_said() -> None:
    model = tiny_lineage.hooked("one")
    go: dict[str, Any] = {"progress": False}
    with pytest.raises(ValueError, match="is nan for prompt 2, .*leave that prompt out"):
        patch(model, CLEAN, Zero(), "1.mlp_out", infinite, **go)
    with pytest.raises(
        ValueError, match="gave shape .* for 24 prompts: return one number for each"
    ):
        patch(model, CLEAN, Zero(), "1.mlp_out", lambda logits: logits, **go)
    with pytest.raises(ValueError, match="has 4 heads of head_out, 0 to 3"):
        patch(model, CLEAN, Zero(), "1.head_out.4", METRIC, **go)
    with pytest.raises(Unsupported, match="can be read but not patched"):
        patch(model, CLEAN, Zero(), "1.pattern", METRIC, **go)
    with pytest.raises(ValueError, match="there is none for means, zeros"):
        patch(model, CLEAN, Zero(), "1.mlp_out", "kl", **go)
    with pytest.raises(ValueError, match="24 target prompts and 23 source prompts"):
        patch(model, CLEAN, From(prompts=tuple(CLEAN[1:])), "1.mlp_out", METRIC, **go)
    with pytest.raises(ValueError, match="picks token .* which has no value in the source"):
        Patcher(model, CLEAN, Zero(), "last").logits("1.mlp_out", "content")
    with pytest.raises(ValueError, match="takes a mean, and a patch needs a value for each token"):
        Patcher(model, CLEAN, Zero(), "mean:all")
    with pytest.raises(ValueError, match="all prompts have one topic"):
        Patcher(model, CLEAN, Resampled(From(), ("a",) * 24))
    with pytest.raises(ValueError, match="a mean by position needs prompts of one length"):
        Patcher(model, CLEAN, Mean(("w1 w2",), by_position=True))
    with pytest.raises(ValueError, match="the mean of no prompts"):
        Mean(())
    with pytest.raises(ValueError, match="answers for 1 prompts, the run has 24"):
        patch(model, CLEAN, Zero(), "1.mlp_out", Probability((3,)), **go)
    with pytest.raises(ValueError, match="the vocabulary has 200 rows"):
        patch(model, CLEAN, Zero(), "1.mlp_out", Probability((200,) * 24), **go)
    with pytest.raises(ValueError, match="choose 'sites', 'prompts' or None"):
        patch(model, CLEAN, Zero(), "1.mlp_out", METRIC, null="random", **go)
    with pytest.raises(ValueError, match="choose 'heads', 'parts' or 'positions'"):
        patch_map(model, CLEAN, Zero(), METRIC, "layers", **go)
    with pytest.raises(ValueError, match="part='mlp_out' has no heads"):
        patch_map(model, CLEAN, Zero(), METRIC, part="mlp_out", **go)
    with pytest.raises(ValueError, match="needs its columns"):
        patch_map(model, CLEAN, Zero(), METRIC, "positions", **go)


def test_models_that_cannot_be_patched_are_refused() -> None:
    llama = tiny_lineage.hooked("one")
    with pytest.raises(ValueError, match="has 4 layers of width 64, one 3 of width 64"):
        Patcher(
            llama, CLEAN, From(model=HookedModel(build("jamba"), tiny.tokenizer(), name="jamba"))
        )
    wide = HookedModel(build("llama-head-dim"), tiny.tokenizer(), name="wide")
    with pytest.raises(ValueError, match="wide has other heads or head widths than one"):
        Patcher(llama, CLEAN, From(model=wide))
    mamba = HookedModel(build("mamba"), tiny.tokenizer(), name="mamba")
    with pytest.raises(Unsupported, match="which has no attention heads"):
        patch_map(mamba, CLEAN, Zero(), METRIC, progress=False)
    found = patch_map(mamba, CLEAN, Zero(), METRIC, "parts", columns=["attn_out"], progress=False)
    assert found.change.ne(0).all()
    jamba = HookedModel(build("jamba"), tiny.tokenizer(), name="jamba")
    mixed = patch_map(jamba, CLEAN, Zero(), METRIC, progress=False)
    assert mixed.change.isnan().all(1).tolist() == [True, False, True, False]
    assert mixed.best()[0][0] in (1, 3) and "nan" not in str(mixed)
