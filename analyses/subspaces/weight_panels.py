"""The panels of `alignlens subspace` that start from differences of weights."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from analyses.subspaces.deltas import Deltas, difference
from analyses.subspaces.panel import Panel, Say, Size, distinct, folder_names
from analyses.subspaces.projection_energy import projection_energy
from analyses.subspaces.selectivity import behaviours, selectivity
from analyses.subspaces.selectivity_figure import draw_tradeoff, figure
from analyses.subspaces.sources import open_source
from analyses.subspaces.weights import weight_overlap
from probes.model import HookedModel


def weight_panels(base: str, aligned: str, tuned: Sequence[str], say: Say) -> list[Panel]:
    """Energy of each update in the alignment's subspaces, and the overlap of both."""
    panels = []
    for folder, V, U in updates(base, aligned, tuned):
        say(f"weights of {U}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            energy = projection_energy(V, U, progress=False)
            overlap = weight_overlap(V, U, progress=False)
        panels += [
            Panel(f"weights-energy-{folder}", energy, {"energy": energy.plot()}),
            Panel(f"weights-overlap-{folder}", overlap, {"overlap": overlap.plot()}),
        ]
    return panels


def selectivity_panel(
    model: HookedModel, V: Deltas, U: Deltas, folder: Path, size: Size, draws: int, seed: int
) -> Panel:
    """Behaviour with parts of the update U added to the aligned model; finished cells lie in
    `folder`, which is that of the panel."""
    asked = behaviours(min(24, size.test), texts=min(24, size.texts))
    found = selectivity(model, V, U, folder / "cells", asked, draws=draws, seed=seed)
    drawn = {"unmatched": figure(found), "matched": figure(found, matched=True)}
    return Panel(folder.name, found, {**drawn, "tradeoff": draw_tradeoff(found)})


def updates(base: str, aligned: str, tuned: Sequence[str]) -> Iterator[tuple[str, Deltas, Deltas]]:
    """For each tuned model a folder's name, V = aligned - base and U = tuned - aligned, under
    labels that no two of the models share."""
    first, second, *others = labels = distinct([base, aligned, *tuned])
    V = dataclasses.replace(difference(aligned, base), minuend=second, subtrahend=first)
    for name, label in zip(tuned, others, strict=True):
        U = dataclasses.replace(difference(name, aligned), minuend=label, subtrahend=second)
        yield folder_names(labels)[label], V, U


def described(items: Sequence[str]) -> tuple[str, ...]:
    """Fingerprints of models by name, from their files."""
    return tuple(open_source(name).fingerprint() for name in items)
