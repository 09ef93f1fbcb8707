"""The nnsight engine gives the values, edits and tokens of the reference engine."""

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import beartype  # noqa: F401  # before nnsight, which would break its import
import nnsight
import pytest
import torch
from architectures import ARCHITECTURES, EXTRA, ORDINARY_TOKENS, PAD, build
from torch import Tensor, nn

from probes.engines import Batch, Edit, Where
from probes.engines.hooks import HookEngine
from probes.engines.trace import TraceEngine
from probes.layout import Layout, resolve
from probes.sites import HEADED, PARTS, READ_ONLY, Site, Unsupported

TOLERANCE = 1e-5
LENGTHS = (3, 7, 5)

every_architecture = pytest.mark.parametrize("name", [*ARCHITECTURES, *EXTRA])
either_side = pytest.mark.parametrize("side", ["left", "right"])


def padded(side: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    length = max(LENGTHS)
    ids = torch.full((len(LENGTHS), length), PAD)
    mask = torch.zeros(len(LENGTHS), length, dtype=torch.long)
    first, last = ORDINARY_TOKENS[0], ORDINARY_TOKENS[-1] + 1
    for row, n in enumerate(LENGTHS):
        real = slice(length - n, length) if side == "left" else slice(0, n)
        ids[row, real] = torch.randint(first, last, (n,), generator=generator)
        mask[row, real] = 1
    return Batch(ids, mask)


@functools.cache
def engines(name: str) -> tuple[HookEngine, TraceEngine]:
    model = build(name)
    layout = resolve(model)
    return HookEngine(model, layout), TraceEngine(model, layout)


def all_sites(layout: Layout) -> list[Site]:
    """Every part of every layer that has it, and for parts with heads the last head too."""
    sites = []
    for part in PARTS:
        for layer in layout.supported(part):
            sites.append(Site(layer, part))
            if part in HEADED:
                sites.append(Site(layer, part, layout.blocks[layer].heads[part] - 1))
    return sites


def error(ours: Tensor, reference: Tensor, mask: Tensor, scale: Tensor | None = None) -> float:
    """||a - b|| / ||b|| of each vector at a real token; the largest."""
    assert ours.shape == reference.shape
    a, b = ours[mask].double(), reference[mask].double()
    assert b.isfinite().all()
    size = b if scale is None else scale[mask].double()
    assert size.norm(dim=-1).min() > 0
    return ((a - b).norm(dim=-1) / size.norm(dim=-1)).max().item()


def edits(layout: Layout, scope: str = "all", below: int | None = None) -> list[Edit]:
    """One edit of each part that can be edited, in the last layer (below one) that has it."""
    found = []
    for i, part in enumerate(PARTS):
        layers = layout.supported(part)[:below]
        if part in READ_ONLY or not layers:
            continue
        site = Site(layers[-1], part)
        direction = torch.randn(layout.width(site), generator=torch.Generator().manual_seed(i))

        def change(h: Tensor, where: Where, direction: Tensor = direction) -> Tensor:
            return 1.1 * h + (1 + 0.3 * where.step) * direction

        found.append(Edit(site, change, scope))
        if part in HEADED:
            head = layout.blocks[site.layer].heads[part] - 1
            found.append(Edit(Site(site.layer, part, head), change, scope))
    return found


@either_side
@every_architecture
def test_reads_agree(name: str, side: str) -> None:
    reference, ours = engines(name)
    batch = padded(side)
    mask = batch.mask.bool()
    sites = all_sites(reference.layout)

    expected, found = reference.read(batch, sites), ours.read(batch, sites)

    assert list(found) == sites
    for site in sites:
        # a remainder is rounding noise in most models: measured against what it is the rest of
        remainder = site.part == "remainder"
        scale = expected[Site(site.layer, "resid_post")] if remainder else None
        assert error(found[site], expected[site], mask, scale) <= TOLERANCE, str(site)
    logits = ours.logits(batch)
    assert error(logits, reference.logits(batch), mask) <= TOLERANCE
    assert not ours.edited
    with ours.edit(edits(ours.layout)):
        assert ours.edited
        logits = ours.logits(batch)
        for last in (2, 100):
            few = ours.logits(batch, last)
            assert error(few, logits[:, -last:], mask[:, -last:]) <= TOLERANCE


@either_side
@every_architecture
def test_edits_agree(name: str, side: str) -> None:
    reference, ours = engines(name)
    batch = padded(side)
    mask = batch.mask.bool()
    plain = ours.logits(batch)
    group = edits(reference.layout)
    for edit in group:
        with reference.edit([edit]), ours.edit([edit]):
            changed = ours.logits(batch)
            assert error(changed, plain, mask) > 1e-3, str(edit.site)
            assert error(changed, reference.logits(batch), mask) <= TOLERANCE, str(edit.site)
    sites = list(dict.fromkeys(edit.site for edit in group))
    sites += [Site(layer, "resid_post") for layer in range(reference.layout.n_layers - 1)]
    with reference.edit(group), ours.edit(group):
        assert error(ours.logits(batch), reference.logits(batch), mask) <= TOLERANCE
        expected, found = reference.read(batch, sites), ours.read(batch, sites)
    for site in sites:
        assert error(found[site], expected[site], mask) <= TOLERANCE, str(site)
    assert torch.equal(ours.logits(batch), plain)


@every_architecture
def test_a_zero_edit_changes_nothing(name: str) -> None:
    _, ours = engines(name)
    batch = padded("left")
    mask = batch.mask.bool()
    plain = ours.logits(batch)[mask]
    for edit in edits(ours.layout):
        with ours.edit([Edit(edit.site, lambda h, _: h + 0)]):
            new = ours.logits(batch)[mask]
        if edit.site.part == "resid_mid" or ours.layout.point(edit.site).scale == 1.0:
            assert torch.equal(new, plain), str(edit.site)
        else:  # a part that the model multiplies is divided again on the way back
            torch.testing.assert_close(new, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
@every_architecture
def test_generation_agrees(name: str) -> None:
    reference, ours = engines(name)
    batch = padded("left")
    n = 6
    plain = ours.generate(batch, n, [], PAD)
    assert torch.equal(plain, reference.generate(batch, n, [], PAD))
    for scope in ("all", "prompt", "generated"):
        # Gemma 4 shortens the prompt in its last two layers: see the next test
        group = edits(reference.layout, scope, below=2 if name.startswith("gemma4") else None)
        with reference.edit(group), ours.edit(group):
            expected, found = (engine.generate(batch, n, [], PAD) for engine in (reference, ours))
            assert found.shape == (len(LENGTHS), n)
            assert torch.equal(found, expected), scope
            # an edited prompt alone need not change what such small models repeat
            assert scope == "prompt" or not torch.equal(found, plain), scope
            stops = sorted({int(row[i]) for row, i in zip(found, (1, 3, 2), strict=True)})
            early = ours.generate(batch, n, stops, PAD)
            assert early.shape[1] < n
            assert torch.equal(early, reference.generate(batch, n, stops, PAD)), scope
        if scope == "generated":
            assert torch.equal(found[:, 0], plain[:, 0])


@pytest.mark.parametrize("name", ["llama", "gemma4-text", "gemma4-conditional"])
def test_generation_is_what_the_logits_say(name: str) -> None:
    """Also in layers which, left to themselves, see only the prompt's last token."""
    _, ours = engines(name)
    batch = padded("left")
    plain = ours.generate(batch, 4, [], PAD)
    group = edits(ours.layout)[:1] + edits(ours.layout)[-5:]
    steady = [Edit(edit.site, lambda h, _: 1.2 * h + 0.5) for edit in group]
    with ours.edit(steady):
        found = ours.generate(batch, 4, [], PAD)
        ids, mask = batch.ids, batch.mask
        for _ in range(4):
            token = ours.logits(Batch(ids, mask))[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    assert torch.equal(found, ids[:, -4:])
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("part", sorted(PARTS.keys() - READ_ONLY))
def test_edits_are_told_where_they_act(part: str) -> None:
    _, ours = engines("llama")
    batch = padded("left")
    told: list[Where] = []

    def watch(h: Tensor, where: Where) -> Tensor:
        assert h.shape[:2] == where.mask.shape
        told.append(where)
        return h

    with ours.edit([Edit(Site(1, part), watch)]):
        ours.generate(batch, 3, [], PAD)
    assert [where.step for where in told] == [0, 1, 2]
    assert torch.equal(told[0].mask, batch.mask.bool())
    assert told[1].mask.shape == (len(LENGTHS), 1)
    assert told[1].mask.all()


class Wrong(AttributeError):
    """Of the kind that attribute access might take for a missing attribute."""


def wrong(*_: object) -> Tensor:
    raise Wrong("a message of the caller's own")


def wrong_later(h: Tensor, where: Where) -> Tensor:
    return wrong() if where.step == 2 else h


RUNS: dict[str, Callable[[TraceEngine, Batch], object]] = {
    "read": lambda engine, batch: engine.read(batch, [Site(2, "resid_post")]),
    "pattern": lambda engine, batch: engine.read(batch, [Site(2, "pattern")]),
    "logits": lambda engine, batch: engine.logits(batch),
    "generate": lambda engine, batch: engine.generate(batch, 4, [], PAD),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("part", ["resid_pre", "resid_mid", "k", "head_out", "resid_post"])
def test_an_error_in_an_edit_leaves_nothing_behind(part: str, run: str) -> None:
    reference, ours = engines("llama")
    batch = padded("left")
    before = state(ours.model)
    function = wrong_later if run == "generate" else wrong
    with (
        pytest.raises(Wrong, match="a message of the caller's own"),
        ours.edit([Edit(Site(1, part), function)]),
    ):
        RUNS[run](ours, batch)
    assert state(ours.model) == before
    assert not ours.root.interleaver.interleaving
    assert not ours.root.interleaver.mediators
    assert torch.equal(ours.logits(batch), reference.logits(batch))


def test_an_error_in_keep_reaches_the_caller() -> None:
    reference, ours = engines("llama")
    batch = padded("left")
    with pytest.raises(Wrong, match="a message of the caller's own"):
        ours.read(batch, [Site(1, "resid_post")], keep=wrong)
    assert torch.equal(ours.logits(batch), reference.logits(batch))


def state(model: nn.Module) -> dict[str, object]:
    """What a caller could notice, outside nnsight's own inert attributes."""
    return {
        "keys": list(model.state_dict()),
        "config": model.config.to_json_string(),
        "attention": model.config._attn_implementation,
        "generation": (id(model.generation_config), model.generation_config.to_json_string()),
        "training": [module.training for module in model.modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ],
    }


@every_architecture
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = build(name)
    batch = padded("left")
    layout = resolve(model)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    with torch.no_grad():
        logits = model(**inputs).logits
    before = state(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    engine = TraceEngine(model, layout)
    engine.read(batch, all_sites(layout))
    with engine.edit(edits(layout)):
        engine.logits(batch)
        engine.generate(batch, 2, [], PAD)

    assert state(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, logits)


def test_a_read_keeps_what_is_asked_and_stops_early() -> None:
    model = build("llama")
    ours = TraceEngine(model, resolve(model))
    batch = padded("right")
    ran: list[str] = []
    watched = {"model.layers.0", "model.layers.1", "model.layers.1.mlp", "lm_head"}
    for path in watched:
        module = ours.model.get_submodule(path)
        module.register_forward_pre_hook(lambda *_, path=path: ran.append(path))

    sites = [Site(1, "attn_out"), Site(0, "head_out")]
    found = ours.read(batch, sites, keep=lambda h: h[:, -1].clone())

    assert ran == ["model.layers.0", "model.layers.1"]
    full = ours.read(batch, sites)
    for site in sites:
        assert torch.equal(found[site], full[site][:, -1])
        assert found[site].untyped_storage().nbytes() == found[site].numel() * 4


def test_what_cannot_be_edited_is_refused() -> None:
    _, ours = engines("falcon")
    for text, why in (
        ("0.pattern", "can be read but not edited"),
        ("0.remainder", "can be read but not edited"),
        ("0.resid_mid", "in parallel"),
    ):
        with pytest.raises(Unsupported, match=why), ours.edit([Edit(Site.parse(text), wrong)]):
            pass
    with (
        pytest.raises(ValueError, match="returned shape"),
        ours.edit([Edit(Site(0, "resid_pre"), lambda h, _: h[:, -1])]),
    ):
        ours.logits(padded("left"))
    batch = padded("right")
    packed = Batch(
        batch.ids, batch.mask, batch.positions, batch.mask[:, None].bool().repeat(1, 7, 1)
    )
    with pytest.raises(Unsupported, match="one prompt a row"):
        ours.read(packed, [Site(0, "resid_post")])


def test_a_model_that_is_not_in_memory_is_refused() -> None:
    model = build("llama")
    layout = resolve(model)
    with pytest.raises(ValueError, match="not in memory"):
        TraceEngine(model.to("meta"), layout)
    with pytest.raises(ValueError, match="not in memory"):
        TraceEngine.of_nnsight(nnsight.NNsight(model))


@either_side
def test_an_nnsight_model_in_memory(side: str) -> None:
    reference, _ = engines("gpt2")
    wrapped = nnsight.NNsight(reference.model)
    ours = TraceEngine.of_nnsight(wrapped)
    batch = padded(side)
    assert ours.layout == reference.layout
    assert torch.equal(ours.logits(batch), reference.logits(batch))

    # an edit of the user's own behind the site that is read
    with wrapped.edit() as (_, edited):
        edited.transformer.h[1].output = edited.transformer.h[1].output + 1
    steered = TraceEngine.of_nnsight(edited, reference.layout)
    site, before = Site(2, "resid_pre"), Site(0, "resid_post")
    with reference.edit([Edit(Site(1, "resid_post"), lambda h, _: h + 1)]):
        assert torch.equal(steered.logits(batch), reference.logits(batch))
        found, expected = (one.read(batch, [site])[site] for one in (steered, reference))
        assert torch.equal(found, expected)
    plain = reference.read(batch, [before])[before]
    assert torch.equal(steered.read(batch, [before])[before], plain)
    assert torch.equal(ours.logits(batch), reference.logits(batch))


ALONE = """
import sys
sys.modules["probes.engines.hooks"] = sys.modules["transformer_lens"] = None
import torch
from architectures import build
from probes.engines import Batch, open_engine
from probes.layout import resolve
from probes.sites import Site

assert "nnsight" not in sys.modules
model = build("llama")
engine = open_engine("nnsight", model, resolve(model))
ids = torch.tensor([[7, 8, 9]])
site = Site(1, "resid_post")
found = engine.read(Batch(ids, torch.ones_like(ids)), [site])[site]
with torch.no_grad():
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
assert torch.equal(found, states[2])
import beartype
"""


def test_it_needs_no_other_engine_and_breaks_no_later_import() -> None:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent)]
    run = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{ALONE}"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def real() -> tuple:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from probes.lineage.base import base_folder

    folder = base_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["The Eiffel Tower is in", "Hello", "I would like to know whether it is true that"]
    encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    return model, tokenizer, Batch(encoded.input_ids, encoded.attention_mask)


def test_the_real_model(real: tuple) -> None:
    model, _, batch = real
    layout = resolve(model)
    reference, ours = HookEngine(model, layout), TraceEngine(model, layout)
    mask = batch.mask.bool()
    sites = layout.sites(["all.resid_post", "all.head_out", "all.k", "3.pattern"])

    expected, found = reference.read(batch, sites), ours.read(batch, sites)

    worst = max(error(found[site], expected[site], mask) for site in sites)
    assert worst <= TOLERANCE
    group = [Edit(Site(10, "resid_post"), lambda h, _: h + 1.0)]
    plain = ours.generate(batch, 6, [], PAD)
    with reference.edit(group), ours.edit(group):
        steered = ours.generate(batch, 6, [], PAD)
        assert torch.equal(steered, reference.generate(batch, 6, [], PAD))
    assert not torch.equal(steered, plain)


def test_a_transformers_model_of_nnsight(real: tuple) -> None:
    model, tokenizer, batch = real
    wrapped = nnsight.TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    tokenizer.padding_side = "right"
    ours = TraceEngine.of_nnsight(wrapped)
    reference = HookEngine(model, ours.layout)
    flipped = Batch(batch.ids.flip(1), batch.mask.flip(1))
    site = Site(20, "resid_post")
    group = [Edit(Site(10, "resid_post"), lambda h, _: h + 1.0)]
    for one in (batch, flipped):
        found, expected = (engine.read(one, [site])[site] for engine in (ours, reference))
        assert error(found, expected, one.mask.bool()) <= TOLERANCE
    few, logits = ours.logits(batch, 2), ours.logits(batch)
    assert error(few, logits[:, -2:], batch.mask[:, -2:].bool()) <= TOLERANCE
    with reference.edit(group), ours.edit(group):
        assert torch.equal(ours.generate(batch, 4, [], PAD), reference.generate(batch, 4, [], PAD))
    assert tokenizer.padding_side == "right"
