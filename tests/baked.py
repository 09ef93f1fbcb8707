"""What the tests of baked checkpoints share."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from probes import HookedModel, Site
from probes.engines import Batch
from steering import HeadOffsets, Origin, SteeringVector, steer
from steering.export.checkpoint import Baked


def drawn(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vector_at(
    model: HookedModel, site: str, operation: str = "add", size: float = 3.0
) -> SteeringVector:
    return SteeringVector(
        {Site.parse(site): drawn(model.d_model, size=size)}, Origin.of(model), operation
    )


def offsets_of(model: HookedModel) -> HeadOffsets:
    width = model.layout.blocks[1].widths["head_out"]
    vectors = {(1, 0): drawn(width), (1, 3): drawn(width, seed=1), (2, 1): drawn(width, seed=2)}
    return HeadOffsets(vectors, Origin.of(model))


def batch() -> Batch:
    """Other tokens than those of the proof inside `bake`; the second row is shorter."""
    ids = torch.randint(3, 170, (3, 15), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return Batch(ids, mask)


def logits(model: HookedModel) -> Tensor:
    return model.engine.logits(batch())[batch().mask.bool()].detach()


def plainly(folder: Path) -> tuple[Any, Tensor]:
    """The model as anyone loads it, with nothing lost or lacking, and its logits."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(found.values()), found
    with torch.no_grad():
        out = model(input_ids=batch().ids, attention_mask=batch().mask)
    return model, out.logits[batch().mask.bool()]


def assert_equal_live(
    baked: Baked, model: HookedModel, what: Any, strength: float = 1.0, unit: str = "raw"
) -> Any:
    """The folder equals the live edit on tokens of our own; gives the model loaded from it."""
    with steer(model, what, strength, unit=unit):
        live = logits(model)
    loaded, found = plainly(baked.folder)
    effect = float((live - logits(model)).abs().max())
    assert float((found - live).abs().max()) < 1e-4 < 0.2 < effect
    assert baked.error < 1e-4 < 0.2 < baked.effect
    assert baked.loading.clean and baked.architecture == type(loaded).__name__
    return loaded
