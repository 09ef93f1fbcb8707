"""Does a served vector do what it was made to do? A verdict from answers of the real program.

The program answers a few prompts with and without the export. Our own model reads the same tokens
under the edit that was meant, under none, and under the faults that exports are known for, and the
verdict is by which of them the program's distributions are reproduced.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from probes import figures
from probes.model import HookedModel
from probes.results import Record, Result
from steering.applied import Steering
from steering.export.replays import Consumer, Gap, Ids, Replay, gap, greedy, reference
from steering.export.ways import MEANT, NONE, ways

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TOLERANCE = {"logits": 1e-4, "top": 1e-3, "tokens": 1e-3}
"""Largest allowed difference, by what the program gives: logits, log-probabilities, text alone."""

OTHER_MODEL = 0.02
"""Mean KL in nats between the unsteered program and our unsteered model above which they are not
the same model; four-bit weights of a small model are at 0.003 to 0.008."""

CLEAR = 3
"""How many times the allowed difference steering must move distributions for a verdict."""

ENDLESS = 1e30
"""Stands for an infinite difference (NaN, no common token), which JSON cannot hold."""

OTHER_TEXT = 0.5
"""The same for text alone: how far, in nats, a token may be below our likeliest."""

OUTCOMES = {
    "equal": "applied and equal",
    "different": "applied but different",
    "not applied": "NOT APPLIED",
    "another model": "another model",
    "cannot tell": "cannot tell",
    "format checked": "format checked, not run",
}


@dataclass(frozen=True)
class Verdict(Result):
    """What a program does with an export, and the measurements it is concluded from."""

    outcome: str
    """A key of `OUTCOMES`."""
    target: str
    consumer: str
    """Program and version."""
    steering: str
    """What was meant to be applied, in words."""
    kind: str
    """What was compared: logits, top (log-probabilities of the likeliest tokens), tokens, or, where
    nothing was run, the vectors themselves."""
    gaps: Mapping[str, float] = field(repr=False)
    """Largest difference between the program and our model steered in each way, by way."""
    divergences: Mapping[str, float | None] = field(repr=False)
    """Mean KL(program || our model) of each way in nats; None where only text came back."""
    floor: float | None
    """Largest difference between program and model, both unsteered; None where it only runs
    steered."""
    floor_kl: float | None
    effect: float
    """Largest difference that the steering makes to our own model, along the same tokens."""
    allowed: float
    """Difference up to which two distributions count as equal: the tolerance, or three times the
    floor where the program itself is less exact than that."""
    n_prompts: int
    n_tokens: int
    notes: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        return self.outcome == "equal"

    @property
    def explained(self) -> float | None:
        """How much nearer the program is to the steered than to the unsteered model:
        KL(program || unsteered) over the sum of it and KL(program || steered). 1: it is the
        steered model; 0: the unsteered one; None without log-probabilities."""
        steered, unsteered = (self.divergences.get(way) for way in (MEANT, NONE))
        if steered is None or unsteered is None or not steered + unsteered:
            return None
        return unsteered / (steered + unsteered)

    @property
    def diagnosis(self) -> str:
        """The fault that reproduces the program's answers, or the way that comes nearest."""
        if not self.gaps:
            return ""
        way = min(self.gaps, key=lambda w: self.gaps[w])
        if self.gaps[way] >= ENDLESS:
            return "none of these ways comes near"
        near = "" if self.gaps[way] <= self.allowed else "nearest, though not equal: "
        return f"{near}{way}"

    @property
    def rivals(self) -> tuple[str, ...]:
        """Other ways of steering that reproduce the program's answers as well as what was meant."""
        if self.gaps[MEANT] > self.allowed:
            return ()
        return tuple(w for w, size in self.gaps.items() if w != MEANT and size <= self.allowed)

    def frame(self) -> "pd.DataFrame":
        """One row a way of steering our own model: how far the program is from it."""
        import pandas as pd

        rows = [
            {
                "steered": way,
                "largest difference": value,
                "mean KL, nats": self.divergences[way],
                "equal": value <= self.allowed,
            }
            for way, value in self.gaps.items()
        ]
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The program's distance from our model steered in each way; left of the line is equal."""
        ax = figures.axes(ax, 6.4, 3.4)
        names = list(self.gaps)[::-1]
        with figures.theme():
            for i, name in enumerate(names):
                x, equal = self.gaps[name], self.gaps[name] <= self.allowed
                color = figures.PALETTE[0 if equal else 1]
                ax.plot(max(x, 1e-7), i, "o" if equal else "s", color=color, ms=6)
            ax.axvline(self.allowed, color="black", ls="--", lw=1, label="equal up to here")
            if self.floor:
                ax.axvline(self.floor, color="0.6", ls=":", lw=1, label="both unsteered")
            ax.set_yticks(range(len(names)), names)
            ax.set(xscale="log", xlabel=f"largest difference ({UNITS[self.kind]})")
            ax.set_ylabel("our model, steered")
            ax.set_title(f"{self.consumer}: {OUTCOMES[self.outcome]}")
            ax.legend(loc="upper center")
        return ax

    def __str__(self) -> str:
        head = f"{OUTCOMES[self.outcome]}: {self.steering} in {self.consumer}"
        if self.kind == "vectors":
            return "; ".join([head, *self.notes])
        said = (
            f"{head}; off by {self.gaps[MEANT]:.2g} {UNITS[self.kind]} (allowed {self.allowed:.2g})"
        )
        said += f", where steering moves them by {self.effect:.2g}"
        if self.outcome == "different":
            said += f"; {self.diagnosis}"
        if self.rivals:
            said += f"; the answers would be the same {', '.join(self.rivals)}"
        return said


