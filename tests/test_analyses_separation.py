"""Separation on data with a planted answer."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from analyses import Separation, measure_separation

N, WIDTH = 160, 24
LABELS = torch.tensor([True, False] * N)
TOPICS = [f"t{i}" for i in range(N) for _ in range(2)]
TRAIN, TEST = torch.arange(N), torch.arange(N, 2 * N)


def twins(distance: float, seed: int, axis: int = 0, spread: float = 1.0) -> Tensor:
    """Gaussian twins `distance` standard deviations apart along one axis, `[prompt, width]`."""
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(2 * N, WIDTH, generator=generator)
    x[:, axis] += distance * spread * (LABELS.float() - 0.5)
    return x


def measured(activations: dict[str, Tensor], reference: str = "base", seed: int = 0) -> Separation:
    return measure_separation(
        activations, LABELS, TOPICS, train=TRAIN, test=TEST, reference=reference, seed=seed
    )


def true_distance(x: Tensor, distance: float, axis: int = 0) -> float:
    """d' in the population along the direction learnt from the training rows."""
    rows = x[TRAIN].double()
    own = LABELS[TRAIN]
    direction = rows[own].mean(0) - rows[~own].mean(0)
    return float(distance * direction[axis] / direction.norm())


def test_a_planted_distance_is_found_within_its_interval() -> None:
    held, found = 0, []
    seeds = range(40)
    for seed in seeds:
        x = twins(2.0, seed, spread=7.0)
        result = measured({"base": x[None]}, seed=seed)
        truth = true_distance(x, 2.0)
        low, high = float(result.distance_low[0, 0]), float(result.distance_high[0, 0])
        assert low <= float(result.distance[0, 0]) <= high
        held += low <= truth <= high
        found.append(float(result.distance[0, 0]) - truth)
    assert abs(sum(found) / len(found)) < 0.06  # no bias beyond chance
    assert held >= 34  # 38 expected of 40; fewer than 34 has a chance of 2 %


def test_distance_grows_with_what_was_planted_and_not_with_scale() -> None:
    planted = (0.5, 1.0, 2.0, 4.0)
    layers = torch.stack([twins(d, 1) for d in planted])
    result = measured({"base": layers, "scaled": 50 * layers})
    assert all(a < b for a, b in pairwise(result.distance[0].tolist()))
    assert torch.allclose(result.distance[0], result.distance[1], rtol=1e-4)


def test_shuffled_labels_lie_below_what_was_planted_and_around_nothing() -> None:
    result = measured({"base": torch.stack([twins(2.0, 5), twins(0.0, 6)])})
    assert result.distance_low[0, 0] > 2 * result.shuffled[0, 0]
    assert 0 < result.shuffled[0, 0] < 0.6
    # without a difference the estimate exceeds its null about one time in twenty
    above = sum(
        bool(r.distance[0, 0] > r.shuffled[0, 0])
        for r in (measured({"base": twins(0.0, s)[None]}, seed=s) for s in range(30))
    )
    assert above <= 6


def test_equal_directions_have_cosine_one_and_opposite_ones_minus_one() -> None:
    x = twins(2.0, 3)[None]
    result = measured({"base": x, "same": x.clone(), "scaled": 3 * x + 1, "turned": -x})
    for model, cosine in zip(result.models, (1, 1, 1, -1), strict=True):
        row = result.models.index(model)
        assert float(result.cosine[row, 0]) == pytest.approx(cosine, abs=1e-6)
        assert float(result.cosine_low[row, 0]) == pytest.approx(cosine, abs=1e-6)
        assert float(result.cosine_high[row, 0]) == pytest.approx(cosine, abs=1e-6)


def test_directions_at_right_angles_have_cosine_zero() -> None:
    result = measured({"base": twins(4.0, 3)[None], "other": twins(4.0, 4, axis=1)[None]})
    assert abs(float(result.cosine[1, 0])) < 0.1
    assert result.cosine_low[1, 0] < 0 < result.cosine_high[1, 0] < 0.4


def test_the_cosine_is_not_pulled_by_what_chance_adds() -> None:
    """A true cosine of 0.8 measured through noise, own to each model and common to both."""
    corrected, plain, held = [], [], 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        noise, own = torch.randn(2, 2 * N, WIDTH, generator=generator)
        sides = (LABELS.float() - 0.5)[:, None]
        one, two = torch.eye(WIDTH)[:2]
        shared = noise if seed % 2 else own
        base, other = noise + sides * one, shared + sides * (0.8 * one + 0.6 * two)
        result = measured({"base": base[None], "other": other[None]}, seed=seed)
        assert result.cosine_low[1, 0] <= result.cosine[1, 0] <= result.cosine_high[1, 0]
        held += bool(result.cosine_low[1, 0] <= 0.8 <= result.cosine_high[1, 0])
        if not seed % 2:
            corrected.append(float(result.cosine[1, 0]))
            a, b = (
                x[TRAIN][LABELS[TRAIN]].mean(0) - x[TRAIN][~LABELS[TRAIN]].mean(0)
                for x in (base, other)
            )
            plain.append(float(torch.cosine_similarity(a, b, dim=0)))
    mean = sum(corrected) / len(corrected)
    assert abs(mean - 0.8) < 0.06 < abs(sum(plain) / len(plain) - 0.8)
    assert held >= 26


