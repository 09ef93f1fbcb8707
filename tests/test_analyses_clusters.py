"""Cluster indices against other implementations, their laws, their limits, and composites."""

import math

import pytest
import torch
from torch import Tensor

from analyses.drift import clusters, composites
from analyses.drift.between_topics import between, pairs_of, topic_weights
from analyses.drift.clusters import Indices, calinski_harabasz_of, indices, one_statistic, scatter
from probes.scores import bca


def two(
    n: int, d: int, distance: float, seed: int = 0, share: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Unit Gaussians `distance` apart along the first axis, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) < round(share * n)
    x = torch.randn(n, d, generator=generator) + 20
    x[labels, 0] += distance
    return x, labels


def loop(x: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """XBI, CHI and Dunn as they are written down, one pair at a time."""
    rows, sides = x.double().tolist(), labels.tolist()
    own = {c: [r for r, s in zip(rows, sides, strict=True) if s == c] for c in (True, False)}
    mean = {c: [sum(v) / len(own[c]) for v in zip(*own[c], strict=True)] for c in own}
    whole = [sum(v) / len(rows) for v in zip(*rows, strict=True)]
    within = sum(math.dist(r, mean[c]) ** 2 for c in own for r in own[c])
    between_ = sum(len(own[c]) * math.dist(mean[c], whole) ** 2 for c in own)
    gap = min(math.dist(a, b) for a in own[True] for b in own[False])
    diameter = max(math.dist(a, b) for c in own for a in own[c] for b in own[c])
    xbi = within / (len(rows) * math.dist(mean[True], mean[False]) ** 2)
    return xbi, between_ / (within / (len(rows) - 2)), gap / diameter


@pytest.mark.parametrize(("n", "d", "share"), [(60, 3, 0.5), (90, 40, 0.2), (41, 7, 0.7)])
def test_indices_agree_with_a_plain_loop_and_with_scikit_learn(
    n: int, d: int, share: float
) -> None:
    from sklearn import metrics

    x, labels = two(n, d, 2.0, share=share)
    found = indices(x, labels, block=16)
    xbi, chi, dunn = loop(x, labels)
    assert found.xie_beni == pytest.approx(xbi, rel=1e-10)
    assert found.calinski_harabasz == pytest.approx(chi, rel=1e-10)
    assert found.dunn == pytest.approx(dunn, rel=1e-9)
    X = x.double().numpy()
    for name, of in (
        ("calinski_harabasz", metrics.calinski_harabasz_score),
        ("davies_bouldin", metrics.davies_bouldin_score),
        ("silhouette", metrics.silhouette_score),
    ):
        assert getattr(found, name) == pytest.approx(of(X, labels.numpy()), rel=1e-9)
    for block in (1, 7, 1024):  # blocks change nothing
        assert tuple(indices(x, labels, block=block)) == pytest.approx(tuple(found), rel=1e-9)


def test_trimmed_dunn_is_a_ratio_of_quantiles() -> None:
    import numpy as np

    x, labels = two(120, 5, 1.0, share=0.4)
    d = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    for trim in (0.05, 0.01, 0.3):
        low = np.quantile(d[labels][:, ~labels].flatten(), trim, method="inverted_cdf")
        high = max(
            np.quantile(
                own[tuple(torch.triu_indices(*own.shape, 1))], 1 - trim, method="inverted_cdf"
            )
            for own in (d[labels][:, labels], d[~labels][:, ~labels])
        )
        assert indices(x, labels, trim=trim).dunn_trimmed == pytest.approx(low / high, rel=1e-4)
    plain = indices(x, labels, trim=0.0)
    assert plain.dunn_trimmed == plain.dunn


def test_one_stray_row_drives_dunn_to_nothing_but_not_the_trimmed_one() -> None:
    x, labels = two(200, 3, 30.0)
    before = indices(x, labels)
    x[0] = x[150] + 0.001  # a positive among the negatives
    after = indices(x, labels)
    assert after.dunn < 1e-3 < 1 < before.dunn
    assert after.dunn_trimmed == pytest.approx(before.dunn_trimmed, rel=0.1)


@pytest.mark.parametrize(("n", "share"), [(50, 0.5), (333, 0.1), (1000, 0.6)])
def test_chi_and_xbi_are_one_statistic(n: int, share: float) -> None:
    x, labels = two(n, 6, 1.5, share=share)
    found = scatter(x, labels)
    implied = calinski_harabasz_of(found.xie_beni, found.positive, found.negative)
    assert abs(implied / found.calinski_harabasz - 1) < 1e-9
    said = one_statistic(found)
    assert f"{found.calinski_harabasz:.4g}" in said and "one statistic" in said
    wrong = calinski_harabasz_of(found.xie_beni, found.positive + 1, found.negative)
    assert abs(wrong / found.calinski_harabasz - 1) > 1e-4  # the sizes matter


def test_indices_do_not_see_rotation_translation_scale_or_names() -> None:
    x, labels = two(150, 8, 1.2, share=0.3)
    found = tuple(indices(x, labels))
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    for other in (x @ turn, x + 100 * torch.arange(8), 1000 * x, x * 1e-4):
        assert tuple(indices(other, labels)) == pytest.approx(found, rel=2e-3)
    exact = x.double()
    for other in (exact @ turn.double(), exact + 1e4, 4096 * exact):
        assert tuple(indices(other, labels)) == pytest.approx(found, rel=1e-4)
    assert tuple(indices(x, ~labels)) == pytest.approx(found, rel=1e-9)
    stretched = exact * torch.linspace(1, 3, 8)
    assert tuple(indices(stretched, labels)) != pytest.approx(found, rel=0.05)


def test_doubling_every_row_leaves_all_but_chi() -> None:
    x, labels = two(100, 4, 1.0)
    once, twice = indices(x, labels), indices(x.repeat(2, 1), labels.repeat(2))
    for name in ("xie_beni", "davies_bouldin", "dunn"):
        assert getattr(twice, name) == pytest.approx(getattr(once, name), rel=1e-9)
    growth = twice.calinski_harabasz / once.calinski_harabasz
    assert growth == pytest.approx(198 / 98, rel=1e-9)


def test_isotropic_gaussians_have_the_xbi_of_theory() -> None:
    for distance in (1.0, 2.0, 4.0):
        x, labels = two(40_000, 10, distance)
        assert scatter(x, labels).xie_beni == pytest.approx(10 / distance**2, rel=0.03)
    x, labels = two(3000, 10, 1.0)
    rows = [indices(x + labels[:, None] * shift * torch.eye(10)[0], labels) for shift in (0, 1, 3)]
    assert rows[0].xie_beni > rows[1].xie_beni > rows[2].xie_beni
    assert rows[0].silhouette < rows[1].silhouette < rows[2].silhouette


def test_shuffled_labels_have_a_chi_of_one() -> None:
    generator = torch.Generator().manual_seed(4)
    x, labels = two(400, 6, 3.0)
    drawn = [scatter(x, labels[torch.randperm(400, generator=generator)]) for _ in range(200)]
    # the axis that parts the classes takes a share of the variance: 1 on average all the same
    mean = sum(s.calinski_harabasz for s in drawn) / len(drawn)
    assert mean == pytest.approx(1.0, abs=0.15)
    assert min(s.davies_bouldin for s in drawn) > 3 * scatter(x, labels).davies_bouldin


def test_the_edges() -> None:
    same = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([True, True, False, False])
    found = indices(same, labels)
    assert found.xie_beni == math.inf and found.calinski_harabasz == 0.0
    assert found.davies_bouldin == math.inf
    assert composites.variant_a(found.xie_beni, found.calinski_harabasz) == 0.0
    assert composites.variant_a_log(found.xie_beni, found.calinski_harabasz) == 0.0
    assert composites.bounded(found.xie_beni) == composites.separation_ratio(found.xie_beni) == 0
    far = indices(same + 1e3 / 3, labels)  # rounding parts the means of equal centroids
    assert far.calinski_harabasz < 1e-6
    for one in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        assert all(math.isnan(value) for value in indices(same, one))
    points = indices(torch.tensor([[0.0], [0.0], [3.0], [3.0]]), labels)
    assert points.xie_beni == 0 and points.calinski_harabasz == math.inf == points.dunn
    assert points.silhouette == 1.0
    assert composites.bounded(points.xie_beni) == 1.0
    nothing = indices(torch.ones(4, 3), labels)
    assert nothing.xie_beni == math.inf and nothing.dunn == 0.0 and nothing.silhouette == 0.0
    alone = indices(same[:3], torch.tensor([True, False, False]))
    assert math.isfinite(alone.silhouette) and math.isfinite(alone.dunn)


def test_half_precision_is_widened_and_bad_rows_are_refused() -> None:
    x, labels = two(60, 5, 2.0)
    half = (300 * x).half()  # its squares overflow float16
    assert tuple(indices(half, labels)) == pytest.approx(tuple(indices(half.float(), labels)))
    with pytest.raises(ValueError, match="60 rows came with 59 labels"):
        indices(x, labels[:-1])
    with pytest.raises(ValueError, match="give a share of the pairs from 0 to below 0.5"):
        indices(x, labels, trim=0.5)
    x[3, 2] = math.nan
    with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
        indices(x, labels)


def test_composites_have_the_limits_of_their_weight() -> None:
    x, labels = two(200, 5, 1.5)
    i = indices(x, labels)
    swept = composites.weight_sweep(i, (0.0, 1.0))
    chi, ratio = i.calinski_harabasz, 1 / i.xie_beni
    assert swept["A"] == pytest.approx((chi, ratio))
    assert swept["A'"] == pytest.approx((math.log1p(chi), ratio))
    assert swept["B"] == pytest.approx((i.dunn / (1 + i.dunn), 1 / (1 + i.davies_bouldin)))
    assert swept["C"] == pytest.approx((1 / (1 + i.xie_beni), (i.silhouette + 1) / 2))
    assert swept["D"] == pytest.approx((chi / (1 + chi), (i.silhouette + 1) / 2))
    # with equal classes A is [weight + (1 - weight) (N - 2) / 4] / XBI
    assert composites.variant_a(i.xie_beni, chi, 0.3) == pytest.approx(
        (0.3 + 0.7 * 198 / 4) * ratio
    )
    published = [of(i, None) for of in composites.VARIANTS.values()]
    assert published[4] == pytest.approx(0.3 * swept["D"][1] + 0.7 * swept["D"][0])
    with pytest.raises(ValueError, match="give one from 0 to 1"):
        composites.variant_b(1.0, 1.0, 1.5)


def test_variant_e_gives_the_corners_that_were_published_as_measurements() -> None:
    xbi = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 50.0]
    chi = [3.0, 4.0, 5.0, 6.0, 5.5, 4.5, 3.5]
    assert composites.variant_e(xbi, [*chi, 100.0])[-1] == pytest.approx(55.0)
    assert composites.variant_e(xbi, [*chi, 1.0])[-1] == pytest.approx(5.0)
    doubled = composites.variant_e(xbi, [2 * c for c in [*chi, 1.0]])
    assert torch.equal(doubled, composites.variant_e(xbi, [*chi, 1.0]))  # a model twice as good
    with pytest.raises(ValueError, match="at least 2 axioms"):
        composites.variant_e([1.0], [1.0])
    # quartiles of 1, 2, 3, 4, 5 are 2, 3 and 4: XBI 5 is one IQR above the median
    found = composites.variant_e([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0])
    assert float(found[4]) == pytest.approx(50 + 50 * (1 - 1 / (1 + math.exp(-1))), rel=1e-6)
    flat = composites.variant_e([1.0, 1.0], [2.0, 2.0])
    assert flat.tolist() == [25.0, 25.0]


