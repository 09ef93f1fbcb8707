"""A target run made ready for patches: what is aligned, what is read, what a patch changes first."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from analyses.patching.cells import Cell, Held, parts_of
from analyses.patching.runs import ALLOWED, Runs, common, shareable, shortened
from analyses.patching.sources import From, Resampled, Source, Values
from analyses.patching.spans import Alignment, Indices, Spans, agreed, chosen, said
from analyses.patching.writes import Job, Write
from probes.model import HookedModel
from probes.positions import Positions
from probes.prompts import Prompt, Rendered
from probes.sites import READ_ONLY, Site, Sites, Unsupported

P = TypeVar("P", bound="Prepared")


class Prepared:
    """The target prompts aligned with their source; see `patcher.Patcher`, which runs them."""

    def __init__(
        self,
        model: HookedModel,
        prompts: Sequence[Prompt | Rendered],
        source: Source,
        positions: "str | Positions | Spans | Indices" = "all",
        *,
        hold: Sites | None = None,
        held_positions: str = "tokens:0:-1",
        batch_size: int = 32,
        shorten: bool = True,
    ) -> None:
        if not prompts:
            raise ValueError("the prompt set is empty: give at least one prompt")
        render = model.template.render
        # what is rendered already may hold the beginning of an answer
        rendered = [p if isinstance(p, Rendered) else render(p) for p in prompts]
        self._set_up(model, rendered, source, positions, batch_size)
        self.hold = () if hold is None else parts_of(self.checked(hold))
        self.held_positions = held_positions
        self._tried = not (shorten and shortened(model))
        self._open(resume=not self._tried, share=not self._tried)

    def with_source(self: P, source: Source, positions: "str | Positions | Spans | Indices") -> P:
        """The same target prompts with another source, passes shortened as they are here."""
        other = type(self).__new__(type(self))
        other._set_up(self.model, self.rendered, source, positions, self.batch_size)
        other.hold, other.held_positions = self.hold, self.held_positions
        other._tried = self._tried
        shared = self.runs.shared
        other._open(resume=self.runs.resume, share=shared > 0, most=shared)
        if other.runs.shared == self.runs.shared:
            other.runs = self.runs
            if "target_logits" in self.__dict__:
                other.__dict__["target_logits"] = self.__dict__["target_logits"]
        return other

    def _set_up(
        self,
        model: HookedModel,
        rendered: Sequence[Rendered],
        source: Source,
        positions: "str | Positions | Spans | Indices",
        batch_size: int,
    ) -> None:
        self.model, self.source, self.batch_size = model, source, batch_size
        self.rendered = list(rendered)
        self.ids = [r.ids for r in self.rendered]
        self.texts = [r.text for r in self.rendered]
        self.values = Values(source, model, self.rendered, positions, batch_size)
        self.alignment: Alignment = self.values.alignment
        self.notes: tuple[str, ...] = ()
        self._picked: dict[tuple[str | Indices, int], list[int]] = {}

    def settled(self) -> Runs:
        """The target runs, after it was seen whether their passes may be shortened."""
        self.ready([Cell((Site(self.model.n_layers // 2, "resid_post"),))])
        return self.runs

    def ready(self, cells: Sequence[Cell]) -> None:
        """Settle how passes with these cells are shortened: before anything is measured, since a
        pass made otherwise may round otherwise."""
        self.alike([self._tokens(c) for c in {cell.positions: cell for cell in cells}.values()])
        order = sorted(cells, key=lambda cell: min(site.layer for site in cell.sites))
        while order and not self._tried:
            self._tried = True
            self._try(order[len(order) // 2])

    def checked(self, sites: Sites) -> tuple[Site, ...]:
        """The sites named, each of which can be patched in this model."""
        found = self.model.sites(sites)
        for site in found:
            if site.part in READ_ONLY:
                raise Unsupported(
                    f"{site} can be read but not patched: {site.part} is derived from other "
                    "values; patch q, k, v, head_out or a part of the stream instead"
                )
        return found

    def _open(self, *, resume: bool, share: bool, most: int | None = None) -> None:
        shared = source_shared = 0
        if share and self.model.layout.shares_prefix:
            pairs = [
                dict(zip(t, s, strict=True))
                for t, s in zip(self.alignment.target, self.alignment.source, strict=True)
            ]
            same = isinstance(self.source, From | Resampled)
            ids = self.values.ids if same else self.ids
            shared = shareable(self.ids, ids, pairs)
            shared = shared if most is None else min(shared, most)
            if shortened(self.values.model) and self.values.model.layout.shares_prefix:
                source_shared = common(self.values.ids)
                if same:  # no longer than here: what is computed otherwise differs by rounding
                    source_shared = min(shared, source_shared)
            elif same:
                shared = 0  # what the source has there differs by rounding from prompt to prompt
        self.runs = Runs(self.model, self.ids, shared=shared, resume=resume, rows=self.batch_size)
        self.values.open(source_shared)
        for made in ("target_logits", "source_logits"):  # of the runs before
            self.__dict__.pop(made, None)

    def _load(self, cells: Sequence[Cell]) -> Held:
        """Read what these cells need."""
        self.ready(cells)
        return self._read(cells)

    def _read(self, cells: Sequence[Cell]) -> Held:
        parts = parts_of(s for cell in cells for s in cell.sites)
        held = Held(values=self.values.at(parts))
        own = self.runs.read([*dict.fromkeys([*parts, *self.hold])])
        for part in parts:
            held.differs[part] = [
                (v != o[list(t)]).any(-1)
                for v, o, t in zip(held.values[part], own[part], self.alignment.target, strict=True)
            ]
        held.own = {site: own[site] for site in self.hold}
        held.entering = self._entering([self._first(cell, held) for cell in cells])
        return held

    def _entering(self, layers: Sequence[int | None]) -> dict[int, list[Tensor]]:
        """What enters these blocks, where passes may start there."""
        sites = {k: Site(k, "resid_pre") for k in layers if k} if self.runs.resume else {}
        read = self.runs.read(list(sites.values())) if sites else {}
        return {k: read[site] for k, site in sites.items()}

    def _try(self, cell: Cell) -> None:
        """Compare shortened passes with whole ones; where they part, open others.

        One starts where the cell does, one at the last block with nothing put in: where blocks use
        what lower ones computed (keys and values of Gemma 4), that fails first. One only shares the
        beginning, through all blocks.
        """
        held = self._read([cell])
        first = self._first(cell, held)
        first = min(site.layer for site in cell.sites) if first is None else first
        order = [i for chunk in self.runs.chunks for i in chunk]
        trial = sorted({order[0], order[len(order) // 2], order[-1]})
        plain = [Job(i, 0) for i in trial]
        passes = [([Job(i, 0, self._writes(cell, i, held)) for i in trial], first)]
        passes += [(plain, self.model.n_layers - 1)] if self.runs.resume else []
        passes += [(plain, 0)] if self.runs.shared else []
        whole = Runs(self.model, self.ids, rows=self.batch_size)
        try:
            entering = self._entering([block for _, block in passes])
            error = max(self.runs.error(whole, jobs, k, entering.get(k)) for jobs, k in passes)
            said = f"relative error {error:.1e} of the logits"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as e:
            error, said = torch.inf, f"{type(e).__name__}: {e}".splitlines()[0][:200]
        if error <= ALLOWED.get(self.model.dtype, 0.05):
            return
        shares = self.runs.shared > 0
        what = "share a beginning" if shares else "start at a patched block"
        self.notes += (f"{self.model.layout.architecture} cannot {what} here ({said})",)
        self._tried = not shares
        self._open(resume=shares, share=False)

    def _first(self, cell: Cell, held: Held) -> int | None:
        """The first layer at which the cell changes anything in any prompt; None: nowhere."""
        found = [
            site.layer
            for site in cell.sites
            if any(self._differs(site, cell, i, held) for i in range(len(self.ids)))
        ]
        return min(found, default=None)

    def _differs(self, site: Site, cell: Cell, i: int, held: Held) -> bool:
        differs = held.differs[Site(site.layer, site.part)][i][self._chosen(cell, i)]
        return bool((differs if site.head is None else differs[:, site.head]).any())

    def alike(self, places: Sequence[Sequence[Sequence[int]]]) -> None:
        """Share no more of a beginning than what these tokens of every prompt have in common."""
        if self.hold:
            held = [chosen(self.held_positions, r, i) for i, r in enumerate(self.rendered)]
            places = [*places, held]
        shared = min((agreed(sets, self.runs.shared) for sets in places), default=self.runs.shared)
        if shared < self.runs.shared:
            self._open(resume=self.runs.resume, share=True, most=shared)

    def _tokens(self, cell: Cell) -> list[list[int]]:
        """Tokens of each prompt that the cell patches."""
        aligned = self.alignment.target
        return [[aligned[i][k] for k in self._chosen(cell, i)] for i in range(len(self.ids))]

    def _chosen(self, cell: Cell, i: int) -> list[int]:
        """Places among the aligned tokens of a prompt that the cell patches."""
        aligned = self.alignment.target[i]
        if cell.positions is None:
            return list(range(len(aligned)))
        if (cell.positions, i) in self._picked:
            return self._picked[cell.positions, i]
        wanted = chosen(cell.positions, self.rendered[i], i)
        missing = sorted(set(wanted) - set(aligned))
        if isinstance(self.source, Resampled):  # prompts that need not be as long
            wanted = [token for token in wanted if token in aligned]
        elif missing:
            raise ValueError(
                f"positions={said(cell.positions)!r} picks token {missing[0]} of prompt {i}, which has "
                f"no value in the source (aligned are {self.alignment.text!r}): patch aligned "
                "tokens only"
            )
        found = [aligned.index(token) for token in wanted]
        self._picked[cell.positions, i] = found
        return found

    def _writes(self, cell: Cell, i: int, held: Held, first: int = 0) -> tuple[Write, ...]:
        """What is put into the run of one prompt, from a layer on; held values first."""
        found = []
        if self.hold:
            tokens = chosen(self.held_positions, self.rendered[i], i)
            for site in self.hold:
                if site.layer >= first:
                    found.append(Write(site, tuple(tokens), None, held.own[site][i][tokens]))
        picked = self._chosen(cell, i)
        tokens = tuple(self.alignment.target[i][k] for k in picked)
        by_part: dict[Site, list[int | None]] = {}
        for site in cell.sites:
            if site.layer >= first:
                by_part.setdefault(Site(site.layer, site.part), []).append(site.head)
        for part, heads in by_part.items():
            values = held.values[part][i][picked]
            named = tuple(h for h in heads if h is not None)
            if len(named) == len(heads):
                found.append(Write(part, tokens, named, values[:, list(named)]))
            else:
                found.append(Write(part, tokens, None, values))
        return tuple(found)
