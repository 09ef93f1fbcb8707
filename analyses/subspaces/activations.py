"""Do two prompt sets live in one subspace of the stream, and do two checkpoints use the same one?

Mode subspace overlap of last-token activations (arXiv 2505.14185, experiment 3): for each set the
fewest singular directions that hold a share eta of its energy, and how far two such subspaces
coincide. The published form is not centred, where the common mean decides almost alone; here it
always stands beside the centred one. Between random subspaces the overlap is max(k) / d, and two
halves of one set do not reach 1 either, so both are shown: the null, and the two-split ceiling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.subspaces import activations_figure, bases
from analyses.subspaces.halves import Side, Spans, band, halves_by_topic, joint
from probes.results import Result, check_finite
from probes.splits import FEW_GROUPS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FORMS = ("uncentred", "centred")
"""As published; and with each set's own mean taken away first."""

ETAS = (0.1, 0.3, 0.6, 0.9)
"""Shares of the energy."""

Sets = Mapping[str, Float[Tensor, "layer prompt d_model"]]


@dataclass(frozen=True)
class SubspaceOverlap(Result):
    """Overlap of prompt sets' activation subspaces, within checkpoints and across them."""

    comparisons: tuple[tuple[str, str, str, str], ...]
    """(model, set, other model, other set) of each: sets within one checkpoint, then each set
    between the first checkpoint and the others."""
    layers: tuple[int, ...]
    etas: tuple[float, ...]
    """Shares of the energy (squared Frobenius norm) that the subspaces hold, above 0 to 1."""
    width: int
    prompts: tuple[tuple[str, int], ...]
    """Prompts of each set; no subspace has more dimensions than that."""
    half: tuple[int, ...]
    """Prompts of each half of a comparison's splits."""
    k: Int[Tensor, "comparison form layer eta 2"]
    """Dimensions of both subspaces; forms are uncentred and centred."""
    overlap: Float[Tensor, "comparison form layer eta"]
    """Mean squared cosine of the principal angles of all prompts' subspaces, 0 to 1; 1 exactly
    where both sides are the same activations."""
    null: Float[Tensor, "comparison form layer eta"]
    """max(k) / width, the mean of the overlap of random subspaces of these dimensions."""
    null_high: Float[Tensor, "comparison form layer eta"]
    """Their 95th percentile."""
    angle: Float[Tensor, "comparison form layer eta 3"]
    """Smallest, median and largest principal angle in degrees, 0 to 90."""
    between: Float[Tensor, "comparison form layer eta 3"]
    """Overlap of a random half of one side with the half of other topics of the other side: mean,
    5th and 95th percentile over splits (spread of the splits, which share prompts: no confidence
    interval)."""
    ceiling: Float[Tensor, "comparison form layer eta 3"]
    """The same of two halves of one side, both sides' splits together: what `between` would be if
    the two sides were one."""
    unchanged: Bool[Tensor, "comparison layer"]
    """Whether both sides are equal bit for bit."""
    notes: tuple[str, ...] = ()

    def distinct(self) -> Bool[Tensor, "comparison form layer eta"]:
        """Where two sides overlap less than one side with itself: the 95th percentile of `between`
        lies below the 5th of `ceiling`."""
        return self.between[..., 2] < self.ceiling[..., 1]

    def related(self) -> Bool[Tensor, "comparison form layer eta"]:
        """Where two sides overlap more than random subspaces do: the 5th percentile of `between`
        lies above the null's 95th. (The null of all prompts, whose dimensions are not fewer.)"""
        return self.between[..., 1] > self.null_high

    def frame(self) -> "pd.DataFrame":
        """One row per comparison, form, layer and energy."""
        import pandas as pd

        distinct, related = self.distinct(), self.related()
        rows = []
        for index in torch.cartesian_prod(*(torch.arange(n) for n in self.overlap.shape)).tolist():
            c, form, layer, eta = index
            at = tuple(index)
            model, prompts, other, other_prompts = self.comparisons[c]
            rows.append(
                {
                    "model": model,
                    "set": prompts,
                    "other_model": other,
                    "other_set": other_prompts,
                    "form": FORMS[form],
                    "layer": self.layers[layer],
                    "eta": self.etas[eta],
                    "k": int(self.k[at][0]),
                    "other_k": int(self.k[at][1]),
                    "overlap": float(self.overlap[at]),
                    "null": float(self.null[at]),
                    "null_high": float(self.null_high[at]),
                    **_named("angle", ("min", "median", "max"), self.angle[at]),
                    **_named("between", ("mean", "low", "high"), self.between[at]),
                    **_named("ceiling", ("mean", "low", "high"), self.ceiling[at]),
                    "distinct": bool(distinct[at]),
                    "related": bool(related[at]),
                    "unchanged": bool(self.unchanged[c, layer]),
                }
            )
        return pd.DataFrame(rows)

    def plot(
        self,
        ax: "Axes | None" = None,
        *,
        sets: tuple[str, str] | None = None,
        form: str = "centred",
        eta: float | None = None,
    ) -> "Axes":
        """Overlap of halves by layer, a curve a checkpoint, with its ceiling and null.

        `sets` are two sets within each checkpoint, or one set twice: it is then compared with that
        of the first checkpoint. `eta` is the largest share up to 0.6 by default.
        """
        return activations_figure.draw_overlap(self, ax, sets, form, eta)

    def __str__(self) -> str:
        eta = activations_figure.shown(self.etas)
        said = []
        for c, (model, prompts, other, other_prompts) in enumerate(self.comparisons):
            if model != other:
                continue
            deepest = self.between[c, 1, -1, eta, 0], self.ceiling[c, 1, -1, eta, 0]
            said.append(
                f"{model} {prompts}/{other_prompts} {deepest[0]:.2f} "
                f"(ceiling {deepest[1]:.2f}, null {self.null[c, 1, -1, eta]:.2f})"
            )
        across = [c for c, item in enumerate(self.comparisons) if item[0] != item[2]]
        if across and bool(self.unchanged[across].all()):
            said.append("the checkpoints are identical: every activation is equal bit for bit")
        return (
            f"subspace overlap, centred, eta {self.etas[eta]:g}, layer {self.layers[-1]}: "
            + "; ".join(said)
        )


