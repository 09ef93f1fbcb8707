"""Projected updates and overlaps: laws, a dense loop, planted truth and shuffled controls."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from analyses.subspaces import bases
from analyses.subspaces.adapters import LowRank
from analyses.subspaces.deltas import Deltas
from analyses.subspaces.projection_energy import ProjectionEnergy, projection_energy
from analyses.subspaces.projections import SUBSPACES, projection, seeded
from analyses.subspaces.svd import left_svd
from analyses.subspaces.weights import WeightOverlap, weight_overlap


def made(tensors: Mapping[str, Any], label: str = "x") -> Deltas:
    """Differences held in memory, the way `difference` gives them."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return Deltas(label, "y", shapes, lambda name: tensors[name], False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(n: int, seed: int, rows: int = 20, columns: int = 14) -> dict[str, Tensor]:
    """Square, tall and wide matrices and a vector in each of `n` layers, and an embedding."""
    found = {"embed.weight": noise(50, rows, seed=seed + 1000)}
    for i in range(n):
        found[f"layers.{i}.q.weight"] = noise(rows, columns, seed=seed + 3 * i)
        found[f"layers.{i}.up.weight"] = noise(2 * rows, columns, seed=seed + 3 * i + 1)
        found[f"layers.{i}.down.weight"] = noise(columns, rows, seed=seed + 3 * i + 2)
        found[f"layers.{i}.norm.weight"] = noise(rows, seed=seed + 500 + i)
    return found


def measured(V: Mapping[str, Any], U: Mapping[str, Any], *fractions: float) -> ProjectionEnergy:
    return projection_energy(made(V, "v"), made(U, "u"), fractions or (0.25, 0.5), progress=False)


def overlap(X: Mapping[str, Any], Y: Mapping[str, Any], *energies: float) -> WeightOverlap:
    return weight_overlap(made(X), made(Y), energies or (0.5, 0.9), progress=False)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(20, 14), (14, 20), (20,), (4, 3, 2)])
def test_parallel_and_orthogonal_sum_to_the_update(shape: tuple[int, ...], fraction: float) -> None:
    V, U = noise(*shape, seed=1), noise(*shape, seed=2)
    for subspace in SUBSPACES:
        P, rest, opposite = (
            projection(U, V, fraction, subspace, part, generator=seeded(3, "w"))
            for part in ("parallel", "orthogonal", "opposite")
        )
        assert torch.allclose(P + rest, U, atol=1e-6)
        assert torch.equal(opposite, -P)
        assert float((P * rest).sum()) == pytest.approx(0, abs=1e-4)
        energy = float(P.square().sum() / U.square().sum())
        assert 0 <= energy <= 1 + 1e-6
        cosine = float((P * U).sum() / (P.norm() * U.norm()))
        assert cosine == pytest.approx(math.sqrt(energy), abs=1e-5)
        again = projection(U, V, fraction, subspace, generator=seeded(3, "w"))
        assert torch.equal(again, P)


def test_projection_is_that_of_numpys_singular_vectors() -> None:
    V, U = noise(20, 14, seed=1), noise(20, 14, seed=2)
    Q = np.linalg.svd(V.numpy().astype(float))[0][:, : round(0.5 * 14)]
    wanted = Q @ Q.T @ U.numpy().astype(float)
    assert projection(U, V, 0.5).numpy() == pytest.approx(wanted, abs=1e-6)
    # outside (0, 1), and where there is no matrix, onto V itself
    scalar = (U * V).sum() / (V * V).sum() * V
    assert torch.allclose(projection(U, V, 1.0), scalar, atol=1e-6)
    assert torch.allclose(projection(U[0], V[0], 0.5), (U[0] @ V[0]) / (V[0] @ V[0]) * V[0])
    # a random-k subspace lies inside V's own columns, a random one does not
    thin = V[:, :5]
    outside = torch.from_numpy(scipy.linalg.null_space(thin.T.numpy()))
    kinds: tuple[Any, ...] = ("random-k", "random")
    for subspace, inside in zip(kinds, (True, False), strict=True):
        P = projection(U[:, :5], thin, 0.6, subspace, generator=seeded(0, "a")).double()
        assert (float((outside.T.double() @ P).norm()) < 1e-5) == inside


