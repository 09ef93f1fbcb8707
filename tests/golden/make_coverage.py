"""How often the intervals cover the truth: simulations, kept in coverage.json.

    python tests/golden/make_coverage.py            all of it, some twenty minutes on one core

`tests/test_probes_coverage.py` repeats a slice of every row. The truth of each simulation is known
in closed form; groups share a random shift, as topics do. A row is 2000 simulations, one of a BCa
interval 1000.
"""

import json
import sys
from pathlib import Path

import torch

from analyses.drift import halves
from analyses.drift.between_topics import between, pairs_of, topic_weights
from probes import scores

KEPT = Path(__file__).with_name("coverage.json")
REPEATS = 2000
GROUPS = (10, 20, 40, 80)
RATES = (0.02, 0.1, 0.5, 0.9)
SPREAD_RATES = tuple(0.05 + 0.9 * i / 36 for i in range(37))
"""Rates from 0.05 to 0.95: at one rate a discrete interval covers now more, now less."""
SIZES = (5, 10, 20, 40, 160)
ENOUGH = (40, 80)
"""Groups that a BCa interval needs for what it promises."""

RESAMPLES = 2000
"""Those of `scores.bca_bootstrap` and of the cluster indices unless asked otherwise."""
SHIFT, GAP = 0.7, 1.0
"""Spread of what a group shares, in units of the spread inside groups; distance of the classes."""


def auroc_covered(groups: int, seed: int) -> bool:
    """One positive and one negative example a group, both moved by the group's own shift.

    Two examples of different groups differ by GAP and have variance 2 (1 + SHIFT^2), those of one
    group variance 2: the AUROC of the population is that of different groups.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = SHIFT * torch.randn(groups, generator=generator)
    high = GAP + shared + torch.randn(groups, generator=generator)
    low = shared + torch.randn(groups, generator=generator)
    rows = torch.cat([high, low])
    labels = torch.arange(2 * groups) < groups
    names = [str(i) for i in range(groups)] * 2
    found = scores.auroc_interval(rows, labels, names, resamples=500, seed=seed)
    between = torch.special.ndtr(torch.tensor(GAP / (2 * (1 + SHIFT**2)) ** 0.5))
    within = torch.special.ndtr(torch.tensor(GAP / 2**0.5))
    # of the groups^2 pairs one in `groups` is of one group
    truth = float(between + (within - between) / groups)
    return float(found.low) <= truth <= float(found.high)


def mean_covered(groups: int, seed: int) -> bool:
    """BCa interval of a mean over groups of four rows, of a skewed distribution (mean 1)."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.empty(groups).exponential_(generator=generator)
    rows = (shared[:, None] + SHIFT * torch.randn(groups, 4, generator=generator)).flatten()
    names = [str(i) for i in range(groups) for _ in range(4)]
    found = scores.bca_bootstrap(
        lambda rows_drawn: float(rows[rows_drawn].mean()), names, resamples=300, seed=seed
    )
    return found.low <= 1.0 <= found.high


def share_covered(groups: int, seed: int) -> bool:
    """BCa interval of a share pooled over groups: hits over trials, as of tokens in answers.

    A group has 5 to 40 trials and a rate of its own, of mean 0.2 (the product of two uniforms and
    0.8), independent of its size: that mean is the share of the population.
    """
    generator = torch.Generator().manual_seed(seed)
    trials = torch.randint(5, 41, (groups,), generator=generator)
    rates = 0.8 * torch.rand(2, groups, generator=generator).prod(0)
    draws = torch.rand(groups, 40, generator=generator) < rates[:, None]
    hits = (draws & (torch.arange(40) < trials[:, None])).sum(1)
    value, drawn, left = (
        (w @ hits.double()) / (w @ trials.double()) for w in _weights(groups, generator)
    )
    found = scores.bca(value, drawn, left)
    return float(found.low) <= 0.2 <= float(found.high)


