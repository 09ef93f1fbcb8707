"""Differences of checkpoints: from memory, shards and adapters, against transformers and PEFT."""

import json
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors
import tiny_lineage
import torch
from architectures import build
from safetensors.torch import load_file, save_file
from torch import Tensor

from analyses.subspaces.adapters import LowRank, read_lora
from analyses.subspaces.deltas import Deltas, changes, difference, together
from analyses.subspaces.grouping import grouped, place, ratio_over
from analyses.subspaces.projections import along, dense, fourth, inner, square
from analyses.subspaces.sources import open_source
from probes import names
from probes.scores import bca_bootstrap


def adapter(folder: Path, seed: int, model: str = "llama", **settings: Any) -> str:
    """A LoRA with random factors, saved as PEFT saves it."""
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    wrapped = peft.get_peft_model(build(model), peft.LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


def expanded(deltas: Deltas) -> dict[str, Tensor]:
    return {name: dense(deltas[name]) for name in deltas}


def by_hand(a: Any, b: Any) -> dict[str, Tensor]:
    """Plain subtraction of state dicts."""
    other = b.state_dict()
    return {name: weight.double() - other[name].double() for name, weight in a.state_dict().items()}


@pytest.fixture
def base(tmp_path: Path) -> str:
    return tiny_lineage.save(tmp_path / "base")


def test_folders_are_read_as_the_models_in_memory(base: str, tmp_path: Path) -> None:
    tuned = tiny_lineage.save(tmp_path / "tuned", 1)
    wanted = by_hand(tiny_lineage.weights(1), tiny_lineage.weights())
    memory = difference(tiny_lineage.weights(1), tiny_lineage.weights())
    disk = difference(tuned, Path(base))
    for found in (memory, disk):
        assert set(found) == set(wanted)
        assert not found.factored
        for name, value in expanded(found).items():
            assert value.dtype == torch.float32
            assert torch.allclose(value.double(), wanted[name], atol=1e-7)
    assert str(disk) == "tuned - base"
    assert all(torch.equal(dense(disk[name]), dense(memory[name])) for name in disk)
    same = difference(tuned, tuned)
    assert all(not dense(same[name]).any() for name in same)
    with pytest.raises(KeyError, match="no weight 'x'"):
        same["x"]


def sharded(folder: Path, first_changed: int | None = None) -> Path:
    tiny_lineage.weights(first_changed).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_shards_are_streamed_one_weight_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = sharded(tmp_path / "a", 0), sharded(tmp_path / "b")
    real, alive, most = safetensors.safe_open, [], []

    class Spy:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = real(path, framework)

        def __enter__(self) -> Any:
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def get_tensor(self, name: str) -> Tensor:
            found = self.inner.get_tensor(name)
            alive.append((name, weakref.ref(found)))
            most.append({n for n, ref in alive if ref() is not None})
            return found

    monkeypatch.setattr(safetensors, "safe_open", Spy)
    V, U = difference(a, b), difference(b, a)
    assert not most  # opening reads names and shapes only
    total = 0.0
    listed = together(V, U)
    for _, (v, u) in changes(listed, V, U):
        total += square(v) - square(u)
    assert total == 0
    assert len(most) == 4 * len(listed)
    assert max(map(len, most)) == 1
    wanted = by_hand(tiny_lineage.weights(0), tiny_lineage.weights())
    assert all(torch.allclose(V[name].double(), wanted[name], atol=1e-7) for name in V)  # type: ignore[union-attr]


SETTINGS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 1}},
    {"target_modules": ["embed_tokens", "v_proj"]},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_factors_are_what_peft_merges(base: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    first = adapter(tmp_path / "first", 1, **settings)
    second = adapter(tmp_path / "second", 2, **settings)
    merged = [names.merge(build("llama"), folder) for folder in (first, second)]
    V, U = difference(f"{base}+{first}", base), difference(f"{base}+{second}", f"{base}+{first}")
    assert V.factored and U.factored
    for found, wanted in (
        (V, by_hand(merged[0], build("llama"))),
        (U, by_hand(merged[1], merged[0])),
    ):
        assert set(found) == set(wanted)
        assert any(square(found[name]) for name in found)
        for name in found:
            assert torch.allclose(dense(found[name]).double(), wanted[name], atol=2e-6), name


def test_an_adapter_of_gpt2_keeps_its_weights_transposed(tmp_path: Path) -> None:
    given = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    folder = adapter(tmp_path / "a", 1, "gpt2", **given)
    wanted = by_hand(names.merge(build("gpt2"), folder), build("gpt2"))
    found, _ = read_lora(folder)
    assert found and all(
        torch.allclose(low.dense(), wanted[name], atol=2e-6) for name, low in found.items()
    )


def test_adapters_alone_are_their_difference(base: str, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first", 1), adapter(tmp_path / "second", 2)
    alone = difference(second, first)
    whole = difference(f"{base}+{second}", f"{base}+{first}")
    assert alone.partial and not whole.partial
    assert len(alone.shapes) == 6
    assert together(alone, whole) == list(whole)
    for _, (a, w) in changes(together(alone, whole), alone, whole):
        assert torch.equal(dense(a), dense(w))


def test_an_adapter_on_a_full_checkpoint_of_another_name_is_added(
    base: str, tmp_path: Path
) -> None:
    tuned = tiny_lineage.save(tmp_path / "tuned", 0)
    folder = adapter(tmp_path / "a", 1)
    found = difference(f"{tuned}+{folder}", base)
    wanted = by_hand(names.merge(tiny_lineage.weights(0), folder), build("llama"))
    assert all(torch.allclose(dense(found[n]).double(), wanted[n], atol=2e-6) for n in found)


def test_factored_arithmetic_is_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(4, 12, 3, generator=generator).double()
    a, b = LowRank(L[0], L[1, :8].T), LowRank(L[2], L[3, :8].T)
    A, B = a.dense(), b.dense()
    assert torch.allclose(a.minus(b).dense(), A - B)
    Q = torch.linalg.qr(torch.randn(12, 5, generator=generator).double()).Q
    for one, other in ((a, b), (A, b), (a, B), (A, B)):
        assert inner(one, other) == pytest.approx(float((A * B).sum()))
    for one in (a, A):
        assert square(one) == pytest.approx(float(A.square().sum()))
        assert fourth(one) == pytest.approx(float(torch.linalg.svdvals(A).pow(4).sum()))
        assert torch.allclose(along(Q, one), (Q.T @ A).square().sum(1))
    assert fourth(A.T.contiguous()) == pytest.approx(fourth(A))
    zero = LowRank.zeros(12, 8)
    assert square(zero) == 0 and torch.equal(a.minus(zero).dense(), A)


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    model = build("gemma2")
    assert model.config.tie_word_embeddings
    memory = open_source(model)
    assert memory.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    model.save_pretrained(tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    held = load_file(file)
    assert set(open_source(tmp_path / "tied").shapes) == set(memory.shapes)
    # some files hold the tied weight all the same
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, file, metadata={"format": "pt"})
    stored = open_source(tmp_path / "tied")
    assert set(stored.shapes) == set(memory.shapes)
    assert "lm_head.weight" in stored.tied
    config = tmp_path / "tied" / "config.json"
    written = json.loads(config.read_text())
    written.pop("tie_word_embeddings", None)  # the default of the architecture
    config.write_text(json.dumps(written))
    assert "lm_head.weight" in open_source(tmp_path / "tied").tied
    config.write_text(json.dumps({**written, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="tied to model.embed_tokens.weight in .* of its own in"):
        difference(tmp_path / "tied", model)


def test_vocabularies_are_cut_to_the_common_rows_with_a_note() -> None:
    large, small = tiny_lineage.weights(0, vocab=216), tiny_lineage.weights()
    found = difference(large, small)
    assert found.shapes["lm_head.weight"] == (200, 64)
    assert dense(found["model.embed_tokens.weight"]).shape == (200, 64)
    assert "lm_head.weight has 216 and 200 rows" in found.notes[0]
    wanted = large.lm_head.weight[:200] - small.lm_head.weight
    assert torch.allclose(dense(difference(small, large)["lm_head.weight"]), -wanted, atol=1e-7)


def test_what_does_not_belong_together_is_refused_by_name(base: str, tmp_path: Path) -> None:
    bias = build("llama")
    bias.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no weight 'extra'"):
        difference(bias, build("llama"))
    other = build("llama")
    other.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(7,\) in"):
        difference(other, build("llama"))
    first, second = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    twin = tiny_lineage.save(tmp_path / "twin")
    with pytest.raises(ValueError, match=r"adapters are subtracted when they have one base"):
        difference(f"{base}+{first}", f"{twin}+{second}")
    with pytest.raises(ValueError, match="give MODEL.ADAPTER on the same MODEL"):
        difference(first, base)
    nan = build("llama")
    nan.model.norm.weight.data[2] = torch.nan
    found = difference(nan, build("llama"))
    with pytest.raises(ValueError, match="model.norm.weight of .* NaN or infinite"):
        found["model.norm.weight"]
    config = Path(twin) / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "quantization_config": {"a": 1}})
    )
    with pytest.raises(ValueError, match="weights in twin are quantised"):
        difference(twin, base)
    index = sharded(tmp_path / "shards")
    next(index.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of its shards"):
        difference(index, base)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "DoRA rescales"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
        ({"bias": "lora_only"}, "it trains biases"),
    ],
)
def test_adapters_that_are_more_than_a_product_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    folder = adapter(tmp_path / "odd", 1, **settings)
    with pytest.raises(ValueError, match=f"the adapter odd is more than.*{said}"):
        read_lora(folder)


