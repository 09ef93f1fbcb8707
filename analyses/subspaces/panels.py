"""The panels of `alignlens subspace`: what each measures on a lineage of loaded models."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analyses import checkpoints as lineages
from analyses.checkpoints import Checkpoints
from analyses.pairs import pairs
from analyses.subspaces.activations import measure_overlap
from analyses.subspaces.concept import measure_concept
from analyses.subspaces.difference_lens import measure_difference
from analyses.subspaces.difference_reading import REFUSAL_WORDS
from analyses.subspaces.difference_steering import steer_by_difference
from analyses.subspaces.erasure import measure_erasure
from analyses.subspaces.geometry import measure_geometry
from analyses.subspaces.panel import Panel, Say, Size, folder_names
from probes import datasets
from probes.capturing import capture
from probes.contrast import Contrast
from probes.model import HookedModel
from probes.prompts import prompts_hash
from probes.results import Record


@dataclass(frozen=True)
class Lineage:
    """Loaded checkpoints with the activations that the panels share."""

    checkpoints: Checkpoints
    layers: tuple[int, ...]
    parts: dict[str, Contrast]
    classes: tuple[str, str]
    activations: dict[str, Tensor]
    """`[layer, prompt, d_model]` by label: prompts of the parts, then general ones."""
    record: Record

    @property
    def labels(self) -> Tensor:
        return torch.cat([part.positive for part in self.parts.values()])

    @property
    def topics(self) -> list[str]:
        return [topic for part in self.parts.values() for topic in part.topics]

    @property
    def rows(self) -> dict[str, Tensor]:
        bounds = torch.tensor([0, *map(len, self.parts.values())]).cumsum(0).tolist()
        return {name: torch.arange(bounds[i], bounds[i + 1]) for i, name in enumerate(self.parts)}


def spaced(n_layers: int) -> tuple[int, ...]:
    """At most eight layers, evenly spaced, the last among them."""
    return tuple(sorted({n_layers * i // 8 - 1 for i in range(1, 9)} - {-1}))


def capture_lineage(
    loaded: Checkpoints, prompts: str | None, size: Size, seed: int, say: Say
) -> Lineage:
    """Activations of the twins (or of a file of pairs) and of general requests."""
    parts, classes, _ = pairs(prompts, size, seed)
    layers = spaced(loaded.aligned.n_layers)
    everyone = [p for part in parts.values() for p in part.prompts]
    everyone += datasets.general("test")[: size.test]
    activations = {}
    for item in loaded.items:
        say(f"capturing {len(everyone)} prompts of {item.label} at {len(layers)} layers")
        sites = [f"{layer}.resid_post" for layer in layers]
        acts = capture(item.model, everyone, sites, progress=False)
        activations[item.label] = torch.stack([acts[site].float() for site in sites])
    record = dataclasses.replace(
        described_as_loaded(loaded, seed),
        prompts_hash=prompts_hash(loaded.aligned.template.render_all(everyone)),
        settings={"layers": layers, **{p: len(c) // 2 for p, c in parts.items()}},
    )
    return Lineage(loaded, layers, parts, classes, activations, record)


def activation_panels(lineage: Lineage, seed: int, say: Say) -> list[Panel]:
    """Overlap of prompt sets, geometry, and the class contrast across checkpoints."""
    test, labels = lineage.rows["test"], lineage.labels
    n = len(labels)
    high, low = test[labels[test]], test[~labels[test]]
    names = lineage.classes
    sets = {
        label: {
            names[0]: x[:, high],
            names[1]: x[:, low],
            "general": x[:, n:],
        }
        for label, x in lineage.activations.items()
    }
    topics = {
        names[0]: [lineage.topics[int(i)] for i in high],
        names[1]: [lineage.topics[int(i)] for i in low],
        "general": [f"general-{i}" for i in range(next(iter(lineage.activations.values())).shape[1] - n)],
    }  # fmt: skip
    given: dict[str, Any] = {"layers": lineage.layers, "topics": topics, "seed": seed}
    say("overlap of activation subspaces")
    overlap = measure_overlap(sets, **given)
    figures = {
        "overlap": overlap.plot(),
        "overlap-uncentred": overlap.plot(form="uncentred"),
    }
    if len(sets) > 1:
        figures["overlap-checkpoints"] = overlap.plot(sets=(names[0], names[0]))
    say("dimensions and CKA")
    geometry = measure_geometry(sets, permutations=40, **given)
    panels = [
        Panel("activations", overlap, figures),
        Panel("geometry", geometry, {"dimensions": geometry.plot(), "cka": geometry.plot_cka()}),
    ]
    say("the class contrast across checkpoints")
    order = list(lineage.activations)
    order = [order[1], order[0], *order[2:]]  # the aligned model is where the concept was
    concept = measure_concept(
        {m: lineage.activations[m][:, :n] for m in order},
        labels,
        lineage.topics,
        train=lineage.rows["train"],
        test=test,
        rank=min(4, len(lineage.rows["train"]) // 4),
        layers=lineage.layers,
        seed=seed,
    )
    drawn = {"concept": concept.plot(), "concept-direction": concept.plot_cosine()}
    return [*panels, Panel("concept", concept, drawn)]


def erasure_panels(lineage: Lineage, seed: int, say: Say) -> list[Panel]:
    """Erasure in every checkpoint, at every second of the layers."""
    chosen = range(1, len(lineage.layers), 2) if len(lineage.layers) > 1 else range(1)
    strata = [s for part in lineage.parts.values() for s in (part.strata or ())]
    panels = []
    for label, x in lineage.activations.items():
        say(f"erasing the class from {label}")
        found = measure_erasure(
            {f"{lineage.layers[i]}.resid_post": x[i, : len(lineage.labels)] for i in chosen},
            lineage.labels,
            lineage.topics,
            train=lineage.rows["train"],
            probe=lineage.rows["validation"],
            test=lineage.rows["test"],
            strata=strata or None,
            model=label,
            seed=seed,
        )
        name = f"erasure-{folder_names(list(lineage.activations))[label]}"
        panels.append(Panel(name, found, {"erasure": found.plot()}))
    return panels


def lens_panels(
    loaded: Checkpoints,
    again: HookedModel | None,
    size: Size,
    seed: int,
    say: Say,
    words: Sequence[str] | None = None,
) -> list[Panel]:
    """The difference lens of the aligned model and of each drifted one, the same of a repeated
    training where there is one, and the base model steered by the first difference."""
    aligned, base = loaded.aligned, loaded.base
    texts = datasets.paragraphs()[: size.texts]
    words = REFUSAL_WORDS if words is None else words
    layers = spaced(aligned.n_layers)
    pairs = [(aligned, base), *((item.model, aligned) for item in loaded.drifted)]
    if again is not None:
        pairs.append((again, aligned))
    folders = folder_names([model.label for model, _ in pairs])
    panels, first = [], None
    for model, reference in pairs:
        say(f"difference lens {model.label} - {reference.label}")
        found = measure_difference(model, reference, texts, layers=layers, words=words, seed=seed)
        first = first or found
        name = "lens-" + ("seed-" if model is again else "") + folders[model.label]
        panels.append(Panel(name, found, {"difference": found.plot(), "words": found.plot_share()}))
    assert first is not None
    where = min(layers, key=lambda layer: abs(layer - 2 * aligned.n_layers // 3))
    if bool(first.difference[layers.index(where)].any()):
        say(f"steering {base.label} by the difference")
        steered = steer_by_difference(
            base, first, datasets.general("validation")[: size.asked], layer=where,
            strengths=(0.0, 4.0, 16.0), words=words, max_new_tokens=6, seed=seed,
        )  # fmt: skip
        panels.append(Panel("lens-steered", steered, {"steered": steered.plot()}))
    return panels


def described_as_loaded(loaded: Checkpoints, seed: int) -> Record:
    """What is known of the models before anything is measured on them."""
    return Record(
        models=tuple(item.model.name for item in loaded.items),
        fingerprints=tuple(item.model.fingerprint for item in loaded.items),
        template_hash=loaded.aligned.template.hash,
        seeds=(seed,),
        dtype=str(loaded.aligned.dtype).removeprefix("torch."),
        engine=loaded.aligned.engine.name,
    )


def load(base: str, aligned: str, tuned: Sequence[str], **options: Any) -> Checkpoints:
    """The lineage under one template (`analyses.checkpoints.load`)."""
    return lineages.load(base, aligned, tuned, **options)


def repeated(loaded: Checkpoints, name: str | None, **options: Any) -> HookedModel | None:
    """The model of a repeated training, made comparable; None where none is named."""
    if name is None:
        return None
    model = HookedModel.load(name, **options)
    return (
        lineages.compare([*loaded.items[:2], lineages.Checkpoint("drifted", model)]).items[2].model
    )
