"""Runs inside the Python that has vLLM: answers prompts offline, with and without vectors.

    python vllm_worker.py TASK.json ANSWERS.npz

It stands alone, because that Python has nothing of this project. The task: `model`, `prompts`
(lists of token ids), `n_tokens`, `prefix_caching`, and `runs`, each a list of vllm-lens entries (or
empty) and the numbers of the prompts it is asked. Runs are made one after another in one engine.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # vllm-lens hooks the other one
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import numpy as np
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(
        task["model"],
        dtype="float32",
        max_model_len=task["max_len"],
        enforce_eager=True,
        max_logprobs=2**20,
        logprobs_mode="raw_logits",
        enable_prefix_caching=task["prefix_caching"],
    )
    answers: dict[str, Any] = {}
    for number, run in enumerate(task["runs"]):
        extra = {"apply_steering_vectors": [entry_of(e) for e in run["entries"]]}
        asked = SamplingParams(
            max_tokens=task["n_tokens"],
            temperature=0,
            ignore_eos=True,
            logprobs=-1,
            extra_args=extra if run["entries"] else None,
        )
        prompts = [{"prompt_token_ids": task["prompts"][i]} for i in run["prompts"]]
        for i, done in zip(run["prompts"], llm.generate(prompts, asked), strict=True):
            out = done.outputs[0]
            rows = []
            for step in out.logprobs:
                row = np.full(max(step) + 1, -np.inf, np.float32)
                row[list(step)] = [entry.logprob for entry in step.values()]
                rows.append(row)
            answers[f"tokens.{number}.{i}"] = np.array(out.token_ids)
            answers[f"logits.{number}.{i}"] = np.stack(rows)
    with Path(sys.argv[2]).open("wb") as file:
        np.savez(file, **answers)


def entry_of(entry: dict[str, Any]) -> Any:
    """The object that vllm-lens takes offline, from the form it takes over HTTP."""
    import vllm_lens  # pyright: ignore[reportMissingImports]

    taken: Any = vllm_lens.SteeringVector
    return taken.model_validate(entry)


if __name__ == "__main__":
    main()
