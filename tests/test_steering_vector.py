"""Steering vectors and head offsets as objects: arithmetic, files, and every refusal in words."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import hooked, tokenizer
from torch import Tensor

from probes import HookedModel, Site
from steering import Condition, HeadOffsets, Origin, Schedule, Steering, SteeringVector, steer
from steering.artefact import FORMAT
from steering.edits import Scale, function_of

A, B = Site(1, "resid_post"), Site(2, "attn_out")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def origin(name: str = "llama", **more: str) -> Origin:
    return dataclasses.replace(
        Origin.of(hooked(name), estimator="difference of means", data_hash="abc"), **more
    )


def vector(*sites: Site, seed: int = 0) -> SteeringVector:
    places = sites or (A, B)
    return SteeringVector(
        {site: drawn(64, seed=seed + i) for i, site in enumerate(places)},
        origin(),
        scales={site: Scale(sigma=0.5 + i, norm=8.0) for i, site in enumerate(places)},
    )


def offsets() -> HeadOffsets:
    return HeadOffsets(
        {(2, 0): drawn(16), (0, 3): drawn(16, seed=1)}, origin(), {(2, 0): Scale(sigma=0.25)}
    )


# --- arithmetic ---


def test_sums_join_sites_and_undo_each_other() -> None:
    x, y = vector(A), vector(A, B, seed=5)
    both = x + y
    assert both.sites == (A, B)
    torch.testing.assert_close(both[A], x[A] + y[A])
    assert torch.equal(both[B], y[B])
    torch.testing.assert_close((both - y.at(A))[A], x[A], atol=1e-6, rtol=0)
    torch.testing.assert_close((x - y)[B], -y[B])
    torch.testing.assert_close((y + x)[A], both[A])
    torch.testing.assert_close((2.0 * x)[A], (x + x)[A])
    torch.testing.assert_close((x / 4.0)[A], (0.25 * x)[A])
    assert torch.equal((-x)[A], -x[A])
    assert both.origin.estimator == "difference of means + difference of means"
    assert both.origin.data_hash == ""
    with pytest.raises(ValueError, match="at 2.attn_out of the steering vector is all zero"):
        both - y  # nothing is left there


def test_a_sum_forgets_the_spread_along_another_direction() -> None:
    both = vector(A) + vector(A, seed=5)
    assert both.scales[A] == Scale(norm=8.0)
    with pytest.raises(ValueError, match="strength in 'sigma' needs the sigma of projections at 1"):
        both.edits(hooked(), 1.0, "sigma")
    assert (3.0 * vector(A)).scales[A] == Scale(sigma=0.5, norm=8.0)


def test_vectors_of_other_models_and_operations_do_not_add() -> None:
    other = dataclasses.replace(vector(A), origin=origin("llama-head-dim"))
    with pytest.raises(ValueError, match="cannot add vectors of tiny llama .* different models"):
        vector(A) + other
    with pytest.raises(ValueError, match="cannot subtract vectors for 'add' and 'ablate'"):
        vector(A) - vector(A).doing("ablate")
    with pytest.raises(TypeError, match="cannot add a SteeringVector and a HeadOffsets"):
        vector(A) + offsets()  # pyright: ignore
    with pytest.raises(ValueError, match="cannot be divided by 0"):
        vector(A) / 0.0


def test_units_of_strength_give_the_lengths_they_name() -> None:
    model = hooked()
    ids = model.batch(model.template.render_all(["w1 w2 w3"]))
    plain = model.engine.read(ids, [A])[A]
    v = vector(A)
    for unit, length in (("raw", v.norm(A)), ("unit", 1.0), ("fraction", 8.0), ("sigma", 0.5)):
        with steer(model, v, -3.0, unit=unit):
            moved = model.engine.read(ids, [A])[A] - plain
        norms = moved.norm(dim=-1)
        torch.testing.assert_close(norms, torch.full_like(norms, 3 * length), rtol=1e-4, atol=1e-4)
        cosine = torch.nn.functional.cosine_similarity(moved, v[A], dim=-1)
        torch.testing.assert_close(cosine, torch.full_like(cosine, -1.0))
    with pytest.raises(ValueError, match="unknown unit of strength 'nats': choose raw, unit"):
        v.edits(model, 1.0, "nats")
    with pytest.raises(ValueError, match="'fraction' needs the mean norm of the activations"):
        offsets().edits(model, 1.0, "fraction")
    with pytest.raises(ValueError, match="share of the full operation, 0 to 1, and has no unit"):
        v.doing("ablate").edits(model, 1.0, "sigma")


def test_offsets_scale_and_lie_at_their_heads() -> None:
    found = offsets()
    assert found.heads == ((0, 3), (2, 0))
    assert found.n_parameters == 32
    rows = found.layer(2)
    assert torch.equal(rows[0], drawn(16)) and not rows[1:].any()
    torch.testing.assert_close((-2.0 * found)[0, 3], -2 * drawn(16, seed=1))
    assert not found.layer(1).any()
    length = float(
        HeadOffsets({(2, 0): drawn(16)}, origin(), found.scales).layer(2, "sigma").norm()
    )
    assert abs(length - 0.25) < 1e-6
    with pytest.raises(KeyError, match="no offset at layer 1, head 0"):
        found[1, 0]


def test_subspaces_are_held_as_rows() -> None:
    plane = SteeringVector({A: drawn(2, 64)}, origin(), "ablate")
    assert plane.frame()["rank"].tolist() == [2]
    assert plane.doing("clamp", torch.tensor([1.0, 2.0])).values[A].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="add takes one vector a site, 1.resid_post has 2"):
        plane.doing("add")
    with pytest.raises(ValueError, match="rotate takes a plane, two rows; 1.resid_post has 1"):
        vector(A).doing("rotate", 20.0)
    with pytest.raises(ValueError, match="clamp needs a value at every site"):
        plane.doing("clamp")
    with pytest.raises(ValueError, match="unknown operation 'erase'"):
        plane.doing("erase")
    with pytest.raises(ValueError, match="lies in the span"):
        SteeringVector({A: torch.ones(2, 64)}, origin(), "ablate").edits(hooked())


def test_sites_are_found_by_text_and_everywhere_means_every_write() -> None:
    v = vector(A, B)
    assert torch.equal(v["1.resid_post"], v["-2.resid_post"])
    assert v.at("2.attn_out").sites == (B,)
    with pytest.raises(KeyError, match="no vector at 0.resid_post: there are vectors at 1.resid"):
        v["0.resid_post"]
    everywhere = v.at(A).everywhere(hooked())
    assert len(everywhere.sites) == 1 + 2 * 3 and everywhere.operation == "ablate"
    gemma = hooked("gemma4-text")
    extra = SteeringVector({A: drawn(64)}, Origin.of(gemma)).everywhere(gemma)
    assert Site(3, "resid_post") in extra.sites  # its blocks add a third term
    with pytest.raises(ValueError, match="one vector is ablated everywhere, this has 2"):
        v.everywhere(hooked())
    head = SteeringVector({Site(1, "head_out", 0): drawn(16)}, origin())
    with pytest.raises(ValueError, match="the vector has width 16, the residual stream 64"):
        head.everywhere(hooked())


# --- refusals at the door ---


@pytest.mark.parametrize(
    ("site", "given", "message"),
    [
        (A, drawn(63), r"at 1.resid_post of the steering vector has width 63, .* has 64"),
        (A, torch.zeros(64), "is all zero: it would change nothing"),
        (A, torch.full((64,), torch.nan), "holds 64 values that are NaN or infinite"),
        (Site(3, "resid_post"), drawn(64), "out of range: the model has 3 layers, 0 to 2"),
        (Site(-1, "resid_post"), drawn(64), "site -1.resid_post of .*: give layers counted from 0"),
        (Site(1, "head_out", 4), drawn(16), "out of range: tiny llama has 4 heads of head_out, 0"),
        (Site(1, "k", 2), drawn(16), "out of range: tiny llama has 2 heads of k, 0 to 1"),
        (Site(1, "head_out", 1), drawn(64), "has width 64, but tiny llama has 16 there"),
        (Site(1, "head_out"), drawn(64), "1.head_out has several heads: name one"),
    ],
)
def test_vectors_that_cannot_stand_there(site: Site, given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SteeringVector({site: given}, origin())


def test_other_things_that_are_no_vector() -> None:
    with pytest.raises(ValueError, match="needs a vector at one site at least"):
        SteeringVector({}, origin())
    with pytest.raises(ValueError, match="head offsets need one head at least"):
        HeadOffsets({}, origin())
    with pytest.raises(ValueError, match="2.head_out.4 of the head offsets is out of range"):
        HeadOffsets({(2, 4): drawn(16)}, origin())
    with pytest.raises(ValueError, match="3.head_out.0 is out of range"):
        HeadOffsets({(3, 0): drawn(16)}, origin())
    with pytest.raises(dataclasses.FrozenInstanceError):
        vector().operation = "ablate"  # pyright: ignore
    with pytest.raises(TypeError):
        vector().vectors[A] = drawn(64)  # pyright: ignore


def test_another_model_is_refused_and_another_checkpoint_is_welcome(llama: HookedModel) -> None:
    other = hooked("llama-head-dim")
    for what in (vector(), offsets()):
        with pytest.raises(ValueError, match="the vectors come from tiny llama .* given is tiny"):
            steer(other, what)
    moved = dataclasses.replace(vector(), origin=origin(fingerprint="0" * 64, model="drifted"))
    with steer(llama, moved):
        pass
    missing = SteeringVector({Site(0, "resid_mid"): drawn(64)}, Origin.of(hooked("gpt-neox")))
    with pytest.raises(ValueError, match="0.resid_mid does not exist here"):
        with steer(hooked("gpt-neox"), missing):
            pass


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "stablelm"])
def test_equal_sizes_of_another_architecture_are_no_home(kind: str) -> None:
    """Four families at one size: hidden dimensions of one mean nothing in another."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=200, intermediate_size=96, num_key_value_heads=2, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    other = HookedModel(model, tokenizer(), name=f"tiny {kind}")
    assert Origin.of(other).shape == origin().shape  # the control: sizes alone do not tell
    for what in (vector(), offsets()):
        with pytest.raises(
            ValueError, match=rf"tiny llama \(llama, 3 .* is tiny {kind} \({kind}, 3"
        ):
            steer(other, what)
        unknown = dataclasses.replace(what, origin=origin(model_type=""))
        with steer(other, unknown):  # nothing is claimed where nothing is known
            pass
    there = SteeringVector({A: drawn(64)}, Origin.of(other))
    with pytest.raises(ValueError, match=rf"tiny llama \(llama, .* {kind} \({kind}, .* different"):
        vector(A) + there


