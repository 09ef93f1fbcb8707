"""The token shift as the released analysis computes it; for comparison with published numbers only.

What it does otherwise, read in the authors' repository (Re-Align/AlignTDS):

- the token looked up is the aligned model's most probable one at each place, and not the one that
  stands in the answer (there, the answer's text is tokenised again, so the two may part);
- it is looked up by its decoded string, in the base's ten most probable. One id decoded alone loses
  its leading blank in SentencePiece tokenizers, and parts of characters all decode to one mark, so
  different ids collide and a token can be "found" at the rank of another: *unshifted* is counted
  too often. Counting from 0, what is not found has rank 10;
- its "KL" is the sum over strings in both lists of 30 of p log(p / q), p the base's and q the
  aligned model's probabilities, each list renormalised to 1. It is truncated, of the opposite
  direction to `TokenShift.kl`, and can be negative.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.figures import legend_below, name_ticks
from analyses.tokens.shares import KINDS
from analyses.tokens.shift_result import TokenShift
from probes import figures
from probes.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LISTED = 30
"""Ids that are kept of each distribution."""

SEARCHED = 10
"""Ids of the base among which a token is looked up; the rank of what is not found."""


@dataclass(frozen=True)
class ReleasedShift(Result):
    """Ranks and truncated divergences of the released analysis, beside the right kinds."""

    base: str
    aligned: str
    token_groups: tuple[str, ...]
    """The group of each token's prompt."""
    ranks: Int[Tensor, " token"]
    """Counted from 0; 10 where the string is not among the base's first ten."""
    truncated_kl: Float[Tensor, " token"]
    """KL(base‖aligned) over the strings in both lists, in nats; may be negative."""
    exact_kinds: Int[Tensor, " token"]
    """What `TokenShift` says of the token: 0 unshifted, 1 marginal, 2 shifted."""

    @property
    def kinds(self) -> Int[Tensor, " token"]:
        """0 unshifted (rank 0), 1 marginal (1 or 2), 2 shifted."""
        return (self.ranks >= 1).long() + (self.ranks >= 3).long()

    def frame(self) -> "pd.DataFrame":
        """One row per group: shares as released and as they are, and the mean truncated KL."""
        import pandas as pd

        rows = []
        for group in dict.fromkeys(self.token_groups):
            own = torch.tensor([g == group for g in self.token_groups])
            row: dict[str, object] = {"group": group, "tokens": int(own.sum())}
            for k, kind in enumerate(KINDS):
                row[f"{kind}_released"] = float((self.kinds[own] == k).double().mean())
                row[kind] = float((self.exact_kinds[own] == k).double().mean())
            rows.append({**row, "truncated_kl": float(self.truncated_kl[own].double().mean())})
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Shares of each kind as released and as they are, by group."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        table = self.frame()
        with figures.theme():
            for i, (end, said) in enumerate((("_released", "released"), ("", "by token id"))):
                for g, group in enumerate(table["group"]):
                    x = [k + 0.12 * (2 * g + i - len(table) + 0.5) for k in range(len(KINDS))]
                    look: dict[str, Any] = {
                        "color": figures.PALETTE[g],
                        "marker": figures.MARKERS[i],
                    }
                    y = [table[kind + end][g] for kind in KINDS]
                    ax.plot(x, y, ls="", label=f"{group}, {said}", **look)
            lines = name_ticks(ax, KINDS)
            ax.set(
                ylim=(-0.02, 1.02),
                ylabel="share of tokens",
                title=f"Released analysis, {len(self.ranks)} tokens",
            )
            legend_below(ax, lines=lines)
        return ax

    def __str__(self) -> str:
        shares = [
            [float((kinds == k).double().mean()) for k in range(3)]
            for kinds in (self.kinds, self.exact_kinds)
        ]
        said = ["/".join(f"{100 * share:.1f}" for share in each) for each in shares]
        return (
            f"released analysis of {self.aligned} against {self.base}: "
            f"{said[0]} % unshifted/marginal/shifted, by token id {said[1]} %"
        )


def released(shift: TokenShift, tokenizer: Any) -> ReleasedShift:
    """What the released analysis would say of a `token_shift(..., top=30)`, whose tokenizer is
    needed because it decodes ids alone. Wrong as the module says: never report it as a finding."""
    if shift.top_base.shape[1] < LISTED:
        raise ValueError(
            f"the shift holds the {shift.top_base.shape[1]} most probable ids and the released "
            f"analysis reads {LISTED}: measure it with token_shift(..., top={LISTED})"
        )
    names: dict[int, str] = {}

    def decoded(ids: Tensor) -> list[str]:
        for i in ids.tolist():
            if i not in names:
                names[i] = tokenizer.decode([i])
        return [names[i] for i in ids.tolist()]

    ranks, divergences = [], []
    rows = zip(
        shift.top_base, shift.top_base_p, shift.top_aligned, shift.top_aligned_p, strict=True
    )
    for base_ids, base_p, aligned_ids, aligned_p in rows:
        mine, other = decoded(base_ids[:LISTED]), decoded(aligned_ids[:LISTED])
        first = mine[:SEARCHED]
        ranks.append(first.index(other[0]) if other[0] in first else SEARCHED)
        p, q = (_first(n, x[:LISTED]) for n, x in ((mine, base_p), (other, aligned_p)))
        divergences.append(
            sum(p[s] * math.log(p[s] / q[s]) for s in p.keys() & q.keys() if p[s] > 0 and q[s] > 0)
        )
    return ReleasedShift(
        base=shift.reader,
        aligned=shift.aligned,
        token_groups=tuple(shift.groups[i] for i in shift.owners.tolist()),
        ranks=torch.tensor(ranks, dtype=torch.long),
        truncated_kl=torch.tensor(divergences, dtype=torch.float32),
        exact_kinds=shift.kinds,
        record=shift.record,
    )


def _first(names: list[str], p: Float[Tensor, " listed"]) -> dict[str, float]:
    """Renormalised probability of each string: that of the first id which decodes to it."""
    shares = (p.double() / p.double().sum()).tolist()
    found: dict[str, float] = {}
    for name, share in zip(names, shares, strict=True):
        found.setdefault(name, share)
    return found
