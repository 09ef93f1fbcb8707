"""Vectors of other tools stand where those tools put them, and what is not said is asked for."""

import collections
import inspect
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from steered import at, drawn

from probes import HookedModel, Site, capture
from probes.engines import Batch
from steering import Origin, SteeringVector
from steering.applied import steer
from steering.export.foreign import (
    from_block_tensor,
    from_persona_vectors,
    from_steering_vectors,
    from_svec,
)

GOLDEN = Path(__file__).parent / "golden"
D, N = 16, 5
ORIGIN = Origin(
    "some/model",
    "f00d",
    N,
    D,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    template_hash="t",
    positions="last",
    model_type="llama",
)
FILES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def sites(vector: SteeringVector) -> list[str]:
    return [str(site) for site in vector.sites]


def put(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def state(rows: dict, kind: str = "decoder_block") -> dict:
    return {"layer_activations": rows, "layer_type": kind}


def svec(path: Path, directions: dict, **more: Any) -> Path:
    path.write_text(json.dumps({"model_type": "llama", "directions": directions} | more))
    return path


# --- steering-vectors -----------------------------------------------------------------------------


def test_the_real_package_s_pickles(tmp_path: Path) -> None:
    row = (torch.arange(16) - 7.5) / 8
    made = from_steering_vectors(GOLDEN / "foreign.pkl", ORIGIN)
    assert sites(made) == ["0.resid_post", "2.resid_post", "4.resid_post"]
    assert torch.equal(made["2.resid_post"], 4 * row)
    assert made.operation == "add" and made["0.resid_post"].dtype == torch.float32
    said = made.origin
    assert said.producer == "steering-vectors" and not said.final_norm
    assert said.estimator == "vectors of steering-vectors (decoder_block)"
    assert said.template_hash == said.positions == "" and len(said.data_hash) == 32
    assert replace(said, producer="", estimator="", data_hash="") == replace(
        ORIGIN, template_hash="", positions=""
    )
    other = from_steering_vectors(GOLDEN / "foreign.pt", ORIGIN)
    assert sites(other) == ["1.mlp_out"]
    torch.testing.assert_close(other["1.mlp_out"], 3 * row, rtol=1e-2, atol=0)
    kept = SteeringVector.load(made.save(tmp_path / "v.safetensors"))
    assert kept.origin == said and torch.equal(kept["4.resid_post"], made["4.resid_post"])


@FILES
@given(
    st.sampled_from(DTYPES),
    st.sets(st.integers(0, N - 1), min_size=1),
    st.sampled_from(["decoder_block", "self_attn", "mlp"]),
    st.integers(0, 99),
)
def test_rows_of_steering_vectors_come_out_as_they_went_in(
    tmp_path: Path, dtype: torch.dtype, layers: set[int], kind: str, seed: int
) -> None:
    part = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}[kind]
    rows = {layer: drawn(D, seed=seed + layer).to(dtype) for layer in layers}
    made = from_steering_vectors(put(tmp_path / "s.pt", state(rows, kind)), ORIGIN)
    assert sites(made) == [f"{layer}.{part}" for layer in sorted(layers)]
    assert all(torch.equal(made[Site(layer, part)], rows[layer].float()) for layer in layers)


def test_steering_at_the_site_is_steering_the_module(llama: HookedModel, tmp_path: Path) -> None:
    """What a hook on the module adds, as steering-vectors does it, is what the site adds."""
    vector = drawn(64, seed=3)
    for kind, module in [("decoder_block", ""), ("self_attn", ".self_attn"), ("mlp", ".mlp")]:
        path = put(tmp_path / "s.pt", state({1: vector}, kind))
        made = from_steering_vectors(path, Origin.of(llama))

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            added = first + vector
            return (added, *output[1:]) if isinstance(output, tuple) else added

        handle = llama.model.get_submodule(f"model.layers.1{module}").register_forward_hook(hook)
        try:
            theirs = capture(llama, ["w1 w2 w3"], "2.resid_post", progress=False)
        finally:
            handle.remove()
        with steer(llama, made):
            ours = capture(llama, ["w1 w2 w3"], "2.resid_post", progress=False)
        plain = capture(llama, ["w1 w2 w3"], "2.resid_post", progress=False)
        torch.testing.assert_close(ours["2.resid_post"], theirs["2.resid_post"])
        assert not torch.allclose(ours["2.resid_post"], plain["2.resid_post"], atol=1e-2)