def test_a_file_that_does_not_say_its_architecture_is_read(tmp_path: Path) -> None:
    path = vector().save(tmp_path / "v.safetensors")
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["model_type"] == "llama"
    old = SteeringVector.load(rewritten(path, {"model_type": None}))
    assert old.origin == origin(model_type="")
    with steer(hooked(), old):
        pass
    assert (old + vector()).sites == (A, B)


def test_a_language_model_out_of_a_multimodal_one_is_the_same_architecture() -> None:
    assert Origin.of(hooked("gemma3-conditional")).model_type == "gemma3_text"
    assert Origin.of(hooked("gemma3-text")).model_type == "gemma3_text"


# --- strengths, values and widths ---


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
def test_a_strength_is_a_finite_number(llama: HookedModel, strength: float) -> None:
    for what in (vector(), offsets(), vector().doing("add_keep_norm")):
        with pytest.raises(ValueError, match="strength .* is (nan|-?inf): give a finite number"):
            steer(llama, what, strength)
    with pytest.raises(ValueError, match="of ablate: expected the share of the full operation"):
        steer(llama, vector().doing("ablate"), strength)


def test_what_mixes_takes_a_share(llama: HookedModel) -> None:
    plane = SteeringVector({A: drawn(2, 64)}, origin(), "ablate")
    for mixing in (
        plane,
        plane.doing("clamp", torch.zeros(2)),
        plane.doing("affine", drawn(64)),
        plane.doing("rotate", 30.0),
        plane.doing("rotate_toward", 30.0),
    ):
        for wrong in (-0.1, 1.01):
            with pytest.raises(
                ValueError, match=rf"strength {wrong} of {mixing.operation}: .* 0 to 1"
            ):
                steer(llama, mixing, wrong)
        for share in (0.0, 0.5, 1.0):
            with steer(llama, mixing, share):
                pass
    with steer(llama, vector(), -40.0):  # the control: what is added has no such bound
        pass


