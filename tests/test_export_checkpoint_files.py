"""What a baked folder holds, when it appears, and what is said of one that lost something."""

import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import build
from baked import vector_at
from safetensors.torch import load_file, save_file
from tiny import hooked, tokenizer
from torch import Tensor

from probes import HookedModel
from probes.sites import Unsupported
from steering import SteeringVector
from steering.export import checkpoint, checkpoint_check
from steering.export.checkpoint import Loading, bake, check_loading
from steering.weights import fold_vector, orthogonalise


def vector_of(model: HookedModel, size: float = 3.0) -> SteeringVector:
    return vector_at(model, "1.resid_post", size=size)


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A tiny model with its tokenizer in a folder, as if it had been published."""
    model = build(name).to(dtype)
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        held |= load_file(file)
    return held


def edit_config(folder: Path, **settings: Any) -> None:
    """Change settings of config.json; None takes one out."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def test_the_folder_holds_what_serving_needs(tmp_path: Path) -> None:
    model = HookedModel.load(str(saved("llama", tmp_path / "source")), device="cpu")
    model.tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=9)
    baked = bake(model, vector_of(model), tmp_path / "new" / "out")
    folder = baked.folder
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    words = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "w1 w2"}]
    assert words.chat_template == tokenizer().chat_template
    assert words.apply_chat_template(chat) == tokenizer().apply_chat_template(chat)
    raw = json.loads((folder / "tokenizer.json").read_text())
    assert raw["padding"] is None and raw["truncation"] is None  # of the call above
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["repetition_penalty"] == 1.25
    for file in folder.glob("*.json"):
        assert str(tmp_path) not in file.read_text()
    open_to = tmp_path / "ordinary"
    open_to.mkdir()
    assert folder.stat().st_mode == open_to.stat().st_mode
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    (open_to / "file").touch()
    assert modes == {stat.S_IMODE((open_to / "file").stat().st_mode)}
    assert str(baked).startswith(f"LlamaForCausalLM in {folder}: bias of model.layers.1.mlp.down")
    assert " of the live edit, which moves them by " in str(baked)


