"""Laws of subspaces, against SciPy, plain loops and simulation."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import ortho_group

from analyses.subspaces import bases


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def haar(d: int, k: int, seed: int = 0) -> torch.Tensor:
    return bases.haar(d, k, generator(seed))


def with_spectrum(s: torch.Tensor, m: int, seed: int = 0) -> torch.Tensor:
    U, V = haar(m, len(s), seed), haar(len(s), len(s), seed + 1)
    return (U * s.double()) @ V.T


def test_overlap_of_a_subspace_with_itself_is_one_and_of_orthogonal_ones_zero() -> None:
    Q = haar(30, 12)
    assert bases.mode_overlap(Q, Q) == pytest.approx(1, abs=1e-12)
    assert bases.mode_overlap(Q[:, :5], Q) == pytest.approx(1, abs=1e-12)  # one holds the other
    assert bases.mode_overlap(Q[:, :6], Q[:, 6:]) == pytest.approx(0, abs=1e-12)


def test_overlap_knows_no_basis_no_order_and_no_scale() -> None:
    a, b = torch.randn(2, 20, 6, generator=generator(3))
    X, Y = bases.span(a), bases.span(b[:, :4])
    found = bases.mode_overlap(X, Y)
    turned = X @ haar(6, 6, 8)
    flipped = Y * torch.tensor([1.0, -1, 1, -1])
    assert bases.mode_overlap(turned, flipped) == pytest.approx(found, abs=1e-12)
    assert bases.mode_overlap(Y, X) == pytest.approx(found, abs=1e-12)
    assert bases.mode_overlap(bases.span(1024 * a), Y) == pytest.approx(found, abs=1e-12)
    assert 0 < found < 1


def test_overlap_is_the_mean_squared_cosine_of_scipys_principal_angles() -> None:
    X, Y = haar(25, 7, 1), haar(25, 4, 2)
    angles = scipy.linalg.subspace_angles(X.numpy(), Y.numpy())
    assert bases.mode_overlap(X, Y) == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-12)
    assert bases.principal_angles(X, Y).numpy() == pytest.approx(np.sort(angles), abs=1e-12)


def test_small_angles_are_not_lost_to_rounding() -> None:
    wanted = torch.tensor([1e-9, 1e-4, 0.3, 1.2, math.pi / 2], dtype=torch.float64)
    Q = haar(16, 10)
    X, beside = Q[:, :5], Q[:, 5:]
    Y = X * wanted.cos() + beside * wanted.sin()
    assert torch.allclose(bases.principal_angles(X, Y), wanted, rtol=1e-6, atol=1e-15)
    assert torch.allclose(bases.principal_angles(Y, X[:, :5]), wanted, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize(("k_x", "k_y", "d"), [(1, 1, 20), (3, 8, 20), (12, 15, 20), (1, 5, 9)])
def test_the_null_is_that_of_simulated_random_subspaces(k_x: int, k_y: int, d: int) -> None:
    drawn = generator(1)
    X, found = haar(d, k_x, 99), []
    for _ in range(3000):
        found.append(bases.mode_overlap(X, bases.haar(d, k_y, drawn)))
    values, null = torch.tensor(found), bases.overlap_null(k_x, k_y, d)
    assert null.mean == max(k_x, k_y) / d
    assert float(values.mean()) == pytest.approx(null.mean, abs=4 * null.sd / 3000**0.5)
    assert float(values.std()) == pytest.approx(null.sd, rel=0.06)
    assert float((values > null.high).double().mean()) == pytest.approx(0.05, abs=0.015)


def test_haar_is_that_of_scipy() -> None:
    """The distribution of one entry, which signs left by a QR would spoil."""
    drawn, rng = generator(5), np.random.default_rng(0)
    mine = [float(bases.haar(4, 2, drawn)[0, 0]) for _ in range(2000)]
    scipys = ortho_group.rvs(4, size=2000, random_state=rng)[:, 0, 0]
    assert scipy.stats.ks_2samp(mine, scipys).pvalue > 1e-3
    assert abs(sum(mine) / 2000) < 0.05


def test_overlap_in_the_whole_space_is_certain() -> None:
    assert bases.overlap_null(6, 3, 6) == (1.0, 0.0, 1.0)
    assert bases.mode_overlap(haar(6, 6), haar(6, 3, 1)) == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_the_energy_null_is_that_of_simulated_projections(k: int) -> None:
    U = with_spectrum(torch.tensor([2.0, 1.9, 1.8, 0.5]), 12)
    s = torch.linalg.svdvals(U)
    mean, variance = bases.energy_null(float(s.square().sum()), float(s.pow(4).sum()), k, 12)
    drawn = generator(2)
    found = torch.tensor(
        [float(bases.parallel(bases.haar(12, k, drawn), U).square().sum()) for _ in range(3000)]
    )
    assert float(found.mean()) == pytest.approx(mean, abs=4 * (variance / 3000) ** 0.5)
    assert float(found.var()) == pytest.approx(variance, rel=0.12)
    assert bases.energy_null(3.0, 9.0, 12, 12) == (3.0, 0.0)


def test_beta_quantile_is_exact_for_a_line() -> None:
    from scipy.stats import beta

    known = beta(0.5, 9.5)
    found = bases.beta_quantile(known.mean(), known.std(), 0.9)
    assert found == pytest.approx(known.ppf(0.9), rel=1e-9)
    assert bases.beta_quantile(0.3, 0.0) == 0.3


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 8)])
def test_thin_svd_is_numpys(shape: tuple[int, int]) -> None:
    A = torch.randn(shape, generator=generator(4))
    U, s = bases.thin_svd(A)
    left, values, _ = np.linalg.svd(A.double().numpy(), full_matrices=False)
    assert s.numpy() == pytest.approx(values, rel=1e-12)
    assert np.abs((left * U.numpy()).sum(0)) == pytest.approx(np.ones(min(shape)), abs=1e-9)
    assert U.dtype == torch.float64


def test_span_finds_the_dimensions_there_are() -> None:
    A = with_spectrum(torch.tensor([3.0, 2.0, 1.0]), 10).float() @ torch.ones(3, 6)
    assert bases.span(A).shape == (10, 1)
    B = torch.cat([with_spectrum(torch.tensor([3.0, 2.0, 1.0]), 10)] * 2, 1)
    assert bases.span(B).shape == (10, 3)
    assert bases.span(B, rank=2).shape == (10, 2)
    assert bases.span(B, energy=0.9).shape == (10, 2)  # 13 of 14
    with pytest.raises(ValueError, match="rank 4 was asked of columns that span 3"):
        bases.span(B, rank=4)
    with pytest.raises(ValueError, match="both given"):
        bases.span(B, rank=1, energy=0.5)


def test_energy_rank_is_the_smallest_that_reaches_the_share() -> None:
    s = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])  # squares 4 1 1 1 1
    assert [bases.energy_rank(s, eta) for eta in (0.01, 0.5, 0.51, 0.625, 0.9, 1.0)] == [
        1,
        1,
        2,
        2,
        5,
        5,
    ]
    assert bases.energy_rank(s.flip(0), 0.5) == 1
    assert bases.energy_rank(torch.ones(10), 0.3) == 3  # met exactly
    assert bases.energy_rank(torch.tensor([1.0, 0.0]), 1.0) == 1
    for wrong in (0.0, 1.2, -1.0):
        with pytest.raises(ValueError, match="energy share"):
            bases.energy_rank(s, wrong)


def test_ranks_of_equal_values_are_their_number_and_of_one_value_one() -> None:
    for rank in (bases.effective_rank, bases.participation_ratio):
        assert rank(torch.ones(7)) == pytest.approx(7)
        assert rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
        assert rank(3e-20 * torch.ones(7, dtype=torch.float64)) == pytest.approx(7)
    s = torch.tensor([3.0, 1.0])
    assert bases.effective_rank(s) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert bases.participation_ratio(s) == pytest.approx(100 / 82)


def test_parts_sum_to_the_whole_and_are_orthogonal() -> None:
    Q, x = haar(15, 4), torch.randn(15, 3, generator=generator(6)).double()
    inside, outside = bases.parallel(Q, x), bases.orthogonal(Q, x)
    assert torch.allclose(inside + outside, x)
    assert torch.allclose(Q.T @ outside, torch.zeros(4, 3).double(), atol=1e-12)
    assert torch.allclose(bases.projector(Q) @ x, inside)
    assert torch.allclose(bases.parallel(Q, inside), inside)
    assert inside.square().sum() + outside.square().sum() == pytest.approx(float(x.square().sum()))
    assert bases.parallel(Q, x[:, 0]).shape == (15,)


def loop_hsic(K: np.ndarray, L: np.ndarray) -> float:
    """Song et al.'s U-statistic as its four sums over distinct examples."""
    n, terms = len(K), [0.0, 0.0, 0.0]
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            terms[0] += K[i, j] * L[i, j]
            for q in range(n):
                if q in (i, j):
                    continue
                terms[1] += K[i, j] * L[i, q]
                for r in range(n):
                    if r not in (i, j, q):
                        terms[2] += K[i, j] * L[q, r]
    pairs = n * (n - 1)
    return (
        terms[0] / pairs - 2 * terms[1] / (pairs * (n - 2)) + terms[2] / (pairs * (n - 2) * (n - 3))
    )


