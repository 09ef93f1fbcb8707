"""Where along a fine-tune did a property break? Halving instead of measuring every checkpoint."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import name_ticks
from probes import figures, files
from probes.results import Record, Result
from probes.scores import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Property = Callable[[str], Interval]
"""Measures one checkpoint, given by name."""


@dataclass(frozen=True)
class Bisection(Result):
    """Which checkpoints were measured, and the first at which the property is broken."""

    what: str
    """What was measured, with its unit."""
    names: tuple[str, ...]
    """All checkpoints in order."""
    measured: tuple[int, ...]
    """Places of those measured, in ascending order."""
    value: Float[Tensor, " measured"]
    low: Float[Tensor, " measured"]
    high: Float[Tensor, " measured"]
    limit: float
    breaks: str
    """`above` or `below`: on which side of the limit the property is broken."""

    def broken(self, i: int) -> bool:
        """Whether the i-th of the measured checkpoints is beyond the limit."""
        return _broken(float(self.value[i]), self.limit, self.breaks)

    @property
    def first_broken(self) -> str | None:
        """The first checkpoint found broken; None where the last one still holds."""
        found = [self.names[k] for i, k in enumerate(self.measured) if self.broken(i)]
        return found[0] if found else None

    @property
    def last_holding(self) -> str | None:
        """The last one found to hold before it; None where the first is broken already."""
        found = None
        for i, k in enumerate(self.measured):
            if self.broken(i):
                break
            found = self.names[k]
        return found

    @property
    def sure(self) -> bool:
        """Whether the intervals of both lie on their own side of the limit."""
        for i, k in enumerate(self.measured):
            if self.names[k] not in (self.first_broken, self.last_holding):
                continue
            beyond = (
                self.low[i] > self.limit if self.breaks == "above" else self.high[i] < self.limit
            )
            within = (
                self.high[i] < self.limit if self.breaks == "above" else self.low[i] > self.limit
            )
            if not bool(beyond if self.broken(i) else within):
                return False
        return True

    @property
    def monotone(self) -> bool:
        """Whether no checkpoint measured behind a broken one holds again."""
        states = [self.broken(i) for i in range(len(self.measured))]
        return states == sorted(states)

    def frame(self) -> "pd.DataFrame":
        """One row per measured checkpoint."""
        import pandas as pd

        rows = [
            {
                "checkpoint": self.names[k],
                "place": k,
                "value": float(self.value[i]),
                "low": float(self.low[i]),
                "high": float(self.high[i]),
                "broken": self.broken(i),
            }
            for i, k in enumerate(self.measured)
        ]
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Measured checkpoints with intervals, the limit, and where it is crossed."""
        ax = figures.axes(ax, 5.0, 3.4)
        with figures.theme():
            y = self.value.tolist()
            error = [(self.value - self.low).tolist(), (self.high - self.value).tolist()]
            ax.errorbar(list(self.measured), y, yerr=error, ls="", capsize=3, **figures.style(0))
            ax.axhline(self.limit, ls="--", color=figures.PALETTE[1])
            ax.annotate("limit", (0, self.limit), xytext=(2, 3), textcoords="offset points")
            if len(self.names) <= 12:
                name_ticks(ax, [name.rpartition(":")[2].rpartition("/")[2] for name in self.names])
            ax.set(
                xlabel="checkpoint, in order",
                ylabel=self.what,
                title=f"First broken: {self.first_broken or 'none'}",
            )
        return ax

    def __str__(self) -> str:
        many = f"{len(self.measured)} of {len(self.names)} checkpoints measured"
        if self.first_broken is None:
            return f"{self.what} holds to the last checkpoint ({many})"
        if self.last_holding is None:
            return f"{self.what} is broken in the first checkpoint already ({many})"
        rows = self.frame().set_index("checkpoint")
        ends = [rows.loc[name] for name in (self.last_holding, self.first_broken)]
        said = " -> ".join(f"{r.value:.3g} [{r.low:.3g}, {r.high:.3g}]" for r in ends)
        doubt = (
            "" if self.sure else "; an interval reaches over the limit, so the place is not sure"
        )
        if not self.monotone:
            doubt += "; a later checkpoint holds again, so there is more than one crossing"
        return (
            f"{self.what} breaks between {self.last_holding} and {self.first_broken}: {said}, "
            f"limit {self.limit:g} ({many}){doubt}"
        )


