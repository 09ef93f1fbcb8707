"""Is a concept linearly there? Erase what a linear reader can know of it, and read again.

On the rows that LEACE was fitted on every linear reader becomes a constant, by theorem, so such a
reader tests nothing. Here the eraser is fitted on training topics, a fresh probe on other topics
and its AUROC taken on a third part. Class means are known up to sampling only, so some of the
concept stays readable on new topics, more in greater width and from fewer topics. How much is
simulated: the same rows mirrored about their class means, topic by topic at random, hold a concept
that is one shift and nothing else. What a probe reads beyond that lies elsewhere in the new topics
than in those of the eraser.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.subspaces.eraser import Eraser, fit_leace, fit_mean_projection, random_eraser
from analyses.subspaces.erasure_figure import draw_erasure
from probes import splits
from probes.linear import fit_logistic_many
from probes.moments import ClassMoments
from probes.results import Record, Result, check_finite
from probes.scores import auroc, auroc_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = [
    "METHODS",
    "Eraser",
    "Erasure",
    "fit_leace",
    "fit_mean_projection",
    "measure_erasure",
    "random_eraser",
]

METHODS = ("nothing", "LEACE", "LEACE, half the topics", "LEACE, shrunk", "mean difference")
"""What is erased with: not at all; LEACE as published; the same from a random half of the training
topics, for what more topics would still take out; LEACE with the Ledoit-Wolf covariance; the
orthogonal projection off the differences of class means."""

TIED = 1e-6
"""Log-odds closer than this are equal: after erasure a probe's weights are rounding, and rounding
must not rank anything."""


@dataclass(frozen=True)
class Erasure(Result):
    """How well a fresh linear probe finds the concept before and after erasing it."""

    model: str
    sites: tuple[str, ...]
    methods: tuple[str, ...]
    auroc: Float[Tensor, "method site"]
    """On test topics, 0 to 1; 0.5 is chance. The probe is refitted on erased rows of topics that
    the eraser has not seen."""
    low: Float[Tensor, "method site"]
    high: Float[Tensor, "method site"]
    """95 % BCa limits over test topics."""
    null: Float[Tensor, "method site"]
    """95th percentile of the AUROC when labels are shuffled within topics, the probe refitted."""
    refitted: Float[Tensor, "method site"]
    """AUROC on the same test topics of a probe refitted on the eraser's own training rows. After
    LEACE this probe is constant and the AUROC 0.5 by theorem, whatever is left on new topics."""
    taken: Float[Tensor, "method site"]
    """Mean squared change of test rows over their mean squared distance from the training mean."""
    random: Float[Tensor, "draw site"]
    """`auroc` after erasing random subspaces of LEACE's rank."""
    residue: Float[Tensor, "draw site"]
    """`auroc` after LEACE where the concept is one and the same shift for all topics (see above):
    what sampling alone leaves."""
    topics: tuple[int, int, int]
    """Topics the eraser was fitted on, the probe was fitted on, and the figures are of."""
    notes: tuple[str, ...] = ()

    def present(self, method: str, site: str) -> bool:
        """Whether the concept can be claimed: the interval lies above the null's 95th percentile."""
        at = self.methods.index(method), self.sites.index(site)
        return bool(self.low[at] > self.null[at])

    def left(self, site: str) -> bool:
        """Whether more is left after LEACE than sampling leaves of a single shift: the interval
        lies above the 95th percentile of `residue`."""
        j = self.sites.index(site)
        return bool(self.low[1, j] > self.residue_high[j])

    @property
    def residue_high(self) -> Float[Tensor, " site"]:
        """95th percentile of `residue`."""
        return self.residue.quantile(0.95, dim=0)

    def frame(self) -> "pd.DataFrame":
        """One row per method and site."""
        import pandas as pd

        names = ("auroc", "low", "high", "null", "refitted", "taken")
        rows = []
        for i, method in enumerate(self.methods):
            for j, site in enumerate(self.sites):
                row = {"model": self.model, "site": site, "erased": method}
                row |= {name: float(getattr(self, name)[i, j]) for name in names}
                row["present"] = self.present(method, site)
                row["random"] = float(self.random[:, j].mean())
                row["residue"] = float(self.residue_high[j])
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """AUROC by site for every method, with intervals, random erasure and both nulls."""
        return draw_erasure(self, ax)

    def __str__(self) -> str:
        best = int(self.auroc[0].argmax())
        said = [f"{m} {float(self.auroc[i, best]):.2f}" for i, m in enumerate(self.methods)]
        left = sum(self.left(site) for site in self.sites)
        return (
            f"erasure in {self.model} at {self.sites[best]}, AUROC of a fresh probe after erasing "
            f"{', '.join(said)}; sampling alone leaves up to {float(self.residue_high[best]):.2f}; "
            f"LEACE leaves more than that at {left} of {len(self.sites)} sites"
        )