@pytest.mark.parametrize(
    ("operation", "value", "message"),
    [
        (
            "clamp",
            2.0,
            r"of clamp at 1.resid_post has shape \[1\], expected one number a row, \[3\]",
        ),
        ("clamp", torch.zeros(2), r"has shape \[2\], expected one number a row, \[3\]"),
        (
            "clamp",
            torch.tensor([0.0, torch.nan, 0.0]),
            "the value of clamp at 1.resid_post holds 1",
        ),
        ("affine", torch.zeros(3), r"of affine .* has shape \[3\], expected a mean, \[64\]"),
        ("affine", 1.0, r"of affine .* has shape \[\], expected a mean, \[64\]"),
        ("rotate", torch.zeros(2), r"of rotate .* has shape \[2\], expected one angle in degrees"),
        ("rotate_toward", torch.zeros(2), "expected one angle in degrees"),
    ],
)
def test_a_value_has_the_shape_its_operation_takes(
    operation: str, value: Tensor | float, message: str
) -> None:
    rows = drawn(2 if operation.startswith("rotate") else 3, 64)
    subspace = SteeringVector({A: rows}, origin(), "ablate")
    with pytest.raises(ValueError, match=message):
        subspace.doing(operation, value)
    if isinstance(value, Tensor):
        with pytest.raises(ValueError, match=message):
            SteeringVector({A: rows}, origin(), operation, {A: value})
    assert vector(A).doing("clamp", 2.0).values[A].tolist() == [2.0]
    assert subspace.doing("affine", drawn(64)).values[A].shape == (64,)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_vector_is_as_wide_as_the_head_it_stands_at(llama: HookedModel, part: str) -> None:
    site = Site(1, part, 0)
    for width in (1, 15):
        narrow = SteeringVector({site: drawn(width)}, origin())
        with pytest.raises(ValueError, match=f"at 1.{part}.0 has width {width}, tiny llama has 16"):
            steer(llama, narrow)
    with steer(llama, SteeringVector({site: drawn(16)}, origin())):
        pass


