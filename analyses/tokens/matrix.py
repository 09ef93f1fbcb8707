"""Every checkpoint's answers, read by every other checkpoint.

The shift from base to aligned says where the base would not have gone along; the other direction,
and those to and from drifted checkpoints, need not look alike, because each is measured on the
path of another writer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.checkpoints import Checkpoints
from analyses.figures import broken
from analyses.tokens.paths import along, answers_of, reader
from analyses.tokens.shares import (
    LIMITS,
    cut_off,
    enough,
    pooled,
    said_cut_off,
    share_intervals,
    sums,
)
from probes import figures
from probes.prompts import Prompt, prompts_hash
from probes.results import Record, Result
from probes.splits import FEW_GROUPS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ALL = "all prompts"

SHOWN = {
    "shifted": "share of shifted tokens",
    "kl": "mean KL(writer‖reader) (nats)",
}


@dataclass(frozen=True)
class ShiftMatrix(Result):
    """Divergence and shifted share for every writer and reader; `[writer, reader, group]`. Limits
    are NaN where one prompt of a group has tokens, and values too where none has."""

    models: tuple[str, ...]
    groups: tuple[str, ...]
    """Where there are several groups, the last is all prompts together."""
    prompts: tuple[int, ...]
    """Prompts per group."""
    tokens: Int[Tensor, "model group"]
    """Tokens of each writer's answers."""
    kl: Float[Tensor, "model model group"]
    """Mean KL(writer‖reader) along the writer's answers, in nats; exactly 0 on the diagonal."""
    kl_low: Float[Tensor, "model model group"]
    kl_high: Float[Tensor, "model model group"]
    shifted: Float[Tensor, "model model group"]
    """Share of the writer's tokens that the reader ranks below third; 0 to 1."""
    shifted_low: Float[Tensor, "model model group"]
    shifted_high: Float[Tensor, "model model group"]
    identical: Bool[Tensor, "model model"]
    """Whether the reader's logits were the writer's, bit for bit, at every token."""
    notes: tuple[str, ...]

    def frame(self) -> "pd.DataFrame":
        """One row per writer, reader and group; limits are 95 % over prompts."""
        import pandas as pd

        rows = []
        for w, writer in enumerate(self.models):
            for r, one in enumerate(self.models):
                for g, group in enumerate(self.groups):
                    row: dict[str, object] = {"writer": writer, "reader": one, "group": group}
                    row |= {"prompts": self.prompts[g], "tokens": int(self.tokens[w, g])}
                    for name in SHOWN:
                        for end in ("", "_low", "_high"):
                            row[name + end] = float(getattr(self, name + end)[w, r, g])
                    rows.append({**row, "identical": bool(self.identical[w, r])})
        return pd.DataFrame(rows)

    def plot(
        self, ax: "Axes | None" = None, *, quantity: str = "shifted", group: str | None = None
    ) -> "Axes":
        """Heat map of the shifted share or of `kl`, by default of all prompts."""
        if quantity not in SHOWN:
            raise ValueError(f"{quantity!r} was asked: choose one of {', '.join(SHOWN)}")
        if group is not None and group not in self.groups:
            raise ValueError(f"no group {group!r}: choose one of {', '.join(self.groups)}")
        g = self.groups.index(group) if group is not None else len(self.groups) - 1
        n = len(self.models)
        ax = figures.axes(ax, 2.6 + 0.75 * n, 2.2 + 0.6 * n)
        value, low, high = (
            getattr(self, quantity + end)[..., g].tolist() for end in ("", "_low", "_high")
        )
        top = max(1e-9, *(v for row in value for v in row if v == v))
        with figures.theme():
            image = ax.imshow(value, cmap="cividis", vmin=0, vmax=top, aspect="auto")
            for w in range(n):
                for r in range(n):
                    said = f"{value[w][r]:.2f}"
                    if w != r and low[w][r] == low[w][r]:  # NaN: one prompt has no interval
                        said += f"\n[{low[w][r]:.2f}, {high[w][r]:.2f}]"
                    # cividis is dark where it is low
                    colour = "black" if value[w][r] > 0.6 * top else "white"
                    ax.text(r, w, said, ha="center", va="center", color=colour, fontsize=7)
            ax.set_xticks(range(n), [broken(name, 14) for name in self.models])
            ax.set_yticks(range(n), [broken(name, 14) for name in self.models])
            ax.set(xlabel="reader", ylabel="writer of the answers")
            said = SHOWN[quantity][0].upper() + SHOWN[quantity][1:]
            ax.set_title(broken(f"{said}, {self.groups[g]}", 20 + 9 * n))
            ax.grid(visible=False)
            ax.figure.colorbar(image, ax=ax, label=SHOWN[quantity])
        return ax

    def __str__(self) -> str:
        said = []
        for w, writer in enumerate(self.models):
            for r, one in enumerate(self.models):
                if w != r:
                    share = float(self.shifted[w, r, -1])
                    same = " (identical)" if self.identical[w, r] else ""
                    said.append(f"{writer} read by {one} {share:.1%}{same}")
        return f"shifted tokens, {self.groups[-1]}: {'; '.join(said)}"


