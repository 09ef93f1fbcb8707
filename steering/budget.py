"""How strong? The smallest strength that uses up a budget: a KL divergence, a perplexity ratio or
a rate of benign refusals, solved on validation prompts and reported on held-out ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from probes import datasets, figures
from probes.model import HookedModel
from probes.prompts import Prompt
from probes.results import Record, Result
from probes.scores import Interval, wilson
from steering import costs
from steering.applied import Steering
from steering.edits import ADDING
from steering.intervals import mean_interval
from steering.offsets import HeadOffsets
from steering.schedule import ALWAYS, Condition, Schedule
from steering.vector import SteeringVector

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Kind = Literal["kl", "perplexity", "benign_refusals"]

LABELS = {
    "kl": "KL(unsteered‖steered) (nats)",
    "perplexity": "perplexity of neutral text, steered / unsteered",
    "benign_refusals": "benign refusals (share of prompts)",
}


class Solved(NamedTuple):
    """Where a cost reaches its budget, and every (strength, cost) tried on the way, in order."""

    strength: float
    cost: float
    tried: tuple[tuple[float, float], ...]


def solve(
    cost: Callable[[float], float], budget: float, grid: Sequence[float], *, rtol: float = 0.01
) -> Solved:
    """The smallest strength above 0 at which the cost is at least the budget.

    The grid is walked upwards to the first point that reaches the budget; between it and the one
    before (or 0) the strength is bisected until the bracket is `rtol` of it. The cost at the
    strength returned is at least the budget, and just below it less. A cost that reaches the
    budget and falls back between two points of the grid is not seen. Not reached is an error that
    says the largest cost seen.
    """
    if not grid or any(b <= a for a, b in zip([0.0, *grid], grid, strict=False)):
        raise ValueError(f"the grid of strengths {list(grid)} must grow and start above 0")
    if rtol <= 0:
        raise ValueError(f"rtol is {rtol}: give a share of the strength above 0, such as 0.01")
    tried: list[tuple[float, float]] = []

    def at(strength: float) -> float:
        tried.append((strength, cost(strength)))
        return tried[-1][1]

    low, high, reached = 0.0, None, 0.0
    for strength in grid:
        reached = at(strength)
        if reached >= budget:
            high = strength
            break
        low = strength
    if high is None:
        where, most = max(tried, key=lambda pair: pair[1])
        raise ValueError(
            f"the budget of {budget:g} is not reached: the largest cost seen is {most:.4g}, at "
            f"strength {where:g} of a grid up to {grid[-1]:g}; ask for less, or give a grid that "
            "goes on"
        )
    if low == 0 and at(0.0) >= budget:
        raise ValueError(
            f"the budget of {budget:g} is used up without steering, where the cost is "
            f"{tried[-1][1]:.4g}: allow more, or choose other prompts"
        )
    # a cost that jumps at 0 would be halved for ever
    while high - low > rtol * max(high, 1e-3 * grid[0]):
        middle = (low + high) / 2
        value = at(middle)
        if value >= budget:
            high, reached = middle, value
        else:
            low = middle
    return Solved(high, reached, tuple(tried))


@dataclass(frozen=True)
class SolvedStrength(Result):
    """The smallest strength that uses up a budget on validation prompts, and what it costs others."""

    kind: str
    """kl, perplexity or benign_refusals."""
    budget: float
    strength: float
    """With its sign."""
    unit: str
    what: str
    value: float
    """Cost on the prompts it was solved on: at least the budget."""
    held_out: float
    """Cost on the held-out prompts."""
    low: float
    """95 % limits of the held-out cost: BCa bootstrap over prompts, Wilson for a rate."""
    high: float
    n: int
    n_held_out: int
    strengths: Float[Tensor, " tried"]
    """Every strength tried, in order."""
    values: Float[Tensor, " tried"]

    def steering(
        self, what: SteeringVector | HeadOffsets, condition: Condition | None = None
    ) -> Steering:
        """What was solved, ready to apply, under its schedule; give the vector (and condition) it
        was solved for, which are not kept here."""
        said = self.record.settings
        if (str(what), repr(condition)) != (self.what, said["condition"]):
            raise ValueError(
                f"this strength is that of {self.what} with condition {said['condition']}, given "
                f"are {what} and {condition!r}: give the same, or solve again"
            )
        return Steering(what, self.strength, self.unit, Schedule(**said["schedule"]), condition)

    def frame(self) -> "pd.DataFrame":
        """One row for each strength tried, in order, with the cost on the validation prompts."""
        import pandas as pd

        return pd.DataFrame({"strength": self.strengths.tolist(), self.kind: self.values.tolist()})

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The strengths tried with their cost, the budget, and the held-out cost."""
        ax = figures.axes(ax)
        order = self.strengths.abs().argsort()
        order = order[self.strengths[order] != 0]  # which a logarithmic axis cannot show
        with figures.theme():
            ax.plot(
                self.strengths[order].abs().numpy(),
                self.values[order].numpy(),
                **figures.style(0),
                label=f"validation (n = {self.n})",
            )
            ax.axhline(self.budget, ls="--", color=figures.PALETTE[6], label="budget")
            ax.errorbar(
                [abs(self.strength)],
                [self.held_out],
                yerr=[[max(self.held_out - self.low, 0)], [max(self.high - self.held_out, 0)]],
                capsize=3,
                ls="",
                zorder=3,
                **figures.style(1),
                label=f"held out (n = {self.n_held_out}), 95 % interval",
            )
            sign = "" if self.strength > 0 else "-"
            unit = "" if self.unit == "raw" else f" ({self.unit})"
            ax.set(xlabel=f"{sign}strength{unit}", ylabel=LABELS[self.kind])
            ax.set_xscale("log", base=2)
            if self.kind == "kl":
                ax.set_yscale("log")
            ax.set_title(f"strength {self.strength:.3g} uses up {self.budget:g}")
            ax.legend()
        return ax

    def __str__(self) -> str:
        unit = "" if self.unit == "raw" else f" {self.unit}"
        return (
            f"strength {self.strength:.4g}{unit} of {self.what}: {self.kind} {self.value:.4g} on "
            f"{self.n} prompts (budget {self.budget:g}), held out {self.held_out:.4g} "
            f"[{self.low:.4g}, {self.high:.4g}] on {self.n_held_out}"
        )


