"""Files for EasySteer, vLLM-Hook and lm-evaluation-harness say what those programs read."""

import base64
import copy
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steered import at, batch, drawn
from torch import Tensor

from probes import HookedModel, Site, Unsupported
from steering import Origin, SteeringVector
from steering.applied import steer
from steering.export.easysteer import check_request, read_wire, request, wire, write_easysteer
from steering.export.lm_eval import write_lm_eval
from steering.export.vllm_hook import write_vllm_hook

GOLDEN = Path(__file__).parent / "golden"
FILES = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LAYERS = st.sets(st.integers(0, 120), min_size=1, max_size=12)


def offsets(layers: set[int], seed: int = 0, width: int = 6) -> dict[int, Tensor]:
    return {layer: drawn(width, seed=seed + layer) for layer in layers}


# --- EasySteer ------------------------------------------------------------------------------------


def test_the_wire_is_that_of_easysteer_s_own_code() -> None:
    told = json.loads((GOLDEN / "easysteer_wire.json").read_text())
    row = (torch.arange(16) - 7.5) / 8
    rows = {layer: (layer + 2) * row for layer in (11, 2, 10)}
    made = wire(rows)
    assert made == told and list(made["tensors"]) == ["layer.10", "layer.11", "layer.2"]
    read = read_wire(told)
    assert list(read) == [2, 10, 11]
    assert all(torch.equal(read[layer], rows[layer]) for layer in rows)