def measure_erasure(
    activations: Mapping[str, Float[Tensor, "prompt d_model"]],
    labels: Bool[Tensor, " prompt"],
    topics: Sequence[str],
    *,
    train: Int[Tensor, " train"],
    probe: Int[Tensor, " probe"],
    test: Int[Tensor, " test"],
    strata: Sequence[str] | None = None,
    model: str = "",
    draws: int = 20,
    permutations: int = 200,
    resamples: int = 1000,
    seed: int = 0,
) -> Erasure:
    """Erase at each site by each method and read again with a fresh logistic probe.

    `activations` maps site texts to rows of all prompts; `train` are the rows the erasers are
    fitted on, `probe` those of the fresh probes, `test` those of the figures. No topic may be in
    two of them. Give `strata` where the parts hold these in equal shares (hazard classes of the
    shipped twins): the residue is then mirrored about the means of a stratum's classes, for what
    varies between strata is no error of sampling.
    """
    notes = _apart(labels, topics, {"train": train, "probe": probe, "test": test})
    if draws < 1 or permutations < 20:
        raise ValueError(
            f"{draws} random subspaces and {permutations} shuffles were asked: give 1 or more (20 "
            "for a claim) and 20 or more (200 for a claim)"
        )
    generator = torch.Generator().manual_seed(seed)
    asked = torch.cat([probe, test])
    shuffles = splits.shuffled(labels[asked], _of(topics, asked), permutations, generator)
    tested = _of(topics, test)
    record = Record()  # one for all that is fitted: its versions take a while to look up
    known = sorted(set(_of(topics, train)))
    order = torch.randperm(len(known), generator=generator)[: (len(known) + 1) // 2]
    kept = {known[i] for i in order.tolist()}
    half = train[torch.tensor([topics[int(i)] in kept for i in train])]
    names = ("auroc", "low", "high", "null", "refitted", "taken")
    found: dict[str, list[list[float]]] = {name: [[] for _ in METHODS] for name in names}
    random: list[list[float]] = []
    residue: list[list[float]] = []
    numbers, _ = splits.codes(topics)
    kinds = splits.codes([""] * len(labels) if strata is None else strata)[0]
    for x in activations.values():
        check_finite(x, "the activations")
        if len(x) != len(labels):
            raise ValueError(f"{len(x)} rows came with {len(labels)} labels: give one for each")
        moments = ClassMoments({}).update(x[train], labels[train])
        leace = fit_leace(moments, record=record)
        erasers = (
            None,
            leace,
            fit_leace(ClassMoments({}).update(x[half], labels[half]), record=record),
            fit_leace(moments, shrinkage="ledoit-wolf", record=record),
            fit_mean_projection(moments, record=record),
        )
        centred = x[test].double() - leace.mean
        for i, eraser in enumerate(erasers):  # as in METHODS
            erased = x.double() if eraser is None else eraser(x.double())
            scores = _scores(erased, labels, probe, test)
            limits = auroc_interval(
                scores, labels[test], tested,
                resamples=resamples, seed=seed,
            )  # fmt: skip
            fits = fit_logistic_many(erased[probe], shuffles[: len(probe)])
            chance = _tied(erased[test] @ fits.weight + fits.bias)
            null = auroc(chance, shuffles[len(probe) :])
            again = _auroc(erased, labels, train, test)
            taken = (erased[test] - x[test].double()).square().sum() / centred.square().sum()
            values = (limits.value, limits.low, limits.high, null.quantile(0.95), again, taken)
            for name, value in zip(names, values, strict=True):
                found[name][i].append(float(value))
        whole = x.double()
        erased_at_random = (
            random_eraser(leace.mean, leace.rank, generator, record=record) for _ in range(draws)
        )
        random.append([_auroc(one(whole), labels, probe, test) for one in erased_at_random])
        means = _means(whole, labels, kinds, train)
        left = []
        for _ in range(draws):
            sign = torch.randint(2, (len(set(topics)),), generator=generator).double() * 2 - 1
            mirrored = means + sign[numbers, None] * (whole - means)
            own = ClassMoments({}).update(mirrored[train], labels[train])
            again = fit_leace(own, record=record)
            left.append(_auroc(again(mirrored), labels, probe, test))
        residue.append(left)
    tensors = {name: torch.tensor(rows, dtype=torch.float32) for name, rows in found.items()}
    return Erasure(
        model=model,
        sites=tuple(activations),
        methods=METHODS,
        random=torch.tensor(random, dtype=torch.float32).T.contiguous(),
        residue=torch.tensor(residue, dtype=torch.float32).T.contiguous(),
        topics=(len(set(_of(topics, train))), len(set(_of(topics, probe))), len(set(tested))),
        notes=notes,
        auroc=tensors["auroc"],
        low=tensors["low"],
        high=tensors["high"],
        null=tensors["null"],
        refitted=tensors["refitted"],
        taken=tensors["taken"],
    )


def _of(topics: Sequence[str], rows: Tensor) -> list[str]:
    return [topics[int(i)] for i in rows]


def _scores(x: Tensor, labels: Tensor, fitted: Tensor, read: Tensor) -> Float[Tensor, " read"]:
    """Log-odds that a probe fitted on some rows gives others; all equal where nothing is left."""
    fits = fit_logistic_many(x[fitted], labels[fitted, None])
    return _tied(x[read] @ fits.weight + fits.bias)[:, 0]


def _means(
    x: Float[Tensor, "prompt d_model"], labels: Tensor, kinds: Tensor, train: Tensor
) -> Float[Tensor, "prompt d_model"]:
    """The training mean of each row's class and stratum; of the class where it has none there."""
    means = torch.empty_like(x)
    for label in (False, True):
        own = labels[train] == label
        for kind in kinds.unique():
            rows = train[own & (kinds[train] == kind)]
            rows = rows if len(rows) else train[own]
            means[(labels == label) & (kinds == kind)] = x[rows].mean(0)
    return means


def _auroc(x: Tensor, labels: Tensor, fitted: Tensor, read: Tensor) -> float:
    return float(auroc(_scores(x, labels, fitted, read), labels[read]))


def _tied(scores: Tensor) -> Tensor:
    return (scores / TIED).round() * TIED


def _apart(labels: Tensor, topics: Sequence[str], parts: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Notes on parts with few topics; refuses parts that share topics or lack a class."""
    seen: dict[str, str] = {}
    notes = []
    for name, rows in parts.items():
        own = set(_of(topics, rows))
        if twice := sorted(own & seen.keys()):
            raise ValueError(
                f"topic {twice[0]!r} is in {seen[twice[0]]} and in {name}: eraser, probe and "
                "figures need topics of their own"
            )
        if labels[rows].all() or not labels[rows].any():
            raise ValueError(
                f"the {len(rows)} rows of {name} hold one class only: give both classes to each "
                "of train, probe and test"
            )
        if len(own) < splits.FEW_GROUPS:
            notes.append(
                f"only {len(own)} topics in {name}: with fewer than {splits.FEW_GROUPS} read the "
                "figures as a rough guide"
            )
        seen |= dict.fromkeys(own, name)
    return tuple(notes)
