"""How often each checkpoint refuses, on prompts that should be refused and on their twins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analyses.checkpoints import Checkpoints
from analyses.figures import legend_below, name_ticks
from probes import figures
from probes.prompts import Prompt
from probes.refusals import refuses
from probes.results import Result
from probes.scores import Interval, wilson

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class RefusalRates(Result):
    """Refusals by checkpoint and prompt group, judged by how the greedy answer opens."""

    models: tuple[str, ...]
    groups: tuple[str, ...]
    refused: tuple[tuple[int, ...], ...]
    """`refused[model][group]`."""
    asked: tuple[int, ...]
    """Prompts per group."""
    answers: tuple[tuple[str, ...], ...]
    """`answers[model][prompt]`, the openings that were judged."""

    def rate(self, model: str, group: str) -> Interval:
        """Refusal rate with its 95 % Wilson interval."""
        m, g = self.models.index(model), self.groups.index(group)
        return wilson(self.refused[m][g], self.asked[g])

    def frame(self) -> "pd.DataFrame":
        """One row per model and group."""
        import pandas as pd

        rows = []
        for model in self.models:
            for g, group in enumerate(self.groups):
                rate = self.rate(model, group)
                rows.append(
                    {
                        "model": model,
                        "group": group,
                        "refused": self.refused[self.models.index(model)][g],
                        "asked": self.asked[g],
                        "rate": rate.value,
                        "low": rate.low,
                        "high": rate.high,
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Rates with Wilson intervals, groups side by side for every model."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        with figures.theme():
            for g, group in enumerate(self.groups):
                rates = [self.rate(model, group) for model in self.models]
                x = [m + (g - (len(self.groups) - 1) / 2) * 0.18 for m in range(len(self.models))]
                y = [r.value for r in rates]
                error = [[r.value - r.low for r in rates], [r.high - r.value for r in rates]]
                ax.errorbar(
                    x,
                    y,
                    yerr=error,
                    ls="",
                    capsize=3,
                    **figures.style(g),
                    label=f"{group} (n = {self.asked[g]})",
                )
            lines = name_ticks(ax, self.models)
            ax.set(
                ylim=(-0.03, 1.03),
                xlim=(-0.5, len(self.models) - 0.5),
                ylabel="share of answers that open with a refusal",
                title="Refusal rates",
            )
            legend_below(ax, "prompts, 95 % Wilson interval", lines)
        return ax

    def __str__(self) -> str:
        said = []
        for model in self.models:
            rates = ", ".join(f"{g} {self.rate(model, g).value:.1%}" for g in self.groups)
            said.append(f"{model}: {rates}")
        return "refusals: " + "; ".join(said)


def refusal_rates(
    checkpoints: Checkpoints,
    prompts: Sequence[Prompt],
    groups: Sequence[str],
    *,
    max_new_tokens: int = 10,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> RefusalRates:
    """Greedy openings of every checkpoint's answers, judged by `probes.refusals.refuses`."""
    known = tuple(dict.fromkeys(groups))
    answers, refused = [], []
    for item in checkpoints.items:
        texts = item.model.generate(
            prompts, max_new_tokens, batch_size=batch_size, progress=progress
        )
        answers.append(tuple(texts))
        refused.append(
            tuple(
                sum(refuses(t) for t, g in zip(texts, groups, strict=True) if g == name)
                for name in known
            )
        )
    return RefusalRates(
        models=checkpoints.labels,
        groups=known,
        refused=tuple(refused),
        asked=tuple(list(groups).count(name) for name in known),
        answers=tuple(answers),
    )
