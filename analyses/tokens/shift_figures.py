"""Figures of a token shift: by position, by divergence, by kind of word."""

from typing import TYPE_CHECKING

from analyses.figures import broken, legend_below, name_ticks
from analyses.tokens.buckets import BUCKETS
from analyses.tokens.shares import LIMITS
from probes import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analyses.tokens.shift_result import TokenShift

LABELS = {
    "kl": "mean KL(aligned‖base) (nats)",
    "reverse_kl": "mean KL(base‖aligned) (nats)",
    "js": "mean Jensen-Shannon divergence (nats)",
    "p_base": "mean probability under the base",
    "p_aligned": "mean probability under the aligned model",
    "log_rank": "mean natural log of the rank under the base",
    "rank": "geometric mean of the rank under the base",
}


def positions(shift: "TokenShift", quantity: str, ax: "Axes | None") -> "Axes":
    """A quantity by position in the answer, one curve a group, with intervals over prompts."""
    ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
    with figures.theme():
        for i, group in enumerate(dict.fromkeys(shift.groups)):
            table = shift.by_position(quantity, group)
            value = table["value"]
            x = (table["start"] + table["stop"] - 1) / 2 + 0.12 * i
            error = [value - table["low"], table["high"] - value]
            ax.errorbar(x, value, yerr=error, capsize=2, label=group, **figures.style(i))
        ax.set(xlabel="position in the answer (tokens; binned)")
        if quantity == "shifted":
            said = f"share of tokens ranked below {LIMITS[1]} by {shift.reader}"
            ax.set(ylabel=broken(said, 40), ylim=(-0.02, 1.02))
            title = f"Shifted tokens, {shift.aligned} against {shift.reader}"
        else:
            ax.set(ylabel=LABELS[quantity])
            title = f"{shift.aligned} against {shift.reader}, by position"
            if quantity == "rank":
                ax.set_yscale("log")
        ax.set(title=broken(title))
        legend_below(ax, "prompts, 95 % interval")
    return ax


def divergences(shift: "TokenShift", ax: "Axes | None") -> "Axes":
    """Mean divergences by group; a mark without a bar is that of one prompt."""
    ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
    names = ("kl", "reverse_kl", "js")
    groups = list(dict.fromkeys(shift.groups))
    with figures.theme():
        for i, group in enumerate(groups):
            if not shift.among(group).any():
                continue
            means = [shift.mean(name, group) for name in names]
            x = [n + 0.18 * (i - (len(groups) - 1) / 2) for n in range(len(names))]
            error = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
            label = f"{group} (n = {shift.groups.count(group)})"
            y = [m.value for m in means]
            ax.errorbar(x, y, yerr=error, ls="", capsize=3, label=label, **figures.style(i))
        lines = name_ticks(ax, ("KL", "reverse KL", "Jensen-Shannon"))
        ax.set(
            xlabel="KL(aligned‖base), reverse KL(base‖aligned)",
            ylabel="mean over answer tokens (nats)",
            xlim=(-0.5, len(names) - 0.5),
            title=broken(f"Divergence, {shift.aligned} against {shift.reader}"),
        )
        ax.set_ylim(bottom=0)
        legend_below(ax, "prompts, 95 % interval", lines + 1)
    return ax


def buckets(shift: "TokenShift", ax: "Axes | None") -> "Axes":
    """Shifted share by bucket, groups one above the other; marks without a bar have no interval,
    because fewer than two answers hold such a token."""
    ax = figures.axes(ax, 5.4, 4.6)
    groups = list(dict.fromkeys(shift.groups))
    with figures.theme():
        for i, group in enumerate(groups):
            table = shift.by_bucket(group)
            y = [BUCKETS.index(b) + 0.2 * (i - (len(groups) - 1) / 2) for b in table["bucket"]]
            value = table["shifted"]
            # without an interval the limits are missing
            low, high = (table[c].astype(float).fillna(value) for c in ("low", "high"))
            error = [(value - low).clip(lower=0), (high - value).clip(lower=0)]
            ax.errorbar(value, y, xerr=error, ls="", capsize=2, label=group, **figures.style(i))
        ax.set_yticks(range(len(BUCKETS)), BUCKETS)
        ax.invert_yaxis()
        ax.set(
            xlim=(-0.02, 1.02),
            xlabel="share of the bucket's tokens that are shifted",
            title=broken(f"Shifted by kind of word, {shift.aligned} against {shift.reader}"),
        )
        legend_below(ax, "prompts, 95 % interval")
    return ax