def test_pairs_of_different_topics_are_free_of_noise_and_of_twins() -> None:
    """In 60 dimensions the published F of 40 twins is far too high, the other is right."""
    published, free, held = [], [], 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(40, 60, generator=generator)
        x = torch.cat([shared, shared]) + torch.randn(80, 60, generator=generator)
        labels = torch.arange(80) < 40
        x[labels, 0] += (0.05 * 120) ** 0.5  # F = 0.05 with variance 2 in each dimension
        topics = [str(i % 40) for i in range(80)]
        published.append(1 / scatter(x, labels).xie_beni)
        pairs = pairs_of(x, labels, topics)
        drawn, left = topic_weights(labels, topics, 200, seed)
        value, many, jack = (between(pairs, w, ratio_only=True).ratio for w in (None, drawn, left))
        limits = bca(value[0], many, jack)
        held += bool(limits.low <= 0.05 <= limits.high)
        free.append(float(value[0]))
    assert sum(free) / 60 == pytest.approx(0.05, abs=0.004)
    assert sum(published) / 60 > 0.07
    assert held >= 53


def test_population_indices_meet_the_published_ones_where_noise_is_small() -> None:
    x, labels = two(4000, 3, 2.0)
    some = torch.randperm(4000, generator=torch.Generator().manual_seed(1))[:1500]
    x, labels = x[some], labels[some]
    found = indices(x, labels)
    other = between(pairs_of(x, labels, [str(i) for i in range(1500)]))
    assert float(other.ratio[0]) == pytest.approx(1 / found.xie_beni, rel=0.01)
    assert float(other.closeness[0]) == pytest.approx(1 / found.davies_bouldin, rel=0.01)
    assert float(other.silhouette[0]) == pytest.approx(found.silhouette, rel=0.01)
    assert float(other.dunn_trimmed[0]) == pytest.approx(found.dunn_trimmed, rel=1e-3)


def test_weights_count_rows_as_often_as_they_say_and_keep_classes() -> None:
    x, labels = two(30, 4, 1.0)
    topics = [str(i) for i in range(30)]
    pairs = pairs_of(x, labels, topics)
    left_out = between(pairs, (torch.arange(30) != 4).double()[None])
    keep = [i for i in range(30) if i != 4]
    alone = between(pairs_of(x[keep], labels[keep], [topics[i] for i in keep]))
    for a, b in zip(left_out, alone, strict=True):
        assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-9)
    drawn, left = topic_weights(labels, topics, 50, 0)
    assert drawn[:, labels].sum(1).eq(15).all() and drawn[:, ~labels].sum(1).eq(15).all()
    assert left.sum(1).eq(29).all()
    with pytest.raises(ValueError, match="3 topics hold a positive prompt"):
        topic_weights(labels, ["a", "b", "c"] * 10, 10, 0)


def test_memory_constants_are_what_the_docstrings_say() -> None:
    assert clusters.TRIM == 0.05 and composites.LAMBDA == 0.5 and composites.GAMMA_D == 0.3
    assert Indices._fields[0] == "xie_beni"
