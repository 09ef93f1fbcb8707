"""Linear probes: what every one of them is, and logistic regression, one fit or hundreds at once.

A shuffled-label null needs hundreds of fits to the same rows. They share the rows' singular
vectors, so all labellings are fitted together in that basis by Newton steps, each solved by
conjugate gradients over all labellings in two matrix products per iteration.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes import figures
from probes.directions import Direction, checked, oriented
from probes.results import Result, check_finite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FLAT = 1e-10
"""A feature whose standard deviation is below this share of its mean is constant."""


@dataclass(frozen=True)
class Probe(Result):
    """A linear reader of one site: log-odds that a row belongs to the positive class."""

    weight: Float[Tensor, " d_model"]
    """Log-odds per standard deviation of each feature (float64, as are mean and scale)."""
    bias: float
    """Log-odds of a row at `mean`."""
    mean: Float[Tensor, " d_model"]
    """Subtracted from each feature first; of the training rows."""
    scale: Float[Tensor, " d_model"]
    """Divides each feature then; standard deviation of the training rows, 1 where constant."""
    gap: float
    sigma: float
    midpoint: float
    """As in `Direction`, of the training rows."""
    n: int
    kind: str
    site: str = ""

    def __str__(self) -> str:
        place = f" at {self.site}" if self.site else ""
        return f"{self.kind} probe{place}: width {len(self.weight)}, n = {self.n}"

    def score(self, x: Float[Tensor, "example d_model"]) -> Float[Tensor, " example"]:
        """Log-odds of the positive class; 0 is the decision threshold."""
        if x.shape[1] != len(self.weight):
            raise ValueError(
                f"rows of width {x.shape[1]} were given to a probe of width {len(self.weight)}: "
                f"take activations of site {self.site or 'it was fitted at'}"
            )
        check_finite(x, "the activations")
        mean, scale, weight = (t.to(x.device) for t in (self.mean, self.scale, self.weight))
        return ((x.double() - mean) / scale @ weight + self.bias).float()

    def probability(self, x: Float[Tensor, "example d_model"]) -> Float[Tensor, " example"]:
        """Probability of the positive class, 0 to 1."""
        return self.score(x).sigmoid()

    @property
    def direction(self) -> Direction:
        """Where log-odds rise fastest, as a unit vector; `raw` is log-odds per activation."""
        raw = self.weight / self.scale
        return Direction(
            unit=(raw / raw.norm()).float(),
            raw_norm=float(raw.norm()),
            gap=self.gap,
            sigma=self.sigma,
            midpoint=self.midpoint,
            n=self.n,
            estimator=self.kind,
            site=self.site,
            record=self.record,
        )

    def frame(self) -> "pd.DataFrame":
        """One row, that of the direction."""
        return self.direction.frame()

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Log-odds that the training classes have under normal curves of their mean and sigma."""
        ax = figures.axes(ax)
        slope = float((self.weight / self.scale).norm())
        offset = self.bias - float((self.weight / self.scale) @ self.mean)
        spread = max(slope * self.sigma, 1e-12)
        with figures.theme():
            for i, label in enumerate(("positive", "negative")):
                middle = slope * (self.midpoint + (0.5 - i) * self.gap) + offset
                at = middle + spread * torch.linspace(-4, 4, 161)
                height = torch.exp(-(((at - middle) / spread) ** 2) / 2)
                ax.plot(at.numpy(), height.numpy(), color=figures.PALETTE[i], label=label)
            ax.axvline(0, ls=":", color=figures.PALETTE[6], label="threshold")
            ax.set(xlabel="log-odds (training rows)", ylabel="density, peak = 1")
            ax.set_title(self.site)
            ax.legend()
        return ax


class Fits(NamedTuple):
    """Linear functions of one width, one column each: scores are `x @ weight + bias`."""

    weight: Float[Tensor, "d_model fit"]
    bias: Float[Tensor, " fit"]


class Thin(NamedTuple):
    """Standardised rows in the basis of their own singular vectors."""

    rows: Float[Tensor, "example rank"]
    """Orthogonal columns, all of mean zero."""
    basis: Float[Tensor, "d_model rank"]
    """Orthonormal columns; `rows @ basis.T` is the standardised input."""
    mean: Float[Tensor, " d_model"]
    scale: Float[Tensor, " d_model"]

    def back(self, weight: Float[Tensor, "rank fit"], bias: Float[Tensor, " fit"]) -> Fits:
        """Weights in the thin basis as weights on the features as they came."""
        raw = (self.basis @ weight) / self.scale[:, None]
        return Fits(raw, bias - self.mean @ raw)


def thin(x: Float[Tensor, "example d_model"], *, standardise: bool = True) -> Thin:
    """Standardise (or only centre) features and rotate them into at most `example` dimensions."""
    x = x.detach().double().cpu()
    mean = x.mean(0)
    scale = torch.ones_like(mean)
    if standardise:
        spread = x.std(0, correction=0)
        scale = torch.where(spread > FLAT * mean.abs(), spread, scale)
    x = (x - mean) / scale
    wide = x.shape[1] > len(x)
    squares, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    keep = squares > 1e-11 * squares[-1].clamp_min(0)
    if not bool(keep.any()):
        raise ValueError("the training rows are all the same: there is nothing to learn from")
    squares, vectors = squares[keep], vectors[:, keep]
    if wide:
        return Thin(vectors * squares.sqrt(), x.T @ (vectors / squares.sqrt()), mean, scale)
    return Thin(x @ vectors, vectors, mean, scale)


