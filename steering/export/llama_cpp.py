"""llama.cpp as a consumer: through its C library, and through `llama-server`.

The C library has no function that loads a control vector from a file, so there the file is read by
`steering.export.loaders` and handed over; the server reads it itself. Both run with float32 keys
and values and without repacked weights, so that differences are those of the export and not of
rounding. A quantised model rounds activations too: its own floor then stands in the verdict.
"""

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from probes.servers import post, serving, set_up
from steering.export.loaders import Table
from steering.export.replays import Ids, Replay

HOME = "ALIGNLENS_LLAMA_CPP"
"""Environment variable: the folder made by `make serve-llamacpp`."""


_ERROR = 4
"""Level of errors in llama.cpp's log."""


def llama_cpp_home() -> Path | None:
    """The folder with `bin` (libraries, `llama-server`) and `source`, where there is one."""
    named = os.environ.get(HOME)
    found = set_up("llama.cpp") if named is None else Path(named)
    return found.resolve() if found is not None and (found / "bin").is_dir() else None


class LlamaCpp:
    """llama.cpp's C library in this process, through llama-cpp-python."""

    name = "llama.cpp (C library)"

    def __init__(self, model: Path | str, added: Table, n_context: int = 512) -> None:
        """`model`: a GGUF model. `added`: vectors by block, as its loader gives them."""
        home = llama_cpp_home()
        if home is not None:  # the build that the server comes from
            os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(home / "bin"))
        try:
            import llama_cpp  # pyright: ignore[reportMissingImports]
        except (ImportError, RuntimeError, FileNotFoundError) as error:
            raise RuntimeError(
                f"llama.cpp is not here ({error}): set it up with `make serve-llamacpp`, or "
                "install llama-cpp-python"
            ) from error

        lib = self.lib = cast(Any, llama_cpp)
        # kept as an attribute: the library calls it as long as it lives
        self._log: list[str] = []
        self._listen = lib.llama_log_callback(self._heard)
        self.version = importlib.metadata.version("llama-cpp-python")
        lib.llama_log_set(self._listen, ctypes.c_void_p(0))
        lib.llama_backend_init()
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = False  # the repacked path crashes on some CPUs (Q4_1)
        self.model = lib.llama_model_load_from_file(str(model).encode(), settings)
        if not self.model:
            said = self._log[0] if self._log else "is it a GGUF model?"
            raise ValueError(f"llama.cpp cannot load {model}: {said}")
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = n_context
        options.flash_attn_type = 0
        options.type_k = options.type_v = 0  # float32
        self.context = lib.llama_init_from_model(self.model, options)
        self.n_layers = lib.llama_model_n_layer(self.model)
        self.d_model = lib.llama_model_n_embd(self.model)
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.n_context, self.added = n_context, added

    def _heard(self, level: int, text: bytes, _data: object) -> None:
        if level == _ERROR:
            self._log.append(text.decode(errors="replace").strip())

    def replay(self, prompts: Sequence[Ids], n_tokens: int, steered: bool) -> list[Replay]:
        """Greedy answers with the logits of each token."""
        self._set(self.added if steered else {})
        try:
            return [self._answer(prompt, n_tokens) for prompt in prompts]
        finally:
            self._set({})

    def _set(self, added: Table) -> None:
        if not added:
            status = self.lib.llama_set_adapter_cvec(self.context, None, 0, self.d_model, 0, 0)
        else:
            # all blocks at once: a shorter buffer leaves there what was set before
            buffer = np.zeros((self.n_layers - 1, self.d_model), np.float32)
            for k, vector in added.items():
                buffer[k - 1] = vector
            pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            status = self.lib.llama_set_adapter_cvec(
                self.context, pointer, buffer.size, self.d_model, 1, self.n_layers
            )
        if status:
            raise RuntimeError(f"llama.cpp refused the control vector (status {status})")

    def _answer(self, prompt: Ids, n_tokens: int) -> Replay:
        if len(prompt) + n_tokens > self.n_context:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens does not fit {self.n_context}: shorten it"
            )
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        read, tokens, rows = prompt, [], []
        for _ in range(n_tokens):
            ids = (self.lib.llama_token * len(read))(*read)
            if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, len(read))):
                raise RuntimeError("llama.cpp could not decode")
            row = np.ctypeslib.as_array(
                self.lib.llama_get_logits_ith(self.context, -1), shape=(self.n_vocab,)
            ).copy()
            rows.append(torch.from_numpy(row))
            tokens.append(int(row.argmax()))
            read = (tokens[-1],)
        return Replay(prompt, tuple(tokens), logits=torch.stack(rows))

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


class LlamaServer:
    """`llama-server`, started once without and once with the control vector's file."""

    name = "llama-server"

    def __init__(
        self, binary: Path | str, model: Path | str, vector: Path | str, scale: float = 1.0
    ) -> None:
        self.binary, self.model, self.vector, self.scale = map(str, (binary, model, vector, scale))
        said = subprocess.run(
            [self.binary, "--version"], capture_output=True, text=True, check=True
        )
        lines = (said.stdout + said.stderr).splitlines()
        self.version = next((line for line in lines if "version" in line), "").strip()

    def replay(self, prompts: Sequence[Ids], n_tokens: int, steered: bool) -> list[Replay]:
        """Greedy answers with the five likeliest tokens' log-probabilities."""
        with tempfile.TemporaryDirectory() as scratch:
            # commas and colons part that argument's fields, so the file gets a plain name
            plain = shutil.copy(self.vector, Path(scratch) / "vector.gguf")
            vector = ["--control-vector-scaled", f"{plain}:{self.scale}"] if steered else []
            with serving(server_line(self.binary, self.model, vector)) as address:
                return [self._answer(address, prompt, n_tokens) for prompt in prompts]

    def _answer(self, address: str, prompt: Ids, n_tokens: int) -> Replay:
        asked = {
            "prompt": list(prompt), "n_predict": n_tokens, "temperature": 0, "n_probs": 5,
            "cache_prompt": False, "ignore_eos": False, "return_tokens": True,
        }  # fmt: skip
        got = post(f"{address}/completion", asked)
        tokens, top = [], []
        # it leaves out tokens that are part of a character: the answer is read up to the first
        for token, step in zip(
            got["tokens"], got.get("completion_probabilities", []), strict=False
        ):
            if step["id"] != token:
                break
            tokens.append(token)
            top.append({t["id"]: t["logprob"] for t in step["top_logprobs"]})
        return Replay(prompt, tuple(tokens), top=tuple(top))


def server_line(binary: str, model: str, more: Sequence[str] = ()) -> list[str]:
    """The command that serves with float32 keys and values, so that numbers can be compared."""
    return [
        binary, "-m", model, "-c", "512", "-np", "1", "-ctk", "f32", "-ctv", "f32", "-fa", "off",
        *more,
    ]  # fmt: skip
