"""Figures of a steering sweep: effect against cost, against strength, and by layer."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from probes import figures
from probes.sites import Site
from steering.edits import MIXING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from steering.sweep import SteeringSweep


UNITS = {
    "refusals": "share of prompts",
    "odds": "log-odds, nats",
    "kl": "nats",
    "perplexity": "log, nats",
    "mistakes": "share of items",
    "repetition": "share of 4-grams",
    "benign_refusals": "share of prompts",
}
"""Units of measures under the names `alignlens sweep` gives them; others carry theirs in the name."""


def pareto(sweep: "SteeringSweep", effect: str, cost: str, ax: "Axes | None" = None) -> "Axes":
    """Change of the effect against change of the cost; full marks are claimed."""
    ax = figures.axes(ax, 6.0, 4.2)
    e, c = sweep.index(effect), sweep.index(cost)
    x, y = sweep.change[:, c], sweep.change[:, e]
    with figures.theme():
        for i, (name, rows) in enumerate(_series(sweep)):
            look = figures.style(i)
            ax.plot(x[rows].numpy(), y[rows].numpy(), "-", lw=0.8, alpha=0.6, color=look["color"])
            ax.errorbar(
                x[rows].numpy(),
                y[rows].numpy(),
                xerr=_arms(sweep, rows, c),
                yerr=_arms(sweep, rows, e),
                ls="",
                lw=0.7,
                color=look["color"],
            )
            _marks(ax, sweep, rows, x, y, e, i, name)
        _nulls(sweep, ax, e, c)
        ax.axhline(0, ls=":", lw=1, color=figures.PALETTE[6])
        ax.set(xlabel=f"cost: {_change(cost)}", ylabel=f"effect: {_change(effect)}")
        ax.set_title(f"{effect} against {cost}")
        _legend(ax)
    return ax


def strength(sweep: "SteeringSweep", effect: str, ax: "Axes | None" = None) -> "Axes":
    """Change of the effect against strength, with intervals and the null's band."""
    ax = figures.axes(ax, 6.0, 4.2)
    e = sweep.index(effect)
    bottom, top = sweep.band
    x, y = sweep.strengths, sweep.change[:, e]
    with figures.theme():
        for i, (name, rows) in enumerate(_series(sweep)):
            look = figures.style(i)
            ax.errorbar(
                x[rows].numpy(),
                y[rows].numpy(),
                yerr=_arms(sweep, rows, e),
                capsize=2,
                lw=1.2,
                color=look["color"],
            )
            _marks(ax, sweep, rows, x, y, e, i, name)
            if sweep.kinds:
                # the edge is dashed in the curve's colour: several bands would hide each other
                ax.fill_between(
                    x[rows].numpy(),
                    bottom[rows, e].numpy(),
                    top[rows, e].numpy(),
                    alpha=0.15,
                    facecolor=figures.PALETTE[7],
                    edgecolor=look["color"],
                    ls="--",
                    label="null, 5 to 95 %" if i == 0 else None,
                )
        ax.axhline(0, ls=":", lw=1, color=figures.PALETTE[6])
        unit = f" ({sweep.unit})" if sweep.unit != "raw" else " (times the vector)"
        mixing = [operation in MIXING for operation in sweep.operations]
        if any(mixing):  # whose strength has no unit
            unit = " (share)" if all(mixing) else f"{unit[:-1]}, or share)"
        ax.set(xlabel=f"strength{unit}", ylabel=_change(effect), title=effect)
        _legend(ax)
    return ax


