"""The reference engine: edits do what they say and nothing else, padding changes nothing."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES, EOS, EXTRA, ORDINARY_TOKENS, PAD, build
from torch import Tensor

from probes.engines import Batch, Edit, Where
from probes.engines.hooks import HookEngine
from probes.engines.modes import eager_attention
from probes.layout import resolve
from probes.sites import READ_ONLY, Site, Unsupported

EVERY = [*ARCHITECTURES, *EXTRA]
every_architecture = pytest.mark.parametrize("name", EVERY)
LENGTHS = (3, 9, 6)


@cache
def engine(name: str) -> HookEngine:
    model = build(name)
    return HookEngine(model, resolve(model))


@cache
def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    low, high = ORDINARY_TOKENS[0], ORDINARY_TOKENS[-1]
    return [torch.randint(low, high, (n,), generator=generator).tolist() for n in LENGTHS]


def padded(side: str, given: list[list[int]] | None = None) -> Batch:
    given = given or rows()
    longest = max(map(len, given))
    ids = torch.full((len(given), longest), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(given):
        real = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, real] = torch.tensor(row)
        mask[i, real] = 1
    return Batch(ids, mask)


def hooks(run: HookEngine) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in run.model.modules()]


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).double().norm() / b.double().norm()).item()


def stream(run: HookEngine, layer: int = 1) -> Site:
    return Site(layer, "resid_post")


def push(size: float) -> Callable[[Tensor, Where], Tensor]:
    # alternating signs: a constant would be removed by a norm with a mean
    return lambda h, _: h + size * torch.linspace(-1, 1, h.shape[-1]).cos().neg().pow(3).to(h)


# ---- edits ------------------------------------------------------------------------------------


@every_architecture
def test_edits_that_cancel(name: str) -> None:
    run, batch = engine(name), padded("left")
    real = batch.mask.bool()
    plain = run.logits(batch)[real]
    with run.edit([]):
        assert torch.equal(run.logits(batch)[real], plain)  # no edit, no hook: to the bit
    with run.edit([Edit(stream(run), lambda h, _: h)]):
        assert torch.equal(run.logits(batch)[real], plain)
    with run.edit([Edit(stream(run), push(3.0))]):
        pushed = run.logits(batch)[real]
        with run.edit([Edit(stream(run), push(-3.0))]):
            assert error(run.logits(batch)[real], plain) < 1e-4
    assert error(pushed, plain) > 1e-2
    assert torch.equal(run.logits(batch)[real], plain)


@every_architecture
def test_a_read_sees_the_edits_before_it_and_none_behind(name: str) -> None:
    run, batch = engine(name), padded("right")
    real = batch.mask.bool()
    sites = [Site(layer, "resid_post") for layer in range(3)]
    before = run.read(batch, sites)
    with run.edit([Edit(sites[1], push(2.0))]):
        after = run.read(batch, sites)
    assert torch.equal(after[sites[0]][real], before[sites[0]][real])
    assert torch.equal(after[sites[1]][real], push(2.0)(before[sites[1]], None)[real])
    assert error(after[sites[2]][real], before[sites[2]][real]) > 1e-3


@every_architecture
def test_every_part_that_can_be_edited_moves_the_logits(name: str) -> None:
    run, batch = engine(name), padded("left")
    real = batch.mask.bool()
    plain = run.logits(batch)[real]
    for part, point in run.layout.blocks[-1].points.items():
        site = Site(run.layout.n_layers - 1, part)
        with run.edit([Edit(site, lambda h, _: -2 * h + 0.5)]):
            moved = run.logits(batch)[real]
        assert error(moved, plain) > 1e-4, point
    before = hooks(run)
    for part in READ_ONLY - run.layout.blocks[-1].refused.keys():
        site = Site(run.layout.n_layers - 1, part)
        with (
            pytest.raises(Unsupported, match="can be read but not edited"),
            run.edit([Edit(site, lambda h, _: h)]),
        ):
            pass
    assert hooks(run) == before


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("mamba",)])
def test_editing_the_middle_of_a_block_equals_doing_it_by_hand(name: str) -> None:
    """Middle' in place of middle: the MLP reads it and the stream keeps it."""
    run, batch = engine(name), padded("right", [rows()[1]])
    layers = run.layout.supported("resid_mid")
    if not layers:
        with pytest.raises(Unsupported), run.edit([Edit(Site(0, "resid_mid"), push(1.0))]):
            pass
        return
    if not run.layout.blocks[layers[0]].sums:
        return  # Gemma 4 adds a third term that depends on the middle
    layer = layers[0]
    sites = [Site(layer, part) for part in ("resid_pre", "attn_out", "resid_mid", "mlp_out")]
    pre, attn, mid, _ = run.read(batch, sites).values()

    def change(h: Tensor, _: Where) -> Tensor:
        assert torch.allclose(h, mid, atol=1e-5)
        return 0.5 * h.roll(1, -1)

    with run.edit([Edit(sites[2], change)]):
        _, attn_, mid_, mlp_ = run.read(batch, sites).values()
        post_ = run.read(batch, [Site(layer, "resid_post")])[Site(layer, "resid_post")]
    wanted = 0.5 * mid.roll(1, -1)
    assert error(mid_, wanted) < 1e-5
    assert error(post_, wanted + mlp_) < 1e-5
    # by hand: attention's contribution replaced by what makes the sum right
    with run.edit([Edit(sites[1], lambda h, _: wanted - pre)]):
        by_hand = run.read(batch, [Site(layer, "resid_post")])[Site(layer, "resid_post")]
    assert error(post_, by_hand) < 1e-5
    assert error(attn_, attn) > 1e-3  # it is carried by what attention writes


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2"])
def test_an_edit_of_the_middle_sees_the_other_edits_whatever_their_order(name: str) -> None:
    run, batch = engine(name), padded("right", [rows()[1]])
    site = Site(1, "resid_mid")
    seen: list[Tensor] = []

    def look(h: Tensor, _: Where) -> Tensor:
        seen.append(h.clone())
        return torch.zeros_like(h)

    others = [Edit(Site(1, "resid_pre"), push(2.0)), Edit(Site(1, "attn_out"), push(-1.0))]
    with run.edit(others):
        middle = run.read(batch, [site])[site]
    for edits in ([Edit(site, look), *others], [*others, Edit(site, look)]):
        with run.edit(edits):
            after = run.read(batch, [site])[site]
        assert error(seen[-1], middle) < 1e-5
        assert after.abs().max() < 1e-4 * middle.abs().max()


