"""Subspaces of prompt sets and of their random halves, in one layer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.subspaces import bases

Halves = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
"""Row numbers of the two halves of every set, one pair a split."""


class Side(NamedTuple):
    """One of two things compared: the activations of a prompt set in a checkpoint."""

    model: str
    prompts: str


class Span(NamedTuple):
    """Singular directions of some rows, strongest first."""

    axes: Float[Tensor, "d k"]
    ranks: tuple[int, ...]
    """How many of them hold each share of the energy."""

    def at(self, e: int) -> Float[Tensor, "d k"]:
        """The fewest that hold the e-th share of the energy."""
        return self.axes[:, : self.ranks[e]]

    def overlaps(self, other: "Span") -> list[float]:
        """`bases.mode_overlap` of both at every share of the energy, from one product."""
        squares = (self.axes.T @ other.axes).square()
        return [
            min(1.0, float(squares[:k, :m].sum()) / min(k, m))
            for k, m in zip(self.ranks, other.ranks, strict=True)
        ]


class Spans:
    """Singular directions of the rows of one layer; each asked for is computed once."""

    def __init__(
        self,
        rows: Mapping[Side, Float[Tensor, "_prompt rank"]],
        centred: bool,
        etas: Sequence[float],
    ) -> None:
        self.rows, self.centred, self.etas = rows, centred, etas
        self._known: dict[tuple, Span] = {}

    def of(self, side: Side, rows: Tensor | None = None) -> Span:
        """Of all rows of a side, or of some."""
        key = (side, () if rows is None else tuple(rows.tolist()))
        if key not in self._known:
            given = self.rows[side] if rows is None else self.rows[side][rows]
            x = given - given.mean(0) if self.centred else given
            if not x.norm() > 1e-10 * given.norm():  # what centring leaves of equal rows: rounding
                raise ValueError(
                    f"the {len(x)} activations of {side.prompts} in {side.model} are all the same: "
                    "a centred subspace needs prompts that differ"
                )
            axes, values = bases.thin_svd(x.T)
            ranks = tuple(bases.energy_rank(values, eta) for eta in self.etas)
            self._known[key] = Span(axes, ranks)
        return self._known[key]

    def splits(
        self, a: Side, b: Side, halves: Halves, size: int
    ) -> list[tuple[list[float], list[float]]]:
        """For each eta the overlaps between the sides and those within one, over the splits.

        `size` rows of each half are used. A half of one side meets the half of *other* topics of
        the other side, as two halves of one side do.
        """
        found: list[tuple[list[float], list[float]]] = [([], []) for _ in self.etas]
        for one, two in zip(halves[a.prompts], halves[b.prompts], strict=True):
            spans = [self.of(a, h[:size]) for h in one] + [self.of(b, h[:size]) for h in two]
            A1, A2, B1, B2 = spans
            for pair, place in (((A1, B2), 0), ((A2, B1), 0), ((A1, A2), 1), ((B1, B2), 1)):
                for e, value in enumerate(pair[0].overlaps(pair[1])):
                    found[e][place].append(value)
        return found


def joint(
    rows: Mapping[Side, Float[Tensor, "_prompt d_model"]],
) -> dict[Side, Float[Tensor, "_prompt rank"]]:
    """Coordinates in a basis of all rows together, float64: lengths and angles stay, and where
    prompts are fewer than dimensions every decomposition is smaller."""
    everything = torch.cat([x.double() for x in rows.values()])
    if everything.shape[0] >= everything.shape[1]:
        return {side: x.double() for side, x in rows.items()}
    basis = torch.linalg.qr(everything.T).Q
    return {side: x.double() @ basis for side, x in rows.items()}


def halves_by_topic(topics: Mapping[str, Sequence[str]], splits: int, seed: int) -> Halves:
    """Random halves of each set by whole topics; a topic lies in the same half of every set that
    has it.

    Topics that stand in the same sets are halved among themselves. An odd one goes where fewer of
    its sets' topics are, so that the halves of a set differ by few topics.
    """
    generator = torch.Generator().manual_seed(seed)
    alike: dict[tuple[str, ...], list[str]] = {}
    for topic in sorted({t for own in topics.values() for t in own}):
        alike.setdefault(tuple(name for name in topics if topic in topics[name]), []).append(topic)
    if single := [name for name, own in topics.items() if len(set(own)) < 2]:
        raise ValueError(f"{single[0]} has one topic only: halves by topic need at least 2")
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in topics}
    for _ in range(splits):
        first: set[str] = set()
        ahead = dict.fromkeys(topics, 0)  # topics that the first half of a set has too many
        for sets, members in alike.items():
            order = [members[i] for i in torch.randperm(len(members), generator=generator)]
            take = len(order) // 2
            if len(order) % 2:
                more = sum(ahead[name] for name in sets) < 0
                take += more
                for name in sets:
                    ahead[name] += 1 if more else -1
            first.update(order[:take])
        for name, own in topics.items():
            inside = torch.tensor([t in first for t in own])
            found[name].append((inside.nonzero().flatten(), (~inside).nonzero().flatten()))
    return found


def band(values: Sequence[float]) -> Float[Tensor, " 3"]:
    """Mean, 5th and 95th percentile."""
    x = torch.tensor(values, dtype=torch.float64)
    return torch.stack([x.mean(), x.quantile(0.05), x.quantile(0.95)])
