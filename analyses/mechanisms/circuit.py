"""A circuit: named groups of heads and MLPs that are said to do a task."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from analyses.mechanisms.task import Task
from analyses.patching.spans import Indices
from probes import figures
from probes.model import HookedModel
from probes.prompts import prompts_hash
from probes.results import Record, Result
from probes.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PARTS = ("head_out", "mlp_out")
"""What a circuit may hold."""


@dataclass(frozen=True)
class Circuit(Result):
    """Named groups of heads (`10.head_out.3`) and MLPs (`11.mlp_out`), each at its tokens."""

    names: tuple[str, ...]
    """The groups in their order."""
    groups: Mapping[str, tuple[str, ...]]
    """Group -> its sites, in forward order; groups are disjoint."""
    places: Mapping[str, str]
    """Group -> the tokens at which it works: a place of the task by its name, or a rule of
    `probes.positions`. Groups without one work at every token."""
    heads: tuple[int, ...]
    """Number of heads of each layer of the model it was found in; 0 where a layer has none."""
    task: str = ""
    chosen_on: tuple[str, ...] = ()
    """Topics of the prompts it was chosen on; faithfulness is to be measured on others."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        groups: Mapping[str, Iterable[str | Site]],
        *,
        places: Mapping[str, str] | None = None,
        task: Task | None = None,
    ) -> "Circuit":
        """A circuit of this model; `task` is what it was chosen on, if it was chosen."""
        found: dict[str, tuple[str, ...]] = {}
        owner: dict[Site, str] = {}
        for name, given in groups.items():
            sites = model.sites(list(given)) if (given := list(given)) else ()
            for site in sites:
                if site.part not in PARTS or (site.part == "head_out") != (site.head is not None):
                    raise ValueError(
                        f"group {name!r} holds {site}: a circuit is made of heads, written "
                        "LAYER.head_out.HEAD, and MLPs, written LAYER.mlp_out"
                    )
                if site in owner:
                    raise ValueError(
                        f"{site} is in the groups {owner[site]!r} and {name!r}: put it into one"
                    )
                owner[site] = name
            found[name] = tuple(map(str, sites))
        if not owner:
            raise ValueError("the circuit is empty: name at least one head or MLP")
        for name in places or {}:
            if name not in found:
                raise ValueError(
                    f"a place is given for the group {name!r}, the circuit has "
                    f"{', '.join(found)}: name one of these"
                )
        rendered = [] if task is None else task.rendered(model)[0]
        return cls(
            names=tuple(found),
            groups=found,
            places=dict(places or {}),
            heads=heads_of(model),
            task="" if task is None else task.name,
            chosen_on=() if task is None else tuple(sorted(set(task.topics))),
            record=Record(
                models=(model.name,),
                fingerprints=(model.fingerprint,),
                template_hash=model.template.hash,
                prompts_hash=prompts_hash(rendered) if rendered else "",
                engine=model.engine.name,
            ),
        )

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All heads and MLPs in forward order."""
        return tuple(sorted(Site.parse(s) for own in self.groups.values() for s in own))

    @property
    def mlps(self) -> bool:
        """Whether MLPs belong to it; else all of them are taken for granted."""
        return any(site.part == "mlp_out" for site in self.sites)

    def group(self, name: str) -> tuple[Site, ...]:
        """The sites of one group."""
        if name not in self.groups:
            raise ValueError(f"no group {name!r}: the circuit has {', '.join(self.names)}")
        return tuple(Site.parse(s) for s in self.groups[name])

    def without(self, sites: Iterable[Site]) -> "Circuit":
        """What is left without some sites; it may be nothing."""
        gone = {str(s) for s in sites}
        left = {n: tuple(s for s in own if s not in gone) for n, own in self.groups.items()}
        return replace(self, groups=left)

    def where(self, task: Task) -> dict[Site, str | Indices | None]:
        """The tokens at which each site works, for the prompts of a task."""
        found: dict[Site, str | Indices | None] = {}
        for name in self.names:
            place = self.places.get(name)
            for site in self.group(name):
                found[site] = None if place is None else task.places.get(place, place)
        return found

    def check(self, model: HookedModel) -> None:
        """Refuse a model of another shape."""
        if heads_of(model) != self.heads:
            raise ValueError(
                f"the circuit is of a model with {_shape(self.heads)}, {model.name} has "
                f"{_shape(heads_of(model))}: compare checkpoints of one model"
            )

    def frame(self) -> "pd.DataFrame":
        """One row a site."""
        import pandas as pd

        rows = [
            {"group": n, "site": str(s), "layer": s.layer, "part": s.part, "head": s.head,
             "place": self.places.get(n, "every token")}
            for n in self.names
            for s in self.group(n)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Heads by layer and head, one mark a group; MLPs stand in a column of their own."""
        from analyses.figures import legend_below

        ax = figures.axes(ax, 5.0, max(3.2, 1.6 + 0.11 * len(self.heads)))
        columns = max(self.heads, default=0)
        with figures.theme():
            for k, name in enumerate(n for n in self.names if self.groups[n]):
                sites = self.group(name)
                across = [columns if s.head is None else s.head for s in sites]
                ax.plot(across, [s.layer for s in sites], ls="", label=name, **figures.style(k))
            named = [str(h) for h in range(columns)] + ["MLP"] * self.mlps
            ax.set_xticks(range(len(named)), named)
            ax.set(
                xlabel="head",
                ylabel="layer (0 is the first block)",
                ylim=(-0.7, len(self.heads) - 0.3),
                xlim=(-0.7, len(named) - 0.3),
                title=f"Circuit of {len(self)}" + (f" for {self.task}" if self.task else ""),
            )
            legend_below(ax, "group")
        return ax

    def __str__(self) -> str:
        own = ", ".join(f"{name} {len(self.groups[name])}" for name in self.names)
        n = sum(site.head is not None for site in self.sites)
        said = f"circuit of {n} of {sum(self.heads)} heads"
        return said + (f" and {len(self) - n} MLPs" if self.mlps else "") + f": {own}"


def heads_of(model: HookedModel) -> tuple[int, ...]:
    """Number of query heads of each layer; a model without any is refused."""
    found = tuple(block.heads.get("head_out", 0) for block in model.layout.blocks)
    if not any(found):
        model.sites("0.head_out")  # says why there are none
    return found


def all_heads(model: HookedModel) -> tuple[Site, ...]:
    """Every head of a model, in forward order."""
    counts = enumerate(heads_of(model))
    return tuple(Site(layer, "head_out", h) for layer, n in counts for h in range(n))


def all_mlps(model: HookedModel) -> tuple[Site, ...]:
    """Every MLP of a model, in forward order."""
    blocks = enumerate(model.layout.blocks)
    return tuple(Site(n, "mlp_out") for n, block in blocks if "mlp_out" not in block.refused)


def _shape(heads: Sequence[int]) -> str:
    each = sorted(set(heads))
    return f"{len(heads)} layers of {' or '.join(map(str, each))} heads"
