"""Tiny checkpoints of one model for the tests of `analyses`: in memory, or saved as folders."""

from pathlib import Path
from typing import Any

import tiny
import torch
from architectures import build

from analyses.checkpoints import Checkpoint, Checkpoints, compare
from probes import HookedModel
from probes.contrast import Contrast

PAIRS = 60


def weights(first_changed: int | None = None, seed: int = 0, vocab: int | None = None) -> Any:
    """A tiny Llama; the blocks from `first_changed` on are moved at random."""
    model = build("llama")
    if vocab is not None:
        # drawn by torch's global generator, which is put back
        with torch.random.fork_rng():
            torch.random.manual_seed(7)
            model.resize_token_embeddings(vocab, mean_resizing=False)
    if first_changed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for block in model.model.layers[first_changed:]:
                for weight in block.parameters():
                    noise = torch.randn(weight.shape, generator=generator)
                    weight += 0.3 * weight.std() * noise if weight.dim() > 1 else 0
    return model


def hooked(
    name: str,
    first_changed: int | None = None,
    seed: int = 0,
    vocab: int | None = None,
    tokenizer: Any = None,
) -> HookedModel:
    own = tiny.tokenizer() if tokenizer is None else tokenizer
    return HookedModel(weights(first_changed, seed, vocab), own, name=name)


def checkpoints() -> Checkpoints:
    """A lineage of three, equal in the first block."""
    return compare(
        [
            Checkpoint("base", hooked("first")),
            Checkpoint("aligned", hooked("second", 1, seed=1)),
            Checkpoint("drifted", hooked("third", 1, seed=2)),
        ]
    )


def pairs(n: int = PAIRS) -> Contrast:
    """Twins of random words; the positive one begins with a word of its own."""
    texts = tiny.words(n, seed=3)
    return Contrast.of_pairs([f"w7 {t}" for t in texts], [f"w8 {t}" for t in texts], name="words")


def save(folder: Path, first_changed: int | None = None, *, template: bool = True) -> str:
    """A tiny checkpoint on the disk, as a name that can be loaded."""
    weights(first_changed).save_pretrained(folder)
    tokenizer = tiny.tokenizer() if template else tiny.tokenizer(template=None)
    tokenizer.save_pretrained(folder)
    return str(folder)
