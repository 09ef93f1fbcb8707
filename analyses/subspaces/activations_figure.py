"""How overlaps of activation subspaces are drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from analyses.figures import broken, legend_below
from probes import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analyses.subspaces.activations import SubspaceOverlap


def shown(etas: Sequence[float]) -> int:
    """Which energy is drawn when none is asked: the largest up to 0.6, or the smallest."""
    below = [eta for eta in etas if eta <= 0.6]
    return list(etas).index(max(below) if below else min(etas))


def whole_layers(ax: "Axes") -> None:
    """Marks of the layer axis at whole numbers only."""
    ax.locator_params(axis="x", integer=True)


def draw_overlap(
    result: "SubspaceOverlap",
    ax: "Axes | None",
    sets: tuple[str, str] | None,
    form: str,
    eta: float | None,
) -> "Axes":
    """Matched halves by layer with the band over splits, a curve a checkpoint; ceilings dashed."""
    if form not in ("uncentred", "centred"):
        raise ValueError(f"unknown form {form!r}: choose uncentred or centred")
    if eta is not None and eta not in result.etas:
        raise ValueError(f"eta {eta:g} was not measured: choose one of {result.etas}")
    e = shown(result.etas) if eta is None else result.etas.index(eta)
    f = ("uncentred", "centred").index(form)
    known = list(dict.fromkeys((own, other) for _, own, _, other in result.comparisons))
    sets = known[0] if sets is None else sets
    if sets not in known:
        raise ValueError(f"{sets} were not compared: choose one of {known}")
    chosen = [c for c, item in enumerate(result.comparisons) if (item[1], item[3]) == sets]
    ax = figures.axes(ax, 5.6, 4.2)  # room for a legend below
    layers = list(result.layers)
    with figures.theme():
        for i, c in enumerate(chosen):
            look = figures.style(i)
            mean, low, high = result.between[c, f, :, e].unbind(-1)
            ax.fill_between(
                layers, low.numpy(), high.numpy(), alpha=0.12, lw=0, color=look["color"]
            )
            ax.plot(layers, mean.numpy(), label=result.comparisons[c][0], **look)
            top = result.ceiling[c, f, :, e, 0].numpy()
            ax.plot(layers, top, ls="--", lw=1, color=look["color"])
        dark = figures.PALETTE[6]
        null = result.null_high[chosen, f, :, e].amax(0).numpy()
        ax.plot([], [], ls="--", lw=1, color=dark, label="ceiling: halves of one set")
        ax.plot(layers, null, ls=":", color=dark, label="random subspaces, 95 %")
        other = result.comparisons[chosen[0]][2]
        across = sets[0] == sets[1]
        what = f"{sets[0]} against {other}" if across else f"{sets[0]} / {sets[1]}"
        ax.set(
            ylim=(-0.02, 1.03),
            xlabel="layer (0 is the first block)",
            ylabel=f"subspace overlap, {form}\n({100 * result.etas[e]:g} % of energy)",
            title=broken(f"{what}, halves of {result.half[chosen[0]]} prompts"),
        )
        whole_layers(ax)
        legend_below(ax, "checkpoint, 5th to 95th percentile over splits")
    return ax