def test_conditions_are_checked_at_the_door(llama: HookedModel) -> None:
    def gate(site: Site, width: int = 64) -> Condition:
        return Condition(site, torch.eye(width)[0], 0.1)

    last = vector(Site(2, "mlp_out"))
    with pytest.raises(ValueError, match="read at 1.head_out, which has several heads: name one"):
        steer(llama, last, condition=gate(Site(1, "head_out"), 16))
    with pytest.raises(ValueError, match="a condition cannot be read at 1.remainder"):
        steer(llama, last, condition=gate(Site(1, "remainder")))
    with pytest.raises(ValueError, match="site -4.resid_post is out of range"):
        steer(llama, last, condition=gate(Site(-4, "resid_post")))
    written = []
    for layer in (-2, 1):  # the same layer, counted from both ends
        condition = gate(Site(layer, "resid_post"))
        with steer(llama, last, 5.0, condition=condition):
            written.append(llama.generate_ids(["w1 w2 w3", "w9"], 6))
    assert written[0] == written[1]
    everywhere = vector(A).everywhere(llama)
    with pytest.raises(ValueError, match="read at 1.resid_post, after the edit at 0.resid_pre"):
        steer(llama, everywhere, condition=gate(A))
    with steer(llama, everywhere, condition=gate(Site(0, "resid_pre"))):
        pass


