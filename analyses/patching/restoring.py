"""How much of a gap between two models swaps restore: explored, chosen from, confirmed elsewhere."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.patching import metrics
from analyses.patching.swaps import ActivationSwap, Unit

UNKNOWN = torch.full((3,), torch.nan)
"""Value and limits of what has no gap to be a share of."""


class Explored(NamedTuple):
    """What single layers and heads, windows and all layers on one side restore."""

    kinds: tuple[str, ...]
    single: Float[Tensor, "number kind layer"]
    """Mean change, share of the gap, its lower and its upper limit."""
    below: Float[Tensor, " layer"]
    above: Float[Tensor, " layer"]
    heads: Float[Tensor, "layer head"]
    windows: Float[Tensor, " window"]
    """Share restored by the window that starts at each layer."""
    size: int
    """Layers of a window."""
    blocks: tuple[Unit, ...]
    """Everything that can be swapped in each layer."""
    groups: dict[tuple[int, int], Unit]
    """Sites of each head."""


class Choice(NamedTuple):
    """The window and the heads that restore most."""

    window: tuple[int, int]
    window_sites: Unit
    heads: tuple[str, ...]
    head_sites: Unit


class Confirmed(NamedTuple):
    """Shares of the gap on other prompts than the choice was made on."""

    window: Float[Tensor, " limit"]
    """Value, lower and upper limit, as the next two."""
    heads: Float[Tensor, " limit"]
    everything: Float[Tensor, " limit"]
    window_null: Float[Tensor, " draw"]
    heads_null: Float[Tensor, " head_draw"]


def explore(
    swap: ActivationSwap, size: int, topics: Sequence[str], resamples: int, seed: int
) -> Explored:
    """Swap every layer and every head alone, layers up to and from each, and every window."""
    kinds, units = swap.layer_units()
    groups = {(layer, head): unit for layer, head, unit in swap.head_units()}
    n = swap.drifted.n_layers
    blocks = tuple(joined([row[k] for row in units]) for k in range(n))
    places = [(k, j) for k in range(len(kinds)) for j in range(n) if units[k][j]]
    single = swap.change([units[k][j] for k, j in places], "layers")
    shares = metrics.share_interval(single, swap.gap, topics, resamples=resamples, seed=seed)
    grid = torch.full((4, len(kinds), n), torch.nan)
    for i, (k, j) in enumerate(places):
        values = (single[i].mean(), *(limit[i] for limit in shares))
        grid[:, k, j] = torch.tensor([float(v) for v in values])
    # of the intervals' denominator: NaN where there is no gap
    known = bool(shares.value.isfinite().all())
    gap = swap.gap.mean() if known else torch.tensor(torch.nan, dtype=torch.float64)

    def share(chosen: Sequence[Unit], name: str) -> Tensor:
        return (swap.change(chosen, name).mean(1) / gap).float()

    alone = share(list(groups.values()), "heads")
    heads = torch.full((n, 1 + max((h for _, h in groups), default=-1)), torch.nan)
    for value, (layer, head) in zip(alone, groups, strict=True):
        heads[layer, head] = value
    return Explored(
        kinds=kinds,
        single=grid,
        below=share([joined(blocks[: k + 1]) for k in range(n)], "up-to"),
        above=share([joined(blocks[k:]) for k in range(n)], "from"),
        heads=heads,
        windows=share([joined(blocks[k : k + size]) for k in range(n - size + 1)], "windows"),
        size=size,
        blocks=blocks,
        groups=groups,
    )


def choose(explored: Explored, n_heads: int) -> Choice | None:
    """The best window and the best heads; None where there was no gap."""
    if bool(explored.windows.isnan().any()):
        return None
    first = int(explored.windows.argmax())
    window = (first, first + explored.size - 1)
    order = sorted(explored.groups, key=lambda at: -float(explored.heads[at]))[:n_heads]
    return Choice(
        window,
        joined(explored.blocks[window[0] : window[1] + 1]),
        tuple(f"{layer}.{head}" for layer, head in sorted(order)),
        joined([explored.groups[at] for at in order]),
    )


def confirm(
    swap: ActivationSwap,
    explored: Explored,
    choice: Choice | None,
    topics: Sequence[str],
    draws: int,
    resamples: int,
    seed: int,
) -> Confirmed:
    """What the choice restores on these prompts, and what as many layers and heads drawn at
    random do; draws may share layers and heads with the choice, but not all."""
    empty = torch.zeros(0)
    if choice is None:
        return Confirmed(UNKNOWN, UNKNOWN, UNKNOWN, empty, empty)
    generator = torch.Generator().manual_seed(seed)

    def drawn(units: Sequence[Unit], n: int, chosen: Unit) -> list[Unit]:
        found: list[Unit] = []
        while 0 < n < len(units) and len(found) < draws:
            order = torch.randperm(len(units), generator=generator)[:n].tolist()
            unit = joined([units[k] for k in order])
            found += [unit] if unit != chosen else []
        return found

    chosen = [choice.window_sites, joined(explored.blocks)]
    chosen += [choice.head_sites] if choice.heads else []
    tested = swap.change(chosen, "chosen")
    found = metrics.share_interval(tested, swap.gap, topics, resamples=resamples, seed=seed)
    if not bool(found.value.isfinite().all()):  # a gap on one half of the prompts only
        return Confirmed(UNKNOWN, UNKNOWN, UNKNOWN, empty, empty)
    layers = drawn(explored.blocks, explored.size, choice.window_sites)
    heads = drawn(list(explored.groups.values()), len(choice.heads), choice.head_sites)
    null = (swap.change([*layers, *heads], "null").mean(1) / swap.gap.mean()).float()
    return Confirmed(
        metrics.triple(found, 0),
        metrics.triple(found, 2) if choice.heads else UNKNOWN,
        metrics.triple(found, 1),
        null[: len(layers)],
        null[len(layers) :],
    )


def joined(units: Sequence[Unit]) -> Unit:
    """All their sites, each once, in forward order."""
    return tuple(sorted({site for unit in units for site in unit}))
