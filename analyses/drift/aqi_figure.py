"""Figures of cluster indices: indices beside their nulls, layer weights, the two classes."""

from typing import TYPE_CHECKING

import torch

from analyses.figures import broken, legend_below, name_ticks
from probes import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analyses.drift.aqi_result import AQI

MOST_BARS = 48
"""More layer weights than this are drawn as points: bars would be too thin to tell apart."""

SHOWN = {
    "F": "separation ratio F = D²/(W/N)",
    "F/(1+F)": "bounded separation F/(1+F), 0 to 1",
    "AUROC": "held-out AUROC of a linear probe",
    "XBI": "Xie-Beni index (lower is further apart)",
    "DBS": "Davies-Bouldin score (lower is further apart)",
    "silhouette": "mean silhouette, -1 to 1",
}


def draw(result: "AQI", ax: "Axes | None", index: str) -> "Axes":
    if index not in result.indices:
        raise ValueError(f"there is no index {index!r}: choose one of {', '.join(result.indices)}")
    i = result.indices.index(index)
    ax = figures.axes(ax, 5.4, 4.1)  # room for a legend below
    names = list(dict.fromkeys(model for model, _ in result.readings))
    poolings = list(dict.fromkeys(pooling for _, pooling in result.readings))
    reached = result.null_95[:, i]
    whole = bool(result.estimate[:, i].isnan().all())  # an extreme: no estimate, no interval
    centre = result.value[:, i] if whole else result.estimate[:, i]
    with figures.theme():
        at, below = [], []
        for k, pooling in enumerate(poolings):
            rows = [r for r, (_, p) in enumerate(result.readings) if p == pooling]
            x = [names.index(result.readings[r][0]) + (0.3 * (k % 2) - 0.15) for r in rows]
            y = centre[rows]
            error = [
                (y - result.low[rows, i]).clamp(min=0).nan_to_num(0.0, 0.0).tolist(),
                (result.high[rows, i] - y).clamp(min=0).nan_to_num(0.0, 0.0).tolist(),
            ]
            look = figures.style(k)
            ax.errorbar(
                x, y.tolist(), None if whole else error, ls="", capsize=3, label=pooling, **look
            )
            at += x
            below += reached[rows].tolist()
        ax.hlines(
            below,
            [x - 0.1 for x in at],
            [x + 0.1 for x in at],
            ls=":",
            color=figures.PALETTE[6],
            label="shuffled labels, 5 %" if index in ("XBI", "DBS") else "shuffled labels, 95 %",
        )
        lines = name_ticks(ax, names)
        what = SHOWN.get(index, f"index {index}")
        ax.set(
            xlim=(-0.5, len(names) - 0.5),
            xlabel="checkpoint",
            ylabel=what,
            title="How far apart the classes lie, held out",
        )
        if bool(centre.isfinite().all()) and index not in ("XBI", "DBS"):
            ax.set_ylim(min(0.0, ax.get_ylim()[0]), ax.get_ylim()[1])
        interval = "no interval: an extreme" if whole else "95 % interval"
        legend_below(ax, f"layer weights or texts, {interval}", lines + 1)
    return ax


def draw_alpha(result: "AQI", ax: "Axes | None") -> "Axes":
    ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
    layers = list(range(len(result.sites)))
    wide = 0.8 / len(result.models)
    with figures.theme():
        for m, model in enumerate(result.models):
            alpha = result.alpha[m]
            mean = alpha.mean(0)
            x = [layer + wide * (m - (len(result.models) - 1) / 2) for layer in layers]
            error = torch.stack([mean - alpha.amin(0), alpha.amax(0) - mean]).clamp(min=0)
            if len(layers) * len(result.models) > MOST_BARS:
                look = figures.style(m)
                ax.errorbar(x, mean.tolist(), error.tolist(), lw=0.8, label=model, **look)
                continue
            ax.bar(
                x,
                mean.tolist(),
                wide,
                yerr=error.tolist(),
                label=model,
                color=figures.style(m)["color"],
                hatch=("", "//", "..", "xx", "\\\\", "++")[m % 6],
                edgecolor="white",
                lw=0,
                error_kw={"lw": 0.8},
            )
        equal = 1 / len(layers)
        ax.axhline(equal, ls=":", color=figures.PALETTE[6], label="equal weights")
        step = max(1, len(layers) // 10)
        ax.set_xticks(layers[::step], [site.split(".")[0] for site in result.sites[::step]])
        part = result.sites[0].partition(".")[2]
        ax.set(
            xlabel=f"layer ({part}; 0 is the first block)" if part else "site",
            ylabel="weight alpha (adds up to 1)",
            title="Which layers part the classes",
        )
        legend_below(ax, "checkpoint, range over seeds")
    return ax


def draw_separation(result: "AQI", row: int, ax: "Axes | None") -> "Axes":
    ax = figures.axes(ax, 5.0, 3.6)
    model, pooling = result.readings[row]
    values = result.projection[row]
    low, high = float(values.min()), float(values.max())
    pad = 0.02 * max(high - low, 1e-6)
    edges = torch.linspace(low - pad, high + pad, 25).tolist()
    with figures.theme():
        for k, (side, name) in enumerate(((True, "positive"), (False, "negative"))):
            some = values[result.positive == side]
            ax.hist(
                some.tolist(),
                edges,
                alpha=0.55,
                color=figures.PALETTE[k],
                hatch=("", "//")[k],
                edgecolor="white",
                label=f"{name} (n = {len(some)})",
            )
        ax.axvline(0, ls=":", color=figures.PALETTE[6], label="midpoint of the training classes")
        ax.set(
            xlabel="along the training direction (standard deviations)",
            ylabel="test prompts",
            title=broken(f"{model}, {pooling}"),
        )
        legend_below(ax, "class")
    return ax
