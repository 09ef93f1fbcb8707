"""Baked checkpoints behind `transformers serve`: text for text. Needs the extra `serving`."""

from pathlib import Path

import pytest
import torch

from probes import HookedModel, datasets
from probes.sites import Site
from steering import Origin, Steering, SteeringVector
from steering.export.checkpoint import bake
from steering.export.proving import prove
from steering.export.transformers_run import TransformersServe
from steering.export.unsteered import plain_folder
from steering.export.verdict import verify

pytestmark = pytest.mark.serving


def test_transformers_serve_writes_the_steered_text(base: HookedModel, tmp_path: Path) -> None:
    v = torch.randn(base.d_model, generator=torch.Generator().manual_seed(0))
    what = SteeringVector({Site(12, "resid_post"): 40 * v / v.norm()}, Origin.of(base))
    done = bake(base, what, tmp_path / "baked")
    texts = [text.split(".")[0] + " is" for text in datasets.paragraphs()[:2]]
    prompts = [tuple(base.tokenizer(text)["input_ids"]) for text in texts]
    found = prove(
        base, Steering(what), done.folder, "checkpoint", "transformers-serve",
        prompts=prompts, n_tokens=12,
    )  # fmt: skip
    assert (found.outcome, found.kind) == ("equal", "tokens"), str(found)
    ignored = TransformersServe(plain_folder(base))
    plain = verify(base, Steering(what), ignored, prompts, 12, target="checkpoint")
    assert plain.outcome == "not applied", str(plain)
