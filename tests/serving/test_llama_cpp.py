"""Exports in the real llama.cpp: library, server, its own generator. Needs `make serve-llamacpp`."""

import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from probes import HookedModel
from probes.engines import Batch
from probes.lineage.base import gguf_path
from probes.sites import Site
from steering import Origin, Steering, SteeringVector
from steering.export.blocks import block_offsets
from steering.export.checkpoint import bake
from steering.export.control_vector import read_control_vector, write_control_vector
from steering.export.exports import export
from steering.export.llama_cpp import LlamaCpp, LlamaServer, llama_cpp_home
from steering.export.loaders import Table, as_llama_cpp
from steering.export.proving import prompts_for, prove
from steering.export.unsteered import float32_gguf
from steering.export.verdict import verify

pytestmark = pytest.mark.serving


@pytest.fixture(scope="session")
def weights(base: HookedModel) -> Path:
    """SmolLM2 as a float32 GGUF, by llama.cpp's own converter."""
    return float32_gguf(base)


@pytest.fixture(scope="session")
def program(weights: Path) -> LlamaCpp:
    return LlamaCpp(weights, {})


def home() -> Path:
    found = llama_cpp_home()
    assert found is not None, "run `make serve-llamacpp` first"
    return found


def vector(base: HookedModel, layer: int, seed: int = 0) -> SteeringVector:
    v = torch.randn(base.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector({Site(layer, "resid_post"): v / v.norm()}, Origin.of(base))


def table(base: HookedModel, meant: Steering, folder: Path) -> Table:
    """Through the file: written, and read as llama.cpp's loader does."""
    assert isinstance(meant.what, SteeringVector)
    offsets = block_offsets(meant.what, meant.strength, target="llama.cpp")
    path = write_control_vector(folder / "v.gguf", offsets, Origin.of(base))
    return as_llama_cpp(path, base.n_layers, base.d_model)


@pytest.mark.parametrize("strength", [-4.0, 4.0, 30.0])
@pytest.mark.parametrize("layer", [1, 15, 29])
def test_logits_equal_our_own_edit_to_1e_4(
    layer: int, strength: float, base: HookedModel, program: LlamaCpp, tmp_path: Path
) -> None:
    meant = Steering(vector(base, layer), strength)
    program.added = table(base, meant, tmp_path)
    found = verify(base, meant, program, prompts_for(base, 2), 3, target="gguf")
    assert found.outcome == "equal", str(found)
    assert found.gaps["as it was made"] <= 1e-4 < found.effect / 100


@pytest.mark.parametrize(
    ("served", "outcome", "diagnosis"),
    [
        ("shifted", "different", "one block late"),
        ("doubled", "different", "twice as strong"),
        ("flipped", "different", "the other sign"),
        ("ignored", "not applied", "not at all"),
    ],
)
def test_wrong_exports_get_their_own_verdict(
    served: str, outcome: str, diagnosis: str, base: HookedModel, program: LlamaCpp, tmp_path: Path
) -> None:
    meant = Steering(vector(base, 15), 8.0)
    right = table(base, meant, tmp_path)
    program.added = {
        "shifted": {16: right[15]},
        "doubled": {15: 2 * right[15]},
        "flipped": {15: -right[15]},
        "ignored": {},
    }[served]
    found = verify(base, meant, program, prompts_for(base, 2), 3, target="gguf")
    assert (found.outcome, found.diagnosis) == (outcome, diagnosis)


def test_another_model_is_recognised(program: LlamaCpp, tmp_path: Path) -> None:
    """The vector is for builtin:aligned, the program serves the base."""
    aligned = HookedModel.load("builtin:aligned", device="cpu")
    meant = Steering(vector(aligned, 15), 8.0)
    program.added = table(aligned, meant, tmp_path)
    found = verify(aligned, meant, program, prompts_for(aligned, 2), 3, target="gguf")
    assert found.outcome == "another model"


def test_a_vector_set_before_leaves_nothing_behind(
    base: HookedModel, program: LlamaCpp, tmp_path: Path
) -> None:
    """The library keeps rows of blocks that a shorter buffer does not reach."""
    program.added = {28: 30 * np.ones(base.d_model, np.float32)}
    program.replay(prompts_for(base, 1), 1, steered=True)
    meant = Steering(vector(base, 5), 8.0)
    program.added = table(base, meant, tmp_path)
    assert verify(base, meant, program, prompts_for(base, 1), 2, target="gguf").outcome == "equal"


def test_the_server_reads_the_file_itself(base: HookedModel, weights: Path, tmp_path: Path) -> None:
    meant = Steering(vector(base, 15), 30.0)
    done = export(vector(base, 15), "gguf", tmp_path / "shipped", strength=30.0)
    found = prove(
        base, meant, done.path, "gguf", "llama-server", prompts=prompts_for(base, 2), n_tokens=3
    )
    assert found.outcome == "equal" and found.kind == "top", str(found)
    assert found.gaps["as it was made"] <= 1e-3
    # the same server with a scale of 2 on its command line
    doubled = LlamaServer(home() / "bin" / "llama-server", weights, done.path, scale=2.0)
    twice = verify(base, meant, doubled, prompts_for(base, 1), 2, target="gguf")
    assert (twice.outcome, twice.diagnosis) == ("different", "twice as strong")


@pytest.mark.parametrize("fault", ["block 0", "width", "float16"])
def test_the_server_ignores_a_bad_file_and_is_found_out(
    fault: str, base: HookedModel, weights: Path, tmp_path: Path
) -> None:
    """It logs an error and serves on, unsteered: our writer never writes such a file."""
    path = tmp_path / "v.gguf"
    v = 30 * vector(base, 15)[Site(15, "resid_post")].numpy()
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_tensor("direction.15", {"width": v[:100], "float16": v.astype("f2")}.get(fault, v))
    if fault == "block 0":
        writer.add_tensor("direction.0", v)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="llama.cpp refuses"):
        as_llama_cpp(path, base.n_layers, base.d_model)
    served = LlamaServer(home() / "bin" / "llama-server", weights, path)
    meant = Steering(vector(base, 15), 30.0)
    found = verify(base, meant, served, prompts_for(base, 1), 2, target="gguf")
    assert found.outcome == "not applied", str(found)