def measure_overlap(
    activations: Mapping[str, Sets],
    *,
    layers: Sequence[int] | None = None,
    topics: Mapping[str, Sequence[str]] | None = None,
    etas: Sequence[float] = ETAS,
    splits: int = 20,
    seed: int = 0,
) -> SubspaceOverlap:
    """Compare every two prompt sets within each checkpoint, and each set across checkpoints.

    `activations[model][set]` holds the rows `[layer, prompt, d_model]` of the same prompts in every
    checkpoint. `layers` are their numbers, `topics[set]` each prompt's topic (by default a topic
    each; sets may share topics, as twins do): the two halves of a split share none.
    """
    models, names = _checked(activations, etas, splits)
    first = activations[models[0]]
    n_layers, _, width = first[names[0]].shape
    layers = tuple(range(n_layers) if layers is None else layers)
    if len(layers) != n_layers:
        raise ValueError(f"{len(layers)} layer numbers for {n_layers} layers: give one for each")
    own = {s: list((topics or {}).get(s) or (f"{s}-{i}" for i in range(first[s].shape[1])))
           for s in names}  # fmt: skip
    halves = halves_by_topic(own, splits, seed)
    comparisons = [
        (Side(m, a), Side(m, b))
        for m in models
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    ] + [(Side(m, s), Side(models[0], s)) for m in models[1:] for s in names]
    sizes = [
        min(len(h) for pair in (*halves[a.prompts], *halves[b.prompts]) for h in pair)
        for a, b in comparisons
    ]
    shape = (len(comparisons), 2, n_layers, len(etas))
    k = torch.zeros(*shape, 2, dtype=torch.long)
    overlap, null, null_high = (torch.zeros(shape) for _ in range(3))
    angle, between, ceiling = (torch.zeros(*shape, 3) for _ in range(3))
    unchanged = torch.zeros(len(comparisons), n_layers, dtype=torch.bool)
    for layer in range(n_layers):
        rows = joint({Side(m, s): activations[m][s][layer] for m in models for s in names})
        for form in range(2):
            made = Spans(rows, bool(form), etas)
            for c, (a, b) in enumerate(comparisons):
                x, y = activations[a.model][a.prompts], activations[b.model][b.prompts]
                same = torch.equal(x[layer], y[layer]) if x.shape == y.shape else False
                unchanged[c, layer] = same
                whole = made.of(a), made.of(b)
                drawn = made.splits(a, b, halves, sizes[c])
                for e in range(len(etas)):
                    at = (c, form, layer, e)
                    Q = [span.at(e) for span in whole]
                    sides = Q[0].shape[1], Q[1].shape[1]
                    k[at] = torch.tensor(sides)
                    chance = bases.overlap_null(*sides, width)
                    null[at], null_high[at] = chance.mean, chance.high
                    overlap[at] = 1.0 if same else bases.mode_overlap(*Q)
                    angles = bases.principal_angles(*Q).rad2deg()
                    angle[at] = torch.stack([angles[0], angles.median(), angles[-1]])
                    if same:
                        angle[at] = 0.0
                    for found, values in zip((between, ceiling), drawn[e], strict=True):
                        found[at] = band(values)
    notes = [
        f"{s} has {len(own[s])} prompts for {width} dimensions: its subspaces have at most "
        f"{len(own[s])}, and overlaps of halves fall short of 1 by sampling alone"
        for s in names if len(own[s]) < width
    ]  # fmt: skip
    notes += [
        f"{s} has {len(set(own[s]))} topics: bands over splits of fewer than {FEW_GROUPS} are a "
        "rough guide"
        for s in names if len(set(own[s])) < FEW_GROUPS
    ]  # fmt: skip
    return SubspaceOverlap(
        comparisons=tuple((a.model, a.prompts, b.model, b.prompts) for a, b in comparisons),
        layers=layers,
        etas=tuple(etas),
        width=width,
        prompts=tuple((s, len(own[s])) for s in names),
        half=tuple(sizes),
        k=k,
        overlap=overlap,
        null=null,
        null_high=null_high,
        angle=angle,
        between=between,
        ceiling=ceiling,
        unchanged=unchanged,
        notes=tuple(notes),
    )


