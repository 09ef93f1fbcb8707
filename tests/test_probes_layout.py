"""The layout found in a model's modules: sums close, heads are where they are said to be."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, EXTRA, ORDINARY_TOKENS, build
from torch import Tensor, nn

from probes import HookedModel
from probes.engines import Batch, Edit
from probes.engines.hooks import HookEngine
from probes.layout import Layout, resolve
from probes.sites import PARTS, Site, Unsupported
from steering import Origin, SteeringVector, steer

EVERY = [*ARCHITECTURES, *EXTRA]
every_architecture = pytest.mark.parametrize("name", EVERY)

_LLAMA = ("model.layers", "self_attn", "mlp")
_POST_NORMS = ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm")
_INNER_POST_NORMS = ("model.language_model.layers", *_POST_NORMS[1:])
WRITERS = {
    **dict.fromkeys(EVERY, _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3-text", "gemma4-text", "olmo2"), _POST_NORMS),
    **dict.fromkeys(("gemma4-conditional", "gemma3-conditional"), _INNER_POST_NORMS),
    "phi3": ("model.layers", "resid_attn_dropout", "mlp"),
    "gpt2": ("transformer.h", "attn", "mlp"),
    **dict.fromkeys(
        ("gpt-neox", "gpt-neox-sequential"),
        ("gpt_neox.layers", "post_attention_dropout", "post_mlp_dropout"),
    ),
    "opt": ("model.decoder.layers", "self_attn", "fc2"),
    **dict.fromkeys(
        ("falcon", "falcon-7b", "falcon-mha"), ("transformer.h", "self_attention", "mlp")
    ),
    "mamba": ("backbone.layers", "mixer", None),
    "jamba": ("model.layers", "mamba|self_attn", "feed_forward"),
    "qwen3-next": ("model.layers", "linear_attn|self_attn", "mlp"),
}
"""Block list, and in a block what writes to the stream after attention and MLP: read off the
models' source by a person (a dropout behind it does nothing in evaluation mode)."""


@cache
def engine(name: str) -> HookEngine:
    model = build(name)
    return HookEngine(model, resolve(model))


def tokens(rows: int = 2, length: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(3)
    low, high = ORDINARY_TOKENS[0], ORDINARY_TOKENS[-1]
    ids = torch.randint(low, high, (rows, length), generator=generator)
    return Batch(ids, torch.ones_like(ids))


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).double().norm() / b.double().norm()).item()


@every_architecture
def test_the_layout_is_the_one_in_the_source(name: str) -> None:
    layout = engine(name).layout
    layers, attention, mlp = WRITERS[name]
    for i, block in enumerate(layout.blocks):
        assert block.path == f"{layers}.{i}"
        wrote = block.points["attn_out"].path
        assert wrote in [f"{block.path}.{one}" for one in attention.split("|")]
        if mlp is None:
            assert "mlp_out" in block.refused
        else:
            assert block.points["mlp_out"].path == f"{block.path}.{mlp}"
        assert block.points["attn_out"].scale == (0.6 if name == "granite" else 1.0)
        assert block.points.keys() | {"pattern", "remainder"} | block.refused.keys() == set(PARTS)
    assert layout.d_model == 64
    assert layout.n_layers == engine(name).model.config.get_text_config().num_hidden_layers
    assert layout.shares_prefix == (name not in ("mamba", "jamba", "qwen3-next"))


@every_architecture
def test_the_residual_sum_closes(name: str) -> None:
    run = engine(name)
    for layer, block in enumerate(run.layout.blocks):
        parts = [p for p in ("attn_out", "mlp_out") if p not in block.refused]
        sites = [Site(layer, part) for part in ("resid_pre", *parts, "resid_post", "remainder")]
        pre, *added, post, remainder = run.read(tokens(), sites).values()
        assert torch.equal(remainder, post - pre - added[0] - sum(added[1:]))
        if block.sums:
            assert error(pre + sum(added), post) < 1e-6
            # negative controls: every term is needed
            for i in range(len(added)):
                assert error(pre + sum(added[:i] + added[i + 1 :]), post) > 1e-3
        else:
            assert name.startswith("gemma4")
            assert error(pre + sum(added), post) > 1e-3


@every_architecture
def test_the_stream_is_handed_on(name: str) -> None:
    run = engine(name)
    for layer in range(run.layout.n_layers - 1):
        post, pre = run.read(tokens(), [Site(layer, "resid_post"), Site(layer + 1, "resid_pre")])
        seen = run.read(tokens(), [post, pre])
        assert torch.equal(seen[post], seen[pre])
    for layer in run.layout.supported("resid_mid"):
        sites = [Site(layer, part) for part in ("resid_mid", "resid_pre", "attn_out")]
        mid, pre_, attn = run.read(tokens(), sites).values()
        assert error(pre_ + attn, mid) < 1e-6


