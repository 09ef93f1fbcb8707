"""Moments merge to the whole, and what is read from them equals what rows give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf

from probes.moments import ClassMoments, Moments, principal_axes


def rows(n: int, d: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator)
    # squared, so that third moments are not zero
    return torch.randn(n, d, generator=generator).square() @ mix + offset


def close(a: Moments, b: Moments) -> None:
    assert a.count == b.count
    for name in ("mean", "scatter", "third"):
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours - theirs).norm() <= 1e-9 * (1 + theirs.norm()), name
    assert a.fourth == pytest.approx(b.fourth, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda s: sum(s) > 0),
    d=st.integers(1, 6),
    offset=st.sampled_from([0.0, 3.0, -100.0]),
    seed=st.integers(0, 10**6),
)
def test_parts_merge_to_the_whole_in_any_order(sizes, d, offset, seed):
    x = rows(sum(sizes), d, seed, offset)
    whole = Moments.of(x)
    streamed = Moments.empty(d)
    for part in x.split(sizes):
        streamed.update(part)
    merged = Moments.empty(d)
    for part in reversed(x.split(sizes)):
        merged = Moments.of(part).merge(merged)
    close(streamed, whole)
    close(merged, whole)


def test_moments_are_those_of_their_definition():
    x = rows(50, 4, offset=5.0)
    c = (x.double() - x.double().mean(0)).numpy()
    found = Moments.empty(4).update(x[:20]).update(x[20:])
    square = (c**2).sum(1)
    assert found.third.numpy() == pytest.approx((c * square[:, None]).sum(0), rel=1e-9)
    assert found.fourth == pytest.approx((square**2).sum(), rel=1e-9)
    assert torch.allclose(found.covariance(), torch.cov(x.double().T), rtol=1e-9)


def test_merge_leaves_its_parts_alone():
    a, b = Moments.of(rows(5, 3, 1)), Moments.of(rows(6, 3, 2))
    before = a.mean.clone(), a.scatter.clone(), a.fourth
    a.merge(b)
    assert torch.equal(a.mean, before[0])
    assert torch.equal(a.scatter, before[1])
    assert (a.count, a.fourth) == (5, before[2])


def test_a_large_mean_does_not_spoil_the_covariance():
    """The naive sum of squares loses it: the check that the sums are about the mean."""
    x = rows(200, 3, offset=1e4)
    exact = torch.cov(x.double().T)
    found = Moments.empty(3)
    for part in x.split(7):
        found.update(part)
    assert torch.allclose(found.covariance(), exact, rtol=1e-9)
    single = x.T @ x / 200 - torch.outer(x.mean(0), x.mean(0))
    assert not torch.allclose(single.double(), exact, rtol=1e-2)


@pytest.mark.parametrize(("n", "d"), [(20, 30), (200, 8), (12, 3)])
def test_ledoit_wolf_needs_no_rows(n, d):
    x = rows(n, d)
    found = Moments.empty(d).update(x[: n // 3]).update(x[n // 3 :])
    expected, _ = ledoit_wolf(x.double().numpy())
    assert found.shrunk().numpy() == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_shrinkage_pulls_eigenvalues_to_their_mean_and_no_further():
    found = Moments.of(rows(10, 20))
    spread = [float(torch.linalg.eigvalsh(found.shrunk(s)).std()) for s in (0.0, 0.5, 1.0)]
    assert spread[0] > spread[1] > spread[2]
    assert spread[2] < 1e-12
    assert found.shrunk(0.5).trace() == pytest.approx(float(found.shrunk(0.0).trace()))


def test_within_class_moments_equal_those_of_centred_rows():
    x, labels = rows(40, 5, offset=2.0), torch.arange(40) % 2 == 0
    found = ClassMoments({}).update(x[:11], labels[:11]).update(x[11:], labels[11:])
    centred = x.double().clone()
    for side in (labels, ~labels):
        centred[side] -= centred[side].mean(0)
    expected, _ = ledoit_wolf(centred.numpy(), assume_centered=True)
    assert found.within().shrunk().numpy() == pytest.approx(expected, rel=1e-8, abs=1e-10)
    assert torch.allclose(found.within_covariance(), centred.T @ centred / 38, rtol=1e-9)
    close(found.total(), Moments.of(x))
    assert torch.allclose(found.mean(1), x[labels].double().mean(0))
    # the classes differ, so the total covariance is another
    assert not torch.allclose(found.within_covariance(), found.total().covariance(), rtol=1e-3)


def test_class_moments_merge_even_when_a_class_is_in_one_part_only():
    x = rows(30, 4)
    labels = ["violence"] * 10 + ["fraud"] * 12 + ["safe"] * 8
    whole = ClassMoments({}).update(x, labels)
    both = (
        ClassMoments({})
        .update(x[:15], labels[:15])
        .merge(ClassMoments({}).update(x[15:], labels[15:]))
    )
    assert set(both.classes) == {"violence", "fraud", "safe"}
    for label, moments in whole.classes.items():
        close(both.classes[label], moments)


def test_principal_axes_find_the_planted_one():
    generator = torch.Generator().manual_seed(3)
    v = torch.nn.functional.normalize(torch.randn(12, generator=generator), dim=0)
    x = torch.randn(300, 1, generator=generator) * 4 * v
    x = x + 0.1 * torch.randn(300, 12, generator=generator)
    units, variances = principal_axes(Moments.of(x).covariance(), 3)
    assert abs(float(units[0] @ v.double())) > 0.99
    assert torch.allclose(units @ units.T, torch.eye(3).double(), atol=1e-10)
    assert variances[0] > 100 * variances[1] >= 100 * variances[2]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Moments.empty(0), "width of at least 1"),
        (lambda: Moments.empty(3).update(rows(2, 4)), "width 4 were given to moments of width 3"),
        (lambda: Moments.empty(3).merge(Moments.empty(2)), "widths 3 and 2 cannot be merged"),
        (lambda: Moments.of(rows(1, 3)).covariance(), "at least 2 rows, 1 were seen"),
        (lambda: Moments.of(torch.full((2, 3), torch.nan)), "6 values that are NaN"),
        (lambda: Moments.of(rows(9, 3)).shrunk(1.5), "a number from 0 to 1, or 'ledoit-wolf'"),
        (lambda: ClassMoments({}).update(rows(3, 2), [0, 1]), "3 rows came with 2 labels"),
        (lambda: ClassMoments({}).update(rows(3, 2), [1, 1, 1]).mean(0), "only 1 (3 rows)"),
        (lambda: ClassMoments({}).total(), "no rows were seen"),
        (lambda: principal_axes(torch.eye(3), 4), "4 axes were asked of width 3"),
    ],
)
def test_refusals(act, message):
    with pytest.raises(ValueError, match=r".") as caught:
        act()
    assert message in str(caught.value)
