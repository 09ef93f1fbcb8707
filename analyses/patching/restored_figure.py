"""How much of a gap single layers, layers on one side and heads restore, drawn."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.patching.figure import heat_map
from probes import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@runtime_checkable
class Restored(Protocol):
    """Shares of a gap, 0 to 1, on validation prompts."""

    @property
    def kinds(self) -> tuple[str, ...]: ...
    @property
    def single_share(self) -> Tensor: ...
    @property
    def single_low(self) -> Tensor: ...
    @property
    def single_high(self) -> Tensor: ...
    @property
    def below(self) -> Tensor: ...
    @property
    def above(self) -> Tensor: ...
    @property
    def heads(self) -> Tensor: ...
    @property
    def window(self) -> tuple[int, int] | None: ...
    @property
    def chosen_heads(self) -> tuple[str, ...]: ...


def draw_layers(ax: "Axes | None", found: Restored, *, ylabel: str, title: str) -> "Axes":
    """Bars of single layers with their intervals, curves of all layers up to and from each, the
    chosen window shaded."""
    ax = figures.axes(ax, 5.6, 4.2)
    layers = torch.arange(len(found.below))
    wide = 0.8 / len(found.kinds)
    with figures.theme():
        if found.window is not None:
            first, last = found.window
            ax.axvspan(
                first - 0.5, last + 0.5, color=figures.PALETTE[4], alpha=0.15, lw=0,
                label="chosen window",
            )  # fmt: skip
        for k, kind in enumerate(found.kinds):
            value = 100 * found.single_share[k]
            error = 100 * torch.stack([found.single_low[k], found.single_high[k]])
            ax.bar(
                (layers + (k - (len(found.kinds) - 1) / 2) * wide).numpy(),
                value.nan_to_num(0.0).numpy(),
                wide,
                yerr=(error - value).abs().nan_to_num(0.0).numpy(),
                error_kw={"lw": 0.7},
                color=figures.PALETTE[k],
                hatch=("", "//")[k % 2],
                label=f"{kind} of one layer",
            )
        for i, (values, said) in enumerate(
            ((found.below, "all layers up to this"), (found.above, "all layers from this on"))
        ):
            look = figures.style(2 + i)
            ax.plot(layers.numpy(), 100 * values.numpy(), label=said, markevery=3, **look)
        ax.axhline(0, color=figures.PALETTE[6], lw=0.8)
        ax.set(
            xlabel="layer (0 is the first block)", ylabel=broken(ylabel, 40), title=broken(title)
        )
        legend_below(ax, "validation prompts, 95 % interval")
    return ax


def draw_heads(
    ax: "Axes | None", found: Restored, *, xlabel: str, label: str, title: str
) -> "Axes":
    """Every head alone, layer by layer; the chosen ones are ringed."""
    ax = heat_map(
        ax,
        100 * found.heads,
        layers=range(len(found.heads)),
        columns=[str(h) for h in range(found.heads.shape[1])],
        xlabel=xlabel,
        label=label,
        title=broken(title),
    )
    for text in found.chosen_heads:
        layer, _, head = text.partition(".")
        for width, colour in ((3.0, "white"), (1.2, "black")):  # seen on any shade
            ax.plot(int(head), int(layer), "o", ms=8, mew=width, mfc="none", mec=colour)
    return ax