@pytest.mark.parametrize("name", ["gemma4-text", "gemma4-conditional"])
def test_the_remainder_of_gemma4_is_its_third_term_and_scale(name: str) -> None:
    run = engine(name)
    batch = tokens()
    for layer, block in enumerate(run.layout.blocks):
        module = run.model.get_submodule(block.path)
        third: list[Tensor] = []
        handle = module.post_per_layer_input_norm.register_forward_hook(
            lambda _m, _a, out, third=third: third.append(out)
        )
        try:
            sites = [Site(layer, p) for p in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
            run.read(batch, sites)
        finally:
            handle.remove()
        seen = run.read(batch, [*sites, Site(layer, "remainder")])
        pre, attn, mlp, post, remainder = seen.values()
        scale = module.layer_scalar
        assert error(scale * (pre + attn + mlp + third[0]), post) < 1e-6
        assert error((scale - 1) * (pre + attn + mlp) + scale * third[0], remainder) < 1e-5


@every_architecture
def test_the_output_projection_of_the_heads_is_the_attention_output(name: str) -> None:
    run = engine(name)
    for layer in run.layout.supported("head_out"):
        block = run.layout.blocks[layer]
        out: list[Tensor] = []
        attention = run.model.get_submodule(block.attention)
        handle = attention.register_forward_hook(lambda _m, _a, o, out=out: out.append(o[0]))
        try:
            run.logits(tokens())
        finally:
            handle.remove()
        site = Site(layer, "head_out")
        heads = run.read(tokens(), [site])[site]
        assert heads.shape[2:] == (block.heads["head_out"], run.layout.width(site))
        project = run.model.get_submodule(block.points["head_out"].path)
        with torch.no_grad():
            assert error(project(heads.flatten(2)), out[0]) < 1e-6
            assert error(project(heads.flip(2).flatten(2)), out[0]) > 1e-2  # order matters


@every_architecture
@pytest.mark.parametrize("part", ["q", "k", "v", "head_out"])
def test_a_head_is_edited_alone(name: str, part: str) -> None:
    """An edit of one head leaves the other heads, and reaches exactly the heads that use it.

    Queries and keys decide the pattern, values and gates do not.
    """
    run = engine(name)
    layers = run.layout.supported(part)
    for layer in {*layers[:1], *layers[-1:]}:
        n = run.layout.blocks[layer].heads[part]
        n_queries = run.layout.blocks[layer].heads["head_out"]
        whole, outputs, pattern = (Site(layer, p) for p in (part, "head_out", "pattern"))
        before = run.read(tokens(), [whole, outputs, pattern])
        for head in {0, n - 1}:
            site = Site(layer, part, head)
            assert torch.equal(run.read(tokens(), [site])[site], before[whole][:, :, head])
            with run.edit([Edit(site, lambda h, _: 1.5 - 2 * h)]):
                after = run.read(tokens(), [whole, outputs, pattern])
            attends = (after[pattern] - before[pattern]).abs().max() > 1e-3
            assert attends == (part in ("q", "k"))
            others = [i for i in range(n) if i != head]
            assert torch.equal(after[whole][:, :, others], before[whole][:, :, others])
            assert torch.equal(after[whole][:, :, head], 1.5 - 2 * before[whole][:, :, head])
            if name == "olmo2" and part in ("q", "k"):
                continue  # normalised over all heads together
            moved = (after[outputs] - before[outputs]).abs().amax((0, 1, 3))
            scale = before[outputs].abs().max()
            group = n_queries // n
            users = set(range(head * group, (head + 1) * group))
            assert {i for i in range(n_queries) if moved[i] > 1e-3 * scale} == users
            unmoved = [i for i in range(n_queries) if i not in users]
            assert moved[unmoved].max() < 1e-6 * scale if unmoved else True


@every_architecture
def test_resolving_leaves_the_model_alone_and_is_repeatable(name: str) -> None:
    model = build(name)

    def hooks() -> list[tuple[int, int]]:
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before, state = hooks(), {k: v.clone() for k, v in model.state_dict().items()}
    first, second = resolve(model), resolve(model)
    assert first == second
    assert hooks() == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@every_architecture
def test_bfloat16_gives_the_same_layout(name: str) -> None:
    assert resolve(build(name).bfloat16()) == engine(name).layout


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@HALVES
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2", "olmo2"])
@pytest.mark.parametrize("size", [0.01, 30.0, 100.0])
def test_half_precision_finds_what_adds_little_beside_a_large_stream(
    name: str, size: float, dtype: torch.dtype
) -> None:
    """In real models blocks add a few percent to the stream, which is close to nothing in bfloat16;
    a small embedding is the other end: the stream is nearly what attention adds to it."""

    def scaled() -> nn.Module:
        model = build(name)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(size)
        return model

    whole = resolve(scaled())
    assert whole == engine(name).layout  # the size decides nothing in float32
    assert resolve(scaled().to(dtype)) == whole


def test_attention_that_gives_nothing_still_has_a_middle() -> None:
    """Blocks put in with weights of 0, whose stream before and after attention is the same."""

    def silence(model: nn.Module) -> None:
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight.zero_()

    assert resolve(llama_with(silence)) == engine("llama").layout


@HALVES
def test_a_real_model_has_one_layout_in_every_dtype(dtype: torch.dtype, base: HookedModel) -> None:
    """The aligned model: its MLPs at layers 3 to 7 add less than 12 % to their stream."""
    half = HookedModel.load("builtin:aligned", device="cpu", dtype=dtype)
    assert half.layout == base.layout
    assert half.layout.supported("mlp_out") == tuple(range(30))
    before = [block.points["resid_mid"].path for block in half.layout.blocks]
    assert before == [f"model.layers.{i}.post_attention_layernorm" for i in range(30)]
    if dtype == torch.float16:
        return
    unit = torch.randn(half.d_model, generator=torch.Generator().manual_seed(0))
    unit = unit / unit.norm()
    vector = SteeringVector({Site(15, "resid_post"): unit}, Origin.of(half))
    sites = [Site(layer, "resid_post") for layer in range(30)]

    def residue() -> float:
        read = half.engine.read(tokens(), sites).values()
        return max(float(((h.float() @ unit).abs() / h.float().norm(dim=-1)).max()) for h in read)

    with steer(half, vector.everywhere(half)):
        assert residue() < 2 * torch.finfo(dtype).eps
    assert residue() > 0.02  # the control


def test_live_adapters_do_not_hide_the_layout() -> None:
    from peft import LoraConfig, get_peft_model

    plain = build("llama")
    wrapped = get_peft_model(
        build("llama"),
        LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False),
    ).eval()
    found, expected = resolve(wrapped.get_base_model()), resolve(plain)
    assert [b.heads for b in found.blocks] == [b.heads for b in expected.blocks]
    assert [b.sums for b in found.blocks] == [True] * 3


