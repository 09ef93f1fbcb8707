"""`SteeringVector`: raw vectors at sites, an operation, and where they come from."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from probes.engines import Edit
from probes.model import HookedModel
from probes.sites import HEADED, Site, Sites, expand
from steering import artefact, vector_shown
from steering.artefact import Origin
from steering.edits import (
    ADDING,
    OPERATIONS,
    Scale,
    check_operation,
    check_strength,
    check_width,
    edit_of,
    function_of,
    gated,
    multiplier,
)
from steering.schedule import ALWAYS, Condition, Schedule

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KIND = "steering vector"


@dataclass(frozen=True)
class SteeringVector:
    """Vectors at sites with an operation. Nothing is scaled: the raw estimates are kept.

    `vector["12.resid_post"]` is the tensor at a site. Adding and subtracting vectors of one model
    joins their sites; multiplying scales. Apply it with `steer` or `model.generate(steer=...)`.
    """

    vectors: Mapping[Site, Float[Tensor, "*_rank _width"]] = field(repr=False)
    """One vector for adding; for the other operations one, or the rows of a subspace. `rotate`
    takes a plane: two rows, the angle counted from the first to the second."""
    origin: Origin
    operation: str = "add"
    values: Mapping[Site, Float[Tensor, "*_value"]] = field(default_factory=dict, repr=False)
    """clamp: the coordinates to set, one for each row. affine: the class mean, `[width]`.
    rotate, rotate_toward: the angle in degrees, one number."""
    scales: Mapping[Site, Scale] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(
                f"unknown operation {self.operation!r}: choose one of {', '.join(OPERATIONS)}"
            )
        if not self.vectors:
            raise ValueError("a steering vector needs a vector at one site at least")
        if any(not isinstance(site, Site) for site in self.vectors):
            raise TypeError(
                "sites of a steering vector are `Site`s: use Site.parse('12.resid_post')"
            )
        for site, vector in self.vectors.items():
            if site.part in HEADED and site.head is None:
                raise ValueError(f"{site} has several heads: name one, for example {site}.0")
            artefact.check_vector(site, vector, self.origin, "the steering vector")
            check_operation(self.operation, site, vector, self.values.get(site))
        for name in ("vectors", "values", "scales"):
            ordered = dict(sorted(getattr(self, name).items()))
            object.__setattr__(self, name, MappingProxyType(ordered))

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.vectors)

    def __getitem__(self, site: str | Site) -> Float[Tensor, "*rank width"]:
        site = Site.parse(site) if isinstance(site, str) else site
        site = site.resolve(self.origin.n_layers)
        if site not in self.vectors:
            raise KeyError(f"no vector at {site}: there are vectors at {_some(self.sites)}")
        return self.vectors[site]

    def norm(self, site: str | Site) -> float:
        """Length of the raw vector; of the first row for a subspace."""
        return float(self[site].reshape(-1, self[site].shape[-1])[0].double().norm())

    def at(self, sites: Sites) -> "SteeringVector":
        """The same at some of its sites only: `"12.resid_post"`, `"8-20.resid_post"`."""
        wanted = expand(sites, self.origin.n_layers)
        return self._with({site: self[site] for site in wanted})

    def doing(
        self, operation: str, values: Mapping[Site, Tensor] | Tensor | float | None = None
    ) -> "SteeringVector":
        """The same vectors under another operation; one value for all sites, or one for each.

        A value has the shape that `values` says; a plain number is that of a single row or angle.
        """
        if values is None or isinstance(values, Mapping):
            given = values or {}
        else:
            given = {site: torch.as_tensor(values, dtype=torch.float32) for site in self.sites}
        if operation == "clamp":
            given = {site: value.reshape(-1) for site, value in given.items()}
        made = replace(self, operation=operation, values=given)
        for site in self.sites:  # rows that are no basis are said here, not in the middle of a run
            function_of(operation, made[site], made.values.get(site))
        return made

    def everywhere(self, model: HookedModel) -> "SteeringVector":
        """Ablation of this one vector (or subspace) at every write to the residual stream.

        At the embedding, at what attention and at what the MLP adds, in every layer: the stream
        then never holds it (Arditi et al. 2024, section 2.4). The first write is the embedding, so
        a condition on it can only be read there (`0.resid_pre`), before any block has run.
        """
        if len(self.vectors) != 1:
            raise ValueError(
                f"one vector is ablated everywhere, this has {len(self.vectors)}: choose a site "
                "with `at`"
            )
        (vector,) = self.vectors.values()
        if vector.shape[-1] != model.d_model:
            raise ValueError(
                f"the vector has width {vector.shape[-1]}, the residual stream {model.d_model}"
            )
        sites = [Site(0, "resid_pre")]
        for layer, block in enumerate(model.layout.blocks):
            if not block.sums:
                sites.append(Site(layer, "resid_post"))
            sites += [Site(layer, part) for part in ("attn_out", "mlp_out") if part in block.points]
        return SteeringVector(dict.fromkeys(sites, vector), self.origin, "ablate")

    def edits(
        self,
        model: HookedModel,
        strength: float = 1.0,
        unit: str = "raw",
        schedule: Schedule = ALWAYS,
        condition: Condition | None = None,
    ) -> list[Edit]:
        """The edits that apply it to a model; none at all at strength 0, so that is bit-exact."""
        self.origin.check(model)
        if unit != "raw" and self.operation not in ADDING:
            raise ValueError(
                f"strength of {self.operation} is the share of the full operation, 0 to 1, and has "
                f"no unit {unit!r}: leave unit='raw'"
            )
        check_strength(self.operation, strength)
        if strength == 0:
            return []
        gate, edits = gated(model, condition, self.sites)
        for site, vector in self.vectors.items():
            check_width(model, site, vector)
            size = strength * multiplier(unit, vector, self.scales.get(site, Scale()), site)
            function = function_of(self.operation, vector, self.values.get(site))
            edits.append(edit_of(site, function, size, schedule, gate))
        return edits

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        return self._joined(other, "add", 1.0)

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self._joined(other, "subtract", -1.0)

    def __mul__(self, factor: float) -> "SteeringVector":
        return self._map(lambda v: v * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SteeringVector":
        if divisor == 0:
            raise ValueError("a steering vector cannot be divided by 0")
        return self._map(lambda v: v / divisor)

    def __neg__(self) -> "SteeringVector":
        return self._map(lambda v: -v)

    def save(self, path: Path | str) -> Path:
        """Write the artefact: one safetensors file with string metadata."""
        tensors = {str(site): vector for site, vector in self.vectors.items()}
        tensors |= {f"value.{site}": value for site, value in self.values.items()}
        extra = {
            "op": self.operation,
            "scales": {str(site): asdict(scale) for site, scale in self.scales.items()},
            "raw_norm": {str(site): self.norm(site) for site in self.sites},
            "unit": "raw",
        }
        return artefact.write(path, KIND, self.origin, tensors, extra)

    @classmethod
    def load(cls, path: Path | str) -> "SteeringVector":
        """Read what `save` wrote; a damaged, foreign or inconsistent file is refused."""
        origin, tensors, extra = artefact.read(path, KIND)
        try:
            values = {
                Site.parse(name.removeprefix("value.")): tensor
                for name, tensor in tensors.items()
                if name.startswith("value.")
            }
            vectors = {
                Site.parse(name): tensor
                for name, tensor in tensors.items()
                if not name.startswith("value.")
            }
            scales = {Site.parse(name): Scale(**scale) for name, scale in extra["scales"].items()}
            return cls(vectors, origin, extra["op"], values, scales)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the steering vector in {path} is damaged: {error}") from error

    def frame(self) -> "pd.DataFrame":
        """One row a site: rank, raw norm, sigma, mean norm of the stream, norm as its fraction."""
        import pandas as pd

        rows = []
        for site, vector in self.vectors.items():
            scale, norm = self.scales.get(site, Scale()), self.norm(site)
            rows.append(
                {
                    "site": str(site),
                    "rank": 1 if vector.ndim == 1 else len(vector),
                    "norm": norm,
                    "sigma": scale.sigma,
                    "stream_norm": scale.norm,
                    "fraction": norm / scale.norm if scale.norm else None,
                }
            )
        return pd.DataFrame(rows)

    def describe(self) -> str:
        """What it is in a few lines: operation, sites and norms, origin, how it was estimated."""
        return vector_shown.describe(self)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Raw norm by layer, beside the mean norm of the stream where that was measured."""
        return vector_shown.draw(self, ax)

    def __str__(self) -> str:
        return f"steering vector ({self.operation}) at {_some(self.sites)} of {self.origin.model}"

    def _repr_html_(self) -> str:
        import html

        table = self.frame().to_html(index=False, float_format="%.3f", border=0)
        return f"<p>{html.escape(str(self))}</p>{table}"

    def _with(self, vectors: Mapping[Site, Tensor]) -> "SteeringVector":
        kept = {
            name: {s: v for s, v in getattr(self, name).items() if s in vectors}
            for name in ("values", "scales")
        }
        return replace(self, vectors=vectors, **kept)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "SteeringVector":
        return self._with({site: function(vector) for site, vector in self.vectors.items()})

    def _joined(self, other: "SteeringVector", doing: str, sign: float) -> "SteeringVector":
        if not isinstance(other, SteeringVector):
            raise TypeError(f"cannot {doing} a SteeringVector and a {type(other).__name__}")
        self.origin.same_model(other.origin, doing)
        if self.operation != other.operation or self.operation not in ADDING:
            raise ValueError(
                f"cannot {doing} vectors for {self.operation!r} and {other.operation!r}: sums are "
                "defined for vectors that are added; bring both there with doing('add')"
            )
        vectors = dict(self.vectors)
        for site, vector in other.vectors.items():
            vectors[site] = vectors[site] + sign * vector if site in vectors else sign * vector
        # the spread was along another direction; the stream's norm is the site's own
        scales = {
            site: Scale(norm=(self.scales.get(site) or other.scales.get(site, Scale())).norm)
            for site in vectors
        }
        estimators = f"{self.origin.estimator} {'+' if sign > 0 else '-'} {other.origin.estimator}"
        origin = replace(self.origin, estimator=estimators, data_hash="")
        return replace(self, vectors=vectors, origin=origin, scales=scales)


def _some(sites: tuple[Site, ...]) -> str:
    if len(sites) <= 4:
        return ", ".join(map(str, sites))
    return f"{sites[0]}, {sites[1]}, ... {sites[-1]} ({len(sites)} sites)"
