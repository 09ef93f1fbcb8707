"""Every estimator finds a planted direction, with its sign, and says what it cannot use."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.ccs import ccs_direction
from probes.directions import (
    Direction,
    difference_of_means,
    from_moments,
    lda,
    pca_of_pairs,
    whitened_mean,
)
from probes.linear import logistic_direction
from probes.moments import ClassMoments

D = 24
ESTIMATORS = {
    "difference_of_means": difference_of_means,
    "pca_of_pairs": pca_of_pairs,
    "pca_of_pairs_uncentred": partial(pca_of_pairs, centred=False),
    "lda": lda,
    "whitened_mean": whitened_mean,
    "logistic": logistic_direction,
    "ccs": ccs_direction,
}


def planted(n: int = 1500, gap: float = 3.0, noise: float = 1.0, seed: int = 0):
    """Twins: a shared part, plus and minus half the gap along `v`, and noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    shared = 0.3 * torch.randn(n, D, generator=generator) + 2
    own = noise * torch.randn(2, n, D, generator=generator)
    return v, shared + gap / 2 * v + own[0], shared - gap / 2 * v + own[1]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_planted_direction_is_found_with_its_sign(name):
    v, positive, negative = planted()
    found = ESTIMATORS[name](positive, negative, site="3.resid_post")
    assert float(found.unit @ v) > 0.99
    assert found.unit.norm() == pytest.approx(1, abs=1e-6)
    assert found.unit.dtype == torch.float32
    assert found.project(positive).mean() > found.project(negative).mean()
    swapped = ESTIMATORS[name](negative, positive)
    assert found.cosine(swapped) < -0.97
    assert (found.site, found.n) == ("3.resid_post", 3000)
    assert found.estimator == name


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_a_planted_direction_nothing_near_it_is_found(name):
    v, positive, negative = planted(gap=0.0)
    assert abs(float(ESTIMATORS[name](positive, negative).unit @ v)) < 0.7


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scales_are_those_of_the_projections(name):
    _, positive, negative = planted(n=60)
    found = ESTIMATORS[name](positive, negative)
    high, low = found.project(positive).double(), found.project(negative).double()
    assert found.gap == pytest.approx(float(high.mean() - low.mean()), rel=1e-4)
    assert found.midpoint == pytest.approx(float(high.mean() + low.mean()) / 2, abs=1e-4)
    pooled = ((high.var() + low.var()) / 2).sqrt()
    assert found.sigma == pytest.approx(float(pooled), rel=1e-4)
    assert torch.allclose(found.raw, found.unit * found.raw_norm)


def test_raw_norms_mean_what_they_say():
    _, positive, negative = planted()
    delta = positive.mean(0) - negative.mean(0)
    assert torch.allclose(difference_of_means(positive, negative).raw, delta, atol=1e-5)
    assert pca_of_pairs(positive, negative).raw_norm == pca_of_pairs(positive, negative).gap
    within = ClassMoments.of({1: positive, 0: negative}).within_covariance()
    distance = float(delta.double() @ torch.linalg.solve(within, delta.double())) ** 0.5
    plain = whitened_mean(positive, negative, shrinkage=0.0)
    assert plain.raw_norm == pytest.approx(distance, rel=1e-5)


def test_centred_pairs_need_a_random_order():
    """As in representation reading: all differences the same way, and centring removes them."""
    v, positive, negative = planted(noise=0.1)
    shuffled = pca_of_pairs(positive, negative)
    ordered = pca_of_pairs(positive, negative, shuffle_seed=None)
    assert abs(float(shuffled.unit @ v)) > 0.99
    assert abs(float(ordered.unit @ v)) < 0.9


def test_lda_is_fishers_and_undoes_a_mixing_that_misleads_the_means():
    _, positive, negative = planted(n=500)
    mix = torch.diag(torch.linspace(0.1, 8, D))
    positive, negative = positive @ mix, negative @ mix
    found = lda(positive, negative, shrinkage=0.0)
    within = ClassMoments.of({1: positive, 0: negative}).within_covariance()
    delta = (positive.mean(0) - negative.mean(0)).double()
    exact = torch.linalg.solve(within, delta)
    assert float(found.unit.double() @ exact / exact.norm()) == pytest.approx(1, abs=1e-6)
    means = difference_of_means(positive, negative)
    assert found.gap / found.sigma > 1.2 * means.gap / means.sigma
    half = whitened_mean(positive, negative, shrinkage=0.0)
    assert found.cosine(half) > found.cosine(means)
    # full shrinkage is a sphere, where all three are one
    assert lda(positive, negative, shrinkage=1.0).cosine(means) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["difference_of_means", "lda", "whitened_mean"])