def test_every_operation_casts_its_vectors_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = SteeringVector({A: drawn(2, 64)}, origin(), "ablate")
    h = drawn(2, 3, 64).double()
    for made in (
        vector(A),
        vector(A).doing("add_keep_norm"),
        plane,
        plane.doing("clamp", torch.ones(2)),
        plane.doing("affine", drawn(64, seed=4)),
        plane.doing("rotate", 30.0),
    ):
        function = function_of(made.operation, made[A], made.values.get(A))
        first = function(h, 0.5)
        casts = []
        to = Tensor.to

        def counting(self: Tensor, *given, casts=casts, to=to, **more) -> Tensor:
            new = to(self, *given, **more)
            casts.extend([self] * (new is not self))
            return new

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "to", counting)
            assert torch.equal(function(h, 0.5), first)
            assert [t.shape for t in casts if t.shape[-1:] == (64,)] == []
            function(h.float().bfloat16(), 0.5)  # the control: another dtype is cast
        assert casts


# --- files ---


def same(a: SteeringVector, b: SteeringVector) -> bool:
    tensors = all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        for x, y in ((a.vectors, b.vectors), (a.values, b.values))
    )
    return tensors and (a.origin, a.operation, a.scales) == (b.origin, b.operation, b.scales)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    plane = SteeringVector({A: drawn(2, 64), B: drawn(2, 64, seed=3)}, origin(), "ablate")
    for i, one in enumerate(
        (
            vector(),
            vector().doing("ablate"),
            plane.doing("clamp", torch.tensor([1.5, -2.0])),
            plane.doing("rotate_toward", 33.0),
            vector(A).doing("affine", {A: drawn(64, seed=9)}),
            SteeringVector({Site(1, "q", 3): drawn(16)}, origin()),
            vector(A).everywhere(hooked()),
        )
    ):
        path = one.save(tmp_path / f"{i}.safetensors")
        again = SteeringVector.load(path)
        assert same(one, again), str(one)
        assert path.read_bytes() == again.save(tmp_path / "again.safetensors").read_bytes()
    path = offsets().save(tmp_path / "offsets.safetensors")
    again = HeadOffsets.load(path)
    assert again.heads == offsets().heads and again.origin == offsets().origin
    assert again.scales == offsets().scales
    assert all(torch.equal(again[key], offsets()[key]) for key in again.heads)


def test_the_file_tells_any_reader_what_it_is(tmp_path: Path) -> None:
    with safe_open(vector().save(tmp_path / "v.safetensors"), "pt") as opened:
        said = opened.metadata()
        assert set(opened.keys()) == {"1.resid_post", "2.attn_out"}
    assert said["format_version"] == str(FORMAT) and said["kind"] == "steering vector"
    assert said["n_layers"] == "3" and said["d_model"] == "64" and said["n_kv_heads"] == "2"
    assert said["estimator"] == "difference of means" and said["data_hash"] == "abc"
    assert json.loads(said["op"]) == "add" and said["final_norm"] == "False"
    assert json.loads(said["scales"])["1.resid_post"] == {"norm": 8.0, "sigma": 0.5}
    assert said["fingerprint"] == hooked().fingerprint


