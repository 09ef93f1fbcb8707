"""Singular vectors: factored equals multiplied out, and a certificate that holds or refuses."""

import numpy as np
import pytest
import torch
from torch import Tensor

from analyses.subspaces import bases, svd
from analyses.subspaces.adapters import LowRank
from analyses.subspaces.svd import LeftSvd, Uncertified, left_svd

M, N = 160, 120
INDEX = torch.arange(1, N + 1).double()
SPECTRA = {
    "power law": 1 / INDEX,
    "slow power law": INDEX**-0.5,
    "exponential": 0.9**INDEX,
    "low rank": torch.cat([torch.linspace(3, 1, 10), torch.zeros(N - 10)]).double(),
    "flat": torch.ones(N).double(),
    "step on a floor": torch.cat([torch.ones(10), 0.03 * torch.ones(N - 10)]).double(),
    "two near equal": torch.cat([torch.tensor([1.0, 1 - 1e-9]), 0.5 ** INDEX[2:]]).double(),
    "steps": torch.repeat_interleave(torch.tensor([1.0, 0.3, 0.09, 0.02]), N // 4).double(),
}


def matrix(s: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U, V = bases.haar(M, len(s), generator), bases.haar(len(s), len(s), generator)
    return (U * s) @ V.T


def tried(A: Tensor, eta: float, seed: int = 0) -> LeftSvd | None:
    try:
        return left_svd(A, method="certified", energy=eta, seed=seed)
    except Uncertified:
        return None


@pytest.mark.parametrize("name", SPECTRA)
def test_a_certificate_holds_on_any_spectrum(name: str) -> None:
    s = SPECTRA[name]
    A, settled = matrix(s), 0
    for eta in (0.1, 0.5, 0.9, 0.99):
        for seed in range(5):
            found = tried(A, eta, seed)
            if found is None:
                continue
            settled += 1
            true = s[: len(found.squares)].square()
            slack = 1e-12 * true[0]
            assert bool((found.squares <= true + slack).all())
            assert bool((found.upper >= true - slack).all())
            k = found.rank(eta)
            assert k == bases.energy_rank(s, eta)
            assert found.kept(k) >= eta * (1 - 1e-11)
            held = float((found.vectors[:, :k].T @ A).square().sum() / A.square().sum())
            assert found.kept(k) == pytest.approx(held, abs=1e-12)
            best = float(s[:k].square().sum() / s.square().sum())
            assert best - held <= found.shortfall(k) + 1e-12
    if name in ("power law", "exponential", "low rank"):
        assert settled >= 15
    if name == "flat":
        assert settled <= 5  # 10 % of 120 equal directions may be certified at most


def test_what_cannot_be_certified_is_refused_and_never_decomposed_otherwise() -> None:
    A = matrix(SPECTRA["flat"])
    with pytest.raises(Uncertified, match="does not settle 90% of the energy .* method='exact'"):
        left_svd(A, method="certified", energy=0.9)
    with pytest.raises(Uncertified, match="the first 70 directions"):
        left_svd(A, method="certified", rank=70)
    exact = left_svd(A, method="exact")
    assert exact.method == "exact"
    assert exact.rank(0.9) == 108
    # bounds that part: 70 % of the energy may lie in one direction or in two
    squares, upper = torch.tensor([1.0, 0.5]).double(), torch.tensor([1.45, 0.9]).double()
    open_ = LeftSvd(torch.eye(3, 2).double(), squares, upper, 2.0, "certified")
    assert open_.rank_bounds(0.7) == (1, 2)
    assert open_.rank(0.5) == 1
    with pytest.raises(Uncertified, match="lie in 1 to 2 directions"):
        open_.rank(0.7)
    few = left_svd(matrix(SPECTRA["power law"]), method="certified", energy=0.5)
    with pytest.raises(Uncertified, match="randomised bounds do not settle it"):
        few.rank(1.0)
    assert issubclass(Uncertified, ValueError)


def test_a_direction_that_the_sketch_missed_is_inside_the_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without power steps and from a start that knows nothing of the strongest direction."""
    A = matrix(SPECTRA["exponential"])
    U, s, _ = torch.linalg.svd(A)
    real = torch.linalg.qr
    monkeypatch.setattr(svd, "_POWER", 0)

    def blind(X: Tensor, *args: object, **kwargs: object) -> object:
        return real(X - U[:, :1] @ (U[:, :1].T @ X) if len(X) == M else X, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "qr", blind)
    found = svd._iterated(A, 30, float(A.square().sum()), torch.Generator().manual_seed(0))
    assert float(found.squares[0]) < 0.9 * float(s[0] ** 2)
    assert bool((found.upper >= s[:30].square() * (1 - 1e-12)).all())
    low, high = found.rank_bounds(0.9)
    assert low <= bases.energy_rank(s, 0.9)
    assert high is None or low < high


def test_leading_directions_are_certified_by_their_energy() -> None:
    s = SPECTRA["exponential"]
    found = left_svd(matrix(s), method="certified", rank=12)
    exact = left_svd(matrix(s), method="exact")
    assert found.shortfall(12) <= 1e-3
    assert found.kept(12) >= exact.kept(12) - found.shortfall(12)
    angles = bases.principal_angles(found.vectors[:, :12], exact.vectors[:, :12])
    assert float(angles.max()) < 1e-3


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (30, 30)])
def test_factored_is_the_product_decomposed(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    m, n = shape
    factors = LowRank(
        torch.randn(m, 6, generator=generator).double(),
        torch.randn(6, n, generator=generator).double(),
    )
    found = left_svd(factors)
    left, s, _ = np.linalg.svd(factors.dense().numpy(), full_matrices=False)
    assert found.method == "factored"
    assert found.squares.numpy() == pytest.approx(s[:6] ** 2, rel=1e-10)
    assert np.abs((found.vectors.numpy() * left[:, :6]).sum(0)) == pytest.approx(np.ones(6))
    assert found.energy == pytest.approx(float(factors.dense().square().sum()))
    # twice the same column: the rank is what it is, not the number of factors
    twice = LowRank(torch.cat([factors.left] * 2, 1), torch.cat([factors.right] * 2))
    assert left_svd(twice).vectors.shape == (m, 6)


def test_vectors_are_columns_and_more_axes_are_flattened() -> None:
    assert svd.matrix_of(torch.ones(5)).shape == (5, 1)
    assert svd.matrix_of(torch.ones(2, 3, 4)).shape == (2, 12)
    assert svd.matrix_of(torch.tensor(3.0)).shape == (1, 1)
    found = left_svd(torch.tensor([3.0, 4.0]))
    assert found.vectors.abs()[:, 0].tolist() == pytest.approx([0.6, 0.8])
    assert found.rank(0.5) == found.rank(1.0) == 1


def test_auto_is_exact_where_the_smaller_side_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    A = matrix(SPECTRA["exponential"])
    assert left_svd(A).method == "exact"
    monkeypatch.setattr(svd, "EXACT_UP_TO", 100)
    assert left_svd(A).method == "certified"
    again = left_svd(A)
    assert torch.equal(again.vectors, left_svd(A).vectors)  # seeded


@pytest.mark.parametrize("method", ["exact", "certified"])
def test_zeros_and_nan_are_refused(method: svd.Method) -> None:
    with pytest.raises(ValueError, match="zero"):
        left_svd(torch.zeros(8, 6), method=method)
    with pytest.raises(ValueError, match="NaN or infinite"):
        left_svd(torch.full((8, 6), torch.nan), method=method)


def test_zero_factors_and_odd_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="the difference is zero"):
        left_svd(LowRank.zeros(8, 6))
    found = left_svd(torch.rand(8, 6))
    with pytest.raises(ValueError, match="energy share of 0"):
        found.rank(0.0)
