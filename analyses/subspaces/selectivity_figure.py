"""Figures of `Selectivity`: behaviour against the fraction, and harmful against useful."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analyses.figures import broken, legend_below
from analyses.subspaces.projections import Part, Subspace
from probes import figures
from probes.scores import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyses.subspaces.selectivity_result import Selectivity

_LABELS: dict[Subspace, str] = {
    "top-k": "top-k of V",
    "random-k": "random-k of V",
    "random": "random directions",
}
_TITLES = {"parallel": "added: P", "orthogonal": "added: U - P", "opposite": "added: -P"}


def draw(
    result: "Selectivity", behaviour: str, part: Part, matched: bool, ax: "Axes | None" = None
) -> "Axes":
    """One behaviour against the fraction, one line a subspace, with 95 % intervals; dashed lines
    are the aligned model and the one with the whole update."""
    ax = figures.axes(ax, 4.6, 3.6)
    b = result.behaviours.index(behaviour)
    with figures.theme():
        for i, subspace in enumerate(_subspaces(result)):
            shown = [
                result.value(result.rows(subspace, f, part, matched), behaviour)
                for f in result.fractions
            ]
            # side by side, so that no interval hides another
            shift = (i - 1) * 0.012
            error = _errors(shown)
            ax.errorbar(
                [f + shift for f in result.fractions],
                [v.value for v in shown],
                yerr=error,
                capsize=2,
                elinewidth=0.8,
                label=_LABELS[subspace],
                **figures.style(i),
            )
        for row, (name, look) in enumerate((("aligned", ":"), ("whole update", "--"))):
            value = result.value(row, behaviour).value
            ax.axhline(value, ls=look, lw=1.1, color=figures.PALETTE[6], label=name)
        kind = "harmful" if result.harmful[b] else "useful"
        ax.set(
            xlabel="fraction of V's " + ("rank" if result.of == "rank" else "smaller side"),
            ylabel=broken(behaviour, 34),
            title=f"{kind}; {_TITLES[part]}{', norm-matched' if matched else ''}",
        )
        legend_below(ax)
    return ax


def draw_tradeoff(
    result: "Selectivity",
    harmful: str | None = None,
    useful: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Useful against harmful behaviour, one mark a cell: colour is the subspace, filled marks are
    P and open ones U - P, small marks are norm-matched, thin lines 95 % intervals. Defaults: the first behaviour of each
    kind, twins' refusals left out where there is another."""
    ax = figures.axes(ax, 4.6, 3.9)
    names = list(zip(result.behaviours, result.harmful, strict=True))
    harmful = harmful or next((name for name, bad in names if bad), None)
    others = [name for name, bad in names if not bad]
    useful = useful or (others[1:] or others or [None])[0]
    if harmful is None or useful is None:
        raise ValueError(
            "a harmful and a useful behaviour are drawn against each other, and "
            f"{', '.join(result.behaviours)} were measured: name both"
        )
    with figures.theme():
        for i, subspace in enumerate(_subspaces(result)):
            look = figures.style(i)
            named = False
            for part in dict.fromkeys(cell["part"] for cell in result.cells):
                for matched in dict.fromkeys(cell["matched"] for cell in result.cells):
                    rows = [result.rows(subspace, f, part, matched) for f in result.fractions]
                    _crosses(
                        ax,
                        [(result.value(r, harmful), result.value(r, useful)) for r in rows],
                        ms=4 if matched else 6,
                        mfc=look["color"] if part == "parallel" else "none",
                        label=None if named else _LABELS[subspace],
                        **look,
                    )
                    named = True
        for row, (name, mark) in enumerate((("aligned", "P"), ("whole update", "X"))):
            _crosses(
                ax,
                [(result.value(row, harmful), result.value(row, useful))],
                ms=9,
                marker=mark,
                color=figures.PALETTE[6],
                label=name,
            )
        ax.set(xlabel=harmful, ylabel=broken(useful, 40), title="Harmful and useful together")
        legend_below(ax, "filled: P, open: U - P, small: norm-matched")
    return ax


def _crosses(ax: "Axes", points: Sequence[tuple[Interval, Interval]], **look: Any) -> None:
    """Marks with both their intervals, drawn thin."""
    across, up = zip(*points, strict=True)
    errors = [_errors(side) for side in (across, up)]
    drawn = ax.errorbar(
        [v.value for v in across],
        [v.value for v in up],
        xerr=errors[0],
        yerr=errors[1],
        ls="",
        elinewidth=0.6,
        **look,
    )
    for bar in drawn[2]:
        bar.set_alpha(0.4)


def _errors(shown: Sequence[Interval]) -> list[list[float]]:
    """Distances to the limits; a bootstrap of few, skewed values may leave its own mean outside."""
    below = [max(0.0, v.value - v.low) for v in shown]
    return [below, [max(0.0, v.high - v.value) for v in shown]]


def figure(result: "Selectivity", *, matched: bool = False) -> "Figure":
    """All behaviours (columns) by what is applied (rows), as in the paper's figures."""
    parts: list[Any] = list(dict.fromkeys(cell["part"] for cell in result.cells))
    root = figures.axes(None, 4.2 * len(result.behaviours), 3.7 * len(parts))
    whole = root.get_figure(root=True)
    assert whole is not None
    root.remove()
    with figures.theme():
        panels = whole.subplots(len(parts), len(result.behaviours), squeeze=False)  # pyright: ignore
        for row, part in zip(panels, parts, strict=True):
            for ax, behaviour in zip(row, result.behaviours, strict=True):
                draw(result, behaviour, part, matched, ax)
    return whole  # pyright: ignore[reportReturnType]


def _subspaces(result: "Selectivity") -> list[Subspace]:
    known = {cell["subspace"] for cell in result.cells}
    return [subspace for subspace in _LABELS if subspace in known]
