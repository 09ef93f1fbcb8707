"""Ranking accuracy, the idealised one, theorem 4.1, and intervals of rates in groups."""

import math
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from sklearn.metrics import accuracy_score

from analyses.tokens.preference_theory import CERTAIN, idealised_margin, loss_bound
from analyses.tokens.ranking import BETAS, RankingAccuracy, ranking_accuracy
from probes import HookedModel
from probes.clustered import clustered_wilson
from probes.scores import wilson

N = 60


def drawn(seed: int = 0, n: int = N, topics: int | None = None) -> RankingAccuracy:
    """Random log-probabilities of so many pairs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 30, (n, 2), generator=generator)
    logp = -2 * lengths * (0.5 + torch.rand(2, n, 2, generator=generator))
    shares = torch.rand(n, generator=generator)
    names = tuple(f"t{i % (topics or n):02d}" for i in range(n))
    return RankingAccuracy("tuned", "reference", names, logp, lengths, shares)


def test_accuracy_is_the_share_of_larger_probabilities() -> None:
    found = drawn()
    for w, who in enumerate(("model", "reference")):
        for normalised in (False, True):
            p = found.logp[w].double() / (found.lengths if normalised else 1)
            ahead = (p[:, 0] > p[:, 1]).numpy()
            kept = ((p[:, 0] - p[:, 1]).abs() >= found.tie).numpy()
            expected = accuracy_score([True] * int(kept.sum()), ahead[kept])
            own = found.accuracy(who, normalised)
            assert own.value == pytest.approx(expected)
            assert own == wilson(int(ahead[kept].sum()), int(kept.sum()))
            assert found.ties(who, normalised) == N - int(kept.sum())
    assert found.accuracy().value != found.accuracy(normalised=True).value


def test_more_probable_means_ranked_higher_not_lower() -> None:
    """Log-probabilities are negative: dividing them instead would turn the order round."""
    logp = torch.tensor([[[-5.0, -10.0]] * 20, [[-10.0, -5.0]] * 20])
    lengths, shares = torch.full((20, 2), 5), torch.full((20,), 0.5)
    found = RankingAccuracy("a", "b", tuple(map(str, range(20))), logp, lengths, shares)
    assert found.accuracy().value == 1 and found.accuracy("reference").value == 0
    assert found.idealised().median == 0  # raters undecided: the reference's order stays


def test_ties_are_left_out_and_counted() -> None:
    logp = torch.tensor([[[-5.0, -5.001], [-5.0, -5.0], [-5.0, -7.0], [-8.0, -7.0]]] * 2)
    shares, lengths = torch.full((4,), 0.9), torch.full((4, 2), 2)
    found = RankingAccuracy("a", "b", ("p", "q", "r", "s"), logp, lengths, shares)
    assert found.ties() == 2 and found.accuracy().value == 0.5
    exact = RankingAccuracy("a", "b", ("p", "q", "r", "s"), logp, lengths, shares, tie=0.0)
    assert exact.ties() == 0 and exact.accuracy().value == 0.75  # definition 2.3: >=
    with pytest.raises(ValueError, match="all 2 pairs are ties"):
        RankingAccuracy("a", "b", ("p", "q"), logp[:, :2], lengths[:2], shares[:2]).accuracy()


def test_limits_of_the_idealised_accuracy() -> None:
    found = drawn(1)
    raters = float((found.shares > 0.5).double().mean())
    free = RankingAccuracy(**{**vars(found), "betas": (1e-6,), "tie": 0.0})
    bound = RankingAccuracy(**{**vars(found), "betas": (1e6,), "tie": 0.0})
    for normalised in (False, True):
        assert free.idealised(normalised).median == pytest.approx(raters)
        was = bound.accuracy("reference", normalised).value
        assert bound.idealised(normalised).median == pytest.approx(was)
    every = found.idealised()
    assert every.low == min(every.by_beta) and every.high == max(every.by_beta)
    assert every.median == sorted(every.by_beta)[2] and len(every.by_beta) == len(BETAS)


def test_unanimous_raters_have_finite_odds() -> None:
    sure = idealised_margin(torch.zeros(2), torch.tensor([1.0, 0.0]), 1.0)
    odds = math.log((1 - CERTAIN) / CERTAIN)
    assert sure.tolist() == pytest.approx([odds, -odds])


def test_a_policy_optimised_on_dpo_reaches_the_theorems_ratio() -> None:
    """Three answers in a table, population loss over the raters, plain gradient descent."""
    reference = torch.tensor([-0.5, -2.0, -3.0], dtype=torch.float64).log_softmax(0)
    share, beta = 0.8, 0.5
    weights = reference.clone().requires_grad_(True)
    step = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss() -> torch.Tensor:
        step.zero_grad()
        policy = weights.log_softmax(0)
        moved = beta * ((policy[1] - reference[1]) - (policy[0] - reference[0]))
        wins = torch.nn.functional.logsigmoid(moved)
        total = -share * wins - (1 - share) * torch.nn.functional.logsigmoid(-moved)
        total.backward()
        return total

    step.step(loss)
    policy = weights.log_softmax(0).detach()
    expected = idealised_margin(
        (reference[1] - reference[0])[None], torch.tensor([share]).double(), beta
    )
    assert float(policy[1] - policy[0]) == pytest.approx(float(expected), abs=1e-6)
    assert float(expected) > 0 > float(reference[1] - reference[0])  # training turns this pair


def test_the_loss_splits_right_from_wrong_at_the_bound() -> None:
    found = drawn(2, 400)
    for beta in (0.1, 1.0):
        right = found.losses(beta) <= found.bounds(beta)
        assert torch.equal(right, found.margins() >= 0)
        assert 50 < int(right.sum()) < 350
    table = loss_bound(torch.tensor([5.0, 30.0]), 0.1)
    assert table.tolist() == pytest.approx([0.474, 0.0486], abs=5e-4)  # the paper's examples
    # proposition 2.6: the reference was right and the loss is small, so the pair is right
    safe = (found.margins("reference") > 0) & (found.losses() <= 0.6)
    assert safe.any() and bool((found.margins()[safe] >= 0).all())
    assert {"loss", "bound", "right"} <= set(found.pairs().columns)


def test_the_gap_is_paired_and_has_an_interval() -> None:
    found = drawn(3)
    gap = found.gap()
    expected = found.idealised().median - found.accuracy().value
    assert gap.value == pytest.approx(expected) and gap.low < gap.value < gap.high
    assert 0.55 < found.chance() < 0.65
    with pytest.raises(ValueError, match="choose one of model, reference"):
        found.margins("tuned")


def test_rows_of_one_group_count_as_less_than_rows_of_many() -> None:
    hits = torch.tensor([True] * 30 + [False] * 30)
    alone = clustered_wilson(hits, [str(i) for i in range(60)])
    assert alone == wilson(30, 60)
    twice = [f"{i // 2}" for i in range(60)]  # every group is two copies: as good as 30 rows
    copies = clustered_wilson(hits, twice)
    assert copies.value == 0.5
    assert copies.low == pytest.approx(wilson(15, 30).low, abs=1e-2)
    mixed = clustered_wilson(hits, [f"{i % 30}" for i in range(60)])  # each group has one of both
    assert copies.low < mixed.low < alone.low < mixed.low + 1e-2  # Student's t, 29 degrees
    assert clustered_wilson(torch.ones(60, dtype=torch.bool), twice) == wilson(30, 30)
    assert clustered_wilson(torch.zeros(60, dtype=torch.bool), twice) == wilson(0, 30)


def test_models_rank_pairs_and_identical_ones_say_so(tmp_path: Any) -> None:
    base, aligned = tiny_lineage.hooked("first"), tiny_lineage.hooked("second", 1, seed=4)
    pairs = [
        {"prompt": p, "chosen": a, "rejected": b, "rater_share": 0.9}
        for p, a, b in zip(tiny.words(20, 1), tiny.words(20, 2), tiny.words(20, 3), strict=True)
    ]
    found = ranking_accuracy(aligned, base, pairs)
    for w, model in enumerate((aligned, base)):
        for k, key in enumerate(("chosen", "rejected")):
            expected = model.logprobs([q["prompt"] for q in pairs], [str(q[key]) for q in pairs])
            own = found.logp[w, :, k]
            assert torch.allclose(own, torch.stack([e.sum() for e in expected]), atol=1e-4)
    assert found.lengths[:, 0].tolist() == [len(str(q["chosen"]).split()) for q in pairs]
    found.save(tmp_path)
    assert RankingAccuracy.load(tmp_path).frame().equals(found.frame())
    for axes in (found.plot(), found.plot_losses()):
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() is not None
    same = ranking_accuracy(base, base, pairs)
    assert "are the same model" in str(same)
    assert same.losses().unique().tolist() == pytest.approx([math.log(2)])


def test_wrong_pairs_and_models_are_refused(llama: HookedModel) -> None:
    good = {"prompt": "w1", "chosen": "w2", "rejected": "w3", "rater_share": 0.9}
    for change, said in (
        ({"rater_share": 1.2}, "give a share from 0 to 1"),
        ({"rejected": "w2"}, "the two answers of pair 1 are the same"),
    ):
        with pytest.raises(ValueError, match=said):
            ranking_accuracy(llama, llama, [good, {**good, **change}])
    lacking = {k: v for k, v in good.items() if k != "rater_share"}
    with pytest.raises(ValueError, match="pair 0 has no rater_share"):
        ranking_accuracy(llama, llama, [lacking] * 2)
    with pytest.raises(ValueError, match="give numbers above 0"):
        ranking_accuracy(llama, llama, [good, good], betas=(0.0,))
    other = HookedModel(llama.model, llama.tokenizer, template="{{ messages[0]['content'] }}")
    with (
        pytest.warns(UserWarning, match="only 1 groups"),
        pytest.raises(ValueError, match="different tokens"),
    ):
        ranking_accuracy(llama, other, [good, good])
