"""Foreign pickles are read exactly where they hold tensors, and everything else is refused."""

import collections
import io
import os
import pickle
import sys
import time
import types
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steering.export import pickle_machine, pickles
from steering.export.pickles import StandIn, load_restricted

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
FILES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass
class SteeringVector:
    """The shape of the class in steering-vectors, pickled under that name by `foreign_class`."""

    layer_activations: dict
    layer_type: str = "decoder_block"


@pytest.fixture
def foreign_class(monkeypatch: pytest.MonkeyPatch) -> type:
    name = "steering_vectors.steering_vector"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(SteeringVector, "__module__", name)
    module.SteeringVector = SteeringVector  # type: ignore[attr-defined]
    return SteeringVector


def saved(value: Any, how: str | int) -> bytes:
    """By torch.save in its new or old form, or by pickle at a protocol."""
    if isinstance(how, int):
        return pickle.dumps(value, how)
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=how == "zip")
    return buffer.getvalue()


HOW: list[str | int] = ["zip", "old", 0, 1, 2, 3, 4, 5]


def load(path: Path, data: bytes, **options: Any) -> Any:
    path.write_bytes(data)
    return load_restricted(path, **options)


def tried(path: Path, data: bytes) -> tuple[Any, str | None]:
    """What was read, or the text of the refusal; no other error passes."""
    try:
        return load(path, data), None
    except ValueError as error:
        return None, str(error)


def archive(records: dict[str, bytes], compress: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as made:
        for name, data in records.items():
            made.writestr(name, data)
    return buffer.getvalue()


def parts(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as read:
        return {name: read.read(name) for name in read.namelist()}


@FILES
@given(
    st.sampled_from(HOW),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(0, 1000),
)
def test_tensors_are_read_exactly(
    tmp_path: Path, how: str | int, dtype: torch.dtype, shape: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn([*shape, 2], generator=generator) * 9).to(dtype)
    value = {
        "whole": base,
        3: [base[..., 0], base.transpose(0, -1), torch.nn.Parameter(torch.ones(2))],
        "said": ("text", 1.5, None, True, -7, b"\xff\x00"),
        "size": base.shape,
        "dtype": dtype,
        "named": collections.OrderedDict(a=base, b={}),
    }
    read = load(tmp_path / "t.pt", saved(value, how))
    assert list(read) == list(value)
    assert read["said"] == value["said"]
    assert read["dtype"] == dtype and tuple(read["size"]) == base.shape
    tensors = [read["whole"], *read[3], read["named"]["a"]]
    for got, put in zip(tensors, [base, *value[3], base], strict=True):
        assert got.dtype == put.dtype and torch.equal(got, put.detach())


@pytest.mark.parametrize("how", ["zip", "old"])
def test_it_reads_what_weights_only_reads(how: str, tmp_path: Path) -> None:
    block = torch.nn.TransformerEncoderLayer(8, 2, 16)
    data = saved(block.state_dict(), how)
    theirs = torch.load(io.BytesIO(data), weights_only=True)
    ours = load(tmp_path / "t.pt", data)
    assert list(ours) == list(theirs) and len(ours) == 12
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_shared_storage_stays_shared_and_an_expanded_row_is_one(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    read = load(tmp_path / "t.pt", saved({"a": base, "b": base[4:8]}, "zip"))
    read["a"][5] = 100
    assert read["b"].tolist() == [4, 100, 6, 7]
    rows = torch.arange(5.0).expand(80, 5)
    assert torch.equal(load(tmp_path / "t.pt", saved(rows, "zip")), rows)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "u1", "b1"])
def test_numpy_arrays_of_numbers_are_read(how: str | int, dtype: str, tmp_path: Path) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    value = {"c": array, "f": np.asfortranarray(array), "n": np.float64(2.5), np.int64(4): array[1]}
    read = load(tmp_path / "n.pkl", saved(value, how))
    for name in ("c", "f", 4):
        assert read[name].dtype == array.dtype and np.array_equal(read[name], value[name])
    assert read["n"] == 2.5


@pytest.mark.parametrize("how", HOW)
def test_the_named_class_becomes_an_inert_stand_in(
    how: str | int, foreign_class: type, tmp_path: Path
) -> None:
    data = saved(foreign_class({3: torch.ones(4), -1: torch.arange(4.0)}, "mlp"), how)
    read = load(tmp_path / "s.pkl", data)
    assert type(read) is StandIn and read.name == "steering_vectors.steering_vector.SteeringVector"
    assert read.state["layer_type"] == "mlp"
    assert torch.equal(read.state["layer_activations"][-1], torch.arange(4.0))
    with pytest.raises(ValueError, match="names 'steering_vectors.steering_vector.SteeringVector'"):
        load_restricted(tmp_path / "s.pkl", stand_ins=())


def test_objects_with_slots_keep_their_state(foreign_class: type, tmp_path: Path) -> None:
    name = b"csteering_vectors.steering_vector\nSteeringVector\n"
    data = b"\x80\x02" + name + b")\x81N}X\x01\x00\x00\x00aK\x05s\x86b."
    assert load(tmp_path / "s.pkl", data).state == {"a": 5}


@pytest.mark.parametrize("name", ["foreign.pkl", "foreign.pt"])
def test_the_real_package_is_read_without_it(name: str) -> None:
    assert "steering_vectors" not in sys.modules
    state = load_restricted(GOLDEN / name).state
    row = (torch.arange(16) - 7.5) / 8
    if name == "foreign.pkl":
        assert list(state["layer_activations"]) == [0, 2, -1]
        assert torch.equal(state["layer_activations"][2], 4 * row)
    else:
        assert torch.equal(state["layer_activations"][1], (3 * row).bfloat16())
    assert "steering_vectors" not in sys.modules


# --- hostile files --------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def wrap(data: bytes, how: str) -> bytes:
    return data if how == "pickle" else archive({"a/data.pkl": data, "a/version": b"3\n"})


@pytest.mark.parametrize("how", ["pickle", "zip"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, f"{os.system.__module__}.system"),
        (eval, "builtins.eval"),
        (exec, "builtins.exec"),
        (getattr, "builtins.getattr"),
        (torch.load, "torch.serialization.load"),
        (pickle.loads, "_?pickle.loads"),
        (torch.hub.load, "torch.hub.load"),
        (np.load, "numpy.load"),
    ],
)
def test_every_other_function_is_refused_by_name(
    function: Any, name: str, protocol: int, how: str, tmp_path: Path
) -> None:
    sentinel = tmp_path / "ran"
    command = f"touch {sentinel}" if function is os.system else f"open({str(sentinel)!r}, 'w')"
    data = pickle.dumps({"x": Calls(function, command)}, protocol)
    with pytest.raises(ValueError, match=f"is refused: it names '{name}', and only tensors"):
        load(tmp_path / "evil.pt", wrap(data, how))
    assert not sentinel.exists()