def test_a_matched_part_has_the_norm_of_the_update_and_another_seed_another_subspace() -> None:
    V, U = noise(20, 14, seed=1), noise(20, 14, seed=2)
    plain, matched = projection(U, V, 0.25), projection(U, V, 0.25, matched=True)
    assert float(matched.norm()) == pytest.approx(float(U.norm()), rel=1e-5)
    assert torch.allclose(matched / matched.norm(), plain / plain.norm(), atol=1e-6)
    one, two = (projection(U, V, 0.25, "random", generator=seeded(s, "w")) for s in (0, 1))
    assert not torch.allclose(one, two)
    assert not torch.allclose(one, projection(U, V, 0.25, "random", generator=seeded(0, "v")))
    with pytest.raises(ValueError, match="give a generator"):
        projection(U, V, 0.25, "random-k")
    with pytest.raises(ValueError, match=r"shape \(14, 20\) and the alignment matrix \(20, 14\)"):
        projection(U.T, V, 0.25)
    assert not projection(U, torch.zeros(20, 14), 0.5).any()


def test_energies_are_those_of_the_projections_summed_then_divided() -> None:
    V, U = layers(3, 1), layers(3, 2)
    U["layers.1.q.weight"] *= 30  # a mean of shares would not see it
    found = measured(V, U, 0.25, 0.5, 1.0)
    for fraction in found.fractions:
        P = {name: projection(U[name], V[name], fraction) for name in U}
        UU = sum(float(U[n].double().square().sum()) for n in U)
        VV = sum(float(V[n].double().square().sum()) for n in U)
        UV = sum(float((U[n].double() * V[n].double()).sum()) for n in U)
        PP = sum(float(P[n].double().square().sum()) for n in U)
        UP = sum(float((U[n].double() * P[n].double()).sum()) for n in U)
        assert found.share("top-k", fraction).value == pytest.approx(PP / UU, rel=1e-5)
        assert found.cosine("top-k", fraction) == pytest.approx(UP / math.sqrt(UU * PP), rel=1e-5)
        assert found.cosine_alignment == pytest.approx(UV / math.sqrt(UU * VV), rel=1e-6)
    opposite = {name: -value for name, value in U.items()}
    assert measured(U, opposite).cosine_alignment == pytest.approx(-1)


def test_energy_grows_with_the_fraction_and_a_planted_update_is_found() -> None:
    V, U = layers(4, 1), layers(4, 2)
    found = measured(V, U, 0.1, 0.3, 0.6, 0.9)
    energies = [found.share("top-k", f).value for f in found.fractions]
    assert energies == sorted(energies)
    names = [n for n in V if V[n].dim() == 2]
    Q = {n: left_svd(V[n]).vectors for n in names}
    inside, outside = {}, {}
    for n in names:
        k = round(0.5 * min(V[n].shape))
        B = noise(k, V[n].shape[1], seed=9).double()
        inside[n] = (Q[n][:, :k] @ B).float()
        outside[n] = bases.orthogonal(Q[n][:, :k], noise(*V[n].shape, seed=8)).float()
    only = {n: V[n] for n in names}
    planted = measured(only, inside, 0.5)
    assert planted.share("top-k", 0.5).value == pytest.approx(1, abs=1e-6)
    assert planted.claimed(0.5)
    assert measured(only, outside, 0.5).share("top-k", 0.5).value == pytest.approx(0, abs=1e-6)
    # an independent update lies where chance puts it
    shuffled = measured(only, {n: noise(*V[n].shape, seed=77) for n in names}, 0.5)
    null = shuffled.null(0.5)
    assert shuffled.share("top-k", 0.5).value == pytest.approx(null.mean, abs=4 * null.sd)
    assert not shuffled.claimed(0.5)


def test_random_subspaces_hold_k_over_rows_whatever_the_shape() -> None:
    """Tall matrices: k / m, not the fraction; and the closed forms are those of draws."""
    V, U = {"a.0.w": noise(40, 10, seed=1)}, {"a.0.w": noise(40, 10, seed=2)}
    found = measured(V, U, 0.5)
    assert found.share("random", 0.5).value == pytest.approx(5 / 40)
    total = float(U["a.0.w"].square().sum())
    kinds: tuple[Any, ...] = ("random-k", "random")
    for s, subspace in enumerate(kinds, 1):
        draws = torch.tensor(
            [
                float(
                    projection(U["a.0.w"], V["a.0.w"], 0.5, subspace, generator=seeded(i, "a.0.w"))
                    .square()
                    .sum()
                )
                for i in range(600)
            ]
        )
        sd = float(found.variance[s, 0, 0].sqrt())
        assert float(draws.mean()) == pytest.approx(float(found.kept[s, 0, 0]), abs=4 * sd / 24)
        assert float(draws.std()) == pytest.approx(sd, rel=0.15)
        low, high = found.share(subspace, 0.5)[1:]
        inside = ((draws / total >= low) & (draws / total <= high)).double().mean()
        assert float(inside) == pytest.approx(0.95, abs=0.03)


