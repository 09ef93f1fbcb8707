"""Figures of a ranking accuracy: beside its idealised range, and the loss of each pair."""

from typing import TYPE_CHECKING

import torch

from analyses.figures import broken, legend_below
from analyses.tokens.preference_theory import loss_bound
from probes import figures
from probes.scores import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analyses.tokens.ranking import RankingAccuracy


def accuracies(result: "RankingAccuracy", ax: "Axes | None" = None) -> "Axes":
    """Accuracies of reference and model beside the idealised range, raw and normalised."""
    ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
    with figures.theme():
        for i, (who, name) in enumerate(
            (
                ("reference", result.reference),
                ("model", result.model),
                (None, "idealised, all beta"),
            )
        ):
            x = [n + 0.22 * (i - 1) for n in range(2)]
            if who is None:
                ranges = [result.idealised(normalised) for normalised in (False, True)]
                found = [Interval(r.median, r.low, r.high) for r in ranges]
            else:
                found = [result.accuracy(who, normalised) for normalised in (False, True)]
            y = [100 * f.value for f in found]
            error = [
                [100 * (f.value - f.low) for f in found],
                [100 * (f.high - f.value) for f in found],
            ]
            ax.errorbar(x, y, yerr=error, ls="", capsize=3, label=name, **figures.style(i))
        limit = 100 * result.chance()
        ax.axhline(limit, ls=":", color=figures.PALETTE[6], label="coins, 95 %")
        ax.set_xticks((0, 1), ("summed", "per token"))
        ax.set(
            ylim=(-3, 103),
            xlim=(-0.5, 1.5),
            xlabel="log-probability of an answer",
            ylabel="pairs ranked as raters do (%)",
            title=f"Ranking accuracy, {len(result.topics)} pairs",
        )
        legend_below(ax, "95 % Wilson interval; idealised: min, median, max")
    return ax


def losses(result: "RankingAccuracy", ax: "Axes | None" = None, beta: float = 0.1) -> "Axes":
    """DPO loss of each pair against how wrong the reference was, with theorem 4.1's line."""
    ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
    wrongness = -result.margins("reference")
    loss = result.losses(beta)
    right = result.margins() >= 0
    line = torch.linspace(float(wrongness.min()), float(wrongness.max()), 200).double()
    with figures.theme():
        for i, (name, chosen) in enumerate((("ranked right", right), ("ranked wrong", ~right))):
            x, y = wrongness[chosen].numpy(), loss[chosen].numpy()
            ax.plot(x, y, ls="", label=f"{name} ({int(chosen.sum())})", **figures.style(i))
        bound = loss_bound(line, beta).numpy()
        ax.plot(line.numpy(), bound, color=figures.PALETTE[6], label="bound")
        ax.set(
            xlabel=broken(f"c: log p(other) - log p(preferred) of {result.reference} (nats)", 52),
            ylabel=f"DPO loss, beta {beta:g} (nats)",
            title="Which pairs training turned",
        )
        legend_below(ax, lines=3)
    return ax