def test_without_a_direction_the_cosine_is_unknown() -> None:
    noise = torch.randn(2, 2 * N, WIDTH, generator=torch.Generator().manual_seed(5))
    one, two = noise.view(2, N, 2, WIDTH)
    # differences that sum to nothing over the training topics
    for x in (one, two):
        x[: N // 2, 0] -= (x[: N // 2, 0] - x[: N // 2, 1]).mean(0)
    result = measured({"base": noise[:1], "other": noise[1:]})
    assert result.cosine_low[1, 0] == -1
    assert result.cosine_high[1, 0] == 1


def test_halves_say_what_sampling_leaves() -> None:
    result = measured({"base": torch.stack([twins(8.0, 1), twins(0.0, 2)])})
    assert result.halves[0] > 0.95
    assert abs(float(result.halves[1])) < 0.5


def test_layers_that_are_equal_bit_for_bit_are_flagged() -> None:
    base = torch.stack([twins(2.0, layer) for layer in range(4)])
    moved = base.clone()
    moved[2, 7, 3] = torch.nextafter(moved[2, 7, 3], torch.tensor(torch.inf))  # the last bit
    moved[3] *= 1.1
    result = measured({"base": base, "moved": moved, "same": base.clone()})
    assert result.unchanged[1].tolist() == [True, True, False, False]
    assert result.unchanged[0].all()
    assert result.first_changed("moved") == 2
    assert result.first_changed("same") is None
    assert result.first_changed("base") is None
    assert result.change[1, :2].eq(0).all()
    assert float(result.change[1, 3]) == pytest.approx(0.1, rel=1e-4)


def test_the_direction_comes_from_training_topics_only() -> None:
    """With test labels exchanged the distance turns over; a direction that had seen them
    would not."""
    x = twins(2.0, 8)
    kept = measured({"base": x[None]})
    turned = x.clone()
    turned[TEST] = x[TEST].view(-1, 2, WIDTH).flip(1).reshape(-1, WIDTH)
    other = measured({"base": turned[None]})
    assert torch.allclose(kept.distance, -other.distance, atol=1e-5)


@pytest.mark.parametrize("wrong", ["one prompt alone", "three prompts", "one class"])
def test_topics_that_are_no_pairs_are_refused(wrong: str) -> None:
    labels, topics = LABELS.clone(), list(TOPICS)
    if wrong == "one prompt alone":
        topics[0] = "alone"
    elif wrong == "three prompts":
        topics[2] = topics[0]
    else:
        labels[1] = True
    with pytest.raises(ValueError, match="one positive and one negative prompt"):
        measure_separation(
            {"base": twins(1.0, 1)[None]}, labels, topics, train=TRAIN, test=TEST, reference="base"
        )


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    activations = {"base": twins(1.0, 1)[None], "other": twins(1.0, 2)[None]}
    one, two = measured(activations), measured(activations)
    assert one.frame().equals(two.frame())
    assert not one.frame().equals(measured(activations, seed=1).frame())
    again = Separation.load(one.save(tmp_path / "apart"))
    assert again.frame().equals(one.frame())
    assert torch.equal(again.halves, one.halves)


def test_the_figures_say_what_they_show() -> None:
    base = torch.stack([twins(2.0, layer) for layer in range(5)])
    moved = torch.cat([base[:2], 1.2 * base[2:]])
    result = measured({"base": base, "moved": moved})
    apart, cosine, change = result.plot(), result.plot_cosine(), result.plot_change()
    for ax in (apart, cosine, change):
        assert "layer" in ax.get_xlabel()
        assert ax.get_ylabel()
        assert ax.get_title(loc="left")
        assert ax.get_legend() is not None
    names = [text.get_text() for text in apart.get_legend().get_texts()]
    assert names == ["base", "moved", "shuffled labels, 95 %"]
    assert "%" in change.get_ylabel()
    assert change.lines[0].get_label() == "moved"
    assert change.lines[0].get_ydata()[-1] == pytest.approx(20, rel=1e-3)
    assert change.lines[1].get_xdata()[0] == 1.5  # between the last equal and the first moved layer
    assert "nothing changed" in change.texts[0].get_text()
    assert not measured({"base": base, "same": base}).plot_change().texts
