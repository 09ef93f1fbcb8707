"""Panel f: the class direction of a model with a planted one acts, that of shuffled labels does not."""

import dataclasses
from typing import Any

import pytest
import torch
from test_analyses_report import tiny_report

from analyses import summary
from analyses.refusals import RefusalRates
from analyses.steered import COST, EFFECT, NULLS, STRENGTHS, refusal_openers, steer_class
from probes import HookedModel, capture
from probes.contrast import Contrast
from probes.lineage import organism
from probes.prompts import Prompt
from steering import Steering, SteeringSweep, train_vector
from steering.effects import refusal_odds


@pytest.fixture(scope="module")
def aligned() -> HookedModel:
    world = organism.build(0)
    return HookedModel(world.aligned, world.tokenizer, name="organism aligned")


@pytest.fixture(scope="module")
def parts() -> dict[str, Contrast]:
    return organism.build(0).pairs.split(seed=0)


def panel(model: HookedModel, parts: dict[str, Contrast], seed: int = 0) -> SteeringSweep:
    acts = capture(model, parts["train"].prompts, "all.resid_post", progress=False)
    return steer_class(model, parts, acts, ["i"], seed=seed)


def test_a_planted_direction_acts_and_says_its_odds(
    aligned: HookedModel, parts: dict[str, Contrast]
) -> None:
    found = panel(aligned, parts)
    assert found.strengths.tolist() == list(STRENGTHS)
    assert found.effects == (EFFECT,) and found.costs == (COST,)
    assert len(found.kinds) == NULLS
    assert bool(found.claimed[-1, 0]) and float(found.change[-1, 0]) > 0
    # by hand: the layer that does most on validation, measured on harmless test prompts
    vector = train_vector(aligned, parts["train"], [f"{k}.resid_post" for k in (1, 2, 3)])

    def harmless(part: str) -> list[Prompt]:
        own = parts[part]
        return [p for p, label in zip(own.prompts, own.labels, strict=True) if not label]

    def moved(part: str, site: Any) -> float:
        asked = harmless(part)
        steered = refusal_odds(aligned, Steering(vector.at(site)), asked, openers=("i",))
        return float((steered - refusal_odds(aligned, None, asked, openers=("i",))).mean())

    best = max(map(str, vector.sites), key=lambda site: moved("validation", site))
    assert set(found.sites) == {best}
    assert float(found.change[-1, 0]) == pytest.approx(moved("test", best), rel=1e-3)


def test_shuffled_labels_do_nothing(aligned: HookedModel, parts: dict[str, Contrast]) -> None:
    half = torch.arange(len(set(parts["train"].topics))) % 2 == 0
    known = {topic: bool(half[i]) for i, topic in enumerate(dict.fromkeys(parts["train"].topics))}
    train = parts["train"]
    labels = tuple(
        int(y) ^ known[topic] for y, topic in zip(train.labels, train.topics, strict=True)
    )
    wrong = {**parts, "train": dataclasses.replace(train, labels=labels)}
    assert not panel(aligned, wrong).claimed[:, 0].any()


def test_openers_are_the_first_words_of_refusals() -> None:
    said = ("I cannot help with that.", "I'm sorry, but no.", "I cannot do it.", "Sure! Here", "")
    rates = RefusalRates(("a",), ("g",), ((3,),), (5,), (said,))
    assert refusal_openers(rates, "a") == ["I", "I'm"]
    rare = (*said[:1] * 30, *said[1:2])
    assert refusal_openers(dataclasses.replace(rates, answers=(rare,)), "a") == ["I"]
    assert refusal_openers(dataclasses.replace(rates, answers=(said[3:],)), "a") == []


def test_the_summary_claims_what_is_beyond_the_null() -> None:
    report = tiny_report()

    def sentence(change: float) -> str:
        moved = torch.full_like(report.steering.change, change)
        steering = dataclasses.replace(
            report.steering, change=moved, low=moved - 0.1, high=moved + 0.1
        )
        return summary.steering_sentence(dataclasses.replace(report, steering=steering))

    assert "acts, and is not only read" in sentence(1e3)
    assert "nothing is claimed" in sentence(0.0)
    assert "nothing is claimed" in sentence(-1e3)  # far beyond, but away from refusing
