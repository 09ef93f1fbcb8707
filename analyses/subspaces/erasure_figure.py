"""How erasure is drawn."""

from typing import TYPE_CHECKING

import torch

from analyses.figures import broken, legend_below
from probes import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analyses.subspaces.erasure import Erasure


def draw_erasure(result: "Erasure", ax: "Axes | None") -> "Axes":
    """One point a method and site, side by side; what chance and sampling leave as lines."""
    ax = figures.axes(ax, 5.6, 4.4)  # room for a legend below
    x = torch.arange(len(result.sites)).double()
    wide = len(result.methods)
    dark = figures.PALETTE[6]
    with figures.theme():
        for i, method in enumerate(result.methods):
            y = result.auroc[i]
            error = torch.stack([y - result.low[i], result.high[i] - y]).clamp_min(0)
            ax.errorbar(
                (x + 0.7 * ((i + 0.5) / wide - 0.5)).numpy(),
                y.numpy(),
                yerr=error.numpy(),
                ls="",
                capsize=2,
                label=method,
                **figures.style(i),
            )
        lines = (
            (result.null.amax(0), ":", "shuffled labels, 95 %"),
            (result.residue_high, "--", "left by sampling, 95 %"),
        )
        for values, dashes, label in lines:
            ax.plot(x.numpy(), values.numpy(), ls=dashes, lw=1, color=dark, label=label)
        low, high = result.random.amin(0), result.random.amax(0)
        grey = figures.PALETTE[7]
        ax.fill_between(
            x.numpy(), low.numpy(), high.numpy(), alpha=0.3, color=grey, label="random subspaces"
        )
        ax.axhline(0.5, color=dark, lw=0.8)
        ax.set_xticks(range(len(result.sites)), [s.partition(".")[0] for s in result.sites])
        ax.set(
            xlabel="layer (0 is the first block)",
            ylabel="AUROC of a fresh probe (test topics)",
            title=broken(f"Is it still there after erasing? {result.model}"),
        )
        legend_below(ax, "erased with, 95 % interval over topics")
    return ax
