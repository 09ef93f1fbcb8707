"""Is a concept still where it was? The class contrast of one checkpoint in the subspace of another.

The contrast of a topic is the difference of its twins' activations. The strongest directions of the
reference's contrasts span its subspace, fitted on training topics; how much of a checkpoint's
contrasts on *test* topics lies in it is compared with the same in the checkpoint's own subspace,
which is the most that so many topics can find.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.figures import legend_below
from analyses.subspaces import bases
from analyses.subspaces.activations_figure import whole_layers
from probes import figures
from probes.results import Result, check_finite
from probes.scores import bca
from probes.splits import FEW_GROUPS, codes, twins

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_COLUMNS = ("captured", "own", "retained", "null", "cosine", "cosine_own", "cosine_null")


@dataclass(frozen=True)
class ConceptSubspace(Result):
    """Where each checkpoint's class contrast lies, seen from the reference's subspace."""

    models: tuple[str, ...]
    """The first is the reference."""
    layers: tuple[int, ...]
    rank: int
    topics: tuple[int, int]
    """Training and test topics."""
    captured: Float[Tensor, "model layer"]
    """Share of the squared length of the checkpoint's test contrasts inside the reference's
    training subspace, 0 to 1."""
    own: Float[Tensor, "model layer"]
    """The same inside the checkpoint's own training subspace: the ceiling."""
    retained: Float[Tensor, "model layer 3"]
    """captured / own with its 95 % BCa limits over test topics; 1 where the concept is where it
    was (exactly 1 for equal activations), and it may exceed 1."""
    null: Float[Tensor, "model layer"]
    """95th percentile of captured / own for subspaces of differences between random training
    prompts of the negative class, which vary in everything but the concept. (Labels swapped within
    topics turn differences round, which changes no subspace.)"""
    cosine: Float[Tensor, "model layer 3"]
    """Cosine of the reference's mean training contrast with the checkpoint's mean test contrast,
    with 95 % BCa limits over test topics, -1 to 1."""
    cosine_own: Float[Tensor, "model layer"]
    """The same with the checkpoint's own training contrast: what sampling leaves of 1."""
    cosine_null: Float[Tensor, "model layer"]
    """95th percentile of the cosine when test labels are swapped within topics at random."""
    unchanged: Bool[Tensor, "model layer"]
    """Whether all activations equal the reference's bit for bit."""
    notes: tuple[str, ...] = ()

    def still(self, model: str) -> Bool[Tensor, " layer"]:
        """Where the concept can be claimed to lie in the reference's subspace: the interval of
        `retained` is above the null."""
        m = self.models.index(model)
        return self.retained[m, :, 1] > self.null[m]

    def moved(self, model: str) -> Bool[Tensor, " layer"]:
        """Where some of it has left: the whole interval of `retained` lies below 1. Both this and
        `still` can hold."""
        return self.retained[self.models.index(model), :, 2] < 1

    def frame(self) -> "pd.DataFrame":
        """One row per checkpoint and layer; angles in degrees beside their cosines."""
        import pandas as pd

        rows = []
        for m, model in enumerate(self.models):
            still, moved = self.still(model), self.moved(model)
            for i, layer in enumerate(self.layers):
                row: dict[str, object] = {"model": model, "layer": layer}
                for name in _COLUMNS:
                    value = getattr(self, name)[m, i]
                    if value.ndim:
                        names = (name, f"{name}_low", f"{name}_high")
                        row |= dict(zip(names, value.tolist(), strict=True))
                    else:
                        row[name] = float(value)
                row["angle"] = float(self.cosine[m, i, 0].clamp(-1, 1).acos().rad2deg())
                row["angle_own"] = float(self.cosine_own[m, i].clamp(-1, 1).acos().rad2deg())
                row |= {"still": bool(still[i]), "moved": bool(moved[i])}
                row["unchanged"] = bool(self.unchanged[m, i])
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """`retained` by layer for every checkpoint but the reference, with its null."""
        label = f"contrast kept in the subspace of\n{self.models[0]} (1: as much as in one's own)"
        ax = self._draw(ax, self.retained, self.null, label, "null: pairs of negatives, 95 %")
        with figures.theme():
            ax.axhline(1.0, color=figures.PALETTE[6], lw=0.8)
            ax.set_title(f"Is it still where it was? Rank {self.rank}")
        return ax

    def plot_cosine(self, ax: "Axes | None" = None) -> "Axes":
        """Cosine of the mean contrasts by layer; dashed what sampling leaves of 1."""
        label = f"cosine with the direction of\n{self.models[0]} (other topics)"
        ax = self._draw(ax, self.cosine, self.cosine_null, label, "null: shuffled labels, 95 %")
        with figures.theme():
            for m in range(1, len(self.models)):
                color = figures.style(m)["color"]
                ax.plot(list(self.layers), self.cosine_own[m].numpy(), ls="--", lw=1, color=color)
            ax.set_title("Does it point where it did? (dashed: itself)")
        return ax

    def _draw(
        self, ax: "Axes | None", values: Tensor, null: Tensor, label: str, chance: str
    ) -> "Axes":
        ax = figures.axes(ax, 5.4, 4.0)  # room for a legend below
        x = list(self.layers)
        with figures.theme():
            for m, model in enumerate(self.models[1:], 1):
                look = figures.style(m)
                low, high = values[m, :, 1].numpy(), values[m, :, 2].numpy()
                ax.fill_between(x, low, high, alpha=0.12, lw=0, color=look["color"])
                ax.plot(x, values[m, :, 0].numpy(), label=model, **look)
                ax.plot(x, null[m].numpy(), ls=":", lw=1, color=look["color"])
            ax.plot([], [], ls=":", lw=1, color=figures.PALETTE[6], label=chance)
            whole_layers(ax)
            ax.set(xlabel="layer (0 is the first block)", ylabel=label)
            legend_below(ax, "checkpoint, 95 % interval over topics")
        return ax

    def __str__(self) -> str:
        said = []
        for m, model in enumerate(self.models[1:], 1):
            if bool(self.unchanged[m].all()):
                said.append(f"{model} is identical to it: exactly 1 at every layer")
                continue
            least = int(self.retained[m, :, 0].argmin())
            value, low, high = self.retained[m, least].tolist()
            said.append(
                f"{model} keeps {value:.2f} [{low:.2f}, {high:.2f}] at layer "
                f"{self.layers[least]}, its least (null {float(self.null[m, least]):.2f})"
            )
        where = f"the rank-{self.rank} subspace of {self.models[0]}"
        return f"class contrast in {where}: " + "; ".join(said)


