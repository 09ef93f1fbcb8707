"""Erasers keep their laws, and what is left is found again by a fresh probe."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from analyses.subspaces.eraser import Eraser, fit_leace, fit_mean_projection, random_eraser
from analyses.subspaces.erasure import METHODS, Erasure, measure_erasure
from probes import capture
from probes.moments import ClassMoments

WIDTH = 12


def rows(n: int, seed: int = 0, *, classes: int = 2, gap: float = 2.0) -> tuple[Tensor, Tensor]:
    """Correlated rows with a mean far from 0, and their labels; classes differ in their means."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.arange(n) % classes
    means = gap * torch.randn(classes, WIDTH, generator=generator, dtype=torch.float64)
    x = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) @ mix + means[labels] + 5
    return x, labels


def moments(x: Tensor, labels: Tensor) -> ClassMoments:
    return ClassMoments({}).update(x, labels)


def class_means(x: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([x[labels == c].mean(0) for c in labels.unique()])


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, "ledoit-wolf"])
def test_after_leace_every_class_has_the_same_mean(classes: int, shrinkage: float | str) -> None:
    x, labels = rows(200, classes=classes)
    eraser = fit_leace(moments(x, labels), shrinkage=shrinkage)  # pyright: ignore[reportArgumentType]
    assert eraser.rank == classes - 1
    before, after = class_means(x, labels), class_means(eraser(x), labels)
    assert (before - before.mean(0)).norm() > 1
    assert (after - after.mean(0)).norm() < 1e-10
    assert torch.allclose(eraser(x).mean(0), x.mean(0), atol=1e-10)
    assert (eraser(eraser(x)) - eraser(x)).abs().max() < 1e-10
    assert torch.linalg.matrix_rank(x - eraser(x), atol=1e-8) == classes - 1


@pytest.mark.parametrize("n", [200, 9])  # 9 rows of width 12: the covariance is singular
def test_leace_is_the_solution_of_its_constrained_least_squares(n: int) -> None:
    """P = I - S_xz (S_zx S^+ S_xz)^+ S_zx S^+, with SciPy's pseudo-inverse and plain sums."""
    x, labels = rows(n, seed=3, classes=3)
    X, Z = x.numpy(), np.eye(3)[labels.numpy()]
    S, C = np.zeros((WIDTH, WIDTH)), np.zeros((WIDTH, 3))
    for row, z in zip(X, Z, strict=True):
        S += np.outer(row - X.mean(0), row - X.mean(0)) / n
        C += np.outer(row - X.mean(0), z - Z.mean(0)) / n
    inverse = scipy.linalg.pinvh(S, rtol=1e-10)
    P = np.eye(WIDTH) - C @ scipy.linalg.pinv(C.T @ inverse @ C, rtol=1e-10) @ C.T @ inverse
    expected = (X - X.mean(0)) @ P.T + X.mean(0)
    assert np.abs(fit_leace(moments(x, labels))(x).numpy() - expected).max() < 1e-8


def test_leace_changes_rows_least_of_all_maps_that_erase() -> None:
    x, labels = rows(300, seed=1)
    m = moments(x, labels)
    least = (fit_leace(m)(x) - x).square().sum()
    generator = torch.Generator().manual_seed(0)
    delta = m.mean(1) - m.mean(0)
    others = [fit_mean_projection(m), fit_leace(m, shrinkage=0.5)]
    for _ in range(30):  # every map of rank 1 that makes the means equal is of this form
        v = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        near = fit_leace(m).reads[0] + 0.05 * v
        for read in (v, near):
            read = (read / (read @ delta))[None]
            others.append(Eraser(delta[None].clone(), read, m.total().mean, "oblique", 300))
    for other in others:
        after = class_means(other(x), labels)
        assert (after[0] - after[1]).norm() < 1e-9  # each of them erases
        assert (other(x) - x).square().sum() > least * (1 + 1e-9)


def test_no_linear_reader_learns_from_erased_training_rows() -> None:
    x, labels = rows(200, seed=2)
    y = labels.numpy()
    erased = fit_leace(moments(x, labels))(x).numpy()
    for before, after in ((x.numpy(), erased),):
        assert LinearRegression().fit(before, y).score(before, y) > 0.5
        assert abs(LinearRegression().fit(after, y).score(after, y)) < 1e-12
        reader = LogisticRegression(C=1e6, max_iter=2000)
        assert roc_auc_score(y, reader.fit(before, y).decision_function(before)) > 0.95
        assert np.abs(reader.fit(after, y).coef_).max() < 1e-3
    # a random subspace of the same rank leaves it there: what erases is the choice of it
    other = random_eraser(x.mean(0), 1, torch.Generator().manual_seed(0))(x).numpy()
    assert LinearRegression().fit(other, y).score(other, y) > 0.5