def test_debiased_cka_is_the_sum_over_distinct_examples() -> None:
    X, Y = torch.randn(2, 7, 4, generator=generator(7)).double()
    Y = X + 0.5 * Y
    K, L = (X @ X.T).numpy(), (Y @ Y.T).numpy()
    wanted = loop_hsic(K, L) / math.sqrt(loop_hsic(K, K) * loop_hsic(L, L))
    assert bases.linear_cka(X, Y, debiased=True) == pytest.approx(wanted, abs=1e-9)


def test_cka_is_one_after_rotation_scale_and_shift_and_small_for_independent_data() -> None:
    X = torch.randn(300, 6, generator=generator(8))
    same = 3 * X.double() @ haar(6, 6) + 5
    for debiased in (False, True):
        assert bases.linear_cka(X, same.float(), debiased=debiased) == pytest.approx(1, abs=1e-5)
    wide = torch.randn(2, 40, 400, generator=generator(9))
    assert bases.linear_cka(wide[0], wide[1]) > 0.85  # bias, all of it
    assert abs(bases.linear_cka(wide[0], wide[1], debiased=True)) < 0.1
    # by centred Gram matrices, as the definition has it
    H = np.eye(300) - 1 / 300
    Y = (X @ torch.randn(6, 9, generator=generator(1))).numpy().astype(float)
    K, L = H @ X.double().numpy() @ X.double().numpy().T @ H, H @ Y @ Y.T @ H
    wanted = np.trace(K @ L) / math.sqrt(np.trace(K @ K) * np.trace(L @ L))
    assert bases.linear_cka(X, torch.from_numpy(Y)) == pytest.approx(wanted, abs=1e-9)