@FILES
@given(
    LAYERS,
    st.sampled_from(["all", "prompt", "generated"]),
    st.floats(-50, 50).filter(bool),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_request_holds_the_vectors(
    tmp_path: Path, layers: set[int], scope: Any, scale: float, dtype: torch.dtype
) -> None:
    rows = {layer: row.to(dtype) for layer, row in offsets(layers).items()}
    path = write_easysteer(tmp_path / "e", rows, scale=scale, scope=scope, name="calm")
    made = json.loads(path.read_text())
    check_request(made)
    (vector,) = made["vectors"]
    assert made["conflict"] == "priority" and vector["name"] == "calm"
    assert (vector["scale"], vector["layers"]) == (scale, sorted(layers))
    assert vector["algorithm"] == "direct" and vector["normalize"] is False
    phases = {"all": {"prompt", "generation"}, "prompt": {"prompt"}, "generated": {"generation"}}
    assert vector["apply"] == dict.fromkeys(phases[scope], "all")
    read = read_wire(vector["data"])
    assert all(torch.equal(read[layer], rows[layer].float()) for layer in layers)


def test_a_source_takes_the_place_of_the_data(tmp_path: Path) -> None:
    rows = offsets({3, 1})
    (vector,) = request(rows, source="/models/calm.gguf")["vectors"]
    assert vector["source"] == "/models/calm.gguf" and "data" not in vector
    assert vector["layers"] == [1, 3] and vector["algorithm"] == "direct"
    with pytest.raises(ValueError, match="expected a .gguf"):
        write_easysteer(tmp_path, rows, source="calm.pt")
    with pytest.raises(ValueError, match="which the engine refuses"):
        write_easysteer(tmp_path, rows, source="a|direct.gguf")
    for changes in ({"algorithm": "linear"}, {"source": 5}):
        vector = {"source": "a.gguf", "apply": {"prompt": "all"}} | changes
        with pytest.raises(ValueError, match="expected a .gguf"):
            check_request({"vectors": [vector]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ({}, {}, "no vector to send"),
        ({-1: torch.ones(3)}, {}, "block -1"),
        ({1: torch.ones(3), 2: torch.ones(4)}, {}, "several widths"),
        ({1: torch.tensor([1.0, float("nan")])}, {}, "the vector at block 1 holds 1 values that"),
        ({1: torch.ones(3)}, {"scale": 0.0}, "scale 0 would change nothing"),
        ({1: torch.ones(3)}, {"scale": float("inf")}, "scale inf is no finite number"),
    ],
)
def test_what_cannot_be_sent_is_refused(rows: Any, options: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        write_easysteer(tmp_path / "e", rows, **options)
    assert not (tmp_path / "e").exists()


def test_scopes_are_three() -> None:
    with pytest.raises(ValueError, match="scope 'some'"):
        inspect.unwrap(request)(offsets({1}), scope="some")  # type: ignore[arg-type]


def patched(path: str, value: Any) -> dict:
    """A good request with a value put at a path, or, for `...`, without what is there."""
    made = copy.deepcopy(request(offsets({1, 2})))
    *steps, last = path.split("/")
    where: Any = made
    for step in steps:
        where = where[int(step)] if step.isdecimal() else where[step]
    if value is ...:
        del where[last]
    else:
        where[last] = value
    return made


V, A, D = "vectors/0/", "vectors/0/apply/", "vectors/0/data/"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("conflict", "sequential"),
        ("conflict", ...),
        (V + "normalize", True),
        (V + "layers", ...),
        (V + "name", "x"),
        (V + "params", {}),
        (V + "algorithm", "erase"),
        (A + "prompt_tokens", [0, 5]),
        (A + "prompt_positions", [-1]),
        (A + "prompt_window", [-4, None]),
        (A + "prompt_window", [-4, 2]),
        (A + "generation_window", [0, 8]),
        (A + "exclude_prompt_tokens", [1]),
        (A + "exclude_generation_positions", [0]),
        (A + "prompt", None),
    ],
)
def test_requests_that_the_engine_takes_pass(path: str, value: Any) -> None:
    check_request(patched(path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("debug", False, "the request: 'debug' was removed from EasySteer: set VLLM_STEER_TRACE"),
        (V + "phases", ["prompt"], "vector 0: 'phases' was removed .* write prompt='all'"),
        (V + "tokens", [1], "'tokens' was removed .* write prompt_tokens or"),
        (V + "positions", [1], "'positions' was removed .* write prompt_positions"),
        (A + "phases", ["prompt"], "apply of vector 0: 'phases' was removed"),
        (A + "tokens", [1], "apply of vector 0: 'tokens' was removed"),
        (A + "when", "all", "apply of vector 0: unknown key 'when'; known are exclude_gen"),
        (V + "strength", 2, "vector 0: unknown key 'strength'"),
        ("extra", 2, "the request: unknown key 'extra'; known are conflict, vectors"),
        ("vectors", [], "one vector at least"),
        ("vectors", {"a": {}}, "one vector at least"),
        ("vectors", ..., "the request lacks vectors"),
        ("vectors", [3], "vector 0: expected an object, found a int"),
        ("conflict", "last", "conflict 'last'"),
        (V + "apply", ..., "vector 0 lacks apply"),
        (V + "apply", {}, "selects no token"),
        (V + "source", "x.gguf", "give either source or data"),
        (V + "data", ..., "give either source or data"),
        (V + "algorithm", "add", "algorithm 'add' is none of direct, erase"),
        (V + "algorithm", ["direct"], "algorithm"),
        (V + "algorithm", "linear", "linear takes data of kind 'linear', not 'direction'"),
        (V + "layers", [], "expected a list of blocks"),
        (V + "layers", [True], "expected a list of blocks"),
        (V + "layers", [-1], "expected a list of blocks"),
        (V + "layers", [[1]], "expected a list of blocks"),
        (V + "layers", [1, 7], r"data hold \[1, 2\] only"),
        (V + "scale", "2", "no finite number"),
        (V + "scale", True, "no finite number"),
        (V + "normalize", 1, "normalize is true or false"),
        (V + "params", {"topk": 1}, "takes no params"),
        (V + "name", 3, "its name is no text"),
        (A + "prompt", "some", "prompt is 'some', which the engine refuses"),
        (A + "prompt_tokens", [], "which the engine refuses"),
        (A + "prompt_tokens", [-1], "which the engine refuses"),
        (A + "generation_positions", [-1], "which the engine refuses"),
        (A + "generation_window", [-2, None], "which the engine refuses"),
        (A + "generation_window", [3, 3], "which the engine refuses"),
        (A + "prompt_window", [-1, -4], "which the engine refuses"),
        (A + "prompt_window", [1], "which the engine refuses"),
        (V + "apply", {"prompt": "all", "exclude_generation_tokens": [1]}, "none is selected"),
        (D + "version", 2, "version 2"),
        (D + "kind", "reft", "direct takes data of kind 'direction', not 'reft'"),
        (D + "extra", {"layer": 1}, "without extras"),
        (D + "more", 1, "and nothing else"),
        (D + "sha256", "0" * 64, "they were changed"),
        (D + "sha256", None, "they were changed"),
        (D + "tensors", {}, "there are none"),
        (D + "tensors/layer.1", 5, "layer.1: expected shape and data"),
        (D + "tensors/layer.01", {"shape": [6], "data": ""}, "expected the name layer.<block>"),
        (D + "tensors/../../x", {"shape": [6], "data": ""}, "expected the name layer.<block>"),
        (D + "tensors/layer.1/shape", [7], "24 bytes are no float32 numbers of shape"),
        (D + "tensors/layer.1/shape", [10**15], "24 bytes are no float32"),
        (D + "tensors/layer.1/shape", [2, 3], "24 bytes are no float32"),
        (D + "tensors/layer.1", {"shape": [0], "data": ""}, "0 bytes are no float32"),
        (D + "tensors/layer.1/data", "???", "no base64"),
        (D + "tensors/layer.1/data", 10**12, "its data are a int"),
        (D + "tensors/layer.1/data", "AAAA", "3 bytes are no float32"),
    ],
)
def test_requests_that_the_engine_refuses_are_refused(path: str, value: Any, said: str) -> None:
    made = request(offsets({1, 2})) if "../.." in path else patched(path, value)
    if "../.." in path:
        made["vectors"][0]["data"]["tensors"]["../../x"] = value
    with pytest.raises(ValueError, match=said):
        check_request(made)


