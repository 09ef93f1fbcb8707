"""Room for what is written around the data: legends below the axes, long names broken."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDEST = 46
"""Characters of a title, or of an axis label, that fit on one line of a panel."""


def legend_below(ax: "Axes", title: str | None = None, lines: int = 2) -> None:
    """A legend under what is written below the axes (so many lines), where it can cover no data
    however many curves there are."""
    sizes = [len(label) for label in ax.get_legend_handles_labels()[1]]
    half = (len(sizes) + 1) // 2
    beside = max(sizes[:half], default=0) + max(sizes[half:], default=0)
    # the pad counts in font sizes: it clears tick and axis labels at any height of the axes
    ax.legend(
        title=title,
        title_fontsize=8,
        ncols=2 if beside <= WIDEST else 1,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        borderaxespad=1.8 + 1.6 * lines,
    )


def broken(text: str, width: int = WIDEST) -> str:
    """The text on lines that fit: checkpoints may have long names."""
    return textwrap.fill(text, width, break_on_hyphens=False)


def name_ticks(ax: "Axes", names: Sequence[str]) -> int:
    """Names under the horizontal axis, broken so that they do not touch; gives their lines."""
    room = max(6, WIDEST // len(names))
    # a word a little too wide is better than a word in two
    rooms = [max([room, *(len(w) for w in name.split() if len(w) <= room + 3)]) for name in names]
    shown = [textwrap.fill(name, n) for name, n in zip(names, rooms, strict=True)]
    ax.set_xticks(range(len(names)), shown)
    return 1 + max(name.count("\n") for name in shown)
