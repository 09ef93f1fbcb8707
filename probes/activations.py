"""What a capture gives: vectors by site and prompt, in memory or read from a store on demand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.results import Record
from probes.sites import Site


@dataclass(frozen=True)
class Activations:
    """Activations of a prompt set. `acts["12.resid_post"]` is `[prompt, d_model]` when one vector
    per prompt was read, `[prompt, position, d_model]` when every prompt has the same number.

    Head parts have `[..., head, width]` in place of `d_model`. Rows follow the prompts as given.
    """

    sites: tuple[Site, ...]
    counts: tuple[int, ...]
    """Vectors per prompt."""
    positions: str
    source: Callable[[Site], Tensor] = field(repr=False)
    """Gives all vectors of a site, `[vector, ...]`, prompts one after the other."""
    record: Record = field(default_factory=Record, repr=False)
    notes: tuple[str, ...] = ()
    """What the reader should know of how it ran: sharing refused, batches split."""
    n_layers: int | None = None
    """Layers of the model, by which a negative layer is understood."""

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, site: str | Site) -> Float[Tensor, "prompt ..."]:
        values, _, _ = self.rows(site)
        if len(set(self.counts)) > 1:
            raise ValueError(
                f"position {self.positions!r} reads between {min(self.counts)} and "
                f"{max(self.counts)} tokens per prompt, which is no rectangle: use "
                "`rows(site)` for all vectors with their prompt, or positions='mean:...'"
            )
        if self.counts[0] == 1:
            return values
        return values.reshape(len(self), self.counts[0], *values.shape[1:])

    def rows(
        self, site: str | Site
    ) -> tuple[Float[Tensor, "vector ..."], Int[Tensor, " vector"], Int[Tensor, " vector"]]:
        """All vectors of a site with the prompt each belongs to and its place among that prompt's."""
        values = self.source(self._find(site))
        prompt = torch.repeat_interleave(
            torch.arange(len(self.counts)), torch.tensor(self.counts, dtype=torch.long)
        )
        place = torch.cat([torch.arange(count) for count in self.counts])
        return values, prompt, place

    def select(self, prompts: Sequence[int]) -> "Activations":
        """The same for some of the prompts, in the order given."""
        starts = torch.tensor([0, *self.counts]).cumsum(0)
        index = torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in prompts])
        counts = tuple(self.counts[i] for i in prompts)
        source = self.source
        return Activations(
            self.sites,
            counts,
            self.positions,
            lambda site: source(site)[index],
            self.record,
            self.notes,
            self.n_layers,
        )

    def _find(self, site: str | Site) -> Site:
        wanted = Site.parse(site) if isinstance(site, str) else site
        if wanted.layer < 0 and self.n_layers is not None:
            wanted = wanted.resolve(self.n_layers)
        if wanted not in self.sites:
            known = ", ".join(map(str, self.sites[:6])) + (", ..." if len(self.sites) > 6 else "")
            raise KeyError(f"{site} was not captured; captured were {known}")
        return wanted

    def __str__(self) -> str:
        return (
            f"activations of {len(self)} prompts at {len(self.sites)} sites, "
            f"position {self.positions!r}"
        )