def test_a_merged_adapter_becomes_a_plain_folder_bit_for_bit(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        peft.get_peft_model(build("llama"), config).save_pretrained(str(tmp_path / "adapter"))
    merged = HookedModel.load(f"{source}+{tmp_path / 'adapter'}", device="cpu")
    baked = bake(merged, None, tmp_path / "out")
    assert baked.error == baked.effect == 0.0
    assert baked.how == "the model as it is" and str(baked).endswith(
        "within 0.0e+00 of those of the model"
    )
    held, before = weights(tmp_path / "out"), weights(source)
    own = merged.model.state_dict()
    assert held.keys() == own.keys() == before.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in own.items())
    changed = {name for name in held if not torch.equal(held[name], before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    again = HookedModel.load(str(tmp_path / "out"), device="cpu")
    assert again.fingerprint != merged.fingerprint  # of files; in memory they are one:
    assert HookedModel(again.model, again.tokenizer).fingerprint == (
        HookedModel(merged.model, merged.tokenizer).fingerprint
    )


@pytest.mark.parametrize(("name", "size"), [("llama", "150KB"), ("gpt2", "100KB")])
def test_weights_come_in_as_many_files_as_before(name: str, size: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source", max_shard_size=size)
    n = len(list(source.glob("*.safetensors")))
    assert n > 2
    model = HookedModel.load(str(source), device="cpu")
    for number, what in enumerate((vector_of(model), vector_of(model).doing("ablate"), None)):
        out = tmp_path / str(number)
        bake(model, what, out)
        files = list(out.glob("*.safetensors"))
        # an unembedding untied is one more weight, and files are filled one after the other
        assert len(files) in ((n,) if name == "llama" else (n - 1, n))
        assert (out / "model.safetensors.index.json").is_file()
    whole = HookedModel.load(str(saved(name, tmp_path / "whole")), device="cpu")
    bake(whole, vector_of(whole), tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_is_written_as_it_is(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source", dtype)
    model = HookedModel.load(str(source), device="cpu", dtype=dtype)
    vector = vector_of(model)
    unit = torch.finfo(dtype).eps
    for kind, what, edited in (
        ("vector", vector, fold_vector(model, vector)),
        ("ablation", vector.doing("ablate"), orthogonalise(model, vector)),
        ("none", None, model),
    ):
        baked = bake(model, what, tmp_path / kind)
        held, wanted = weights(tmp_path / kind), edited.model.state_dict()
        assert {tensor.dtype for tensor in held.values()} == {dtype}
        assert all(
            torch.equal(tensor, wanted[name]) for name, tensor in held.items() if name in wanted
        )
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert config["dtype"] == str(dtype).removeprefix("torch.")
        if what is None:
            assert baked.error == 0.0
            assert held.keys() == weights(source).keys()  # tied weights once
        else:  # only the edited weights were rounded
            assert 0.0 < baked.error < 4 * unit * baked.effect and baked.effect > 0.2


def test_an_edit_lost_in_rounding_is_not_written(tmp_path: Path) -> None:
    source = saved("gpt2", tmp_path / "source", torch.bfloat16)
    model = HookedModel.load(str(source), device="cpu", dtype="bfloat16")
    faint = vector_of(model, size=1e-4)
    with pytest.raises(RuntimeError, match="rounding to bfloat16 may be more .* dtype='float32'"):
        bake(model, faint, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    wide = HookedModel.load(str(source), device="cpu")  # the control: there is room in float32
    baked = bake(wide, vector_of(wide, size=1e-4), tmp_path / "out")
    assert baked.error < 0.5 * baked.effect


def test_nothing_is_written_over(tmp_path: Path) -> None:
    model = hooked("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(FileExistsError, match=f"something at .*{name} already, .* another"):
            bake(model, vector_of(model), tmp_path / name)
    assert (tmp_path / "full" / "notes").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert bake(model, vector_of(model), str(tmp_path / "empty")).folder == tmp_path / "empty"
    assert check_loading(tmp_path / "empty").clean


def test_a_folder_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write

    def slow(*given: Any) -> None:
        write(*given)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").write_text("mine")

    monkeypatch.setattr(checkpoint, "write", slow)
    with pytest.raises(FileExistsError, match="something at"):
        bake(hooked("llama"), vector_of(hooked("llama")), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, folder: Path, **_: Any) -> None:
        (folder / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        bake(hooked("llama"), vector_of(hooked("llama")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("point", ["write", "prove"])
def test_killed_anywhere_no_folder_has_the_final_name(point: str, tmp_path: Path) -> None:
    model, inner = hooked("llama"), getattr(checkpoint, point)
    child = os.fork()
    if not child:

        def killed(*given: Any) -> None:
            inner(*given)  # everything is there and done but for the name
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(checkpoint, point, killed)
        try:
            bake(model, vector_of(model), tmp_path / "out")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert all(path.name.startswith(".out.") for path in tmp_path.iterdir())
    assert bake(model, vector_of(model), tmp_path / "out").loading.clean  # and again


@pytest.mark.parametrize("how", ["switched off", "taken out"])
def test_a_lost_setting_is_named(how: str, tmp_path: Path) -> None:
    model = hooked("llama")
    baked = bake(model, vector_of(model), tmp_path / "out")
    assert check_loading(baked.folder) == baked.loading == Loading("LlamaForCausalLM")
    assert str(baked.loading) == "LlamaForCausalLM loads every weight of the files and lacks none"
    edit_config(baked.folder, mlp_bias=False if how == "switched off" else None)
    found = check_loading(baked.folder)
    assert not found.clean and found.flags == ("mlp_bias",)
    assert found.biases == found.unexpected and len(found.biases) == 9
    assert str(found) == (
        "LlamaForCausalLM leaves out 9 biases (first model.layers.0.mlp.down_proj.bias), and an "
        'offset baked into them with it: set "mlp_bias": true in config.json'
    )
    edit_config(baked.folder, mlp_bias=True)
    assert check_loading(baked.folder).clean


def test_a_lost_class_is_said(tmp_path: Path) -> None:
    model = hooked("qwen2")
    folder = bake(model, vector_of(model), tmp_path / "out").folder
    edit_config(folder, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    found = check_loading(folder)
    assert found.architecture == "Qwen2ForCausalLM" and found.flags == () and not found.clean
    assert "no setting of this class keeps them, so it is not the one they were" in str(found)


def test_other_losses_are_said(tmp_path: Path) -> None:
    model = hooked("llama")
    folder = bake(model, vector_of(model), tmp_path / "out").folder

    def damage(held: dict[str, Tensor]) -> None:
        held["model.layers.0.extra.weight"] = held.pop("model.layers.0.mlp.up_proj.weight")
        held["model.norm.weight"] = torch.ones(63)

    edit_weights(folder, damage)
    assert str(check_loading(folder)) == (
        "LlamaForCausalLM leaves out 1 weight (model.layers.0.extra.weight) that it has no place "
        "for; it lacks 1 weight (model.layers.0.mlp.up_proj.weight) in the files and fills them "
        "with values of its own; it finds 1 weight (model.norm.weight) of another shape"
    )
    with pytest.raises(FileNotFoundError, match="holds no config.json: give the folder"):
        check_loading(tmp_path)


def test_loading_leaves_the_messages_of_transformers_as_they_were(tmp_path: Path) -> None:
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        folder = bake(hooked("llama"), None, tmp_path / "out").folder
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
        edit_config(folder, model_type="no such")
        with pytest.raises(ValueError):
            checkpoint_check.load(folder, torch.float32)
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)
        if not bars:
            logging.disable_progress_bar()


def test_marks_of_a_quantised_file_are_not_written(tmp_path: Path) -> None:
    """As transformers leaves them on a model whose weights it dequantised."""
    source: Any = build("llama")
    source.config.quantization_config = {"quant_method": "gguf"}
    baked = bake(HookedModel(source, tokenizer()), None, tmp_path / "out")
    assert baked.loading.clean
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert source.config.quantization_config  # the caller's own


def test_a_live_adapter_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = HookedModel(peft.get_peft_model(build("llama"), config), tokenizer())
    with pytest.raises(Unsupported, match="carries a live adapter: merge it first"):
        bake(model, None, tmp_path / "out")
