"""Laws of activation patching on tiny random models: what must be exact, and what must be refused."""

import itertools

import pytest
import tiny
import tiny_lineage
import torch
from architectures import build
from torch import Tensor

from analyses.patching import patcher as patchers
from analyses.patching.metrics import LogitDifference, RefusalLogOdds
from analyses.patching.patch import Patched, patch, random_cells
from analyses.patching.patcher import Cell, Patcher
from analyses.patching.sources import From, Mean, Resampled, Zero
from probes import HookedModel
from probes.sites import Site

ENGINES = ("transformers", "transformer_lens", "nnsight")
PROMPTS = tiny.words(10, seed=4)
CLEAN = [f"w{k} w{k + 1} w5 w6" for k in range(0, 40, 2)]
CORRUPT = [f"w{k} w{k + 70} w5 w6" for k in range(0, 40, 2)]
METRIC = RefusalLogOdds((20, 21, 22))


@pytest.fixture(scope="module")
def lineage() -> tuple[HookedModel, HookedModel]:
    """Two checkpoints with equal embeddings, equal first blocks and equal heads."""
    return tiny_lineage.hooked("target"), tiny_lineage.hooked("source", 1, seed=1)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox"])
def test_a_run_patched_into_itself_changes_no_bit(architecture: str, engine: str) -> None:
    model = HookedModel(build(architecture), tiny.tokenizer(), engine=engine)
    itself = Patcher(model, PROMPTS, From(prompts=tuple(PROMPTS)))
    held = itself._load([Cell(model.sites("all.attn_out"))])
    jobs = [
        patchers.Job(i, 0, itself._writes(Cell(model.sites("all.attn_out")), i, held))
        for i in itself.runs.chunks[0]
    ]
    written = itself.runs.logits(jobs)  # really put in, and not left out because it is equal
    assert torch.equal(written, itself.target_logits[itself.runs.chunks[0]])
    assert torch.equal(itself.logits("all.mlp_out"), itself.target_logits)
    other = Patcher(model, PROMPTS, Zero())  # the control: something is written
    assert error(other.logits("1.attn_out"), other.target_logits) > 1e-3


@pytest.mark.parametrize("site", ["2.resid_post", "1.resid_pre"])
def test_the_whole_stream_carries_everything(
    lineage: tuple[HookedModel, HookedModel], site: str
) -> None:
    target, source = lineage
    found = Patcher(target, PROMPTS, From(model=source))
    logits = found.logits(site)
    if site == "2.resid_post":
        assert torch.equal(logits, found.source_logits)
    else:  # below it nothing differs
        assert torch.equal(logits, found.target_logits)
    prompts = Patcher(target, CLEAN, From(prompts=tuple(CORRUPT)))
    assert torch.equal(prompts.logits("0.resid_pre"), prompts.source_logits)
    assert not torch.equal(prompts.target_logits, prompts.source_logits)


def test_between_equal_models_every_patch_is_the_identity() -> None:
    one, two = tiny_lineage.hooked("one"), tiny_lineage.hooked("two")
    found = Patcher(one, PROMPTS, From(model=two))
    for part in ("resid_mid", "attn_out", "mlp_out", "head_out", "q", "k", "v"):
        assert torch.equal(found.logits(f"all.{part}"), found.target_logits)
    result = patch(one, PROMPTS, From(model=two), "1.head_out.2", METRIC, progress=False)
    assert result.change.tolist() == [0, 0, 0]
    assert result.share.isnan().all()
    assert result.without_gap == len(PROMPTS)
    assert (
        str(result) == "1.head_out.2: source and target runs are equal, every change is exactly 0"
    )


def test_everything_that_blocks_write_reaches_the_source(
    lineage: tuple[HookedModel, HookedModel],
) -> None:
    target, source = lineage
    found = Patcher(target, PROMPTS, From(model=source))
    writes = found.logits(["all.attn_out", "all.mlp_out"])
    assert error(writes, found.source_logits) < 1e-6
    alone = found.logits("all.attn_out")
    assert error(alone, found.source_logits) > 1e-3
    # heads before the output projection, which is the target's own: these two share it
    same = tiny_lineage.hooked("same projections", 1, seed=1)
    with torch.no_grad():
        for a, b in zip(same.model.model.layers, target.model.model.layers, strict=True):
            a.self_attn.o_proj.weight.copy_(b.self_attn.o_proj.weight)
    found = Patcher(target, PROMPTS, From(model=same))
    heads = [f"{n}.head_out.{h}" for n in range(3) for h in range(4)]
    assert error(found.logits([*heads, "all.mlp_out"]), found.source_logits) < 1e-6


