"""Intervals and claims of selectivity: rates are never a point, and draws are no prompts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_analyses_selectivity import ASKED, TEXTS, TOPICS, run, triple
from torch import Tensor

from analyses.subspaces.grouping import ratio_over
from analyses.subspaces.selectivity import Behaviour, selectivity
from analyses.subspaces.selectivity_intervals import difference, mean
from analyses.subspaces.selectivity_result import Selectivity
from probes import HookedModel
from probes.scores import wilson

NAMES = tuple(map(str, range(TOPICS)))


def made(top: Tensor, random: Tensor, groups: tuple[str, ...] = NAMES) -> Selectivity:
    """A result of one cell of top-k and of `draws` of random subspaces."""
    cell = {"fraction": 0.5, "part": "parallel", "of": "size", "matched": True}
    cells = [{**cell, "subspace": "top-k", "seed": 0}]
    cells += [{**cell, "subspace": "random", "seed": i} for i in range(len(random))]
    ends = torch.stack([torch.ones(len(groups)), torch.zeros(len(groups))])
    return Selectivity(
        alignment="V", update="U", fractions=(0.5,), of="size", behaviours=("b",), harmful=(True,),
        groups=(groups,), cells=tuple(cells), energy=torch.ones(3 + len(random)),
        values=torch.cat([ends, top[None], random]).float(), draws=len(random),
    )  # fmt: skip


def bits(rate: float, *shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < rate).double()


@pytest.mark.parametrize("draws", [1, 3, 20])
@pytest.mark.parametrize("hits", [0, 1, 11, 24])
def test_draws_on_the_same_prompts_are_no_more_trials(draws: int, hits: int) -> None:
    one = (torch.arange(TOPICS) < hits).double()
    found = mean(one.repeat(draws, 1), NAMES)
    assert found == pytest.approx(wilson(hits, TOPICS), abs=1e-12)
    assert found.high - found.low > 0.1
    # nor are paraphrases
    again = mean(one.repeat_interleave(5)[None], tuple(n for n in NAMES for _ in range(5)))
    assert again == pytest.approx(wilson(hits, TOPICS), abs=1e-12)


def test_a_rate_between_two_counts_lies_between_their_intervals() -> None:
    values = bits(0.3, 3, TOPICS)
    found, hits = mean(values, NAMES), float(values.sum()) / 3
    below, above = (wilson(f(hits), TOPICS) for f in (math.floor, math.ceil))
    assert found.value == pytest.approx(hits / TOPICS)
    assert below.low < found.low < above.low and below.high < found.high < above.high
    plain = torch.randn(3, TOPICS, generator=torch.Generator().manual_seed(1)).double()
    boot = ratio_over(plain.mean(0), torch.ones(TOPICS), NAMES)
    assert mean(plain, NAMES) == pytest.approx(boot)


def method_10(a: int, b: int, c: int, d: int) -> tuple[float, float, float]:
    """Newcombe (1998), from the table of pairs: both, first only, second only, neither."""
    n = a + b + c + d
    one, two = wilson(a + b, n), wilson(a + c, n)
    spread = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    cross = cross if cross < 0 else max(cross - n / 2, 0)
    phi = cross / spread**0.5 if spread else 0.0
    theta = one.value - two.value
    l1, u1, l2, u2 = (
        one.value - one.low,
        one.high - one.value,
        two.value - two.low,
        two.high - two.value,
    )
    low = (l1**2 - 2 * phi * l1 * u2 + u2**2) ** 0.5
    high = (u1**2 - 2 * phi * u1 * l2 + l2**2) ** 0.5
    return theta, theta - low, theta + high


@pytest.mark.parametrize("table", [(36, 12, 2, 0), (0, 0, 0, 24), (12, 0, 0, 12), (5, 3, 9, 7)])
def test_paired_rates_are_those_of_newcombes_table(table: tuple[int, int, int, int]) -> None:
    a, b, c, d = table
    one = torch.tensor([1.0] * (a + b) + [0.0] * (c + d))
    other = torch.tensor([1.0] * a + [0.0] * b + [1.0] * c + [0.0] * d)
    names = tuple(map(str, range(len(one))))
    found = difference(one[None].double(), other[None].double(), names)
    assert found == pytest.approx(method_10(*table), abs=1e-12)
    assert found.high - found.low > 0.05
    turned = difference(other[None].double(), one[None].double(), names)
    assert turned == pytest.approx((-found.value, -found.high, -found.low))


def test_paired_intervals_hold_the_truth() -> None:
    held = 0
    for seed in range(300):
        rate = bits(0.5, TOPICS, seed=5 * seed)  # of 0.2 in some topics, of 0.1 in the others
        a, b = (
            torch.where(rate > 0, bits(0.2, TOPICS, seed=at), bits(0.1, TOPICS, seed=at + 1))
            for at in (5 * seed + 1, 5 * seed + 3)
        )
        found = difference(a[None], b[None], NAMES)
        held += found.low <= 0 <= found.high
    assert held >= 280


def test_no_change_is_exact_for_one_model_and_uncertain_for_two() -> None:
    found = made(torch.zeros(TOPICS), torch.zeros(3, TOPICS))
    assert found.value([3, 4, 5], "b") == pytest.approx(wilson(0, TOPICS))
    contrast = found.selective(0.5)["b"]
    assert contrast.value == 0 and contrast.low < -0.1 and contrast.high > 0.1
    assert found.change(2, "b", 2) == (0.0, 0.0, 0.0)
    still = Selectivity(**{**vars(found), "energy": torch.zeros(6)})
    assert still.change([3, 4], "b", 2) == (0.0, 0.0, 0.0)  # nothing was added to either


def test_a_planted_effect_is_claimed_and_one_more_draw_is_not() -> None:
    random = bits(0.3, 20, TOPICS)
    strong = made(torch.ones(TOPICS), random)
    assert strong.claimed("b", 0.5)
    assert "(claimed)" in str(strong)
    row = strong.frame().query("subspace == 'top-k'").iloc[0]
    assert row["claimed"] and row["minus_random_low"] > row["random_95"] > 0
    weak = made(torch.zeros(TOPICS), 1 - bits(0.3, 20, TOPICS))
    assert weak.selective(0.5)["b"].high < 0 and weak.claimed("b", 0.5)
    few = made(torch.ones(TOPICS), random[:19])
    assert not few.claimed("b", 0.5)
    claims = sum(
        made(bits(0.3, TOPICS, seed=1 + s), bits(0.3, 20, TOPICS, seed=100 + s)).claimed("b", 0.5)
        for s in range(60)
    )
    assert claims <= 1


def test_draws_that_differ_forbid_what_their_mean_would_allow() -> None:
    """Half the draws refuse everything, half nothing: top-k at 1 is what a draw may well be."""
    random = torch.cat([torch.zeros(10, TOPICS), torch.ones(10, TOPICS)])
    found = made(torch.ones(TOPICS), random)
    assert found.selective(0.5)["b"].low > 0.1
    assert found.spread("b", 0.5) == pytest.approx(0.5 * 20 / 19)
    assert not found.claimed("b", 0.5)
    each = torch.rand(20, generator=torch.Generator().manual_seed(2)).double()
    spread = made(torch.ones(TOPICS), each[:, None].expand(20, TOPICS)).spread("b", 0.5)
    others = [(each.sum() - x) / 19 for x in each]
    far = torch.stack([(x - o).abs() for x, o in zip(each, others, strict=True)])
    assert spread == pytest.approx(float(far.quantile(0.95)), rel=1e-6)
    assert math.isnan(made(torch.ones(TOPICS), random[:1]).spread("b", 0.5))


def measure(token: int) -> Behaviour:
    """One name, one set of topics, another measure."""
    texts = list(TEXTS)

    def logit(model: HookedModel) -> Tensor:
        return model.logits(texts)[:, token].double()

    return Behaviour("logit", logit, tuple(TEXTS), True)


def test_another_measure_under_the_same_name_is_not_taken_up(tmp_path: Path) -> None:
    given: dict[str, Any] = {"fractions": (0.25,), "subspaces": ("top-k",), "progress": False}
    first = selectivity(*triple(), tmp_path, (measure(20),), **given)
    again = selectivity(*triple(), tmp_path, (measure(20),), **given)
    assert torch.equal(first.values, again.values)
    with pytest.raises(ValueError, match="cells of another model, update or set of prompts"):
        selectivity(*triple(), tmp_path, (measure(30),), **given)
    aligned, V, U = triple()
    other = HookedModel(aligned.model, aligned.tokenizer, name="aligned", template="none")
    with pytest.raises(ValueError, match="cells of another model"):
        selectivity(other, V, U, tmp_path, (measure(20),), **given)
    with (
        aligned.edit({"0.resid_post": lambda h, where: h}),
        pytest.raises(ValueError, match="edits are in force on aligned, and selectivity"),
    ):
        selectivity(aligned, V, U, tmp_path, (measure(20),), **given)


def test_the_record_says_what_was_measured(tmp_path: Path) -> None:
    given: dict[str, Any] = {"fractions": (0.5,), "matched": (True,), "parts": ("parallel",)}
    found = run(tmp_path, **given).record
    aligned, V, U = triple()
    assert found.models == ("aligned", "aligned", "base", "tuned", "aligned")
    assert found.fingerprints == (aligned.fingerprint, *V.fingerprints, *U.fingerprints)
    assert len(set(found.fingerprints)) == 3 and "" not in found.fingerprints
    assert found.template_hash == aligned.template.hash
    assert (found.dtype, found.seeds) == ("float32", (0,)) and found.prompts_hash
    other = selectivity(aligned, V, U, tmp_path / "o", ASKED[:1], progress=False, **given).record
    assert other.prompts_hash != found.prompts_hash
