"""LoFiT: choose the attention heads that matter for a task, then learn an offset for each.

Yin, Ye and Durrett 2024 (arXiv 2406.01563). `z` is a query head's output before the attention's
output projection, at every position of prompt and answer:

step A  `z <- (1 + A) * z` for all heads, task loss + l1 * sum |A|; heads are ranked by the norm of
        their A, which is then thrown away
step v  `z <- z + v` for the chosen heads, task loss alone

The result is a `HeadOffsets`: what ITI gives too, and what folds into a bias of the projection.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from probes.engines.modes import frozen_weights
from probes.model import HookedModel
from probes.results import check_finite
from probes.sites import Site
from steering.artefact import Origin
from steering.head_parameters import Head, HeadParameters, all_heads
from steering.head_selection import HeadSelection
from steering.offsets import HeadOffsets
from steering.preferences import Preference, apart
from steering.replay import CACHE_LIMIT
from steering.tuning import Task, Training, TrainingCurve, curve_fields, record_of, train

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


EVEN = 1.2
"""Largest norm over smallest below which heads are not told apart."""


@dataclass(frozen=True)
class HeadTuning:
    """The outcome of step v: offsets, and how their training went."""

    offsets: HeadOffsets
    curve: TrainingCurve

    def save(self, folder: Path | str) -> Path:
        """Write `offsets.safetensors` beside the saved curve."""
        folder = self.curve.save(folder)
        self.offsets.save(folder / "offsets.safetensors")
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> "HeadTuning":
        """Read what `save` wrote."""
        return cls(
            HeadOffsets.load(Path(folder) / "offsets.safetensors"), TrainingCurve.load(folder)
        )

    def frame(self) -> "pd.DataFrame":
        """One row a head: its offset's norm."""
        return self.offsets.frame()

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Norms of the offsets by layer and head; the losses are in `curve.plot`."""
        return self.offsets.plot(ax)

    def _repr_html_(self) -> str:
        return self.offsets._repr_html_()

    def __str__(self) -> str:
        return f"{self.offsets}; {self.curve}"


@dataclass(frozen=True)
class LoFiT:
    """Both steps."""

    selection: HeadSelection
    tuning: HeadTuning

    @property
    def offsets(self) -> HeadOffsets:
        """What to steer with."""
        return self.tuning.offsets

    def save(self, folder: Path | str) -> Path:
        """Write both steps into folders of their own."""
        self.selection.save(Path(folder) / "selection")
        self.tuning.save(Path(folder) / "tuning")
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str) -> "LoFiT":
        """Read what `save` wrote."""
        return cls(
            HeadSelection.load(Path(folder) / "selection"),
            HeadTuning.load(Path(folder) / "tuning"),
        )

    def frame(self) -> "pd.DataFrame":
        """One row a head of step A: rank, layer, head, norm of its scaling, whether it is used."""
        table = self.selection.frame()
        used = [
            pair in self.offsets.heads for pair in zip(table["layer"], table["head"], strict=True)
        ]
        return table.assign(used=used)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The heads by step A; the losses are in `tuning.curve.plot`."""
        return self.selection.plot(ax)

    def _repr_html_(self) -> str:
        return self.tuning._repr_html_()

    def __str__(self) -> str:
        return f"LoFiT: {self.tuning}"


def select_heads(
    model: HookedModel,
    examples: Sequence[Preference],
    *,
    training: Training | None = None,
    l1: float = 5e-4,
    layers: Sequence[int] | None = None,
    cache_limit: int = CACHE_LIMIT,
    progress: bool = True,
) -> HeadSelection:
    """Step A: rank heads by the norm of a learned scaling under an L1 penalty.

    `l1` is the factor of the sum of all |A|; the default and the learning rate of 5e-3 are those
    of TruthfulQA with Llama-2-7B. `layers` leaves the heads of other layers out. A penalty that
    holds every A at its starting noise leaves a ranking of noise, and a warning.
    """
    training = training or Training(lr=5e-3)
    if l1 < 0:
        raise ValueError(f"the L1 factor is {l1}: give 0 or more")
    heads = list(all_heads(model.layout))
    if layers is not None:
        wanted = {Site(layer, "head_out").resolve(model.n_layers).layer for layer in layers}
        without = wanted - {layer for layer, _ in heads}
        if without or not wanted:
            raise ValueError(
                f"layers {sorted(without) or list(layers)} of {model.name} have no attention heads: give "
                f"some of {model.layout.supported('head_out')}"
            )
        heads = [at for at in heads if at[0] in wanted]
    with frozen_weights(model.model):
        task = Task(model, examples, training, min(heads)[0], cache_limit)
        A = HeadParameters(model, heads, training.noise, training.seed)
        begun = max(A.norms().values())
        with A.acting(scale=True):
            trained = train(
                A.parameters, task, training, penalty=lambda: l1 * A.size(), progress=progress
            )
    found = A.norms()
    check_finite(torch.tensor(list(found.values())), "the learned scaling of the heads")
    norms = torch.full((model.n_layers, 1 + max(head for _, head in heads)), torch.nan)
    for at, norm in found.items():
        norms[at] = norm
    fields = curve_fields(trained, A.parameters, task)
    low, high = min(found.values()), max(found.values())
    # in a few steps a strong penalty moves all numbers by the learning rate, each to its other side
    if l1 and (high <= begun or high < EVEN * low):
        note = (
            f"the L1 penalty of {l1:g} left the scaling of all heads alike (norms {low:.2g} to "
            f"{high:.2g}, {begun:.2g} at most before), so the ranking is noise: use a smaller l1, "
            "or more steps"
        )
        warnings.warn(note, stacklevel=2)
        fields["notes"] = (*fields["notes"], note)
    record = record_of(model, task, training, step="A", l1=l1)
    return HeadSelection(**fields, norms=norms, record=record)