def _weights(groups: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """How often each group counts: in the sample, in resamples, with each group left out."""
    drawn = torch.randint(groups, (RESAMPLES, groups), generator=generator)
    counts = torch.zeros(RESAMPLES, groups, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    whole = torch.ones(groups, dtype=torch.float64)
    return whole, counts, 1 - torch.eye(groups, dtype=torch.float64)


WIDTH = 32


def cluster_covered(groups: int, seed: int, ratio: float = 0.5) -> bool:
    """BCa interval of the separation ratio F = D^2 / (W / N) of twins in many dimensions.

    Each dimension has variance 1 + SHIFT^2 within a class, so that D^2 is `ratio` times WIDTH
    times that.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = SHIFT * torch.randn(groups, WIDTH, generator=generator)
    high, low = shared + torch.randn(2, groups, WIDTH, generator=generator)
    high[:, 0] += (ratio * WIDTH * (1 + SHIFT**2)) ** 0.5
    labels = torch.arange(2 * groups) < groups
    names = [str(i) for i in range(groups)] * 2
    pairs = pairs_of(torch.cat([high, low]), labels, names)
    drawn, left = topic_weights(labels, names, RESAMPLES, seed)
    weights = (None, drawn, left)
    value, resampled, jackknife = (between(pairs, w, ratio_only=True).ratio for w in weights)
    found = scores.bca(value[0], resampled, jackknife)
    return float(found.low) <= ratio <= float(found.high)


MOVED = 0.3
"""How far the drift's mean moves, in units of the spread of a topic's own change."""


def drift_covered(groups: int, seed: int) -> bool:
    """Interval of a term of the drift ledger: the length of a mean change over topics, which noise
    in the other dimensions only makes longer."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(groups, 12, generator=generator, dtype=torch.float64)
    change[:, 0] += MOVED * 12**0.5
    both = torch.tensor([True, False] * groups)
    topics = torch.arange(groups).repeat_interleave(2)
    made = halves.moves(
        lambda rows, step: change[topics[rows]], torch.ones(2 * groups, 1).bool(), both, topics
    )
    null = halves.Null(torch.ones(2, dtype=torch.float64), 1.0)
    found = halves.token_term(made, null, count=1000, seed=seed)
    return found.low <= MOVED * 12**0.5 <= found.high


def wilson_covered(rate: float, n: int, seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)
    found = scores.wilson(int((torch.rand(n, generator=generator) < rate).sum()), n)
    return found.low <= rate <= found.high


def newcombe_covered(rate: float, n: int, seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)
    hits = [int((torch.rand(n, generator=generator) < p).sum()) for p in (rate, rate / 2)]
    found = scores.newcombe(hits[0], n, hits[1], n)
    return found.low <= rate / 2 <= found.high


def table(repeats: int, first: int = 0) -> dict[str, float]:
    """Share of simulations `first` to `first + repeats` whose 95 % interval holds the truth."""
    seeds = range(first, first + repeats)
    found = {}
    for groups in GROUPS:
        found[f"auroc, {groups} groups"] = [auroc_covered(groups, seed) for seed in seeds]
        found[f"mean, {groups} groups"] = [mean_covered(groups, seed) for seed in seeds[::2]]
    for groups in ENOUGH:
        found[f"cluster F, {groups} groups"] = [cluster_covered(groups, s) for s in seeds[::2]]
        found[f"pooled share, {groups} groups"] = [share_covered(groups, s) for s in seeds[::2]]
        found[f"drift term, {groups} groups"] = [drift_covered(groups, s) for s in seeds[::2]]
    for rate in RATES:
        for n in (40, 160):
            found[f"wilson, rate {rate}, n {n}"] = [wilson_covered(rate, n, s) for s in seeds]
            found[f"newcombe, rate {rate}, n {n}"] = [newcombe_covered(rate, n, s) for s in seeds]
    for n in SIZES:
        found[f"wilson, rates 0.05 to 0.95, n {n}"] = [
            wilson_covered(SPREAD_RATES[s % len(SPREAD_RATES)], n, s) for s in seeds
        ]
    return {name: sum(hits) / len(hits) for name, hits in found.items()}


if __name__ == "__main__":
    done = table(int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS)
    KEPT.write_text(json.dumps(done, indent=1) + "\n")
    for name, share in done.items():
        print(f"{share:.3f}  {name}")  # noqa: T201
