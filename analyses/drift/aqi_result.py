"""What a measurement of cluster indices says: per checkpoint, beside shuffles, words and lengths."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.drift.aqi_reading import EXTREMES, INDICES, LOWER
from analyses.drift.composites import variant_e
from probes.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TEXTS = "texts"
"""Stands where a checkpoint would for the readings of the texts alone."""


@dataclass(frozen=True)
class AQI(Result):
    """Cluster indices on held-out prompts, for learned and for equal layer weights.

    Raw values of two models cannot be compared: their widths and norms differ. `relative` divides
    F by what shuffled labels reach in the same model, and `change` compares that.
    """

    models: tuple[str, ...]
    reference: str
    """The checkpoint that changes refer to."""
    identical: tuple[str, ...]
    """Other checkpoints whose activations equal the reference's bit for bit."""
    sites: tuple[str, ...]
    readings: tuple[tuple[str, str], ...]
    """(checkpoint, "learned" or "uniform"), then ("texts", "words" or "length"): the rows below."""
    indices: tuple[str, ...]
    """Names; F = D^2 N / W = 1/XBI comes first. Lower is further apart for XBI and DBS only."""
    value: Float[Tensor, "reading index"]
    """By the published formulas, of the test sample. CHI and A grow with N; all gain from noise."""
    estimate: Float[Tensor, "reading index"]
    """Of the population, without the noise of the means and without twins (see
    `between_topics`): what the limits belong to. NaN for Dunn and B, which have no interval."""
    low: Float[Tensor, "reading index"]
    """95 % limits, BCa bootstrap over test topics stratified by the classes a topic holds, layer
    weights and probe as fitted."""
    high: Float[Tensor, "reading index"]
    null: Float[Tensor, "reading permutation index"]
    """Estimates (for Dunn and B, values) with labels shuffled in training and test, layer weights
    and probe fitted anew each time."""
    change: Float[Tensor, " reading"]
    """`relative` less that of the reference with the same pooling; 0 for itself, NaN for texts."""
    change_low: Float[Tensor, " reading"]
    """95 % limits, BCa bootstrap over test topics, paired; the null is resampled with them."""
    change_high: Float[Tensor, " reading"]
    change_null: Float[Tensor, " reading"]
    """95th percentile of |change| under shuffled labels, the same shuffles for both."""
    alpha: Float[Tensor, "model seed layer"]
    """Learned layer weights, adding up to 1; their mean over seeds pools."""
    axioms: tuple[str, ...]
    """Strata (hazard classes, axioms) of the test prompts; empty without."""
    axiom_topics: tuple[int, ...]
    axiom_ratio: Float[Tensor, "reading axiom"]
    """Estimate of F inside a stratum, same vectors; NaN with fewer than 4 topics a class."""
    axiom_low: Float[Tensor, "reading axiom"]
    axiom_high: Float[Tensor, "reading axiom"]
    axiom_null: Float[Tensor, "reading axiom"]
    """95th percentile of the stratum's F under shuffled labels."""
    axiom_xie_beni: Float[Tensor, "reading axiom"]
    axiom_calinski_harabasz: Float[Tensor, "reading axiom"]
    """Published formulas inside a stratum, for `variant_e`."""
    projection: Float[Tensor, "reading prompt"]
    """Test prompts along the difference of the training means, 0 at the training midpoint, in
    standard deviations within the training classes; positive on the side of the positive class."""
    positive: Bool[Tensor, " prompt"]
    top_share: Float[Tensor, " reading"]
    """Share of the test rows' variance held by the one dimension that holds most, 0 to 1. Near 1 a
    massive activation decides every distance, and so every index but AUROC."""
    n_topics: int
    """Test topics."""
    n_train_topics: int
    identity: tuple[str, ...]
    """For each reading, the sentence that shows CHI and XBI to be one statistic."""
    notes: tuple[str, ...]

    @cached_property
    def null_95(self) -> Float[Tensor, "reading index"]:
        """What shuffled labels reach: 95th percentile, for XBI and DBS the 5th."""
        null = self.null.double()
        found = null.quantile(0.95, dim=1)
        for name in LOWER:
            at = self.indices.index(name)
            # an order statistic, because the null holds infinities that cannot be interpolated
            found[:, at] = null[:, :, at].quantile(0.05, dim=1, interpolation="lower")
        return found.float()

    @property
    def claimed(self) -> Bool[Tensor, "reading index"]:
        """Whether the interval excludes what shuffled labels reach; never for Dunn and B."""
        lower = torch.tensor([name in LOWER for name in self.indices])
        return torch.where(lower, self.high < self.null_95, self.low > self.null_95)

    @property
    def relative(self) -> Float[Tensor, "reading 3"]:
        """Estimate of F and its limits over the null's 95th percentile of the same reading; above
        1 is more than shuffled labels reach. The only form to set beside another model's.

        Shuffling turns what parts the classes into spread within them, along one direction, and
        widens the null: `relative` grows more slowly than F and can order models otherwise.
        """
        F = torch.stack([t[:, 0] for t in (self.estimate, self.low, self.high)], 1)
        return F / self.null_95[:, :1].clamp(min=1e-12)

    @property
    def change_claimed(self) -> Bool[Tensor, " reading"]:
        """Whether the change's interval lies beyond what shuffled labels reach on either side."""
        return (self.change_low > self.change_null) | (self.change_high < -self.change_null)

    def row(self, model: str, pooling: str = "learned") -> int:
        """Number of a reading."""
        if (model, pooling) not in self.readings:
            known = ", ".join(f"{m} {p}" for m, p in self.readings)
            raise ValueError(f"there is no reading {model} {pooling}: choose one of {known}")
        return self.readings.index((model, pooling))

    def frame(self) -> "pd.DataFrame":
        """One row a reading and index."""
        import pandas as pd

        claimed, reached = self.claimed, self.null_95
        rows = []
        for r, (model, pooling) in enumerate(self.readings):
            for i, name in enumerate(self.indices):
                null = self.null[r, :, i]
                at = self.value[r, i] if name in EXTREMES else self.estimate[r, i]
                beyond = (null <= at) if name in LOWER else (null >= at)
                rows.append(
                    {
                        "model": model,
                        "pooling": pooling,
                        "index": name,
                        "value": float(self.value[r, i]),
                        "estimate": float(self.estimate[r, i]),
                        "low": float(self.low[r, i]),
                        "high": float(self.high[r, i]),
                        "null_95": float(reached[r, i]),
                        "p": (1 + int(beyond.sum())) / (1 + len(null)),
                        "claimed": bool(claimed[r, i]),
                    }
                )
        return pd.DataFrame(rows)

    def frame_relative(self) -> "pd.DataFrame":
        """One row a reading: F in units of its own null, and its change from the reference."""
        import pandas as pd

        rows = []
        for r, (model, pooling) in enumerate(self.readings):
            value, low, high = self.relative[r].tolist()
            rows.append(
                {
                    "model": model,
                    "pooling": pooling,
                    "relative": value,
                    "low": low,
                    "high": high,
                    "change": float(self.change[r]),
                    "change_low": float(self.change_low[r]),
                    "change_high": float(self.change_high[r]),
                    "change_null": float(self.change_null[r]),
                    "change_claimed": bool(self.change_claimed[r]),
                }
            )
        return pd.DataFrame(rows)

    def frame_axioms(self) -> "pd.DataFrame":
        """One row a reading and stratum."""
        import pandas as pd

        columns = {
            "F": self.axiom_ratio,
            "low": self.axiom_low,
            "high": self.axiom_high,
            "null_95": self.axiom_null,
            "XBI": self.axiom_xie_beni,
            "CHI": self.axiom_calinski_harabasz,
        }
        rows = []
        for r, (model, pooling) in enumerate(self.readings):
            for a, axiom in enumerate(self.axioms):
                found = {name: float(t[r, a]) for name, t in columns.items()}
                rows.append({"model": model, "pooling": pooling, "axiom": axiom} | found)
                rows[-1]["topics"] = self.axiom_topics[a]
                rows[-1]["claimed"] = found["low"] > found["null_95"]
        return pd.DataFrame(rows)

    def variant_e(self, model: str, pooling: str = "learned") -> dict[str, float]:
        """Variant E of each stratum, which is relative to the model's own strata: never to be set
        beside another model's (see `composites.variant_e`)."""
        r = self.row(model, pooling)
        xbi, chi = self.axiom_xie_beni[r], self.axiom_calinski_harabasz[r]
        measured = [a for a in range(len(self.axioms)) if not bool(xbi[a].isnan())]
        found = variant_e([float(xbi[a]) for a in measured], [float(chi[a]) for a in measured])
        return {self.axioms[a]: float(e) for a, e in zip(measured, found, strict=True)}

    def plot(self, ax: "Axes | None" = None, index: str = "F/(1+F)") -> "Axes":
        """One index of every reading with its interval and what shuffled labels reach."""
        from analyses.drift.aqi_figure import draw

        return draw(self, ax, index)

    def plot_alpha(self, ax: "Axes | None" = None) -> "Axes":
        """Learned layer weights by depth, with the range over seeds and the equal weights."""
        from analyses.drift.aqi_figure import draw_alpha

        return draw_alpha(self, ax)

    def plot_separation(
        self, model: str, pooling: str = "learned", ax: "Axes | None" = None
    ) -> "Axes":
        """Histogram of both classes along the training direction."""
        from analyses.drift.aqi_figure import draw_separation

        return draw_separation(self, self.row(model, pooling), ax)

    def __str__(self) -> str:
        said = []
        for model in self.models:
            r = self.row(model)
            value, low, high = (float(t[r, 0]) for t in (self.estimate, self.low, self.high))
            said.append(
                f"{model} F {value:.3f} [{low:.3f}, {high:.3f}], null 95 % "
                f"{float(self.null_95[r, 0]):.3f}, change {float(self.change[r]):+.2f}"
            )
        same = f"; {', '.join(self.identical)} equal {self.reference} bit for bit, every change is "
        return (
            "separation ratio F = 1/XBI, learned layers (CHI says the same): "
            + "; ".join(said)
            + (same + "exactly 0" if self.identical else "")
        )


assert INDICES[0] == "F"