def test_the_sentinel_would_be_written_by_pickle(tmp_path: Path) -> None:
    """The negative control of the test above."""
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {tmp_path / 'ran'}")))
    assert (tmp_path / "ran").exists()


def test_nothing_runs_inside_the_bytes_of_a_storage(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    evil = pickle.dumps(Calls(os.system, f"touch {sentinel}"))
    load_from_bytes = torch.storage._load_from_bytes  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="names 'posix.system'"):
        load(tmp_path / "e.pkl", pickle.dumps(Calls(load_from_bytes, evil)))
    nested = pickle.dumps(Calls(load_from_bytes, evil))
    with pytest.raises(ValueError, match="names 'torch.storage._load_from_bytes'"):
        load(tmp_path / "e.pkl", pickle.dumps(Calls(load_from_bytes, nested)))
    assert not sentinel.exists()


def pushed(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


FLOATS = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
VECTOR = b"csteering_vectors.steering_vector\nSteeringVector\n"
DOUBLED = b"K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 80
"""A tuple of two of itself, 80 levels deep: its hash would take 2**80 steps."""

HOSTILE = {
    "a key of nested tuples": (b"\x80\x02" + DOUBLED + b"}h\x00K\x01s.", "tuple as a key"),
    "keys that collide": (b"\x80\x02}\x8a\x08" + b"\xff" * 7 + b"\x1fK\x01s.", "int as a key"),
    "a huge memo number": (b"\x80\x02Nr\xff\xff\xff\x7f.", "numbers an object 2147483647"),
    "a number in the text of a memo": (
        b"Np4611686018427387903\n.",
        "numbers an object 46116860184",
    ),
    "bytes for text": (b"X\xff\xff\x00\x00" + b"\xff" * 65535 + b".", "codec can't decode"),
    "a long text for a number": (b"F" + b"x" * 9000 + b"\n.", "could not convert"),
    "a huge text": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", "damaged|expected|bytes"),
    "huge bytes": (b"\x80\x04\x8e\x00\x00\x00\x00\x10\x00\x00\x00abc.", "expected 68719476736"),
    "a huge frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"Q.", "damaged"),
    "no end": (b"\x80\x02}", "pickle exhausted|before"),
    "nothing": (b"", "exhausted|damaged|pickle"),
    "an empty stack": (b"\x80\x02.", "more than one object"),
    "leftovers": (b"\x80\x02NN.", "more than one object is left"),
    "an open mark": (b"\x80\x02(N.", "more than one object is left"),
    "two pickles": (b"\x80\x02N.\x80\x02N.", "data follow the end"),
    "an instance of old": (b"\x80\x02(ios\nsystem\n.", "INST"),
    "an extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "a set of names": (b"\x80\x04\x8f.", "EMPTY_SET"),
    "a text for a list": (b"\x80\x02" + pushed("a") + b"Na.", "a str stands for list"),
    "a class that is called": (b"\x80\x02" + VECTOR + b")R.", "it calls 'steering_vectors"),
    "a storage as a class": (b"\x80\x02" + FLOATS + b")\x81.", "object of 'torch.FloatStorage'"),
    "state of a tuple": (b"\x80\x02)}b.", "sets the attributes of a tuple"),
    "state with odd names": (b"\x80\x02" + VECTOR + b")\x81}K\x01K\x02sb.", "int stands for str"),
    "a reference in a plain pickle": (b"\x80\x02(NNNNNtQ.", "refers to data|NoneType stands"),
    "a tensor of no storage": (
        b"\x80\x02" + REBUILD + b"(NK\x00K\x01\x85K\x01\x85\x89NtR.",
        "Stor",
    ),
    "many arguments": (b"\x80\x02" + REBUILD + b"(" + b"N" * 99 + b"tR.", "with 99 arguments"),
    "a long name": (b"\x80\x02c" + b"a" * 9000 + b"\nb\n.", "it names 'aaaa"),
    "a name with a path": (b"\x80\x02c../../etc\npasswd\n.", "names '../../etc.passwd'"),
    "an encoding": (b"\x80\x02c_codecs\nencode\n" + pushed("a") + pushed("zip") + b"\x86R.", "enc"),
    "a numpy object": (b"\x80\x02cnumpy\ndtype\n" + pushed("O8") + b"\x85R.", "dtype 'O8'"),
    "numpy text": (b"\x80\x02cnumpy\ndtype\n" + pushed("U" + "9" * 9) + b"\x85R.", "dtype 'U9"),
}


@pytest.mark.parametrize("how", ["pickle", "zip"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused_at_once(case: str, how: str, tmp_path: Path) -> None:
    data, said = HOSTILE[case]
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"(?s)evil.pt is refused: .*({said})") as caught:
        load(tmp_path / "evil.pt", wrap(data, how))
    assert time.monotonic() - start < 5
    assert len(str(caught.value)) < 700 + len(str(tmp_path))


def test_deep_nesting_is_no_recursion(tmp_path: Path) -> None:
    deep = load(tmp_path / "d.pkl", b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".")
    for _ in range(19_999):
        (deep,) = deep
    assert deep == []


def test_a_file_has_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "MAX_STEPS", 100)
    assert load(tmp_path / "d.pkl", pickle.dumps(list(range(9)))) == list(range(9))
    with pytest.raises(ValueError, match="more than 100 instructions"):
        load(tmp_path / "d.pkl", pickle.dumps(list(range(99))))


def test_bytes_made_again_and_again_are_counted(tmp_path: Path) -> None:
    again = b"c_codecs\nencode\n\x94" + pushed("a" * 100_000) + b"\x94" + pushed("latin1") + b"\x94"
    data = b"\x80\x04]" + again + b"000" + b"h\x00h\x01h\x02\x86Ra" * 100_000 + b"."
    with pytest.raises(ValueError, match="POP|more data than it holds"):
        load(tmp_path / "d.pkl", data)
    data = b"\x80\x04" + again + b"]" + b"h\x00h\x01h\x02\x86Ra" * 100_000 + b"."
    with pytest.raises(ValueError, match="makes much more data than it holds"):
        load(tmp_path / "d.pkl", data)


MADE_AGAIN = {
    "an array": (
        b"cnumpy\ndtype\n" + pushed("u1") + b"\x85R\x94"  # h\x00 the dtype
        b"cnumpy._core.numeric\n_frombuffer\n\x94"
        b"B" + (9_999).to_bytes(4, "little") + b"\x00" * 9_999 + b"\x94"
        b"J" + (9_999).to_bytes(4, "little") + b"\x85\x94]\x94",
        b"h\x01(h\x02h\x00h\x03" + pushed("C") + b"tRa",
    ),
    "a dict of pairs": (
        b"ccollections\nOrderedDict\n\x94](" + b"K\x01K\x02\x86" * 500 + b"e\x94]\x94",
        b"h\x00h\x01\x85Ra",
    ),
    "attributes": (
        VECTOR + b"\x94}(" + b"".join(pushed(f"{i}") + b"N" for i in range(500)) + b"u\x94]\x94",
        b"h\x00)\x81h\x01ba",
    ),
}


@pytest.mark.parametrize("case", MADE_AGAIN)
def test_things_made_again_and_again_are_counted(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle_machine, "SPARE", 1 << 17)
    first, again = MADE_AGAIN[case]
    few = b"\x80\x04(" + first + again * 3 + b"t."
    assert len(load(tmp_path / "d.pkl", few)[-1]) == 3
    with pytest.raises(ValueError, match="makes much more data than it holds"):
        load(tmp_path / "d.pkl", b"\x80\x04(" + first + again * 200 + b"t.")


def test_declared_sizes_beyond_the_file_are_refused(tmp_path: Path) -> None:
    huge = torch.ones(1).expand(10**12)
    for how in ("zip", "old", 2):
        with pytest.raises(ValueError, match="makes much more data than it holds"):
            load(tmp_path / "t.pt", saved(huge, how))
    good = saved(torch.ones(4), "old")  # K\x04 is the number of elements
    bad = good.replace(b"K\x04Nt", b"J\xff\xff\xff\x7fNt")
    assert bad != good
    with pytest.raises(
        ValueError, match="storage .* of 2147483647 numbers is larger than the file"
    ):
        load(tmp_path / "t.pt", bad)


def changed(old: bytes, new: bytes) -> bytes:
    records = parts(saved(torch.ones(4), "zip"))
    (name,) = (name for name in records if name.endswith("data.pkl"))
    assert old in records[name]
    return archive(records | {name: records[name].replace(old, new)})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"K\x04tq", b"K\x05tq", "holds 16 bytes of torch.float32, declared are 5 numbers"),
        (b"FloatStorage", b"DoubleStorage", "16 bytes of torch.float64, declared are 4"),
        (b"K\x00K\x04\x85", b"K\x01K\x04\x85", "needs 5 numbers, its storage has 4"),
        (b"K\x00K\x04\x85", b"K\x00K\x07\x85", "needs 7 numbers, its storage has 4"),
        (b"K\x00K\x04\x85", b"J\xff\xff\xff\xffK\x04\x85", "a size is no number from 0"),
        (b"K\x00K\x04\x85", b"K\x00\x88\x85", "a size is no number from 0"),
        (b"K\x00K\x04\x85", b"K\x00(" + b"K\x01" * 40 + b"t", "more than 32 axes"),
        (b"X\x01\x00\x00\x000", b"X\x09\x00\x00\x00../../etc", "lacks the record 'data/../../etc'"),
        (b"storage", b"storagf", "no storage of torch"),
    ],
)
def test_a_tensor_lies_inside_its_storage(
    old: bytes, new: bytes, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "t.pt", changed(old, new))


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    good = parts(saved({"a": torch.ones(300)}, "zip"))
    root = next(iter(good)).partition("/")[0]
    assert load(tmp_path / "t.pt", archive(good))["a"].sum() == 300
    for records, said, compress in [
        (good, "is compressed, which torch never does", zipfile.ZIP_DEFLATED),
        (good | {f"{root}/byteorder": b"big"}, "it is big-endian", 0),
        (good | {"b/data.pkl": b"N."}, "there is no one data.pkl", 0),
        ({"x.txt": b""}, "not of torch.save", 0),
        ({n: d for n, d in good.items() if "data/0" not in n}, "lacks the record 'data/0'", 0),
        (good | {f"{root}/data.pkl": b"N.N."}, "data follow the end", 0),
    ]:
        with pytest.raises(ValueError, match=said):
            load(tmp_path / "t.pt", archive(records, compress))
    buffer = io.BytesIO(archive(good))
    with zipfile.ZipFile(buffer, "a") as made:
        with pytest.warns(UserWarning, match="Duplicate name"):
            made.writestr(f"{root}/data.pkl", b"N.")
    with pytest.raises(ValueError, match="two records of one name"):
        load(tmp_path / "t.pt", buffer.getvalue())


