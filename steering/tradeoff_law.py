"""The laws by which alignment and helpfulness move with the steering norm: fits and comparisons.

Wolf et al. 2024 (arXiv 2401.16332): with a vector of norm r added to the stream, the gap between
the logits of an aligned and a misaligned answer is linear in r, so that alignment is tanh(a r + b0)
and at first rises in proportion to r. The gaps between a question's correct token and the others
shift by normal amounts of standard deviation b r, and since E[exp(b r z)] is about
1 + b^2 r^2 / 2, the probability of the correct token falls as the square of r.

Pure functions of means over prompts. Fits are plain least squares of the measured means: nothing
is smoothed before, and what is drawn is what was fitted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import leastsq
from torch import Tensor

QUARTER, SPAN = 0.25, 0.75
"""Of the four-choice law: chance, and the room above it. The paper's code has a room of 1/2, with
which no model that gives its correct answers more than 3/4 can be described; where both can, the
curves are the same and only a and b are counted differently."""


class AlignmentFit(NamedTuple):
    """`tanh(a r + b0)`: a per unit of norm, b0 the inverse tanh of alignment at 0."""

    a: float
    b0: float

    def at(self, r: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return alignment_law(r, self.a, self.b0)

    @property
    def slope(self) -> float:
        """Rise of alignment per unit of norm at r = 0: `a (1 - B0^2)`."""
        return self.a * (1 - math.tanh(self.b0) ** 2)


class HelpfulnessFit(NamedTuple):
    """`floor + span / (1 + a + a b^2 r^2 / 2)`, with a, b >= 0."""

    a: float
    """`(1 - P0) / P0` over the span: the odds against the correct token at r = 0."""
    b: float
    """Standard deviation of the logit gaps per unit of norm."""
    floor: float = 0.0
    span: float = 1.0

    def at(self, r: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return helpfulness_law(r, self.a, self.b, self.floor, self.span)

    @property
    def curvature(self) -> float:
        """q of `P0 - q r^2`, the law at small r; `P0 (1 - P0) b^2 / 2` over the full vocabulary."""
        return self.span * self.a * self.b**2 / 2 / (1 + self.a) ** 2


def alignment_law(r: Float[Tensor, "*n"], a: float, b0: float) -> Float[Tensor, "*n"]:
    """B(r) = tanh(a r + b0), -1 to 1."""
    return torch.tanh(a * r.double() + b0)


def helpfulness_law(
    r: Float[Tensor, "*n"], a: float, b: float, floor: float = 0.0, span: float = 1.0
) -> Float[Tensor, "*n"]:
    """P(r) = floor + span / (1 + a + a b^2 r^2 / 2); floor 1/4 for four choices."""
    return floor + span / (1 + a * (1 + b**2 * r.double() ** 2 / 2))


def fit_alignment(
    r: Float[Tensor, " strength"],
    B: Float[Tensor, " strength"],
    at_zero: float | None = None,
) -> AlignmentFit:
    """Least squares of `tanh(a r + b0)`; `at_zero`, the measured B(0), fixes b0.

    NaN where that cannot be: a measured B(0) of -1 or 1 has no finite b0.
    """
    x, y = _arrays(r, B)
    # the inverse of values near the ends is all noise, so it only starts the search
    steep, offset = np.polyfit(x, np.arctanh(np.clip(y, -0.95, 0.95)), 1)
    if at_zero is None:
        a, b0 = _least(lambda p: np.tanh(p[0] * x + p[1]) - y, [steep, offset])
        return AlignmentFit(a, b0)
    if abs(at_zero) >= 1:
        return AlignmentFit(math.nan, math.nan)
    b0 = math.atanh(at_zero)
    (a,) = _least(lambda p: np.tanh(p[0] * x + b0) - y, [steep])
    return AlignmentFit(a, b0)


def fit_helpfulness(
    r: Float[Tensor, " strength"],
    P: Float[Tensor, " strength"],
    at_zero: float | None = None,
    *,
    floor: float = 0.0,
    span: float = 1.0,
) -> HelpfulnessFit:
    """Least squares of the helpfulness law; `at_zero`, the measured P(0), fixes a.

    NaN where that cannot be: a measured P(0) at the floor (chance) or at its ceiling.
    """
    x, y = _arrays(r, P)
    room = np.clip((y - floor) / span, 1e-6, 1 - 1e-6)
    curve, odds = np.polyfit(x**2, 1 / room - 1, 1, w=room**2)  # 1 / P is linear in r^2
    odds = max(odds, 1e-3)
    b = math.sqrt(2 * max(curve, 0.0) / odds) or 1 / max(np.abs(x).max(), 1e-9)

    def off(a: float, b: float) -> np.ndarray:
        return floor + span / (1 + a * (1 + b**2 * x**2 / 2)) - y

    if at_zero is None:
        # the logarithm keeps a above 0, the sign of b is of no consequence
        log_a, b = _least(lambda p: off(math.exp(min(p[0], 30.0)), p[1]), [math.log(odds), b])
        return HelpfulnessFit(math.exp(min(log_a, 30.0)), abs(b), floor, span)
    share = (at_zero - floor) / span
    if not 0 < share < 1:
        return HelpfulnessFit(math.nan, math.nan, floor, span)
    a = 1 / share - 1
    (b,) = _least(lambda p: off(a, p[0]), [b])
    return HelpfulnessFit(a, abs(b), floor, span)


def log_slope(r: Float[Tensor, " strength"], change: Float[Tensor, " strength"]) -> float:
    """Slope of log|change| on log r: 1 for a linear law, 2 for a quadratic one.

    Points without any change have no logarithm and are left out; NaN if fewer than two are left.
    """
    used = (r > 0) & (change != 0) & change.isfinite()
    if int(used.sum()) < 2:
        return math.nan
    x, y = r[used].double().log(), change[used].double().abs().log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum()) if float(x.square().sum()) else math.nan


def compare(
    r: Float[Tensor, " strength"],
    y: Float[Tensor, " strength"],
    fitted: Float[Tensor, " strength"],
) -> dict[str, float]:
    """AIC of constant, linear, quadratic (`c + q r^2`) and `full`: the values of a fitted law.

    All have two free parameters but the constant; the lowest is the best. The means share their
    prompts, so their errors hang together over strengths, and a difference alone is no evidence:
    where the truth was a tanh, the quadratic law came out ahead by more than 2 in a fifth of
    simulations with 40 prompts. `Tradeoff.support` says how often each law wins when prompts are
    resampled. On one side of 0 only, since a law in |r| is no line over both.
    """
    x, values = _arrays(r, y)
    found = {"constant": _aic(values - values.mean(), 1)}
    found["linear"] = _aic(_off_line(x, values), 2)
    found["quadratic"] = _aic(_off_line(x**2, values), 2)
    found["full"] = _aic(fitted.double().numpy() - values, 2)
    return found


def optimum(
    alignment: AlignmentFit,
    helpfulness: HelpfulnessFit,
    weight: float,
    low: float,
    high: float,
) -> float:
    """The norm in [low, high] at which `weight * B(r) + P(r)` of the fitted laws is largest.

    NaN where a fit is; found on 4001 points, so to a four-thousandth of the range.
    """
    if not all(map(math.isfinite, (*alignment, *helpfulness))):
        return math.nan
    r = torch.linspace(low, high, 4001, dtype=torch.float64)
    return float(r[int((weight * alignment.at(r) + helpfulness.at(r)).argmax())])


def small_optimum(alignment: AlignmentFit, helpfulness: HelpfulnessFit, weight: float) -> float:
    """The same in closed form from the laws at small r: `w a (1 - B0^2) / (2 q)`.

    Over the full vocabulary that is `w a (1 - B0^2) / (P0 (1 - P0) b^2)`. It is right only where
    it comes out small: `a r` and `b r` well below 1. Infinite where helpfulness does not fall.
    """
    if helpfulness.curvature == 0:
        return math.copysign(math.inf, alignment.slope)
    return weight * alignment.slope / (2 * helpfulness.curvature)


def _arrays(r: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if r.shape != y.shape or len(r) < 3:
        raise ValueError(
            f"{len(r)} strengths with {len(y)} means: a fit needs one mean for each of at least 3"
        )
    return r.double().numpy(), y.double().numpy()


def _least(residual: Callable[[np.ndarray], np.ndarray], start: list[float]) -> list[float]:
    return leastsq(residual, start, full_output=True, maxfev=1000)[0].tolist()


def _off_line(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    basis = np.stack([np.ones_like(x), x], 1)
    return basis @ np.linalg.lstsq(basis, y, rcond=None)[0] - y


def _aic(residual: np.ndarray, parameters: int) -> float:
    n = len(residual)
    rss = max(float(residual @ residual), 1e-24 * n)  # an exact fit has a logarithm too
    return n * math.log(rss / n) + 2 * (parameters + 1)
