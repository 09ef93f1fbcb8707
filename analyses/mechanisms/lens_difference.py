"""Two checkpoints under the logit lens: from which layer on one says what the other does not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.mechanisms.logit_lens import MEASURES, LogitLens, band, label_of, row_of
from analyses.patching import metrics
from analyses.subspaces.activations_figure import whole_layers
from probes import figures
from probes.results import Result
from probes.splits import codes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LensDifference(Result):
    """One checkpoint's lens minus another's on the same prompts, paired."""

    model: str
    other: str
    task: str
    position: str
    metric: str
    unit: str
    difference: Float[Tensor, "measure layer limit"]
    """Mean difference over prompts, model - other, with its 95 % BCa interval over topics; rows are
    `MEASURES`. Exactly 0 for identical models."""
    null: Float[Tensor, "draw measure layer"]
    """The same with each topic's difference given a random sign."""

    @property
    def identical(self) -> bool:
        return not bool(self.difference[..., 0].any())

    @property
    def null_95(self) -> Float[Tensor, "measure layer"]:
        """95th percentile of the null's size."""
        return self.null.abs().double().quantile(0.95, dim=0).float()

    def claimed(self, measure: str = "logit difference") -> tuple[int, ...]:
        """Layers whose interval lies beyond the null's 95th percentile."""
        row = row_of(measure)
        _, low, high = self.difference[row].unbind(-1)
        bound = self.null_95[row]
        return tuple(((low > bound) | (high < -bound)).nonzero().flatten().tolist())

    def frame(self) -> "pd.DataFrame":
        """One row a layer."""
        import pandas as pd

        columns: dict[str, list] = {"layer": list(range(self.difference.shape[1]))}
        for name, rows, bound in zip(MEASURES, self.difference, self.null_95, strict=True):
            for end, column in zip(("", " low", " high"), rows.T, strict=True):
                columns[name + end] = column.tolist()
            columns[f"{name} null 95"] = bound.tolist()
        return pd.DataFrame(columns)

    def plot(self, ax: "Axes | None" = None, measure: str = "logit difference") -> "Axes":
        """The difference by layer beside its null."""
        ax = figures.axes(ax, 5.2, 3.8)
        row = row_of(measure)
        x = range(self.difference.shape[1])
        with figures.theme():
            bound = self.null_95[row].numpy()
            ax.fill_between(
                x, -bound, bound, color="0.6", alpha=0.35, lw=0, label="random signs, 95 %"
            )
            band(ax, self.difference[row], f"{self.model} - {self.other}", 0)
            ax.axhline(0, color=figures.PALETTE[6], lw=0.8)
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel=broken("difference in " + label_of(measure, self.metric, self.unit), 40),
                title=broken(f"{self.task}: {self.model} minus {self.other}"),
            )
            whole_layers(ax)
            legend_below(ax, f"token: {self.position}, 95 % interval over topics")
        return ax

    def __str__(self) -> str:
        if self.identical:
            return f"{self.model} and {self.other} say exactly the same at every layer"
        where = self.claimed()
        value = self.difference[row_of("logit difference"), :, 0]
        at = int(value.abs().argmax())
        said = f"beyond random signs in {len(where)} layers" if where else "not told from the null"
        if where:
            said += f", the first {where[0]}"
        return (
            f"{self.model} minus {self.other}, {self.task}: logit(answer) - logit(other) differs most "
            f"after layer {at}, by {float(value[at]):+.2f}; {said}"
        )


def lens_difference(
    model: LogitLens, other: LogitLens, *, draws: int = 500, resamples: int = 2000, seed: int = 0
) -> LensDifference:
    """Two checkpoints' lenses of one task, paired by prompt."""
    same = (
        model.topics == other.topics
        and model.values.shape == other.values.shape
        and (model.task, model.position, model.tuned) == (other.task, other.position, other.tuned)
        and model.record.prompts_hash == other.record.prompts_hash
    )
    if not same:
        raise ValueError(
            f"the lenses of {model.model} and {other.model} read different prompts, places or "
            "layers: make both from one task"
        )
    d = model.values.double() - other.values.double()
    found = metrics.mean_interval(d, model.topics, resamples=resamples, seed=seed)
    return LensDifference(
        model=model.model,
        other=other.model,
        task=model.task,
        position=model.position,
        metric=model.metric,
        unit=model.unit,
        difference=torch.stack(list(found), -1).float(),
        null=signed(d, model.topics, draws, seed).float(),
        record=model.record,
    )


def signed(
    difference: Float[Tensor, "*column prompt"], topics: Sequence[str], draws: int, seed: int
) -> Float[Tensor, " draw *column"]:
    """Means of paired differences when each topic's gets a random sign."""
    numbers, known = codes(topics)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (draws, len(known)), generator=generator).double() * 2 - 1
    flat = difference.double().reshape(-1, difference.shape[-1])
    found = signs[:, numbers] @ flat.T / flat.shape[1]
    return found.reshape(draws, *difference.shape[:-1])
