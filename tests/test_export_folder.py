"""Exports as folders: what is written for each target, read back, checked without the program."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import hooked, tokenizer

from probes import HookedModel
from probes.sites import Site, Unsupported
from steering import HeadOffsets, Origin, SteeringVector
from steering.export.exports import TARGETS, export, load_artefact, read_export
from steering.export.format_check import check_format
from steering.export.importing import import_vector
from steering.export.inspecting import inspect_file
from steering.export.proving import RUNNERS, prove
from steering.export.serve_args import serve_args

FILES = [target for target in TARGETS if target != "checkpoint"]


def vector(*layers: int) -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    rows = {Site(k, "resid_post"): torch.randn(64, generator=generator) for k in layers or (1,)}
    return SteeringVector(rows, Origin.of(hooked()))


@pytest.mark.parametrize("target", FILES)
def test_every_target_holds_what_was_meant_by_its_own_loader(target: str, tmp_path: Path) -> None:
    done = export(vector(), target, tmp_path / "out", strength=2.5)
    assert read_export(tmp_path / "out") == done
    assert done.path.is_file() and done.steering.strength == 2.5
    found = check_format(done.path, target, done.steering)
    assert found.outcome == "format checked" and not found.verified
    assert "format checked, not run" in str(found)
    # the same file against twice the strength, and another block
    twice = check_format(done.path, target, export(vector(), target, tmp_path / "b").steering)
    assert twice.outcome == "different"
    other = check_format(done.path, target, export(vector(2), target, tmp_path / "c").steering)
    assert other.outcome == "different"


@pytest.mark.parametrize("target", ["gguf", "vllm-lens", "easysteer"])
def test_faults_of_a_file_are_told_by_name(target: str, tmp_path: Path) -> None:
    meant = export(vector(1), target, tmp_path / "meant", strength=2.0)
    for strength, layer, said in ((4.0, 1, "twice as strong"), (-2.0, 1, "the other sign")):
        wrong = export(vector(layer), target, tmp_path / said, strength=strength)
        found = check_format(wrong.path, target, meant.steering)
        assert (found.outcome, found.diagnosis) == ("different", said)
        assert said in str(found)
    v = meant.steering.what
    assert isinstance(v, SteeringVector)
    late = SteeringVector({Site(2, "resid_post"): v["1.resid_post"]}, v.origin)
    wrong = export(late, target, tmp_path / "late", strength=2.0)
    assert check_format(wrong.path, target, meant.steering).diagnosis == "one block late"


def test_a_vector_that_the_server_would_skip_is_not_applied(tmp_path: Path) -> None:
    """vllm-lens skips a vector of another width: its loader's copy finds nothing applied."""
    done = export(vector(), "vllm-lens", tmp_path / "out")
    from steering.export.vllm_lens import encode

    entry = json.loads(done.path.read_text())
    path = tmp_path / "narrow.json"
    path.write_text(json.dumps({**entry, "activations": encode(torch.ones(1, 32))}))
    assert check_format(path, "vllm-lens", done.steering).outcome == "not applied"


def test_proving_without_the_program_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNLENS_VLLM_PYTHON", "")
    done = export(vector(), "vllm-lens", tmp_path / "out")
    found = prove(hooked(), done.steering, done.path, "vllm-lens")
    assert found.outcome == "format checked"
    assert any("make serve-vllm" in note for note in found.notes)
    with pytest.raises(RuntimeError, match="make serve-vllm"):
        prove(hooked(), done.steering, done.path, "vllm-lens", "vllm")
    with pytest.raises(ValueError, match="'llama.cpp' does not run exports for vllm-lens"):
        prove(hooked(), done.steering, done.path, "vllm-lens", "llama.cpp")


def test_a_checkpoint_is_proven_by_plain_transformers(tmp_path: Path) -> None:
    done = export(vector(), "checkpoint", tmp_path / "out", model=hooked())
    assert read_export(tmp_path / "out").path == tmp_path / "out"
    found = prove(hooked(), done.steering, done.path, "checkpoint", n_tokens=2)
    assert found.outcome == "equal"
    assert found.floor is not None and found.floor < 1e-4  # the model before ran as well
    with pytest.raises(ValueError, match="no loader"):
        prove(hooked(), done.steering, done.path, "checkpoint", "format")


def test_ablation_at_one_site_is_proven_as_the_ablation_that_is_baked(tmp_path: Path) -> None:
    """The weights lose the vector at every write, and so does what was meant."""
    done = export(vector().doing("ablate"), "checkpoint", tmp_path / "out", model=hooked())
    assert len(done.steering.what.edits(hooked())) > 1
    found = prove(hooked(), done.steering, done.path, "checkpoint", n_tokens=3)
    assert found.outcome == "equal", str(found)


