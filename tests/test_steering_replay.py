"""Passes that start in the middle of a model: the same numbers and gradients as whole ones."""

from typing import Any

import pytest
import tiny
import torch
from architectures import ARCHITECTURES, EXTRA, ORDINARY_TOKENS
from torch import Tensor

from probes import HookedModel
from probes.engines import Batch, Edit
from probes.engines.modes import frozen_weights
from probes.prompts import Rendered
from probes.sites import Site
from steering import replay as replays
from steering.head_parameters import HeadParameters
from steering.preferences import Preference, encode
from steering.replay import Pass, Replay
from steering.rows import Rows

FALLS_BACK = {"gemma4-text", "gemma4-conditional"}
"""Their upper blocks reuse keys and values of lower ones."""


def sequences(model: HookedModel, n: int = 5, seed: int = 0) -> list[Rendered]:
    """Prompts with two answers each, the pairs' second members behind all first ones."""
    prompts = tiny.words(n, seed)
    better, worse = tiny.words(n, seed + 1, 1, 5), tiny.words(n, seed + 2, 1, 5)
    worse[0] = better[0].split()[0] + " " + worse[0]  # answers that begin alike
    examples = [Preference(p, a, b) for p, a, b in zip(prompts, better, worse, strict=True)]
    chosen, rejected = encode(model.template, examples)
    assert rejected is not None
    return [*chosen, *rejected]


def plainly(model: HookedModel, rows: list[Rendered]) -> Tensor:
    """Summed log-probabilities by one whole pass a row, written without the code under test."""
    found = []
    for r in rows:
        ids = torch.tensor([r.ids])
        logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        steps = logits[:-1].log_softmax(-1)
        each = steps[torch.arange(len(r.ids) - 1), ids[0, 1:]]
        found.append(each[r.n_prompt - 1 :].sum())
    return torch.stack(found)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *EXTRA])
def test_replay_equals_whole_passes_and_gradients(name: str) -> None:
    model = tiny.hooked(name)
    given = sequences(model)
    upper = list(model.layout.supported("head_out"))
    for first in range(model.n_layers):
        trained = [layer for layer in upper if layer >= first]
        replay = Replay(model, given, first)
        whole = name in FALLS_BACK
        assert replay.first == (0 if whole else first)
        assert bool(replay.notes) == (whole and first > 0)
        assert (replay.cache_bytes > 0) == (replay.first > 0)
        if not trained:
            with torch.no_grad():
                torch.testing.assert_close(
                    replay.all_logprobs(), plainly(model, given), rtol=1e-5, atol=1e-4
                )
            continue
        v = HeadParameters(model, [(layer, 1) for layer in trained], 0.3, 42)
        with frozen_weights(model.model), v.acting(scale=False):
            mine, theirs = replay.logprobs(range(len(given))), plainly(model, given)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
            a = torch.autograd.grad(mine.sum(), v.parameters)
            b = torch.autograd.grad(theirs.sum(), v.parameters)
        for x, y in zip(a, b, strict=True):
            assert y.norm() > 0
            assert (x - y).norm() < 1e-4 * y.norm()


def test_a_replay_from_the_wrong_block_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.hooked("llama")
    given = sequences(model)
    enter = Pass.enter
    monkeypatch.setattr(Pass, "enter", lambda self, batch, layer: enter(self, batch, layer - 1))
    replay = Replay(model, given, 2)
    assert replay.first == 0
    assert "cannot be entered at block 2" in replay.notes[0]
    assert "relative error" in replay.notes[0]
    with torch.no_grad():
        torch.testing.assert_close(replay.all_logprobs(), plainly(model, given))


def test_rows_that_cannot_be_packed_are_padded_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.hooked("llama")
    given, logits = sequences(model), Pass.logits

    def wrong(self: Pass, batch: Batch, *a: Any, **k: Any) -> Tensor:
        return logits(self, batch, *a, **k) + 0.01 * (batch.visible is not None)

    assert Replay(model, given, 1).packed
    monkeypatch.setattr(Pass, "logits", wrong)
    replay = Replay(model, given, 1)
    assert (replay.first, replay.packed) == (1, False)
    assert "does not read several sequences in one row" in replay.notes[0]
    with torch.no_grad():
        torch.testing.assert_close(replay.all_logprobs(), plainly(model, given))


def test_wrong_logits_of_whole_passes_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.hooked("llama")
    logits = Pass.logits
    monkeypatch.setattr(Pass, "logits", lambda self, *a, **k: logits(self, *a, **k) + 0.01)
    with pytest.raises(RuntimeError, match="do not equal those of a plain forward pass"):
        Replay(model, sequences(model), 1)