def test_inputs_of_attention_together_are_the_head_outputs(
    lineage: tuple[HookedModel, HookedModel],
) -> None:
    """q, k and v of a layer give its head outputs, and held outputs stop what goes round them."""
    target, source = lineage
    found = Patcher(target, PROMPTS, From(model=source))
    inputs, outputs = found.logits(["1.q", "1.k", "1.v"]), found.logits("1.head_out")
    assert error(inputs, outputs) < 1e-6
    assert error(found.logits(["1.q", "1.k"]), outputs) > 1e-4
    held = Patcher(target, PROMPTS, From(model=source), hold="all.head_out")
    last = found.logits("1.head_out", "last")
    with_held = held.logits(["1.q", "1.k", "1.v"])
    assert error(with_held, last) < 1e-6
    assert error(with_held, outputs) > 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox"])
def test_engines_agree(architecture: str) -> None:
    sites = ["1.head_out.2", "0.mlp_out", "2.v.0", "1.resid_post"]
    found = []
    for engine in ENGINES:
        model = HookedModel(build(architecture), tiny.tokenizer(), engine=engine)
        prepared = Patcher(model, CLEAN[:6], From(prompts=tuple(CORRUPT[:6])))
        found.append([prepared.logits(site) for site in sites])
    for one, *others in zip(*found, strict=True):
        assert all(error(other, one) < 1e-5 for other in others)
    assert all(error(a, b) > 1e-4 for a, b in itertools.combinations(found[0], 2))