def test_wrong_input_is_refused_with_a_sentence() -> None:
    Q = haar(8, 3)
    with pytest.raises(ValueError, match="8 and 9 dimensions cannot be compared"):
        bases.mode_overlap(Q, haar(9, 2))
    with pytest.raises(ValueError, match="off orthonormal by"):
        bases.mode_overlap(Q, 2 * Q)
    with pytest.raises(ValueError, match="NaN or infinite"):
        bases.span(torch.full((3, 3), math.nan))
    with pytest.raises(ValueError, match="only zeros"):
        bases.span(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="width 5 cannot be projected onto a subspace of 8"):
        bases.parallel(Q, torch.ones(5, 2))
    with pytest.raises(ValueError, match="do not fit into 5"):
        bases.overlap_null(6, 1, 5)
    with pytest.raises(ValueError, match="does not fit into 4"):
        bases.haar(4, 5, generator())
    with pytest.raises(ValueError, match="2 singular values are negative"):
        bases.effective_rank(torch.tensor([1.0, -1.0, -2.0]))
    with pytest.raises(ValueError, match="same examples twice, at least 4; given were 3 and 3"):
        bases.linear_cka(torch.rand(3, 2), torch.rand(3, 2), debiased=True)
    with pytest.raises(ValueError, match="same for every example"):
        bases.linear_cka(torch.ones(5, 2), torch.rand(5, 2))
