"""Scores of whole parts: differences of activations times the metric's gradient, token by token."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.mechanisms.gradients import Slopes, mixed, summed
from analyses.patching.metrics import Metric
from analyses.patching.patcher import HELD, Patcher
from analyses.patching.spans import Alignment
from probes.results import check_finite
from probes.sites import HEADED, Site

INPUT = Site(0, "resid_pre")
"""What the first block is given: token embeddings, with learned positions where there are any."""


def node_scores(
    patcher: Patcher,
    slopes: Slopes,
    parts: Sequence[Site],
    metric: Metric,
    method: str = "gradient",
    alphas: Sequence[float] = (0.0,),
    *,
    others: Sequence[Alignment] = (),
    advance: Callable[[int], None] = lambda n: None,
) -> dict[Site, Float[Tensor, "pairing prompt *head"]]:
    """Scores of whole parts, float64: of the patcher's pairs, then of each other pairing, with the
    gradient of the patcher's own pairs."""
    pairings = [patcher.alignment, *others]
    found: dict[Site, Tensor] = {}
    for portion in portions(patcher, parts, method == "activations"):
        own = patcher.runs.read([*dict.fromkeys([*portion, INPUT])])
        given = _values(patcher, portion, pairings)
        begin = patcher.values.at([INPUT])[INPUT] if method == "inputs" else []
        for chunk in slopes.chunks:
            slope: dict[Site, list[Tensor]] = {}
            for alpha in alphas:
                edits = []
                for site, values in (
                    [(INPUT, begin)]
                    if method == "inputs"
                    else [(portion[0], given[portion[0]][0])]
                    if method == "activations"
                    else []
                ):
                    placed = [
                        (r, slopes.columns(chunk, r, pairings[0].target[i]), values[i])
                        for r, i in enumerate(chunk)
                    ]
                    edits.append(mixed(site, placed, alpha))
                tape = slopes.tape(chunk, portion, edits)
                value = summed(metric, tape, patcher.target_logits, patcher.texts)
                for site, g in tape.gradients(value, portion).items():
                    rows = [row.double() / len(alphas) for row in tape.unpadded(g)]
                    before = slope.get(site)
                    slope[site] = (
                        rows
                        if before is None
                        else [a + b for a, b in zip(before, rows, strict=True)]
                    )
                advance(1)
            for site in portion:
                heads = own[site][0].shape[1:-1]
                size = (len(pairings), len(patcher.ids), *heads)
                into = found.setdefault(site, torch.zeros(size, dtype=torch.float64))
                for i, g in zip(chunk, slope[site], strict=True):
                    check_finite(g, f"the gradient at {site} of prompt {i}")
                    for n, pairing in enumerate(pairings):
                        at = list(pairing.target[i])
                        change = given[site][n][i].double() - own[site][i][at].double()
                        into[n, i] = (change * g[at]).sum((0, -1))
    return found


def portions(patcher: Patcher, parts: Sequence[Site], alone: bool) -> list[list[Site]]:
    """Parts whose activations are held together, under `HELD` bytes; or each alone."""
    each = 2 * sum(map(len, patcher.ids)) * patcher.model.d_model * 4
    size = 1 if alone else max(1, HELD // each)
    return [list(parts[k : k + size]) for k in range(0, len(parts), size)]


def _values(
    patcher: Patcher, parts: Sequence[Site], pairings: Sequence[Alignment]
) -> dict[Site, list[list[Tensor]]]:
    """Source values by part, pairing and prompt, at the aligned tokens."""
    if len(pairings) == 1:
        return {site: [rows] for site, rows in patcher.values.at(parts).items()}
    read = patcher.values.runs.read(parts)  # once for all pairings
    return {
        site: [
            [rows[j][list(s)] for j, s in zip(p.partner, p.source, strict=True)] for p in pairings
        ]
        for site, rows in read.items()
    }


def moves(patcher: Patcher) -> bool:
    """Whether the source's embeddings differ from the target's at any aligned token."""
    own = patcher.runs.read([INPUT])[INPUT]
    given = patcher.values.at([INPUT])[INPUT]
    return any(
        not torch.equal(v, o[list(t)])
        for v, o, t in zip(given, own, patcher.alignment.target, strict=True)
    )


def headed(values: Float[Tensor, " prompt *head"], site: Site) -> Float[Tensor, " prompt"]:
    if site.part not in HEADED:
        return values
    return values.sum(-1) if site.head is None else values[:, site.head]
