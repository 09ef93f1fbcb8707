"""Does the subspace that alignment wrote to amplify safe behaviour selectively, or everything alike?

Parts of an update in three kinds of subspace are added to the aligned weights, and behaviour is
measured at each fraction: along the strongest directions of the alignment (top-k), along others of
them, and along random ones (arXiv 2505.14185, experiments 1 and 2). Selective would be that harmful
behaviour moves with top-k more than with the same number of random directions, and useful
behaviour does not. The norm-matched form holds the size of the update fixed, which removing or
keeping a part does not.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.subspaces.deltas import Deltas, record_of, together
from analyses.subspaces.edited import Projected, edited_model
from analyses.subspaces.projection_energy import FRACTIONS
from analyses.subspaces.projections import SUBSPACES, Directions, Of, Part, Subspace, square
from analyses.subspaces.selectivity_result import DRAWS, ENDS, Selectivity
from probes import datasets, files
from probes.model import HookedModel
from probes.progress import progress as show
from probes.results import Record, check_finite
from steering.cells import measure_key, refuse_edits
from steering.costs import mistakes, text_log_perplexity
from steering.effects import refusals

PARTS: tuple[Part, ...] = ("parallel", "orthogonal")


@dataclass(frozen=True)
class Behaviour:
    """One number a prompt, measured on a model."""

    name: str
    """What it is, with its unit: "harmful requests refused (share)"."""
    measure: Callable[[HookedModel], Float[Tensor, " prompt"]]
    groups: tuple[str, ...]
    """Topic of each prompt: intervals resample topics."""
    harmful: bool
    """Whether it is a behaviour on harmful requests (else a useful one)."""
    key: str = ""
    """Adds to what tells the measure from others. Its code, what it closes over and what `partial`
    puts into it are seen already; what a function reads from its module is not."""

    @property
    def identity(self) -> str:
        """Hash of all that decides the values on a given model; a folder of another is refused."""
        return _hash([self.name, self.key, self.groups, measure_key(self.measure)])


def behaviours(topics: int = 24, questions: int = 60, texts: int = 24) -> tuple[Behaviour, ...]:
    """Refusal of harmful test requests and of their harmless twins (12 tokens, judged by how the
    answer opens), accuracy on the shipped four-choice questions, log-perplexity of shipped text.

    The topics are spread over the hazard classes.
    """
    rows = datasets.twins("test")
    classes = list(dict.fromkeys(row["class"] for row in rows))
    ranked = [[row for row in rows if row["class"] == name] for name in classes]
    spread = [group[i] for i in range(max(map(len, ranked))) for group in ranked if i < len(group)]
    if not 2 <= topics <= len(rows):
        raise ValueError(f"{topics} topics were asked: give 2 to {len(rows)}")
    chosen, items, paragraphs = spread[:topics], datasets.choices(), datasets.paragraphs()
    step = max(1, len(items) // questions)
    asked, read = items[::step][:questions], paragraphs[:texts]
    names = tuple(row["topic"] for row in chosen)
    harmful = [row["harmful"] for row in chosen]
    harmless = [row["harmless"] for row in chosen]
    return (
        Behaviour(
            "harmful requests refused (share)",
            partial(refusals, what=None, prompts=harmful),
            names,
            True,
        ),
        Behaviour(
            "harmless twins refused (share)",
            partial(refusals, what=None, prompts=harmless),
            names,
            False,
        ),
        Behaviour(
            "questions answered correctly (share)",
            lambda model: 1 - mistakes(model, None, asked),
            tuple(str(i) for i in range(len(asked))),
            False,
        ),
        Behaviour(
            "log-perplexity of text (nats per token)",
            partial(text_log_perplexity, what=None, texts=read),
            tuple(str(i) for i in range(len(read))),
            False,
        ),
    )


def cells_of(
    fractions: Sequence[float] = FRACTIONS,
    subspaces: Sequence[Subspace] = SUBSPACES,
    parts: Sequence[Part] = PARTS,
    matched: Sequence[bool] = (False, True),
    of: Of = "size",
    draws: int = 1,
    seed: int = 0,
) -> list[Projected]:
    """What `selectivity` measures beside the two ends."""
    return [
        Projected(fraction, subspace, part, of, match, seed + draw)
        for part in parts
        for match in matched
        for subspace in subspaces
        for fraction in fractions
        for draw in range(1 if subspace == "top-k" else draws)
    ]


def selectivity(
    aligned: HookedModel,
    V: Deltas,
    U: Deltas,
    folder: Path | str,
    measured: Sequence[Behaviour] | None = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    subspaces: Sequence[Subspace] = SUBSPACES,
    parts: Sequence[Part] = PARTS,
    matched: Sequence[bool] = (False, True),
    of: Of = "size",
    draws: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Selectivity:
    """Measure behaviour with parts of U = tuned - aligned added to the aligned model.

    Each cell is one edited copy of the model, measured and thrown away; its numbers are written to
    `folder` at once, and the same call goes on where an earlier one stopped. A folder of another
    question is refused. `measured` defaults to `behaviours()`. Memory: two models, and at most 1 GiB
    of singular vectors of V.
    """
    refuse_edits(aligned, "selectivity")
    asked = behaviours() if measured is None else tuple(measured)
    _check(asked, fractions, draws)
    folder = Path(folder)
    cells = cells_of(fractions, subspaces, parts, matched, of, draws, seed)
    identity = _identity(aligned, V, U, asked)
    question = folder / "question.json"
    if question.is_file() and json.loads(question.read_text()) != identity:
        raise ValueError(
            f"{folder} holds cells of another model, update or set of prompts: give an empty folder"
        )
    files.write_json(question, identity)
    directions = Directions()
    rows: list[list[float]] = []
    energies: list[float] = []
    with show(len(cells) + 2, f"selectivity of {V}", progress) as done:
        for what in (*ENDS, *cells):
            found = _cell(aligned, V, U, what, asked, folder, directions)
            energies.append(found["energy"])
            rows.append([x for b in asked for x in found["values"][b.name]])
            done(1)
    notes = [*dict.fromkeys((*V.notes, *U.notes))]
    for b in asked:
        if len(set(b.groups)) < 20:
            notes.append(
                f"{b.name}: intervals rest on {len(set(b.groups))} topics; 20 are advised."
            )
    if draws < DRAWS:
        notes.append(
            f"Random subspaces drawn for each cell: {draws}; a claim needs {DRAWS}, so none is made."
        )
    made = record_of(V, U)
    return Selectivity(
        alignment=str(V),
        update=str(U),
        fractions=tuple(float(f) for f in fractions),
        of=of,
        behaviours=tuple(b.name for b in asked),
        harmful=tuple(b.harmful for b in asked),
        groups=tuple(b.groups for b in asked),
        cells=tuple(asdict(cell) for cell in cells),
        energy=torch.tensor(energies),
        values=torch.tensor(rows),
        draws=draws,
        notes=tuple(notes),
        record=Record(
            models=(aligned.name, *made.models),
            fingerprints=(aligned.fingerprint, *made.fingerprints),
            template_hash=_template(aligned),
            prompts_hash=_hash([b.identity for b in asked]),
            seeds=(seed,),
            dtype=str(aligned.dtype).removeprefix("torch."),
            engine=aligned.engine.name,
            settings={"of": of, "draws": draws, "behaviours": [b.name for b in asked]},
        ),
    )


def _cell(
    aligned: HookedModel,
    V: Deltas,
    U: Deltas,
    what: Projected | str,
    asked: Sequence[Behaviour],
    folder: Path,
    directions: Directions,
) -> dict[str, Any]:
    """Numbers of one cell, or of an end, read from the folder or measured and written there."""
    of = f" of {what.of}" if isinstance(what, Projected) else ""
    path = folder / f"{what}{of}.json".replace(" ", "-")
    if path.is_file():
        return json.loads(path.read_text())
    model, energy = aligned, 0.0
    if what != ENDS[0]:
        part = what if isinstance(what, Projected) else None
        model, energy = edited_model(aligned, V, U, part, directions)
    values = {}
    for b in asked:
        found = b.measure(model)
        if found.shape != (len(b.groups),):
            raise ValueError(
                f"{b.name} gave values of shape {tuple(found.shape)} for {len(b.groups)} topics: "
                "a behaviour gives one number a prompt"
            )
        check_finite(found, b.name)
        values[b.name] = found.double().tolist()
    files.write_json(path, {"energy": energy, "values": values})
    return {"energy": energy, "values": values}


def _identity(
    aligned: HookedModel, V: Deltas, U: Deltas, asked: Sequence[Behaviour]
) -> dict[str, Any]:
    """What the numbers in a folder depend on beside the cell: models by content, and prompts."""
    listed = together(V, U)
    sizes = [sum(square(d[name]) for name in listed if name in d.shapes) for d in (V, U)]
    return {
        "aligned": [aligned.fingerprint, str(aligned.dtype), _template(aligned)],
        "differences": [str(V), str(U), *V.fingerprints, *U.fingerprints],
        "squared norms": [f"{size:.12g}" for size in sizes],
        "behaviours": [[b.name, b.identity] for b in asked],
    }


def _template(model: HookedModel) -> str:
    return "" if model.tokenizer is None else model.template.hash


def _check(asked: Sequence[Behaviour], fractions: Sequence[float], draws: int) -> None:
    if not asked or not fractions or draws < 1:
        raise ValueError(
            f"{len(asked)} behaviours, {len(fractions)} fractions and {draws} draws were asked: "
            "give at least one of each"
        )
    for b in asked:
        if len(set(b.groups)) < 2:
            raise ValueError(
                f"{b.name} has one topic only: intervals need 2 topics, 20 are advised"
            )
    if len({b.name for b in asked}) < len(asked):
        raise ValueError(
            f"two of the behaviours {', '.join(b.name for b in asked)} share a name: give each its "
            "own"
        )


def _hash(given: Any) -> str:
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]