def test_beyond_the_limit_nothing_is_kept() -> None:
    model = tiny.hooked("llama")
    given = sequences(model)
    size = sum(len(r.ids) for r in given) * model.d_model * 4
    assert Replay(model, given, 1, cache_limit=size).cache_bytes == size
    replay = Replay(model, given, 1, cache_limit=size - 1)
    assert replay.cache_bytes == 0
    assert replay.first == 0
    assert "are more than the limit" in replay.notes[0]


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.hooked("falcon")
    for p in list(model.model.parameters())[::2]:
        p.requires_grad_(False)
    before = [
        (dict(m.__dict__), dict(m._forward_hooks), dict(m._forward_pre_hooks))
        for m in model.model.modules()
    ]
    wanted = [p.requires_grad for p in model.model.parameters()]
    state = {name: t.clone() for name, t in model.model.state_dict().items()}
    replay = Replay(model, sequences(model), 2)
    with frozen_weights(model.model):
        assert not any(p.requires_grad for p in model.model.parameters())
        replay.logprobs([0, 1])
    after = [
        (dict(m.__dict__), dict(m._forward_hooks), dict(m._forward_pre_hooks))
        for m in model.model.modules()
    ]
    for (a, *hooks_a), (b, *hooks_b) in zip(before, after, strict=True):
        assert a.keys() == b.keys()
        assert hooks_a == hooks_b
    assert wanted == [p.requires_grad for p in model.model.parameters()]
    assert all(torch.equal(t, state[n]) for n, t in model.model.state_dict().items())
    # a pass that fails cleans up too
    monkeypatch.setattr(model.model.lm_head, "forward", None)
    with pytest.raises(TypeError):
        replay.logprobs([0])
    assert "forward" not in model.model.transformer.h[0].__dict__
    for p in model.model.parameters():
        p.requires_grad_(True)


def test_a_forward_put_on_a_block_before_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.hooked("llama")
    block = model.model.model.layers[0]
    own = block.forward
    monkeypatch.setattr(block, "forward", own)
    Replay(model, sequences(model), 2).logprobs([0])
    assert block.__dict__["forward"] is own


def test_edits_in_force_and_bad_blocks_are_refused() -> None:
    model = tiny.hooked("llama")
    given = sequences(model)
    with model.edit([Edit(Site(0, "resid_post"), lambda h, _: h)]):
        with pytest.raises(ValueError, match="edits are in force"):
            Replay(model, given, 1)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        Replay(model, given, 3)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_every_answer_once(pack: bool) -> None:
    model = tiny.hooked("llama")
    given = sequences(model, 9)
    rows = Rows.of(given, 0, pack)
    cells = rows.batch.ids.numel()
    assert cells < sum(len(r.ids) for r in given) or not pack
    for i, (r, (row, columns)) in enumerate(zip(given, rows.paths, strict=True)):
        assert tuple(rows.batch.ids[row, list(columns)].tolist()) == r.ids
        assert rows.target[rows.owner == i].tolist() == list(r.ids[r.n_prompt :])
        read = rows.place[rows.owner == i]
        assert rows.read[1][read].tolist() == list(columns[r.n_prompt - 1 : -1])
        assert set(rows.read[0][read].tolist()) == {row}
    values = [torch.randn(len(r.ids), 3, dtype=torch.float64) for r in given]
    if not pack:  # packed sequences share their beginnings, whose values must then agree
        for got, want in zip(rows.gather(rows.spread(values)), values, strict=True):
            assert torch.equal(got, want)


def test_rows_are_filled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.hooked("llama")
    monkeypatch.setattr("steering.rows.ROW", 48)
    given = sequences(model, 24)
    rows = Rows.of(given, 0, True)
    assert len(rows.batch.ids) > 2
    assert rows.batch.mask.float().mean() > 0.85
    families = {r.ids[: r.n_prompt] for r in given}
    together = [
        {rows.paths[i][0] for i, r in enumerate(given) if r.ids[: r.n_prompt] == f}
        for f in families
    ]
    assert all(len(one) == 1 for one in together)


def test_the_tail_is_the_models_own_norm_and_head() -> None:
    for name in ("gemma2", "granite", "gpt2", "cohere2"):  # soft caps, scales, learned positions
        model = tiny.hooked(name)
        ids = torch.tensor([[5, 9, 40, 8, 17]])
        site = Site(model.n_layers - 1, "resid_post")
        batch = replays.Batch(ids, torch.ones_like(ids))
        h = model.engine.read(batch, [site])[site][0]
        with torch.no_grad():
            got = Pass(model).tail(h)
        torch.testing.assert_close(got, model.engine.logits(batch)[0], rtol=1e-5, atol=1e-5)
        assert max(ORDINARY_TOKENS) < got.shape[1]


def test_half_precision_replays_too() -> None:
    from architectures import build

    model = HookedModel(build("llama").bfloat16(), tiny.tokenizer(), name="tiny bf16")
    given = sequences(model)
    replay = Replay(model, given, 1)
    assert replay.first == 1
    assert 0 < replay.error < 0.05
    assert replay.all_logprobs().dtype == torch.float32
