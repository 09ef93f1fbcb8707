"""How a steering vector shows itself: its figure, and what it is in words."""

from typing import TYPE_CHECKING

from probes import figures
from steering.edits import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from steering.vector import SteeringVector


def describe(vector: "SteeringVector") -> str:
    """Operation, sites and norms, origin, and how it was estimated."""
    origin = vector.origin
    lines = [
        str(vector),
        f"  from {origin.model} (fingerprint {origin.fingerprint[:12] or 'unknown'}), "
        f"{origin.estimator or 'unknown estimator'}"
        + (f", positions {origin.positions}" if origin.positions else ""),
    ]
    for site in vector.sites:
        norm, stream = vector.norm(site), vector.scales.get(site, Scale()).norm
        fraction = f", {norm / stream:.2f} of the stream's norm" if stream else ""
        lines.append(f"  {site}: norm {norm:.3g}{fraction}")
    return "\n".join(lines)


def draw(vector: "SteeringVector", ax: "Axes | None" = None) -> "Axes":
    """Raw norm by layer, beside the mean norm of the stream where that was measured."""
    ax = figures.axes(ax)
    frame = vector.frame()
    layers = [site.layer for site in vector.sites]
    with figures.theme():
        ax.plot(layers, frame["norm"], "o-", color=figures.PALETTE[0], label="vector")
        if all(vector.scales.get(site, Scale()).norm for site in vector.sites):
            ax.plot(layers, frame["stream_norm"], "s:", color=figures.PALETTE[6], label="stream")
        ax.set(xlabel="layer", ylabel="norm (unit of activations)", yscale="log")
        ax.set_title(f"{vector.origin.estimator or 'steering vector'}, {vector.origin.model}")
        ax.legend()
    return ax