def test_changed_and_other_numbers_are_seen() -> None:
    good = wire(offsets({4}))
    raw = base64.b64decode(good["tensors"]["layer.4"]["data"])
    for changed in (raw[:-1] + bytes([raw[-1] ^ 1]), raw[::-1]):  # the latter: the other endianness
        told = copy.deepcopy(good)
        told["tensors"]["layer.4"]["data"] = base64.b64encode(changed).decode()
        with pytest.raises(ValueError, match="do not have the sha256"):
            read_wire(told)
    told = copy.deepcopy(good)
    told["tensors"]["layer.5"] = told["tensors"].pop("layer.4")
    with pytest.raises(ValueError, match="do not have the sha256"):
        read_wire(told)
    told = copy.deepcopy(good)
    told["tensors"]["layer.4"]["data"] = raw  # bytes, as between processes
    assert torch.equal(read_wire(told)[4], drawn(6, seed=4))


def test_a_wire_is_refused_whole() -> None:
    good = wire(offsets({4}))
    (entry,) = good["tensors"].values()
    wide = wire({5: torch.ones(7)})["tensors"]
    for told, said in [
        ([good], "and nothing else"),
        (5, "and nothing else"),
        (good | {"kind": "reft"}, "version 1 and kind 'reft'"),
        (good | {"tensors": [entry]}, "there are none"),
        (good | {"tensors": {4: entry}}, "tensor '4': expected the name layer.<block>"),
        (good | {"tensors": {"layer.4": entry | {"dtype": "f4"}}}, "expected shape and data"),
        (good | {"tensors": {"layer.4": entry | {"shape": 6}}}, "no float32 numbers of shape 6"),
        (good | {"tensors": good["tensors"] | wide}, "several widths"),
    ]:
        with pytest.raises(ValueError, match=said):
            inspect.unwrap(read_wire)(told)
    with pytest.raises(ValueError, match=r"block 1, shape \[2, 3\]: expected vectors"):
        inspect.unwrap(wire)({1: torch.ones(2, 3)})
    with pytest.raises(ValueError, match="those of one model have one"):
        wire({1: torch.ones(3), 2: torch.ones(4)})


# --- vLLM-Hook ------------------------------------------------------------------------------------


@FILES
@given(st.integers(0, 200), st.floats(-9, 9).filter(bool), st.sampled_from([torch.float16, None]))
def test_vllm_hook_reads_its_two_files(
    tmp_path: Path, layer: int, coefficient: float, dtype: torch.dtype | None
) -> None:
    row = drawn(8, seed=layer).to(dtype or torch.float32)
    path = write_vllm_hook(tmp_path / "h", {layer: row}, coefficient)
    told = json.loads(path.read_text())["steering"]
    assert told == {
        "method": "add_vector",
        "coefficient": coefficient,
        "optimal_layer": layer,
        "vector_path": str((tmp_path / "h" / "vector.pt").resolve()),
        "apply_at_all_positions": True,
    }
    data = torch.load(told["vector_path"], weights_only=True)
    assert list(data) == ["dir"] and data["dir"].dtype == torch.float32
    assert torch.equal(data["dir"], row.float())


def test_the_server_s_path_is_said_as_given(tmp_path: Path) -> None:
    path = write_vllm_hook(tmp_path, {1: torch.ones(3)}, vector_path="/srv/v.pt")
    assert json.loads(path.read_text())["steering"]["vector_path"] == "/srv/v.pt"