def solve_strength(
    model: HookedModel,
    what: SteeringVector | HeadOffsets,
    *,
    kl: float | None = None,
    perplexity: float | None = None,
    benign_refusals: float | None = None,
    prompts: Sequence[Prompt] | None = None,
    held_out: Sequence[Prompt] | None = None,
    unit: str = "raw",
    sign: int = 1,
    grid: Sequence[float] | None = None,
    rtol: float = 0.01,
    tokens: int = costs.TOKENS,
    schedule: Schedule = ALWAYS,
    condition: Condition | None = None,
    seed: int = 0,
) -> SolvedStrength:
    """The smallest strength of this sign that uses up one budget (`solve`).

    kl: KL(unsteered‖steered) in nats, over the first `tokens` tokens of the unsteered greedy
    answers, the mean over prompts. perplexity: the ratio, above 1, of the perplexity of neutral
    text when steered to that when not. benign_refusals: the share of benign prompts refused.

    `prompts` decide and `held_out` report; they must differ. By default they are shipped: the
    general requests of validation and test, or the first and last 50 paragraphs for perplexity.
    The default grid doubles: from 1/64 to 64 (raw, sigma), to 4 (fraction); for unit it is the
    raw one times the vector's norm; for operations whose strength is a share it has 16 steps to 1.
    """
    given: dict[Kind, float | None] = {
        "kl": kl, "perplexity": perplexity, "benign_refusals": benign_refusals,
    }  # fmt: skip
    asked: list[tuple[Kind, float]] = [(k, b) for k, b in given.items() if b is not None]
    if len(asked) != 1:
        raise ValueError(
            f"{len(asked)} budgets were given: give one of kl, perplexity and benign_refusals"
        )
    if sign not in (1, -1):
        raise ValueError(f"sign is {sign}: give 1 or -1")
    kind, budget = asked[0]
    if budget <= (least := 1.0 if kind == "perplexity" else 0.0):
        raise ValueError(f"the budget of {kind} is {budget:g}: give one above {least:g}")
    if prompts is None:
        texts = datasets.paragraphs()[:50]
        prompts = texts if kind == "perplexity" else datasets.general("validation")
    if held_out is None:
        texts = datasets.paragraphs()[50:]
        held_out = texts if kind == "perplexity" else datasets.general("test")
    if both := [p for p in held_out if p in list(prompts)]:
        raise ValueError(
            f"{len(both)} held-out prompts also decide the strength, for example {both[0]!r}: "
            "give others"
        )

    def steered(strength: float) -> Steering:
        return Steering(what, sign * strength, unit, schedule, condition)

    grid = _grid(what, unit) if grid is None else grid
    steered(grid[-1]).edits(model)  # a wrong unit or model is said before anything is run
    decide = _cost(kind, model, prompts, tokens)
    solved = solve(lambda s: decide(steered(s), None).value, budget, grid, rtol=rtol)
    report = _cost(kind, model, held_out, tokens)(steered(solved.strength), seed)
    settings = {
        "prompts": len(prompts), "held out": len(held_out), "tokens": tokens, "rtol": rtol,
        "schedule": asdict(schedule), "condition": repr(condition),
    }  # fmt: skip
    return SolvedStrength(
        kind=kind,
        budget=budget,
        strength=sign * solved.strength,
        unit=unit,
        what=str(what),
        value=solved.cost,
        held_out=report.value,
        low=report.low,
        high=report.high,
        n=len(prompts),
        n_held_out=len(held_out),
        strengths=torch.tensor([sign * s for s, _ in solved.tried], dtype=torch.float64),
        values=torch.tensor([v for _, v in solved.tried], dtype=torch.float64),
        record=Record(
            models=(model.name,),
            fingerprints=(model.fingerprint,),
            template_hash=model.template.hash,
            seeds=(seed,),
            dtype=str(model.dtype).removeprefix("torch."),
            engine=model.engine.name,
            settings=settings,
        ),
    )


