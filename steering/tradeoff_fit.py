"""Fits of the trade-off's laws to what was measured, with intervals over prompts and items."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.scores import bca, wilson
from probes.splits import codes, warn_if_few
from steering import tradeoff_law as law
from steering.tradeoff_law import QUARTER, SPAN, AlignmentFit, HelpfulnessFit
from steering.tradeoff_measure import GAPS, Measured
from steering.tradeoff_result import ESTIMATES, Tradeoff

Read = Literal["full", "four"]


def inside(
    strengths: Float[Tensor, " strength"], window: tuple[float, float]
) -> Bool[Tensor, " strength"]:
    """Which strengths lie in a window: at least two, on one side of 0."""
    low, high = window
    found = (strengths >= low) & (strengths <= high)
    if not low < high or low * high <= 0 or int(found.sum()) < 2:
        raise ValueError(
            f"the window {low:g} to {high:g} must lie on one side of 0 and hold 2 strengths at "
            f"least; the strengths are {[round(r, 6) for r in strengths.tolist()]}"
        )
    return found


def fit(
    measured: Measured,
    *,
    window: tuple[float, float],
    null: Sequence[Measured] = (),
    chosen: float | None = None,
    weight: float = 1.0,
    read: Read = "full",
    resamples: int = 1000,
    seed: int = 0,
) -> Tradeoff:
    """Fit the laws to means over prompts and items.

    `window` is a range of strengths on one side of 0, to be declared before the test prompts are
    looked at: slopes and criteria come from it, the laws are fitted to all strengths. `null` holds
    the same prompts and items under random directions.
    """
    used = inside(measured.strengths, window)
    if read not in ("full", "four"):
        raise ValueError(f"helpfulness was to be read {read!r}: choose 'full' or 'four'")
    warn_if_few(measured.topics)
    r, zero = measured.strengths, measured.zero
    n_items = measured.full.shape[1]
    weights = {
        "prompt": _weights(measured.topics, resamples, seed),
        "item": _weights([f"{i:06d}" for i in range(n_items)], resamples, seed + 1),
    }
    curves = {
        "B": measured.labels @ weights["prompt"].T,
        "full": measured.full @ weights["item"].T,
        "four": measured.four @ weights["item"].T,
        "change": measured.change @ weights["item"].T,
        "sd": measured.gaps[:, :, GAPS.index("sd")].nan_to_num(0.0) @ weights["item"].T,
    }
    x = r[used].abs()

    def alignment(B: Tensor) -> list[float]:
        free, fixed = law.fit_alignment(r, B), law.fit_alignment(r, B, float(B[zero]))
        return [*free, *fixed, law.log_slope(x, (B - B[zero])[used])]

    def helpfulness(P: Tensor, floor: float = 0.0, span: float = 1.0) -> list[float]:
        free = law.fit_helpfulness(r, P, floor=floor, span=span)
        fixed = law.fit_helpfulness(r, P, float(P[zero]), floor=floor, span=span)
        return [*free[:2], *fixed[:2], law.log_slope(x, (P - P[zero])[used])]

    def slope(y: Tensor) -> list[float]:
        return [law.log_slope(x, y[used])]

    of_prompts = _each(alignment, curves["B"])
    of_items = torch.cat(
        [
            _each(helpfulness, curves["full"]),
            _each(lambda P: helpfulness(P, QUARTER, SPAN), curves["four"]),
            _each(slope, curves["change"]),
            _each(slope, curves["sd"]),
        ],
        1,
    )
    ends = (float(r[0]), float(r[-1]))
    joint = _joint(of_prompts, of_items, resamples, weight, read, ends)
    estimates = torch.cat([_limits(t, resamples) for t in (of_prompts, of_items, joint)])
    assert len(estimates) == len(ESTIMATES)
    with_zero = used | (r == 0)
    drawn = {name: curves[name][with_zero, : resamples + 1] for name in ("B", "full", "four")}
    criteria = torch.stack([_criteria(r[with_zero], name, y) for name, y in drawn.items()])
    settings: dict[str, Any] = {
        **measured.record.settings,
        "window": list(window),
        "weight": weight,
        "net benefit reads": read,
        "resamples": resamples,
        "random directions": len(null),
    }
    own: dict[str, Any] = {f.name: getattr(measured, f.name) for f in fields(Measured)}
    own["record"] = replace(measured.record, seeds=(seed,), settings=settings)
    return Tradeoff(
        **own,
        B=_rates(measured) if _signs(measured.labels) else _limits(curves["B"].T, resamples),
        P=_limits(curves["full"].T, resamples),
        P4=_limits(curves["four"].T, resamples),
        estimates=estimates,
        criteria=criteria[:, 0],
        support=_support(criteria[:, 1:]),
        window=(float(window[0]), float(window[1])),
        weight=float(weight),
        read=read,
        chosen=chosen,
        gain=_gain(measured, curves, chosen, weight, read, resamples),
        **_null(measured, null),
    )


def _criteria(
    r: Float[Tensor, " strength"], name: str, curves: Float[Tensor, "strength row"]
) -> Float[Tensor, "row law"]:
    def of(y: Tensor) -> list[float]:
        fitted = (
            law.fit_alignment(r, y) if name == "B" else law.fit_helpfulness(r, y, **_room(name))
        )
        return list(law.compare(r, y, fitted.at(r)).values())

    return _each(of, curves)


def _support(criteria: Float[Tensor, "quantity resample law"]) -> Float[Tensor, "quantity law"]:
    best = criteria.nan_to_num(torch.inf).argmin(-1)
    return torch.nn.functional.one_hot(best, criteria.shape[-1]).double().mean(1)


def _weights(groups: Sequence[str], resamples: int, seed: int) -> Float[Tensor, "row member"]:
    """Weights of members that give means: of all, of each resample of groups, without each group."""
    numbers, known = codes(groups)
    k = len(known)
    if k < 2:
        raise ValueError("one group only: an interval over groups needs at least 2")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(k, (resamples, k), generator=generator)
    counts = torch.zeros(resamples, k, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    whole = torch.ones(1, k, dtype=torch.float64)
    counts = torch.cat([whole, counts, 1 - torch.eye(k, dtype=torch.float64)])[:, numbers]
    return counts / counts.sum(1, keepdim=True)


def _each(
    function: Callable[[Tensor], list[float]], curves: Float[Tensor, "strength row"]
) -> Float[Tensor, "row estimate"]:
    found = [function(curve) for curve in curves.T]
    return torch.tensor(found, dtype=torch.float64)


def _joint(
    of_prompts: Float[Tensor, "row estimate"],
    of_items: Float[Tensor, "other measure"],
    resamples: int,
    weight: float,
    read: str,
    ends: tuple[float, float],
) -> Float[Tensor, "both 2"]:
    """Optimum, numerical and in closed form, of fits to prompts and to items; both are resampled
    at once, and either is left out one by one."""
    first = 5 if read == "four" else 0
    whole, every = resamples + 1, (of_prompts, of_items)
    pairs = [(i, i) for i in range(whole)]
    pairs += [(i, 0) for i in range(whole, len(every[0]))]
    pairs += [(0, i) for i in range(whole, len(every[1]))]
    found = []
    for i, j in pairs:
        B = AlignmentFit(*of_prompts[i, :2].tolist())
        P = HelpfulnessFit(*of_items[j, first : first + 2].tolist(), **_room(read))
        found.append([law.optimum(B, P, weight, *ends), law.small_optimum(B, P, weight)])
    return torch.tensor(found, dtype=torch.float64)


def _limits(table: Float[Tensor, "row column"], resamples: int) -> Float[Tensor, "column 3"]:
    """Value, low, high of each column from its rows: all, resamples, leaving one out.

    Limits are NaN where the value does not exist or not in most resamples.
    """
    limits = torch.full((table.shape[1], 3), torch.nan, dtype=torch.float64)
    table = torch.where(table.isfinite(), table, torch.nan)
    limits[:, 0] = table[0]
    draws, left_out = table[1 : resamples + 1], table[resamples + 1 :]
    kept = table[0].isfinite() & (2 * draws.isfinite().sum(0) > resamples)
    if bool(kept.any()):
        found = bca(table[0, kept], draws[:, kept], left_out[:, kept])
        limits[kept] = torch.stack(list(found), 1)
    return limits


def _signs(labels: Tensor) -> bool:
    return bool((labels.abs() == 1).all())


def _rates(measured: Measured) -> Float[Tensor, "strength 3"]:
    """Wilson's interval of the rate of label 1, moved to -1 to 1.

    Prompts of one topic are not independent: the trials are as many as there are topics.
    """
    n = len(set(measured.topics))
    rows = []
    for labels in measured.labels:
        rate = float((labels == 1).double().mean())
        found = wilson(round(rate * n), n)
        rows.append([2 * rate - 1, 2 * min(found.low, rate) - 1, 2 * max(found.high, rate) - 1])
    return torch.tensor(rows, dtype=torch.float64)


def _gain(
    measured: Measured,
    curves: dict[str, Tensor],
    chosen: float | None,
    weight: float,
    read: str,
    resamples: int,
) -> Float[Tensor, " 3"]:
    if chosen is None:
        return torch.full((3,), torch.nan, dtype=torch.float64)
    if chosen not in measured.strengths.tolist():
        raise ValueError(f"the chosen norm {chosen:g} was not measured: measure there as well")
    if chosen == 0:
        return torch.zeros(3, dtype=torch.float64)
    at, zero = int((measured.strengths == chosen).nonzero()[0]), measured.zero
    rise = weight * (curves["B"][at] - curves["B"][zero])
    move = curves[read][at] - curves[read][zero]
    whole = resamples + 1
    rows = torch.cat([rise[:whole] + move[:whole], rise[whole:] + move[0], rise[0] + move[whole:]])
    return _limits(rows[:, None], resamples)[0]


def _null(measured: Measured, null: Sequence[Measured]) -> dict[str, Any]:
    if not null:
        empty = torch.zeros(0, 0, dtype=torch.float64)
        return {
            "null_strengths": torch.zeros(0, dtype=torch.float64),
            **{f"null_{name}": empty for name in ("B", "P", "P4")},
        }
    first = null[0]
    for other in null:
        same = torch.equal(other.strengths, first.strengths) and other.topics == measured.topics
        if not same or other.full.shape[1] != measured.full.shape[1]:
            raise ValueError(
                "the random directions were measured at other strengths, prompts or items: "
                "measure them all at the same ones"
            )
    used = first.strengths != 0
    means = {"B": "labels", "P": "full", "P4": "four"}
    return {
        "null_strengths": first.strengths[used],
        **{
            f"null_{name}": torch.stack([getattr(m, field)[used].mean(1) for m in null])
            for name, field in means.items()
        },
    }


def _room(read: str) -> dict[str, float]:
    return {"floor": QUARTER, "span": SPAN} if read == "four" else {}
