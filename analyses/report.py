"""The main job: checkpoints in, one page and its figures out."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analyses import checkpoints as lineages
from analyses.checkpoints import Checkpoints
from analyses.drift.ledger import DriftLedger
from analyses.drift.weight_changes import WeightChanges
from analyses.drifted import measure_drift
from analyses.maps import Maps, map_activations
from analyses.pairs import pairs
from analyses.refusals import RefusalRates, refusal_rates
from analyses.separation import Separation, measure_separation
from analyses.steered import refusal_openers, steer_class
from analyses.tokens import contexts
from analyses.tokens.shift import TokenShift, token_shift
from probes.capturing import capture
from probes.contrast import Contrast
from probes.prompts import prompts_hash
from probes.results import Record
from probes.splits import FEW_GROUPS
from probes.sweeps import ProbeSweep, sweep
from steering.sweep import SteeringSweep

DEFAULT = ("builtin:base", "builtin:aligned", ("builtin:drifted", "builtin:mixed"))


@dataclass(frozen=True)
class Size:
    """How many prompts and shuffles a report uses; all counts are printed in it.

    Asked for, these are upper limits; in a `Report` they are what there was.
    """

    train: int
    """Topics (twin pairs) the probes are fitted on."""
    validation: int
    """Topics the layer is chosen on."""
    test: int
    """Topics every figure is measured on."""
    answered: int
    """Test topics whose prompts are answered by every checkpoint."""
    shifted: int
    """Test topics whose prompts the aligned model answers at length for the token shift."""
    tokens: int
    """Tokens of these long answers."""
    steered: int
    """Validation and test topics whose negative prompts the aligned model reads when steered."""
    permutations: int
    """Label shuffles of the probes' null."""
    every: int
    """The probes look at every n-th layer."""


SIZES = {
    "quick": Size(24, 16, 24, 8, 6, 12, 6, 40, 6),
    "default": Size(96, 40, 80, 40, 24, 24, 20, 200, 1),
    "full": Size(320, 80, 160, 160, 80, 48, 80, 1000, 1),
}


@dataclass(frozen=True)
class Report:
    """Everything a report shows."""

    tokens: TokenShift
    sweeps: tuple[tuple[str, ProbeSweep], ...]
    """Label and probe sweep of each checkpoint."""
    separation: Separation
    maps: Maps
    refusals: RefusalRates
    steering: SteeringSweep
    """The aligned model with the class direction added."""
    drift: tuple[DriftLedger, WeightChanges] | None
    """Every other checkpoint, and two round trips, against the aligned one; None where base and
    aligned are equal."""
    classes: tuple[str, str]
    contrast: str
    size: Size
    notes: tuple[str, ...]
    seconds: float
    record: Record


