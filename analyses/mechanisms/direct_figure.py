"""Figures of direct attribution: heads as a map, attention and MLPs as bars."""

from typing import TYPE_CHECKING

import torch

from analyses.figures import broken, legend_below
from analyses.patching.figure import heat_map
from probes import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyses.mechanisms.direct import DirectAttribution


def draw_heads(found: "DirectAttribution", ax: "Axes | None") -> "Axes":
    """Mean share of every head; the claimed ones, at most the 15 largest, are ringed."""
    values = found.head_means[..., 0]
    if not values.shape[1] or not bool(values.isfinite().any()):
        raise ValueError(f"{found.model} has no attention heads to draw: use plot_layers()")
    ax = heat_map(
        ax,
        values,
        layers=range(len(values)),
        columns=[str(h) for h in range(values.shape[1])],
        xlabel="head",
        label=f"{found.target} ({found.unit})",
        title="Heads",
    )
    rows = [r for r in found.frame().to_dict("records") if r["kind"] == "head" and r["claimed"]]
    ringed = sorted(rows, key=lambda r: -abs(r["mean"]))[:15]
    if ringed:
        said = "the 15 largest" if len(rows) > 15 else "those"
        ax.set_xlabel(f"head (rings: {said} beyond the null)")
    for row in ringed:
        for width, colour in ((3.0, "white"), (1.2, "black")):  # seen on any shade
            ax.plot(int(row["head"]), row["layer"], "o", ms=7, mew=width, mfc="none", mec=colour)
    return ax


def draw_layers(found: "DirectAttribution", ax: "Axes | None") -> "Axes":
    """Bars along the layers, upwards as in the map of heads."""
    n = found.layer_means.shape[1]
    ax = figures.axes(ax, 4.2, max(3.4, 1.6 + 0.13 * n))
    layers = torch.arange(n)
    kinds = ["attention", "MLP"] + (["remainder"] if bool(found.remainder.any()) else [])
    thick = 0.84 / len(kinds)
    with figures.theme():
        for k, kind in enumerate(kinds):
            value, low, high = found.layer_means[k].unbind(-1)
            bound = found.layer_null[:, k].abs().double().quantile(0.95, dim=0)
            at = (layers + (k - (len(kinds) - 1) / 2) * thick).numpy()
            ax.barh(
                at,
                2 * bound.numpy(),
                thick,
                left=-bound.numpy(),
                color="0.6",
                alpha=0.35,
                lw=0,
                label="null, 95 %" if k == 0 else None,
            )
            error = torch.stack([value - low, high - value]).clamp(min=0).nan_to_num(0.0)
            ax.barh(
                at,
                value.numpy(),
                0.8 * thick,
                xerr=error.numpy(),
                error_kw={"lw": 0.7},
                color=figures.PALETTE[k],
                hatch=("", "////", "..")[k],
                label=kind,
            )
        ax.axvline(0, color=figures.PALETTE[6], lw=0.8)
        ax.use_sticky_edges = False  # else the longest bar touches the frame
        ax.set(
            ylim=(-0.7, n - 0.3),
            xlabel=broken(f"{found.target} ({found.unit})", 34),
            ylabel="layer (0 is the first block)",
            title="Attention and MLP",
        )
        legend_below(ax, "mean, 95 % interval over topics")
    return ax


def draw_both(found: "DirectAttribution") -> "Figure":
    """Map and bars beside each other, with one title."""
    made, (left, right) = figures.row(2, 8.6, max(4.2, 2.0 + 0.14 * found.layer_means.shape[1]))
    with figures.theme():
        draw_heads(found, left)
        draw_layers(found, right)
        made.suptitle(broken(f"{found.task}: {found.said}", 90), fontsize=10, fontweight="bold")
    return made
