"""Figures of a probe sweep: a curve against depth, or a map of layer by head."""

from typing import TYPE_CHECKING

import torch

from probes import figures
from probes.sites import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from probes.sweeps import ProbeSweep


def draw(sweep: "ProbeSweep", ax: "Axes | None" = None) -> "Axes":
    """A map if every site is a head and there are several heads, else one curve for each part."""
    ax = figures.axes(ax)
    places = [Site.parse(site) for site in sweep.sites]
    heads = [place.head for place in places if place.head is not None]
    many = len(heads) == len(places) and len(set(heads)) > 1
    with figures.theme():
        if many and len({place.part for place in places}) == 1:
            _map(sweep, ax, heads)
        else:
            _curves(sweep, ax, [str(place).partition(".")[2] for place in places])
        ax.set_title(f"{sweep.kind} probes, {sweep.n_groups} test topics")
    return ax


def _curves(sweep: "ProbeSweep", ax: "Axes", series: list[str]) -> None:
    for i, name in enumerate(dict.fromkeys(series)):
        own = torch.tensor([other == name for other in series])
        x, look = sweep.layers[own].numpy(), figures.style(i)
        low, high = sweep.low[own].numpy(), sweep.high[own].numpy()
        ax.fill_between(x, low, high, alpha=0.2, lw=0, color=look["color"])
        ax.plot(
            x,
            sweep.auroc[own].numpy(),
            color=look["color"],
            marker=look["marker"],
            label=f"{name}, 95 % interval",
        )
        ends = torch.tensor([0.05, 0.95], dtype=torch.float64)
        bottom, top = sweep.null[own].double().quantile(ends, dim=1).numpy()
        # the edge is dashed in the curve's colour: bands of several parts would hide each other
        ax.fill_between(
            x,
            bottom,
            top,
            alpha=0.15,
            facecolor=figures.PALETTE[7],
            edgecolor=look["color"],
            ls="--",
            label=f"{name}, shuffled labels, 5 to 95 %",
        )
    ax.axhline(0.5, ls=":", color=figures.PALETTE[6], label="chance")
    if sweep.validation is not None:
        ax.plot(
            [int(sweep.layers[sweep.best_index])],
            [float(sweep.auroc[sweep.best_index])],
            marker="o",
            ms=9,
            mfc="none",
            ls="",
            color=figures.PALETTE[6],
            label="chosen on validation",
        )
    ax.set(xlabel="layer", ylabel="AUROC (held out)", ylim=(0, 1.02))
    ax.legend(loc="lower right")


def _map(sweep: "ProbeSweep", ax: "Axes", heads: list[int]) -> None:
    grid = torch.full((int(sweep.layers.max()) + 1, max(heads) + 1), torch.nan)
    grid[sweep.layers, torch.tensor(heads)] = sweep.auroc
    image = ax.imshow(grid.numpy(), cmap="RdBu_r", vmin=0, vmax=1, origin="lower", aspect="auto")
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="AUROC (held out), 0.5 is chance")
    ax.plot(
        torch.tensor(heads)[sweep.claimed].numpy(),
        sweep.layers[sweep.claimed].numpy(),
        marker=".",
        ls="",
        color=figures.PALETTE[6],
        label="interval above its null's 95 %",
    )
    ax.set(xlabel="head", ylabel="layer")
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.15))
