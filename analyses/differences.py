"""Two reports side by side: which numbers moved beyond their intervals?"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analyses.figures import broken
from probes import figures
from probes.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KEY = ("panel", "quantity", "model", "group", "layer")
"""What makes two rows of two reports the same number."""


@dataclass(frozen=True)
class Differences(Result):
    """Numbers that two reports share, and by how much the second differs from the first."""

    first: str
    second: str
    keys: tuple[tuple[str, ...], ...]
    """Panel, quantity, model, group and layer of each number."""
    values: tuple[tuple[float, float], ...]
    """In the first and in the second report."""
    limits: tuple[tuple[float, float] | None, ...]
    """95 % interval of the difference, where both numbers have an interval; None where one has
    none, or one of NaN."""
    only_first: tuple[tuple[str, ...], ...]
    only_second: tuple[tuple[str, ...], ...]
    settings: tuple[tuple[str, str, str], ...]
    """Settings of the records that differ: name, first, second."""

    @property
    def moved(self) -> tuple[int, ...]:
        """Places of the numbers whose difference has an interval that excludes 0."""
        return tuple(
            i for i, at in enumerate(self.limits) if at is not None and (at[0] > 0 or at[1] < 0)
        )

    @property
    def unsure(self) -> tuple[int, ...]:
        """Places of numbers that differ and have no interval to judge it by."""
        return tuple(
            i
            for i, (a, b) in enumerate(self.values)
            if self.limits[i] is None and not (a == b or (a != a and b != b))
        )

    def frame(self) -> "pd.DataFrame":
        """One row per shared number, those that moved first."""
        import pandas as pd

        moved = set(self.moved)
        rows = []
        for i, (key, (a, b), at) in enumerate(
            zip(self.keys, self.values, self.limits, strict=True)
        ):
            low, high = at if at is not None else (float("nan"), float("nan"))
            named = dict(zip(KEY, key, strict=True))
            numbers = {"first": a, "second": b, "difference": b - a, "low": low, "high": high}
            rows.append(named | numbers | {"moved": i in moved})
        table = pd.DataFrame(
            rows, columns=[*KEY, "first", "second", "difference", "low", "high", "moved"]
        )
        return table.sort_values("moved", ascending=False, kind="stable").reset_index(drop=True)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The twenty numbers that moved furthest, in half widths of the difference's interval."""
        worst = sorted(self.moved, key=self._far, reverse=True)[:20]
        ax = figures.axes(ax, 6.4, 1.4 + 0.3 * max(1, len(worst)))
        with figures.theme():
            ax.axvspan(-1, 1, color=figures.PALETTE[7], alpha=0.18, lw=0)
            for y, i in enumerate(worst):
                side = 1 if self.values[i][1] > self.values[i][0] else -1
                ax.plot([side * self._far(i)], [y], ls="", **figures.style(0))
            ax.set_yticks(range(len(worst)), [_said(self.keys[i]) for i in worst])
            ax.set_ylim(len(worst) - 0.4, -0.6)
            ax.set(
                xlabel="difference over the half width of its 95 % interval",
                title=broken(f"{len(self.moved)} of {len(self.keys)} numbers moved"),
            )
        return ax

    def _far(self, i: int) -> float:
        low, high = self.limits[i] or (0.0, 0.0)
        half = (high - low) / 2
        return abs(self.values[i][1] - self.values[i][0]) / half if half else float("inf")

    def __str__(self) -> str:
        if not self.moved and not self.unsure:
            text = f"none of {len(self.keys)} shared numbers moved beyond its interval"
        else:
            text = (
                f"{len(self.moved)} of {len(self.keys)} shared numbers moved beyond their interval"
            )
            if self.unsure:
                text += f"; {len(self.unsure)} more differ and have no interval"
        if self.only_first or self.only_second:
            text += (
                f"; {len(self.only_first)} stand only in the first, {len(self.only_second)} only "
                "in the second"
            )
        return f"{self.second} against {self.first}: {text}"


def compare_reports(first: Path | str, second: Path | str) -> Differences:
    """Compare two folders of `alignlens report`: no other verb writes one table of all its numbers.

    The interval of a difference takes each estimate's own distances to its limits together as the
    root of the sum of their squares (Zou and Donner 2008): right for independent runs, and wider
    than needed for two runs on the same prompts, so that what is said to have moved has moved.
    """
    a, b = _table(Path(first)), _table(Path(second))
    shared = [key for key in a if key in b]
    if not shared:
        raise ValueError(
            f"{first} and {second} share no number: give two reports on models of the same names"
        )
    values, limits = [], []
    for key in shared:
        x, y = a[key], b[key]
        values.append((x["value"], y["value"]))
        limits.append(_interval(x, y))
    return Differences(
        str(first),
        str(second),
        tuple(shared),
        tuple(values),
        tuple(limits),
        tuple(key for key in a if key not in b),
        tuple(key for key in b if key not in a),
        _settings(Path(first), Path(second)),
    )


def _interval(x: Mapping[str, float], y: Mapping[str, float]) -> tuple[float, float] | None:
    if not {"low", "high"} <= x.keys() & y.keys():
        return None
    if any(math.isnan(row[name]) for row in (x, y) for name in ("value", "low", "high")):
        return None
    d = y["value"] - x["value"]
    down = ((y["value"] - y["low"]) ** 2 + (x["high"] - x["value"]) ** 2) ** 0.5
    up = ((y["high"] - y["value"]) ** 2 + (x["value"] - x["low"]) ** 2) ** 0.5
    return d - down, d + up


def _table(folder: Path) -> dict[tuple[str, ...], dict[str, float]]:
    path = folder / "result.json"
    try:
        rows = json.loads(path.read_text())["table"]
        found = {
            tuple(str(row[name]) for name in KEY): {
                name: float(row[name]) for name in ("value", "low", "high") if row[name] != ""
            }
            for row in rows
        }
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no result.json: give a folder of `alignlens report`"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no table of numbers ({error}): give a folder of `alignlens report`"
        ) from error
    return found


def _settings(first: Path, second: Path) -> tuple[tuple[str, str, str], ...]:
    first_held, second_held = _record(first), _record(second)
    names = sorted(first_held.keys() | second_held.keys())
    pairs = [
        (name, str(first_held.get(name, "absent")), str(second_held.get(name, "absent")))
        for name in names
    ]
    return tuple(p for p in pairs if p[1] != p[2])


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "record.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    return {k: v for k, v in record.items() if k not in ("seconds", "command", "settings")} | {
        f"settings.{k}": v for k, v in record.get("settings", {}).items()
    }


def _said(key: Sequence[str]) -> str:
    panel, quantity, model, group, layer = key
    more = ", ".join(x for x in (group, f"layer {layer}" if layer else "") if x)
    return f"{panel}: {quantity}, {model}" + (f" ({more})" if more else "")
