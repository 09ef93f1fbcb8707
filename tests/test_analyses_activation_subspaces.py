"""Activation subspaces: planted overlaps are found, ceilings and nulls stand where they must."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from analyses.subspaces import bases
from analyses.subspaces.activations import SubspaceOverlap, measure_overlap
from analyses.subspaces.concept import ConceptSubspace, measure_concept
from analyses.subspaces.geometry import Geometry, _jackknife, measure_geometry
from analyses.subspaces.halves import Side, Spans

WIDTH, N = 40, 60


def cloud(axes: Tensor, seed: int, n: int = N, mean: float = 0.0, noise: float = 0.02) -> Tensor:
    """Rows that vary along the rows of `axes`, `[1 layer, prompt, width]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(axes), generator=generator) @ axes
    return (x + noise * torch.randn(n, WIDTH, generator=generator) + mean)[None]


AXES = torch.eye(WIDTH)


def overlap(sets: dict[str, dict[str, Tensor]], **options: Any) -> SubspaceOverlap:
    given: dict[str, Any] = {"etas": (0.5, 0.95)} | options
    return measure_overlap(sets, **given)


def test_the_same_prompts_overlap_exactly() -> None:
    x = cloud(AXES[:6], 0)
    result = overlap({"first": {"a": x, "b": x.clone()}, "second": {"a": x.clone(), "b": x}})
    assert bool((result.overlap == 1).all())
    assert bool((result.angle == 0).all())
    assert bool(result.unchanged.all())
    assert "the checkpoints are identical" in str(result)
    # the same prompts, and still halves differ: the ceiling is no 1
    across = [i for i, item in enumerate(result.comparisons) if item[0] != item[2]]
    assert torch.allclose(result.between[across], result.ceiling[across])
    assert result.ceiling[..., 0].max() < 1


def test_a_shared_subspace_of_known_rank_is_found_and_a_shuffled_one_is_not() -> None:
    shared, first, second = AXES[:4], AXES[4:8], AXES[8:12]
    a = cloud(torch.cat([shared, first]), 1, n=400)
    b = cloud(torch.cat([shared, second]), 2, n=400)
    generator = torch.Generator().manual_seed(3)
    scrambled = b[:, :, torch.randperm(WIDTH, generator=generator)]
    result = overlap({"m": {"a": a, "b": b, "scrambled": scrambled}}, etas=(0.95,))
    pairs = [item[1::2] for item in result.comparisons]
    at = pairs.index(("a", "b")), pairs.index(("a", "scrambled"))
    assert result.k[at[0], 1, 0, 0].tolist() == [8, 8]
    assert float(result.overlap[at[0], 1, 0, 0]) == pytest.approx(0.5, abs=0.02)  # 4 of 8
    assert float(result.angle[at[0], 1, 0, 0, 0]) < 3 and result.angle[at[0], 1, 0, 0, 2] > 85
    chance = sum(bool(scrambled[0, :, i].var() > 0.5) for i in range(8)) / 8
    assert float(result.overlap[at[1], 1, 0, 0]) == pytest.approx(chance, abs=0.05)
    assert float(result.null[at[0], 1, 0, 0]) == pytest.approx(8 / WIDTH)
    assert result.distinct()[at[0], 1, 0, 0]
    assert result.ceiling[at[0], 1, 0, 0, 0] > 0.95


def test_two_samples_of_one_cloud_reach_their_ceiling_and_not_one() -> None:
    axes = torch.diag(torch.linspace(2, 0.2, WIDTH))
    held, above = 0, 0
    for seed in range(10):
        sets = {"a": cloud(axes, 2 * seed), "b": cloud(axes, 2 * seed + 1)}
        result = overlap({"m": sets}, etas=(0.6,), seed=seed)
        held += not bool(result.distinct()[0, 1, 0, 0])
        above += bool(result.related()[0, 1, 0, 0])
        assert result.ceiling[0, 1, 0, 0, 0] < 0.9
        assert abs(float(result.between[0, 1, 0, 0, 0] - result.ceiling[0, 1, 0, 0, 0])) < 0.08
    assert held == 10 and above >= 7


def test_the_mean_decides_the_uncentred_overlap_and_not_the_centred_one() -> None:
    a, b = cloud(AXES[:3], 0, mean=5.0), cloud(AXES[5:8], 1, mean=5.0)
    result = overlap({"m": {"a": a, "b": b}}, etas=(0.5,))
    uncentred, centred = result.overlap[0, :, 0, 0].tolist()
    assert result.k[0, 0, 0, 0].tolist() == [1, 1]
    assert uncentred > 0.99
    assert centred < 0.05


def test_halves_share_no_topic_and_twins_are_split_alike() -> None:
    from analyses.subspaces.halves import halves_by_topic

    topics = {"a": [f"t{i // 2}" for i in range(20)], "b": [f"t{i}" for i in range(10)]}
    for (first, second), (other, rest) in zip(
        *halves_by_topic(topics, 20, 0).values(), strict=True
    ):
        named = [{topics["a"][i] for i in half.tolist()} for half in (first, second)]
        assert not named[0] & named[1] and len(named[0]) == len(named[1]) == 5
        assert {topics["b"][i] for i in other.tolist()} == named[0]
        assert {topics["b"][i] for i in rest.tolist()} == named[1]


def test_fast_overlaps_equal_those_of_bases_and_of_scipy() -> None:
    a, b = cloud(torch.eye(WIDTH), 1)[0], cloud(torch.eye(WIDTH), 2)[0]
    made = Spans({Side("m", "a"): a.double(), Side("m", "b"): b.double()}, True, (0.2, 0.7))
    A, B = made.of(Side("m", "a")), made.of(Side("m", "b"))
    for e, fast in enumerate(A.overlaps(B)):
        assert fast == pytest.approx(bases.mode_overlap(A.at(e), B.at(e)), abs=1e-12)
        angles = scipy.linalg.subspace_angles(A.at(e).numpy(), B.at(e).numpy())
        assert fast == pytest.approx((np.cos(angles) ** 2).mean(), abs=1e-9)


def test_fewer_prompts_than_dimensions_bound_the_rank_and_are_said() -> None:
    result = overlap({"m": {"a": cloud(AXES, 0, n=12), "b": cloud(AXES, 1, n=12)}}, etas=(1.0,))
    assert result.k.max() <= 12
    assert result.k[0, 1].max() == 11  # centring takes one
    assert "at most 12" in result.notes[0]
    assert any("12 topics" in note for note in result.notes)


def test_an_overlap_shows_and_saves_itself(tmp_path: Path) -> None:
    sets = {m: {"a": cloud(AXES[:4], 1), "b": cloud(AXES[2:6], 2)} for m in ("x", "y")}
    sets["y"]["a"] = cloud(AXES[1:5], 3)
    result = overlap(sets)
    loaded = SubspaceOverlap.load(result.save(tmp_path))
    assert torch.equal(loaded.between, result.between) and loaded.comparisons == result.comparisons
    assert len(result.frame()) == len(result.comparisons) * 2 * 1 * 2
    assert "a / b, halves of 30" in result.plot().get_title(loc="left")
    assert "a against x" in result.plot(sets=("a", "a"), form="uncentred").get_title(loc="left")
    with pytest.raises(ValueError, match="were not compared"):
        result.plot(sets=("b", "a"))


def rotated(x: Tensor, seed: int = 0) -> Tensor:
    Q = bases.haar(WIDTH, WIDTH, torch.Generator().manual_seed(seed)).float()
    return x @ Q


def test_a_rotation_is_found_by_angles_and_not_by_cka() -> None:
    x = cloud(torch.diag(torch.linspace(2, 0.1, WIDTH)), 0, n=120)
    sets = {"first": {"a": x}, "turned": {"a": rotated(x)}}
    geometry = measure_geometry(sets)
    assert geometry.cka[1, 0, 0] > 0.999
    angles = overlap(sets, etas=(0.6,))
    assert angles.distinct()[0, 1, 0, 0]
    assert angles.angle[0, 1, 0, 0, 1] > 30
    assert torch.allclose(geometry.effective_rank[0], geometry.effective_rank[1], rtol=1e-3)


def test_cka_of_other_prompts_is_its_null() -> None:
    axes = torch.diag(torch.linspace(2, 0.1, WIDTH))
    x, y = cloud(axes, 0, n=120), cloud(axes, 1, n=120)
    result = measure_geometry({"first": {"a": x}, "other": {"a": y}})
    assert result.cka[1, 0, 0] < result.cka_null[1, 0] + 0.03
    assert result.cka[1, 0, 1] < 0 < result.cka[1, 0, 2] or abs(result.cka[1, 0, 0]) < 0.05
    half = measure_geometry({"first": {"a": x}, "other": {"a": x + y}})
    assert half.cka[1, 0, 1] > half.cka_null[1, 0]
    assert 0.3 < half.cka[1, 0, 0] < 0.8
    assert half.cka[0].eq(1).all() and half.unchanged.tolist() == [[True], [False]]


def test_dimensions_are_those_of_numpy_and_their_intervals_hold_the_truth() -> None:
    x = cloud(torch.diag(torch.linspace(3, 0.0, WIDTH)), 5, n=300)
    result = measure_geometry({"m": {"a": x}})
    centred = x[0].double().numpy() - x[0].double().numpy().mean(0)
    s = np.linalg.svd(centred, compute_uv=False)
    p = s / s.sum()
    assert float(result.effective_rank[0, 0, 1, 0, 0]) == pytest.approx(
        np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()), rel=1e-4
    )
    participation = result.participation[0, 0, 1, 0]
    assert float(participation[0]) == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=1e-5)
    variances = torch.linspace(3, 0.0, WIDTH).double() ** 2 + 0.02**2
    truth = float(variances.sum() ** 2 / variances.square().sum())
    assert participation[1] < truth < participation[2] + 1.5  # few rows lower it a little
    assert "effective rank" in result.plot().get_ylabel()


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = list(torch.arange(50).split(1))
    value, low, high = _jackknife(lambda rows: [float(x[rows].mean())], groups)[0].tolist()
    assert value == pytest.approx(float(x.mean()))
    assert high - value == pytest.approx(value - low)
    assert high - value == pytest.approx(1.96 * float(x.std()) / 50**0.5)


def test_a_geometry_saves_itself_and_says_identity(tmp_path: Path) -> None:
    x = cloud(AXES[:5], 0)
    result = measure_geometry({"x": {"a": x}, "y": {"a": x.clone()}})
    assert "y is identical to x" in str(result)
    assert torch.equal(Geometry.load(result.save(tmp_path)).cka, result.cka)
    assert result.plot_cka().get_ylabel() == "debiased CKA with x"
    assert len(result.frame()) == 4


TOPICS = [f"t{i}" for i in range(N) for _ in range(2)]
LABELS = torch.tensor([True, False] * N)
TRAIN, TEST = torch.arange(N), torch.arange(N, 2 * N)


def contrast(axes: Tensor, seed: int, noise: float = 0.3) -> Tensor:
    """Twins whose differences lie along `axes`, `[1 layer, prompt, width]`."""
    generator = torch.Generator().manual_seed(seed)
    x = noise * torch.randn(2 * N, WIDTH, generator=generator)
    size = 2 + 0.5 * torch.randn(N, len(axes), generator=generator)
    x[LABELS] += size @ axes
    return x[None]


def concept(models: dict[str, Tensor], **options: Any) -> ConceptSubspace:
    given = {"train": TRAIN, "test": TEST, "rank": 2, "resamples": 200, "draws": 40} | options
    return measure_concept(models, LABELS, TOPICS, **given)


def test_a_concept_that_stayed_and_one_that_left_are_told_apart() -> None:
    x = contrast(AXES[:2], 0)
    result = concept({"first": x, "scaled": 3 * x, "same": x.clone(),
                      "left": contrast(AXES[10:12], 1), "half": contrast(AXES[1:3], 2)})  # fmt: skip
    assert result.retained[2].eq(1).all() and result.unchanged[:, 0].tolist()[:3] == [
        True, False, True]  # fmt: skip
    assert float(result.retained[1, 0, 0]) == pytest.approx(1, abs=1e-5)
    assert result.still("scaled")[0] and not result.moved("same")[0]
    assert not result.still("left")[0] and result.moved("left")[0]
    assert result.still("half")[0] and result.moved("half")[0]
    assert 0.3 < result.retained[4, 0, 0] < 0.7
    assert result.cosine[3, 0, 0] < result.cosine_null[3, 0]
    assert result.cosine_own[3, 0] > 0.9
    assert "left keeps" in str(result)


def test_shuffled_labels_and_prompts_without_a_contrast_are_no_concept() -> None:
    claims = 0
    for seed in range(8):
        x, y = (contrast(AXES[:1], 10 * seed + i, noise=1.0)[:] for i in range(2))
        empty = torch.randn(1, 2 * N, WIDTH, generator=torch.Generator().manual_seed(seed))
        found = concept({"first": x, "other": empty}, seed=seed)
        claims += bool(found.still("other")[0])
        assert abs(float(found.cosine[1, 0, 0])) < 0.6
        assert y.shape == x.shape
    assert claims <= 1


def test_the_concept_says_and_saves_itself(tmp_path: Path) -> None:
    x = contrast(AXES[:2], 0)
    result = concept({"a": x, "b": x.clone(), "c": contrast(AXES[:2], 4)}, layers=[7])
    assert "b is identical to it: exactly 1 at every layer" in str(result)
    loaded = ConceptSubspace.load(result.save(tmp_path))
    assert torch.equal(loaded.retained, result.retained)
    assert result.frame()["layer"].tolist() == [7, 7, 7]
    assert "subspace of\na" in result.plot().get_ylabel()
    assert "direction of\na" in result.plot_cosine().get_ylabel()


def test_mistakes_are_said() -> None:
    x = contrast(AXES[:2], 0)
    with pytest.raises(ValueError, match="rank 90 was asked of 30 contrasts of width 40"):
        concept({"a": x}, rank=90)
    with pytest.raises(ValueError, match="topic 't0' is in train and in test"):
        concept({"a": x}, test=TRAIN)
    with pytest.raises(ValueError, match="every pair's activations are equal"):
        concept({"a": torch.ones(1, 2 * N, WIDTH)})
    with pytest.raises(ValueError, match="19 splits were asked"):
        overlap({"m": {"a": x, "b": x}}, splits=19)
    with pytest.raises(ValueError, match=r"energy shares \[1.5\]"):
        overlap({"m": {"a": x, "b": x}}, etas=(1.5,))
    with pytest.raises(ValueError, match="capture the same prompts and layers"):
        overlap({"m": {"a": x}, "n": {"a": x[:, :8]}})
    with pytest.raises(ValueError, match="NaN or infinite"):
        overlap({"m": {"a": x * torch.nan, "b": x}})
    with pytest.raises(ValueError, match="are all the same"):
        overlap({"m": {"a": torch.ones(1, 8, WIDTH), "b": x}})
    with pytest.raises(ValueError, match="3 prompts: two halves need at least 4"):
        overlap({"m": {"a": x[:, :3], "b": x}})
    with pytest.raises(ValueError, match="nothing to compare it with"):
        overlap({"m": {"a": x}})
    with pytest.raises(ValueError, match="5 permutations were asked"):
        measure_geometry({"m": {"a": x}}, permutations=5)
