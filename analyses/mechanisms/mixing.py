"""Runs whose components are a mixture of what they computed and what a source run computed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.mechanisms.desiderata import Desideratum
from analyses.mechanisms.gradients import TOKENS, Slopes
from analyses.patching.runs import Runs
from analyses.patching.sources import same_shape
from probes.engines import Edit, Where
from probes.model import HookedModel
from probes.sites import HEADED, Site


@dataclass(frozen=True)
class Components:
    """What a mask has one number for: heads, whole parts, or directions of one site."""

    sites: tuple[Site, ...]
    """Without heads, in forward order."""
    sizes: tuple[int, ...]
    """Components of each site."""
    directions: Float[Tensor, "component d_model"] | None = None
    """Orthonormal; None for heads and whole parts."""

    @property
    def names(self) -> tuple[str, ...]:
        found = []
        for site, size in zip(self.sites, self.sizes, strict=True):
            if self.directions is not None:
                found += [f"{site} direction {k}" for k in range(size)]
            else:
                heads = site.part in HEADED
                found += [f"{site}.{h}" for h in range(size)] if heads else [str(site)]
        return tuple(found)

    @classmethod
    def of(
        cls,
        model: HookedModel,
        parts: Sequence[str],
        layers: Sequence[int] | None,
        subspace: tuple[str | Site, Tensor] | None,
    ) -> "Components":
        """Heads of `head_out`, q, k, v and whole parts such as `mlp_out`; or the directions."""
        if subspace is not None:
            (site,) = model.sites(subspace[0])
            U = torch.as_tensor(subspace[1]).double()
            width = model.layout.width(site)
            if site.head is not None or site.part in HEADED or U.ndim != 2 or U.shape[1] != width:
                raise ValueError(
                    f"directions of shape {tuple(U.shape)} at {site}: give rows of width {width} "
                    "at a part of the stream"
                )
            if not torch.allclose(U @ U.T, torch.eye(len(U), dtype=torch.float64), atol=1e-4):
                raise ValueError(
                    "the directions are not orthonormal: orthonormalise them, for example by "
                    "torch.linalg.qr(directions.T).Q.T"
                )
            return cls((site,), (len(U),), U.float())
        unknown = [
            part for part in parts if part not in ("head_out", "q", "k", "v", "mlp_out", "attn_out")
        ]
        if unknown or not parts:
            raise ValueError(
                f"parts={list(parts)}: choose some of head_out, q, k, v, attn_out, mlp_out"
            )
        rows = range(model.n_layers) if layers is None else layers
        sites = sorted(
            Site(n, part).resolve(model.n_layers)
            for n in rows
            for part in parts
            if part not in model.layout.blocks[n].refused
        )
        if not sites:
            part = parts[0]
            model.layout.check(Site(range(model.n_layers)[next(iter(rows))], part))  # says why
        blocks = model.layout.blocks
        sizes = [blocks[s.layer].heads[s.part] if s.part in HEADED else 1 for s in sites]
        return cls(tuple(sites), tuple(sizes))


class Mixture:
    """Base prompts of a desideratum, run with a share of each component from the source run."""

    def __init__(
        self,
        model: HookedModel,
        examples: Desideratum,
        components: Components,
        source: HookedModel | None = None,
        rows: int = 32,
    ) -> None:
        ids = [r.ids for r in model.template.render_all(examples.base)]
        self.model, self.examples, self.components = model, examples, components
        self.slopes = Slopes(model, ids, rows)
        self.runs = Runs(model, ids, rows=rows)
        other = source or model
        if source is not None:
            same_shape(model, source)
        given = [r.ids for r in other.template.render_all(examples.source)]
        if given == ids and other is model:
            raise ValueError(
                f"base and source of {examples.name!r} are the same prompts of the same model, so "
                "no mask can change anything: give other source prompts or a source model"
            )
        self._values = self._read(Runs(other, given, rows=rows))

    @property
    def micro(self) -> int:
        """Rows of a differentiable pass."""
        return max(1, TOKENS // max(map(len, self.runs.ids)))

    def logits(
        self,
        rows: Sequence[int],
        mask: Float[Tensor, "group component"],
        *,
        gradients: bool = False,
    ) -> Float[Tensor, "row vocab"]:
        """Last-token logits, float32 on the CPU; `mask` 1 keeps the base, 0 takes the source."""
        batch = self.runs._batch(rows)
        with self.model.edit(self._edits(rows, mask)):
            found = self.slopes.engine.logits(batch, 1, gradients=gradients)
        return found[:, -1].float().cpu()

    def hits(self, patched: Bool[Tensor, "group component"]) -> int:
        """Base prompts answered with the label (first over the whole vocabulary) where the
        components `patched` are taken from the source."""
        mask = 1 - patched.float()
        found = 0
        for chunk in self.runs.chunks:
            answers = self.logits(chunk, mask).argmax(-1)
            found += int((answers == self.labels[chunk]).sum())
        return found

    @property
    def labels(self) -> Int[Tensor, " example"]:
        return torch.tensor(self.examples.labels)

    def _read(self, runs: Runs) -> list[dict[Site, list[Tensor]]]:
        """Source values of each group at its tokens, by site and prompt."""
        found = [
            {site: [torch.empty(0)] * len(runs.ids) for site in self.components.sites}
            for _ in self.examples.groups
        ]
        for chunk in runs.chunks:
            some = Runs(runs.model, [runs.ids[i] for i in chunk], rows=runs.rows)
            for site, read in some.read(self.components.sites).items():
                for i, row in zip(chunk, read, strict=True):
                    for into, (_, alignment) in zip(found, self.examples.groups, strict=True):
                        into[site][i] = row[list(alignment.source[i])]
        return found

    def _edits(self, rows: Sequence[int], mask: Tensor) -> list[Edit]:
        start, found = 0, []
        for site, size in zip(self.components.sites, self.components.sizes, strict=True):
            own = mask[:, start : start + size]
            start += size
            if own.requires_grad or bool((own != 1).any()):
                found.append(self._edit(site, rows, own))
        return found

    def _edit(self, site: Site, rows: Sequence[int], mask: Tensor) -> Edit:
        width = max(len(self.runs.ids[i]) for i in rows)
        placed = []
        for g, (_, alignment) in enumerate(self.examples.groups):
            at = [
                (r, token + width - len(self.runs.ids[i]))
                for r, i in enumerate(rows)
                for token in alignment.target[i]
            ]
            if at:
                values = torch.cat([self._values[g][site][i] for i in rows])
                placed.append((torch.tensor(at).T, values, mask[g]))
        U = self.components.directions

        def put(h: Tensor, _where: Where) -> Tensor:
            new = h.clone()
            for at, values, m in placed:
                r, c = at.to(h.device)
                own, given, keep = h[r, c], values.to(h), m.to(h)
                if U is not None:
                    u = U.to(h)
                    new[r, c] = own + ((given - own) @ u.T * (1 - keep)) @ u
                else:
                    # exact at both ends: 1 the base's own bits, 0 the source's
                    keep = keep.reshape(1, -1, 1) if site.part in HEADED else keep
                    new[r, c] = keep * own + (1 - keep) * given
            return new

        return Edit(site, put)
