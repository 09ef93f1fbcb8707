"""Pooling over layers: the simplex, the loss, a planted layer found, shuffled labels not."""

import pytest
import torch
from torch import Tensor

from analyses.drift.clusters import scatter
from analyses.drift.pooling import (
    contrastive,
    fit_pooling,
    pooled,
    scale_of,
    scaled,
    sparsemax,
    uniform,
)
from probes.splits import shuffled

LAYERS, PLANTED = 6, 3


def planted(topics: int, seed: int, gap: float = 9.0) -> tuple[Tensor, Tensor, list[str]]:
    """Twins that only one layer tells apart; later layers have longer vectors."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2 * topics) % 2 == 0
    rows = torch.randn(2 * topics, LAYERS, 12, generator=generator)
    rows[labels, PLANTED, 0] += gap
    rows = rows * torch.tensor([1.0, 2, 4, 8, 16, 32])[:, None] + 5
    return rows, labels, [f"t{i // 2}" for i in range(2 * topics)]


def simplex_by_bisection(w: Tensor) -> Tensor:
    """Projection onto the simplex, solved for its threshold instead of sorted for it."""
    low, high = float(w.min()) - 1, float(w.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((w - middle).clamp(min=0).sum()) > 1 else (low, middle)
    return (w - low).clamp(min=0)


def test_sparsemax_is_the_projection_onto_the_simplex() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, spread in ((1, 1.0), (3, 0.1), (30, 1.0), (80, 5.0)):
        w = spread * torch.randn(20, size, generator=generator, dtype=torch.float64)
        found = sparsemax(w)
        assert torch.allclose(found, torch.stack([simplex_by_bisection(r) for r in w]), atol=1e-12)
        assert torch.allclose(found.sum(-1), torch.ones(20, dtype=torch.float64))
        assert torch.allclose(sparsemax(w + 3), found)
    assert sparsemax(torch.zeros(4)).tolist() == [0.25] * 4
    assert sparsemax(torch.tensor([5.0, 0.0, 0.1])).tolist() == [1.0, 0.0, 0.0]
    assert torch.allclose(sparsemax(torch.tensor([0.6, 0.4])), torch.tensor([0.6, 0.4]))


def test_sparsemax_has_the_gradient_of_a_projection() -> None:
    w = torch.tensor([0.9, 0.5, 0.3, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparsemax, (w,))


def test_the_loss_is_the_one_written_down() -> None:
    generator = torch.Generator().manual_seed(2)
    rows, labels, topics = planted(4, 3)
    x = scaled(rows, scale_of(rows))
    alpha = torch.rand(LAYERS, generator=generator).softmax(0)
    h = pooled(x, alpha).double()
    pairs = [(i, j) for i in range(8) for j in range(i)]
    d = [float((h[i] - h[j]).norm()) for i, j in pairs]
    rms = (sum(v * v for v in d) / len(d)) ** 0.5
    alike = [v / rms for v, (i, j) in zip(d, pairs, strict=True) if labels[i] == labels[j]]
    apart = [v / rms for v, (i, j) in zip(d, pairs, strict=True) if labels[i] != labels[j]]
    wanted = sum(v * v for v in alike) / len(alike)
    wanted += sum(max(0.0, 1 - v) ** 2 for v in apart) / len(apart)
    same = torch.tensor([[float(labels[i] == labels[j]) for i, j in pairs]])
    square = torch.tensor([[v * v for v in d]]).float()
    assert float(contrastive(square, same)) == pytest.approx(wanted, rel=1e-5)
    assert float(contrastive(9 * square, same)) == pytest.approx(wanted, rel=1e-5)
    # one step has the same loss: made from the quadratic forms
    fitted = fit_pooling(rows, labels[:, None], topics, steps=1, seeds=1, batch=8)
    h = pooled(x, uniform(LAYERS))
    i, j = torch.tensor(pairs).T
    plain = contrastive((h[i] - h[j]).square().sum(1)[None], same)
    assert float(fitted.loss[0, 0]) == pytest.approx(float(plain), rel=1e-4)


def test_layers_are_made_comparable_by_training_rows() -> None:
    rows, _, _ = planted(40, 1)
    scale = scale_of(rows)
    x = scaled(rows, scale)
    assert torch.allclose(x.mean(0), torch.zeros(LAYERS, 12), atol=1e-5)
    assert torch.allclose(x.square().sum(2).mean(0), torch.ones(LAYERS), atol=1e-5)
    rows[:, 2] = 7.0  # a layer that says nothing stays finite
    assert scaled(rows, scale_of(rows))[:, 2].abs().max() < 1e-5
    rows[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        scale_of(rows)


@pytest.mark.parametrize("normaliser", ["softmax", "sparsemax"])
def test_the_planted_layer_is_found_and_beats_equal_weights_held_out(normaliser: str) -> None:
    rows, labels, topics = planted(40, 5)
    fitted = fit_pooling(rows, labels[:, None], topics, normaliser=normaliser, seeds=3)
    alpha = fitted.alpha[0]
    assert alpha.shape == (3, LAYERS)
    assert torch.allclose(alpha.sum(1), torch.ones(3)) and bool((alpha >= 0).all())
    assert bool((alpha[:, PLANTED] > 0.6).all())
    fresh, held, _ = planted(40, 6)
    x = scaled(fresh, fitted.scale)
    learned, equal = (
        1 / scatter(pooled(x, a), held).xie_beni for a in (alpha.mean(0), uniform(LAYERS))
    )
    assert learned > 1.5 * equal


def test_shuffled_labels_find_no_layer() -> None:
    rows, labels, topics = planted(40, 7)
    generator = torch.Generator().manual_seed(0)
    wrong = shuffled(labels, topics, 20, generator)
    fitted = fit_pooling(rows, torch.cat([labels[:, None], wrong], 1), topics, seeds=1)
    found = fitted.alpha[:, 0, PLANTED]
    assert found[0] > 0.6 > 0.4 > float(found[1:].mean())
    fresh, held, _ = planted(40, 8)
    x = scaled(fresh, fitted.scale)
    ratios = [1 / scatter(pooled(x, a), held).xie_beni for a in fitted.alpha[:, 0]]
    assert ratios[0] > 1.2 * sum(ratios[1:]) / 20


def test_labellings_fitted_together_are_those_fitted_alone() -> None:
    rows, labels, topics = planted(20, 9)
    generator = torch.Generator().manual_seed(0)
    many = torch.cat([labels[:, None], shuffled(labels, topics, 3, generator)], 1)
    together = fit_pooling(rows, many, topics, steps=40, seeds=2)
    for k in range(4):
        alone = fit_pooling(rows, many[:, k, None], topics, steps=40, seeds=2)
        assert torch.allclose(alone.alpha[0], together.alpha[k], atol=1e-5)
    again = fit_pooling(rows, many, topics, steps=40, seeds=2)
    assert torch.equal(again.alpha, together.alpha)
    assert not torch.equal(together.alpha[0, 0], together.alpha[0, 1])  # seeds differ
    swapped = fit_pooling(rows, ~many, topics, steps=40, seeds=2)
    assert torch.allclose(swapped.alpha, together.alpha, atol=1e-6)


def test_many_rows_are_thinned_by_whole_topics() -> None:
    rows, labels, topics = planted(200, 11)
    fitted = fit_pooling(rows, labels[:, None], topics, seeds=1)
    assert fitted.alpha[0, 0, PLANTED] > 0.6


def test_what_cannot_be_fitted_is_refused() -> None:
    rows, labels, topics = planted(5, 1)
    with pytest.raises(ValueError, match="holds one class only"):
        fit_pooling(rows, torch.ones(10, 1, dtype=torch.bool), topics)
    with pytest.raises(ValueError, match="0 steps and 5 seeds were asked"):
        fit_pooling(rows, labels[:, None], topics, steps=0)
    with pytest.raises(ValueError, match="10 rows came with 10 labels and 9 topics"):
        fit_pooling(rows, labels[:, None], topics[:-1])