def llama_with(change: Callable[[nn.Module], None]) -> nn.Module:
    model = build("llama")
    change(model)
    return model


class _Mixing(nn.Module):
    """A block that mixes nothing and names nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(64, 64)

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states + self.core(hidden_states)


class _Projection(nn.Module):
    """A linear map that does not say its sizes."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.held = [inner]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)


def _double(model: nn.Module) -> None:
    model.model.layers[1].register_forward_hook(lambda _m, _a, out: out * 2)


def _strange_block(model: nn.Module) -> None:
    model.model.layers[1] = _Mixing()


def _strange_projection(model: nn.Module) -> None:
    attention = model.model.layers[0].self_attn
    attention.o_proj = _Projection(attention.o_proj)


def _no_layers(model: nn.Module) -> None:
    model.model.layers = nn.ModuleList()


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (_double, ("residual sum of model.layers.1 does not close", "self_attn: LlamaAttention")),
        (_strange_block, ("cannot find the attention of model.layers.1", "core: Linear")),
        (
            _strange_projection,
            ("cannot find the output projection of model.layers.0.self_attn", "o_proj: _Proj"),
        ),
        (
            _no_layers,
            (
                "cannot find the decoder blocks of LlamaForCausalLM",
                "its lists are model.layers (0)",
            ),
        ),
    ],
)
def test_what_cannot_be_resolved_is_shown(
    change: Callable[[nn.Module], None], messages: tuple[str, ...]
) -> None:
    with pytest.raises(Unsupported) as caught:
        resolve(llama_with(change))
    for message in messages:
        assert message in str(caught.value)


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(Unsupported, match="T5ForConditionalGeneration is an encoder-decoder"):
        resolve(model)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="training mode, where dropout changes values: call"):
        resolve(build("llama").train())


def test_refusals_say_why() -> None:
    def message(name: str, site: Site) -> str:
        with pytest.raises(ValueError) as caught:
            layout(name).check(site)
        return str(caught.value)

    def layout(name: str) -> Layout:
        return engine(name).layout

    assert "1.mlp_out does not exist here: the blocks of MambaForCausalLM have one mixer" in (
        message("mamba", Site(1, "mlp_out"))
    )
    assert "MambaMixer, which has no attention heads" in message("mamba", Site(0, "head_out"))
    assert "runs attention and MLP in parallel" in message("gpt-neox", Site(0, "resid_mid"))
    assert "compressed latent" in message("deepseek-v3", Site(0, "k"))
    assert "no projection that gives k alone" in message("gemma4-text", Site(3, "k"))
    assert "layer 1 has 2 heads of k, 0 to 1" in message("llama", Site(1, "k", 2))
    assert "resolve -1.resid_post with `layout.sites` first" in (
        message("llama", Site(-1, "resid_post"))
    )
    assert "out of range" in message("llama", Site(3, "resid_post"))
    assert layout("jamba").supported("head_out") == (1, 3)
    with pytest.raises(Unsupported, match=r"0\.head_out does not exist here"):
        layout("jamba").sites("all.head_out")
