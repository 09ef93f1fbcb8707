"""The TransformerLens engine gives the values, edits and tokens of the reference engine."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, EOS, EXTRA, ORDINARY_TOKENS, PAD, build
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from probes.engines import Batch, Edit, Where
from probes.engines.hooks import HookEngine
from probes.engines.lens import LensEngine, unwrapped
from probes.engines.modes import eager_attention
from probes.layout import Layout, resolve
from probes.sites import HEADED, PARTS, READ_ONLY, Site, Unsupported, expand

TOLERANCE = 1e-5
LENGTHS = (3, 8, 5)
WRAPPED = [name for name in (*ARCHITECTURES, *EXTRA) if name != "falcon"]

every_architecture = pytest.mark.parametrize("name", WRAPPED)
either_side = pytest.mark.parametrize("side", ["left", "right"])


@cache
def engines(name: str) -> tuple[HookEngine, LensEngine]:
    model = build(name)
    layout = resolve(model)
    return HookEngine(model, layout), LensEngine(model, layout)


@pytest.fixture
def pair(name: str) -> Iterator[tuple[HookEngine, LensEngine]]:
    """Both engines over one model, the reference with the attention that a bridge uses."""
    reference, lens = engines(name)
    with eager_attention(reference.model):
        yield reference, lens


def padded(side: str, rows: int = len(LENGTHS)) -> Batch:
    generator = torch.Generator().manual_seed(0)
    length = max(LENGTHS)
    ids = torch.full((rows, length), PAD)
    mask = torch.zeros(rows, length, dtype=torch.long)
    for row, n in enumerate(LENGTHS[:rows]):
        real = slice(length - n, length) if side == "left" else slice(0, n)
        first, last = ORDINARY_TOKENS[0], ORDINARY_TOKENS[-1] + 1
        ids[row, real] = torch.randint(first, last, (n,), generator=generator)
        mask[row, real] = 1
    return Batch(ids, mask)


def sites_of(layout: Layout) -> list[Site]:
    """Every part of every layer, and the last head of each part with heads."""
    sites = []
    for part in PARTS:
        for layer in layout.supported(part):
            sites.append(Site(layer, part))
            if part in HEADED:
                sites.append(Site(layer, part, layout.blocks[layer].heads[part] - 1))
    return sites


def error(ours: Tensor, reference: Tensor, mask: Tensor, scale: Tensor | None = None) -> float:
    """||a - b|| / ||b|| (or / ||scale||) of the vector at each real token; the largest."""
    assert ours.shape == reference.shape
    a, b = ours[mask.bool()].double(), reference[mask.bool()].double()
    size = (b if scale is None else scale[mask.bool()].double()).norm(dim=-1)
    assert size.min() > 0
    return ((a - b).norm(dim=-1) / size).max().item()


def edits(layout: Layout, seen: list[Tensor] | None = None, scope: str = "all") -> list[Edit]:
    """One edit of each part that can be edited, and one of its last head, in the last layer."""
    found = []
    for i, part in enumerate(PARTS):
        layers = layout.supported(part)
        if part in READ_ONLY or not layers:
            continue
        site = Site(layers[-1], part)
        direction = torch.randn(layout.width(site), generator=torch.Generator().manual_seed(i))

        # not a plain shift: one that is the same for every key leaves attention as it was
        def change(h: Tensor, where: Where, direction: Tensor = direction) -> Tensor:
            if seen is not None:
                seen.append(h[where.mask])
            return 1.2 * h + (2 + 0.3 * where.step) * direction

        found.append(Edit(site, change, scope))
        if part in HEADED:
            head = layout.blocks[site.layer].heads[part] - 1
            found.append(Edit(Site(site.layer, part, head), change, scope))
    return found


@either_side
@every_architecture
def test_reads_agree(pair: tuple[HookEngine, LensEngine], side: str) -> None:
    reference, lens = pair
    batch = padded(side)
    sites = sites_of(reference.layout)

    expected, found = reference.read(batch, sites), lens.read(batch, sites)

    assert list(found) == sites
    for site in sites:
        # a remainder is rounding noise in most models: measured against what it is the rest of
        post = expected[Site(site.layer, "resid_post")] if site.part == "remainder" else None
        assert error(found[site], expected[site], batch.mask, post) <= TOLERANCE, str(site)
    assert error(lens.logits(batch), reference.logits(batch), batch.mask) <= TOLERANCE


@either_side
@every_architecture
def test_edits_agree(pair: tuple[HookEngine, LensEngine], side: str) -> None:
    reference, lens = pair
    batch = padded(side)
    plain = lens.logits(batch)
    for last in (1, 3, 99):
        assert error(lens.logits(batch, last), plain[:, -last:], batch.mask[:, -last:]) <= TOLERANCE
    seen: list[Tensor] = []
    single = edits(reference.layout, seen)
    for group in [*([edit] for edit in single), single]:
        named = str(group[0].site)
        with reference.edit(group), lens.edit(group):
            seen.clear()
            expected = reference.logits(batch)
            given = [*seen]
            seen.clear()
            found = lens.logits(batch)
            for a, b in zip(seen, given, strict=True):
                assert error(a, b, torch.ones(len(b))) <= TOLERANCE, named
            assert error(found, plain, batch.mask) > 1e-3, named
            assert error(found, expected, batch.mask) <= TOLERANCE, named
    sites = [edit.site for edit in single]
    assert not lens.edited
    with lens.edit(single):
        assert lens.edited
        assert error(lens.logits(batch, 2), found[:, -2:], batch.mask[:, -2:]) <= TOLERANCE
    with reference.edit(single), lens.edit(single):
        expected, found = reference.read(batch, sites), lens.read(batch, sites)
    for site in sites:
        assert error(found[site], expected[site], batch.mask) <= TOLERANCE, str(site)
    assert torch.equal(lens.logits(batch), plain)


@every_architecture
def test_a_zero_edit_changes_nothing(name: str) -> None:
    _, lens = engines(name)
    batch = padded("left")
    plain = lens.logits(batch)
    for edit in edits(lens.layout):
        with lens.edit([Edit(edit.site, lambda h, _: h + 0)]):
            new = lens.logits(batch)
        if edit.site.part == "resid_mid" or lens.layout.point(edit.site).scale == 1.0:
            assert torch.equal(new, plain), str(edit.site)
        else:  # multiplied by the model, so divided on the way back
            assert error(new, plain, batch.mask) < 1e-6, str(edit.site)


@every_architecture
def test_generation_agrees(pair: tuple[HookEngine, LensEngine]) -> None:
    reference, lens = pair
    batch = padded("left")
    n = 6
    plain = lens.generate(batch, n, [], PAD)
    assert plain.shape == (len(LENGTHS), n)
    assert torch.equal(plain, reference.generate(batch, n, [], PAD))
    assert torch.equal(lens.generate(padded("left", 1), n, [], PAD), plain[:1])
    stop = int(plain[0, 2])
    stopped = lens.generate(batch, n, [stop, EOS], PAD)
    assert torch.equal(stopped, reference.generate(batch, n, [stop, EOS], PAD))
    assert stop in stopped[0]
    assert (stopped[0, 3:] == PAD).all()
    for scope in ("all", "prompt", "generated"):
        group = edits(reference.layout, scope=scope)
        with reference.edit(group), lens.edit(group):
            expected, found = (engine.generate(batch, n, [], PAD) for engine in pair)
        assert torch.equal(found, expected), scope
        assert not torch.equal(found, plain), scope


@pytest.mark.parametrize("name", ["gemma4-text", "gemma4-conditional", "llama"])
def test_edits_meet_the_whole_prompt(pair: tuple[HookEngine, LensEngine]) -> None:
    """Left alone, Gemma 4 shows its layers without keys of their own the last token only.

    Here each token comes from new logits of all before it, which shows every layer everything.
    """
    reference, lens = pair
    start = batch = padded("left")
    group = [
        Edit(Site(lens.layout.n_layers - 1, part), lambda h, _, i=i: h.roll(i, dims=-1))
        for i, part in enumerate(("resid_mid", "mlp_out", "head_out"), 1)
    ]
    with reference.edit(group):
        for _ in range(5):
            token = reference.logits(batch)[:, -1:].argmax(-1)
            ids, mask = torch.cat([batch.ids, token], 1), batch.mask
            batch = Batch(ids, torch.cat([mask, torch.ones_like(token)], 1))
    shapes = []

    def note(h: Tensor, where: Where) -> Tensor:
        shapes.append((h.shape[:2], where.mask.shape))
        return h

    with lens.edit([*group, Edit(group[0].site, note)]):
        found = lens.generate(start, 5, [], PAD)

    assert torch.equal(found, batch.ids[:, -5:])
    assert not torch.equal(found, lens.generate(start, 5, [], PAD))
    assert shapes[0] == (start.ids.shape, start.ids.shape)
    assert shapes[1:] == [((len(LENGTHS), 1), (len(LENGTHS), 1))] * 4


def test_an_edit_is_told_where_it_acts() -> None:
    _, lens = engines("gpt2")
    batch = padded("left")
    told: list[tuple[int, list[int], bool]] = []

    def note(h: Tensor, where: Where) -> Tensor:
        told.append((where.step, list(h.shape), torch.equal(where.mask, batch.mask.bool())))
        return h

    with lens.edit([Edit(Site(0, "resid_pre"), note)]):
        lens.generate(batch, 3, [], PAD)
        lens.logits(batch)

    prompt, token = [3, max(LENGTHS), 64], [3, 1, 64]
    assert told == [(0, prompt, True), (1, token, False), (2, token, False), (0, prompt, True)]


def test_a_read_ends_at_its_deepest_site() -> None:
    _, lens = engines("llama")
    ran: list[str] = []
    names = ["blocks.0.hook_out", "blocks.1.attn.hook_out", "blocks.1.mlp.hook_in"]
    names += ["blocks.2.hook_in", "blocks.2.hook_out", "unembed.hook_in"]
    sites = [Site(1, "attn_out"), Site(0, "v")]

    def note(h: Tensor, hook: HookPoint) -> None:
        ran.append(str(hook.name))

    with lens.bridge.hooks(fwd_hooks=[(name, note) for name in names]):
        lens.read(padded("left"), sites)
        assert ran == names[:2]
        ran.clear()
        lens.read(padded("left"), [Site(2, "resid_post")])
        assert ran == names[:-1]


def test_an_error_in_an_edit_leaves_no_hook() -> None:
    model = build("llama")
    lens = LensEngine(model, resolve(model))
    batch = padded("left")
    plain = lens.logits(batch)

    def hooked() -> list[str | None]:
        return [point.name for point in lens.bridge.hook_points() if point.has_hooks()]

    before = {name: len(module._forward_hooks) for name, module in lens.bridge.named_modules()}

    def fail(h: Tensor, where: Where) -> Tensor:
        assert hooked()
        raise ZeroDivisionError

    runs: list[Callable[[], object]] = [
        lambda: lens.logits(batch),
        lambda: lens.generate(batch, 2, [], PAD),
        lambda: lens.read(batch, [Site(2, "resid_post")]),
    ]
    for part in ("resid_mid", "q", "mlp_out"):
        for run in runs:
            with pytest.raises(ZeroDivisionError), lens.edit([Edit(Site(1, part), fail)]):
                run()
            assert hooked() == []
    assert torch.equal(lens.logits(batch), plain)
    after = {name: len(module._forward_hooks) for name, module in lens.bridge.named_modules()}
    assert after == before


@every_architecture
def test_the_callers_model_is_left_as_it_was(name: str) -> None:
    def facts(model: nn.Module) -> object:
        attention = [
            getattr(getattr(module, "config", None), "_attn_implementation", None)
            for module in model.modules()
        ]
        tensors = {key: (t.data_ptr(), t._version) for key, t in model.state_dict().items()}
        learns = [p.requires_grad for p in model.parameters()]
        classes = [(path, type(module)) for path, module in model.named_modules()]
        forwards = [vars(module).get("forward") for module in model.modules()]
        settings = copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict()))  # pyright: ignore
        return attention, tensors, learns, classes, forwards, settings

    model = build(name)
    layout = resolve(model)
    batch = padded("left")
    reference = HookEngine(model, layout)
    before, logits = facts(model), reference.logits(batch)

    lens = LensEngine(model, layout)
    with lens.edit(edits(layout)):
        lens.read(batch, sites_of(layout))
        lens.generate(batch, 2, [], PAD)

    assert facts(model) == before
    assert torch.equal(reference.logits(batch), logits)
    ours = {p.data_ptr() for p in lens.bridge.original_model.parameters()}
    assert {p.data_ptr() for p in model.parameters()} <= ours


def bridge_of(name: str) -> TransformerBridge:
    model = build(name)
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


@every_architecture
def test_a_bridge_gives_its_model_back(name: str) -> None:
    batch, bridge = padded("left"), bridge_of(name)
    names = [path for path, _ in bridge.named_modules()]
    model, (original, _) = unwrapped(bridge), engines(name)
    layout = resolve(model)
    assert layout == original.layout
    # a bridge gives every head a bias, of zeros
    assert model.state_dict().keys() - {"lm_head.bias"} == original.model.state_dict().keys()
    with eager_attention(original.model):
        expected = original.logits(batch)
    assert error(HookEngine(model, layout).logits(batch), expected, batch.mask) <= TOLERANCE
    assert [path for path, _ in bridge.named_modules()] == names


@pytest.mark.parametrize("name", ["llama"])
def test_a_live_adapter_is_part_of_the_model(pair: tuple[HookEngine, LensEngine]) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(build("llama"), settings).eval().get_base_model()
    layout, batch = resolve(model), padded("left")
    reference, lens = HookEngine(model, layout), LensEngine(model, layout)
    sites = sites_of(layout)
    with eager_attention(model):
        expected, found = reference.read(batch, sites), lens.read(batch, sites)
    for site in sites:
        post = expected[Site(site.layer, "resid_post")] if site.part == "remainder" else None
        assert error(found[site], expected[site], batch.mask, post) <= TOLERANCE, str(site)
    assert error(lens.logits(batch), pair[1].logits(batch), batch.mask) > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "phi3"])
def test_a_bridge_in_memory_is_run_as_it_is(pair: tuple[HookEngine, LensEngine], name: str) -> None:
    reference, _ = pair
    bridge, batch = bridge_of(name), padded("left")
    lens = LensEngine.of_bridge(bridge)
    assert lens.bridge is bridge
    site = Site(2, "q")
    turn = Edit(Site(1, "resid_post"), lambda h, _: h.roll(1, dims=-1))
    with reference.edit([turn]):
        expected = reference.read(batch, [site])[site]

    def hook(h: Tensor, hook: HookPoint) -> Tensor:
        return h.roll(1, dims=-1)

    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", hook)]):
        assert error(lens.read(batch, [site])[site], expected, batch.mask) <= TOLERANCE
    assert error(lens.read(batch, [site])[site], expected, batch.mask) > 1e-3


def test_what_transformer_lens_cannot_do_is_refused() -> None:
    model = build("falcon")
    with pytest.raises(Unsupported, match=r"cannot wrap FalconForCausalLM .*split_with_sizes"):
        LensEngine(model, resolve(model))

    model = build("llama")
    layout = resolve(model)
    model.model.layers[1].to("meta")
    with pytest.raises(Unsupported, match=r"some weights are offloaded.*engine 'transformers'"):
        LensEngine(model, layout)

    bridge = bridge_of("llama")
    bridge.enable_compatibility_mode(no_processing=True)
    with pytest.raises(Unsupported, match="compatibility mode"):
        LensEngine.of_bridge(bridge)

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build("phi3"), LoraConfig(target_modules=["qkv_proj"])).eval()
    with pytest.raises(Unsupported, match=r"leave out the adapter on .*0\.self_attn\.qkv_proj"):
        LensEngine(adapted.get_base_model(), engines("phi3")[0].layout)

    _, lens = engines("deepseek-v3")
    for site in (Site(0, "k"), Site(0, "v")):
        with pytest.raises(Unsupported, match="compressed latent"):
            lens.read(padded("left"), [site])
    for site in (Site(0, "pattern"), Site(0, "remainder")):
        with pytest.raises(Unsupported, match="can be read but not edited"):
            lens.edit([Edit(site, lambda h, _: h)]).__enter__()


def test_a_model_that_gives_all_logits_gives_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lens = engines("llama")
    batch = padded("left")
    plain = lens.logits(batch)
    monkeypatch.setattr(lens, "_keeps_logits", False)
    assert torch.equal(lens.logits(batch, 2), plain[:, -2:])


def test_one_prompt_in_a_row() -> None:
    _, lens = engines("llama")
    ids = torch.tensor([[5, 6, 7]])
    ones = torch.ones_like(ids)
    packed = Batch(ids, ones, ids - 5, torch.ones(1, 3, 3, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="one prompt in a row, not several"):
        lens.read(packed, [Site(1, "resid_post")])


def test_a_part_without_a_hook_point_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = bridge_of("llama")
    monkeypatch.setattr(bridge.blocks[1].attn.o, "hook_in", None)
    lens = LensEngine.of_bridge(bridge, engines("llama")[0].layout)
    why = r"1.head_out does not exist here.*no hook point at the input of model.*1\.self_attn\.o_"
    with pytest.raises(Unsupported, match=why):
        lens.read(padded("left"), [Site(1, "head_out")])
    with pytest.raises(Unsupported, match=why):
        lens.edit([Edit(Site(1, "head_out"), lambda h, _: h)]).__enter__()


def test_a_hook_point_that_is_never_reached_is_an_error() -> None:
    # this bridge leaves attention to the model, whose fast form gives no probabilities
    bridge = bridge_of("opt")
    with eager_attention(bridge.original_model):
        bridge.original_model.config._attn_implementation = "sdpa"  # pyright: ignore
        lens = LensEngine.of_bridge(bridge)
        with pytest.raises(Unsupported, match=r"never reached blocks.1.attn.hook_pattern when"):
            lens.read(padded("left"), [Site(1, "pattern"), Site(0, "q")])


def test_the_engine_stands_alone_and_its_import_changes_no_setting() -> None:
    code = """
