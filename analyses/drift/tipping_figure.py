"""Figures of rounds: violations under each history, collective choices, refusals behind turns."""

from typing import TYPE_CHECKING

import torch

from analyses.figures import broken, legend_below
from probes import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analyses.drift.conversation_refusals import MultiRoundRefusals
    from analyses.drift.tipping import Tipping
    from analyses.drift.tipping_together import TippingTogether
    from probes.scores import Interval


def rounds(result: "Tipping", ax: "Axes | None" = None) -> "Axes":
    """Violation rate by round; the shuffled histories as a band from the 5th percentile to the
    95th."""
    ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
    x = list(range(1, result.choices.shape[2] + 1))
    shuffled = [h for h, name in enumerate(result.histories) if name.startswith("shuffled")]
    names = {"own": "own history", "neutral": "neutral history"}
    with figures.theme():
        if shuffled:
            p = 100 * (result.choices[shuffled] == 1).double().mean(1)
            low, high = p.quantile(0.05, 0).numpy(), p.quantile(0.95, 0).numpy()
            label = f"rewards by coin, 5 to 95 % of {len(shuffled)}"
            ax.fill_between(x, low, high, color=figures.PALETTE[7], alpha=0.35, lw=0, label=label)
        for i, (history, name) in enumerate(names.items()):
            if history in result.histories:
                found = [result.rate(r, history) for r in x]
                _curve(
                    ax, [r + 0.08 * (i - 0.5) for r in x], found, name, i, "-" if not i else "--"
                )
        if bool((result.choices[0] == -1).any()):
            unread = [100 * result.unparsed(r) / len(result.item_of) for r in x]
            ax.plot(x, unread, ls=":", color=figures.PALETTE[6], label="could not be read")
        ax.axhline(50, lw=0.8, color=figures.PALETTE[7])
        ax.set_xticks(x)
        ax.set(
            xlabel="round",
            ylabel="choices that break the rule (%)",
            ylim=(-3, 103),
            title=broken(f"Tipping of {result.agent}"),
        )
        legend_below(ax, f"{len(set(result.item_of))} items, 95 % Wilson interval")
    return ax


def together(result: "TippingTogether", ax: "Axes | None" = None) -> "Axes":
    """Share of collective choices by round, one curve a threshold."""
    ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
    x = list(range(1, result.choices.shape[3] + 1))
    agents = result.choices.shape[2]
    with figures.theme():
        for i, threshold in enumerate(result.thresholds):
            found = [result.rate(r, threshold) for r in x]
            name = f"{threshold} of {agents} needed"
            _curve(ax, [r + 0.05 * i for r in x], found, name, i, "-")
        ax.set_xticks(x)
        ax.set(
            xlabel="round",
            ylabel="choices of the collective option (%)",
            ylim=(-3, 103),
            title=broken(f"{agents} agents of {result.agent}"),
        )
        legend_below(ax, f"{len(result.items)} items, 95 % Wilson interval")
    return ax


def refusals(result: "MultiRoundRefusals", ax: "Axes | None" = None) -> "Axes":
    """Refusal rates by number of earlier turns; harmful prompts solid, twins dashed and open."""
    ax = figures.axes(ax, 5.0, 4.3)  # room for a legend below
    counts = {side: int((result.positive == side).sum()) for side in (True, False)}
    with figures.theme():
        for i, past in enumerate(result.pasts):
            for side, name in ((True, "harmful"), (False, "twins")):
                found = [result.rate(past, turn, side) for turn in result.turns]
                x = [t + 0.07 * (i - 1) for t in result.turns]
                _curve(ax, x, found, f"{name}, {past}", i, "-" if side else "--", hollow=not side)
        ax.set_xticks(list(result.turns))
        ax.set(
            xlabel="earlier turns of the conversation",
            ylabel="answers that open with a refusal (%)",
            ylim=(-3, 103),
            title=broken(f"Refusals of {result.model} in conversation"),
        )
        said = f"{counts[True]} harmful prompts, {counts[False]} twins, 95 % Wilson interval"
        legend_below(ax, said)
    return ax


def _curve(
    ax: "Axes",
    x: list[float],
    found: "list[Interval]",
    label: str,
    i: int,
    line: str,
    hollow: bool = False,
) -> None:
    y = torch.tensor([[f.value, f.low, f.high] for f in found]).double() * 100
    error = torch.stack([y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]]).clamp_min(0).numpy()
    more = {"markerfacecolor": "white"} if hollow else {}
    ax.errorbar(
        x, y[:, 0].numpy(), yerr=error, capsize=2, ls=line, label=label, **more, **figures.style(i)
    )
