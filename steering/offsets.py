"""`HeadOffsets`: one vector per attention head, added to the head's output (ITI, LoFiT)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from probes import figures
from probes.engines import Edit
from probes.model import HookedModel
from probes.sites import Site
from steering import artefact
from steering.artefact import Origin
from steering.edits import Scale, edit_of, function_of, gated, multiplier
from steering.schedule import ALWAYS, Condition, Schedule

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KIND = "head offsets"


@dataclass(frozen=True)
class HeadOffsets:
    """Offsets `(layer, head) -> vector`, added to `head_out` before the output projection.

    Heads are query heads, also under grouped queries. Being constant they equal a bias of the
    output projection (`steering.weights.fold_offsets`), so they cost nothing when served.
    """

    vectors: Mapping[tuple[int, int], Float[Tensor, " head_dim"]] = field(repr=False)
    origin: Origin
    scales: Mapping[tuple[int, int], Scale] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("head offsets need one head at least")
        for (layer, head), vector in self.vectors.items():
            site = Site(layer, "head_out", head)
            artefact.check_vector(site, vector, self.origin, "the head offsets")
        for name in ("vectors", "scales"):
            ordered = dict(sorted(getattr(self, name).items()))
            object.__setattr__(self, name, MappingProxyType(ordered))

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """The (layer, head) pairs, in forward order."""
        return tuple(self.vectors)

    @property
    def n_parameters(self) -> int:
        """Numbers in the offsets."""
        return sum(vector.numel() for vector in self.vectors.values())

    def __getitem__(self, head: tuple[int, int]) -> Float[Tensor, " head_dim"]:
        if head not in self.vectors:
            raise KeyError(f"no offset at layer {head[0]}, head {head[1]}")
        return self.vectors[head]

    def edits(
        self,
        model: HookedModel,
        strength: float = 1.0,
        unit: str = "raw",
        schedule: Schedule = ALWAYS,
        condition: Condition | None = None,
    ) -> list[Edit]:
        """The edits that apply them to a model, one a layer; none at strength 0."""
        self.origin.check(model)
        if strength == 0:
            return []
        sites = [Site(layer, "head_out") for layer in sorted({layer for layer, _ in self.heads})]
        gate, edits = gated(model, condition, sites)
        for site in sites:
            whole = self.layer(site.layer, unit)
            edits.append(edit_of(site, function_of("add", whole, None), strength, schedule, gate))
        return edits

    def layer(self, layer: int, unit: str = "raw") -> Float[Tensor, "head head_dim"]:
        """The offsets of one layer, zero at heads without one, for strength 1 in this unit."""
        rows = torch.zeros(self.origin.n_heads, self.origin.head_dim)
        for (at, head), vector in self.vectors.items():
            if at == layer:
                site, scale = Site(at, "head_out", head), self.scales.get((at, head), Scale())
                rows[head] = vector * multiplier(unit, vector, scale, site)
        return rows

    def randomised(self, n: int = 20, seed: int = 0) -> "list[HeadOffsets]":
        """`n` offsets at the same heads with the same norms and scales, in isotropic directions."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for i in range(n):
            drawn = {}
            for key, vector in self.vectors.items():
                new = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
                drawn[key] = (new * vector.double().norm() / new.norm()).to(vector.dtype)
            origin = replace(self.origin, estimator=f"random (seed {seed}, number {i})")
            made.append(replace(self, vectors=drawn, origin=origin))
        return made

    def __mul__(self, factor: float) -> "HeadOffsets":
        return replace(self, vectors={key: v * factor for key, v in self.vectors.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "HeadOffsets":
        return self * -1.0

    def save(self, path: Path | str) -> Path:
        """Write the artefact: one safetensors file with string metadata."""
        sites = {key: str(Site(key[0], "head_out", key[1])) for key in self.heads}
        extra = {
            "op": "add",
            "scales": {sites[key]: asdict(scale) for key, scale in self.scales.items()},
            "raw_norm": {sites[key]: float(v.norm()) for key, v in self.vectors.items()},
            "unit": "raw",
        }
        tensors = {sites[key]: vector for key, vector in self.vectors.items()}
        return artefact.write(path, KIND, self.origin, tensors, extra)

    @classmethod
    def load(cls, path: Path | str) -> "HeadOffsets":
        """Read what `save` wrote; a damaged, foreign or inconsistent file is refused."""
        origin, tensors, extra = artefact.read(path, KIND)
        try:
            vectors = {_key(name): tensor for name, tensor in tensors.items()}
            scales = {_key(name): Scale(**scale) for name, scale in extra["scales"].items()}
            return cls(vectors, origin, scales)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the head offsets in {path} are damaged: {error}") from error

    def frame(self) -> "pd.DataFrame":
        """One row a head: layer, head, norm, sigma."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "layer": layer,
                    "head": head,
                    "norm": float(vector.norm()),
                    "sigma": self.scales.get((layer, head), Scale()).sigma,
                }
                for (layer, head), vector in self.vectors.items()
            ]
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Norm of each head's offset, layers upwards, heads to the right; blank: no offset."""
        ax = figures.axes(ax)
        norms = torch.full((self.origin.n_layers, self.origin.n_heads), float("nan"))
        for (layer, head), vector in self.vectors.items():
            norms[layer, head] = vector.norm()
        with figures.theme():
            image = ax.imshow(norms.numpy(), origin="lower", aspect="auto", cmap="viridis")
            ax.set(xlabel="head", ylabel="layer", title=str(self))
            ax.figure.colorbar(image, ax=ax, label="norm of the offset (unit of head outputs)")
        return ax

    def __str__(self) -> str:
        return (
            f"{self.origin.estimator or 'head'} offsets at {len(self.heads)} heads of "
            f"{self.origin.model} ({self.n_parameters} numbers)"
        )

    def _repr_html_(self) -> str:
        import html

        table = self.frame().to_html(index=False, float_format="%.3f", border=0, max_rows=20)
        return f"<p>{html.escape(str(self))}</p>{table}"


def _key(name: str) -> tuple[int, int]:
    site = Site.parse(name)
    if site.part != "head_out" or site.head is None:
        raise ValueError(f"{name} is no head's output")
    return site.layer, site.head