import logging, sys, warnings
import torch, transformers
sys.modules["probes.engines.hooks"] = None
sys.path.insert(0, "tests")
from architectures import build
from probes.engines import Batch, open_engine
from probes.layout import resolve
from probes.sites import Site
transformers.logging.set_verbosity_info()
before = logging.getLogger("transformers").level, [*warnings.filters]
import probes.engines.lens
assert before == (logging.getLogger("transformers").level, [*warnings.filters])
model = build("llama")
ids = torch.tensor([[5, 6, 7]])
engine = open_engine("transformer_lens", model, resolve(model))
sites = [Site(1, "resid_mid"), Site(1, "pattern")]
assert len(engine.read(Batch(ids, torch.ones_like(ids)), sites)) == 2
"""
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_real_model_agrees(attention: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from probes.lineage.base import base_folder

    folder = base_folder()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = ["The capital of France is", "Write one line about the sea at night.", "Hello"]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    batch = Batch(encoded.input_ids, encoded.attention_mask)
    layout = resolve(model)
    reference, lens = HookEngine(model, layout), LensEngine(model, layout)
    sites = expand(["all.resid_post", "all.head_out", "all.k"], layout.n_layers)

    found = lens.read(batch, sites)
    with eager_attention(model):
        expected = reference.read(batch, sites)
        steer = Edit(Site(10, "resid_post"), lambda h, _: h + 0.1 * h.roll(1, dims=-1))
        with reference.edit([steer]), lens.edit([steer]):
            tokens = [engine.generate(batch, 8, [], 2) for engine in (reference, lens)]

    assert max(error(found[site], expected[site], batch.mask) for site in sites) <= TOLERANCE
    assert torch.equal(*tokens)
    assert model.config._attn_implementation == attention
