"""`HeadSelection`: what LoFiT's first step says of every attention head."""

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from probes import figures
from steering.head_parameters import Head
from steering.tuning import TrainingCurve

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class HeadSelection(TrainingCurve):
    """The outcome of step A: how far the scaling of each head was learned away from 1."""

    norms: Float[Tensor, "layer head"]
    """2-norm of each head's A; NaN where a layer has no such head or was left out."""

    @property
    def ranked(self) -> tuple[Head, ...]:
        """All heads by falling norm; equal norms by layer, then head."""
        found = [
            (layer, head)
            for layer, row in enumerate(self.norms.tolist())
            for head, norm in enumerate(row)
            if not math.isnan(norm)
        ]
        return tuple(sorted(found, key=lambda at: (-float(self.norms[at]), *at)))

    def top(self, k: int) -> tuple[Head, ...]:
        """The `k` heads of largest norm; more than there are gives all, with a warning."""
        if k < 1:
            raise ValueError(f"{k} heads were asked for: ask for 1 or more")
        if k > len(self.ranked):
            warnings.warn(
                f"{k} heads were asked for and {len(self.ranked)} are ranked: all are taken",
                stacklevel=2,
            )
        return self.ranked[:k]

    @property
    def concentration(self) -> float:
        """Share of the sum of squared norms in the top tenth of the heads; 0.1 when all are equal."""
        squares = self.norms[~self.norms.isnan()].double().square().sort(descending=True).values
        return float(squares[: max(1, len(squares) // 10)].sum() / squares.sum())

    def frame(self) -> "pd.DataFrame":
        """One row a head: rank, layer, head, norm."""
        import pandas as pd

        rows = [
            {"rank": i, "layer": layer, "head": head, "norm": float(self.norms[layer, head])}
            for i, (layer, head) in enumerate(self.ranked, 1)
        ]
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Norm of each head's scaling, layers upwards, heads to the right; blank: left out."""
        ax = figures.axes(ax)
        with figures.theme():
            image = ax.imshow(self.norms.numpy(), origin="lower", aspect="auto", cmap="viridis")
            ax.set(xlabel="head", ylabel="layer", title="heads by the norm of their scaling")
            ax.grid(visible=False)
            ax.locator_params(integer=True)
            ax.figure.colorbar(image, ax=ax, label="norm of A (no unit)")
        return ax

    def __str__(self) -> str:
        first = ", ".join(f"{layer}.{head}" for layer, head in self.ranked[:4])
        return f"{len(self.ranked)} heads ranked by the norm of their scaling: {first}, ..."