def test_edits_act_in_the_order_given_and_contexts_nest() -> None:
    run, batch = engine("llama"), padded("right")
    site = stream(run)
    h = run.read(batch, [site])[site]
    plus, twice = Edit(site, lambda h, _: h + 1), Edit(site, lambda h, _: h * 2)
    with run.edit([plus, twice]):
        assert torch.equal(run.read(batch, [site])[site], (h + 1) * 2)
    with run.edit([twice]), run.edit([plus]):
        assert run.edited
        assert torch.equal(run.read(batch, [site])[site], h * 2 + 1)
    assert not run.edited


def test_hooks_are_gone_after_an_exception() -> None:
    run, batch = engine("llama"), padded("left")
    before, plain = hooks(run), run.logits(batch)

    def fail(h: Tensor, _: Where) -> Tensor:
        raise KeyError("mine")

    for act in (
        lambda: run.logits(batch),
        lambda: run.read(batch, [Site(2, "resid_post"), Site(1, "pattern")]),
        lambda: run.generate(batch, 2, [], PAD),
    ):
        with pytest.raises(KeyError, match="mine"), run.edit([Edit(stream(run), fail)]):
            act()
        assert hooks(run) == before
        assert not run.edited
    assert torch.equal(run.logits(batch), plain)
    with pytest.raises(ValueError, match="out of range"):
        run.read(batch, [Site(0, "resid_post"), Site(7, "resid_post")])
    assert hooks(run) == before


def test_hooks_of_others_stay() -> None:
    model = build("llama")
    run = HookEngine(model, resolve(model))
    seen: list[int] = []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    run.read(padded("left"), [Site(1, "resid_post")])
    with run.edit([Edit(Site(1, "resid_post"), push(1.0))]):
        run.logits(padded("left"))
    assert len(seen) == 2
    assert len(model.model.layers[1]._forward_hooks) == 1


@pytest.mark.parametrize("name", ["llama", "granite"])
@pytest.mark.parametrize("part", ["resid_post", "resid_mid", "attn_out", "q"])
def test_a_wrong_shape_is_an_error_not_a_broadcast(name: str, part: str) -> None:
    run = engine(name)
    bad = Edit(Site(1, part), lambda h, _: h[:, :1])
    with pytest.raises(ValueError, match=rf"edit at 1.{part} returned shape \(3, 1, .*expected"):
        with run.edit([bad]):
            run.logits(padded("left"))


