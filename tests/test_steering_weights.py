"""Edits of weights equal the same edits of activations, on every architecture where they can."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, EXTRA, build
from tiny import hooked, tokenizer
from torch import Tensor, nn

from probes import HookedModel, Site, capture
from probes.engines import ENGINES, Batch
from probes.sites import Unsupported
from steering import HeadOffsets, Origin, SteeringVector, steer
from steering.copies import TOLERANCE, Agreement, agreement
from steering.edits import Scale
from steering.weights import fold_offsets, fold_vector, orthogonalise
from steering.writers import Writers, check_plain

POST_NORMS = {
    "gemma2",
    "gemma3-text",
    "gemma3-conditional",
    "gemma4-text",
    "gemma4-conditional",
    "olmo2",
}
DIRECT = sorted({*ARCHITECTURES, *EXTRA} - POST_NORMS)
HEADS = sorted({*ARCHITECTURES, *EXTRA} - {"mamba"})
KINDS = ("llama", "gpt2", "gpt-neox", "granite", "gpt-oss", "mamba", "jamba")
PARTS = ("resid_pre", "resid_mid", "attn_out", "mlp_out")
NO_BIAS = {"qwen3-moe", "mixtral", "deepseek-v3", "jamba", "qwen3-next"}
"""Mixtures of experts without biases, in layers 1 or 0."""


def drawn(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vector_at(model: HookedModel, site: str, size: float = 3.0) -> SteeringVector:
    return SteeringVector({Site.parse(site): drawn(model.d_model, size=size)}, Origin.of(model))


def weights_of(model: HookedModel) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.model.state_dict().items()}


def assert_same(model: HookedModel, before: dict[str, Tensor]) -> None:
    after = model.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def batch() -> Batch:
    ids = torch.randint(3, 190, (3, 11), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return Batch(ids, mask)


def logits(model: HookedModel) -> Tensor:
    return model.engine.logits(batch())[batch().mask.bool()]


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@pytest.mark.parametrize("name", DIRECT)
def test_orthogonal_weights_equal_ablation_everywhere(name: str) -> None:
    model = hooked(name)
    before, config = weights_of(model), str(model.model.config)
    vector = vector_at(model, "1.resid_post")
    plain = logits(model)
    with steer(model, vector.everywhere(model)):
        live = logits(model)
    edited = orthogonalise(model, vector)
    assert distance(logits(edited), live) < 5e-5
    assert distance(live, plain) > 0.1
    assert_same(model, before)
    assert str(model.model.config) == config
    assert torch.equal(logits(model), plain)
    assert edited.fingerprint != model.fingerprint


@pytest.mark.parametrize("name", [*KINDS, "qwen3-next", "deepseek-v3"])
def test_a_subspace_and_a_share_of_it(name: str) -> None:
    model = hooked(name)
    rows = drawn(3, model.d_model)
    basis = SteeringVector({Site(0, "resid_pre"): rows}, Origin.of(model), "ablate")
    with steer(model, basis.everywhere(model), 0.5):
        live = logits(model)
    assert distance(logits(orthogonalise(model, rows, 0.5)), live) < 5e-5


@pytest.mark.parametrize("name", [*KINDS, "opt", "falcon"])
def test_the_edited_stream_never_holds_the_vector(name: str) -> None:
    model = hooked(name)
    unit = drawn(model.d_model)
    unit = unit / unit.norm()
    edited = orthogonalise(model, unit)
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    sites.append(Site(0, "resid_pre"))
    for site, h in edited.engine.read(batch(), sites).items():
        share = (h @ unit).abs() / h.norm(dim=-1)
        assert float(share[batch().mask.bool()].max()) < 1e-5, site
    held = model.engine.read(batch(), sites)[sites[0]]
    assert float(((held @ unit).abs() / held.norm(dim=-1)).max()) > 0.05  # the control


def test_scale_and_sign_of_the_vector_do_not_matter_and_twice_is_once() -> None:
    model, unit = hooked(), drawn(64)
    once = orthogonalise(model, unit)
    other, twice = orthogonalise(model, -7.5 * unit), orthogonalise(once, unit)
    assert distance(logits(other), logits(once)) < 1e-5
    assert distance(logits(twice), logits(once)) < 1e-5
    another = orthogonalise(model, drawn(64, seed=1))
    assert distance(logits(another), logits(once)) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "smollm3", "opt", "cohere2", "falcon", "mamba"])
def test_tied_embeddings_part_and_the_unembedding_stays(name: str, tmp_path: Path) -> None:
    model = hooked(name)
    whole: Any = model.model
    assert whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    edited = orthogonalise(model, drawn(64))
    twin: Any = edited.model
    head, embedding = twin.get_output_embeddings().weight, twin.get_input_embeddings().weight
    assert torch.equal(head, whole.get_output_embeddings().weight)
    assert not torch.equal(embedding, head)
    assert head.data_ptr() != whole.get_output_embeddings().weight.data_ptr()
    assert not twin.config.tie_word_embeddings
    assert whole.config.tie_word_embeddings
    twin.save_pretrained(tmp_path / "edited")  # both survive in a checkpoint
    again = type(twin).from_pretrained(tmp_path / "edited").eval()
    assert torch.equal(again.get_output_embeddings().weight, head)
    assert torch.equal(again.get_input_embeddings().weight, embedding)


def test_learned_positions_lose_the_vector_too() -> None:
    unit = drawn(64)
    for name, path in (
        ("gpt2", "transformer.wpe"),
        ("opt", "model.decoder.embed_positions"),
    ):
        edited = orthogonalise(hooked(name), unit).model.get_submodule(path)
        own = hooked(name).model.get_submodule(path)
        assert float((edited.weight @ unit).abs().max()) < 1e-5
        assert float((own.weight @ unit).abs().max()) > 0.1


@pytest.mark.parametrize("name", sorted(POST_NORMS))
def test_post_norms_are_refused_with_the_norm_named(name: str) -> None:
    model = hooked(name)
    before = weights_of(model)
    with pytest.raises(Unsupported, match=r"puts a norm \(.*post_attention_layernorm\).*steer it"):
        orthogonalise(model, drawn(64))
    with pytest.raises(Unsupported, match=r"puts a norm \(.*post_feedforward_layernorm\)"):
        fold_vector(model, vector_at(model, "1.resid_post"))
    assert_same(model, before)


@pytest.mark.parametrize("name", HEADS)
def test_folded_offsets_equal_the_hooks(name: str) -> None:
    """Post-norms are no obstacle here: the bias is added before them, as the offset is."""
    model = hooked(name)
    before = weights_of(model)
    layers = [model.layout.supported("head_out")[i] for i in (0, -1)]
    if name.startswith("gemma4"):  # heads of 24 and of 32: one set of offsets has one width
        layers = layers[:1]
    vectors = {}
    for layer in layers:
        block = model.layout.blocks[layer]
        for head in (0, block.heads["head_out"] - 1):
            vectors[layer, head] = drawn(block.widths["head_out"], seed=head)
    scales = {key: Scale(sigma=0.5) for key in vectors}
    offsets = HeadOffsets(vectors, Origin.of(model), scales)
    plain = logits(model)
    for strength, unit in ((2.0, "raw"), (-8.0, "sigma")):
        with steer(model, offsets, strength, unit=unit):
            live = logits(model)
        assert distance(logits(fold_offsets(model, offsets, strength, unit)), live) < 5e-5
        assert distance(live, plain) > 0.1
    assert_same(model, before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_bias_is_w_o_times_the_offset(name: str) -> None:
    """b = sum_i W_O[:, i] v_i by hand; GPT-2 keeps its weights transposed and has a bias."""
    model = hooked(name)
    v = drawn(16)
    offsets = HeadOffsets({(1, 2): v}, Origin.of(model))
    paths = {"llama": "model.layers.1.self_attn.o_proj", "gpt2": "transformer.h.1.attn.c_proj"}
    module: Any = model.model.get_submodule(paths[name])
    W = module.weight.T if name == "gpt2" else module.weight
    old = module.bias if name == "gpt2" else torch.zeros(64)
    expected = old + 3.0 * sum(W[:, 32 + i] * v[i] for i in range(16))
    edited: Any = fold_offsets(model, offsets, 3.0).model.get_submodule(paths[name])
    torch.testing.assert_close(edited.bias, expected)
    wrong = old.clone()
    wrong[32:48] += 3.0 * v  # in the basis of the heads, as released ITI code has it
    assert float((edited.bias - wrong).norm()) > 0.1 * float(wrong.norm())
    assert name == "gpt2" or module.bias is None  # the caller's got none


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, "resid_post") for name in DIRECT] + [(n, p) for n in KINDS for p in PARTS],
)
def test_folded_vectors_equal_the_hooks_or_are_refused(name: str, part: str) -> None:
    model = hooked(name)
    site = f"1.{part}"
    vector = vector_at(model, site)
    missing = part in model.layout.blocks[1].refused
    block = model.layout.blocks[0 if part == "resid_pre" else 1]
    mlp = (
        model.model.get_submodule(block.points["mlp_out"].path)
        if "mlp_out" in block.points
        else None
    )
    experts = mlp is not None and any("experts" in key for key, _ in mlp.named_parameters())
    through_mlp = part in ("resid_pre", "resid_post", "mlp_out")
    if missing:
        with pytest.raises(Unsupported, match="does not exist here"):
            fold_vector(model, vector)
        return
    if experts and through_mlp and name in NO_BIAS:
        with pytest.raises(Unsupported, match="mixture of experts without biases.*steer live"):
            fold_vector(model, vector)
        return
    before, plain = weights_of(model), logits(model)
    with steer(model, vector, 1.5):
        live = logits(model)
    assert distance(logits(fold_vector(model, vector, 1.5)), live) < 5e-5
    assert distance(live, plain) > 0.1
    assert_same(model, before)


def test_a_head_site_and_several_sites_fold_together() -> None:
    model = hooked("llama-head-dim")
    sites = {
        Site(0, "head_out", 3): drawn(24),
        Site(0, "resid_post"): drawn(64, seed=1),
        Site(1, "resid_pre"): drawn(64, seed=2),
        Site(2, "attn_out"): drawn(64, seed=3),
    }
    vector = SteeringVector(sites, Origin.of(model))
    with steer(model, vector, -0.7, unit="unit"):
        live = logits(model)
    assert distance(logits(fold_vector(model, vector, -0.7, "unit")), live) < 5e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_the_copy_runs_on_the_engine_of_the_original(engine: str) -> None:
    model = HookedModel(build("llama"), tokenizer(), engine=engine)
    before = weights_of(model)
    vector = vector_at(model, "1.resid_post")
    offsets = HeadOffsets({(1, 3): drawn(16)}, Origin.of(model))
    plain = logits(model)
    for edited, live in (
        (orthogonalise(model, vector), vector.everywhere(model).edits(model)),
        (fold_offsets(model, offsets), offsets.edits(model)),
        (fold_vector(model, vector), vector.edits(model)),
    ):
        assert edited.engine.name == engine
        assert edited.template.hash == model.template.hash
        found = agreement(model, live, edited)
        assert found.holds and found.effect > 0.1
    assert_same(model, before)
    assert torch.equal(logits(model), plain)


def test_generation_is_the_same_too(llama: HookedModel) -> None:
    prompts = ["w1 w2 w3", "w9", "w4 w5 w6 w7 w8"]
    vector = vector_at(llama, "1.resid_post", size=2.0)
    edited = fold_vector(llama, vector)
    assert edited.generate_ids(prompts, 8) == llama.generate_ids(prompts, 8, steer=vector)
    assert edited.generate_ids(prompts, 8) != llama.generate_ids(prompts, 8)


def test_strength_0_gives_the_same_bits(llama: HookedModel) -> None:
    vector = vector_at(llama, "1.resid_post")
    offsets = HeadOffsets({(1, 3): drawn(16)}, Origin.of(llama))
    for edited in (
        orthogonalise(llama, vector, 0.0),
        fold_vector(llama, vector, 0.0),
        fold_offsets(llama, offsets, 0.0),
    ):
        assert torch.equal(logits(edited), logits(llama))
        assert edited.model is not llama.model


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, also those that no checkpoint holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-oss", "jamba"])
def test_a_half_precision_copy_is_the_edit_in_float32_rounded_once(
    name: str, dtype: torch.dtype
) -> None:
    half = build(name).to(dtype)
    for module in half.modules():  # as a checkpoint is loaded: frequencies keep their precision
        if hasattr(module, "inv_freq"):
            module.inv_freq = module.inv_freq.float() * 1.0001
    model = HookedModel(half, tokenizer())
    before = {key: t.clone() for key, t in own_tensors(half).items()}
    wide = copy.deepcopy(half)
    for tensor in (*wide.parameters(), *wide.buffers()):
        tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
    whole = HookedModel(wide, tokenizer())
    unit = drawn(model.d_model)
    offsets = HeadOffsets(
        {(1, 0): drawn(model.layout.blocks[1].widths["head_out"])}, Origin.of(model)
    )
    pairs = (
        (orthogonalise(model, unit), orthogonalise(whole, unit)),
        (fold_offsets(model, offsets), fold_offsets(whole, offsets)),
    )
    for edited, exact in pairs:
        found, expected = own_tensors(edited.model), own_tensors(exact.model)
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            kind = before[key].dtype if key in before else dtype  # a bias or head of its own
            assert tensor.dtype == kind, key
            assert torch.equal(tensor, expected[key].to(kind)), key
        tied = [
            m.get_output_embeddings().weight is m.get_input_embeddings().weight
            for m in (edited.model, exact.model)
        ]
        assert tied[0] == tied[1]
        assert edited.dtype == dtype
    after = own_tensors(half)
    assert all(
        torch.equal(after[key], t) and after[key].dtype == t.dtype for key, t in before.items()
    )


def test_correct_edits_of_a_real_model_in_half_precision_are_taken(base: HookedModel) -> None:
    """Rounding alone moves some of these logits by more than an eighth."""
    half = HookedModel.load("builtin:base", device="cpu", dtype="bfloat16")
    sites = [f"{layer}.resid_post" for layer in (8, 14, 24)]
    acts = capture(base, ["Tell me a joke.", "How do I boil an egg?"], sites, progress=False)
    unit_of = {site: acts[site][0] - acts[site][1] for site in sites}
    frequencies = half.model.get_submodule("model.rotary_emb").inv_freq
    for site in sites:
        edited = orthogonalise(half, unit_of[site])
        assert edited.dtype == torch.bfloat16
        kept = edited.model.get_submodule("model.rotary_emb").inv_freq
        assert kept.dtype == torch.float32 and torch.equal(kept, frequencies)
        exact = orthogonalise(base, unit_of[site]).model.get_submodule(
            "model.layers.3.mlp.down_proj"
        )
        rounded = edited.model.get_submodule("model.layers.3.mlp.down_proj")
        assert (
            float((rounded.weight - exact.weight).detach().norm() / exact.weight.detach().norm())
            < 0.003
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_left_undone_is_refused_however_little_it_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HookedModel(build("llama").to(dtype), tokenizer())
    vector, faint = drawn(64), vector_at(model, "1.resid_post", size=1e-3)
    shares = (1.0, 0.01, 5e-5)
    for share in shares:  # the control: done, all of them hold
        orthogonalise(model, vector, share)
    fold_vector(model, faint)
    monkeypatch.setattr("steering.weights._project_out", lambda *_: None)
    monkeypatch.setattr("steering.weights._fold_site", lambda *_: None)
    for share in shares:
        with pytest.raises(RuntimeError, match="differ from the live edit"):
            orthogonalise(model, vector, share)
    with pytest.raises(RuntimeError, match="differ from the live edit"):
        fold_vector(model, faint)


def test_a_copy_that_does_something_else_is_an_error(
    llama: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were an embedding forgotten, the comparison would say so."""
    monkeypatch.setattr(Writers, "embeddings", lambda self: [])
    with pytest.raises(
        RuntimeError, match="differ from the live edit by .*report the architecture"
    ):
        orthogonalise(llama, drawn(64))


