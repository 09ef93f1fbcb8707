"""One kind of probe at many sites, scored on held-out topics beside its shuffled-label null.

Everything that learns or chooses sees the training and validation rows only; the test rows are
scored once. In the null the labels of every part are shuffled inside that part, and the fit, the
sign and the choice of site are made again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.ccs import fit_ccs_many
from probes.linear import Fits, fit_logistic_many
from probes.mean import fit_mass_mean_many
from probes.results import Result, check_finite
from probes.scores import (
    Labels,
    accuracy,
    auroc,
    auroc_interval,
    expected_calibration_error,
    positive_mask,
)
from probes.sites import Site
from probes.splits import shuffled, twins, warn_if_few

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Kind = Literal["logistic", "mean", "whitened", "ccs"]


@dataclass(frozen=True)
class ProbeSweep(Result):
    """Held-out AUROC of one kind of probe over sites; 0.5 is chance, 1 is perfect."""

    sites: tuple[str, ...]
    layers: Int[Tensor, " site"]
    auroc: Float[Tensor, " site"]
    low: Float[Tensor, " site"]
    """95 % limits, BCa bootstrap over test topics."""
    high: Float[Tensor, " site"]
    accuracy: Float[Tensor, " site"]
    """Share of test rows on their side of log-odds 0."""
    calibration_error: Float[Tensor, " site"]
    """Expected calibration error of the test probabilities, 0 to 1."""
    null: Float[Tensor, "site permutation"]
    """Test AUROC with shuffled labels, fitted anew; the same shuffles at every site."""
    validation: Float[Tensor, " site"] | None
    """AUROC on validation rows, from which `best` is chosen."""
    null_chosen: Float[Tensor, " permutation"] | None
    """Null test AUROC of the site that each shuffle would have chosen on its own shuffled
    validation labels: what `best` must beat."""
    kind: str
    shuffle: str
    """Whose labels the null shuffles: `all`, or `train` (and validation) only."""
    n_train: int
    n_test: int
    n_groups: int
    """Topics in the test rows."""

    def __str__(self) -> str:
        at = int(self.auroc.argmax()) if self.validation is None else self.best_index
        how = "highest on test" if self.validation is None else "chosen on validation"
        return (
            f"{self.kind} probes at {len(self.sites)} sites: {self.sites[at]} ({how}) has AUROC "
            f"{self.auroc[at]:.3f} [{self.low[at]:.3f}, {self.high[at]:.3f}], null 95 % "
            f"{self.null_95[at]:.3f}, {self.n_test} test rows of {self.n_groups} topics"
        )

    @cached_property
    def null_95(self) -> Float[Tensor, " site"]:
        """95th percentile of each site's null."""
        return self.null.double().quantile(0.95, dim=1).float()

    @property
    def null_max(self) -> Float[Tensor, " permutation"]:
        """Highest null AUROC over sites: what the highest point of the curve must beat."""
        return self.null.amax(0)

    @property
    def claimed(self) -> Bool[Tensor, " site"]:
        """Where the interval excludes the null's 95th percentile, site by site."""
        return self.low > self.null_95

    @property
    def best_index(self) -> int:
        """Position of the site with the highest validation AUROC, the shallowest if several."""
        if self.validation is None:
            raise ValueError(
                "the best site must be chosen on validation rows and this sweep has none: "
                "pass validation=... to sweep, or name the site yourself"
            )
        return int((self.validation == self.validation.max()).nonzero()[0])

    @property
    def best(self) -> str:
        """The site chosen on validation rows."""
        return self.sites[self.best_index]

    @property
    def best_claimed(self) -> bool:
        """Whether the best site's interval excludes the null that repeats the choice of site."""
        index = self.best_index
        assert self.null_chosen is not None
        return bool(self.low[index] > self.null_chosen.double().quantile(0.95))

    def frame(self) -> "pd.DataFrame":
        """One row a site; `p` is the permutation p-value of that site alone."""
        import pandas as pd

        p = (1 + (self.null >= self.auroc[:, None]).sum(1)) / (1 + self.null.shape[1])
        columns = {
            "site": self.sites,
            "layer": self.layers.tolist(),
            "head": [Site.parse(site).head for site in self.sites],
            "auroc": self.auroc.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "null_95": self.null_95.tolist(),
            "p": p.tolist(),
            "claimed": self.claimed.tolist(),
            "accuracy": self.accuracy.tolist(),
            "calibration_error": self.calibration_error.tolist(),
        }
        if self.validation is not None:
            columns["validation"] = self.validation.tolist()
        if all(head is None for head in columns["head"]):
            del columns["head"]
        return pd.DataFrame(columns)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Against depth with interval and null; a map of layer by head where sites are heads."""
        from probes.sweep_figure import draw

        return draw(self, ax)


def sweep(
    activations: Mapping[str, Float[Tensor, "example _"]],
    labels: Labels,
    groups: Sequence[str],
    *,
    train: Int[Tensor, " train"],
    test: Int[Tensor, " test"],
    validation: Int[Tensor, " validation"] | None = None,
    kind: Kind = "logistic",
    C: float = 1.0,
    permutations: int = 200,
    shuffle: Literal["all", "train"] = "all",
    seed: int = 0,
) -> ProbeSweep:
    """Fit one probe a site on the training rows and score it, and its null, on the test rows.

    Labels are shuffled by topic (`splits.shuffled`). With `shuffle="train"` null probes meet the
    true test labels. That is a harder null and another question: where the concept is the widest
    variation, half of all shuffled fits find its axis with the right sign and read it well, so
    the strongest concepts could never be claimed.
    """
    n = len(groups)
    positive = positive_mask(labels, (n,))
    parts = {"train": train, "test": test}
    if validation is not None:
        parts["validation"] = validation
    _check_parts(parts, groups, positive)
    sites = tuple(str(site) for site in sorted(Site.parse(text) for text in activations))
    if not sites:
        raise ValueError("no activations were given: pass a mapping of site text to tensor")
    if permutations < 1:
        raise ValueError(f"{permutations} permutations were asked: ask for 200, at least 1")
    if shuffle not in ("all", "train"):
        raise ValueError(f"shuffle was {shuffle!r}: choose 'all' or 'train'")
    names, own = ([groups[int(i)] for i in rows] for rows in (test, train))
    warn_if_few(names)
    generator = torch.Generator().manual_seed(seed)
    targets = _with_shuffles(positive[train], own, permutations, generator)
    pairs = _sides(positive[train], own, generator) if kind == "ccs" else None
    judged = torch.empty(0)
    if validation is not None:
        kept = [groups[int(i)] for i in validation]
        judged = _with_shuffles(positive[validation], kept, permutations, generator)
    truth = positive[test]
    against = _with_shuffles(truth, names, permutations, generator)
    if shuffle == "train":
        against = truth[:, None].expand_as(against)

    results, chosen = [], []
    for site in sites:
        x = activations[site]
        if x.shape[0] != n:
            raise ValueError(f"{site} has {x.shape[0]} rows for {n} examples: give one row each")
        check_finite(x, f"the activations of {site}")
        fits = _fit(kind, x[train], targets, C, pairs, seed)
        results.append(x[test].double().cpu() @ fits.weight + fits.bias)
        if validation is not None:
            scores = x[validation].double().cpu() @ fits.weight + fits.bias
            chosen.append(auroc(scores, judged))
    scores = torch.stack(results, 1)  # [test, site, 1 + permutation]
    interval = auroc_interval(scores[:, :, 0], truth, names, seed=seed)
    null = auroc(scores, against[:, None].expand_as(scores))[:, 1:]
    known, null_chosen = None, None
    if chosen:
        table = torch.stack(chosen)
        known = table[:, 0].float()
        null_chosen = null.gather(0, table[:, 1:].argmax(0)[None])[0].float()
    return ProbeSweep(
        sites=sites,
        layers=torch.tensor([Site.parse(site).layer for site in sites]),
        auroc=interval.value.float(),
        low=interval.low.float(),
        high=interval.high.float(),
        accuracy=accuracy(scores[:, :, 0], truth).float(),
        calibration_error=expected_calibration_error(scores[:, :, 0].sigmoid(), truth).float(),
        null=null.float(),
        validation=known,
        null_chosen=null_chosen,
        kind=kind,
        shuffle=shuffle,
        n_train=len(train),
        n_test=len(test),
        n_groups=len(set(names)),
    )


def _fit(
    kind: str,
    x: Tensor,
    targets: Bool[Tensor, "example fit"],
    C: float,
    pairs: tuple[Tensor, Tensor] | None,
    seed: int,
) -> Fits:
    if kind == "logistic":
        return fit_logistic_many(x, targets, C=C)
    if kind in ("mean", "whitened"):
        return fit_mass_mean_many(x, targets, whiten=kind == "whitened")
    if kind != "ccs" or pairs is None:
        raise ValueError(f"unknown kind of probe {kind!r}: choose logistic, mean, whitened or ccs")
    return fit_ccs_many(x, targets, *pairs, seed=seed)


def _with_shuffles(
    labels: Bool[Tensor, " example"],
    groups: Sequence[str],
    permutations: int,
    generator: torch.Generator,
) -> Bool[Tensor, "example fit"]:
    """The labels themselves in the first column, shuffled ones in the others."""
    return torch.cat([labels[:, None], shuffled(labels, groups, permutations, generator)], 1)


def _sides(
    labels: Bool[Tensor, " example"], groups: Sequence[str], generator: torch.Generator
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Rows on the two sides of each pair of twins, a random half of the pairs turned round."""
    high, low = twins(labels, groups)
    half = torch.randperm(len(high), generator=generator) < len(high) // 2
    return torch.where(half, low, high), torch.where(half, high, low)


def _check_parts(
    parts: Mapping[str, Tensor], groups: Sequence[str], labels: Bool[Tensor, " example"]
) -> None:
    owner: dict[str, str] = {}
    for part, rows in parts.items():
        chosen: list[int] = rows.tolist()
        if not chosen or min(chosen) < 0 or max(chosen) >= len(groups):
            raise ValueError(
                f"the {part} rows must be numbers from 0 to {len(groups) - 1}, at least one"
            )
        if len({bool(labels[i]) for i in chosen}) < 2:
            raise ValueError(f"the {part} rows hold one class only: split by strata of class")
        for name in {groups[i] for i in chosen}:
            if owner.setdefault(name, part) != part:
                raise ValueError(
                    f"topic {name!r} is in {owner[name]} and {part}: near copies would leak, "
                    "so split whole topics (probes.splits.split)"
                )
