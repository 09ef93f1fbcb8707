"""Control vectors: what is written is what llama.cpp reads, and foreign files mean what they mean."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import hooked

from probes.sites import Site, Unsupported
from steering import HeadOffsets, Origin, SteeringVector
from steering.export.blocks import block_offsets
from steering.export.control_vector import read_control_vector, write_control_vector
from steering.export.gguf_file import read_gguf
from steering.export.loaders import as_llama_cpp

WIDTH = 64


def origin() -> Origin:
    return Origin.of(hooked())


def foreign(path: Path, directions: dict[int, np.ndarray], **keys: Any) -> Path:
    """A file as other tools write it."""
    architecture = keys.pop("architecture", "controlvector")
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in keys.items():
        add = {"layer_count": writer.add_uint32, "count_i32": writer.add_int32}.get(name)
        key = "layer_count" if name == "count_i32" else name
        (add or writer.add_string)(f"{architecture}.{key}", value)
    for k, values in directions.items():
        writer.add_tensor(f"direction.{k}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def row(seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    layers=st.sets(st.integers(1, 2), min_size=1),
    seed=st.integers(0, 2**20),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_a_round_trip_is_exact_and_llama_cpp_reads_the_same(
    layers: set[int], seed: int, size: float, dtype: torch.dtype, tmp_path_factory: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = {
        k: (size * torch.randn(WIDTH, generator=generator)).to(dtype).float() for k in layers
    }
    path = tmp_path_factory.mktemp("cv") / "v.gguf"
    write_control_vector(path, offsets, origin(), {"strength": "1.0"})
    back = read_control_vector(path)
    assert back.origin == origin()
    assert back.sites == tuple(Site(k, "resid_post") for k in sorted(layers))
    table = as_llama_cpp(path, 3, WIDTH)
    for k, vector in offsets.items():
        assert torch.equal(back[Site(k, "resid_post")], vector)
        assert np.array_equal(table[k], vector.numpy())
    assert set(table) == layers


def test_equal_vectors_are_equal_bytes(tmp_path: Path) -> None:
    offsets = {1: torch.from_numpy(row())}
    a = write_control_vector(tmp_path / "a.gguf", offsets, origin()).read_bytes()
    b = write_control_vector(tmp_path / "b.gguf", offsets, origin()).read_bytes()
    assert a == b


def test_block_0_is_refused_with_what_can_hold_it(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="block 0.*--to checkpoint"):
        write_control_vector(tmp_path / "v.gguf", {0: torch.ones(WIDTH)}, origin())
    assert not list(tmp_path.iterdir())
    path = write_control_vector(tmp_path / "v.gguf", {0: torch.ones(WIDTH)}, origin(), block_0=True)
    with pytest.raises(ValueError, match="llama.cpp refuses.*layer 0"):
        as_llama_cpp(path, 3, WIDTH)


def test_a_vector_of_another_width_or_block_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \[63\].*needs \[64\]"):
        write_control_vector(tmp_path / "v.gguf", {1: torch.ones(63)}, origin())
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        write_control_vector(tmp_path / "v.gguf", {3: torch.ones(WIDTH)}, origin())
    with pytest.raises(ValueError, match="NaN"):
        write_control_vector(tmp_path / "v.gguf", {1: torch.full((WIDTH,), torch.nan)}, origin())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "tool", "block"),
    [
        ({"layer_count": 1, "model_hint": "llama"}, "repeng", 2),
        ({"count_i32": 1, "model_hint": "llama"}, "llama-cvector-generator", 1),
        ({"architecture": "steeringvector", "layer_count": 1}, "dialz", 2),
        ({"layer_count": 1, "method": "caa"}, "easysteer", 2),
    ],
)
def test_foreign_files_are_read_where_they_were_measured(
    keys: dict[str, Any], tool: str, block: int, tmp_path: Path
) -> None:
    path = foreign(tmp_path / "v.gguf", {2: row()}, **keys)
    vector = read_control_vector(path, origin())
    assert vector.sites == (Site(block, "resid_post"),)
    assert vector.origin.producer == tool
    assert np.array_equal(vector[Site(block, "resid_post")].numpy(), row())


def test_the_generators_file_says_that_llama_cpp_applies_it_late(tmp_path: Path) -> None:
    path = foreign(tmp_path / "v.gguf", {2: row()}, count_i32=1)
    assert "one block later" in read_control_vector(path, origin()).origin.estimator


def test_a_file_that_could_mean_two_things_is_refused_until_it_is_said(tmp_path: Path) -> None:
    path = foreign(tmp_path / "v.gguf", {2: row()}, model_hint="llama")
    with pytest.raises(ValueError, match="which tool.*say the producer"):
        read_control_vector(path, origin())
    assert read_control_vector(path, origin(), "repeng").sites == (Site(2, "resid_post"),)
    late = read_control_vector(path, origin(), "llama-cvector-generator")
    assert late.sites == (Site(1, "resid_post"),)
    with pytest.raises(ValueError, match="unknown producer"):
        read_control_vector(path, origin(), "somebody")
    with pytest.raises(ValueError, match="does not carry its model"):
        read_control_vector(path, None, "repeng")


def test_zero_vectors_are_left_out_and_nothing_but_zeros_is_refused(tmp_path: Path) -> None:
    zero = np.zeros(WIDTH, np.float32)
    path = foreign(tmp_path / "v.gguf", {1: zero, 2: row()}, layer_count=2)
    assert read_control_vector(path, origin()).sites == (Site(2, "resid_post"),)
    path = foreign(tmp_path / "w.gguf", {1: zero}, layer_count=1)
    with pytest.raises(ValueError, match="no vector that is not zero"):
        read_control_vector(path, origin())


@pytest.mark.parametrize(
    ("directions", "said"),
    [
        ({2: row(width=32)}, "width 32"),
        ({7: row()}, "blocks 0 to 2"),
        ({2: np.full(WIDTH, np.nan, np.float32)}, "NaN"),
        ({2: np.ones((2, WIDTH), np.float32)}, "expected one axis"),
    ],
)
def test_files_of_other_models_are_refused(
    directions: dict[int, np.ndarray], said: str, tmp_path: Path
) -> None:
    path = foreign(tmp_path / "v.gguf", directions, layer_count=1)
    with pytest.raises(ValueError, match=said):
        read_control_vector(path, origin())


def test_the_loader_keeps_llama_cpps_own_rules(tmp_path: Path) -> None:
    late = foreign(tmp_path / "late.gguf", {1: row(), 9: row(1)}, layer_count=2)
    assert set(as_llama_cpp(late, 3, WIDTH)) == {1}  # a block beyond the last is ignored
    assert np.array_equal(as_llama_cpp(late, 3, WIDTH, -2.0)[1], -2 * row())
    for directions, said in (
        ({2: row().astype(np.float16)}, "float16"),
        ({2: np.ones((2, WIDTH), np.float32)}, "shape"),
        ({1: row(), 2: row(width=32)}, "directions of 64 and 32"),
        ({2: row(width=32)}, "width is 32"),
    ):
        path = foreign(tmp_path / "bad.gguf", directions, layer_count=1)
        with pytest.raises(ValueError, match=f"llama.cpp refuses.*{said}"):
            as_llama_cpp(path, 3, WIDTH)


def test_a_damaged_file_is_refused_at_every_cut(tmp_path: Path) -> None:
    whole = write_control_vector(
        tmp_path / "v.gguf", {1: torch.from_numpy(row())}, origin()
    ).read_bytes()
    cut = tmp_path / "cut.gguf"
    # the file ends with padding that no tensor needs
    for n in [*range(0, 600, 7), *range(600, len(whole) - 40, 97)]:
        cut.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="no readable GGUF"):
            read_gguf(cut)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 900), value=st.integers(0, 255))
def test_flipped_bytes_never_do_more_than_a_value_error(
    at: int, value: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("cv") / "v.gguf"
    data = bytearray(
        write_control_vector(path, {1: torch.from_numpy(row())}, origin()).read_bytes()
    )
    data[at % len(data)] = value
    path.write_bytes(data)
    try:
        found = read_control_vector(path)
    except ValueError:
        return
    # what can be read at all is one finite row of a width
    assert all(v.ndim == 1 and bool(v.isfinite().all()) for v in found.vectors.values())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "does not begin|announced"),
        (b"PK\x03\x04" + bytes(40), "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "versions 2 and 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "more than its"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "more than its"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(40), "announced"),
        # an array of 2^60 bytes; an array within an array
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 2**60) + bytes(9),
            "more than",
        ),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1) + bytes(9), "is not read"),
        # a tensor of 2^62 numbers
        (
            b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 2**62, 0, 0) + bytes(64),
            "ends after the file",
        ),
    ],
)
def test_hostile_headers_are_refused_before_anything_is_allocated(
    data: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
        read_gguf(path)


def test_tensors_that_share_their_bytes_take_no_more_than_the_file(tmp_path: Path) -> None:
    """Many tensors at one place would make much of a small file."""
    infos = b"".join(struct.pack("<Q1sIQIQ", 1, bytes([97 + i]), 1, 256, 0, 0) for i in range(20))
    head = b"GGUF" + struct.pack("<IQQ", 3, 20, 0) + infos
    head += bytes(-len(head) % 32)
    (tmp_path / "bomb.gguf").write_bytes(head + bytes(1024))
    with pytest.raises(ValueError, match="lie over one another"):
        read_gguf(tmp_path / "bomb.gguf")


def test_what_no_server_adds_is_refused_with_what_can_hold_it() -> None:
    model = hooked()
    v = torch.ones(WIDTH)
    heads = HeadOffsets({(1, 0): torch.ones(model.layout.blocks[0].widths["head_out"])}, origin())

    def at(part: str, layer: int = 1) -> SteeringVector:
        return SteeringVector({Site(layer, part): v}, origin())

    for what, said in (
        (heads, "head offsets act before the MLP.*--to checkpoint"),
        (at("resid_post").doing("ablate"), "ablation depends.*--to checkpoint"),
        (at("resid_post").doing("clamp", 1.0), "'clamp' depends.*steer live"),
        (at("resid_mid"), "1.resid_mid.*--to checkpoint"),
        (at("attn_out"), "1.attn_out.*--to checkpoint"),
        (at("resid_pre", 0), "0.resid_pre is the embedding"),
    ):
        with pytest.raises(Unsupported, match=said):
            block_offsets(what, target="llama.cpp")
    with pytest.raises(ValueError, match="strength 0"):
        block_offsets(at("resid_post"), 0.0, target="llama.cpp")


@pytest.mark.parametrize(("part", "layer"), [("resid_post", 1), ("resid_pre", 2), ("mlp_out", 1)])
def test_converted_sites_are_equal_to_the_live_edit(part: str, layer: int) -> None:
    """resid_pre of block 2, mlp_out of block 1 and resid_post of block 1 are one place."""
    model = hooked()
    v = torch.from_numpy(row())
    what = SteeringVector({Site(layer, part): v}, origin())
    offsets = block_offsets(what, 2.0, target="llama.cpp")
    assert list(offsets) == [1]
    moved = SteeringVector({Site(1, "resid_post"): offsets[1]}, origin())
    prompts = ["w1 w2 w3", "w4 w5"]
    with model.edit(what.edits(model, 2.0)):
        expected = model.logits(prompts)
    with model.edit(moved.edits(model)):
        found = model.logits(prompts)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, model.logits(prompts), atol=1e-2)