def shift_matrix(
    checkpoints: Checkpoints,
    prompts: Sequence[Prompt],
    groups: Sequence[str],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ShiftMatrix:
    """Let every checkpoint answer the prompts, and every checkpoint read all answers.

    Each checkpoint generates once, and reads each set of answers once. `progress` is called with
    the prompts done, of as many times the prompts as there are checkpoints.
    """
    if len(groups) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts came with {len(groups)} groups: give one for each"
        )
    rendered = checkpoints.aligned.template.render_all(prompts)
    readers = [reader(item.model, rendered, max_new_tokens) for item in checkpoints.items]
    distinct = tuple(dict.fromkeys(groups))
    named = distinct if len(distinct) == 1 else (*distinct, ALL)
    member = torch.tensor([[name in (g, ALL) for name in named] for g in groups])
    size = checkpoints.vocab_size
    n = len(readers)
    # value, low and high
    table = {name: torch.zeros(3, n, n, len(named), dtype=torch.float64) for name in SHOWN}
    tokens = torch.zeros(n, len(named), dtype=torch.long)
    identical = torch.zeros(n, n, dtype=torch.bool)
    cut: list[str] = []
    for w, writer in enumerate(readers):
        answers = answers_of(writer.model, prompts, max_new_tokens, 2 * batch_size, size)
        owner = torch.tensor([i for i, a in enumerate(answers) for _ in a], dtype=torch.long)
        ids = torch.tensor([t for a in answers for t in a], dtype=torch.long)
        stops = torch.isin(ids, torch.tensor(writer.model._stop_ids(), dtype=torch.long))
        many = cut_off([len(a) for a in answers], stops, max_new_tokens)
        cut += said_cut_off(writer.model.label, many, len(answers), max_new_tokens)
        found = along(
            writer, readers, answers, size, top=1, batch_size=batch_size, progress=progress
        )
        for r, steps in enumerate(found):
            identical[w, r] = not steps.differs.any()
            values = torch.stack([(steps.ranks > LIMITS[1]).double(), steps.kl.double()], 1)
            for g in range(len(named)):
                chosen = member[owner, g]
                tokens[w, g] = int(chosen.sum())
                if not chosen.any():
                    for name in SHOWN:
                        table[name][:, w, r, g] = torch.nan
                    continue
                total, counts = sums(values, owner, chosen, len(answers))
                both = pooled(total, counts, seed=seed)
                for k, limits in enumerate((share_intervals(both), both.interval())):
                    name = ("shifted", "kl")[k]
                    table[name][:, w, r, g] = torch.stack([limit[k] for limit in limits])
    record = Record(
        models=tuple(item.model.name for item in checkpoints.items),
        fingerprints=tuple(item.model.fingerprint for item in checkpoints.items),
        template_hash=checkpoints.aligned.template.hash,
        prompts_hash=prompts_hash(rendered),
        seeds=(seed,),
        dtype=str(checkpoints.aligned.dtype).removeprefix("torch."),
        engine=checkpoints.aligned.engine.name,
        settings={"max_new_tokens": max_new_tokens, "batch_size": batch_size, "vocab_size": size},
    )
    ends = {
        name + end: table[name][i].float()
        for name in SHOWN
        for i, end in enumerate(("", "_low", "_high"))
    }
    return ShiftMatrix(
        models=checkpoints.labels,
        groups=named,
        prompts=tuple(member.sum(0).tolist()),
        tokens=tokens,
        **ends,
        identical=identical,
        notes=(*checkpoints.notes, *enough(groups, FEW_GROUPS), *cut),
        record=record,
    )