def bisect(
    names: Sequence[str],
    measure: Property,
    limit: float | Callable[[Interval], float],
    *,
    what: str,
    breaks: str = "above",
    every: bool = False,
    keep: Path | str | None = None,
    settings: Mapping[str, object] | None = None,
    record: Record | None = None,
) -> Bisection:
    """Find the first checkpoint of an ordered list at which `measure` is beyond `limit`, which may
    be made of what the first checkpoint measures.

    Both ends are measured first, then halves: about 2 + log2(n) checkpoints, on the assumption that
    what broke stays broken. `every` measures all of them, which shows whether that holds. With
    `keep`, a JSON file, finished measurements are kept there and not made again; `settings` is what
    they depend on beside the checkpoint (prompts, seeds, references), and a file of others is
    refused.
    """
    names = tuple(names)
    if len(names) < 2:
        raise ValueError(f"{len(names)} checkpoints were given: give 2 or more, in order")
    if len(set(names)) < len(names):
        raise ValueError("a checkpoint is named twice: give each once, in the order of training")
    if breaks not in ("above", "below"):
        raise ValueError(f"breaks={breaks!r}: expected 'above' or 'below' the limit")
    about = {"what": what, "settings": json.loads(json.dumps(dict(settings or {})))}
    found = _kept(keep, about)

    def measured_at(k: int) -> Interval:
        name = names[k]
        if name not in found:
            interval = measure(name)
            if interval.value != interval.value:
                raise ValueError(f"{what} of {name} is not a number: nothing can be compared")
            found[name] = interval
            if keep is not None:
                kept = {name: list(i) for name, i in found.items()}
                files.write_json(Path(keep), {**about, "measured": kept})
        return found[name]

    where = limit(measured_at(0)) if callable(limit) else float(limit)

    def broken(k: int) -> bool:
        return _broken(measured_at(k).value, where, breaks)

    good, bad = 0, len(names) - 1
    if every:
        for k in range(len(names)):
            broken(k)
    elif not broken(good) and broken(bad):
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if broken(middle) else (middle, bad)
    measured = tuple(k for k, name in enumerate(names) if name in found)
    columns = zip(*(found[names[k]] for k in measured), strict=True)
    values = (torch.tensor(column, dtype=torch.float64) for column in columns)
    value, low, high = values
    return Bisection(
        what, names, measured, value, low, high, where, breaks, record=record or Record()
    )


def checkpoints_in(folder: Path | str, model: str | None = None) -> list[str]:
    """Model names of the checkpoints in a folder, in the order of the numbers in their names.

    Each is a folder with a `config.json`, or an adapter, which goes on top of `model`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give one that holds checkpoints")
    adapters, whole = [], []
    for path in sorted(folder.iterdir(), key=lambda p: _natural(p.name)):
        if (path / "adapter_config.json").is_file():
            adapters.append(path)
        elif (path / "config.json").is_file():
            whole.append(path)
    if adapters and whole:
        raise ValueError(
            f"{folder} holds adapters ({adapters[0].name}) and full checkpoints ({whole[0].name}): "
            "keep one kind in a folder"
        )
    if adapters and model is None:
        raise ValueError(f"{folder} holds adapters: say with --model what they go on top of")
    found = [f"{model}+{path}" for path in adapters] or [str(path) for path in whole]
    if len(found) < 2:
        raise ValueError(
            f"{folder} holds {len(found)} checkpoints (folders with config.json or "
            "adapter_config.json): 2 or more are needed"
        )
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers by size: checkpoint-20 comes before checkpoint-100."""
    return [(int(n or -1), text) for text, n in re.findall(r"(\D+)|(\d+)", name)]


def _broken(value: float, limit: float, breaks: str) -> bool:
    return value > limit if breaks == "above" else value < limit


def _kept(path: Path | str | None, about: Mapping[str, object]) -> dict[str, Interval]:
    if path is None or not Path(path).is_file():
        return {}
    try:
        held = json.loads(Path(path).read_text())
        measured = {name: Interval(*row) for name, row in held.pop("measured").items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to measure again") from error
    for key in held.keys() | about.keys():
        if held.get(key) != about.get(key):
            raise ValueError(
                f"{path} holds measurements with {key} {held.get(key)!r}, asked is "
                f"{about.get(key)!r}: give another folder"
            )
    return measured
