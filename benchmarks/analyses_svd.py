"""What does a certified decomposition save beside the exact one, and what does it lose?

    python benchmarks/analyses_svd.py                  shapes up to 4096 x 4096, minutes
    python benchmarks/analyses_svd.py --small          without the largest

For each shape a matrix whose singular values fall as i^-slope is decomposed exactly and with a
certificate for 50 % of its energy. "Energy lost" is what the exact vectors of the same number hold
beyond the certified ones, as a share. Where the certificate refuses, the row says so: nothing else
is then computed in its stead. Times are of one thread, medians of 3, and mean something on an idle
machine only; the ratio means more.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

# a script's own folder comes first, and there steering.py is a benchmark
sys.path[0] = str(Path(__file__).parent.parent)

from analyses.subspaces import bases  # noqa: E402
from analyses.subspaces.svd import LeftSvd, Uncertified, left_svd  # noqa: E402

SHAPES = ((576, 576), (1536, 576), (2048, 2048), (49152, 576), (4096, 4096))
SLOPES = (1.0, 0.7, 0.5)
SHARE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact against certified decompositions.")
    parser.add_argument("--small", action="store_true", help="without 4096 x 4096")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| shape | slope | k | exact (s) | certified (s) | ratio | basis | energy lost |")
    print("|---|---|---|---|---|---|---|---|")
    for m, n in SHAPES[:-1] if arguments.small else SHAPES:
        for slope in SLOPES:
            print(row(m, n, slope, arguments.rounds), flush=True)


def row(m: int, n: int, slope: float, rounds: int) -> str:
    """One line of the table."""
    A = matrix(m, n, slope)
    exact, slow = timed(lambda: left_svd(A, method="exact"), rounds)
    k = exact.rank(SHARE)
    begin = f"| {m} x {n} | {slope} | {k} | {slow:.2f} |"
    try:
        found, quick = timed(lambda: left_svd(A, method="certified", energy=SHARE), rounds)
    except Uncertified:
        return f"{begin} refused | | | |"
    assert found.rank(SHARE) == k
    lost = max(0.0, exact.kept(k) - found.kept(k))
    basis = found.vectors.shape[1]
    return f"{begin} {quick:.2f} | {slow / quick:.1f} | {basis} | {lost:.0e} |"


def matrix(m: int, n: int, slope: float) -> torch.Tensor:
    """Singular values i^-slope in a random basis on the left; on the right the axes, turned by a
    reflection, for a second random basis would take longer than the benchmark."""
    generator = torch.Generator().manual_seed(0)
    k = min(m, n)
    s = torch.arange(1, k + 1, dtype=torch.float64) ** -slope
    v = torch.randn(n, 1, dtype=torch.float64, generator=generator)
    v = v / v.norm()
    A = bases.haar(m, k, generator) * s
    return (A - 2 * (A @ v[:k]) @ v[:k].T if n == k else A).float()


def timed(work: Callable[[], LeftSvd], rounds: int) -> tuple[LeftSvd, float]:
    """The answer and the median of its times in seconds."""
    times, found = [], []
    for _ in range(max(1, rounds)):
        begun = time.perf_counter()
        found = [work()]
        times.append(time.perf_counter() - begun)
    return found[0], sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