def measure_concept(
    activations: Mapping[str, Float[Tensor, "layer prompt d_model"]],
    labels: Bool[Tensor, " prompt"],
    topics: Sequence[str],
    *,
    train: Int[Tensor, " train"],
    test: Int[Tensor, " test"],
    rank: int = 4,
    layers: Sequence[int] | None = None,
    draws: int = 100,
    resamples: int = 500,
    seed: int = 0,
) -> ConceptSubspace:
    """Compare the class contrasts of checkpoints on the same twin prompts.

    The first checkpoint is the reference. Each topic holds as many prompts of one class as of the
    other; no topic may be in both parts.
    """
    models = tuple(activations)
    reference = activations[models[0]]
    n_layers = len(reference)
    pairs = {"train": _pairs(labels, topics, train), "test": _pairs(labels, topics, test)}
    if shared := {topics[int(i)] for i in train} & {topics[int(i)] for i in test}:
        raise ValueError(
            f"topic {min(shared)!r} is in train and in test: subspaces are fitted on other topics "
            "than they are measured on"
        )
    n_train = len(pairs["train"][0])
    numbers, known = codes([topics[int(i)] for i in pairs["test"][0]])
    n_test = len(known)
    if not 1 <= rank <= min(n_train // 2, reference.shape[2]):
        raise ValueError(
            f"rank {rank} was asked of {n_train} contrasts of width {reference.shape[2]}: give 1 "
            "to half as many as there are contrasts, at most the width"
        )
    if n_test < 3 or draws < 20:
        raise ValueError(
            f"{n_test} test topics and {draws} draws of the null were given: an interval needs at "
            "least 3 topics, a null at least 20 draws"
        )
    for model, x in activations.items():
        check_finite(x, f"the activations of {model}")
        if x.shape != reference.shape:
            raise ValueError(
                f"{model} has activations of shape {tuple(x.shape)}, {models[0]} of "
                f"{tuple(reference.shape)}: capture the same prompts and layers in both"
            )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_test, (resamples, n_test), generator=generator)
    counts = torch.zeros(resamples, n_test, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    # pairs of one topic come and go, and are turned round, together
    boot, left = counts[:, numbers], 1 - torch.eye(n_test, dtype=torch.float64)[:, numbers]
    flips = (torch.randint(2, (draws, n_test), generator=generator).double() * 2 - 1)[:, numbers]
    apart = [_strangers(pairs["train"][1], topics, generator) for _ in range(draws)]
    found = {
        name: torch.zeros(len(models), n_layers, *((3,) if name in ("retained", "cosine") else ()))
        for name in _COLUMNS
    }
    unchanged = torch.zeros(len(models), n_layers, dtype=torch.bool)
    for layer in range(n_layers):
        base = reference[layer].double()
        before = _differences(base, pairs["train"])
        Q = bases.span(before.T, rank=rank)
        chance = [bases.span((base[a] - base[b]).T, rank=rank) for a, b in apart]
        for m, model in enumerate(models):
            x = activations[model][layer].double()
            same = torch.equal(activations[model][layer], reference[layer])
            unchanged[m, layer] = same
            trained = before if same else _differences(x, pairs["train"])
            tested = _differences(x, pairs["test"])
            own = Q if same else bases.span(trained.T, rank=rank)
            inside, within = ((tested @ basis).square().sum(1) for basis in (Q, own))
            total = tested.square().sum()
            random = torch.stack([(tested @ basis).square().sum() for basis in chance])
            found["captured"][m, layer] = inside.sum() / total
            found["own"][m, layer] = within.sum() / total
            found["retained"][m, layer] = _limits(
                lambda w, a=inside, b=within: (w @ a) / (w @ b), boot, left
            )
            found["null"][m, layer] = (random / within.sum()).quantile(0.95)
            gram = tested @ tested.T
            for name, mean in (("cosine", before.mean(0)), ("cosine_own", trained.mean(0))):
                along = tested @ (mean / mean.norm())

                def cosine(w: Tensor, along: Tensor = along, gram: Tensor = gram) -> Tensor:
                    length = ((w @ gram) * w).sum(-1).clamp_min(1e-300).sqrt()
                    return (w @ along) / length

                if name == "cosine":
                    found[name][m, layer] = _limits(cosine, boot, left)
                    found["cosine_null"][m, layer] = cosine(flips).quantile(0.95)
                else:
                    found[name][m, layer] = cosine(torch.ones(len(numbers), dtype=torch.float64))
    notes = () if n_test >= FEW_GROUPS else (
        f"only {n_test} test topics: intervals over fewer than {FEW_GROUPS} are too narrow",
    )  # fmt: skip
    return ConceptSubspace(
        models=models,
        layers=tuple(range(n_layers) if layers is None else layers),
        rank=rank,
        topics=(len({topics[int(i)] for i in train}), len({topics[int(i)] for i in test})),
        unchanged=unchanged,
        notes=notes,
        captured=found["captured"],
        own=found["own"],
        retained=found["retained"],
        null=found["null"],
        cosine=found["cosine"],
        cosine_own=found["cosine_own"],
        cosine_null=found["cosine_null"],
    )


def _pairs(labels: Tensor, topics: Sequence[str], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the positive and of the negative members of the pairs."""
    high, low = twins(labels[rows], [topics[int(i)] for i in rows])
    if not len(high):
        raise ValueError(f"{len(rows)} rows hold no pair: give twins, both classes in each topic")
    return rows[high], rows[low]


def _strangers(
    rows: Tensor, topics: Sequence[str], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The rows in random pairs, each of two topics: those of one topic stand together, and half of
    all rows lies between the members of a pair."""
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    numbers, known = codes([topics[int(i)] for i in shuffled])
    place = torch.randperm(len(known), generator=generator)[numbers]
    order, half = shuffled[place.argsort(stable=True)], len(rows) // 2
    return order[:half], order[half : 2 * half]


def _differences(x: Tensor, pairs: tuple[Tensor, Tensor]) -> Float[Tensor, "pair d_model"]:
    found = x[pairs[0]] - x[pairs[1]]
    if not bool(found.any()):
        raise ValueError("every pair's activations are equal: there is no contrast to compare")
    return found


def _limits(
    statistic, boot: Float[Tensor, "resample pair"], left: Float[Tensor, "topic pair"]
) -> Float[Tensor, " 3"]:
    """Value and BCa limits of a statistic of weights over pairs; `left` leaves out each topic."""
    value = statistic(torch.ones(boot.shape[1], dtype=torch.float64))
    found = bca(value, statistic(boot), statistic(left))
    return torch.stack([t.reshape(()) for t in found])