def test_moments_give_what_rows_give(name):
    _, positive, negative = planted(n=50)
    moments = ClassMoments({})
    for a, b in zip(positive.split(13), negative.split(13), strict=True):
        moments.update(torch.cat([b, a]), [0] * len(b) + [1] * len(a))
    streamed, direct = from_moments(moments, name), ESTIMATORS[name](positive, negative)
    assert streamed.cosine(direct) == pytest.approx(1, abs=1e-6)
    assert streamed.estimator == direct.estimator
    for field in ("raw_norm", "gap", "sigma", "midpoint", "n"):
        assert getattr(streamed, field) == pytest.approx(getattr(direct, field), rel=1e-6), field


def test_pca_of_moments_is_the_widest_axis_of_all_rows():
    v, positive, negative = planted()
    found = from_moments(ClassMoments.of({1: positive, 0: negative}), "pca")
    centred = torch.cat([positive, negative])
    widest = torch.linalg.svd(centred - centred.mean(0), full_matrices=False).Vh[0]
    assert float(found.unit @ v) > 0.99
    assert abs(float(found.unit @ widest)) > 0.99


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.01, 100), shift=st.floats(-50, 50), seed=st.integers(0, 999))
def test_scaling_and_shifting_change_scales_only(scale, shift, seed):
    _, positive, negative = planted(n=20, seed=seed)
    found = difference_of_means(positive, negative)
    moved = difference_of_means(positive * scale + shift, negative * scale + shift)
    assert found.cosine(moved) > 1 - 1e-4
    assert moved.raw_norm == pytest.approx(scale * found.raw_norm, rel=1e-3)
    assert moved.sigma == pytest.approx(scale * found.sigma, rel=1e-3)


def test_projection_keeps_leading_shape_and_takes_half_precision():
    _, positive, negative = planted(n=12)
    found = difference_of_means(positive, negative)
    grid = found.project(positive.reshape(3, 4, D).bfloat16())
    assert grid.shape == (3, 4)
    assert torch.allclose(grid.flatten(), found.project(positive), atol=0.05)


def test_one_pair_is_enough_for_a_mean_difference():
    _, positive, negative = planted(n=1)
    found = difference_of_means(positive, negative)
    assert found.sigma == 0
    assert torch.allclose(found.raw, (positive - negative)[0], atol=1e-6)


def test_it_is_saved_shown_and_drawn(tmp_path):
    _, positive, negative = planted()
    found = difference_of_means(positive, negative, site="3.resid_post")
    again = Direction.load(found.save(tmp_path))
    assert torch.equal(again.unit, found.unit)
    assert (again.gap, again.site, again.n) == (found.gap, found.site, found.n)
    assert "3.resid_post" in str(found)
    assert "\n" not in str(found)
    assert found.frame().loc[0, "d_prime"] == pytest.approx(found.gap / found.sigma)
    ax = found.plot()
    assert [line.get_label() for line in ax.lines] == ["difference_of_means", "random"]
    ours, random = (torch.as_tensor(line.get_ydata()).double() for line in ax.lines)
    assert ours.tolist() == sorted(found.unit.abs().double().tolist(), reverse=True)
    assert bool((random.diff() < 0).all())
    assert float(random.norm()) == pytest.approx(1, abs=0.05)


def bare(function, *args, **kwargs):
    """Without the test run's shape checks, as a user runs it."""
    return function.__wrapped__(*args, **kwargs)


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: bare(difference_of_means, X, X[:, :2]), "3 wide and negative rows 2"),
        (lambda: difference_of_means(X, X), "does not part the classes"),
        (lambda: difference_of_means(X, X[:0]), "negative activations have shape (0, 3)"),
        (lambda: difference_of_means(X, X / 0), "negative activations holds 18 values"),
        (lambda: bare(pca_of_pairs, X, X[:5]), "6 positive and 5 negative rows are not pairs"),
        (lambda: pca_of_pairs(X[:1], X[1:2]), "one pair has no variance"),
        (lambda: pca_of_pairs(X, X), "do not vary"),
        (lambda: lda(X[:2], X[2:4], shrinkage=0.0), "singular with shrinkage 0.0"),
        (lambda: from_moments(ClassMoments.of({1: X})), "no rows of class 0"),
        (lambda: bare(from_moments, ClassMoments.of({1: X, 0: -X}), "ica"), "'ica'"),
        (lambda: difference_of_means(X, -X).project(torch.ones(2, 4)), "width 4 cannot"),
        (
            lambda: difference_of_means(X, -X).cosine(difference_of_means(X[:, :2], -X[:, :2])),
            "widths 3 and 2",
        ),
    ],
)
def test_refusals(act, message):
    with pytest.raises(ValueError, match=r".") as caught:
        act()
    assert message in str(caught.value)