def test_streamed_moments_give_the_eraser_of_all_rows() -> None:
    x, labels = rows(150, seed=4)
    whole = fit_leace(moments(x, labels))
    parts = ClassMoments({})
    for i in range(0, 150, 37):
        parts.update(x[i : i + 37], labels[i : i + 37])
    assert torch.allclose(fit_leace(parts)(x), whole(x), atol=1e-9)


def test_the_unit_of_the_activations_does_not_matter() -> None:
    x, labels = rows(100, seed=5)
    for scale in (1e-6, 1e6):
        scaled = fit_leace(moments(scale * x, labels))
        assert scaled.rank == 1
        assert torch.allclose(scaled(scale * x) / scale, fit_leace(moments(x, labels))(x))


def test_equal_classes_leave_everything_as_it_is() -> None:
    x, _ = rows(50, seed=6)
    twice = torch.cat([x, x]).float()
    labels = torch.arange(2).repeat_interleave(50)
    for eraser in (fit_leace(moments(twice, labels)), fit_mean_projection(moments(twice, labels))):
        assert eraser.rank == 0
        assert torch.equal(eraser(twice), twice)
        assert "it changes nothing" in str(eraser)


def test_an_eraser_edits_a_model_as_it_erases_rows(tmp_path: Path) -> None:
    model = tiny.hooked()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, model.d_model, generator=generator)
    labels = torch.arange(80) % 2
    x[labels == 1] += 1
    eraser = fit_leace(moments(x, labels), site="0.resid_post")
    prompts = tiny.words(4, seed=1)
    plain = capture(model, prompts, ["0.resid_post", "1.resid_post"], progress=False)
    with model.edit(eraser.edit()):
        edited = capture(model, prompts, ["0.resid_post", "1.resid_post"], progress=False)
    expected = eraser(plain["0.resid_post"])
    assert torch.allclose(edited["0.resid_post"], expected, atol=1e-5)
    assert not torch.allclose(edited["0.resid_post"], plain["0.resid_post"], atol=1e-3)
    assert not torch.equal(edited["1.resid_post"], plain["1.resid_post"])
    with model.edit(eraser.edit(strength=0.0)):
        same = capture(model, prompts, "1.resid_post", progress=False)
    assert torch.equal(same["1.resid_post"], plain["1.resid_post"])
    assert len(model.generate(prompts, 3, steer=eraser)) == 4
    loaded = Eraser.load(eraser.save(tmp_path))
    assert torch.equal(loaded(x), eraser(x))
    assert eraser.frame().shape == (1, 5)


N = 120


