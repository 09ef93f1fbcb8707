"""What `alignlens steer` and `alignlens sweep` train on, steer at and measure, and how much it is."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probes.contrast import Contrast
    from probes.model import HookedModel
    from steering.effects import Measure

EFFECTS = ("refusals", "odds")
COSTS = ("kl", "perplexity", "mistakes", "repetition", "benign_refusals")
WRITTEN = {"refusals": 12, "benign_refusals": 12, "repetition": 64, "kl": 32}
"""Tokens of each answer that a measure writes, or reads behind the prompt (kl)."""


TRAINED = 100
"""Topics that `alignlens steer` makes a vector of, and `alignlens sweep` with it."""


def splits_of(source: Path | None, seed: int, trained: int, measured: int) -> "dict[str, Contrast]":
    """Training, validation and test topics of a file, or of the shipped twins: at most `trained`
    to make a vector of, `measured` to choose on and to test on."""
    from probes import datasets
    from probes.contrast import Contrast

    if source is None:
        parts = {p: datasets.safety(p) for p in datasets.SPLITS}
    else:
        given = datasets.read(source)
        if not isinstance(given, Contrast):
            raise ValueError(
                f"{source} holds plain prompts: a steering vector needs pairs or labels"
            )
        parts = given.split(seed=seed)
    most = dict.fromkeys(parts, measured) | {"train": trained}
    return {name: part.limited(most[name], seed) for name, part in parts.items()}


def site_texts(model: "HookedModel", sites: str | None) -> list[str]:
    """Single sites as texts; by default every eighth of the depth, from a quarter on."""
    if sites is not None:
        return [str(site) for site in model.sites(sites.split())]
    n = model.n_layers
    layers = sorted({n * i // 8 for i in range(2, 8)})
    return [f"{layer}.resid_post" for layer in layers]


class Side(NamedTuple):
    """Prompts of one class with their topics."""

    prompts: tuple
    topics: tuple[str, ...]


def side_of(contrast: "Contrast", positive: bool) -> Side:
    rows = [i for i, label in enumerate(contrast.labels) if label == positive]
    picked = [(contrast.prompts[i], contrast.topics[i]) for i in rows]
    return Side(*zip(*picked, strict=True))


def effect_of(name: str, asked: list, openers: "Sequence[str]") -> "Measure":
    from steering import effects

    if name == "refusals":
        return partial(effects.refusals, prompts=asked)
    return partial(effects.refusal_odds, prompts=asked, openers=tuple(openers))


def cost_of(name: str, model: "HookedModel", part: str) -> "Measure":
    """A cost on shipped benign prompts; other ones for test than for validation."""
    from steering import costs

    asked = _shipped(name, part)
    if name == "kl":
        return partial(costs.kl, reference=costs.Reference.of(model, asked))
    if name == "perplexity":
        return partial(costs.text_log_perplexity, texts=asked)
    if name == "mistakes":
        return partial(costs.mistakes, items=asked)
    return partial(
        costs.repetition if name == "repetition" else costs.benign_refusals, prompts=asked
    )


def _shipped(cost: str, part: str) -> list[Any]:
    from probes import datasets

    test = part == "test"
    if cost == "perplexity":
        return datasets.paragraphs()[50:] if test else datasets.paragraphs()[:50]
    if cost == "mistakes":
        return datasets.choices()[100:] if test else datasets.choices()[:100]
    return datasets.general(part)[:16]


class Estimate(NamedTuple):
    """Roughly what a sweep takes."""

    passes: int
    """Measures applied to their prompts, on validation and test together."""
    tokens: int
    """Read or written by the model in these passes."""
    disk: int
    """Bytes of finished measurements."""
    memory: int
    """Bytes of weights, kept logits and captured activations."""


def estimate(
    model: "HookedModel",
    parts: "dict[str, Contrast]",
    sides: dict[str, Side],
    effects: list[str],
    costs: list[str],
    *,
    sites: int,
    settings: int,
    nulls: int,
) -> Estimate:
    """Counted from the prompts alone: nothing is trained, captured or generated.

    `settings` are those of strength above or below 0; at 0 the unsteered model stands for them.
    """
    passes, disk = 0, 2**20  # of figures and tables
    tokens = _read(model, parts["train"].prompts)
    for part, cells in (("validation", settings), ("test", 1)):
        for name in (*effects, *costs):
            effect = name in effects
            asked = list(sides[part].prompts) if effect else _shipped(name, part)
            times = 1 + cells * (1 + nulls if effect else 1)
            passes += times
            tokens += times * (_measured(model, name, asked) + WRITTEN.get(name, 0) * len(asked))
            disk += times * (400 + 22 * len(asked))
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters())
    logits = 16 * WRITTEN["kl"] * model.layout.vocab_size * model.dtype.itemsize
    kept = logits if "kl" in costs and logits < 2**30 else 0
    rows = 4 * model.d_model * sites * len(parts["train"])
    return Estimate(passes, tokens, disk, weights + kept + rows)


def _measured(model: "HookedModel", name: str, asked: list[Any]) -> int:
    """Tokens of the prompts of a measure."""
    if name == "perplexity":
        return sum(len(ids) for ids in model.tokenizer(asked)["input_ids"])
    if name == "mistakes":
        texts = [f"Question: {i['question']}\nAnswer: {c}" for i in asked for c in i["choices"]]
        return sum(len(ids) for ids in model.tokenizer(texts)["input_ids"])
    return _read(model, asked)


def _read(model: "HookedModel", prompts: "Sequence[Any]") -> int:
    return sum(len(r.ids) for r in model.template.render_all(prompts))
