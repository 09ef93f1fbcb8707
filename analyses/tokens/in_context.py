"""How much of what alignment does to the choice of words do a few words of context do, too?

A base model behind an instruction and some answered queries (URIAL: Lin et al. 2023, section 4)
often agrees with the aligned model where, behind the aligned model's own template, it does not.
The aligned answers stay the same; only what the base reads before them changes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken, legend_below, name_ticks
from analyses.tokens import contexts as known
from analyses.tokens.shares import KINDS, Pooled, share_intervals
from analyses.tokens.shift import measured
from analyses.tokens.shift_result import TokenShift
from probes import figures
from probes.model import HookedModel
from probes.prompts import Prompt
from probes.results import Result
from probes.scores import Intervals, newcombe

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ContextShifts(Result):
    """Token shift of one pair of models with several contexts of the base."""

    base: str
    aligned: str
    contexts: tuple[str, ...]
    """The first is `same`: the base reads what the aligned model reads."""
    groups: tuple[str, ...]
    prompts: tuple[int, ...]
    """Prompts per group."""
    tokens: tuple[int, ...]
    """Answer tokens per group."""
    shares: Float[Tensor, "context group kind"]
    """Share of unshifted, marginal and shifted tokens, pooled over tokens; 0 to 1."""
    shares_low: Float[Tensor, "context group kind"]
    shares_high: Float[Tensor, "context group kind"]
    difference: Float[Tensor, "context group"]
    """Shifted share minus that with `same`, over the same answers: negative where the context
    brings the base nearer to the aligned model. Exactly 0 for `same`."""
    difference_low: Float[Tensor, "context group"]
    difference_high: Float[Tensor, "context group"]
    kl: Float[Tensor, "context group"]
    """Mean KL(aligned‖base) in nats."""
    kl_low: Float[Tensor, "context group"]
    kl_high: Float[Tensor, "context group"]
    notes: tuple[str, ...] = ()

    def frame(self) -> "pd.DataFrame":
        """One row per context and group; limits are 95 % BCa over prompts, NaN of one prompt."""
        import pandas as pd

        rows = []
        for c, context in enumerate(self.contexts):
            for g, group in enumerate(self.groups):
                row: dict[str, object] = {"context": context, "group": group}
                row |= {"prompts": self.prompts[g], "tokens": self.tokens[g]}
                for k, kind in enumerate(KINDS):
                    row[kind] = float(self.shares[c, g, k])
                    row[f"{kind}_low"] = float(self.shares_low[c, g, k])
                    row[f"{kind}_high"] = float(self.shares_high[c, g, k])
                for name in ("difference", "kl"):
                    for end in ("", "_low", "_high"):
                        row[name + end] = float(getattr(self, name + end)[c, g])
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Share of shifted tokens by context, groups side by side, with intervals."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        with figures.theme():
            for g, group in enumerate(self.groups):
                x = [c + 0.18 * (g - (len(self.groups) - 1) / 2) for c in range(len(self.contexts))]
                y, low, high = (
                    t[:, g, 2].double() for t in (self.shares, self.shares_low, self.shares_high)
                )
                error = [(y - low).clamp(min=0).tolist(), (high - y).clamp(min=0).tolist()]
                label = f"{group} (n = {self.prompts[g]})"
                look = figures.style(g)
                ax.errorbar(x, y.tolist(), yerr=error, ls="", capsize=3, label=label, **look)
            lines = name_ticks(ax, self.contexts)
            ax.set(
                ylim=(-0.02, None),
                xlim=(-0.5, len(self.contexts) - 0.5),
                xlabel=broken(f"what {self.base} reads before the answers"),
                ylabel=broken(f"share of the tokens of {self.aligned} that are shifted", 40),
                title="What a context supplies",
            )
            legend_below(ax, "prompts, 95 % interval", lines + 1)
        return ax

    def __str__(self) -> str:
        said = []
        for g, group in enumerate(self.groups):
            shares = ", ".join(
                f"{name} {float(self.shares[c, g, 2]):.1%}" for c, name in enumerate(self.contexts)
            )
            said.append(f"{group} {shares}")
        return f"shifted tokens of {self.aligned} by context of {self.base}: {'; '.join(said)}"


def context_shifts(
    base: HookedModel,
    aligned: HookedModel,
    prompts: Sequence[Prompt],
    groups: Sequence[str],
    *,
    contexts: Sequence[str] = tuple(known.CONTEXTS),
    max_new_tokens: int = 24,
    batch_size: int = 16,
    vocab_size: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ContextShifts:
    """Token shift with every context of the base named (`contexts.CONTEXTS`), and with `same`.

    The aligned model answers once, and reads its answers once; the base reads them once a context.
    """
    names = list(dict.fromkeys(["same", *map(known.check, contexts)]))
    shifts = measured(
        base, aligned, prompts, groups, names, max_new_tokens=max_new_tokens,
        batch_size=batch_size, vocab_size=vocab_size, top=1, progress=progress,
    )  # fmt: skip
    return compare_contexts(shifts, seed)


def compare_contexts(shifts: Sequence[TokenShift], seed: int = 0) -> ContextShifts:
    """The comparison of token shifts over the same answers, the first of them with `same`."""
    same = shifts[0] if shifts else None
    if same is None or same.base_context != "same" or any(s.tokens != same.tokens for s in shifts):
        raise ValueError(
            f"{len(shifts)} token shifts were given: expected those of the same answers in several "
            "contexts of the base, the first with 'same'"
        )
    groups = tuple(dict.fromkeys(same.groups))
    shares, differences, kls = [], [], []
    for group in groups:
        chosen = same.among(group)
        if not chosen.any():
            shares += [_unknown(len(KINDS))] * len(shifts)
            differences += [_unknown()] * len(shifts)
            kls += [_unknown()] * len(shifts)
            continue
        reference = _shifted(same, chosen, seed)
        for shift in shifts:
            kinds = torch.nn.functional.one_hot(shift.kinds, len(KINDS))
            shares.append(share_intervals(shift.over_prompts(kinds, chosen, seed=seed)))
            moved = not torch.equal(shift.kinds[chosen], same.kinds[chosen])
            differences.append(_difference(_shifted(shift, chosen, seed), reference, moved))
            mean = shift.mean("kl", group, seed=seed)
            kls.append(Intervals(*(torch.tensor(limit, dtype=torch.float64) for limit in mean)))
    shape = (len(groups), len(shifts))

    def table(found: Sequence[Intervals]) -> list[Tensor]:
        ends = [torch.stack(list(end)).float() for end in zip(*found, strict=True)]
        return [end.reshape(*shape, *end.shape[1:]).transpose(0, 1).contiguous() for end in ends]

    found = {"shares": table(shares), "difference": table(differences), "kl": table(kls)}
    return ContextShifts(
        base=same.base,
        aligned=same.aligned,
        contexts=tuple(shift.base_context for shift in shifts),
        groups=groups,
        prompts=tuple(same.groups.count(group) for group in groups),
        tokens=tuple(int(same.among(group).sum()) for group in groups),
        **{
            name + end: t[i]
            for name, t in found.items()
            for i, end in enumerate(("", "_low", "_high"))
        },
        notes=same.notes,
        record=dataclasses.replace(
            same.record,
            seeds=(seed,),
            settings={
                **same.record.settings,
                "base_context": [shift.base_context for shift in shifts],
                "base_prompts_hash": {
                    shift.base_context: shift.record.settings.get("base_prompts_hash", "")
                    for shift in shifts
                },
            },
        ),
    )


def _unknown(*shape: int) -> Intervals:
    """Of a group none of whose answers has a token."""
    return Intervals(*(torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(3)))


def _shifted(shift: TokenShift, chosen: Tensor, seed: int) -> Pooled:
    return shift.over_prompts((shift.kinds == 2)[:, None], chosen, seed=seed)


def _difference(own: Pooled, reference: Pooled, moved: bool) -> Intervals:
    """Limits of a paired difference of shares; Newcombe's for as many prompts, taken for
    independent, where no resample differs although tokens do."""
    limits = Intervals(*(limit[0] for limit in own.minus(reference).interval()))
    if moved and float(limits.low) == float(limits.high):
        n = len(own.jackknife)
        counts = [round(n * float(side.value[0])) for side in (own, reference)]
        bound = newcombe(counts[0], n, counts[1], n)
        low, high = (limits.value.new_tensor(x) for x in (bound.low, bound.high))
        return Intervals(
            limits.value, torch.minimum(low, limits.low), torch.maximum(high, limits.high)
        )
    return limits