def test_a_half_precision_checkpoint_is_equal_within_its_own_rounding(tmp_path: Path) -> None:
    half, plain = copy.deepcopy(hooked().model), copy.deepcopy(hooked().model)
    for weight, rounded in zip(plain.parameters(), half.parameters(), strict=True):
        rounded.data = rounded.data.bfloat16()  # weights only: rotary frequencies stay as they are
        weight.data = rounded.data.float()
    half.config.dtype = torch.bfloat16
    model = HookedModel(half, tokenizer(), name="half")
    wide = HookedModel(plain, tokenizer(), name="widened")
    made = export(vector(), "checkpoint", tmp_path / "out", strength=0.37, model=model)
    found = prove(wide, made.steering, made.path, "checkpoint", n_tokens=3)
    assert found.outcome == "equal", str(found)
    assert found.gaps["as it was made"] > 1e-4  # the bias is rounded to bfloat16


def test_a_vector_of_another_checkpoint_is_noted(tmp_path: Path) -> None:
    other = copy.deepcopy(hooked().model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    model = HookedModel(other, tokenizer(), name="another checkpoint")
    made = export(vector(), "checkpoint", tmp_path / "out", model=model)
    found = prove(model, made.steering, made.path, "checkpoint", n_tokens=3)
    assert found.outcome == "equal"
    assert any("made on another checkpoint" in note for note in found.notes)


def test_a_checkpoint_that_lost_its_flag_is_not_applied(tmp_path: Path) -> None:
    done = export(vector(), "checkpoint", tmp_path / "out", model=hooked())
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["mlp_bias"]
    path.write_text(json.dumps({**config, "mlp_bias": False}))
    found = prove(hooked(), done.steering, done.path, "checkpoint", n_tokens=2)
    assert found.outcome == "not applied"
    assert any("mlp_bias" in note for note in found.notes)


def test_nothing_is_written_over_and_nothing_half_written(tmp_path: Path) -> None:
    export(vector(), "gguf", tmp_path / "out")
    with pytest.raises(FileExistsError, match="give another folder"):
        export(vector(), "gguf", tmp_path / "out")
    with pytest.raises(Unsupported, match="block 0"):
        export(vector(0), "gguf", tmp_path / "zero")
    with pytest.raises(ValueError, match="unknown target 'onnx'"):
        export(vector(), "onnx", tmp_path / "zero")
    with pytest.raises(Unsupported, match="only EasySteer is told tokens"):
        export(vector(), "gguf", tmp_path / "zero", scope="prompt")
    with pytest.raises(ValueError, match="give it with --model"):
        export(vector(), "checkpoint", tmp_path / "zero")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_that_do_more_than_add_are_not_called_checked(tmp_path: Path) -> None:
    lens = export(vector(), "vllm-lens", tmp_path / "lens")
    entry = json.loads(lens.path.read_text())
    path = tmp_path / "other.json"
    for change in ({"norm_match": True}, {"position_indices": [0]}):
        path.write_text(json.dumps({**entry, **change}))
        with pytest.raises(ValueError, match="scales this vector to each token"):
            check_format(path, "vllm-lens", lens.steering)
    easy = export(vector(), "easysteer", tmp_path / "easy", scope="generated")
    assert check_format(easy.path, "easysteer", easy.steering).outcome == "format checked"
    said = json.loads(easy.path.read_text())
    path = tmp_path / "easy" / "other.json"
    for change in ({"algorithm": "erase"}, {"normalize": True}):
        path.write_text(json.dumps({**said, "vectors": [{**said["vectors"][0], **change}]}))
        with pytest.raises(ValueError, match="EasySteer does more than add"):
            check_format(path, "easysteer", easy.steering)
    for apply in ({}, {"prompt": "all"}, {"prompt": "all", "generation": "all"}):
        path.write_text(json.dumps({**said, "vectors": [{**said["vectors"][0], "apply": apply}]}))
        found = check_format(path, "easysteer", easy.steering)
        assert found.outcome == "different" and "it acts at the tokens" in str(found)


def test_a_file_that_the_server_would_look_for_elsewhere_is_refused(tmp_path: Path) -> None:
    export(vector(), "vllm-hook", tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = read_export(tmp_path / "moved")
    with pytest.raises(ValueError, match="would look for"):
        check_format(moved.path, "vllm-hook", moved.steering)
    gpt2 = replace(vector().origin, model_type="gpt2")
    with pytest.raises(Unsupported, match="hook nothing and go on"):
        export(replace(vector(), origin=gpt2), "vllm-hook", tmp_path / "gpt2")


@pytest.mark.parametrize("target", FILES)
def test_head_offsets_are_refused_with_what_can_hold_them(target: str, tmp_path: Path) -> None:
    model = hooked()
    width = model.layout.blocks[0].widths["head_out"]
    heads = HeadOffsets({(1, 0): torch.ones(width)}, Origin.of(model))
    with pytest.raises(Unsupported, match="--to checkpoint"):
        export(heads, target, tmp_path / "out")
    assert isinstance(load_artefact(heads.save(tmp_path / "h.safetensors")), HeadOffsets)


def test_a_changed_file_is_not_taken_for_the_export(tmp_path: Path) -> None:
    done = export(vector(), "gguf", tmp_path / "out")
    done.path.write_bytes(done.path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="not the file that was exported"):
        read_export(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no export of this project"):
        read_export(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "../../etc/passwd"}, "outside of it"),
        ({"hashes": {"/etc/passwd": "0"}}, "outside of it"),
        ({"format": 2}, "its format is 2"),
        ({"target": "onnx"}, "its target is"),
        ({"extra": 1}, "damaged"),
        ({"hashes": ["x"]}, "damaged"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"unit": "metres"}, "unit is 'metres'"),
    ],
)
def test_a_damaged_record_is_refused(change: dict, said: str, tmp_path: Path) -> None:
    export(vector(), "gguf", tmp_path / "out")
    path = tmp_path / "out" / "alignlens" / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        read_export(tmp_path / "out")