def rewritten(path: Path, metadata: dict[str, str | None], **tensors: Tensor) -> Path:
    with safe_open(path, "pt") as opened:
        said = opened.metadata() | {k: v for k, v in metadata.items() if v is not None}
    kept = {k: v for k, v in said.items() if not (k in metadata and metadata[k] is None)}
    save_file({**load_file(path), **tensors}, path, kept)
    return path


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "2"}, "has format 2, this version reads 1"),
        ({"format_version": None}, "has format None"),
        ({"kind": "direction"}, "holds a direction, expected a steering vector"),
        ({"kind": None}, "holds no alignlens artefact, expected a steering vector"),
        ({"n_layers": "many"}, "its metadata lack or garble"),
        ({"fingerprint": None}, "its metadata lack or garble 'fingerprint'"),
        ({"scales": "{"}, "its metadata lack or garble"),
        ({"scales": None}, "is damaged: 'scales'"),
        ({"op": '"melt"'}, "is damaged: unknown operation 'melt'"),
        ({"d_model": "32"}, "is damaged: .* has width 64, but tiny llama has 32"),
    ],
)
def test_foreign_and_altered_files_are_refused(
    tmp_path: Path, metadata: dict[str, str | None], message: str
) -> None:
    path = rewritten(vector().save(tmp_path / "v.safetensors"), metadata)
    with pytest.raises(ValueError, match=message):
        SteeringVector.load(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = vector().save(tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="holds a steering vector, expected a head offsets"):
        HeadOffsets.load(path)
    for hurt in (path.read_bytes()[:-40], b"not a vector", b""):
        (tmp_path / "hurt.safetensors").write_bytes(hurt)
        with pytest.raises(ValueError, match="is no safetensors file, or is damaged"):
            SteeringVector.load(tmp_path / "hurt.safetensors")
    with pytest.raises(FileNotFoundError, match="give the file of a saved steering vector"):
        SteeringVector.load(tmp_path / "none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"layer_1": drawn(64)}, foreign)
    with pytest.raises(ValueError, match="holds no alignlens artefact.*read by their importers"):
        SteeringVector.load(foreign)
    rewritten(path, {}, **{"1.resid_post": torch.full((64,), torch.inf)})
    with pytest.raises(ValueError, match="1.resid_post in .* holds 64 values that are NaN or inf"):
        SteeringVector.load(path)
    heads = rewritten(offsets().save(tmp_path / "o.safetensors"), {}, **{"1.resid_post": drawn(64)})
    with pytest.raises(ValueError, match="head offsets in .* are damaged: 1.resid_post is no head"):
        HeadOffsets.load(heads)


# --- showing themselves ---


def test_objects_show_themselves() -> None:
    v, o = vector(), offsets()
    assert str(v) == "steering vector (add) at 1.resid_post, 2.attn_out of tiny llama"
    assert "2 heads of tiny llama (32 numbers)" in str(o)
    assert str(Steering(v, 2.0, "sigma")).endswith("at strength 2 sigma")
    assert "difference of means" in v.describe()
    assert v.frame()["site"].tolist() == ["1.resid_post", "2.attn_out"]
    assert o.frame()["sigma"].isna().tolist() == [True, False]
    assert "norm" in v.plot().get_ylabel()
    assert o.plot().get_xlabel() == "head"
    assert "<table" in v._repr_html_() and "<table" in o._repr_html_()


def test_generate_takes_a_steering_with_everything(llama: HookedModel) -> None:
    gate = Condition(Site(0, "resid_pre"), torch.eye(64)[0], -1e9)
    whole = Steering(vector(A), 4.0, "fraction", Schedule("generated"), gate)
    with steer(llama, vector(A), 4.0, unit="fraction", schedule=Schedule("generated")):
        expected = llama.generate_ids(["w1 w2"], 6)
    assert llama.generate_ids(["w1 w2"], 6, steer=whole) == expected
    assert expected != llama.generate_ids(["w1 w2"], 6)