def planted(seed: int, width: int = 20, gap: float = 3.0) -> tuple[Tensor, Tensor, list[str]]:
    """Twins whose classes lie `gap` apart along one axis of a stretched cloud."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * N, width, generator=generator) * torch.linspace(0.3, 3, width)
    labels = torch.tensor([True, False] * N)
    x[:, 0] += gap * 0.3 * (labels.float() - 0.5)
    return x, labels, [f"t{i}" for i in range(N) for _ in range(2)]


def measured(x: Tensor, labels: Tensor, topics: list[str], **options: Any) -> Erasure:
    parts: dict[str, Any] = dict(zip(("train", "probe", "test"), torch.arange(2 * N).split(N * 2 // 3),
                     strict=True))  # fmt: skip
    given: dict[str, Any] = {"draws": 20, "permutations": 60, "resamples": 200} | options
    return measure_erasure({"3.resid_post": x}, labels, topics, **parts, **given)


def test_a_planted_direction_is_found_erased_and_stays_under_random_subspaces() -> None:
    result = measured(*planted(0))
    site = "3.resid_post"
    assert result.auroc[0, 0] > 0.9
    assert result.present("nothing", site)
    for method in ("LEACE", "LEACE, shrunk", "mean difference"):
        assert abs(float(result.auroc[METHODS.index(method), 0]) - 0.5) < 0.2
    assert not result.left(site)
    assert result.random.min() > 0.75
    assert result.random.shape == result.residue.shape == (20, 1)
    assert result.taken[0, 0] == 0
    assert 0 < result.taken[1, 0] <= result.taken[3, 0] < 0.2
    # after LEACE the probe on its own rows is constant, before it is not
    assert result.refitted[1, 0] == 0.5
    assert result.refitted[0, 0] > 0.9


def test_without_a_concept_nothing_is_claimed() -> None:
    claims = [measured(*planted(s, gap=0.0)).present("nothing", "3.resid_post") for s in range(8)]
    assert sum(claims) <= 1


def test_few_rows_of_great_width_leave_a_residue_that_shrinkage_lessens() -> None:
    plain, shrunk = [], []
    for seed in range(3):
        result = measured(*planted(seed, width=150, gap=12.0), draws=1)
        assert result.refitted[1, 0] == 0.5  # on its own rows nothing is left
        plain.append(float(result.auroc[1, 0]))
        shrunk.append(float(result.auroc[3, 0]))
    assert sum(plain) / 3 > 0.7
    assert sum(shrunk) < sum(plain)


def test_more_topics_leave_less() -> None:
    """Averaged over samples, for the residue is that of the error of the means."""
    half, whole = [], []
    for seed in range(6):
        result = measured(*planted(seed), draws=1, permutations=20)
        whole.append(float(result.auroc[1, 0]))
        half.append(float(result.auroc[2, 0]))
    assert sum(whole) < sum(half)


def test_what_sampling_leaves_is_told_from_a_concept_that_lies_elsewhere() -> None:
    """One shift for all topics is within its residue in spite of great width; a shift along
    another axis in the topics that the eraser has not seen is not."""
    for width, gap in ((20, 3.0), (100, 12.0)):
        x, labels, topics = planted(0, width=width, gap=gap)
        assert not measured(x, labels, topics, permutations=20).left("3.resid_post")
    x, labels, topics = planted(0)
    x[80:, 1] += 2 * (labels[80:].float() - 0.5)
    assert measured(x, labels, topics, permutations=20).left("3.resid_post")


def test_a_difference_of_spread_alone_is_no_linear_concept() -> None:
    """Classes of one mean that differ in spread: no linear reader before, none after."""
    x, labels, topics = planted(4, gap=0.0)
    x[labels, 0] *= 5
    result = measured(x, labels, topics)
    assert not result.present("nothing", "3.resid_post")
    assert not result.present("LEACE", "3.resid_post")


def test_a_result_shows_and_saves_itself(tmp_path: Path) -> None:
    result = measured(*planted(1))
    loaded = Erasure.load(result.save(tmp_path))
    assert torch.equal(loaded.auroc, result.auroc) and loaded.sites == result.sites
    assert list(result.frame()["erased"]) == list(METHODS)
    assert result.frame()["present"].tolist()[0]
    assert result.plot().get_ylabel().startswith("AUROC")
    assert "LEACE leaves more than that at 0 of 1 sites" in str(result)


def test_mistakes_are_said() -> None:
    x, labels, topics = planted(2)
    eraser = fit_leace(moments(x, labels))
    with pytest.raises(ValueError, match="width 3 were given to an eraser of width 20"):
        eraser(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="does not know its site"):
        eraser.edit()
    with pytest.raises(ValueError, match="give a share from 0 to 1"):
        eraser.edit("1.resid_post", strength=2.0)
    with pytest.raises(ValueError, match="one class only"):
        fit_leace(ClassMoments.of({1: x}))
    with pytest.raises(ValueError, match="rank 30 was asked of width 20"):
        random_eraser(x[0], 30, torch.Generator())
    first, second = torch.arange(80), torch.arange(79, 160)
    with pytest.raises(ValueError, match="topic 't39' is in train and in probe"):
        measure_erasure({"0.resid_post": x}, labels, topics, train=first, probe=second,
                        test=torch.arange(160, 240))  # fmt: skip
    few = measured(x, labels, topics)
    assert not few.notes
    short = measure_erasure(
        {"0.resid_post": x}, labels, topics, train=first, probe=torch.arange(80, 160),
        test=torch.arange(160, 180), permutations=20, draws=1, resamples=100,
    )  # fmt: skip
    assert short.notes == ("only 10 topics in test: with fewer than 20 read the figures as a "
                           "rough guide",)  # fmt: skip
    x[3, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        measured(x, labels, topics)