def test_many_records_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_RECORDS", 5)
    with pytest.raises(ValueError, match="more than 5 records"):
        load(tmp_path / "t.pt", archive({f"a/{i}": b"" for i in range(6)}))


def test_old_files_say_their_order_and_sizes(tmp_path: Path) -> None:
    good = saved([torch.ones(4), torch.zeros(2)], "old")
    assert [len(t) for t in load(tmp_path / "t.pt", good)] == [4, 2]
    big = good.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    assert big != good
    for data, said in [
        (big, "it is big-endian"),
        (good + b"\x00", "data follow the end"),
        (good[:-1], "is cut off"),
        (good.replace(b"M\xe9\x03.", b"M\xe8\x03.", 1), "does not go on like one"),
        (good[: good.rindex(b"\x80\x02]")] + b"\x80\x02((" + DOUBLED + b"tNl.", "storages is dam"),
    ]:
        with pytest.raises(ValueError, match=said):
            load(tmp_path / "t.pt", data)


def test_big_endian_and_structured_arrays_are_refused(tmp_path: Path) -> None:
    for protocol in (2, 5):
        with pytest.raises(ValueError, match="big-endian or structured"):
            load(tmp_path / "n.pkl", pickle.dumps(np.arange(3, dtype=">f4"), protocol))
        with pytest.raises(ValueError, match="dtype 'V8'|big-endian or structured"):
            load(tmp_path / "n.pkl", pickle.dumps(np.zeros(2, dtype="f4,f4"), protocol))
        with pytest.raises(ValueError, match="dtype 'O8'"):
            load(tmp_path / "n.pkl", pickle.dumps(np.array([None]), protocol))
    good = pickle.dumps(np.arange(3.0), 5)
    with pytest.raises(ValueError, match=r"array of shape \[4\] in it has 24 bytes"):
        load(tmp_path / "n.pkl", good.replace(b"K\x03\x85", b"K\x04\x85"))


