"""A heat map of layers against heads, parts or positions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken
from probes import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heat_map(
    ax: "Axes | None",
    values: Float[Tensor, "layer column"],
    *,
    layers: Sequence[int],
    columns: Sequence[str],
    xlabel: str,
    label: str,
    title: str,
    width: float = 5.0,
) -> "Axes":
    """Layers upwards; a diverging scale around 0, the same at both ends, what does not exist left
    blank."""
    ax = figures.axes(ax, width, max(3.2, 1.4 + 0.11 * len(layers)))
    finite = values[values.isfinite()]
    bound = float(finite.abs().max()) if len(finite) else 0.0
    bound = bound or 1.0
    with figures.theme():
        image = ax.imshow(
            values.numpy(), origin="lower", aspect="auto", cmap="RdBu_r", vmin=-bound, vmax=bound
        )
        step = max(1, len(layers) // 10)
        ax.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
        long = max(map(len, columns)) * len(columns) > 44
        few = max(1, len(columns) // 16)
        ax.set_xticks(
            range(0, len(columns), few),
            list(columns[::few]),
            rotation=30 if long and few == 1 else 0,
            ha="right" if long and few == 1 else "center",
        )
        ax.grid(visible=False)
        ax.set(xlabel=xlabel, ylabel="layer (0 is the first block)", title=title)
        ax.figure.colorbar(image, ax=ax, label=broken(label, 28))
    return ax
