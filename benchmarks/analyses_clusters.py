"""Cluster indices at 10,000 rows of width 2,048: time and peak memory beside scikit-learn and loops.

    python benchmarks/analyses_clusters.py
    python benchmarks/analyses_clusters.py --rows 5000 --rounds 5

Float32 rows, two labelled classes, one thread. Compared are XBI, CHI and DBS (`scatter`) with
scikit-learn's `calinski_harabasz_score` and `davies_bouldin_score`, and all indices (`indices`,
which adds Dunn, trimmed Dunn and the silhouette in one pass over the pairs) with these two and
`silhouette_score`; scikit-learn has no Dunn index. The naive Dunn is the textbook's: for each row,
the differences to all others as one array. It runs on the first rows only (`--naive`) against all,
and its time is extrapolated in proportion; its memory is not that of a whole distance matrix.

Each measurement is a process of its own. Peak memory is the process's largest resident set
(`resource.getrusage`) less that of a process which holds the same rows and does nothing more. The
ratio of times is formed in each round; shown are median and, from five rounds on, the range.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

WIDTH = 2048
TASKS = ("nothing", "scatter", "sklearn scatter", "indices", "sklearn all", "naive Dunn")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of cluster indices.")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--naive", type=int, default=100, help="rows the naive Dunn starts from")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task is not None:
        print(json.dumps(measure(given.task, given.rows, given.naive)))
        return
    sizes = (given.rows // 2, given.rows)
    found = {
        (task, n): [run(task, n, given.naive) for _ in range(given.rounds)]
        for n in sizes
        for task in TASKS
    }

    def middle(task: str, n: int, what: str) -> float:
        return statistics.median(r[what] for r in found[task, n])

    print("| task | rows | CPU seconds | peak memory beyond the rows (MiB) |")
    print("|---|---|---|---|")
    for n in sizes:
        bare = middle("nothing", n, "memory")
        for task in TASKS[1:]:
            memory = middle(task, n, "memory") - bare
            print(f"| {task} | {n} | {middle(task, n, 'seconds'):.2f} | {memory:.0f} |")
    print("\n| ratio of times | median | lowest | highest |\n|---|---|---|---|")
    for other, ours in (
        ("sklearn scatter", "scatter"),
        ("sklearn all", "indices"),
        ("naive Dunn", "indices"),
    ):
        pairs = zip(found[other, given.rows], found[ours, given.rows], strict=True)
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
        line = f"| {other} / {ours} | {statistics.median(ratios):.2f} "
        print(line + f"| {min(ratios):.2f} | {max(ratios):.2f} |")
    print(f"\nThe naive Dunn ran from {given.naive} rows; its seconds are times n / {given.naive}.")


def run(task: str, rows: int, naive: int) -> dict[str, float]:
    """Measure in a process of its own."""
    line = [sys.executable, __file__, "--task", task, "--rows", str(rows), "--naive", str(naive)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(task: str, n: int, naive: int) -> dict[str, float]:
    """CPU seconds of the task and the largest resident set in MiB."""
    import torch
    from sklearn import metrics

    from analyses.drift import clusters

    torch.set_num_threads(1)
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % 2 == 0
    x[labels, 0] += 8
    began, factor = time.process_time(), 1.0
    if task == "scatter":
        clusters.scatter(x, labels)
    elif task == "indices":
        clusters.indices(x, labels)
    elif task.startswith("sklearn"):
        rows, names = x.numpy(), labels.numpy()
        metrics.calinski_harabasz_score(rows, names)
        metrics.davies_bouldin_score(rows, names)
        if task == "sklearn all":
            metrics.silhouette_score(rows, names)
    elif task == "naive Dunn":
        naive_dunn(x, labels, naive)
        factor = n / naive
    return {
        "seconds": factor * (time.process_time() - began),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def naive_dunn(x, labels, first: int) -> float:
    """Smallest distance across over largest within, of pairs with one of the first rows."""
    gap, diameter = float("inf"), 0.0
    for i in range(first):
        apart = (x - x[i]).double().square().sum(1).sqrt()
        gap = min(gap, float(apart[labels != labels[i]].min()))
        diameter = max(diameter, float(apart[labels == labels[i]].max()))
    return gap / diameter


if __name__ == "__main__":
    main()
