"""What path patching finds: one path, or those of every head to one set of receivers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken
from analyses.patching.figure import heat_map
from analyses.patching.grid import PatchMap
from analyses.patching.patch import Patched

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class PathPatched(Patched):
    """A metric before and after one path was patched; `sites` are the senders."""

    receivers: tuple[str, ...]
    """Inputs of heads (q, k, v), or "logits"."""
    receivers_at: str

    def __str__(self) -> str:
        return f"path to {_some(self.receivers)}: {super().__str__()}"


@dataclass(frozen=True)
class PathMap(PatchMap):
    """What every head does to the answer along its path to one set of receivers.

    `change`, `share` and their limits are those of the path alone; NaN for heads from which no path
    leads to a receiver.
    """

    receivers: tuple[str, ...]
    receivers_at: str
    each: Float[Tensor, "layer column prompt"]
    """Change of every prompt, in the metric's unit."""
    topics: tuple[str, ...]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Mean change of the metric, every head; dots mark what the null does not explain."""
        unit = f" ({self.unit})" if self.unit else ""
        many = [bool(row.isfinite().any()) for row in self.change]
        below = self.layers[: max((k for k, some in enumerate(many) if some), default=-1) + 1]
        ax = heat_map(
            ax,
            self.change[: len(below)],
            layers=below,
            columns=self.columns,
            xlabel="head that sends",
            label=f"change of {self.metric}{unit}",
            title=broken(
                f"Paths to {_some(self.receivers)}"
                + ("; dots: told from the null" if bool(self.claimed.any()) else "")
            ),
        )
        at = self.claimed.nonzero()
        ax.plot(at[:, 1].numpy(), at[:, 0].numpy(), ls="", marker=".", ms=3, color="black")
        return ax

    def __str__(self) -> str:
        said = super().__str__().replace("map of heads: ", "", 1)
        return f"paths to {_some(self.receivers)}: {said}".replace("no patch", "no path")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more"