def test_what_cannot_be_edited_is_said(llama: HookedModel) -> None:
    origin = Origin.of(llama)
    two = SteeringVector(
        {Site(0, "resid_post"): drawn(64), Site(1, "resid_post"): drawn(64)}, origin
    )
    with pytest.raises(ValueError, match="one vector is taken out .* this has 2"):
        orthogonalise(llama, two)
    with pytest.raises(ValueError, match="width 16, the residual stream of tiny llama 64"):
        orthogonalise(llama, drawn(16))
    with pytest.raises(ValueError, match="lies in the span"):
        orthogonalise(llama, torch.ones(2, 64))
    with pytest.raises(ValueError, match="a bias can add and nothing else, .* 'ablate'"):
        fold_vector(llama, two.doing("ablate"))
    with pytest.raises(Unsupported, match="0.resid_pre is the embedding itself"):
        fold_vector(llama, vector_at(llama, "0.resid_pre"))
    with pytest.raises(Unsupported, match="1.q.0 is no part of the residual stream"):
        fold_vector(llama, SteeringVector({Site(1, "q", 0): drawn(16)}, origin))
    with pytest.raises(ValueError, match="the vectors come from tiny llama .* the model given is"):
        fold_vector(hooked("qwen3"), two)


def test_quantised_offloaded_and_adapted_weights_are_refused() -> None:
    class Linear8bit(nn.Module):  # sizes and no weight of its own, as GPTQ's layers
        in_features = out_features = 64

    model = copy.deepcopy(build("llama"))
    inside: Any = model.get_submodule("model.layers.1.self_attn")
    good = inside.o_proj
    inside.o_proj = Linear8bit()
    with pytest.raises(Unsupported, match=r"o_proj \(Linear8bit\) is quantised, .* then quantise"):
        check_plain(model)
    inside.o_proj = copy.deepcopy(good)
    inside.o_proj.weight = nn.Parameter(good.weight.detach().char(), requires_grad=False)
    with pytest.raises(Unsupported, match=r"o_proj.weight \(int8\) is quantised"):
        check_plain(model)
    inside.o_proj = nn.Linear(64, 64, bias=False, device="meta")
    with pytest.raises(Unsupported, match="o_proj.weight is offloaded"):
        check_plain(model)
    inside.o_proj = copy.deepcopy(good)
    inside.o_proj.base_layer = copy.deepcopy(good)
    with pytest.raises(Unsupported, match="o_proj carries a live adapter: merge it"):
        check_plain(model)


