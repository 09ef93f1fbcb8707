"""The command line that serves an export, and why each of its words is there."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from steering.export.exports import Export

SERVERS = ("llama.cpp", "vllm")


@dataclass(frozen=True)
class ServeArgs:
    """A command, and a reason for each argument that one would not expect."""

    command: tuple[str, ...]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([shlex.join(self.command), *(f"# {reason}" for reason in self.reasons)])


def serve_args(
    exported: Export, server: str | None = None, model: str | None = None, port: int = 8000
) -> ServeArgs:
    """The command for an export. `model` is what the server is given for the unsteered model: a
    GGUF file for llama.cpp, a folder or Hub name for vLLM. Raises `ValueError` for an export that
    the server cannot use, with the target that it can."""
    server = server or {"gguf": "llama.cpp", "vllm-lens": "vllm", "checkpoint": "vllm"}.get(
        exported.target
    )
    if server not in SERVERS:
        raise ValueError(
            f"there is no server for an export to {exported.target}: choose --target, one of "
            f"{', '.join(SERVERS)}, and an export it can use"
        )
    wanted = {"llama.cpp": ("gguf",), "vllm": ("vllm-lens", "checkpoint")}[server]
    if exported.target not in wanted:
        raise ValueError(
            f"{server} cannot use an export to {exported.target}: export with --to "
            f"{' or --to '.join(wanted)}"
        )
    if server == "llama.cpp":
        return _llama_cpp(exported.path, model or "MODEL.gguf", port)
    if exported.target == "checkpoint":
        return _vllm(str(exported.folder), port, baked=True)
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", exported.model)
    return _vllm(model or (exported.model if plain else "MODEL"), port, baked=False)


def _llama_cpp(path: Path, model: str, port: int) -> ServeArgs:
    if "," in str(path):
        raise ValueError(
            f"llama-server parts file names at commas, and {path} has one: move the export"
        )
    return ServeArgs(
        ("llama-server", "-m", model, "--control-vector", str(path), "--port", str(port)),
        (
            "the strength is in the file; --control-vector-scaled FILE:2 doubles it",
            "the vector holds for the whole server: it cannot be changed or left out by a request",
            "a quantised model rounds as much as a weak vector moves: prove the export on a float32 "
            "GGUF (alignlens verify)",
        ),
    )


def _vllm(model: str, port: int, baked: bool) -> ServeArgs:
    name, _, revision = model.partition("@")
    line = ("python", "-m", "vllm.entrypoints.openai.api_server", "--model", name)
    line = (*line, "--revision", revision) if revision else line
    if baked:
        return ServeArgs(
            (*line, "--port", str(port)),
            ("the edit is in the weights: every request is steered, and caches are safe",),
        )
    return ServeArgs(
        (*line, "--no-enable-prefix-caching", "--enforce-eager", "--port", str(port)),
        (
            "--no-enable-prefix-caching: keys of a steered prompt are kept under the prompt's "
            "tokens, and a later request without the vector would read them",
            "--enforce-eager: captured graphs would leave the hooks of vllm-lens out",
            "vllm-lens must be installed beside vLLM; send request.json's fields with each request "
            "to be steered (steering.export.client)",
        ),
    )
