"""The drift ledger of a report, from what the report has read already."""

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.checkpoints import Checkpoints
from analyses.drift.ledger import DriftLedger
from analyses.drift.readings import OPENING, Path, Reading
from analyses.drift.round_trips import FORMATS, round_trip
from analyses.drift.weight_changes import WeightChanges
from analyses.drift.yardstick import Yardstick
from analyses.refusals import RefusalRates
from probes.contrast import Contrast
from probes.refusals import refuses


def measure_drift(
    checkpoints: Checkpoints,
    answered: Contrast,
    refusals: RefusalRates,
    test: Contrast,
    activations: Mapping[str, Float[Tensor, "layer prompt d_model"]],
    rows: Int[Tensor, " test"],
    seed: int = 0,
) -> tuple[DriftLedger, WeightChanges] | None:
    """Every checkpoint but the aligned one, and round trips of that, measured against it.

    `answered` is the part of the test contrast whose answers `refusals` holds; `rows` are the places
    of the test prompts among the activations. None where base and aligned have equal weights.
    """
    base, aligned = checkpoints.base, checkpoints.aligned
    if base.fingerprint == aligned.fingerprint:
        return None
    places = {
        (t, label): i for i, (t, label) in enumerate(zip(test.topics, test.labels, strict=True))
    }
    kept = rows[[places[key] for key in zip(answered.topics, answered.labels, strict=True)]]

    def reading(label: str, path: Path) -> Reading:
        m = refusals.models.index(label)
        said = torch.tensor([refuses(answer) for answer in refusals.answers[m]])
        model = checkpoints.items[m].model
        return Reading(activations[label][:, kept].float(), said, path.logp(model))

    answers = aligned.generate_ids(answered.prompts, OPENING)
    path = Path.of(aligned, answers, answered, checkpoints.vocab_size)
    with warnings.catch_warnings():  # the report says once how few topics there are
        warnings.filterwarnings("ignore", "only .* topics")
        stick = Yardstick.of(
            base, aligned, answered, given=(reading(aligned.label, path), path), seed=seed
        )
    measured = [
        stick.measure(
            item.model,
            "base" if item.role == "base" else "drifted",
            item.label,
            reading(item.label, path),
        )
        for item in checkpoints.items
        if item.role != "aligned"
    ]
    for kind in FORMATS:
        copy = round_trip(aligned, kind)
        measured.append(stick.measure(copy, "control", copy.label))
    trained = [d for d in measured if d.role == "drifted"] or measured[:1]
    changes = WeightChanges.of(
        base.label, aligned.label, [d.label for d in trained], [d.weights for d in trained]
    )
    return DriftLedger.of(stick, measured), replace(changes, record=stick.record)