def layer(sweep: "SteeringSweep", effect: str, ax: "Axes | None" = None) -> "Axes":
    """Change of the effect by layer and strength; dots are claimed. For sweeps over layers."""
    e = sweep.index(effect)
    if len(set(sweep.vectors)) > 1 or len(set(sweep.operations)) > 1:
        raise ValueError("a map of layers shows one vector and one operation: sweep those alone")
    try:
        places = [Site.parse(site) for site in sweep.sites]
    except ValueError as error:
        raise ValueError(f"a map of layers needs single sites: {error}") from error
    known = sorted(set(places))
    strengths = sorted(set(sweep.strengths.tolist()))
    grid = torch.full((len(strengths), len(known)), torch.nan)
    dots: list[tuple[int, int]] = []
    for row, (place, s) in enumerate(zip(places, sweep.strengths.tolist(), strict=True)):
        at = strengths.index(s), known.index(place)
        grid[at] = sweep.change[row, e]
        if sweep.claimed[row, e]:
            dots.append(at)
    most = float(grid.nan_to_num(0).abs().max()) or 1.0
    ax = figures.axes(ax, 6.0, 3.4)
    with figures.theme():
        image = ax.imshow(
            grid.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, origin="lower", aspect="auto"
        )
        ax.grid(visible=False)
        ax.figure.colorbar(image, ax=ax, label=_change(effect))
        ax.plot(
            [x for _, x in dots],
            [y for y, _ in dots],
            ".",
            color=figures.PALETTE[6],
            label="beyond its null",
        )
        one_part = len({place.part for place in known}) == 1 and known[0].head is None
        names = [str(place.layer) if one_part else str(place) for place in known]
        step = math.ceil(len(names) / 16)
        ax.set_xticks(range(0, len(names), step), names[::step], rotation=0 if one_part else 60)
        ax.set_yticks(range(len(strengths)), [f"{s:g}" for s in strengths])
        ax.set(xlabel=f"layer ({known[0].part})" if one_part else "site", ylabel="strength")
        ax.set_title(f"{effect}: {sweep.vectors[0]} ({sweep.operations[0]})")
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2))
    return ax


def _change(measure: str) -> str:
    return f"change of {measure}" + (f" ({UNITS[measure]})" if measure in UNITS else "")


def _series(sweep: "SteeringSweep") -> Iterator[tuple[str, list[int]]]:
    """Cells that differ in strength alone, ordered by it, under a name of what varies."""
    keys = list(zip(sweep.vectors, sweep.sites, sweep.operations, strict=True))
    varies = [len(set(column)) > 1 for column in zip(*keys, strict=True)]
    for key in dict.fromkeys(keys):
        rows = [i for i, other in enumerate(keys) if other == key]
        rows.sort(key=lambda i: float(sweep.strengths[i]))
        name = ", ".join(part for part, v in zip(key, varies, strict=True) if v)
        yield name or f"{key[0]} at {key[1]}", rows


def _arms(sweep: "SteeringSweep", rows: list[int], column: int) -> list[list[float]]:
    middle = sweep.change[rows, column]
    # a BCa limit may lie a hair on the wrong side of a skewed mean
    down = (middle - sweep.low[rows, column]).clamp(min=0)
    up = (sweep.high[rows, column] - middle).clamp(min=0)
    return [down.tolist(), up.tolist()]


def _marks(
    ax: "Axes",
    sweep: "SteeringSweep",
    rows: list[int],
    x: torch.Tensor,
    y: torch.Tensor,
    effect: int,
    i: int,
    name: str,
) -> None:
    look = figures.style(i)
    claimed = sweep.claimed[:, effect]
    for full in (False, True):
        own = [r for r in rows if bool(claimed[r]) == full]
        ax.plot(
            x[own].numpy(),
            y[own].numpy(),
            ls="",
            ms=5,
            mfc=look["color"] if full else "white",
            **look,
            label=name if full == bool(claimed[rows].any()) else None,
        )


def _nulls(sweep: "SteeringSweep", ax: "Axes", e: int, c: int) -> None:
    if not sweep.kinds:
        return
    x, y = sweep.null[:, c].flatten(), sweep.null[:, e].flatten()
    if bool(x.isfinite().any()):
        ax.plot(x.numpy(), y.numpy(), ".", ms=3, color=figures.PALETTE[7], zorder=0, label="null")
        return
    bottom, top = float(sweep.band[0][:, e].min()), float(sweep.band[1][:, e].max())
    label = "null, 5 to 95 %, widest strength"
    ax.axhspan(bottom, top, alpha=0.2, color=figures.PALETTE[7], lw=0, label=label)


def _legend(ax: "Axes") -> None:
    handles, labels = ax.get_legend_handles_labels()
    claimed = ax.plot([], [], "o", color=figures.PALETTE[6], label="beyond its null")
    left = ax.plot([], [], "o", mfc="white", color=figures.PALETTE[6], label="not beyond")
    handles += [*claimed, *left]
    labels += ["beyond its null", "not beyond"]
    ax.legend(handles, labels, loc="upper left", bbox_to_anchor=(1, 1))
