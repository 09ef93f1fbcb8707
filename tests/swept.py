"""Small sweeps of a tiny model, for the tests of what a sweep applies, keeps and shows."""

import tiny
import torch
from torch import Tensor

from probes import HookedModel, Site
from steering import Origin, Scale, Steering, SteeringVector, effects
from steering.grid import Grid

WORDS = tiny.words(6, seed=8)


def at(site: Site, direction: Tensor, model: HookedModel) -> SteeringVector:
    return SteeringVector({site: direction}, Origin.of(model))


def several(model: HookedModel, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    sites = [Site(layer, "resid_post") for layer in range(3)]
    drawn = {s: (i + 1) * torch.randn(64, generator=generator) for i, s in enumerate(sites)}
    scales = dict.fromkeys(sites, Scale(0.5, 2.0))
    return SteeringVector(drawn, Origin.of(model), scales=scales)


def logit(model: HookedModel, what: Steering | None) -> Tensor:
    with effects.applied(model, what):
        return model.logits(WORDS)[:, 3].double()


def small(model: HookedModel) -> Grid:
    return Grid(
        {"v": several(model)},
        [0.0, 1.0, 2.0],
        sites=["0.resid_post", "2.resid_post"],
        nulls={"random": [several(model, seed) for seed in range(1, 4)]},
    )