@pytest.mark.parametrize(
    ("target", "format"),
    [("gguf", "gguf"), ("vllm-lens", "vllm-lens")],
)
def test_what_is_exported_is_recognised_and_read_back(
    target: str, format: str, tmp_path: Path
) -> None:
    done = export(vector(1, 2), target, tmp_path / "out", strength=2.0)
    assert inspect_file(done.path).format == format
    assert inspect_file(tmp_path / "out").format == "export"
    back = import_vector(done.path, None if target == "gguf" else hooked())
    for site, raw in vector(1, 2).vectors.items():
        assert torch.equal(back[site], 2 * raw)
    with pytest.raises(ValueError, match="source.safetensors"):
        import_vector(tmp_path / "out")


def test_files_of_other_tools_are_recognised_by_what_is_in_them(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden"
    pickled = inspect_file(golden / "foreign.pkl")
    assert pickled.format == "steering-vectors"
    assert "decoder_block vectors, layers 0, 2, -1" in str(pickled)
    assert "the model" in pickled.unknown[0]
    assert inspect_file(golden / "foreign.pt").format == "steering-vectors"
    assert inspect_file(golden / "easysteer_wire.json").format == "easysteer"
    torch.save(torch.ones(4, 64), tmp_path / "rows.pt")
    rows = tmp_path / "rows.pt"
    assert inspect_file(rows).format == "block-tensor"
    # a bare tensor could mean several things, and each is read only when it is said
    model = hooked()
    with pytest.raises(ValueError, match="say the layers"):
        import_vector(rows, model)
    persona = import_vector(rows, model, "persona-vectors")
    assert persona.sites == (Site(0, "resid_post"), Site(1, "resid_post"))
    torch.save(torch.ones(1, 64), tmp_path / "row.pt")
    asked = {"layers": [2], "convention": "hidden_states"}
    assert import_vector(tmp_path / "row.pt", model, **asked).sites == (Site(1, "resid_post"),)
    with pytest.raises(ValueError, match="width|16"):
        import_vector(golden / "foreign.pkl", model)
    (tmp_path / "note.txt").write_text("hello")
    assert inspect_file(tmp_path / "note.txt").format == "unknown"
    with pytest.raises(ValueError, match="not recognised"):
        import_vector(tmp_path / "note.txt", model)


def test_a_wire_dict_of_easysteer_is_read_back(tmp_path: Path) -> None:
    from steering.export.blocks import block_offsets
    from steering.export.easysteer import wire

    made = vector(1, 2)
    path = tmp_path / "wire.json"
    path.write_text(json.dumps(wire(block_offsets(made, target="easysteer"))))
    back = import_vector(path, hooked())
    assert back.sites == made.sites
    assert all(torch.equal(back[site], made[site]) for site in made.sites)


def test_every_target_has_runners_and_the_page_of_serve_args(tmp_path: Path) -> None:
    assert set(RUNNERS) == set(TARGETS)
    gguf = export(vector(), "gguf", tmp_path / "a")
    lens = export(vector(), "vllm-lens", tmp_path / "b")
    hook = export(vector(), "vllm-hook", tmp_path / "c")
    assert "--control-vector" in serve_args(gguf, model="m.gguf").command
    said = serve_args(lens)
    assert "--no-enable-prefix-caching" in said.command
    assert any("later request without the vector" in reason for reason in said.reasons)
    with pytest.raises(ValueError, match="llama.cpp cannot use an export to vllm-lens.*--to gguf"):
        serve_args(lens, "llama.cpp")
    with pytest.raises(ValueError, match="no server for an export to vllm-hook"):
        serve_args(hook)


@pytest.mark.parametrize("target", ["gguf", "checkpoint"])
def test_an_export_can_be_read_by_a_server_of_another_user(target: str, tmp_path: Path) -> None:
    """Modes are those of ordinary new files, not of private ones."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").touch()
    done = export(vector(), target, tmp_path / "out", model=hooked())
    assert done.folder.stat().st_mode == (tmp_path / "plain").stat().st_mode
    for path in done.folder.iterdir():
        if path.is_file():
            assert path.stat().st_mode == (tmp_path / "file").stat().st_mode, path.name


def test_a_checkpoint_appears_with_its_record_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the weights are written, the same command finishes when it is run again."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SteeringVector, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            export(vector(), "checkpoint", tmp_path / "out", model=hooked())
    assert not (tmp_path / "out").exists()
    export(vector(), "checkpoint", tmp_path / "out", model=hooked())
    assert read_export(tmp_path / "out").target == "checkpoint"