def _grid(what: SteeringVector | HeadOffsets, unit: str) -> list[float]:
    if isinstance(what, SteeringVector) and what.operation not in ADDING:
        return [i / 16 for i in range(1, 17)]
    longest = max(float(v.norm()) for v in what.vectors.values()) if unit == "unit" else 1.0
    return [longest * 2.0**i for i in range(-6, 3 if unit == "fraction" else 7)]


def _cost(
    kind: Kind, model: HookedModel, prompts: Sequence[Prompt], tokens: int
) -> Callable[[Steering, int | None], Interval]:
    """The mean cost of a steering on these prompts; with a seed its limits, else NaN."""
    before = torch.zeros(())
    reference = costs.Reference.of(model, prompts, tokens) if kind == "kl" else None
    if kind == "perplexity":
        if any(not isinstance(p, str) for p in prompts):
            raise ValueError("a budget of perplexity is measured on texts: give strings")
        before = costs.text_log_perplexity(model, None, prompts)  # pyright: ignore[reportArgumentType]

    def cost(what: Steering, seed: int | None) -> Interval:
        if reference is not None:
            values = costs.kl(model, what, reference)
        elif kind == "perplexity":
            values = costs.text_log_perplexity(model, what, prompts) - before  # pyright: ignore[reportArgumentType]
        else:
            values = costs.benign_refusals(model, what, prompts)
        mean, limits = float(values.mean()), (float("nan"), float("nan"))
        if seed is not None and kind == "benign_refusals":
            limits = wilson(int(values.sum()), len(values))[1:]
        elif seed is not None:
            found = mean_interval(values, seed=seed)
            limits = float(found.low), float(found.high)
        if kind == "perplexity":
            mean, *limits = torch.tensor([mean, *limits], dtype=torch.float64).exp().tolist()
        return Interval(mean, *limits)

    return cost
