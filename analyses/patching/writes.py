"""Values put into the runs of single rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.engines import Edit, Where
from probes.sites import Site


@dataclass(frozen=True)
class Write:
    """Values put at one part of one layer in one prompt."""

    site: Site
    """Without a head: `heads` says which."""
    tokens: tuple[int, ...]
    """Indices in the unpadded prompt."""
    heads: tuple[int, ...] | None
    """None for parts without heads, or for all of them."""
    values: Tensor
    """`[token, width]`, or `[token, head, width]` with the heads named."""

    def between(self, start: int, stop: int) -> "Write | None":
        """What falls on the tokens `start` to `stop`, counted from there."""
        inside = [k for k, token in enumerate(self.tokens) if start <= token < stop]
        if not inside:
            return None
        tokens = tuple(self.tokens[k] - start for k in inside)
        return Write(self.site, tokens, self.heads, self.values[inside])


@dataclass(frozen=True)
class Job:
    """One row of a batch: a prompt with what is put into its run."""

    prompt: int
    patch: int
    """Rows of one patch share what happens in the common beginning."""
    writes: tuple[Write, ...] = ()


def edits_of(placed: Sequence[tuple[int, int, Write]], scope: str = "all") -> list[Edit]:
    """Edits that put values at (row, first column, write), one for each part of a layer."""
    by_site: dict[Site, list[tuple[int, int, Write]]] = {}
    for row, offset, write in placed:
        by_site.setdefault(write.site, []).append((row, offset, write))

    def edit(site: Site, writes: Sequence[tuple[int, int, Write]]) -> Edit:
        def put(h: Tensor, _where: Where) -> Tensor:
            new = h.clone()
            for row, offset, write in writes:
                columns = torch.tensor(write.tokens, device=h.device) + offset
                values = write.values.to(h)
                if write.heads is None:
                    new[row, columns] = values
                else:
                    heads = torch.tensor(write.heads, device=h.device)
                    new[row, columns[:, None], heads] = values
            return new

        return Edit(site, put, scope)

    return [edit(site, by_site[site]) for site in sorted(by_site)]