def test_weights_without_a_change_have_no_subspace_and_are_counted() -> None:
    V, U = layers(3, 1), layers(3, 2)
    V["layers.0.q.weight"] = torch.zeros(20, 14)
    U["layers.1.q.weight"] = torch.zeros(20, 14)
    found = measured(V, U)
    assert found.skipped == 2
    assert len(found.tensors) == len(V)  # they count in the sums
    whole = sum(float(u.square().sum()) for u in U.values())
    lost = float(U["layers.0.q.weight"].square().sum())
    assert found.elsewhere == pytest.approx(lost / whole, rel=1e-5)
    assert "4 of them" in found.notes[-1]
    assert overlap(V, U).skipped == 2


def test_equal_checkpoints_give_exact_zeros_and_say_so() -> None:
    V = layers(2, 1)
    nothing = {name: torch.zeros_like(value) for name, value in V.items()}
    found, shared = measured(V, nothing), overlap(V, nothing)
    assert found.share("top-k", 0.5) == (0.0, 0.0, 0.0)
    assert found.cosine_alignment == 0.0
    assert "nothing differs" in str(found)
    assert shared.mean(0.9) == (0.0, 0.0, 0.0)
    assert "exactly zero" in str(shared)
    assert found.frame("layer").empty and found.frame().empty and shared.frame().empty


def test_factors_give_what_their_products_give() -> None:
    V, U = {}, {}
    for i in range(3):
        name = f"layers.{i}.q.weight"
        V[name] = LowRank(noise(20, 3, seed=i).double(), noise(3, 14, seed=i + 9).double())
        U[name] = LowRank(noise(20, 5, seed=i + 20).double(), noise(5, 14, seed=i + 29).double())
    dense = [{n: c.dense() for n, c in d.items()} for d in (V, U)]
    a, b = measured(V, U, 0.1, 0.25), measured(dense[0], dense[1], 0.1, 0.25)
    assert torch.allclose(a.kept, b.kept) and torch.allclose(a.variance, b.variance)
    assert torch.equal(a.ranks, b.ranks)
    x, y = overlap(V, U), overlap(dense[0], dense[1])
    assert torch.allclose(x.overlap, y.overlap) and torch.equal(x.k_first, y.k_first)


def test_a_fraction_beyond_the_rank_takes_the_directions_there_are() -> None:
    V = {"l.0.w": LowRank(noise(20, 3).double(), noise(3, 14, seed=1).double())}
    U = {"l.0.w": noise(20, 14, seed=2)}
    found = measured(V, U, 0.1, 0.9)
    assert found.ranks[:, 0].tolist() == [1, 3]
    assert found.capped == 1
    of_rank = projection_energy(made(V), made(U), (0.34, 0.99), of="rank", progress=False)
    assert of_rank.ranks[:, 0].tolist() == [1, 3]
    assert of_rank.capped == 0
    with pytest.raises(ValueError, match="fraction 0.2 was not measured"):
        found.share("top-k", 0.2)
    with pytest.raises(ValueError, match="no fractions"):
        projection_energy(made(V), made(U), (), progress=False)


def loop_overlap(X: Tensor, Y: Tensor, eta: float) -> tuple[float, int, int]:
    """In float64 with plain loops."""
    kept = []
    for A in (X, Y):
        U, s, _ = np.linalg.svd(A.double().numpy().reshape(len(A), -1), full_matrices=False)
        k, held = 0, 0.0
        while held < eta * float((s**2).sum()) * (1 - 1e-12):
            held, k = held + float(s[k] ** 2), k + 1
        kept.append(U[:, :k])
    total = 0.0
    for x in kept[0].T:
        for y in kept[1].T:
            total += float(x @ y) ** 2
    k_x, k_y = kept[0].shape[1], kept[1].shape[1]
    return total / min(k_x, k_y), k_x, k_y


def test_overlap_is_that_of_a_plain_loop() -> None:
    X, Y = layers(2, 1), layers(2, 2)
    X["conv.weight"], Y["conv.weight"] = noise(9, 2, 3, seed=5), noise(9, 2, 3, seed=6)
    found = overlap(X, Y, 0.3, 0.9)
    for i, name in enumerate(found.tensors):
        for e, eta in enumerate(found.energies):
            wanted, k_x, k_y = loop_overlap(X[name], Y[name], eta)
            assert float(found.overlap[e, i]) == pytest.approx(wanted, abs=1e-6)
            assert (int(found.k_first[e, i]), int(found.k_second[e, i])) == (k_x, k_y)
            assert float(found.null[e, i]) == pytest.approx(max(k_x, k_y) / len(X[name]))
    i = found.tensors.index("layers.0.norm.weight")
    x, y = X["layers.0.norm.weight"], Y["layers.0.norm.weight"]
    cosine = torch.cosine_similarity(x, y, dim=0)
    assert float(found.overlap[0, i]) == pytest.approx(float(cosine**2), abs=1e-6)
    assert float(found.null[0, i]) == pytest.approx(1 / 20)


