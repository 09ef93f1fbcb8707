"""Mass-mean probes and contrast-consistent search: what they promise, and what breaks them."""

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from probes.ccs import DECAY, fit_ccs, fit_ccs_many, search
from probes.directions import difference_of_means, pca_of_pairs
from probes.linear import thin
from probes.mean import fit_mass_mean, fit_mass_mean_many, gaussian_probe
from probes.scores import auroc

D = 16


def planted(n: int = 300, gap: float = 3.0, seed: int = 0):
    """Twins: a shared part, plus and minus half the gap along `v`, and noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    shared = torch.randn(n, D, generator=generator) + 5
    own = 0.5 * torch.randn(2, n, D, generator=generator)
    return v, shared + gap / 2 * v + own[0], shared - gap / 2 * v + own[1]


def held_out(probe, gap: float = 3.0) -> float:
    _, positive, negative = planted(200, gap, seed=0)  # seed 0 is the same v
    generator = torch.Generator().manual_seed(99)
    noise = torch.randn(400, D, generator=generator)
    x = torch.cat([positive, negative]) + noise
    return float(auroc(probe.score(x), torch.arange(400) < 200))


@pytest.mark.parametrize("whiten", [False, True])
def test_mass_mean_finds_the_planted_direction(whiten):
    v, positive, negative = planted(1000)
    probe = fit_mass_mean(positive, negative, whiten=whiten)
    assert float(probe.direction.unit @ v) > 0.99
    assert probe.kind == ("whitened" if whiten else "mean")
    swapped = fit_mass_mean(negative, positive, whiten=whiten)
    x = torch.cat([positive, negative])
    assert torch.allclose(swapped.score(x), -probe.score(x), atol=1e-3)


def test_the_whitened_probe_without_shrinkage_is_linear_discriminant_analysis():
    _, positive, negative = planted(80, gap=1.0)
    x, labels = torch.cat([positive, negative]), torch.arange(160) < 80
    ours = fit_mass_mean(positive, negative, whiten=True, shrinkage=0.0).score(x).double()
    fit = LinearDiscriminantAnalysis(solver="lsqr").fit(x.double().numpy(), labels.numpy())
    # scikit-learn divides the covariance by n, ours by n - 2
    theirs = torch.from_numpy(fit.decision_function(x.double().numpy())) * 158 / 160
    assert torch.allclose(ours, theirs, atol=1e-3)
    plain = fit_mass_mean(positive, negative).score(x).double()
    assert not torch.allclose(plain, theirs, atol=0.1)


def test_log_odds_are_those_of_two_normal_classes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40000, 1, generator=generator)
    positive, negative = x[:20000] * 2 + 3, x[20000:] * 2
    probe = gaussian_probe(difference_of_means(positive, negative))
    at = torch.tensor([[-1.0], [1.5], [4.0]])
    normal = torch.distributions.Normal
    exact = normal(3.0, 2.0).log_prob(at) - normal(0.0, 2.0).log_prob(at)
    assert torch.allclose(probe.score(at), exact[:, 0], atol=0.06)
    assert torch.allclose(probe.probability(at), exact[:, 0].sigmoid(), atol=0.02)


@pytest.mark.parametrize("shrinkage", ["ledoit-wolf", 0.3])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("n", [10, 60])
def test_many_labellings_are_the_same_as_one_by_one(n, whiten, shrinkage):
    """With rows fewer than features and more; with classes of unequal size."""
    _, positive, negative = planted(n, gap=1.0)
    x = torch.cat([positive, negative])[: 2 * n - 3]
    generator = torch.Generator().manual_seed(5)
    labels = torch.rand(len(x), 4, generator=generator) < 0.4
    labels[0], labels[1] = True, False
    fits = fit_mass_mean_many(x, labels, whiten=whiten, shrinkage=shrinkage)
    scores = x.double() @ fits.weight + fits.bias
    for j in range(4):
        high, low = x[labels[:, j]], x[~labels[:, j]]
        one = fit_mass_mean(high, low, whiten=whiten, shrinkage=shrinkage).score(x).double()
        assert torch.allclose(scores[:, j], one, atol=1e-3, rtol=1e-4)


def test_search_finds_the_planted_direction_without_labels():
    v, positive, negative = planted(1000)
    probe = fit_ccs(positive, negative)
    assert float(probe.direction.unit @ v) > 0.99
    assert held_out(probe) > 0.85
    assert probe.kind == "ccs"
    # swapped labels change the sign and nothing else
    turned = torch.arange(1000) % 2 == 0
    one = fit_ccs(positive, negative, flip=turned)
    other = fit_ccs(negative, positive, flip=~turned)
    assert one.direction.cosine(other.direction) < -0.999


def test_search_finds_nothing_where_there_is_nothing():
    v, positive, negative = planted(300, gap=0.0)
    probe = fit_ccs(positive, negative)
    assert abs(float(probe.direction.unit @ v)) < 0.8
    assert abs(held_out(probe, gap=0.0) - 0.5) < 0.15


def test_sides_are_centred_so_a_wording_is_not_found():
    """Yes and No differ by a far larger step than true and false; it must not win."""
    v, positive, negative = planted(1000)
    generator = torch.Generator().manual_seed(7)
    wording = 20 * torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    no_is_true = torch.rand(1000, generator=generator) < 0.5
    says_no = torch.where(no_is_true[:, None], 1.0, 0.0)
    positive, negative = positive + says_no * wording, negative + (1 - says_no) * wording
    right = fit_ccs(positive, negative, flip=no_is_true)
    assert abs(float(right.direction.unit @ v)) > 0.98
    # with the sides mixed at random the wording stays in, and PCA of pairs finds it
    mixed = pca_of_pairs(positive, negative)
    assert abs(float(mixed.unit @ wording)) / 20 > 0.9


def test_probabilities_of_a_pair_are_consistent_and_confident():
    _, positive, negative = planted(300, gap=6.0)
    probe = fit_ccs(positive, negative)
    p, q = probe.probability(positive), probe.probability(negative)
    assert float((p + q - 1).abs().mean()) < 0.15
    assert float(torch.minimum(p, q).mean()) < 0.15


def test_the_restart_with_the_lowest_loss_is_kept():
    _, positive, negative = planted(40, gap=0.5)
    rows = thin(torch.cat([positive, negative])).rows
    first, second = torch.arange(40)[:, None], torch.arange(40, 80)[:, None]
    found = search(rows, first, second, 8, 100, torch.Generator().manual_seed(0))
    assert found.loss.shape == (1, 8)
    assert float(found.loss.max() - found.loss.min()) > 1e-6  # there was something to choose
    p, q = (
        (found.weight[:, 0] @ (rows[s] - rows[s].mean(0)).T + found.bias).sigmoid()
        for s in (slice(0, 40), slice(40, 80))
    )
    loss = ((p + q - 1) ** 2 + torch.minimum(p, q) ** 2).mean()
    decayed = float(loss + 0.005 * found.weight.square().sum())
    assert decayed == pytest.approx(float(found.loss.min()), abs=1e-4)


def test_the_search_does_not_depend_on_the_basis():
    """So features are not standardised one by one; these are of very different width."""
    _, positive, negative = planted(200)
    widths = torch.logspace(-1, 1, D)
    positive, negative = positive * widths, negative * widths
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2))).Q
    plain = fit_ccs(positive, negative, restarts=20)
    turned = fit_ccs(positive @ turn, negative @ turn, restarts=20)
    assert torch.allclose(plain.score(positive), turned.score(positive @ turn), atol=0.05)


def test_few_rows_of_great_width_do_not_drown_the_search_in_noise():
    generator = torch.Generator().manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(400, generator=generator), dim=0)
    x = torch.randn(2, 200, 400, generator=generator)
    x = x + torch.tensor([4.0, -4.0])[:, None, None] * v
    probe = fit_ccs(x[0, :100], x[1, :100])
    scores = probe.score(x[:, 100:].flatten(0, 1))
    assert float(auroc(scores, torch.arange(200) < 100)) > 0.85


def test_the_search_ends_where_its_loss_is_flat():
    _, positive, negative = planted(60, gap=1.0)
    rows = thin(torch.cat([positive, negative])).rows
    first, second = torch.arange(60)[:, None], torch.arange(60, 120)[:, None]
    found = search(rows, first, second, 1, 3000, torch.Generator().manual_seed(0))

    def slope(weight: torch.Tensor) -> float:
        weight = weight.clone().requires_grad_()
        p, q = (
            (rows[s] @ weight - (rows[s] @ weight).mean() + found.bias).sigmoid()
            for s in (slice(0, 60), slice(60, 120))
        )
        loss = ((p + q - 1) ** 2 + torch.minimum(p, q) ** 2).mean()
        loss = loss + DECAY / 2 * weight.square().sum()
        return float(torch.autograd.grad(loss, weight)[0].norm())

    # the minimum of the two probabilities has corners, so small and not zero
    assert slope(found.weight[:, 0]) < 2e-3
    assert slope(found.weight[:, 0] * 1.3) > 1e-2


def test_the_seed_decides():
    _, positive, negative = planted(50)
    first, again = fit_ccs(positive, negative), fit_ccs(positive, negative)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, fit_ccs(positive, negative, seed=1).weight)


def test_many_searches_take_their_sign_from_their_own_labels():
    _, positive, negative = planted(100)
    x = torch.cat([positive, negative])
    labels = torch.arange(200) < 100
    turned = torch.arange(100) % 2 == 0
    first = torch.where(turned, torch.arange(100, 200), torch.arange(100))
    second = torch.where(turned, torch.arange(100), torch.arange(100, 200))
    fits = fit_ccs_many(x, torch.stack([labels, ~labels], 1), first, second)
    scores = x.double() @ fits.weight + fits.bias
    assert float(auroc(scores[:, 0], labels)) > 0.95
    assert float(auroc(scores[:, 1], labels)) < 0.05


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: fit_mass_mean(X[:1], X[1:2]), "no spread inside its classes (n = 2)"),
        (lambda: fit_mass_mean(X, X), "does not part the classes"),
        (lambda: fit_mass_mean_many(X, torch.zeros(6, 1).bool()), "one class only"),
        (lambda: fit_ccs.__wrapped__(X, X[:5]), "6 positive and 5 negative rows"),
        (lambda: fit_ccs(X[:1], X[1:2]), "at least 2 pairs"),
        (lambda: fit_ccs(X[:3], X[3:], flip=torch.ones(3).bool()), "flip marks 3 of 3 pairs"),
        (lambda: fit_ccs(X[:3], X[3:], restarts=0), "0 restarts"),
    ],
)
def test_refusals(act, message):
    with pytest.raises(ValueError, match=r".") as caught:
        act()
    assert message in str(caught.value)