def test_agreement_with_transformer_lens_in_plain_form() -> None:
    """The same patches by its own cache and hooks, on one prompt after the other."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = HookedModel(build("gpt2"), tiny.tokenizer())
    found = Patcher(model, CLEAN[:4], From(prompts=tuple(CORRUPT[:4])))
    twin = build("gpt2")
    twin.config._attn_implementation = "eager"
    bridge = build_bridge_from_module(twin, "GPT2LMHeadModel", hf_config=twin.config)
    for layer, head in ((0, 1), (2, 3)):
        ours = found.logits(f"{layer}.head_out.{head}")
        for i, (clean, corrupt) in enumerate(zip(found.ids, found.values.ids, strict=True)):
            name = f"blocks.{layer}.attn.hook_z"
            _, cache = bridge.run_with_cache(torch.tensor([corrupt]))

            def put(z: Tensor, hook: object, head: int = head, source: Tensor = cache[name]):
                new, width = z.clone().flatten(2), 16
                given = source.flatten(2)
                new[..., head * width : (head + 1) * width] = given[
                    ..., head * width : (head + 1) * width
                ]
                return new.reshape(z.shape)

            logits = bridge.run_with_hooks(torch.tensor([clean]), fwd_hooks=[(name, put)])
            assert error(ours[i], logits[0, -1].detach()) < 1e-5


def test_batched_is_one_by_one(lineage: tuple[HookedModel, HookedModel]) -> None:
    target, source = lineage
    sites = ["1.head_out.1", "2.mlp_out"]
    together = Patcher(target, PROMPTS, From(model=source))
    batched = together.logits(sites)
    # the beginning runs once and lower blocks not at all; had either been wrong, a note would say
    assert together.runs.shared > 4 and together.runs.resume and together.notes == ()
    for i, prompt in enumerate(PROMPTS):
        alone = Patcher(target, [prompt], From(model=source), batch_size=1, shorten=False)
        assert error(batched[i], alone.logits(sites)[0]) < 1e-5
        assert error(alone.logits(sites), alone.target_logits) > 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma4-text", "jamba", "mistral"])
def test_shortened_passes_are_whole_passes(architecture: str) -> None:
    model = HookedModel(build(architecture), tiny.tokenizer())
    source = From(prompts=tuple(CORRUPT[:6]))
    short = Patcher(model, CLEAN[:6], source)
    whole = Patcher(model, CLEAN[:6], source, shorten=False)
    for site in ("all.attn_out", "2.mlp_out", "1.resid_pre"):
        assert error(short.logits(site), whole.logits(site)) < 1e-5
    assert whole.runs.shared == 0 and not whole.runs.resume
    if architecture == "llama":
        assert short.runs.shared > 4 and short.runs.resume and not short.notes
    if architecture == "jamba":
        assert short.runs.shared == 0  # a recurrent state is not shared


def test_a_pass_that_cannot_be_shortened_is_made_whole(
    lineage: tuple[HookedModel, HookedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, source = lineage
    whole = Patcher(target, PROMPTS, From(model=source), shorten=False).logits("2.attn_out")
    entering = patchers.Runs._entering
    monkeypatch.setattr(patchers.Runs, "_entering", lambda *a: 1.01 * entering(*a))
    found = Patcher(target, PROMPTS, From(model=source))
    assert error(found.logits("2.attn_out"), whole) < 1e-5
    assert len(found.notes) == 2
    assert "cannot start at a patched block here (relative error" in found.notes[1]


def test_several_sites_run_in_one_pass_as_they_do_alone(
    lineage: tuple[HookedModel, HookedModel],
) -> None:
    target, source = lineage
    cells = [Cell((Site(n, "head_out", h),)) for n in (1, 2) for h in range(4)]
    together = Patcher(target, PROMPTS[:3], From(model=source), batch_size=32).run(cells)
    apart = Patcher(target, PROMPTS[:3], From(model=source), batch_size=3).run(cells)
    assert all(error(a, b) < 1e-5 for a, b in zip(together, apart, strict=True))
    assert all(error(a, b) > 1e-5 for a, b in itertools.combinations(together, 2))


def test_little_memory_gives_the_same(
    lineage: tuple[HookedModel, HookedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, source = lineage
    cells = [Cell((Site(n, "head_out", h),)) for n in (2, 1, 0) for h in range(4)]
    want = Patcher(target, PROMPTS, From(model=source)).measure(cells, METRIC)
    monkeypatch.setattr(patchers, "HELD", 1)
    loads: list[int] = []
    load = Patcher._load
    monkeypatch.setattr(Patcher, "_load", lambda s, c: loads.append(len(c)) or load(s, c))
    found = Patcher(target, PROMPTS, From(model=source))
    assert torch.equal(found.measure(cells, METRIC), want)
    assert loads == [4, 4, 4]


def test_means_zeros_and_resampled_values() -> None:
    model = tiny_lineage.hooked("one")
    rows = Patcher(model, CLEAN, From(prompts=tuple(CORRUPT))).runs.read([Site(1, "mlp_out")])
    stacked = torch.stack(rows[Site(1, "mlp_out")]).double()
    mean = Patcher(model, CORRUPT, Mean(tuple(CLEAN))).values.at([Site(1, "mlp_out")])
    assert torch.allclose(mean[Site(1, "mlp_out")][3][2].double(), stacked.mean((0, 1)), atol=1e-6)
    place = Patcher(model, CORRUPT, Mean(tuple(CLEAN), by_position=True))
    found = place.values.at([Site(1, "mlp_out")])[Site(1, "mlp_out")]
    assert torch.allclose(found[3].double(), stacked.mean(0), atol=1e-6)
    zero = Patcher(model, CLEAN, Zero()).values.at([Site(1, "head_out")])
    assert zero[Site(1, "head_out")][0].shape == (len(rows[Site(1, "mlp_out")][0]), 4, 16)
    assert not zero[Site(1, "head_out")][0].any()
    topics = tuple(str(i // 2) for i in range(20))
    drawn = Patcher(model, CLEAN, Resampled(From(), topics)).alignment
    assert all(i // 2 != j // 2 for i, j in enumerate(drawn.partner))
    assert drawn.target == drawn.source
    assert Patcher(model, CLEAN, Resampled(From(), seed=1)).alignment.partner != drawn.partner


def test_the_result_says_what_it_found(lineage: tuple[HookedModel, HookedModel], tmp_path) -> None:
    target, source = lineage
    prompts = tiny.words(24, seed=8)
    metric = LogitDifference((20,) * 24, (21,) * 24)
    result = patch(
        target, prompts, From(model=source), "2.resid_post", metric, draws=6, progress=False
    )
    assert torch.equal(result.patched, result.source)
    assert result.share.tolist() == pytest.approx([1, 1, 1])
    assert torch.allclose(result.normalised, torch.ones(24, dtype=torch.float64))
    assert result.notes == (
        "The gap is not told from 0 over 24 topics: limits of its shares are rough.",
    )
    assert float(result.change[0]) == pytest.approx(result.gap, rel=1e-5)
    again = Patched.load(result.save(tmp_path / "patched"))
    assert str(again) == str(result)
    assert again.frame().equals(result.frame())
    ax = result.plot()
    assert "logits" in ax.get_ylabel() and ax.get_legend() is not None
    nothing = patch(target, prompts, Zero(), "1.mlp_out", METRIC, null=None, progress=False)
    assert nothing.share.isnan().all() and nothing.source.isnan().all()
    assert "of the gap" not in str(nothing) and not len(nothing.null_change)
    other = patch(
        target, prompts, From(model=source), "2.mlp_out", METRIC, null="prompts", draws=4,
        progress=False,
    )  # fmt: skip
    assert len(other.null_change) == 4 and other.null_kind == "other prompts"
    assert len(set(other.null_change.tolist())) == 4


def test_nulls_are_as_many_other_sites() -> None:
    found = Patcher(tiny_lineage.hooked("one"), PROMPTS, Zero())
    chosen = found.checked(["1.head_out.0", "1.head_out.3", "0.mlp_out"])
    drawn = random_cells(found, chosen, 40, seed=3)
    for cell in drawn:
        heads = [s for s in cell.sites if s.part == "head_out"]
        assert len(heads) == 2 and len(cell.sites) == 3 and not set(cell.sites) & set(chosen)
    assert len({cell.sites for cell in drawn}) > 20
    assert random_cells(found, found.checked("all.mlp_out"), 5, seed=0) == []
