"""What a sweep applies: vectors, sites, operations and strengths, and the nulls that match them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from probes.sites import Site
from steering.applied import Steering
from steering.edits import ADDING
from steering.schedule import ALWAYS, Condition, Schedule
from steering.vector import SteeringVector


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep."""

    vector: str
    site: str
    operation: str
    strength: float

    def __str__(self) -> str:
        return f"{self.vector} ({self.operation}) at {self.site}, strength {self.strength:g}"


@dataclass(frozen=True)
class Grid:
    """Every vector at every site, under every operation, with every strength.

    A null vector is applied as its cell's vector is, brought to that vector's norm at each site;
    a null with one site only stands at all sites of the cell (for ablation everywhere, say).
    """

    vectors: Mapping[str, SteeringVector] = field(repr=False)
    strengths: Sequence[float] | Mapping[str, Sequence[float]]
    """For all operations, or for each by its name."""
    sites: Sequence[str] | None = None
    """Each is one setting: `"12.resid_post"`, or `"8-12.resid_post"` for five at once. None: all
    sites of each vector at once."""
    operations: Sequence[str] | None = None
    """Operations that need no value; None: each vector's own."""
    unit: str = "raw"
    """Of the strengths of operations that add."""
    nulls: Mapping[str, Sequence[SteeringVector]] = field(default_factory=dict, repr=False)
    """By kind: random directions (`steering.nulls.random_vectors`), shuffled labels, an unrelated
    concept."""
    schedule: Schedule = ALWAYS
    condition: Condition | None = None

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("there is nothing to sweep: give at least one vector")
        if not self._cells():
            raise ValueError(
                f"no setting is left to sweep: sites {self.sites}, operations {self.operations}, "
                f"strengths {self.strengths}; give one of each at least"
            )
        if len(set(self._cells())) < len(self._cells()):
            raise ValueError("a setting of the sweep is named twice: leave doubles out")

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All settings: by vector, site and operation, strengths in the order given."""
        return tuple(self._cells())

    def _cells(self) -> list[Cell]:
        found = []
        for name, vector in self.vectors.items():
            for site in [None] if self.sites is None else self.sites:
                at = _named(vector) if site is None else site
                for operation in self.operations or [vector.operation]:
                    given = self.strengths
                    if isinstance(given, Mapping):
                        if operation not in given:
                            raise ValueError(
                                f"no strengths for {operation!r}: there are some for "
                                f"{', '.join(map(repr, given)) or 'nothing'}"
                            )
                        given = given[operation]
                    found += [Cell(name, at, operation, float(s)) for s in given]
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each null, one entry a null vector."""
        return tuple(kind for kind, many in self.nulls.items() for _ in many)

    def steering(self, cell: Cell) -> Steering:
        """What a setting applies."""
        return self._steering(cell, self._vector(cell))

    def null(self, cell: Cell) -> list[Steering]:
        """What the nulls of a setting apply, in the order of `kinds`."""
        vector = self._vector(cell)
        return [
            self._steering(cell, matched(null, vector))
            for many in self.nulls.values()
            for null in many
        ]

    def _vector(self, cell: Cell) -> SteeringVector:
        vector = self.vectors[cell.vector]
        if self.sites is not None:
            vector = vector.at(cell.site)
        return vector if cell.operation == vector.operation else vector.doing(cell.operation)

    def _steering(self, cell: Cell, vector: SteeringVector) -> Steering:
        unit = self.unit if cell.operation in ADDING else "raw"
        return Steering(vector, cell.strength, unit, self.schedule, self.condition)


def matched(null: SteeringVector, vector: SteeringVector) -> SteeringVector:
    """The null's directions with the norms, sites, operation and scales of `vector`."""
    vectors: dict[Site, Tensor] = {}
    for site, own in vector.vectors.items():
        found = null.vectors.get(site)
        if found is None and len(null.vectors) == 1:
            (found,) = null.vectors.values()
        if found is None or found.shape != own.shape:
            has = "none" if found is None else f"one of shape {tuple(found.shape)}"
            raise ValueError(
                f"a null needs a vector of shape {tuple(own.shape)} at {site} and has {has}: make "
                "nulls from the vector that is swept, at all its sites"
            )
        lengths = own.double().norm(dim=-1, keepdim=True)
        now = found.double().norm(dim=-1, keepdim=True)
        vectors[site] = (found.double() * lengths / now).float()
    return replace(vector, vectors=vectors)


def _named(vector: SteeringVector) -> str:
    sites = vector.sites
    return str(sites[0]) if len(sites) == 1 else f"{sites[0]} ... {sites[-1]} ({len(sites)} sites)"
