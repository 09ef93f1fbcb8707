"""The logit lens: the last layer is the model, every layer is a plain loop, pairs are paired."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
import tiny_tasks
import torch
from architectures import build
from safetensors.torch import save_file

from analyses.commands import lens as command
from analyses.mechanisms.head_patterns import HeadPatterns, head_patterns, summarised
from analyses.mechanisms.lens_difference import LensDifference, lens_difference
from analyses.mechanisms.logit_lens import MEASURES, LogitLens, logit_lens
from probes import HookedModel
from probes.engines import ENGINES
from probes.sites import Site
from probes.unembed import unembedding

TASK = tiny_tasks.task()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "cohere2", "granite"])
def test_the_last_layer_says_what_the_model_says(name: str) -> None:
    model = tiny.hooked(name)
    found = logit_lens(model, TASK, resamples=50)
    logits = model.logits(TASK.prompts).double()
    answers = torch.tensor(TASK.answers)[:, None]
    p = logits.softmax(-1).gather(1, answers)[:, 0]
    torch.testing.assert_close(found.values[0, -1], p.float(), rtol=1e-4, atol=1e-7)
    difference = TASK.metric(logits).float()
    for row in ("logit difference", "metric"):
        values = found.values[MEASURES.index(row), -1]
        torch.testing.assert_close(values, difference, rtol=1e-4, atol=1e-5)
    assert not found.values[3, -1].any() and bool((found.values[3, 0] > 0).all())


@pytest.mark.parametrize("position", ["last", "before"])
def test_every_layer_is_a_plain_loop_over_prompts(position: str) -> None:
    model = tiny.hooked("llama")
    plain: Any = model.model
    found = logit_lens(model, TASK, position=position, resamples=50)
    for i, r in enumerate(TASK.rendered(model)[0][:6]):
        at = len(r.ids) - (1 if position == "last" else 2)
        out = plain(torch.tensor([r.ids]), output_hidden_states=True)
        last = out.logits[0, at].detach().double().log_softmax(-1)
        for layer in range(model.n_layers - 1):
            h = out.hidden_states[layer + 1][0, at].detach().double()
            rms = (h.square().mean() + plain.config.rms_norm_eps).sqrt()
            logits = plain.lm_head.weight.detach().double() @ (
                plain.model.norm.weight.detach().double() * h / rms
            )
            log_p = logits.log_softmax(-1)
            a, b = TASK.answers[i], TASK.others[i]
            rank = sum(float(x) > float(logits[a]) for x in logits) + 1
            want = torch.stack([
                log_p[a].exp(),
                torch.tensor(float(rank)).double().log10(),
                logits[a] - logits[b],
                (last.exp() * (last - log_p)).sum(),
                logits[a] - logits[b],
            ])  # fmt: skip
            torch.testing.assert_close(
                found.values[:, layer, i], want.float(), rtol=1e-3, atol=1e-5
            )


def test_the_engines_agree() -> None:
    seen = []
    for engine in ENGINES:
        model = HookedModel(build("llama"), tiny.tokenizer(), engine=engine)
        seen.append(logit_lens(model, TASK, resamples=50).values)
    for other in seen[1:]:
        torch.testing.assert_close(seen[0], other, rtol=1e-3, atol=1e-5)


def test_translators_come_before_the_norm(tmp_path: Path) -> None:
    model = tiny.hooked("llama")
    d, plain = model.d_model, logit_lens(model, TASK, resamples=50)
    eye = (torch.eye(d), torch.zeros(d))
    same = logit_lens(model, TASK, translators=dict.fromkeys(range(3), eye), resamples=50)
    assert same.tuned and not plain.tuned
    torch.testing.assert_close(same.values, plain.values, rtol=1e-4, atol=1e-6)
    # a constant map makes every prompt say one thing; the final distribution stays the model's
    A, b = torch.zeros(d, d), torch.randn(d, generator=torch.Generator().manual_seed(0))
    save_file({"1.weight": A, "1.bias": b}, tmp_path / "lens.safetensors")
    one = logit_lens(model, TASK, translators=tmp_path / "lens.safetensors", resamples=50)
    assert one.values[2, 0].equal(plain.values[2, 0]) and one.values[2, 2].equal(plain.values[2, 2])
    torch.testing.assert_close(one.mean[0, 1], one.counterfactual[0, 1])
    # not symmetric: A h, not h A
    A = torch.randn(d, d, generator=torch.Generator().manual_seed(1))
    turned = [logit_lens(model, TASK, translators={0: (M, b)}, resamples=50) for M in (A, A.T)]
    assert not torch.allclose(turned[0].values[2, 0], turned[1].values[2, 0], atol=0.1)
    site, r = Site(0, "resid_post"), TASK.rendered(model)[0][0]
    h = model.engine.read(model.batch([r]), [site])[site][0, -1]
    logits = unembedding(model)((A @ h + b)[None])[0]
    mine = float(logits[TASK.answers[0]] - logits[TASK.others[0]])
    assert float(turned[0].values[2, 0, 0]) == pytest.approx(mine, rel=1e-3, abs=1e-4)


def test_a_lens_shows_where_the_cause_gets_in() -> None:
    model = tiny.hooked("llama")
    found = logit_lens(model, TASK, resamples=200)
    d = found.effect - (found.mean - found.counterfactual)
    assert d[..., 0].abs().max() < 1e-5
    same = tiny_tasks.Task(**{**vars(TASK), "counterfactuals": TASK.prompts})
    nothing = logit_lens(model, same, resamples=50)
    assert not nothing.effect.any() and nothing.first() is None
    assert "exactly alike" in str(nothing) and len(nothing.top) == 3
    assert list(nothing.frame()["layer"]) == [0, 1, 2]


def test_identical_checkpoints_differ_by_exactly_nothing(tmp_path: Path) -> None:
    a, b = (HookedModel(build("llama"), tiny.tokenizer(), name=n) for n in "ab")
    pair = lens_difference(*(logit_lens(m, TASK, resamples=50) for m in (a, b)), resamples=50)
    assert pair.identical and not pair.difference.any() and not pair.null.any()
    assert "exactly the same" in str(pair) and pair.claimed() == ()
    assert LensDifference.load(pair.save(tmp_path)).difference.equal(pair.difference)


def test_a_change_is_seen_from_its_layer_on() -> None:
    model, other = tiny_lineage.hooked("a"), tiny_lineage.hooked("b", 2)
    with torch.no_grad():  # the last block now writes for every answer
        head: Any = other.model.lm_head  # pyright: ignore[reportAttributeAccessIssue]
        toward = head.weight[list(TASK.answers)].mean(0) - head.weight[list(TASK.others)].mean(0)
        mlp: Any = other.model.model.layers[2].mlp.down_proj  # pyright: ignore
        mlp.bias = torch.nn.Parameter(20 * toward / toward.norm())
    pair = lens_difference(*(logit_lens(m, TASK) for m in (other, model)))
    own = [row for row, name in enumerate(MEASURES) if name != "divergence"]  # that looks ahead
    assert not pair.difference[own][:, :2].any() and pair.claimed("logit difference") == (2,)
    assert pair.difference[2, 2, 0] > 0 and "the first 2" in str(pair)
    back = lens_difference(*(logit_lens(m, TASK) for m in (model, other)))
    assert back.difference[..., 0].equal(-pair.difference[..., 0])
    for ax in (pair.plot(), logit_lens(model, TASK, resamples=50).plot(measure="probability")):
        assert ax.get_xlabel() == "layer (0 is the first block)" and ax.get_legend() is not None


def test_the_mistakes_of_a_lens(tmp_path: Path) -> None:
    model = tiny.hooked("llama")
    with pytest.raises(ValueError, match=r"position 'x': task 'words' has 'last', 'before'"):
        logit_lens(model, TASK, position="x")
    with pytest.raises(ValueError, match=r"layer 1 has shapes \(2, 2\) and \(2,\).* needs \(64"):
        logit_lens(model, TASK, translators={1: (torch.eye(2), torch.zeros(2))})
    bias = torch.zeros(64).index_fill(0, torch.tensor([3]), torch.nan)
    with pytest.raises(ValueError, match="1 values that are NaN"):
        logit_lens(model, TASK, translators={1: (torch.eye(64), bias)})
    save_file({"one": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"holds no translators: it needs tensors named '3.weig"):
        logit_lens(model, TASK, translators=tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        logit_lens(model, TASK, translators=tmp_path / "none.safetensors")
    found = logit_lens(model, TASK, resamples=50)
    with pytest.raises(ValueError, match="choose one of probability, log rank"):
        found.plot(measure="x")
    fewer = logit_lens(model, TASK.only(range(8)), resamples=50)
    assert fewer.notes == ("only 8 topics: intervals over fewer than 20 are too narrow",)
    with pytest.raises(ValueError, match="read different prompts, places or layers"):
        lens_difference(found, fewer)


# ---- patterns ---------------------------------------------------------------------------------


def test_summaries_of_patterns_known_by_hand() -> None:
    n = 5
    even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    back = torch.diag(torch.ones(n - 1), -1)
    pattern = torch.stack([even, back, torch.eye(n)], 1)
    found = summarised(pattern, [4], [[2, 3]])
    one = torch.tensor([
        [0.2, 0.0, 1.0], [0.2, 1.0, 0.0], [0.2, 0.0, 0.0], [1.0, 0.0, 0.0], [0.4, 1.0, 0.0]
    ])  # fmt: skip
    torch.testing.assert_close(found.float(), one)
    # over all tokens only those behind the place look at it
    torch.testing.assert_close(summarised(back[:, None], [1, 2, 3, 4], [[3]])[4, 0].item(), 1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_patterns_are_those_the_model_reports(engine: str) -> None:
    model = HookedModel(build("llama"), tiny.tokenizer(), engine=engine)
    plain = build("llama")
    plain.set_attn_implementation("eager")
    found = head_patterns(model, TASK, resamples=50)
    assert found.measures == ("self", "previous", "first", "entropy", "to before")
    total = torch.zeros(5, 3, 4, dtype=torch.float64)
    for r in TASK.rendered(model)[0]:
        out = plain(torch.tensor([r.ids]), output_attentions=True)
        for layer, weights in enumerate(out.attentions):
            p = weights[0, :, -1].double()  # head, key
            entropy = -(p * p.log()).sum(-1) / torch.tensor(float(len(r.ids))).double().log()
            total[:, layer] += torch.stack([p[:, -1], p[:, -2], p[:, 0], entropy, p[:, -2]])
    torch.testing.assert_close(
        found.values[..., 0], (total / len(TASK)).float(), rtol=1e-3, atol=1e-5
    )
    assert found.values[0, 0, 0, 1] < found.values[0, 0, 0, 0] < found.values[0, 0, 0, 2]


def test_patterns_have_a_table_a_figure_and_advice(monkeypatch, tmp_path: Path) -> None:
    model = HookedModel(build("llama"), tiny.tokenizer(), name="a")
    found = head_patterns(model, TASK, query="all", resamples=50)
    assert len(found.frame()) == 12 and len(found.strongest("first", 3)) == 3
    assert "from all: most to self" in str(found) and found.uniform[3] == 1
    assert found.plot(measure="to before").get_xlabel() == "head"
    assert HeadPatterns.load(found.save(tmp_path)).values.equal(found.values)
    with pytest.raises(ValueError, match="measure 'x': choose one of self, previous"):
        found.plot(measure="x")

    def nothing(*_: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'transpose'")

    monkeypatch.setattr(model.engine, "read", nothing)
    with pytest.raises(ValueError, match="gave no patterns .*attn_implementation='eager'"):
        head_patterns(model, TASK)


# ---- the command ------------------------------------------------------------------------------


def test_the_command_writes_tables_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from analyses.mechanisms import tasks

    monkeypatch.setitem(tasks.TASKS, "words", lambda model, part, n: TASK.only(range(n)))
    monkeypatch.chdir(tmp_path)
    firsts = {"a": 1, "b": 2}
    monkeypatch.setattr(
        HookedModel, "load", lambda name, **_: tiny_lineage.hooked(name, firsts[name])
    )
    monkeypatch.setattr("probes.names.parse", lambda name: name)
    command.lens("a", "b", task="words", prompts=20, resamples=50, out=tmp_path / "out")
    said = capsys.readouterr().out
    assert "a minus b, words" in said and "lens: " in said
    for name in (
        "model/lens/lens.png", "model/lens/rank.svg", "model/terms/terms.png", "model/lens/table.csv",
        "other/accuracy/accuracy.png", "difference/lens/lens.png", "difference/terms/terms.svg",
        "difference/terms/table.csv",
    ):  # fmt: skip
        assert (tmp_path / "out" / name).stat().st_size > 0, name
    assert LogitLens.load(tmp_path / "out" / "model" / "lens").model == "a"
    with pytest.raises(ValueError, match="unknown task 'x': choose one of refusal, boxes"):
        command.lens("a", task="x")