@pytest.mark.parametrize("kind", ["input_layernorm", "post_attention_layernorm", "odd", None, 3])
def test_layer_types_that_are_not_added_are_refused(kind: Any, tmp_path: Path) -> None:
    path = put(tmp_path / "s.pt", state({1: torch.ones(D)}, kind))
    with pytest.raises(ValueError, match="a module that is not added to the stream"):
        from_steering_vectors(path, ORIGIN)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "olmo2", "granite", "glm4"])
def test_post_norm_architectures_take_vectors_of_blocks_only(
    architecture: str, tmp_path: Path
) -> None:
    origin = replace(ORIGIN, model_type=architecture)
    for kind in ("mlp", "self_attn"):
        path = put(tmp_path / "s.pt", state({1: torch.ones(D)}, kind))
        with pytest.raises(ValueError, match="norms or scales that before it joins the stream"):
            from_steering_vectors(path, origin)
    path = put(tmp_path / "s.pt", state({1: torch.ones(D)}))
    assert sites(from_steering_vectors(path, origin)) == ["1.resid_post"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(D), "holds no SteeringVector of steering-vectors but a Tensor"),
        ({1: torch.ones(D)}, "but a dict: expected"),
        (state({1: torch.ones(D + 1)}), r"has shape \[17\], but some/model has width 16"),
        (state({9: torch.ones(D)}), "out of range: the model has 5 layers"),
        (state({1: torch.ones(D), -4: torch.ones(D)}), "has layer 1 twice"),
        (state({"1": torch.ones(D)}), "is named by a str"),
        (state({True: torch.ones(D)}), "is named by a bool"),
        (state({1: "x"}), "layer 1 of .* is a str: expected a tensor"),
        (state({1: torch.ones(D, dtype=torch.int64)}), "dtype torch.int64"),
        (state({1: torch.full([D], float("nan"))}), "16 values that are NaN"),
        (state({1: torch.full([D], 1e300, dtype=torch.float64)}), "NaN or infinite"),
        (state({1: torch.zeros(D), 2: torch.zeros(D)}), "all of its 2 rows are zero"),
        (state({}), "all of its 0 rows are zero"),
    ],
)
def test_doubtful_steering_vectors_are_refused(value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        from_steering_vectors(put(tmp_path / "s.pt", value), ORIGIN)


def test_zero_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = {0: torch.zeros(D), 1: torch.ones(1, 1, D), 2: torch.zeros(D)}
    made = from_steering_vectors(put(tmp_path / "s.pt", state(rows)), ORIGIN)
    assert sites(made) == ["1.resid_post"] and made["1.resid_post"].shape == (D,)
    assert made.origin.estimator.endswith("(decoder_block), 2 all-zero rows left out")


def test_a_hostile_pickle_is_refused_by_every_reader(tmp_path: Path) -> None:
    import os

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "e.pt"
    path.write_bytes(pickle.dumps(state({1: Evil()})))
    with pytest.raises(ValueError, match="names 'posix.system'"):
        from_steering_vectors(path, ORIGIN)
    with pytest.raises(ValueError, match="names 'posix.system'"):
        from_persona_vectors(path, ORIGIN)
    with pytest.raises(ValueError, match="names 'posix.system'"):
        from_block_tensor(path, ORIGIN, 1, convention="block_output")
    assert not (tmp_path / "ran").exists()


# --- AISteer360 -----------------------------------------------------------------------------------


@FILES
@given(
    st.sets(st.integers(0, N - 1), min_size=1),
    st.sampled_from(["layer_output", "layer_input"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_directions_of_a_svec_come_out_as_they_went_in(
    tmp_path: Path, layers: set[int], location: Any, flat: bool, seed: int
) -> None:
    rows = {layer: drawn(1, D, seed=seed + layer) for layer in layers}
    told = {str(layer): (row[0] if flat else row).tolist() for layer, row in rows.items()}
    made = from_svec(svec(tmp_path / "v.svec", told), ORIGIN, location=location)
    part = "resid_post" if location == "layer_output" else "resid_pre"
    assert sites(made) == [f"{layer}.{part}" for layer in sorted(layers)]
    assert all(torch.equal(made[Site(layer, part)], rows[layer][0]) for layer in layers)
    assert made.origin.final_norm == (location == "layer_output" and N - 1 in layers)
    assert made.origin.producer == "AISteer360"


def test_the_boundary_of_a_svec_must_be_said(tmp_path: Path) -> None:
    path = svec(tmp_path / "v.svec", {"1": [[1.0] * D]})
    with pytest.raises(ValueError, match=r"layer_output' \(CAA.*layer_input' \(ActAdd, angular"):
        from_svec(path, ORIGIN)
    with pytest.raises(ValueError, match="location='input'"):
        inspect.unwrap(from_svec)(path, ORIGIN, location="input")  # type: ignore[arg-type]


def test_several_directions_are_a_subspace_to_remove(tmp_path: Path) -> None:
    rows = drawn(3, D, seed=1)
    path = svec(tmp_path / "v.svec", {"2": rows.tolist()})
    with pytest.raises(ValueError, match="has 3 directions.*give operation='ablate'"):
        from_svec(path, ORIGIN, location="layer_output")
    made = from_svec(path, ORIGIN, location="layer_output", operation="ablate")
    assert made.operation == "ablate" and torch.equal(made["2.resid_post"], rows)
    rows[1] = 0
    path = svec(tmp_path / "v.svec", {"2": rows.tolist(), "3": [[0.0] * D]})
    made = from_svec(path, ORIGIN, location="layer_input", operation="ablate")
    assert torch.equal(made["2.resid_pre"], rows[[0, 2]]) and sites(made) == ["2.resid_pre"]
    assert made.origin.estimator == "directions of a .svec, 2 all-zero rows left out"
    with pytest.raises(ValueError, match="operation 'rotate'"):
        inspect.unwrap(from_svec)(path, ORIGIN, location="layer_input", operation="rotate")  # type: ignore[arg-type]


ONE = [[1.0] * D]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no .svec"),
        ("[]", "expected a JSON object, found a list"),
        ("[" * 100_000, "is no .svec"),
        ("{}", "expected an object with model_type and directions"),
        ('{"model_type": "llama", "directions": []}', "expected an object with model_type and di"),
        ('{"model_type": 3, "directions": {}}', "expected an object with model_type and directio"),
        (json.dumps({"model_type": "llama", "directions": {"1": ONE}, "head_dim": 4}), "ITI"),
        ('{"model_type": "llama", "model_type": "llama"}', "says one name twice"),
        (json.dumps({"model_type": "qwen2", "directions": {"1": ONE}}), "for the architecture 'qw"),
        (json.dumps({"model_type": "llama", "directions": {"1": ONE}, "num_heads": 4}), "ITI"),
        (json.dumps({"model_type": "llama", "directions": {}}), "all of its 0 rows"),
        (json.dumps({"model_type": "llama", "directions": {"01": ONE}}), "is called '01'"),
        (json.dumps({"model_type": "llama", "directions": {"-1": ONE}}), "is called '-1'"),
        (json.dumps({"model_type": "llama", "directions": {"../x": ONE}}), "is called '../x'"),
        (json.dumps({"model_type": "llama", "directions": {"5": ONE}}), "out of range"),
        (json.dumps({"model_type": "llama", "directions": {"1": [[1.0] * 4]}}), "another model's"),
        (json.dumps({"model_type": "llama", "directions": {"1": "x"}}), "no list of numbers"),
        (json.dumps({"model_type": "llama", "directions": {"1": {"a": 1}}}), "no list of numbers"),
        (json.dumps({"model_type": "llama", "directions": {"1": []}}), "another model's|no list"),
        (json.dumps({"model_type": "llama", "directions": {"1": [True] * D}}), "no list of num"),
        (json.dumps({"model_type": "llama", "directions": {"1": [[1.0], [2.0, 3]]}}), "no list of"),
        (
            json.dumps({"model_type": "llama", "directions": {"1": [[10**400] * D]}}),
            "no list of|NaN",
        ),
        (json.dumps({"model_type": "llama", "directions": {"1": [float("nan")] * D}}), "NaN"),
        (json.dumps({"model_type": "llama", "directions": {"1": [1e300] * D}}), "infinite"),
        (json.dumps({"model_type": "llama", "directions": {"1": [0] * D}}), "all of its 1 rows"),
    ],
)
def test_doubtful_svecs_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "v.svec"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        from_svec(path, ORIGIN, location="layer_output")


def test_a_text_model_of_a_multimodal_one_is_the_same(tmp_path: Path) -> None:
    path = svec(tmp_path / "v.svec", {"1": ONE}, model_type="gemma3")
    for kind in ("gemma3_text", "gemma3", ""):
        origin = replace(ORIGIN, model_type=kind)
        assert sites(from_svec(path, origin, location="layer_input")) == ["1.resid_pre"]


def test_missing_cut_and_large_svecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        from_svec(tmp_path / "none.svec", ORIGIN, location="layer_input")
    path = svec(tmp_path / "v.svec", {"1": ONE})
    whole = path.read_bytes()
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="is no .svec"):
            from_svec(path, ORIGIN, location="layer_input")
    monkeypatch.setattr("steering.export.foreign.MAX_TEXT", 5)
    with pytest.raises(ValueError, match="more than 5 bytes"):
        from_svec(path, ORIGIN, location="layer_input")


# --- persona_vectors ------------------------------------------------------------------------------


def test_rows_stand_after_their_blocks(llama: HookedModel, tmp_path: Path) -> None:
    """Rows made from hidden_states, as that project makes them, are the streams of our sites."""
    ids = torch.tensor([[8, 40, 41]])
    with torch.no_grad():
        hidden = llama.model(input_ids=ids, output_hidden_states=True).hidden_states
    rows = torch.stack([h[0, -1] for h in hidden])
    origin = Origin.of(llama)
    made = from_persona_vectors(put(tmp_path / "p.pt", rows), origin)
    n = origin.n_layers
    assert sites(made) == [f"{k}.resid_post" for k in range(n - 1)]
    read = llama.engine.read(Batch(ids, torch.ones_like(ids)), made.sites)
    for site in made.sites:
        torch.testing.assert_close(made[site], read[site][0, -1].float())


@FILES
@given(st.sampled_from(DTYPES), st.one_of(st.none(), st.integers(0, N)), st.integers(0, 99))
def test_rows_are_those_of_the_tensor(
    tmp_path: Path, dtype: torch.dtype, layer: int | None, seed: int
) -> None:
    rows = drawn(N + 1, D, seed=seed).to(dtype)
    made = from_persona_vectors(put(tmp_path / "p.pt", rows), ORIGIN, layer)
    if layer is None:
        assert sites(made) == [f"{k}.resid_post" for k in range(N - 1)]
        assert all(torch.equal(made[Site(k, "resid_post")], rows[k + 1].float()) for k in range(4))
    else:
        assert sites(made) == ["0.resid_pre" if layer == 0 else f"{layer - 1}.resid_post"]
        assert torch.equal(made.vectors[made.sites[0]], rows[layer].float())
    assert made.origin.final_norm == (layer == N)
    assert made.origin.producer == "persona_vectors"


@pytest.mark.parametrize(
    ("value", "layer", "said"),
    [
        (torch.ones(D), None, r"shape \[16\], expected \[6, 16\].*from_block_tensor"),
        (
            torch.ones(N, D),
            None,
            r"shape \[5, 16\], expected \[6, 16\]: the embedding and the outp",
        ),
        (torch.ones(N + 1, D, 1), None, r"shape \[6, 16, 1\], expected \[6, 16\]"),
        (torch.ones(N + 1, D + 1), None, "another model's"),
        (torch.ones(N + 1, D), N + 1, r"expected a row, 0 \(embedding\) to 5"),
        (torch.ones(N + 1, D), -1, "expected a row"),
        (torch.zeros(N + 1, D), None, "all of its 4 rows are zero"),
        (torch.full([N + 1, D], float("inf")), None, "infinite"),
        ({"a": torch.ones(N + 1, D)}, None, "is a dict: expected a tensor"),
        (torch.ones(N + 1, D, dtype=torch.bool), None, "dtype torch.bool"),
    ],
)
def test_other_tensors_are_refused(
    value: Any, layer: int | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        from_persona_vectors(put(tmp_path / "p.pt", value), ORIGIN, layer)


def test_a_zero_row_of_persona_vectors_is_counted(tmp_path: Path) -> None:
    rows = torch.ones(N + 1, D)
    rows[2] = rows[0] = 0
    made = from_persona_vectors(put(tmp_path / "p.pt", rows), ORIGIN)
    assert sites(made) == ["0.resid_post", "2.resid_post", "3.resid_post"]
    assert made.origin.estimator == "persona vectors, 1 all-zero rows left out"


# --- bare tensors ---------------------------------------------------------------------------------


def test_the_convention_must_be_said(tmp_path: Path) -> None:
    path = put(tmp_path / "b.pt", torch.ones(D))
    with pytest.raises(ValueError, match=r"'block_output' \(3 is .*'hidden_states' \(3 is hidden_"):
        from_block_tensor(path, ORIGIN, 3)


@FILES
@given(
    st.sampled_from(["block_output", "hidden_states"]),
    st.sets(st.integers(0, N - 1), min_size=1),
    st.sampled_from(["pt", "numpy", "safetensors"]),
    st.booleans(),
)
def test_bare_tensors_stand_where_the_convention_says(
    tmp_path: Path, convention: Any, layers: set[int], how: str, one: bool
) -> None:
    order = sorted(layers, reverse=True)
    tensor = drawn(D, seed=7) if one else drawn(len(order), D, seed=7)
    path = tmp_path / ("b.safetensors" if how == "safetensors" else "b.pt")
    if how == "safetensors":
        save_file({"v": tensor}, path)
    elif how == "numpy":
        path.write_bytes(pickle.dumps(tensor.numpy()))
    else:
        put(path, tensor)
    made = from_block_tensor(path, ORIGIN, order, convention=convention)
    for i, number in enumerate(order):
        if convention == "block_output":
            site = Site(number, "resid_post")
        else:
            site = Site(number - 1, "resid_post") if number else Site(0, "resid_pre")
        assert torch.equal(made[site], tensor if one else tensor[i])
    assert len(made.sites) == len(order) and not made.origin.final_norm


def test_the_last_hidden_state_is_after_the_norm(tmp_path: Path) -> None:
    path = put(tmp_path / "b.pt", torch.ones(D))
    made = from_block_tensor(path, ORIGIN, N, convention="hidden_states")
    assert sites(made) == [f"{N - 1}.resid_post"] and made.origin.final_norm
    with pytest.raises(ValueError, match="block_output of some/model are 0 to 4"):
        from_block_tensor(path, ORIGIN, N, convention="block_output")


@pytest.mark.parametrize(
    ("value", "layers", "said"),
    [
        (torch.ones(2, D), [1], r"shape \[2, 16\] for 1 layers: expected \[16\] or \[1, 16\]"),
        (torch.ones(1, 1, D), [1], r"expected \[16\]"),
        (torch.ones(()), [1], "another model's"),
        (torch.ones(4), [1], "another model's"),
        (torch.ones(D), [], "name each layer"),
        (torch.ones(D), [1, 1], "name each layer"),
        (torch.ones(D), [-1], "are 0 to 4"),
        (torch.zeros(D), [1, 2], "all of its 2 rows are zero"),
        (collections.OrderedDict(v=torch.ones(D)), [1], "is a dict"),
    ],
)
def test_doubtful_bare_tensors_are_refused(
    value: Any, layers: list[int], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        from_block_tensor(put(tmp_path / "b.pt", value), ORIGIN, layers, convention="block_output")


def test_doubtful_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_file({"a": torch.ones(D), "b": torch.ones(D)}, path)
    with pytest.raises(ValueError, match="holds 2 tensors, expected one"):
        from_block_tensor(path, ORIGIN, 1, convention="block_output")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="no safetensors file, or is damaged"):
        from_block_tensor(path, ORIGIN, 1, convention="block_output")
    with pytest.raises(FileNotFoundError):
        from_block_tensor(tmp_path / "no.safetensors", ORIGIN, 1, convention="block_output")


def test_arrays_keep_their_file_s_values_apart(tmp_path: Path) -> None:
    """What is read may be changed without changing another row of the same file."""
    path = put(tmp_path / "b.pt", torch.ones(D))
    made = from_block_tensor(path, ORIGIN, [1, 2], convention="block_output")
    made["1.resid_post"][0] = 9
    assert made["2.resid_post"][0] == 1
    assert np.array_equal(torch.load(path), np.ones(D))


def test_vectors_of_one_model_join(llama: HookedModel, tmp_path: Path) -> None:
    """A foreign vector is one like any other: it adds to ours and steers."""
    path = put(tmp_path / "b.pt", drawn(64))
    made = from_block_tensor(path, Origin.of(llama), 0, convention="block_output")
    both = made + at(llama, "1.resid_post")
    assert sites(both) == ["0.resid_post", "1.resid_post"]