def test_a_quantised_model_is_reported_with_its_own_floor(
    base: HookedModel, tmp_path: Path
) -> None:
    """SmolLM2 ships in four bits: what llama.cpp rounds is as large as a weak vector's effect."""
    strong, weak = Steering(vector(base, 5), 60.0), Steering(vector(base, 15), 1.0)
    program = LlamaCpp(gguf_path(), table(base, strong, tmp_path))
    found = verify(base, strong, program, prompts_for(base, 2), 2, target="gguf")
    assert found.outcome == "equal" and found.floor is not None
    assert 0.05 < found.floor < found.allowed < found.effect
    program.added = table(base, weak, tmp_path)
    assert (
        verify(base, weak, program, prompts_for(base, 2), 2, target="gguf").outcome == "cannot tell"
    )


def test_the_generators_vectors_are_of_the_block_before_their_number(
    base: HookedModel, weights: Path, tmp_path: Path
) -> None:
    """llama-cvector-generator's mean of differences, made again from our own activations."""
    pairs = [
        ("I love this happy day", "I hate this awful day"),
        ("What a joy to be here", "What a pain to be here"),
    ]
    encoded = [[base.tokenizer(text)["input_ids"] for text in pair] for pair in pairs]
    assert all(len(a) == len(b) for a, b in encoded)
    for name, side in (("positive", 0), ("negative", 1)):
        (tmp_path / name).write_text("".join(pair[side] + "\n" for pair in pairs))
    subprocess.run(
        [
            home() / "bin" / "llama-cvector-generator", "-m", weights, "--method", "mean",
            "--positive-file", tmp_path / "positive", "--negative-file", tmp_path / "negative",
            "-o", tmp_path / "made.gguf", "-ctk", "f32", "-ctv", "f32", "-fa", "off",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    vector = read_control_vector(tmp_path / "made.gguf", Origin.of(base))
    assert vector.origin.producer == "llama-cvector-generator"
    for layer in (0, 12, 28):
        site, rows = Site(layer, "resid_post"), []
        for pair in encoded:
            ids = torch.tensor(pair)
            found = base.engine.read(Batch(ids, torch.ones_like(ids)), [site])[site]
            # rows before the first token that differs are zero, and left out there
            rows.append((found[0] - found[1])[(ids[0] != ids[1]).nonzero()[0, 0] :])
        mean = torch.cat(rows).mean(0)
        mine = vector[site]
        assert torch.cosine_similarity(mine, mean, dim=0) > 0.9999
        assert mine.norm() == pytest.approx(1, abs=1e-4)
    late = vector[Site(13, "resid_post")]
    assert torch.cosine_similarity(late, vector[Site(12, "resid_post")], dim=0) < 0.999


@pytest.mark.parametrize("part", ["resid_post", "attn_out"])
def test_a_baked_checkpoint_runs_in_llama_cpp(part: str, base: HookedModel, tmp_path: Path) -> None:
    """A bias of the MLP, and one of attention, through llama.cpp's converter."""
    v = torch.randn(base.d_model, generator=torch.Generator().manual_seed(3))
    what = SteeringVector({Site(12, part): 2 * v}, Origin.of(base))
    done = bake(base, what, tmp_path / "baked")
    meant = Steering(what)
    found = prove(base, meant, done.folder, "checkpoint", "llama.cpp", n_tokens=3)
    assert found.outcome == "equal", str(found)
    assert found.gaps["as it was made"] <= 1e-4 < found.effect / 100
