"""Figures of a component mask."""

from typing import TYPE_CHECKING

import torch

from analyses.figures import broken, legend_below, name_ticks
from analyses.patching.figure import heat_map
from probes import figures
from probes.scores import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analyses.mechanisms.masking import ComponentMask


def accuracies(found: "ComponentMask", ax: "Axes | None") -> "Axes":
    """Bars of test accuracy with Wilson intervals; random masks as points beside them."""
    n = found.sizes[2]
    runs = {
        "unpatched": found.unpatched[2],
        f"mask ({int(found.patched.sum())})": found.hits[2],
        f"everything ({found.patched.numel()})": found.everything,
    }
    ax = figures.axes(ax, 4.8, 3.8)
    with figures.theme():
        for k, hits in enumerate(runs.values()):
            value, low, high = (100 * x for x in wilson(hits, n))
            ax.bar(
                k,
                value,
                0.6,
                yerr=[[value - low], [high - value]],
                capsize=3,
                color=figures.PALETTE[k],
                hatch=("", "//", "..")[k],
                label="accuracy, 95 % Wilson interval" if k == 1 else None,
            )
        if found.null_hits:
            generator = torch.Generator().manual_seed(0)
            shift = 1.4 + 0.12 * torch.rand(len(found.null_hits), generator=generator)
            shares = 100 * torch.tensor(found.null_hits) / n
            look = figures.style(6)
            ax.plot(shift.numpy(), shares.numpy(), ls="", ms=4, label="random masks", **look)
            ax.axhline(
                100 * found.null_95,
                ls="--",
                lw=1,
                color=look["color"],
                label="their 95th percentile",
            )
        lines = name_ticks(ax, list(runs))
        ax.set(
            xlabel="components taken from the source run",
            ylabel="answers with the label (%)",
            ylim=(0, 105),
            title=broken(found.name),
        )
        legend_below(ax, f"{n} test examples", lines)
    return ax


def components(found: "ComponentMask", group: str, ax: "Axes | None") -> "Axes":
    """Share taken from the source, layers upwards; dots mark what is patched after rounding."""
    if group not in found.groups:
        raise ValueError(f"no position group {group!r}: there are {', '.join(found.groups)}")
    if any("direction" in name for name in found.components):
        raise ValueError("a mask over directions has no layers to draw: use plot() or frame()")
    g = found.groups.index(group)
    split = [name.split(".") for name in found.components]
    layers = sorted({int(layer) for layer, *_ in split})
    columns = list(dict.fromkeys(".".join(rest) for _, *rest in split))
    columns.sort(key=lambda c: (c.partition(".")[0], int(c.partition(".")[2] or -1)))
    grid = torch.full((len(layers), len(columns)), torch.nan)
    dots = []
    for c, (layer, *rest) in enumerate(split):
        at = layers.index(int(layer)), columns.index(".".join(rest))
        grid[at] = 1 - found.mask[g, c]
        if bool(found.patched[g, c]):
            dots.append(at)
    one = len({c.partition(".")[0] for c in columns}) == 1 and "." in columns[0]
    part = columns[0].partition(".")[0]
    ax = heat_map(
        ax,
        grid,
        layers=layers,
        columns=[c.partition(".")[2] for c in columns] if one else columns,
        xlabel=f"head of {part}" if one else "component",
        label="share taken from the source",
        title=broken(f"{found.name}, {group}" + ("; dots: patched" if dots else "")),
    )
    ax.images[0].set(cmap="Oranges", clim=(0, 1))  # a share has no other side
    for i, j in dots:
        ax.plot(j, i, ls="", marker="o", ms=4, mfc="white", mec="black")
    return ax
