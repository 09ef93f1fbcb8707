"""Where in the weights a change lies, and whether it takes alignment back there: layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.drift.readings import Weights
from analyses.figures import broken, legend_below
from analyses.subspaces.grouping import place
from probes import figures
from probes.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class WeightChanges(Result):
    """Updates of several checkpoints (checkpoint minus reference) beside the alignment matrix
    (reference minus base), tensor by tensor."""

    base: str
    reference: str
    labels: tuple[str, ...]
    tensors: tuple[str, ...]
    size: Int[Tensor, " tensor"]
    weights: Float[Tensor, " tensor"]
    """Squared norm of the reference's tensor."""
    alignment: Float[Tensor, " tensor"]
    """Squared norm of the alignment matrix."""
    update: Float[Tensor, "checkpoint tensor"]
    """Squared norm of the update."""
    dot: Float[Tensor, "checkpoint tensor"]
    """Inner product of the update with the alignment matrix; below 0 where it takes back."""

    @classmethod
    def of(
        cls, base: str, reference: str, labels: Sequence[str], compared: Sequence[Weights]
    ) -> "WeightChanges":
        """From `readings.compare_weights` of each checkpoint."""
        first = compared[0]
        return cls(
            base,
            reference,
            tuple(labels),
            first.names,
            first.size,
            first.reference,
            first.alignment,
            torch.stack([w.update for w in compared]),
            torch.stack([w.dot for w in compared]),
        )

    def by_layer(self) -> "pd.DataFrame":
        """One row per checkpoint and layer: change relative to the weights, cosine with the
        alignment matrix, and what a random update of the same norms reaches in 95 % of cases."""
        import pandas as pd

        layers: dict[int, list[int]] = {}
        for i, name in enumerate(self.tensors):
            layer = place(name)[0]
            if layer is not None:
                layers.setdefault(layer, []).append(i)
        rows = []
        for m, label in enumerate(self.labels):
            for layer, at in sorted(layers.items()):
                moved, aligned = self.update[m, at], self.alignment[at]
                weights = float(self.weights[at].sum())
                scale = float((moved.sum() * aligned.sum()).sqrt())
                spread = float((moved * aligned / self.size[at]).sum().sqrt())
                rows.append(
                    {
                        "checkpoint": label,
                        "layer": layer,
                        "relative change": (float(moved.sum()) / weights) ** 0.5,
                        "alignment, relative": (float(aligned.sum()) / weights) ** 0.5,
                        "cosine": float(self.dot[m, at].sum()) / scale if scale else 0.0,
                        "null_95": 1.96 * spread / scale if scale else 0.0,
                    }
                )
        return pd.DataFrame(rows)

    def frame(self) -> "pd.DataFrame":
        """One row per checkpoint and tensor; `layer` is empty outside the blocks."""
        import pandas as pd

        where = [place(name) for name in self.tensors]
        columns = {
            "tensor": list(self.tensors),
            "layer": [layer for layer, _ in where],
            "module": [module for _, module in where],
            "size": self.size.tolist(),
            "weights": self.weights.tolist(),
            "alignment": self.alignment.tolist(),
        }
        parts = [
            pd.DataFrame(
                {"checkpoint": label, **columns, "update": self.update[i].tolist()}
                | {"dot": self.dot[i].tolist()}
            )
            for i, label in enumerate(self.labels)
        ]
        return pd.concat(parts, ignore_index=True)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Norm of the change over that of the weights, by layer, alignment among them."""
        ax = figures.axes(ax, 5.0, 3.9)
        table = self.by_layer()
        with figures.theme():
            first = _columns(table, self.labels[0])
            name = f"{self.reference} from {self.base}"
            ax.plot(
                first["layer"], first["alignment, relative"], color="#111111", ls="--", label=name
            )
            for i, label in enumerate(self.labels):
                part = _columns(table, label)
                ax.plot(
                    part["layer"], part["relative change"], label=f"{label} from {self.reference}",
                    markevery=3, **figures.style(i),
                )  # fmt: skip
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel="norm of the change / norm of the weights",
                title="Where weights changed",
                ylim=(0, None),
            )
            legend_below(ax)
        return ax

    def plot_cosine(self, ax: "Axes | None" = None) -> "Axes":
        """Cosine of the update with the alignment matrix by layer; shaded: random updates."""
        ax = figures.axes(ax, 5.0, 3.9)
        table = self.by_layer()
        with figures.theme():
            parts = [_columns(table, label) for label in self.labels]
            null = [max(column) for column in zip(*(p["null_95"] for p in parts), strict=True)]
            ax.fill_between(
                parts[0]["layer"], [-x for x in null], null, color=figures.PALETTE[7], alpha=0.3,
                lw=0, label="random updates of equal norm, 95 %",
            )  # fmt: skip
            for i, (label, part) in enumerate(zip(self.labels, parts, strict=True)):
                look = figures.style(i)
                ax.plot(part["layer"], part["cosine"], label=label, markevery=3, **look)
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel=broken("cosine of the update with the alignment matrix", 40),
                title="Does it take alignment back?",
            )
            legend_below(ax, "below 0: towards the base")
        return ax

    def __str__(self) -> str:
        said = []
        for i, label in enumerate(self.labels):
            size = (self.update[i].sum() / self.weights.sum()).sqrt()
            back = -self.dot[i].sum() / self.alignment.sum()
            said.append(
                f"{label} moved {float(size):.2%}, {float(back):.1%} of alignment taken back"
            )
        return f"weights against {self.reference}: " + "; ".join(said)


def _columns(table: "pd.DataFrame", label: str) -> dict[str, list[Any]]:
    """The rows of one checkpoint."""
    own = table[table["checkpoint"] == label]
    return {name: own[name].tolist() for name in own.columns if name != "checkpoint"}
