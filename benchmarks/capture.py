"""How much does reading activations cost beside the model's own forward pass?

    python benchmarks/capture.py                 all of it (make bench)
    python benchmarks/capture.py --only alignlens

The task: the last-token residual of all 30 layers of SmolLM2-135M for 128 chat prompts (64 twin
pairs), float32. Every tool runs in a process of its own, where rounds of a bare `model.model`
forward pass over the same padded batches alternate with rounds of the tool; a ratio is formed in
each round, and its median over rounds is printed with a 95 % interval (order statistics). First
process CPU time on one thread, then wall time on two. repeng and steering-vectors need an
environment with transformers 4, made on first use beside the project's own.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".venv-peers"
TOOLS = (
    "alignlens",
    "alignlens-unshared",
    "transformer_lens",
    "nnsight",
    "repeng",
    "steering_vectors",
)
OLD = ("repeng", "steering_vectors")
PAIRS, BATCH = 64, 32


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a capture against a bare forward pass.")
    parser.add_argument("--only", choices=TOOLS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="peak memory of streaming instead")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.rounds, arguments.threads)))
        return
    if arguments.memory:
        memory()
        return
    task = prepare()
    print(
        f"{task['prompts']} prompts, {task['padded']} padded tokens, {task['rounds']} batches; "
        f"unique tokens are {task['unique']:.3f} of the padded ones"
    )
    print(f"{'tool':20} {'CPU ratio, 1 thread':>26} {'wall ratio, 2 threads':>26}")
    for tool in [arguments.only] if arguments.only else TOOLS:
        cells = []
        for threads in (1, 2):
            found = run(tool, arguments.rounds, threads)
            key = "cpu" if threads == 1 else "wall"
            low, middle, high = interval(found[key])
            cells.append(f"{middle:.3f} [{low:.3f}, {high:.3f}]")
        print(f"{tool:20} {cells[0]:>26} {cells[1]:>26}", flush=True)


def prepare() -> dict[str, Any]:
    """Write the token ids all tools get, and say how many are unique."""
    from transformers import AutoTokenizer

    from probes import datasets
    from probes.lineage.base import base_folder
    from probes.prompts import choose_template

    folder = base_folder()
    template = choose_template(AutoTokenizer.from_pretrained(folder), "base", None, None, None)
    twins = datasets.twins("train")[:PAIRS]
    texts = [text for twin in twins for text in (twin["harmful"], twin["harmless"])]
    rows = [list(template.render(text).ids) for text in texts]
    lengths = sorted(map(len, rows), reverse=True)
    padded = sum(len(lengths[i : i + BATCH]) * lengths[i] for i in range(0, len(lengths), BATCH))
    seen = {tuple(row[: n + 1]) for row in rows for n in range(len(row))}
    task = {"folder": str(folder), "texts": texts, "rows": rows}
    (ROOT / "benchmarks" / ".task.json").write_text(json.dumps(task))
    return {
        "prompts": len(rows),
        "padded": padded,
        "rounds": math.ceil(len(rows) / BATCH),
        "unique": len(seen) / padded,
    }


def run(tool: str, rounds: int, threads: int) -> dict[str, list[float]]:
    """Measure one tool in its own process and environment."""
    python = peers() if tool in OLD else sys.executable
    line = [python, __file__, "--worker", tool, "--rounds", str(rounds), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peers() -> str:
    """The Python of an environment with transformers 4, made on first use."""
    python = PEERS / "bin" / "python"
    if not (PEERS / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        for wanted in (["torch==2.13.0"], ["transformers<5", "repeng", "steering-vectors"]):
            subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True)
        (PEERS / ".ready").touch()
    return str(python)


def measure(tool: str, rounds: int, threads: int) -> dict[str, list[float]]:
    """Ratios of the tool to the bare forward pass, one for each round."""
    import torch

    torch.set_num_threads(threads)
    task = json.loads((ROOT / "benchmarks" / ".task.json").read_text())
    _, bare, capture = MAKERS[tool](task)
    bare()
    capture()
    ratios: dict[str, list[float]] = {"cpu": [], "wall": []}
    for number in range(rounds):
        times = {}
        order = (("bare", bare), ("tool", capture))
        for name, function in order if number % 2 else order[::-1]:
            cpu, wall = time.process_time(), time.perf_counter()
            function()
            times[name] = (time.process_time() - cpu, time.perf_counter() - wall)
        ratios["cpu"].append(times["tool"][0] / times["bare"][0])
        ratios["wall"].append(times["tool"][1] / times["bare"][1])
    return ratios


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median with its distribution-free 95 % interval from order statistics."""
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while tail + math.comb(n, k) / 2**n <= 0.025:
        tail += math.comb(n, k) / 2**n
        k += 1
    return ordered[max(k - 1, 0)], ordered[n // 2], ordered[n - max(k, 1)]


def batches(rows: list[list[int]]) -> list[tuple[Any, Any, Any]]:
    """Ids, mask and positions of left-padded batches of similar length."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    found = []
    for start in range(0, len(order), BATCH):
        chunk = [rows[i] for i in order[start : start + BATCH]]
        longest = max(map(len, chunk))
        ids = torch.tensor([[2] * (longest - len(r)) + r for r in chunk])
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in chunk])
        found.append((ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)))
    return found


def bare_of(model: Any, rows: list[list[int]]) -> Callable[[], None]:
    import torch

    prepared = batches(rows)

    def bare() -> None:
        with torch.inference_mode():
            for ids, mask, positions in prepared:
                model.model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                )

    return bare


def with_alignlens(task: dict, share: bool = True) -> tuple[Any, Callable, Callable]:
    from probes.capturing import capture
    from probes.model import HookedModel

    model = HookedModel.load("builtin:base", device="cpu")

    def ours() -> None:
        capture(model, task["texts"], "all.resid_post", share_prefix=share, progress=False)

    return model, bare_of(model.model, task["rows"]), ours


def plain(task: dict, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        task["folder"], torch_dtype=torch.float32, **options
    ).eval()


def with_lens(task: dict) -> tuple[Any, Callable, Callable]:
    import copy

    import torch
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model, twin = plain(task), plain(task, attn_implementation="eager")
    bridge = build_bridge_from_module(
        twin, "LlamaForCausalLM", hf_config=copy.deepcopy(twin.config)
    )
    names = [f"blocks.{i}.hook_out" for i in range(30)]
    prepared = batches(task["rows"])

    def lens() -> None:
        with torch.inference_mode():
            for ids, mask, _ in prepared:
                _, cache = bridge.run_with_cache(
                    ids, attention_mask=mask, names_filter=names, pos_slice=-1
                )
                [cache[name].clone() for name in names]

    return model, bare_of(model, task["rows"]), lens


def with_nnsight(task: dict) -> tuple[Any, Callable, Callable]:
    import nnsight
    import torch

    model = plain(task)
    wrapped = nnsight.NNsight(model.model)  # the inner model: no head to run
    prepared = batches(task["rows"])

    def trace() -> None:
        with torch.inference_mode():
            for ids, mask, positions in prepared:
                with wrapped.trace(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                ):
                    kept = nnsight.save([layer.output[:, -1].clone() for layer in wrapped.layers])
                assert len(kept) == 30

    return model, bare_of(model, task["rows"]), trace


def old_model(task: dict) -> tuple[Any, Any]:
    """Model and tokenizer under transformers 4, which reads the newer files with two hints."""
    from transformers import AutoConfig, PreTrainedTokenizerFast

    config = AutoConfig.from_pretrained(task["folder"])
    config.rope_theta = 100000.0
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(task["folder"]) / "tokenizer.json"),
        pad_token="<|im_end|>", eos_token="<|im_end|>", padding_side="left",
    )  # fmt: skip
    return plain(task, config=config), tokenizer


def with_repeng(task: dict) -> tuple[Any, Callable, Callable]:
    from repeng.extract import batched_get_hiddens

    model, tokenizer = old_model(task)
    rows = sorted(task["rows"], key=len, reverse=True)
    texts = [tokenizer.decode(row) for row in rows]

    def hiddens() -> None:
        import contextlib
        import io

        with contextlib.redirect_stderr(io.StringIO()):
            batched_get_hiddens(model, tokenizer, texts, list(range(30)), BATCH)

    return model, bare_of(model, task["rows"]), hiddens


def with_steering_vectors(task: dict) -> tuple[Any, Callable, Callable]:
    import torch
    from steering_vectors import record_activations

    model, _ = old_model(task)
    prepared = batches(task["rows"])

    def record() -> None:
        with torch.inference_mode():
            for ids, mask, positions in prepared:
                with record_activations(model, layer_type="decoder_block") as kept:
                    model.model(
                        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                    )
                [layer[-1][:, -1].clone() for layer in kept.values()]

    return model, bare_of(model, task["rows"]), record


MAKERS: dict[str, Callable[[dict], tuple[Any, Callable, Callable]]] = {
    "alignlens": with_alignlens,
    "alignlens-unshared": lambda task: with_alignlens(task, share=False),
    "transformer_lens": with_lens,
    "nnsight": with_nnsight,
    "repeng": with_repeng,
    "steering_vectors": with_steering_vectors,
}


def memory() -> None:
    """Peak resident memory while moments stream over 1x and 8x the prompts."""
    code = (
        "import resource, sys, torch; torch.set_num_threads(1)\n"
        "from probes import HookedModel, stream, Moments, datasets\n"
        "model = HookedModel.load('builtin:base', device='cpu')\n"
        "texts = [t[k] for t in datasets.twins('train') for k in ('harmful', 'harmless')]\n"
        "texts = [f'{text} ({i})' for i in range(2) for text in texts][: int(sys.argv[1])]\n"
        "moments = Moments.empty(model.d_model)\n"
        "for done in stream(model, texts, '4.resid_post', 'all'):\n"
        "    for value in done.values.values(): moments = moments.update(value)\n"
        "print(len(texts), int(moments.count), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    print("prompts  vectors  peak MiB")
    for n in (160, 1280):
        done = subprocess.run(
            [sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True
        )
        prompts, vectors, peak = done.stdout.split()
        print(f"{prompts:>7}  {vectors:>7}  {int(peak) / 1024:.0f}")


if __name__ == "__main__":
    main()