def test_adapters_of_another_shape_or_kind_are_refused(base: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", 1)
    file = tmp_path / "a" / "adapter_model.safetensors"
    held = load_file(file)
    name = next(key for key in held if "lora_B" in key)
    save_file({**held, name: held[name][:9].clone()}, file)
    with pytest.raises(ValueError, match="and the model has .* there: give the adapter its own"):
        difference(f"{base}+{folder}", base)
    save_file({key: value for key, value in held.items() if key != name}, file)
    with pytest.raises(ValueError, match="no matching pair of factors"):
        read_lora(folder)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="is of kind IA3, expected LORA"):
        read_lora(folder)
    with pytest.raises(ValueError, match="is no LoRA adapter"):
        read_lora(tmp_path)


def test_places_are_layers_and_module_types() -> None:
    assert place("model.layers.3.mlp.up_proj.weight") == (3, "mlp.up_proj")
    assert place("transformer.h.11.attn.c_attn.bias") == (11, "attn.c_attn.bias")
    assert place("model.norm.weight") == (None, "model.norm")
    listed = ["a.0.q.weight", "a.0.v.weight", "a.1.q.weight", "norm.weight"]
    assert grouped(listed, "layer") == {"0": [0, 1], "1": [2], "none": [3]}
    assert grouped(listed, "kind") == {"q": [0, 2], "v": [1], "norm": [3]}


