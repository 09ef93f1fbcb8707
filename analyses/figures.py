"""Room for what is written around the data: legends below the axes, long names broken."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDEST = 46
"""Characters of a title, or of an axis label, that fit on one line of a panel."""


def legend_below(ax: "Axes", title: str | None = None, columns: int = 2) -> None:
    """A legend under the axis label, where it can cover no data however many curves there are."""
    # the pad counts in font sizes: it clears tick and axis labels at any height of the axes
    ax.legend(
        title=title,
        title_fontsize=8,
        ncols=columns,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        borderaxespad=5.2,
    )


def broken(text: str, width: int = WIDEST) -> str:
    """The text on lines that fit: checkpoints may have long names."""
    return textwrap.fill(text, width)


def name_ticks(ax: "Axes", names: Sequence[str]) -> None:
    """Names under the horizontal axis, slanted when they would touch."""
    slanted = max(map(len, names)) * len(names) > WIDEST
    ax.set_xticks(
        range(len(names)), list(names), rotation=25 * slanted, ha="right" if slanted else "center"
    )
