"""Properties of a checkpoint that is given by name: loaded, measured, dropped."""

from collections.abc import Callable
from functools import cache
from typing import Any

from analyses.drift.bisect import Property
from analyses.drift.ledger import DriftLedger
from analyses.drift.terms import TERMS
from analyses.drift.yardstick import Yardstick
from probes.contrast import Contrast
from probes.model import HookedModel
from probes.refusals import refuses
from probes.scores import Interval, wilson

Load = Callable[[str], HookedModel]


def refusal_property(contrast: Contrast, positive: bool, **options: Any) -> Property:
    """Share of the positive (or negative) prompts whose greedy answer opens with a refusal, with
    its Wilson interval. Each checkpoint reads its own template; options go to `HookedModel.load`."""
    asked = [
        p for p, label in zip(contrast.prompts, contrast.labels, strict=True) if label == positive
    ]

    @cache
    def measure(name: str) -> Interval:
        answers = HookedModel.load(name, **options).generate(asked, 10)
        return wilson(sum(map(refuses, answers)), len(asked))

    return measure


def ledger_property(
    base: str, reference: str, contrast: Contrast, term: str, *, seed: int = 0, **options: Any
) -> Property:
    """A term of the drift ledger, or its headline, in units of its null. Base and reference are
    loaded when the first checkpoint is measured, and kept."""
    if term not in (*TERMS, "headline"):
        raise ValueError(f"unknown term {term!r}: choose {', '.join((*TERMS, 'headline'))}")

    @cache
    def yardstick() -> Yardstick:
        from_, to = HookedModel.load(base, **options), HookedModel.load(reference, **options)
        return Yardstick.of(from_, to, contrast, seed=seed)

    def measure(name: str) -> Interval:
        stick = yardstick()
        same = name == reference
        drift = stick.measure(stick.reference if same else HookedModel.load(name, **options))
        ledger = DriftLedger.of(stick, [drift])
        if term == "headline":
            return ledger.headline(drift.label)
        k = TERMS.index(term)
        return Interval(*(float(x[0, k]) for x in (ledger.value, ledger.low, ledger.high)))

    return measure