def test_intervals_over_groups_are_those_of_the_plain_bootstrap() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.rand(2, 30, generator=generator)
    groups = [f"{i // 3}" for i in range(30)]
    wanted = bca_bootstrap(lambda i: float(a[i].sum() / b[i].sum()), groups, resamples=1000)
    assert ratio_over(a, b, groups) == pytest.approx(wanted, rel=1e-6)
    assert ratio_over(0 * a, b, groups) == (0.0, 0.0, 0.0)
    assert all(x != x for x in ratio_over(a, b, ["one"] * 30)[1:])


@pytest.mark.slow
def test_the_built_in_lineage_is_factored_and_exact() -> None:
    from probes import HookedModel

    V = difference("builtin:aligned", "builtin:base")
    assert V.factored and len(V.shapes) == 272
    touched = [name for name in V if square(V[name])]
    assert len(touched) == 40
    assert {place(name)[0] for name in touched} == set(range(10, 30))
    loaded = [HookedModel.load(f"builtin:{n}", device="cpu") for n in ("aligned", "base")]
    merged = difference(*loaded)
    for name in (*touched[:2], "model.layers.3.mlp.up_proj.weight"):
        off = (dense(merged[name]) - dense(V[name])).norm()
        assert off <= 1e-4 * dense(V[name]).norm()