def test_the_dtype_of_the_stream_is_kept() -> None:
    model = build("llama").bfloat16()
    run = HookEngine(model, resolve(model))
    with run.edit([Edit(Site(1, "resid_post"), lambda h, _: h.float() + 1)]):
        assert run.logits(padded("left")).dtype == torch.bfloat16


def test_scopes_have_names() -> None:
    with pytest.raises(ValueError, match="expected 'all', 'prompt' or 'generated'"):
        Edit(Site(0, "resid_post"), lambda h, _: h, "answer")


# ---- scopes at generation ---------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("scope", ["all", "prompt", "generated"])
def test_generation_applies_an_edit_where_its_scope_says(name: str, scope: str) -> None:
    """Token by token with a cache must equal one pass over prompt and answer in which the edit is
    limited by hand to the tokens of its scope."""
    run, batch = engine(name), padded("left")
    new, n = 5, batch.ids.shape[1]
    layers = range(run.layout.n_layers)
    edits = [Edit(Site(i, "resid_post"), push(4.0 / (i + 1)), scope) for i in layers]
    steps: list[tuple[int, tuple[int, ...]]] = []

    def look(h: Tensor, where: Where) -> Tensor:
        assert where.mask.shape == h.shape[:2]
        assert torch.equal(where.mask, batch.mask.bool()) or where.step > 0
        steps.append((where.step, tuple(h.shape)))
        return h

    with run.edit([*edits, Edit(Site(2, "resid_post"), look)]):
        answer = run.generate(batch, new, [], PAD)
    assert [step for step, _ in steps] == list(range(new))
    assert [shape[1] for _, shape in steps] == [n, *[1] * (new - 1)]
    assert answer.shape == (len(LENGTHS), new)

    def limited(edit: Edit) -> Edit:
        chosen = torch.zeros(n + new, dtype=torch.bool)
        chosen[:n] = scope in ("all", "prompt")
        chosen[n:] = scope in ("all", "generated")
        return Edit(
            edit.site,
            lambda h, where: torch.where(chosen[None, :, None], edit.function(h, where), h),
        )

    forced = Batch(
        torch.cat([batch.ids, answer], 1),
        torch.cat([batch.mask, torch.ones_like(answer)], 1),
    )
    with run.edit([limited(edit) for edit in edits]):
        logits = run.logits(forced)[:, n - 1 : -1]
    chosen = logits.gather(2, answer[..., None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 1e-3 * logits.abs().max()
    # negative control: with the edits everywhere else the answer is another one
    if scope != "all":
        with run.edit([Edit(e.site, e.function) for e in edits]):
            everywhere = run.logits(forced)[:, n - 1 : -1]
        assert error(everywhere, logits) > 1e-3


def test_generation_is_greedy_and_stops() -> None:
    run, batch = engine("llama"), padded("left")
    model = run.model
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 3.0
    settings = model.generation_config
    try:
        answer = run.generate(batch, 6, [], PAD)
        assert model.generation_config is settings
        assert torch.equal(answer, run.generate(batch, 6, [], PAD))
        ids = batch.ids
        for step in range(6):
            mask = torch.cat([batch.mask, torch.ones(3, step, dtype=torch.long)], 1)
            best = run.logits(Batch(ids, mask))[:, -1].argmax(-1)
            assert torch.equal(best, answer[:, step])
            ids = torch.cat([ids, best[:, None]], 1)
        stop = answer[0, 2].item()
        stopped = run.generate(batch, 6, [stop, EOS], PAD)[0].tolist()
        first = answer[0].tolist().index(stop)
        assert stopped[: first + 1] == answer[0, : first + 1].tolist()
        assert set(stopped[first + 1 :]) <= {PAD}
    finally:
        model.generation_config.do_sample = False
        model.generation_config.temperature = 1.0
        model.generation_config.repetition_penalty = 1.0


# ---- padding, patterns, early stop ------------------------------------------------------------


@every_architecture
def test_padding_changes_nothing(name: str) -> None:
    run = engine(name)
    site = Site(run.layout.n_layers - 1, "resid_post")
    got = {side: run.read(padded(side), [site])[site] for side in ("left", "right")}
    logits = {side: run.logits(padded(side)) for side in ("left", "right")}
    for i, row in enumerate(rows()):
        alone = run.read(padded("left", [row]), [site])[site][0]
        said = run.logits(padded("left", [row]))[0]
        for side in ("left", "right"):
            real = padded(side).mask[i].bool()
            assert error(got[side][i][real], alone) < 1e-5
            assert error(logits[side][i][real], said) < 1e-5
        other = run.read(padded("left", [row[::-1]]), [site])[site][0]
        assert error(other, alone) > 1e-2


@every_architecture
def test_patterns_are_the_probabilities_the_model_reports(name: str) -> None:
    run, batch = engine(name), padded("right")
    layers = run.layout.supported("pattern")
    if not layers:
        return
    before = {id(m): getattr(m.config, "_attn_implementation", 0) for m in [run.model]}
    seen = run.read(batch, [Site(layer, "pattern") for layer in layers])
    assert before == {id(m): getattr(m.config, "_attn_implementation", 0) for m in [run.model]}
    with eager_attention(run.model), torch.no_grad():
        reported = run.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            output_attentions=True,
            use_cache=False,
        ).attentions
    reported = [a for a in reported if a is not None and a.dim() == 4][-len(layers) :]
    real = batch.mask.bool()
    for pattern, theirs in zip(seen.values(), reported, strict=True):
        assert error(pattern[real], theirs.transpose(1, 2)[real]) < 1e-5
        sums = pattern[real].sum(-1)
        if name == "gpt-oss":  # the sink takes a share
            assert sums.max() < 1
            assert sums.min() > 0
        else:
            assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
        n = pattern.shape[1]
        ahead = torch.ones(n, n, dtype=torch.bool).triu(1)[None, :, None] & real[:, :, None, None]
        assert not pattern[ahead.expand_as(pattern)].any()
    site = Site(layers[0], "pattern", 1)
    both = run.read(batch, [Site(layers[0], "resid_post"), site])
    assert list(both) == [Site(layers[0], "resid_post"), site]
    assert torch.equal(both[site], seen[Site(layers[0], "pattern")][:, :, 1])
    assert both[Site(layers[0], "resid_post")].shape == (3, 9, 64)


@every_architecture
def test_a_read_runs_no_further_than_its_deepest_site(name: str) -> None:
    run, batch = engine(name), padded("right")
    calls: list[str] = []
    handles = [
        run.model.get_submodule(block.path).register_forward_pre_hook(
            lambda *_, i=i: calls.append(f"block {i}")
        )
        for i, block in enumerate(run.layout.blocks)
    ]
    head = run.model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda *_: calls.append("head")))
    try:
        run.read(batch, [Site(0, "resid_post"), Site(1, "attn_out")])
        assert calls == ["block 0", "block 1"]
        calls.clear()
        run.read(batch, [Site(1, "resid_pre")])
        assert calls[0] == "block 0"
        assert "block 2" not in calls
        calls.clear()
        run.read(batch, [Site(run.layout.n_layers - 1, "resid_post")])
        assert "head" not in calls
        calls.clear()
        run.logits(batch)
        assert calls == [*(f"block {i}" for i in range(run.layout.n_layers)), "head"]
    finally:
        for handle in handles:
            handle.remove()


def test_only_what_is_kept_is_held() -> None:
    """`keep` runs during the pass, on the part asked for."""
    run, batch = engine("llama"), padded("right")
    shapes: list[tuple[int, ...]] = []

    def last(h: Tensor) -> Tensor:
        shapes.append(tuple(h.shape))
        return h[:, -1].clone()

    seen = run.read(batch, [Site(0, "q", 2), Site(2, "head_out"), Site(1, "remainder")], last)
    assert [tuple(h.shape) for h in seen.values()] == [(3, 16), (3, 4, 16), (3, 64)]
    assert shapes[0] == (3, 9, 16)
    assert (3, 9, 4, 16) in shapes


def test_values_are_copies() -> None:
    """Falcon and others add into their tensors in place later on."""
    for name in ("falcon", "falcon-7b", "gpt-neox", "llama"):
        run, batch = engine(name), padded("right")
        parts = ("resid_pre", "attn_out", "mlp_out")
        together = run.read(batch, [Site(1, p) for p in parts] + [Site(2, "resid_post")])
        for part in parts:
            alone = run.read(batch, [Site(1, part)])[Site(1, part)]
            assert torch.equal(together[Site(1, part)], alone)