def _named(name: str, of: Sequence[str], values: Tensor) -> dict[str, float]:
    return {f"{name}_{which}": float(v) for which, v in zip(of, values, strict=True)}


def _checked(
    activations: Mapping[str, Sets], etas: Sequence[float], splits: int
) -> tuple[list[str], list[str]]:
    models = list(activations)
    if not models or not activations[models[0]]:
        raise ValueError("no activations were given: give {model: {set: [layer, prompt, width]}}")
    names = list(activations[models[0]])
    if len(models) * len(names) < 2:
        raise ValueError(
            f"only {names[0]} of {models[0]} was given: there is nothing to compare it with, so "
            "give another prompt set or checkpoint"
        )
    if splits < 20:
        raise ValueError(f"{splits} splits were asked: a ceiling needs at least 20")
    if bad := [eta for eta in etas if not 0 < eta <= 1] or not etas:
        raise ValueError(f"energy shares {bad or ()}: give shares above 0, at most 1")
    for model, sets in activations.items():
        if list(sets) != names:
            raise ValueError(
                f"{model} has the sets {list(sets)}, {models[0]} {names}: give the same"
            )
        for name, x in sets.items():
            check_finite(x, f"the activations of {name} in {model}")
            if x.shape != activations[models[0]][name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)} in {model} and "
                    f"{tuple(activations[models[0]][name].shape)} in {models[0]}: capture the same "
                    "prompts and layers in every checkpoint"
                )
            if x.shape[1] < 4:
                raise ValueError(f"{name} has {x.shape[1]} prompts: two halves need at least 4")
    return models, names
