"""Tables of a token shift: by token, by group, by position, by word, by kind of word."""

import itertools
from typing import TYPE_CHECKING

import torch

from analyses.tokens.buckets import BUCKETS
from analyses.tokens.shares import KINDS, share_intervals, token_counts
from probes.scores import Interval, Intervals, wilson

if TYPE_CHECKING:
    import pandas as pd

    from analyses.tokens.shift_result import TokenShift

EDGES = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Ranges of positions: each from one number up to the next."""


def tokens(shift: "TokenShift") -> "pd.DataFrame":
    """One row a token; divergences and entropies in nats. `position` is from 0, `length` the
    number T of tokens of the answer, `relative` t / T with t from 1, so that the last has 1."""
    import pandas as pd

    owners = shift.owners.tolist()
    lengths = torch.tensor(shift.counts)[shift.owners]
    return pd.DataFrame(
        {
            "prompt": owners,
            "group": [shift.groups[i] for i in owners],
            "position": shift.places.tolist(),
            "length": lengths.tolist(),
            "relative": ((shift.places + 1) / lengths).tolist(),
            "id": shift.ids.tolist(),
            "token": [token for answer in shift.tokens for token in answer],
            "bucket": [BUCKETS[b] for b in shift.buckets.tolist()],
            "stop": shift.stops.tolist(),
            "rank": shift.ranks.tolist(),
            "aligned_rank": shift.aligned_ranks.tolist(),
            "kind": [KINDS[k] for k in shift.kinds.tolist()],
            "p_base": shift.p_base.tolist(),
            "p_aligned": shift.p_aligned.tolist(),
            "kl": shift.kl.tolist(),
            "reverse_kl": shift.reverse_kl.tolist(),
            "js": shift.js.tolist(),
            "entropy_base": shift.entropy_base.tolist(),
            "entropy_aligned": shift.entropy_aligned.tolist(),
        }
    )


def summary(shift: "TokenShift") -> "pd.DataFrame":
    """One row per group, averaging and choice of tokens. A group of one prompt has no intervals
    and is left out."""
    import pandas as pd

    rows = []
    for group in dict.fromkeys(shift.groups):
        for per, stops, first in itertools.product(
            ("token", "response"), (True, False), (True, False)
        ):
            chosen = shift.among(group, stops=stops, first=first)
            if len(shift.owners[chosen].unique()) < 2:
                continue
            row: dict[str, object] = {"group": group, "per": per, "stops": stops, "first": first}
            row["prompts"] = len(shift.owners[chosen].unique())
            row["tokens"] = int(chosen.sum())
            share = shift.shares(group, stops=stops, first=first, per=per)
            for k, kind in enumerate(KINDS):
                row |= _columns(kind, _at(share, k))
            for name in ("kl", "reverse_kl", "js"):
                row |= _columns(name, shift.mean(name, group, stops=stops, first=first, per=per))
            rows.append(row)
    return pd.DataFrame(rows)


def by_position(shift: "TokenShift", quantity: str, group: str | None) -> "pd.DataFrame":
    """One row per range of positions that enough answers of the group reach: 5, or 2 where the
    group has fewer. The value of `rank` is the geometric mean."""
    import pandas as pd

    wanted = [c for c, g in zip(shift.counts, shift.groups, strict=True) if group in (None, g)]
    least = max(2, min(5, len(wanted)))
    longest = max(wanted, default=0)
    rows = []
    for start, stop in itertools.pairwise((*EDGES, max(longest, EDGES[-1]) + 1)):
        reach = sum(count > start for count in wanted)
        if start >= longest or reach < least:
            break
        found = _mean(shift, quantity, group, range(start, stop))
        row = {"group": group, "quantity": quantity, "start": start, "stop": min(stop, longest)}
        rows.append({**row, "prompts": reach, **found._asdict()})
    columns = ["group", "quantity", "start", "stop", "prompts", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def frequent(shift: "TokenShift", group: str | None, by: str, minimum: int) -> "pd.DataFrame":
    """Tokens with how often they occur and are shifted; `low` and `high` are the Wilson limits of
    the rate, which take occurrences for independent and are narrow where one answer has many."""
    import pandas as pd

    if by not in ("count", "rate"):
        raise ValueError(f"by={by!r}: order the tokens by 'count' or by 'rate'")
    if minimum < 1:
        raise ValueError(f"minimum={minimum}: ask for 1 occurrence or more")
    chosen = shift.among(group)
    rows = []
    for i, count, often in token_counts(shift.ids[chosen], shift.kinds[chosen] == 2):
        if count >= minimum and often:
            rate = wilson(often, count)
            row = {"id": i, "token": shift.strings[str(i)], "count": count, "shifted": often}
            rows.append({**row, "rate": rate.value, "low": rate.low, "high": rate.high})
    order = ("shifted", "rate") if by == "count" else ("rate", "shifted")
    rows.sort(key=lambda row: (-row[order[0]], -row[order[1]], row["id"]))
    columns = ["id", "token", "count", "shifted", "rate", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def by_bucket(shift: "TokenShift", group: str | None) -> "pd.DataFrame":
    """One row per bucket that occurs. `shifted` is the share of its tokens that are shifted, with
    limits over prompts (None where fewer than two answers have such a token); `of_shifted` its
    share of all shifted tokens; `kl` its mean KL in nats."""
    import pandas as pd

    chosen = shift.among(group)
    shifted = shift.kinds == 2
    rows = []
    for b, bucket in enumerate(BUCKETS):
        own = chosen & (shift.buckets == b)
        n = int(own.sum())
        if not n:
            continue
        share: tuple[float | None, ...] = (float(shifted[own].double().mean()), None, None)
        prompts = len(shift.owners[own].unique())
        if prompts > 1:
            share = _at(share_intervals(shift.over_prompts(shifted[:, None], own)), 0)
        value, low, high = share
        rows.append(
            {
                "bucket": bucket,
                "tokens": n,
                "prompts": prompts,
                "of_tokens": n / int(chosen.sum()),
                "shifted": value,
                "low": low,
                "high": high,
                "of_shifted": int((own & shifted).sum()) / max(1, int((chosen & shifted).sum())),
                "kl": float(shift.kl[own].double().mean()),
            }
        )
    return pd.DataFrame(rows)


def _mean(shift: "TokenShift", quantity: str, group: str | None, places: range) -> Interval:
    if quantity == "shifted":
        return _at(shift.shares(group, places), 2)
    if quantity == "rank":
        found = shift.mean("log_rank", group, places)
        return Interval(*torch.tensor(found, dtype=torch.float64).exp().tolist())
    return shift.mean(quantity, group, places)


def _at(share: Intervals, k: int) -> Interval:
    return Interval(*(float(limit[k]) for limit in share))


def _columns(name: str, found: Interval) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
