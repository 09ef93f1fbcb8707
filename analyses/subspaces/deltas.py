"""What one checkpoint changed against another: one tensor at a time, factored where it can be.

The alignment matrix is `difference(aligned, base)`, V = W_aligned - W_base; an update is
`difference(tuned, aligned)`, U = W_tuned - W_aligned (arXiv 2505.14185).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analyses.subspaces.adapters import LowRank
from analyses.subspaces.sources import Source, Which, in_float, open_source
from probes.results import Record, check_finite

Change = Tensor | LowRank
"""The difference of one weight: a tensor in float32 or float64, or factors in float64."""


@dataclass(frozen=True)
class Deltas:
    """Differences by weight name; each is read and formed when it is asked for, and not kept."""

    minuend: str
    subtrahend: str
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the differences, tied weights once, in the order of the checkpoint."""
    read: Callable[[str], Change]
    factored: bool
    """Whether every difference is one of adapters and has factors."""
    partial: bool = False
    """Whether only what adapters change is listed; all else is then equal."""
    notes: tuple[str, ...] = ()
    identify: Callable[[], tuple[str, str]] | None = None
    """Gives the fingerprints of both checkpoints; it reads their files, so only when asked."""

    @property
    def fingerprints(self) -> tuple[str, str]:
        """sha256 of minuend and subtrahend (see `sources.Source`); empty where none is known."""
        return ("", "") if self.identify is None else self.identify()

    def __getitem__(self, name: str) -> Change:
        if name not in self.shapes:
            raise KeyError(f"{self} has no weight {name!r}")
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __str__(self) -> str:
        return f"{self.minuend} - {self.subtrahend}"


def difference(minuend: Which, subtrahend: Which) -> Deltas:
    """The first checkpoint minus the second.

    Two adapters of one base, or an adapter and its base, give factored differences: exact, without
    the rounding of a merge, and quick. Everything else is read one tensor at a time in float32 (or
    float64), so that memory holds one tensor of each checkpoint, whatever the size of the model.
    Tied weights are counted once, vocabularies are cut to the rows both have (a note says so), and
    weights that one checkpoint lacks, or has in another shape, are refused by name.
    """
    a, b = open_source(minuend), open_source(subtrahend)
    if (a.adapter or b.adapter) and a.base == b.base:
        return _factored(a, b)
    if a.partial or b.partial or (a.adapter and b.adapter):
        raise ValueError(
            f"{a.label} is an adapter of {a.base or 'no named base'} and {b.label} of {b.base}: "
            "adapters are subtracted when they have one base; give MODEL+ADAPTER on the same MODEL"
        )
    _check_ties(a, b)
    shapes, notes = _common(a, b)
    if skipped := max(a.skipped, b.skipped):
        notes.append(f"{skipped} tensors hold no floating-point numbers and were left out.")

    def read(name: str) -> Change:
        found = _dense(a, name, shapes[name]) - _dense(b, name, shapes[name])
        check_finite(found, f"{name} of {a.label} - {b.label}")
        return found

    return Deltas(a.label, b.label, shapes, read, False, False, tuple(notes), _identifies(a, b))


def record_of(*given: Deltas, **settings: Any) -> Record:
    """The checkpoints that the differences are made of, in order, each pair minuend first."""
    return Record(
        models=tuple(label for d in given for label in (d.minuend, d.subtrahend)),
        fingerprints=tuple(found for d in given for found in d.fingerprints),
        settings=settings,
    )


def together(*given: Deltas) -> list[str]:
    """Names that all of several differences have, in order; refuses weights one of them lacks.

    What an adapter alone does not list is equal in both its checkpoints, so it is nothing.
    """
    full = [d for d in given if not d.partial]
    listed = list(dict.fromkeys(name for d in (full or given) for name in d))
    for d in given:
        lacking = [n for n in listed if n not in d.shapes] if not d.partial else []
        foreign = [n for n in d if n not in listed]
        other = [
            n
            for n in d
            if n in listed and any(o.shapes.get(n, d.shapes[n]) != d.shapes[n] for o in given)
        ]
        if odd := lacking or foreign or other:
            raise ValueError(
                f"{d} does not fit the other difference at {len(odd)} weights, the first "
                f"{odd[0]} ({d.shapes.get(odd[0], 'missing')}): all checkpoints must be of one model"
            )
    return listed


def changes(names: Sequence[str], *given: Deltas) -> Iterator[tuple[str, tuple[Change, ...]]]:
    """Each name with its difference in each of `given`; nothing is kept from one to the next."""
    for name in names:
        shape = next(d.shapes[name] for d in given if name in d.shapes)
        yield name, tuple(d[name] if name in d.shapes else _nothing(shape) for d in given)


def _factored(a: Source, b: Source) -> Deltas:
    shapes = {**b.shapes, **a.shapes}  # the same, unless both are adapters alone
    for name in (*a.adapter, *b.adapter):
        mine = {source.adapter[name].shape for source in (a, b) if name in source.adapter}
        if len(mine) > 1:
            raise ValueError(
                f"{name} has the shapes {sorted(mine)} in {a.label} and {b.label}: give adapters "
                "of one base"
            )

    def read(name: str) -> Change:
        if name not in a.adapter and name not in b.adapter:
            return _nothing(shapes[name])
        zero = LowRank.zeros(*shapes[name])
        return a.adapter.get(name, zero).minus(b.adapter.get(name, zero))

    return Deltas(a.label, b.label, shapes, read, True, a.partial, identify=_identifies(a, b))


def _identifies(a: Source, b: Source) -> Callable[[], tuple[str, str]]:
    return lambda: (a.fingerprint(), b.fingerprint())


def _nothing(shape: tuple[int, ...]) -> Change:
    return LowRank.zeros(*shape) if len(shape) == 2 else torch.zeros(shape)


def _dense(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight with its rows cut to the shape and an adapter added."""
    rows = slice(None, shape[0]) if shape else ...
    found = in_float(source.read(name)[rows].cpu())
    update = source.adapter.get(name)
    return found if update is None else found + in_float(update.dense())[rows].to(found.dtype)


def _check_ties(a: Source, b: Source) -> None:
    for mine, other in ((a, b), (b, a)):
        if untied := [name for name in mine.tied if name in other.shapes]:
            raise ValueError(
                f"{untied[0]} is tied to {mine.tied[untied[0]]} in {mine.label} and a weight of "
                f"its own in {other.label}: give checkpoints that are tied alike"
            )


def _common(a: Source, b: Source) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    only = [(n, b) for n in a.shapes if n not in b.shapes]
    only += [(n, a) for n in b.shapes if n not in a.shapes]
    if only:
        raise ValueError(
            f"{only[0][1].label} has no weight {only[0][0]!r} ({len(only)} weights are in one of "
            f"{a.label} and {b.label} only): give two checkpoints of one model"
        )
    shapes, cut = {}, []
    for name, shape in a.shapes.items():
        other = b.shapes[name]
        vocabulary = shape[:1] == (a.vocab_size,) and other[:1] == (b.vocab_size,)
        if shape != other and not (vocabulary and shape[1:] == other[1:]):
            raise ValueError(
                f"{name} has shape {shape} in {a.label} and {other} in {b.label}: give two "
                "checkpoints of one model"
            )
        shapes[name] = shape if shape == other else (min(shape[0], other[0]), *shape[1:])
        if shape != other:
            cut.append(f"{name} has {shape[0]} and {other[0]} rows")
    if not cut:
        return shapes, []
    return shapes, [f"{'; '.join(cut)}: vocabularies were cut to the rows that both have."]