def test_views_that_change_values_are_refused(tmp_path: Path) -> None:
    turned = torch._neg_view(torch.ones(3))
    with pytest.raises(ValueError, match="conjugate or negative view"):
        load(tmp_path / "t.pt", saved(turned, "zip"))


@pytest.mark.parametrize("how", ["zip", "old", 2, 5])
def test_cut_files_are_refused_at_every_length(how: str | int, tmp_path: Path) -> None:
    data = saved({"dir": torch.arange(6.0), "said": "x"}, how)
    for end in range(0, len(data), 1 if len(data) < 700 else 3):
        with pytest.raises(ValueError, match="is refused"):
            load(tmp_path / "t.pt", data[:end])


@pytest.mark.parametrize("how", ["zip", "old", 0, 2, 5])
def test_flipped_bytes_give_a_value_or_a_refusal(how: str | int, tmp_path: Path) -> None:
    """Nothing but `ValueError` comes out, and what comes out is no larger than what went in."""
    data = saved({"dir": torch.arange(6.0), 1: np.arange(3.0), "n": [1.5, (2, "x")]}, how)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(400):
        at = int(torch.randint(len(data), (), generator=generator))
        to = int(torch.randint(256, (), generator=generator))
        read, said = tried(tmp_path / "t.pt", data[:at] + bytes([to]) + data[at + 1 :])
        refused += said is not None
        assert said is None or "t.pt is refused: " in said
        assert type(read) in (dict, list, tuple, int, float, str, bool, type(None), bytes)
    assert refused > 50


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=80))
def test_any_bytes_give_a_value_or_a_refusal(tmp_path: Path, data: bytes) -> None:
    _, said = tried(tmp_path / "t.pt", data)
    assert said is None or "t.pt is refused: " in said


def test_missing_large_and_special_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_restricted(tmp_path / "none.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_restricted(tmp_path / "pipe.pt")
    with pytest.raises(ValueError, match="at most 10 are read: raise max_bytes"):
        load(tmp_path / "t.pt", saved(torch.ones(3), "zip"), max_bytes=10)
