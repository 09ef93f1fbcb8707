"""`alignlens export`, `verify`, `inspect`, `import`, `serve-args`: what they write, say, refuse."""

import json
import subprocess
import sys
from pathlib import Path

import commanding
import pytest
import tiny_lineage
import torch
from commanding import Run
from typer.testing import CliRunner

from analyses import cli
from probes import HookedModel
from probes.sites import Site
from steering import HeadOffsets, Origin, SteeringVector

HEAVY = ("torch", "transformers", "pandas", "matplotlib", "numpy")
VERBS = ("export", "verify", "inspect", "import", "serve-args")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a vector of it, one at block 0, and head offsets."""
    root = tmp_path_factory.mktemp("export")
    tiny_lineage.save(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # vectors know their model by the name it was loaded with
        model = HookedModel.load("model", device="cpu")
    origin = Origin.of(model)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(64, generator=generator)
    SteeringVector({Site(1, "resid_post"): v}, origin).save(root / "v.safetensors")
    SteeringVector({Site(0, "resid_post"): v}, origin).save(root / "zero.safetensors")
    HeadOffsets({(1, 0): torch.ones(origin.head_dim)}, origin).save(root / "heads.safetensors")
    return root


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`alignlens ...` in this process, in the folder of the files, with no server there."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("ALIGNLENS_VLLM_PYTHON", "")
    monkeypatch.setenv("ALIGNLENS_LLAMA_CPP", "")
    return commanding.runner(monkeypatch, capfd)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_examples_and_imports_nothing_heavy(verb: str) -> None:
    done = CliRunner().invoke(cli.app, [verb, "--help"])
    assert done.exit_code == 0
    assert any(line.startswith(f"  alignlens {verb}") for line in done.output.splitlines())
    asked = (
        f"import sys\nsys.argv = ['alignlens', '{verb}', '--help']\n"
        "from analyses.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stdout.splitlines()[-1] == "[]"


def test_a_checkpoint_is_exported_and_proven(run: Run, files: Path) -> None:
    made = run("export", "v.safetensors", "--to", "checkpoint", "--out", "baked", "--strength", 2)
    assert made.code == 0, made.err
    assert made.out.splitlines()[-1] == "prove it: alignlens verify baked"
    found = run("verify", "baked", "--tokens", 2, "--n", 2)
    assert found.code == 0, found.err
    assert found.out.startswith("applied and equal: ")
    folder = files / "baked-verdict"
    assert (folder / "verdict.html").is_file()
    said = json.loads((folder / "record.json").read_text())
    assert said["command"] == "alignlens verify baked --tokens 2 --n 2"
    config = json.loads((files / "baked" / "config.json").read_text())
    (files / "baked" / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))
    # the record notices first that the folder is not the one that was written
    assert "not the file that was exported" in run("verify", "baked", "--tokens", 2).err
    alone = run(
        "verify", "baked", "--vector", "v.safetensors", "--to", "checkpoint", "--strength", 2,
        "--tokens", 2, "--n", 2, "--out", "lost", "--json",
    )  # fmt: skip
    assert alone.code == 1
    assert json.loads(alone.out)["outcome"] == "not applied"


def test_a_model_is_written_as_it_is_without_a_vector(run: Run, files: Path) -> None:
    """So an adapter named in the model's name is merged."""
    made = run("export", "--to", "checkpoint", "--model", "model", "--out", "merged")
    assert made.code == 0, made.err
    assert "the model as it is" in made.out
    model, merged = (HookedModel.load(str(files / n), device="cpu") for n in ("model", "merged"))
    assert torch.equal(model.logits(["w1 w2"]), merged.logits(["w1 w2"]))
    alone = run("export", "--to", "gguf", "--out", "x")
    assert alone.code == 2 and "give a vector" in alone.err


def test_without_the_program_the_format_is_checked_and_that_is_said(run: Run) -> None:
    assert run("export", "v.safetensors", "--to", "gguf", "--out", "cv").code == 0
    found = run("verify", "cv")
    assert found.code == 0, found.err
    assert found.out.startswith("format checked, not run: ")
    assert "make serve-llamacpp" in found.out
    asked = run("verify", "cv", "--target", "llama.cpp")
    assert asked.code == 2 and "make serve-llamacpp" in asked.err
    wrong = run(
        "verify", "cv/vector.gguf", "--vector", "v.safetensors", "--to", "gguf", "--strength", -1,
        "--target", "format",
    )  # fmt: skip
    assert wrong.code == 1
    assert "applied but different" in wrong.out and "the other sign" in wrong.out


def test_a_foreign_file_is_inspected_and_imported(run: Run, files: Path) -> None:
    assert run("export", "v.safetensors", "--to", "gguf", "--out", "mine").code == 0
    seen = run("inspect", "mine/vector.gguf")
    assert "written by: alignlens" in seen.out and "for the outputs of blocks 1" in seen.out
    assert run("import", "mine/vector.gguf", "--out", "back.safetensors").code == 0
    back, there = (SteeringVector.load(files / n) for n in ("back.safetensors", "v.safetensors"))
    assert torch.equal(back["1.resid_post"], there["1.resid_post"])
    (files / "v.svec").write_text(
        json.dumps({"model_type": "llama", "directions": {"1": [[0.5] * 64]}})
    )
    assert "say --location" in run("inspect", "v.svec").out
    doubt = run("import", "v.svec", "--model", "model")
    assert doubt.code == 2 and "layer_input" in doubt.err
    given = ("import", "v.svec", "--model", "model", "--location", "layer_input", "--out", "s.st")
    assert run(*given).code == 0
    assert SteeringVector.load(files / "s.st").sites == (Site(1, "resid_pre"),)
    nothing = run("import", "v.svec", "--location", "layer_output")
    assert nothing.code == 2 and "say which model" in nothing.err


def test_the_serving_command_is_printed_with_its_reasons(run: Run) -> None:
    assert run("export", "v.safetensors", "--to", "vllm-lens", "--out", "lens").code == 0
    said = run("serve-args", "lens", "--target", "vllm").out
    assert "--no-enable-prefix-caching" in said.splitlines()[0]
    assert "# --no-enable-prefix-caching: keys of a steered prompt" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "zero.safetensors", "--to", "gguf", "--out", "x"), "block 0.*--to checkpoint"),
        (("export", "heads.safetensors", "--to", "gguf", "--out", "x"), "--to checkpoint"),
        (("export", "v.safetensors", "--to", "onnx", "--out", "x"), "unknown target 'onnx'"),
        (("export", "none.safetensors", "--to", "gguf", "--out", "x"), "no file none.safetensors"),
        (("export", "v.safetensors", "--to", "gguf", "--out", "model"), "something at model"),
        (
            ("export", "v.safetensors", "--to", "gguf", "--model", "model", "--out", "x"),
            "--model is for --to checkpoint",
        ),
        (("verify", "model"), "no export of this project"),
        (("verify", "v.safetensors", "--vector", "v.safetensors"), "--vector and --to go together"),
        (("verify", "model", "--tokens", 1), "give 2 at least"),
        (("inspect", "nothing.gguf"), "there is no file"),
        (("import", "v.svec", "--layers", "a"), "give numbers"),
        (("import", "v.svec", "--location", "here"), "choose layer_output or layer_input"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple, said: str, run: Run, files: Path) -> None:
    import re

    found = run(*arguments)
    assert found.code == 2
    assert re.search(said, found.err) and "Traceback" not in found.err
    assert not (files / "x").exists()
