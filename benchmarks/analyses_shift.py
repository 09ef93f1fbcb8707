"""What does the token shift cost beside bare forward passes, and how much memory does it need?

    python benchmarks/analyses_shift.py             all of it
    python benchmarks/analyses_shift.py --quick     fewer rounds and prompts

Three questions, each in processes of its own:

- Time: `along` (read both models at the answers, decode, compare) against bare forward passes of
  both models, heads included, over the same padded batches. The answers are given: no generation.
  SmolLM2 (builtin:base and builtin:aligned), float32, one thread; rounds alternate, a ratio is
  formed in each, and the median is printed with a 95 % interval (order statistics).
- Memory: peak resident memory of `along` against the plain way, which holds the float32 logits
  `[batch, seq, vocab]` of both models, over the same batches. What loading takes is measured, too.
- A large vocabulary: two random tiny Llamas of 150 000 ids, 2 048 answer tokens.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from typing import Any

PROMPTS, ANSWER, BATCH, ROUNDS = 32, 32, 16, 7
VOCABULARY, LONG = 150_000, 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the token shift.")
    parser.add_argument("--quick", action="store_true", help="fewer prompts and rounds")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(worker(given.worker, given.prompts, given.rounds)))
        return
    prompts, rounds = (8, 3) if given.quick else (given.prompts, given.rounds)
    found = run("smollm2:time", prompts, rounds)
    low, middle, high = interval(found["ratios"])
    print(f"{prompts} prompts, {found['tokens']} answer tokens, {found['padded']} padded tokens\n")
    print("| time of `along` / two bare forward passes | 95 % interval | bare passes |")
    print("|---|---|---|")
    print(f"| {middle:.3f} | {low:.3f} to {high:.3f} | {found['bare']:.1f} s |\n", flush=True)
    print("| peak memory (MiB) | loaded | ours | full logits |")
    print("|---|---|---|---|")
    for case, said in (
        ("smollm2", f"SmolLM2, batches of {BATCH}"),
        ("large", f"random Llamas, {VOCABULARY} ids, {LONG} answers in one batch"),
    ):
        peaks = [run(f"{case}:{way}", prompts, 1)["peak"] for way in ("loaded", "ours", "full")]
        print(f"| {said} | {' | '.join(f'{peak:.0f}' for peak in peaks)} |", flush=True)


def run(name: str, prompts: int, rounds: int) -> dict[str, Any]:
    line = [sys.executable, __file__, "--worker", name]
    line += ["--prompts", str(prompts), "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def worker(name: str, prompts: int, rounds: int) -> dict[str, Any]:
    import torch

    from analyses.tokens.paths import along

    torch.set_num_threads(1)
    case, way = name.split(":")
    if case == "smollm2":
        (base, aligned), answers, batch = smollm2(prompts)
    else:
        (base, aligned), answers, batch = large()
    size = min(r.model.layout.vocab_size for r in (base, aligned))
    tokens = sum(map(len, answers))
    before = peak()

    def ours() -> None:
        along(aligned, [base], answers, size, batch_size=batch)

    def bare() -> None:
        for ids, mask, positions in padded(base, answers, batch):
            with torch.no_grad():
                for one in (base, aligned):
                    one.model.model(
                        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                    )

    if way == "time":
        ours()
        bare()
        ratios, seconds = [], []
        for number in range(rounds):
            took = {}
            for function in (ours, bare) if number % 2 else (bare, ours):
                start = time.process_time()
                function()
                took[function] = time.process_time() - start
            ratios.append(took[ours] / took[bare])
            seconds.append(took[bare])
        cells = sum(ids.numel() for ids, _, _ in padded(base, answers, batch))
        middle = sorted(seconds)[len(seconds) // 2]
        return {"ratios": ratios, "tokens": tokens, "padded": cells, "bare": middle}
    if way == "ours":
        ours()
    elif way == "full":
        for ids, mask, positions in padded(base, answers, batch):
            with torch.no_grad():
                logits = [
                    one.model.model(
                        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
                    ).logits.float()
                    for one in (base, aligned)
                ]
                P, Q = (x.log_softmax(-1) for x in logits)
                (Q.exp() * (Q - P)).sum(-1)
    return {"peak": peak() if way != "loaded" else before}


def smollm2(prompts: int) -> tuple[Any, Any, int]:
    from analyses.tokens.paths import reader
    from probes import HookedModel, datasets

    models = [HookedModel.load(f"builtin:{name}", device="cpu") for name in ("base", "aligned")]
    texts = datasets.safety("train").prompts[:prompts]
    answer = "Here is what I would do about that, step by step, with a reason for each of them. "
    ids = (3 * models[1].tokenizer(answer)["input_ids"])[:ANSWER]
    rendered = models[1].template.render_all(texts)
    return [reader(m, rendered, ANSWER) for m in models], (tuple(ids),) * len(texts), BATCH


def large() -> tuple[Any, Any, int]:
    """Random models of few parameters but for their vocabulary; the answers are random ids."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from analyses.tokens.paths import Reader
    from probes import HookedModel
    from probes.prompts import Rendered
    from probes.unembed import unembedding

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(VOCABULARY, (LONG, 32), generator=generator).tolist()
    rendered = tuple(Rendered("", (5, 6, 7, 8), (), 4, (0, 0)) for _ in answers)
    readers = []
    for _ in range(2):
        model = HookedModel(AutoModelForCausalLM.from_config(config).eval())
        readers.append(Reader(model, rendered, unembedding(model)))
    return readers, tuple(map(tuple, answers)), LONG


def padded(one: Any, answers: Any, batch: int) -> list[tuple[Any, Any, Any]]:
    from probes.prompts import pad

    rows = sorted(((*r.ids, *a) for r, a in zip(one.prompts, answers, strict=True)), key=len)
    made = [pad(rows[i : i + batch], 0, "left") for i in range(0, len(rows), batch)]
    return [(b.ids, b.mask, b.positions) for b in made]


def peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median with its distribution-free 95 % interval from order statistics."""
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while tail + math.comb(n, k) / 2**n <= 0.025:
        tail += math.comb(n, k) / 2**n
        k += 1
    return ordered[max(k - 1, 0)], ordered[n // 2], ordered[n - max(k, 1)]


if __name__ == "__main__":
    main()
