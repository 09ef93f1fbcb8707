"""vllm-lens vectors: the wire form is exact both ways and says what cannot be said."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import hooked

from probes.sites import Site
from steering import Origin, SteeringVector
from steering.export.loaders import as_vllm_lens
from steering.export.vllm_lens import (
    decode,
    encode,
    from_vllm_lens,
    read_entries,
    request_fields,
    to_vllm_lens,
)

WIDTH = 64


def vector(*layers: int, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    rows = {Site(k, "resid_post"): torch.randn(WIDTH, generator=generator) for k in layers}
    return SteeringVector(rows, Origin.of(hooked()))


@settings(max_examples=25, deadline=None)
@given(layers=st.sets(st.integers(0, 2), min_size=1), seed=st.integers(0, 99))
def test_a_round_trip_is_exact_and_the_loader_reads_the_same(layers: set[int], seed: int) -> None:
    made = vector(*sorted(layers), seed=seed)
    entry = json.loads(json.dumps(to_vllm_lens(made)))
    back = from_vllm_lens(entry, made.origin)
    table = as_vllm_lens([entry], 3, WIDTH)
    assert back.sites == made.sites
    for site in made.sites:
        assert torch.equal(back[site], made[site])
        assert np.array_equal(table[site.layer], made[site].numpy())


def test_strength_and_unit_are_multiplied_in() -> None:
    made = vector(1)
    entry = to_vllm_lens(made, 3.0, "unit")
    assert entry["scale"] == 1.0
    assert torch.allclose(decode(entry["activations"]).norm(), torch.tensor(3.0))


def test_norm_matching_is_done_only_when_asked_and_as_a_fraction() -> None:
    assert to_vllm_lens(vector(1))["norm_match"] is False
    with pytest.raises(ValueError, match="unit='fraction'"):
        to_vllm_lens(vector(1), 0.5, norm_match=True)
    entry = to_vllm_lens(vector(1), 0.5, "fraction", norm_match=True)
    assert entry["norm_match"] and entry["scale"] == 0.5
    with pytest.raises(ValueError, match="scaled to each token's norm"):
        from_vllm_lens(entry, Origin.of(hooked()))


def test_the_request_carries_its_list_as_a_string(tmp_path: Path) -> None:
    entry = to_vllm_lens(vector(1))
    fields = request_fields(entry)
    assert json.loads(fields["vllm_xargs"]["apply_steering_vectors"]) == [entry]
    for name, said in (("one", entry), ("list", [entry]), ("request", fields)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(said))
        assert read_entries(path) == [entry]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_the_servers_own_forms_are_read(dtype: torch.dtype) -> None:
    """Half precision as vllm-lens sends it, bfloat16 as the bits of int16; and uncompressed."""
    values = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = values.view(torch.int16) if dtype == torch.bfloat16 else values
    raw = bits.numpy().tobytes()
    wire = {
        "data": base64.b64encode(zstandard.compress(raw)).decode(),
        "dtype": str(bits.dtype).removeprefix("torch."),
        "original_dtype": str(dtype),
        "shape": [2, 5],
        "compression": "zstd",
    }
    assert torch.equal(decode(wire), values.float())
    if dtype == torch.float32:
        old = {"data": base64.b64encode(raw).decode(), "dtype": "float32", "shape": [2, 5]}
        assert torch.equal(decode(old), values)


def test_a_vector_of_another_width_is_in_no_table_of_the_server() -> None:
    """vllm-lens skips it and answers 200: the loader's copy does the same."""
    assert as_vllm_lens([to_vllm_lens(vector(1))], 3, WIDTH + 1) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": "!!"}, "no tensor"),
        ({"data": ""}, "no tensor"),
        ({"shape": [1, WIDTH + 1]}, "its shape needs"),
        ({"shape": [2**40, 2**20]}, "its shape is"),
        ({"shape": [-1, WIDTH]}, "its shape is"),
        ({"shape": "x"}, "no tensor"),
        ({"dtype": "object"}, "its type is"),
        ({"dtype": "O"}, "its type is"),
        ({"compression": "gzip"}, "compression is 'gzip'"),
        ({"original_dtype": "torch.bfloat16"}, "carried as float32"),
        ({"data": base64.b64encode(zstandard.compress(bytes(2**22))).decode()}, "bytes are packed"),
    ],
)
def test_damaged_and_hostile_tensors_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode({**encode(torch.ones(1, WIDTH)), **change})


def test_a_bomb_without_a_declared_size_is_not_unpacked() -> None:
    packer = zstandard.ZstdCompressor(write_content_size=False)
    bomb = base64.b64encode(packer.compress(bytes(2**26))).decode()
    with pytest.raises(ValueError, match="no tensor"):
        decode({**encode(torch.ones(1, WIDTH)), "data": bomb})


def test_entries_that_say_something_else_are_refused() -> None:
    origin = Origin.of(hooked())
    good = to_vllm_lens(vector(1))
    for change, said in (
        ({"layer_indices": [1, 2]}, "one row for each"),
        ({"layer_indices": [True]}, "one row for each"),
        ({"position_indices": [3]}, "certain positions"),
        ({"hook": "x"}, "unknown keys"),
    ):
        with pytest.raises(ValueError, match=said):
            from_vllm_lens({**good, **change}, origin)
    with pytest.raises(ValueError, match="lacks layer_indices"):
        from_vllm_lens({"activations": good["activations"]}, origin)
    with pytest.raises(ValueError, match="no vllm-lens vector"):
        from_vllm_lens("{", origin)
    nan = {**good, "activations": {**good["activations"], "compression": None}}
    nan["activations"]["data"] = base64.b64encode(struct.pack("<f", float("nan")) * WIDTH).decode()
    with pytest.raises(ValueError, match="NaN"):
        from_vllm_lens(nan, origin)