def test_an_agreement_says_its_numbers() -> None:
    found = Agreement(2e-6, TOLERANCE, 0.7)
    assert found.holds and not Agreement(2e-4, TOLERANCE, 0.7).holds
    assert "2.0e-06 of the logits' norm (allowed 1e-04, and half of what" in str(found)
    assert not Agreement(6e-5, TOLERANCE, 6e-5).holds  # as a copy that was not edited
    assert Agreement(2e-5, TOLERANCE, 6e-5).holds
    assert Agreement(8e-7, TOLERANCE, 1e-9).holds  # rounding, beside an edit that does nothing


def test_models_of_half_precision_are_compared_with_their_rounding() -> None:
    model = HookedModel(build("llama").bfloat16(), tokenizer())
    edited = orthogonalise(model, drawn(64))
    vector = SteeringVector({Site(0, "resid_post"): drawn(64)}, Origin.of(model))
    assert agreement(model, vector.everywhere(model).edits(model), edited).holds
    assert not agreement(model, [], edited).holds  # the control: other logits than without


def test_smollm2(base: HookedModel) -> None:
    """Refusal's neighbourhood: one direction out of all weights of a real model, tied embeddings."""
    before = base.model.get_submodule("model.embed_tokens").weight.clone()
    acts = capture(base, ["Tell me a joke.", "How do I boil an egg?"], "15.resid_post")
    h = acts["15.resid_post"]
    vector = SteeringVector({Site(15, "resid_post"): h[0] - h[1]}, Origin.of(base))
    edited = orthogonalise(base, vector)
    found = agreement(base, vector.everywhere(base).edits(base), edited)
    assert found.error < 5e-5 and found.effect > 0.01, str(found)
    offsets = HeadOffsets({(14, 8): drawn(64), (20, 0): drawn(64, seed=1)}, Origin.of(base))
    folded = fold_offsets(base, offsets, 5.0)
    found = agreement(base, offsets.edits(base, 5.0), folded)
    assert found.error < 5e-5 and found.effect > 0.01, str(found)
    assert torch.equal(base.model.get_submodule("model.embed_tokens").weight, before)
    prompts = ["What is the capital of France?"]
    assert folded.generate(prompts, 12) == base.generate(prompts, 12, steer=offsets * 5.0)