def fit_logistic(
    positive: Float[Tensor, "positive d_model"],
    negative: Float[Tensor, "negative d_model"],
    *,
    C: float = 1.0,
    site: str = "",
) -> Probe:
    """Logistic regression on standardised features with penalty `|weight|^2 / 2`.

    `C` multiplies the sum of the log-losses, as in scikit-learn, whose solution it is; the bias is
    not penalised.
    """
    positive, negative = checked(positive, negative)
    rows = thin(torch.cat([positive, negative]))
    target = torch.zeros(len(rows.rows), 1, dtype=torch.float64)
    target[: len(positive)] = 1
    weight, bias = newton(rows.rows, target, C, tolerance=1e-11)
    weight = rows.basis @ weight[:, 0]
    along = oriented(weight / rows.scale, positive, negative, "logistic", site)
    return Probe(
        weight=weight,
        bias=float(bias[0]),
        mean=rows.mean,
        scale=rows.scale,
        gap=along.gap,
        sigma=along.sigma,
        midpoint=along.midpoint,
        n=along.n,
        kind="logistic",
        site=site,
    )


def logistic_direction(
    positive: Float[Tensor, "positive d_model"],
    negative: Float[Tensor, "negative d_model"],
    *,
    C: float = 1.0,
    site: str = "",
) -> Direction:
    """The direction of `fit_logistic`, mapped back from standardised features."""
    return fit_logistic(positive, negative, C=C, site=site).direction


def fit_logistic_many(
    x: Float[Tensor, "example d_model"], labels: Bool[Tensor, "example fit"], *, C: float = 1.0
) -> Fits:
    """`fit_logistic` for every column of labels over the same rows."""
    check_finite(x, "the activations")
    rows = thin(x)
    return rows.back(*newton(rows.rows, labels.double(), C))


def newton(
    Z: Float[Tensor, "example rank"],
    T: Float[Tensor, "example fit"],
    C: float,
    *,
    tolerance: float = 1e-8,
    max_steps: int = 100,
) -> tuple[Float[Tensor, "rank fit"], Float[Tensor, " fit"]]:
    """Minimise `C sum log-loss + |v|^2 / 2` over weights v and a free bias, each column of targets
    by itself. The columns of Z must be orthogonal and of mean zero.

    Stops when no gradient is larger than `tolerance` times C times the largest it can be.
    """
    if not C > 0:
        raise ValueError(f"C was {C}: give a number above 0; smaller penalises weights more")
    if bool((T.sum(0) == 0).any()) or bool((T.sum(0) == len(T)).any()):
        raise ValueError("some labelling holds one class only: both classes are needed")
    A = torch.cat([Z, torch.ones(len(Z), 1, dtype=Z.dtype)], 1)
    square = A.square().sum(0)[:, None]
    penalty = torch.ones_like(square)
    penalty[-1] = 0
    fits = T.shape[1]
    V = torch.zeros(A.shape[1], fits, dtype=Z.dtype)
    F = torch.zeros_like(T)
    small = tolerance * C * (square * len(Z)).sqrt().amax()
    active = torch.arange(fits)
    for _ in range(max_steps):
        v, f, t = V[:, active], F[:, active], T[:, active]
        p = f.sigmoid()
        gradient = C * (A.T @ (p - t)) + penalty * v
        open_ = gradient.norm(dim=0) > small
        active = active[open_]
        if not len(active):
            return V[:-1], V[-1]
        v, f, t, p, gradient = (m[:, open_] for m in (v, f, t, p, gradient))
        step = _newton_step(A, C * p * (1 - p), penalty, square, gradient)
        V[:, active], F[:, active] = _line_search(v, f, t, step, A @ step, gradient, penalty, C)
    raise ValueError(
        f"logistic regression did not converge in {max_steps} steps with C = {C} on "
        f"{len(Z)} rows: give a smaller C"
    )


def _newton_step(
    A: Tensor, D: Tensor, penalty: Tensor, square: Tensor, gradient: Tensor
) -> Float[Tensor, "rank fit"]:
    """Solve `(A' D A + penalty) step = -gradient` for each column, to a hundredth of its size."""
    # A's columns are orthogonal, so with equal weights D the system would be diagonal
    inverse = 1 / (square * D.mean(0) + penalty)
    step = torch.zeros_like(gradient)
    rest = -gradient
    start = (rest * inverse * rest).sum(0)
    z = inverse * rest
    along, length = z, start
    for _ in range(min(2 * len(A.T), 60)):
        pull = A.T @ (D * (A @ along)) + penalty * along
        # a column that is already solved has length 0 and stays where it is
        alpha = length / (along * pull).sum(0).clamp_min(1e-300)
        step = step + alpha * along
        rest = rest - alpha * pull
        z = inverse * rest
        new = (rest * z).sum(0)
        if bool((new <= 1e-4 * start).all()):
            break
        along = z + (new / length.clamp_min(1e-300)) * along
        length = new
    return step


def _line_search(
    v: Tensor,
    f: Tensor,
    t: Tensor,
    step: Tensor,
    moved: Tensor,
    g: Tensor,
    penalty: Tensor,
    C: float,
) -> tuple[Tensor, Tensor]:
    """Halve each column's step until its loss falls enough (Armijo)."""

    def loss(v: Tensor, f: Tensor) -> Tensor:
        return C * (torch.nn.functional.softplus(f) - t * f).sum(0) + (penalty * v * v).sum(0) / 2

    now, slope = loss(v, f), (g * step).sum(0)
    size = torch.ones_like(now)
    for _ in range(30):
        # the last digits of the loss are noise: near the optimum a full step is right
        high = loss(v + size * step, f + size * moved) > now + 1e-4 * size * slope + 1e-12 * now
        if not bool(high.any()):
            break
        size = torch.where(high, size / 2, size)
    return v + size * step, f + size * moved