def run(
    base: str = DEFAULT[0],
    aligned: str = DEFAULT[1],
    drifted: Sequence[str] = DEFAULT[2],
    *,
    prompts: str | None = None,
    size: Size = SIZES["default"],
    seed: int = 0,
    engine: str = "transformers",
    base_context: str = "same",
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Report:
    """Load the checkpoints and measure every panel. `say` hears what is being done.

    `base_context` is what the base reads before the answers in the token shift, and only there
    (`contexts.CONTEXTS`).
    """
    began = time.monotonic()
    contexts.check(base_context)
    parts, classes, name = pairs(prompts, size, seed)  # a wrong file is said at once
    say("loading " + ", ".join((base, aligned, *drifted)))
    checkpoints = lineages.load(base, aligned, drifted, engine=engine, **options)
    return measure(
        checkpoints, parts, classes, name, size, seed, say, began, base_context=base_context,
        prompts=prompts,
    )  # fmt: skip


def measure(
    checkpoints: Checkpoints,
    parts: dict[str, Contrast],
    classes: tuple[str, str],
    name: str,
    size: Size,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    began: float | None = None,
    *,
    base_context: str = "same",
    prompts: str | None = None,
) -> Report:
    """All panels for checkpoints already loaded. `prompts` is the file the parts come from, which
    the record names."""
    began = time.monotonic() if began is None else began
    with warnings.catch_warnings():  # these limits part nothing that an interval is made over
        warnings.filterwarnings("ignore", "only .* groups")
        answered = parts["test"].limited(size.answered, seed)
        long = answered.limited(size.shifted, seed)
        turned = {p: parts[p].limited(size.steered, seed) for p in ("validation", "test")}
    size = dataclasses.replace(
        size,
        train=_topics(parts["train"]),
        validation=_topics(parts["validation"]),
        test=_topics(parts["test"]),
        answered=_topics(answered),
        shifted=_topics(long),
        steered=_topics(turned["test"]),
    )
    notes = list(checkpoints.notes)
    if size.test < FEW_GROUPS:
        notes.append(
            f"There are only {size.test} test topics: intervals over fewer than {FEW_GROUPS} are "
            "too narrow, so read them as a rough guide."
        )
    say(f"token shift: {checkpoints.labels[1]} answers {len(long)} prompts")
    shift = token_shift(
        checkpoints.base,
        checkpoints.aligned,
        long.prompts,
        [classes[0 if label else 1] for label in long.labels],
        max_new_tokens=size.tokens,
        vocab_size=checkpoints.vocab_size,
        base_context=base_context,
    )
    say(f"refusals: {len(checkpoints.items)} checkpoints answer {len(answered)} prompts")
    refusals = refusal_rates(
        checkpoints, answered.prompts, [classes[0 if label else 1] for label in answered.labels]
    )

    everyone = [p for part in parts.values() for p in part.prompts]
    positive = torch.cat([part.positive for part in parts.values()])
    topics = [topic for part in parts.values() for topic in part.topics]
    bounds = torch.tensor([0, *(len(part) for part in parts.values())]).cumsum(0).tolist()
    rows = {part: torch.arange(bounds[i], bounds[i + 1]) for i, part in enumerate(parts)}
    activations: dict[str, Tensor] = {}
    captured = {}
    for item in checkpoints.items:
        say(f"capturing {len(everyone)} prompts of {item.label}")
        acts = captured[item.label] = capture(item.model, everyone, "all.resid_post")
        activations[item.label] = torch.stack([acts[site].float() for site in acts.sites])
    n_layers = checkpoints.aligned.n_layers
    layers = sorted({*range(0, n_layers, size.every), n_layers - 1})
    sweeps = []
    for label, values in activations.items():
        say(f"probing {label}: {len(layers)} layers, {size.permutations} label shuffles each")
        sweeps.append(
            (
                label,
                sweep(
                    {f"{layer}.resid_post": values[layer] for layer in layers},
                    positive,
                    topics,
                    train=rows["train"],
                    test=rows["test"],
                    validation=rows["validation"],
                    permutations=size.permutations,
                    seed=seed,
                ),
            )
        )
    say("separation and directions")
    apart = measure_separation(
        activations,
        positive,
        topics,
        train=rows["train"],
        test=rows["test"],
        reference=checkpoints.labels[0],
        seed=seed,
    )
    best = sweeps[1][1].best
    say(f"maps of {best}")
    layer = int(best.partition(".")[0])
    test = rows["test"]
    drawn = map_activations(
        activations[checkpoints.labels[1]][layer][test],
        positive[test],
        classes=classes,
        site=best,
        model=checkpoints.labels[1],
        seed=seed,
    )
    label = checkpoints.labels[1]
    openers = refusal_openers(refusals, label)
    if not openers:
        notes.append(
            f"{label} refused none of the prompts, so panel f reads the odds of an answer that "
            "begins with I."
        )
    say(f"steering {label}: {size.steered} prompts")
    steered = steer_class(
        checkpoints.aligned,
        {"train": parts["train"], **turned},
        captured[label].select(rows["train"].tolist()),
        openers or ["I"],
        seed=seed,
    )
    say(f"drift from {label}: {len(checkpoints.items) + 1} checkpoints")
    ledger = measure_drift(
        checkpoints, answered, refusals, parts["test"], activations, rows["test"], seed
    )
    if ledger is None:
        notes.append(f"{checkpoints.labels[0]} and {label} have equal weights: nothing drifts.")
    template = checkpoints.aligned.template
    read = [contexts.render(template, prompt, base_context) for prompt in long.prompts]
    record = Record(
        models=tuple(item.model.name for item in checkpoints.items),
        fingerprints=tuple(item.model.fingerprint for item in checkpoints.items),
        template_hash=template.hash,
        prompts_hash=prompts_hash(template.render_all(everyone)),
        seeds=(seed,),
        dtype=str(checkpoints.aligned.dtype).removeprefix("torch."),
        engine=checkpoints.aligned.engine.name,
        settings={
            **dataclasses.asdict(size),
            "threads": torch.get_num_threads(),
            "base_context": base_context,
            "prompts": prompts,
            "base_prompts_hash": prompts_hash(read),
        },
    )
    say("drawing")
    return Report(
        shift,
        tuple(sweeps),
        apart,
        drawn,
        refusals,
        steered,
        ledger,
        classes,
        name,
        size,
        (*notes, *shift.notes),
        time.monotonic() - began,
        record,
    )


def _topics(contrast: Contrast) -> int:
    return len(set(contrast.topics))