@pytest.mark.parametrize(
    ("rows", "coefficient", "said"),
    [
        ({1: torch.ones(3), 2: torch.ones(3)}, 1.0, "steers one block, these are vectors of 2"),
        ({}, 1.0, "vectors of 0"),
        ({-1: torch.ones(3)}, 1.0, "block -1"),
        ({1: torch.full([3], float("inf"))}, 1.0, "NaN or infinite"),
        ({1: torch.ones(3)}, 0.0, "coefficient 0.0"),
        ({1: torch.ones(3)}, float("nan"), "coefficient nan"),
    ],
)
def test_what_vllm_hook_cannot_say(
    rows: Any, coefficient: float, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        write_vllm_hook(tmp_path / "h", rows, coefficient)
    with pytest.raises(ValueError, match=r"block 1, shape \[2, 3\]: expected one vector"):
        inspect.unwrap(write_vllm_hook)(tmp_path / "h", {1: torch.ones(2, 3)})
    assert not (tmp_path / "h").exists()


# --- lm-evaluation-harness ------------------------------------------------------------------------


@contextmanager
def harness(model: HookedModel, path: Path) -> Iterator[None]:
    """What the harness does with a file: hooks under `base_model`, on the modules it names."""
    handles = []
    for name, told in torch.load(path, weights_only=True).items():
        vector, value, bias = told["steering_vector"], told["steering_coefficient"], told["bias"]

        def hook(
            _module: Any,
            _args: Any,
            output: Any,
            told: dict = told,
            vector: Tensor = vector,
            value: float = value,
            bias: Tensor | None = bias,
        ) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            if told["action"] == "add":
                assert bias is None
                h = h + value * vector
            else:
                h = h if bias is None else h - bias
                unit = vector / vector.norm()
                h = h + (value - (h * unit).sum(-1, keepdim=True)) * unit
                h = h if bias is None else h + bias
            return (h, *output[1:]) if isinstance(output, tuple) else h

        module = model.model.base_model.get_submodule(name)  # type: ignore[union-attr]
        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def difference(model: HookedModel, path: Path, vector: SteeringVector, strength: float) -> float:
    rows = batch()
    plain = model.engine.logits(rows)
    with harness(model, path):
        theirs = model.engine.logits(rows)
    with steer(model, vector, strength):
        ours = model.engine.logits(rows)
    assert float((theirs - plain).abs().max()) > 0.1
    return float((theirs - ours)[rows.mask.bool()].abs().max())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("operation", ["add", "ablate", "clamp", "affine"])
def test_the_harness_does_what_we_do(operation: str, architecture: str, tmp_path: Path) -> None:
    import tiny

    model = tiny.hooked(architecture)
    vector, strength = at(model, "1.resid_post"), 1.0
    if operation == "add":
        strength = -1.5
    elif operation == "clamp":
        vector = vector.doing("clamp", 7.0)
    elif operation == "affine":
        vector = vector.doing("affine", {Site(1, "resid_post"): drawn(64, seed=9)})
    else:
        vector = vector.doing("ablate")
    path = write_lm_eval(tmp_path / "v.pt", vector, strength)
    (name,) = torch.load(path, weights_only=True)
    assert name == ("h.1" if architecture == "gpt2" else "layers.1")
    assert difference(model, path, vector, strength) < 1e-4


def test_units_and_equal_sites_are_converted(llama: HookedModel, tmp_path: Path) -> None:
    vector = at(llama, "2.resid_pre")
    path = write_lm_eval(tmp_path / "v.pth", vector, 3.0, "unit", hookpoint="layers.1")
    told = torch.load(path, weights_only=True)["layers.1"]
    assert set(told) == {"steering_vector", "steering_coefficient", "action", "bias"}
    assert told["action"] == "add" and told["steering_coefficient"] == 1.0 and told["bias"] is None
    row = vector["2.resid_pre"]
    torch.testing.assert_close(told["steering_vector"], 3 * row / row.norm())


def test_a_hookpoint_is_taken_as_given(llama: HookedModel, tmp_path: Path) -> None:
    path = write_lm_eval(tmp_path / "v.pt", at(llama, "1.resid_post"), hookpoint="text.layers.1")
    assert list(torch.load(path, weights_only=True)) == ["text.layers.1"]


def test_what_the_harness_cannot_say(llama: HookedModel, tmp_path: Path) -> None:
    one, origin = at(llama, "1.resid_post"), Origin.of(llama)
    plane = SteeringVector({Site(1, "resid_post"): drawn(2, 64)}, origin, "ablate")
    for vector, strength, said in [
        (at(llama, "1.resid_post", "2.resid_post"), 1.0, "several hookpoints of a file the last o"),
        (at(llama, "1.attn_out"), 1.0, "not at 1.attn_out"),
        (at(llama, "1.mlp_out").doing("ablate"), 1.0, "ablate at 1.mlp_out is none"),
        (plane, 1.0, "clamps along one vector, 1.resid_post has 2"),
        (one.doing("ablate"), 0.5, "strength 0.5 in 'raw' cannot be said"),
        (one.doing("add_keep_norm"), 1.0, "depends on the activation"),
        (one, 0.0, "strength 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            write_lm_eval(tmp_path / "v.pt", vector, strength)
    with pytest.raises(Unsupported, match="in 'sigma' cannot be said"):
        write_lm_eval(tmp_path / "v.pt", one.doing("clamp", 2.0), unit="sigma")
    with pytest.raises(ValueError, match="reads vectors from .pt or .pth"):
        write_lm_eval(tmp_path / "v.safetensors", one)
    assert not list(tmp_path.iterdir())