def test_overlap_of_an_update_with_itself_is_one_and_independent_ones_are_at_chance() -> None:
    X = layers(24, 1)
    assert float(overlap(X, {n: -3 * x for n, x in X.items()}).overlap.min()) > 1 - 1e-6
    Y = layers(24, 900)
    found = overlap(X, Y)
    assert found.notes == ()
    for energy in found.energies:
        mean, chance = found.mean(energy), found.chance(energy)
        assert mean.value == pytest.approx(chance.mean, abs=4 * chance.sd)
        assert found.excess(energy).low < 0 < found.excess(energy).high
        assert not found.claimed(energy)


def test_a_planted_shared_subspace_is_recovered() -> None:
    """Of six equal directions two are common: a third of the overlap, the private rest none."""
    X, Y, Z = {}, {}, {}
    for i in range(24):
        Q = bases.haar(60, 16, torch.Generator().manual_seed(i))
        R = bases.haar(30, 6, torch.Generator().manual_seed(100 + i)).T
        name = f"layers.{i}.w.weight"
        X[name], Y[name] = Q[:, :6] @ R, Q[:, 4:10] @ R.flip(0)
        Z[name] = Q[:, 10:] @ R
    shared, private = overlap(X, Y, 1.0), overlap(X, Z, 1.0)
    assert torch.allclose(shared.overlap, torch.tensor(2 / 6), atol=1e-6)
    assert shared.claimed(1.0)
    assert shared.mean(1.0).low > shared.chance(1.0).high
    assert private.overlap.abs().max() < 1e-9
    assert not private.claimed(1.0)
    assert "above chance" in str(shared) and "not above chance" in str(private)


def test_large_weights_are_certified_or_refused_by_name() -> None:
    def falling(seed: int) -> Tensor:
        s = 0.7 ** torch.arange(40, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        return (bases.haar(60, 40, generator) * s) @ bases.haar(40, 40, generator).T

    X, Y = {"l.0.w": falling(1)}, {"l.0.w": falling(2)}
    exact, quick = (
        weight_overlap(made(X), made(Y), (0.5, 0.9), method=method, progress=False)
        for method in ("exact", "certified")
    )
    assert (exact.certified, quick.certified) == (0, 2)
    assert torch.equal(exact.k_first, quick.k_first)
    assert torch.allclose(exact.overlap, quick.overlap, atol=1e-6)
    flat = {"l.0.w": torch.eye(60)[:, :40]}
    with pytest.raises(ValueError, match="l.0.w: .* does not settle 90% .* method='exact'"):
        weight_overlap(made(flat), made(Y), (0.5, 0.9), method="certified", progress=False)


def test_tables_figures_and_files(tmp_path: Path) -> None:
    V, U = layers(3, 1), layers(3, 2)
    found, shared = measured(V, U), overlap(V, U)
    table = found.frame("kind")
    assert set(table["kind"]) == {"embed", "q", "up", "down", "norm"}
    assert len(found.frame()) == 2 * len(SUBSPACES)
    assert set(shared.frame("layer")["layer"]) == {"0", "1", "2", "none"}
    row = shared.frame("tensor").query("tensor == 'layers.1.q.weight' and energy == 0.9")
    i = shared.tensors.index("layers.1.q.weight")
    assert float(row["overlap"].iloc[0]) == pytest.approx(float(shared.overlap[1, i]))
    for ax in (found.plot(), shared.plot(), shared.plot_layers()):
        assert ax.get_title(loc="left") and ax.get_xlabel()
    legend = shared.plot().get_legend()
    assert legend is not None
    assert "random subspaces" in [text.get_text() for text in legend.get_texts()]
    assert len(found.plot().lines) == len(SUBSPACES)
    again = ProjectionEnergy.load(found.save(tmp_path / "e"))
    assert again.frame("tensor").equals(found.frame("tensor"))
    assert WeightOverlap.load(shared.save(tmp_path / "o")).frame().equals(shared.frame())
    with pytest.raises(ValueError, match="energy 0.4 was not measured"):
        shared.mean(0.4)
    with pytest.raises(ValueError, match="energy shares"):
        overlap(V, U, 1.5)
    with pytest.raises(ValueError, match="no weight of x - y belongs to a numbered layer"):
        overlap({"embed.weight": noise(9, 4)}, {"embed.weight": noise(9, 4, seed=1)}).plot_layers()
    lacking = {name: value for name, value in U.items() if "1.q" not in name}
    with pytest.raises(ValueError, match="does not fit the other difference at 1 weights"):
        measured(V, lacking)
