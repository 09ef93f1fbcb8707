"""How many dimensions prompts take in the stream, and whether checkpoints arrange them alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.figures import legend_below
from analyses.subspaces import bases
from analyses.subspaces.activations_figure import whole_layers
from probes import figures
from probes.results import Result, check_finite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FORMS = ("uncentred", "centred")
GROUPS = 20
"""Parts left out in turn by the jackknife."""


@dataclass(frozen=True)
class Geometry(Result):
    """Effective dimensions of prompt sets by layer, and the likeness of checkpoints.

    Limits are those of a delete-a-group jackknife over topics (95 %, normal): a bootstrap holds
    rows twice, which lowers every rank and puts equal pairs into a CKA.
    """

    models: tuple[str, ...]
    sets: tuple[str, ...]
    prompts: tuple[int, ...]
    """Of each set; effective dimensions grow with them, so compare sets of one size."""
    layers: tuple[int, ...]
    effective_rank: Float[Tensor, "model set form layer 3"]
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007), low, high;
    forms are uncentred and centred."""
    participation: Float[Tensor, "model set form layer 3"]
    """(sum of variances)^2 / sum of squared variances along the axes, low, high."""
    cka: Float[Tensor, "model layer 3"]
    """Debiased linear CKA with the first checkpoint on all prompts together, low, high; 1 exactly
    where activations are equal. It does not see a rotation: see subspace angles for that."""
    cka_null: Float[Tensor, "model layer"]
    """95th percentile when the second checkpoint's prompts are permuted."""
    unchanged: Bool[Tensor, "model layer"]
    """Whether all activations equal the first checkpoint's bit for bit."""

    def frame(self) -> "pd.DataFrame":
        """One row per checkpoint, set, form and layer; the CKA stands in each of them."""
        import pandas as pd

        rows = []
        for m, model in enumerate(self.models):
            for s, name in enumerate(self.sets):
                for f, form in enumerate(FORMS):
                    for i, layer in enumerate(self.layers):
                        row = {"model": model, "set": name, "form": form, "layer": layer}
                        for what in ("effective_rank", "participation"):
                            row |= _limits(what, getattr(self, what)[m, s, f, i])
                        row |= _limits("cka", self.cka[m, i])
                        row["cka_null"] = float(self.cka_null[m, i])
                        row["unchanged"] = bool(self.unchanged[m, i])
                        rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None, *, prompts: str | None = None) -> "Axes":
        """Effective rank of one set (the first by default), centred, a curve a checkpoint."""
        s = 0 if prompts is None else self.sets.index(prompts)
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        with figures.theme():
            for m, model in enumerate(self.models):
                _curve(ax, self.layers, self.effective_rank[m, s, 1], model, m)
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel="effective rank (dimensions)",
                title=f"Dimensions of {self.sets[s]}, {self.prompts[s]} prompts",
            )
            legend_below(ax, "checkpoint, 95 % jackknife interval")
        return ax

    def plot_cka(self, ax: "Axes | None" = None) -> "Axes":
        """CKA with the first checkpoint by layer, with its null of permuted prompts."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        with figures.theme():
            for m, model in enumerate(self.models[1:], 1):
                _curve(ax, self.layers, self.cka[m], model, m)
            ax.plot(
                self.layers, self.cka_null.amax(0).numpy(), ls=":", color=figures.PALETTE[6],
                label="prompts permuted, 95 %",
            )  # fmt: skip
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel=f"debiased CKA with {self.models[0]}",
                title="Are prompts arranged alike?",
            )
            legend_below(ax, "checkpoint, 95 % jackknife interval")
        return ax

    def __str__(self) -> str:
        said = []
        for m, model in enumerate(self.models[1:], 1):
            least = int(self.cka[m, :, 0].argmin())
            if bool(self.unchanged[m].all()):
                said.append(f"{model} is identical to {self.models[0]}")
            else:
                said.append(
                    f"{model} CKA down to {self.cka[m, least, 0]:.2f} at layer {self.layers[least]}"
                )
        ranks = ", ".join(
            f"{name} {float(self.effective_rank[0, s, 1, -1, 0]):.0f}"
            for s, name in enumerate(self.sets)
        )
        where = f"layer {self.layers[-1]} of {self.models[0]}"
        return "; ".join([f"effective rank at {where}: {ranks}", *said])


def measure_geometry(
    activations: Mapping[str, Mapping[str, Float[Tensor, "layer _prompt d_model"]]],
    *,
    layers: Sequence[int] | None = None,
    topics: Mapping[str, Sequence[str]] | None = None,
    permutations: int = 100,
    seed: int = 0,
) -> Geometry:
    """Effective rank and participation ratio of every set, and CKA with the first checkpoint.

    `activations[model][set]` are rows of the same prompts in every checkpoint; `topics[set]` the
    topic of each (by default one each).
    """
    models, sets = tuple(activations), tuple(activations[next(iter(activations))])
    first = activations[models[0]]
    n_layers = len(first[sets[0]])
    if permutations < 20:
        raise ValueError(f"{permutations} permutations were asked: give at least 20")
    for model in models:
        for name in sets:
            check_finite(activations[model][name], f"the activations of {name} in {model}")
    generator = torch.Generator().manual_seed(seed)
    own = {s: list((topics or {}).get(s) or map(str, range(first[s].shape[1]))) for s in sets}
    parts = {s: _groups([own[s]], seed) for s in sets}
    # sets may share topics, as twins do: these are left out together
    pooled = _groups([[t if topics else f"{s}{t}" for t in own[s]] for s in sets], seed)
    rank, share = (torch.zeros(len(models), len(sets), 2, n_layers, 3) for _ in range(2))
    cka = torch.ones(len(models), n_layers, 3)
    null = torch.zeros(len(models), n_layers)
    unchanged = torch.zeros(len(models), n_layers, dtype=torch.bool)
    for layer in range(n_layers):
        origin = torch.cat([first[s][layer] for s in sets])
        for m, model in enumerate(models):
            for s, name in enumerate(sets):
                x = activations[model][name][layer].double()
                for form in range(2):
                    found = _jackknife(
                        lambda rows, x=x, form=form: _dimensions(x[rows], bool(form)), parts[name]
                    )
                    rank[m, s, form, layer], share[m, s, form, layer] = found
            rows = torch.cat([activations[model][s][layer] for s in sets])
            unchanged[m, layer] = torch.equal(rows, origin)
            X, Y = origin.double(), rows.double()
            null[m, layer] = torch.tensor(
                [
                    bases.linear_cka(
                        X, Y[torch.randperm(len(Y), generator=generator)], debiased=True
                    )
                    for _ in range(permutations)
                ]
            ).quantile(0.95)
            if not bool(unchanged[m, layer]):
                cka[m, layer] = _jackknife(
                    lambda rows, X=X, Y=Y: [bases.linear_cka(X[rows], Y[rows], debiased=True)],
                    pooled,
                )[0]
    return Geometry(
        models=models,
        sets=sets,
        prompts=tuple(first[s].shape[1] for s in sets),
        layers=tuple(range(n_layers) if layers is None else layers),
        effective_rank=rank,
        participation=share,
        cka=cka,
        cka_null=null,
        unchanged=unchanged,
    )


def _dimensions(x: Float[Tensor, "prompt d_model"], centred: bool) -> list[float]:
    """Effective rank and participation ratio, by the smaller Gram matrix."""
    x = x - x.mean(0) if centred else x
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return [bases.effective_rank(values), bases.participation_ratio(values)]


def _groups(topics: Sequence[Sequence[str]], seed: int) -> list[Tensor]:
    """Rows of random parts of the topics, of all sets together."""
    rows = [t for own in topics for t in own]
    known = sorted(set(rows))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    part = {topic: place % min(GROUPS, len(known)) for topic, place in
            zip(known, order, strict=True)}  # fmt: skip
    numbers = torch.tensor([part[t] for t in rows])
    return [(numbers == i).nonzero().flatten() for i in range(int(numbers.max()) + 1)]


def _jackknife(
    statistic: Callable[[Tensor], Sequence[float]], groups: Sequence[Tensor]
) -> Float[Tensor, "statistic 3"]:
    """Values and 95 % limits: 1.96 standard deviations of the delete-a-group jackknife."""
    everyone = torch.cat(list(groups)).sort().values
    left = torch.tensor(
        [list(statistic(everyone[~torch.isin(everyone, group)])) for group in groups],
        dtype=torch.float64,
    )
    g = len(groups)
    spread = 1.96 * ((g - 1) / g * (left - left.mean(0)).square().sum(0)).sqrt()
    value = torch.tensor(list(statistic(everyone)), dtype=torch.float64)
    return torch.stack([value, value - spread, value + spread], 1)


def _curve(ax: "Axes", layers: Sequence[int], values: Tensor, label: str, i: int) -> None:
    look = figures.style(i)
    x = list(layers)
    ax.fill_between(
        x, values[:, 1].numpy(), values[:, 2].numpy(), alpha=0.12, lw=0, color=look["color"]
    )
    ax.plot(x, values[:, 0].numpy(), label=label, **look)
    whole_layers(ax)


def _limits(name: str, values: Tensor) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values.tolist(), strict=True))