def fit_offsets(
    model: HookedModel,
    examples: Sequence[Preference],
    heads: Sequence[Head],
    *,
    training: Training | None = None,
    validation: Sequence[Preference] | None = None,
    estimator: str = "LoFiT",
    cache_limit: int = CACHE_LIMIT,
    progress: bool = True,
) -> HeadTuning:
    """Step v: learn one offset for each of these heads, wherever they were taken from.

    Blocks below the lowest of them run once per example; `cache_limit` bounds the memory that
    takes (tokens x d_model numbers of the model's dtype). Only the offsets get gradients and
    nothing of the model changes.
    """
    training = training or Training()
    apart(examples, validation or ())
    heads = _checked(model, heads)
    origin = Origin.of(model, estimator=estimator, positions="all")
    first = min(heads)[0]
    with frozen_weights(model.model):
        task = Task(model, examples, training, first, cache_limit)
        held = None
        if validation is not None:
            held = Task(model, validation, training, task.replay.first, cache_limit)
        v = HeadParameters(model, heads, training.noise, training.seed)
        with v.acting(scale=False):
            trained = train(v.parameters, task, training, validation=held, progress=progress)
    offsets = HeadOffsets(v.vectors(), replace(origin, data_hash=task.hash))
    fields = curve_fields(trained, v.parameters, task)
    return HeadTuning(offsets, TrainingCurve(**fields, record=record_of(model, task, training)))


def lofit(
    model: HookedModel,
    examples: Sequence[Preference],
    k: int,
    *,
    selecting: Training | None = None,
    training: Training | None = None,
    l1: float = 5e-4,
    validation: Sequence[Preference] | None = None,
    cache_limit: int = CACHE_LIMIT,
    progress: bool = True,
) -> LoFiT:
    """Both steps: rank all heads, then learn offsets for the first `k`.

    The paper takes 3 % or 10 % of the heads; fewer heads want a larger learning rate.
    """
    selection = select_heads(
        model, examples, training=selecting, l1=l1, cache_limit=cache_limit, progress=progress
    )
    tuning = fit_offsets(
        model,
        examples,
        selection.top(k),
        training=training,
        validation=validation,
        cache_limit=cache_limit,
        progress=progress,
    )
    return LoFiT(selection, tuning)


def _checked(model: HookedModel, heads: Sequence[Head]) -> list[Head]:
    """The heads in forward order; doubles, heads that do not exist and mixed widths are errors."""
    found = sorted((int(layer), int(head)) for layer, head in heads)
    if not found:
        raise ValueError("no heads were given: give (layer, head) pairs, at least one")
    if len(set(found)) < len(found):
        double = next(at for at in found if found.count(at) > 1)
        raise ValueError(f"head {double} is given twice: give each head once")
    sites = [Site(layer, "head_out", head).resolve(model.n_layers) for layer, head in found]
    for site in sites:
        model.layout.check(site)
    usual = model.layout.width(Site(model.layout.supported("head_out")[0], "head_out"))
    for site in sites:
        if model.layout.width(site) != usual:
            raise ValueError(
                f"the heads of layer {site.layer} of {model.name} are {model.layout.width(site)} "
                f"wide and the first ones {usual}: offsets of one file have one width, so give "
                "heads of layers with that width"
            )
    return [(site.layer, site.head) for site in sites if site.head is not None]
