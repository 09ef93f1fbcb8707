"""How fast is a LoFiT training step beside a plain loop of the same loss, and beside what is needed?

    python benchmarks/lofit.py
    python benchmarks/lofit.py --lowest 20 --rounds 15

The task: DPO on TruthfulQA's pairs (best and first false answer) with SmolLM2-135M, 8 pairs a
step, offsets on 8 heads of which the lowest lies in layer 0, 10, 20 or 25. The plain loop: frozen
weights, precomputed reference, chosen and rejected answers as 16 right-padded rows, whole forward
passes, logits at every position. Rounds of both on the same pairs alternate; the ratio (plain over
ours, so above 1 is faster) is formed in each round and its median printed with a 95 % interval
(order statistics). First process CPU time on one thread, then wall time on two.

Beside it the ratio that the FLOPs imply, were all equally fast and everything else free. Counted
are multiplications and additions of matrix products. For a block of the model with P weights in
its linear maps and rows of s tokens, a token costs

    forward            2 P + 4 s d       (d: width of all heads; scores and weighted values)
    backward           2 P + 8 s d       (gradients of activations alone: the weights are frozen)
    backward, lowest   2 (P - P_qkv)     (no gradient passes its attention)
    head               2 V d each way, for each position whose logits are formed

The plain loop runs all blocks forward and the blocks from the lowest trained one backward, on all
tokens with their padding; its head runs at all of them. Needed is: the blocks from the lowest one
both ways, on tokens without padding, a pair's common beginning once, attention within a pair; the
head where it predicts a token of an answer.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from capture import interval

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, where scripts may be named as packages are
DATA = ROOT / "tests" / "data"
LOWEST = (0, 10, 20, 25)
HEADS, PAIRS = 8, 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of a LoFiT training step.")
    parser.add_argument("--lowest", type=int, nargs="*", default=LOWEST)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, nargs="*", default=(1, 2))
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(measure(arguments.worker, arguments.rounds, *arguments.threads)))
        return
    names = [("CPU" if n == 1 else "wall") + f", {n} threads" for n in arguments.threads]
    print("lowest  FLOPs imply " + "".join(f"{name:>22} {'share':>6}" for name in names))
    for lowest in arguments.lowest:
        line = ""
        for threads in arguments.threads:
            found = run(lowest, arguments.rounds, threads)
            low, middle, high = interval(found["cpu" if threads == 1 else "wall"])
            line = line or f"{lowest:>6} {found['bound']:>12.2f} "
            line += f"{f'{middle:.2f} [{low:.2f}, {high:.2f}]':>22} {middle / found['bound']:>6.0%}"
        print(line, flush=True)


def run(lowest: int, rounds: int, threads: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    line = [sys.executable, __file__, "--worker", str(lowest), "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    line += ["--threads", str(threads)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"layer {lowest} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(lowest: int, rounds: int, threads: int) -> dict[str, Any]:
    """Ratios of the plain loop to ours, one for each round, and the ratio of FLOPs."""
    import torch

    from probes.engines.modes import frozen_weights
    from probes.model import HookedModel
    from steering.head_parameters import HeadParameters
    from steering.preferences import DPO, Preference
    from steering.questions import truthfulqa
    from steering.tuning import Task, Training

    torch.set_num_threads(threads)
    model = HookedModel.load("builtin:base", device="cpu", template="none")
    questions = truthfulqa(DATA / "truthfulqa_train.csv")[: PAIRS * rounds]
    examples = [
        Preference(f"Q: {q.question} A:", f" {q.best}", f" {q.false[0]}") for q in questions
    ]
    generator = torch.Generator().manual_seed(0)
    layers = torch.randperm(30 - lowest, generator=generator)[: HEADS - 1].sort().values + lowest
    heads = {(lowest, 0), *((int(layer), 1) for layer in layers)}
    training = Training()
    batches = [list(range(i, i + PAIRS)) for i in range(0, len(examples), PAIRS)]
    with frozen_weights(model.model):
        task = Task(model, examples, training, lowest, 2**31)
        assert (task.replay.first, task.replay.packed) == (lowest, True), task.replay.notes
        v = HeadParameters(model, sorted(heads), training.noise, training.seed)
        optimiser = torch.optim.AdamW(v.parameters, lr=1e-4)

        def step(loss_of: Callable[[Sequence[int]], Any], batch: Sequence[int]) -> float:
            optimiser.zero_grad()
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(v.parameters, 1.0)
            optimiser.step()
            return loss.item()

        def ours(batch: Sequence[int]) -> Any:
            return DPO()(task.answers(batch))

        plain = plain_loss(model, task)
        ratios: dict[str, Any] = {"cpu": [], "wall": []}
        with v.acting(scale=False):
            first = (float(ours(batches[0]).detach()), float(plain(batches[0]).detach()))
            assert abs(first[0] - first[1]) < 1e-4, first
            for one in (ours, plain):
                step(one, batches[0])
            for number, batch in enumerate(batches):
                times = {}
                order = (("plain", plain), ("ours", ours))
                for name, loss_of in order if number % 2 else order[::-1]:
                    cpu, wall = time.process_time(), time.perf_counter()
                    step(loss_of, batch)
                    times[name] = (time.process_time() - cpu, time.perf_counter() - wall)
                for i, kind in enumerate(("cpu", "wall")):
                    ratios[kind].append(times["plain"][i] / times["ours"][i])
    counts = [flops(model, task, lowest, batch) for batch in batches]
    ratios["bound"] = sum(p for p, _ in counts) / sum(n for _, n in counts)
    return ratios


def plain_loss(model: Any, task: Any) -> Callable[[Sequence[int]], Any]:
    """The loop one would write: padded rows through the whole model, logits everywhere."""
    import torch

    net, sequences, reference = model.model, task.replay.sequences, task._reference

    def loss(batch: Sequence[int]) -> Any:
        both = [*batch, *(i + task.n for i in batch)]
        rows = [sequences[i] for i in both]
        longest = max(len(r.ids) for r in rows)
        ids = torch.tensor([[*r.ids, *[0] * (longest - len(r.ids))] for r in rows])
        mask = torch.tensor([[1] * len(r.ids) + [0] * (longest - len(r.ids)) for r in rows])
        answer = torch.tensor(
            [[r.n_prompt <= i < len(r.ids) for i in range(1, longest)] for r in rows]
        )
        logits = net(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        each = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        summed = (each * answer).sum(1) - reference[both]
        chosen, rejected = summed.split(len(batch))
        return -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean()

    return loss


def flops(model: Any, task: Any, lowest: int, batch: Sequence[int]) -> tuple[float, float]:
    """FLOPs of the plain loop and of what is needed, for one step (see the module)."""
    net = model.model
    block = net.model.layers[0]
    linear = [m for m in block.modules() if type(m).__name__ == "Linear"]
    P = sum(m.weight.numel() for m in linear)
    attention = block.self_attn
    P_qkv = sum(getattr(attention, n).weight.numel() for n in ("q_proj", "k_proj", "v_proj"))
    d, V, L = attention.o_proj.in_features, *net.lm_head.weight.shape[:1], model.n_layers
    d_model = model.d_model
    upper = L - lowest

    def blocks(tokens: int, s: float, forward: int) -> float:
        ahead = forward * (2 * P + 4 * s * d)
        back = (upper - 1) * (2 * P + 8 * s * d) + 2 * (P - P_qkv)
        return tokens * (ahead + back)

    sequences = task.replay.sequences
    both = [*batch, *(i + task.n for i in batch)]
    longest = max(len(sequences[i].ids) for i in both)
    padded = len(both) * longest
    plain = blocks(padded, longest, L) + padded * 4 * V * d_model
    needed = 0.0
    for i in batch:
        pair = (sequences[i].ids, sequences[i + task.n].ids)
        nodes = {ids[: n + 1] for ids in pair for n in range(len(ids))}
        read = {ids[:n] for ids in pair for n in range(sequences[i].n_prompt, len(ids))}
        needed += blocks(len(nodes), len(nodes), upper) + len(read) * 4 * V * d_model
    return plain, needed


if __name__ == "__main__":
    main()