UNITS = {
    "logits": "of a logit",
    "top": "nats of log-probability",
    "tokens": "nats below the likeliest token",
    "vectors": "of the vectors' largest entry",
}


def verify(
    model: HookedModel,
    steering: Steering,
    consumer: Consumer,
    prompts: Sequence[Ids],
    n_tokens: int = 4,
    *,
    target: str,
    tolerance: float | None = None,
    rounding: float = 0.0,
    notes: Sequence[str] = (),
) -> Verdict:
    """Replay prompts through a program that serves the export, and conclude.

    `model` is the unsteered model that the export is for, in float32; `steering` what was meant.
    `tolerance` is for logits up to 10, and in proportion beyond; `rounding` is a share of the
    effect, allowed where the export's own numbers are rounded (half precision).
    """
    for ids in prompts:
        if not ids:
            raise ValueError("a prompt without tokens cannot be replayed: leave it out")
    unsteered = consumer.replay(prompts, n_tokens, steered=False)
    steered = consumer.replay(prompts, n_tokens, steered=True)
    if steered is None:
        raise ValueError(f"{consumer.name} gave no steered answers")
    return judge(
        model, steering, unsteered, steered, consumer=f"{consumer.name} {consumer.version}".strip(),
        target=target, tolerance=tolerance, rounding=rounding, notes=notes,
    )  # fmt: skip


def judge(
    model: HookedModel,
    steering: Steering,
    unsteered: Sequence[Replay] | None,
    steered: Sequence[Replay],
    *,
    consumer: str,
    target: str,
    tolerance: float | None = None,
    rounding: float = 0.0,
    notes: Sequence[str] = (),
) -> Verdict:
    """The verdict on answers that a program gave without (if it can) and with the export."""
    steered = [r for r in steered if r.tokens]  # a server may end an answer before it begins
    unsteered = None if unsteered is None else [r for r in unsteered if r.tokens]
    if not steered or unsteered == []:
        raise ValueError(f"{consumer} wrote no token for any prompt: give other prompts")
    kind = steered[0].kind
    floor = None if unsteered is None else gap(unsteered, reference(model, (), unsteered))
    allowed = TOLERANCE[kind] if tolerance is None else tolerance
    read = {way: reference(model, edits, steered) for way, edits in ways(model, steering).items()}
    largest = max(float(logits.abs().max()) for logits in read[MEANT])
    effect = gap(greedy(read[MEANT], steered), read[NONE])
    allowed = max(allowed * max(1.0, largest / 10), rounding * effect.largest)
    if floor is not None and floor.largest < ENDLESS:
        allowed = max(allowed, 3 * floor.largest)
    gaps = {way: gap(steered, logits) for way, logits in read.items()}
    record = Record(
        models=(model.name,),
        fingerprints=(model.fingerprint,),
        dtype=str(model.dtype).removeprefix("torch."),
        engine=model.engine.name,
        settings={"prompts": [list(r.prompt) for r in steered], "target": target},
    )
    return Verdict(
        outcome=_outcome(kind, floor, gaps, effect.largest, allowed),
        target=target,
        consumer=consumer,
        steering=str(steering),
        kind=kind,
        gaps={way: min(g.largest, ENDLESS) for way, g in gaps.items()},
        divergences={way: _known(g.kl) for way, g in gaps.items()},
        floor=None if floor is None else min(floor.largest, ENDLESS),
        floor_kl=None if floor is None else _known(floor.kl),
        effect=effect.largest,
        allowed=allowed,
        n_prompts=len(steered),
        n_tokens=sum(len(r.tokens) for r in steered),
        notes=tuple(notes),
        record=record,
    )


def _outcome(
    kind: str, floor: Gap | None, gaps: Mapping[str, Gap], effect: float, allowed: float
) -> str:
    text = kind == "tokens"
    if floor is not None:
        same = floor.largest <= OTHER_TEXT if text else _known(floor.kl) is not None
        if not same or (not text and (floor.kl or 0.0) > OTHER_MODEL):
            return "another model"
    reproduced = {way for way, g in gaps.items() if g.largest <= allowed}
    # text says little: faults that write the same words are named, and only "not at all" counts
    rivals = reproduced - {MEANT} if not text else reproduced & {NONE}
    if (MEANT in reproduced and rivals) or (not text and effect <= CLEAR * allowed):
        return "cannot tell"
    return "equal" if MEANT in reproduced else "not applied" if NONE in reproduced else "different"


def _known(kl: float | None) -> float | None:
    return kl if kl is not None and math.isfinite(kl) else None
