"""How figures look and are written: one theme, one palette, byte-stable PNG and SVG."""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#999999")
"""Okabe and Ito's colours, which stay apart under the common forms of colour blindness."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Marks that go with `PALETTE`, so that colour is never the only difference."""

THEME: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "alignlens",
}


@contextmanager
def theme() -> Iterator[None]:
    """Draw inside with the project's theme and without a display; nothing global is changed."""
    import matplotlib as mpl

    with mpl.rc_context({**THEME}):
        yield


def axes(ax: "Axes | None", width: float = 5.0, height: float = 3.2) -> "Axes":
    """The axes given, or those of a new figure that needs no window."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    with theme():
        return Figure(figsize=(width, height), layout="constrained").subplots()


def row(n: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    """A new figure that needs no window, with n axes beside each other."""
    from matplotlib.figure import Figure

    with theme():
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(1, n, squeeze=False)[0])


def style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series."""
    return {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}


def svg(figure: "Figure") -> str:
    """The figure as SVG text without a date, the same bytes for the same figure."""
    buffer = io.StringIO()
    with theme():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(drawn: "Axes | Figure", path: Path | str, record: Mapping | None = None) -> list[Path]:
    """Write `path` as PNG and SVG, with the record in their metadata; returns both paths."""
    from matplotlib.figure import Figure

    figure = drawn if isinstance(drawn, Figure) else drawn.get_figure(root=True)
    assert isinstance(figure, Figure)
    path = Path(path).with_suffix("")
    note = json.dumps(record or {}, sort_keys=True, default=str)
    written = []
    with theme():
        for kind, metadata in (
            ("png", {"Software": "alignlens", "Description": note}),
            ("svg", {"Date": None, "Description": note}),
        ):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata)
            target = path.with_name(f"{path.name}.{kind}")
            files.write_bytes(target, buffer.getvalue())
            written.append(target)
    return written
