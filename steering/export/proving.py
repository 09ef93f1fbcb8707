"""From an export to a verdict: which program is run, with what files, and what stands in for it."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from probes import datasets
from probes.model import HookedModel
from probes.prompts import Prompt, Template
from steering.applied import Steering
from steering.export import loaders
from steering.export.format_check import PROGRAMS, check_format
from steering.export.replays import Consumer, Ids, Replay
from steering.export.verdict import Verdict, verify

RUNNERS = {
    "gguf": ("llama.cpp", "llama-server"),
    "vllm-lens": ("vllm", "vllm-server"),
    "checkpoint": ("transformers", "transformers-serve", "llama.cpp", "vllm"),
    "easysteer": (),
    "vllm-hook": (),
    "lm-eval": (),
}
"""Programs that an export can be proven on, the first by default; without any, and with "format",
only the file is checked."""


def prompts_for(model: HookedModel, n: int = 4) -> list[Ids]:
    """Token ids of a few benign requests in the model's template, or, where it has none, of the
    bare requests: any tokens prove an export."""
    return ids_of(model, datasets.general("validation")[:n])


def ids_of(model: HookedModel, prompts: Sequence[Prompt]) -> list[Ids]:
    """Token ids of prompts."""
    try:
        template = model.template
    except ValueError:  # a base model
        template = Template(model.tokenizer, "none", {}, model.context_length)
    return [tuple(template.render(prompt).ids) for prompt in prompts]


def prove(
    model: HookedModel,
    steering: Steering,
    path: Path | str,
    target: str,
    runner: str | None = None,
    *,
    prompts: Sequence[Ids] | None = None,
    n_tokens: int = 4,
    gguf_model: Path | str | None = None,
    server: Path | str | None = None,
    tolerance: float | None = None,
) -> Verdict:
    """Run an exported file (a folder for a checkpoint) in a program, and judge what it does.

    `steering` is what was meant, `model` the unsteered model in float32. `runner` is one of
    `RUNNERS[target]`, or "format"; by default the first of them, and where that is not here the
    format is checked and the verdict says so. `gguf_model` replaces the float32 GGUF that is made otherwise; `server`
    is the `llama-server` program, or the address of a running vLLM server.
    """
    if target not in RUNNERS:
        raise ValueError(f"unknown target {target!r}: choose one of {', '.join(RUNNERS)}")
    if runner not in (None, "format", *RUNNERS[target]):
        known = ", ".join((*RUNNERS[target], *(["format"] if target in PROGRAMS else [])))
        raise ValueError(f"{runner!r} does not run exports for {target}: choose one of {known}")
    prompts = prompts_for(model) if prompts is None else prompts
    if not prompts:
        raise ValueError("no prompts were given to replay: give at least one, or None for a few")
    missing = ""
    if runner != "format" and RUNNERS[target]:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                consumer, notes = _consumer(
                    model, steering, Path(path), target, runner or RUNNERS[target][0],
                    gguf_model, server, Path(scratch),
                )  # fmt: skip
            except RuntimeError as error:
                if runner is not None or target not in PROGRAMS:
                    raise
                missing = str(error)
            else:
                if steering.what.origin.fingerprint != model.fingerprint:
                    notes.append(f"the vector was made on another checkpoint than {model.name}")
                return verify(
                    model, steering, consumer, prompts, n_tokens, target=target,
                    tolerance=tolerance, rounding=_rounding(Path(path), target), notes=notes,
                )  # fmt: skip
    checked = check_format(path, target, steering)
    return replace(checked, notes=(*checked.notes, missing)) if missing else checked


def _rounding(path: Path, target: str) -> float:
    """Share of the effect by which rounding the edited weights of a half-precision checkpoint may
    change it: 2 units of the precision were measured for ablation of SmolLM2, less for a bias."""
    if target != "checkpoint":
        return 0.0
    config = json.loads((path / "config.json").read_text())
    said = str(config.get("dtype") or config.get("torch_dtype"))
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(said)
    return 0.0 if dtype is None else 4 * torch.finfo(dtype).eps


class Both:
    """A program that runs the baked model, and beside it the one before, which sets the floor."""

    def __init__(self, steered: Consumer, unsteered: Consumer | None) -> None:
        self.steered, self.unsteered = steered, unsteered
        self.name, self.version = steered.name, steered.version

    def replay(self, prompts: Sequence[Ids], n_tokens: int, steered: bool) -> list[Replay] | None:
        """Greedy answers of the one or the other."""
        program = self.steered if steered else self.unsteered
        return None if program is None else program.replay(prompts, n_tokens, True)


def _consumer(
    model: HookedModel,
    steering: Steering,
    path: Path,
    target: str,
    runner: str,
    gguf_model: Path | str | None,
    server: Path | str | None,
    scratch: Path,
) -> tuple[Consumer, list[str]]:
    notes: list[str] = []
    if runner == "transformers":
        from steering.export.checkpoint_check import check_loading
        from steering.export.transformers_run import PlainTransformers
        from steering.export.unsteered import plain_folder

        loading = check_loading(path)
        before = PlainTransformers(plain_folder(model))
        return Both(PlainTransformers(path), before), [str(loading)]
    if runner == "transformers-serve":
        from steering.export.transformers_run import TransformersServe
        from steering.export.unsteered import plain_folder

        return TransformersServe(path, plain_folder(model)), notes
    if runner in ("llama.cpp", "llama-server"):
        from steering.export.llama_cpp import LlamaCpp, LlamaServer, llama_cpp_home
        from steering.export.unsteered import float32_gguf

        if target == "checkpoint":
            baked = LlamaCpp(float32_gguf(path, scratch / "baked.gguf"), {})
            try:
                plain = LlamaCpp(gguf_model or float32_gguf(model), {})
            except (RuntimeError, ValueError) as error:
                notes.append(f"the model before could not be run beside it: {error}")
                plain = None
            return Both(baked, plain), notes
        plain = Path(gguf_model) if gguf_model is not None else float32_gguf(model)
        if runner == "llama.cpp":
            table = loaders.as_llama_cpp(path, model.n_layers, model.d_model)
            notes.append("the vector's file was read by a numpy copy of llama.cpp's loader")
            return LlamaCpp(plain, table), notes
        home = llama_cpp_home()
        binary = server or (home / "bin" / "llama-server" if home else None)
        if binary is None or not Path(binary).is_file():
            raise RuntimeError(
                "llama-server is not here: run `make serve-llamacpp`, or name the program (--server)"
            )
        return LlamaServer(binary, plain, path), notes
    if runner == "vllm-server":
        from steering.export.client import VllmServer
        from steering.export.vllm_lens import read_entries

        if server is None:
            raise ValueError("give the address of the running vLLM server (--server http://...)")
        return VllmServer(str(server), read_entries(path)), notes
    from steering.export.unsteered import plain_folder
    from steering.export.vllm_lens import read_entries
    from steering.export.vllm_offline import VllmOffline

    if target == "checkpoint":
        return Both(VllmOffline(path, None), VllmOffline(plain_folder(model), None)), notes
    return VllmOffline(plain_folder(model), read_entries(path)), notes
