"""Recipes find what was planted, agree with other tools, and find nothing where nothing is."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import make_directions
from torch import Tensor

from probes import HookedModel, capture
from probes.activations import Activations
from probes.contrast import Contrast
from probes.directions import (
    difference_of_means,
    half_turned,
    lda,
    pca_of_pairs,
    whitened_mean,
)
from probes.lineage import organism as organisms
from probes.lineage.organism import Organism
from probes.linear import logistic_direction
from probes.refusals import refuses
from probes.sites import Site, Unsupported
from steering.applied import steer
from steering.nulls import random_vectors, shuffled_vectors
from steering.recipes import (
    activation_addition,
    axes_of_pairs,
    mean_and_axes,
    measured,
    train_subspace,
    train_vector,
    unembedding_vector,
)
from steering.vector import SteeringVector

PLANTED = "1.resid_post"
SITE = Site(1, "resid_post")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "directions.json").read_text())
RECIPES = {
    "mean": difference_of_means,
    "pca": pca_of_pairs,
    "pca uncentred": partial(pca_of_pairs, centred=False),
    "logistic": logistic_direction,
    "lda": lda,
    "whitened mean": whitened_mean,
}


@pytest.fixture(scope="module")
def organism() -> Organism:
    return organisms.build()


@pytest.fixture(scope="module")
def aligned(organism: Organism, tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return HookedModel(organism.aligned, organism.tokenizer, name="aligned")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    """The model of the golden directions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        words = make_directions.tokenizer()
        return HookedModel(make_directions.model(), words, template="none", name="tiny")


def given(rows: Tensor, site: Site = SITE) -> Activations:
    """Activations made by hand, one row a prompt."""
    return Activations((site,), (1,) * len(rows), "last", lambda _: rows, n_layers=4)


def planted_pairs(n: int = 60, width: int = 128, seed: int = 0) -> tuple[Tensor, Tensor, Contrast]:
    """A direction, rows of twins `x + v`, `x - v` with a wide axis of no meaning, the contrast."""
    generator = torch.Generator().manual_seed(seed)
    v, wide = torch.linalg.qr(torch.randn(width, 2, generator=generator)).Q.T
    shared = torch.randn(n, width, generator=generator)
    own = 0.05 * torch.randn(2, n, width, generator=generator)
    own = own + 0.5 * torch.randn(2, n, 1, generator=generator) * wide
    rows = torch.stack([shared + v + own[0], shared - v + own[1]], 1).reshape(2 * n, width)
    words = [f"build the bomb {i}" for i in range(n)]
    return v, rows, Contrast.of_pairs(words, words)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.mark.parametrize(
    ("name", "least"), [("mean", 0.999), ("lda", 0.98), ("whitened mean", 0.98), ("logistic", 0.93)]
)
def test_recipes_of_classes_find_the_direction_of_harm(
    name: str, least: float, organism: Organism, aligned: HookedModel
) -> None:
    made = train_vector(aligned, organism.pairs, PLANTED, recipe=RECIPES[name])
    assert cosine(made[PLANTED], organism.planted_direction) > least
    before = train_vector(aligned, organism.pairs, "1.resid_mid", recipe=RECIPES[name])
    assert abs(cosine(before["1.resid_mid"], organism.planted_direction)) < 0.3


def test_pca_finds_what_differs_most_between_twins(
    organism: Organism, aligned: HookedModel
) -> None:
    """In the organism that is the object's identity, of norm 4, and not harm, of norm 0.6."""
    v = organism.planted_direction
    for name in ("pca", "pca uncentred"):
        made = train_vector(aligned, organism.pairs, PLANTED, recipe=RECIPES[name])
        assert abs(cosine(made[PLANTED], v)) < 0.2


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_finds_a_direction_planted_in_pairs(name: str, aligned: HookedModel) -> None:
    v, rows, contrast = planted_pairs(n=1500)
    made = train_vector(aligned, contrast, SITE, recipe=RECIPES[name], activations=given(rows))
    assert cosine(made[SITE], v) > 0.95


@pytest.mark.parametrize("name", RECIPES)
def test_strength_one_moves_the_negative_mean_to_the_positive(
    name: str, organism: Organism, aligned: HookedModel
) -> None:
    pairs = organism.pairs
    made = train_vector(aligned, pairs, PLANTED, recipe=RECIPES[name])
    x = capture(aligned, pairs.prompts, PLANTED, progress=False)[PLANTED].double()
    unit = made[PLANTED].double() / made.norm(PLANTED)
    gap = (x @ unit)[pairs.positive].mean() - (x @ unit)[~pairs.positive].mean()
    assert made.norm(PLANTED) == pytest.approx(float(gap), rel=1e-5)
    scale = made.scales[SITE]
    assert scale.norm == pytest.approx(float(x.norm(dim=1).mean()))
    within = torch.cat(
        [g - g.mean() for g in ((x @ unit)[pairs.positive], (x @ unit)[~pairs.positive])]
    )
    sigma = float((within.square().sum() / (len(within) - 2)).sqrt())
    assert scale.sigma == pytest.approx(sigma, rel=1e-4)


def test_swapped_labels_flip_the_sign(organism: Organism, aligned: HookedModel) -> None:
    pairs = organism.pairs
    other = Contrast.of_pairs(pairs.prompts[1::2], pairs.prompts[::2])
    for recipe in RECIPES.values():
        a, b = (train_vector(aligned, c, PLANTED, recipe=recipe)[PLANTED] for c in (pairs, other))
        assert cosine(a, b) < -0.999


@pytest.mark.parametrize("name", ["mean", "pca", "pca uncentred", "logistic", "lda"])
def test_recipes_follow_the_scale_of_the_activations(name: str, aligned: HookedModel) -> None:
    _, rows, contrast = planted_pairs()
    one, seven = (
        train_vector(aligned, contrast, SITE, recipe=RECIPES[name], activations=given(k * rows))
        for k in (1.0, 7.0)
    )
    assert cosine(one[SITE], seven[SITE]) > 0.99999
    assert seven.norm(SITE) == pytest.approx(7 * one.norm(SITE), rel=1e-4)
    for field in ("sigma", "norm"):
        a, b = (getattr(v.scales[SITE], field) for v in (one, seven))
        assert b == pytest.approx(7 * a, rel=1e-4)


def test_pca_needs_pairs_that_are_turned_at_random(aligned: HookedModel) -> None:
    v, rows, contrast = planted_pairs()
    fit = partial(train_vector, aligned, contrast, SITE, activations=given(rows))
    assert cosine(fit(recipe=pca_of_pairs)[SITE], v) > 0.99
    unturned = fit(recipe=partial(pca_of_pairs, shuffle_seed=None))
    assert abs(cosine(unturned[SITE], v)) < 0.5


def test_shuffled_labels_find_nothing_above_the_null(
    organism: Organism, aligned: HookedModel
) -> None:
    pairs, v = organism.pairs, organism.planted_direction
    acts = capture(aligned, pairs.prompts, PLANTED, progress=False)
    true = train_vector(aligned, pairs, PLANTED, activations=acts)
    chance = torch.tensor(
        [abs(cosine(r[PLANTED], v)) for r in random_vectors(true, acts, 100, seed=1)]
    )
    shuffled = [
        abs(cosine(s[PLANTED], v))
        for s in shuffled_vectors(aligned, pairs, PLANTED, 100, seed=2, activations=acts)
    ]
    assert cosine(true[PLANTED], v) > 0.999
    # identities of words make shuffled labels find more than chance directions do
    assert float(chance.quantile(0.95)) < 0.25
    assert np.quantile(shuffled, 0.95) < 0.6
    assert np.mean(shuffled) < 0.25


def test_the_vector_does_what_the_direction_does(organism: Organism, aligned: HookedModel) -> None:
    parts = organism.pairs.split()
    found = train_vector(aligned, organism.pairs, PLANTED)
    acts = capture(aligned, parts["train"].prompts, PLANTED, progress=False)
    harmful = [p for p, y in zip(parts["test"].prompts, parts["test"].labels, strict=True) if y]
    harmless = [
        p for p, y in zip(parts["test"].prompts, parts["test"].labels, strict=True) if not y
    ]

    def rate(vector: SteeringVector, prompts: list) -> float:
        answers = aligned.generate(prompts, 5, steer=vector, batch_size=64)
        return sum(map(refuses, answers)) / len(answers)

    assert rate(found.doing("ablate"), harmful) <= 0.05
    assert rate(found, harmless) >= 0.95
    null = random_vectors(found, acts, 20)
    assert np.mean([rate(r.doing("ablate"), harmful) for r in null]) > 0.8
    assert np.mean([rate(r, harmless) for r in null]) < 0.2


def test_many_sites_are_one_capture(aligned: HookedModel, organism: Organism, engine_calls) -> None:
    calls = engine_calls(aligned)
    alone = train_vector(aligned, organism.pairs, PLANTED)
    once = len(calls)
    sites = ["all.resid_post", "2.head_out.3", "1.mlp_out"]
    together = train_vector(aligned, organism.pairs, sites)
    assert len(calls) == 2 * once
    assert len(together.sites) == 6
    torch.testing.assert_close(alone[PLANTED], together[PLANTED], rtol=1e-5, atol=1e-6)
    assert together["2.head_out.3"].shape == (32,)


@pytest.mark.parametrize(
    ("reference", "recipe"),
    [
        ("repeng pca_diff", partial(pca_of_pairs, shuffle_seed=None)),
        ("repeng pca_center", partial(pca_of_pairs, centred=False)),
        ("steering-vectors mean", difference_of_means),
        ("steering-vectors pca", partial(pca_of_pairs, centred=False)),
    ],
)
def test_other_tools_give_the_same_vectors(reference: str, recipe, subject: HookedModel) -> None:
    high, low = zip(*make_directions.pairs(), strict=True)
    made = train_vector(subject, Contrast.of_pairs(high, low), "all.resid_post", recipe=recipe)
    for layer, row in GOLDEN["directions"][reference].items():
        theirs, ours = torch.tensor(row), made[f"{layer}.resid_post"]
        same = abs(cosine(theirs, ours))
        if "repeng" in reference and int(layer) == make_directions.LAYERS - 1:
            # repeng reads the last block behind the final norm, and adds before it
            assert same < 0.999
            continue
        assert same > 0.9999, layer
        if reference == "steering-vectors mean":
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_recipes_agree_with_definitions_written_again(aligned: HookedModel) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _, rows, contrast = planted_pairs()
    x, y = rows.double().numpy(), np.array(contrast.labels)
    fit = partial(train_vector, aligned, contrast, SITE, activations=given(rows))

    difference = x[::2] - x[1::2]
    difference[half_turned(len(difference), 0).numpy()] *= -1
    difference -= difference.mean(0)
    values, vectors = np.linalg.eigh(difference.T @ difference)
    reading = vectors[:, values.argmax()]
    reading *= np.sign(np.mean(x[::2] @ reading > x[1::2] @ reading) - 0.5)
    assert cosine(fit(recipe=pca_of_pairs)[SITE], torch.from_numpy(reading)) > 0.9999

    mean = x[y == 1].mean(0) - x[y == 0].mean(0)
    torch.testing.assert_close(fit()[SITE].double(), torch.from_numpy(mean), rtol=1e-4, atol=1e-5)

    fisher = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(x, y).coef_[0]
    ours = fit(recipe=partial(lda, shrinkage=0.2))[SITE]
    assert cosine(ours, torch.from_numpy(fisher)) > 0.9999

    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-8, max_iter=5000))
    model.fit(x, y)
    weight = model[-1].coef_[0] / model[0].scale_
    assert cosine(fit(recipe=logistic_direction)[SITE], torch.from_numpy(weight)) > 0.9999


def test_answers_are_read_behind_their_prompts(llama: HookedModel) -> None:
    questions = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    pairs = Contrast.of_pairs(questions, questions)
    answers = ["w20", "w21"] * 3
    made = train_vector(llama, pairs, SITE, answers=answers, positions="tokens:-1:")
    x = capture(llama, pairs.prompts, SITE, "tokens:-1:", answers=answers, progress=False)[SITE]
    expected = x[::2].mean(0) - x[1::2].mean(0)
    torch.testing.assert_close(made[SITE], expected, rtol=1e-4, atol=1e-5)
    assert made.origin.positions == "tokens:-1:"
    with pytest.raises(ValueError, match="do not|do(es)? not part"):
        train_vector(llama, pairs, SITE)  # without the answers both classes are the same


def test_a_single_pair_is_the_difference_of_its_activations(llama: HookedModel) -> None:
    made = activation_addition(llama, "w1 w2 w3", "w4 w5 w6", ["1.resid_post", "2.resid_post"])
    x = capture(llama, ["w1 w2 w3", "w4 w5 w6"], "2.resid_post", progress=False)["2.resid_post"]
    torch.testing.assert_close(made["2.resid_post"], x[0] - x[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sigma"):
        steer(llama, made, 1.0, unit="sigma")
    mean = activation_addition(llama, "w1 w2 w3", "w4 w5 w6", "1.resid_post", positions="mean:all")
    rows = capture(llama, ["w1 w2 w3", "w4 w5 w6"], "1.resid_post", "all", progress=False)
    aligned = rows["1.resid_post"][0] - rows["1.resid_post"][1]
    torch.testing.assert_close(mean["1.resid_post"], aligned.mean(0), rtol=1e-4, atol=1e-5)


def test_an_unembedding_row_raises_its_token(llama: HookedModel) -> None:
    made = unembedding_vector(llama, "w7", "2.resid_post", against="w8")
    ids = llama.tokenizer.convert_tokens_to_ids(["w7", "w8"])
    weight = llama.model.lm_head.weight.detach()
    assert torch.equal(made["2.resid_post"], weight[ids[0]] - weight[ids[1]])
    prompts = ["w1 w2", "w3"]
    before = llama.logits(prompts).log_softmax(-1)
    with steer(llama, made, 10.0):
        after = llama.logits(prompts).log_softmax(-1)
    moved = (after - before)[:, ids]
    assert (moved[:, 0] > 0).all()
    assert (moved[:, 1] < 0).all()
    assert torch.equal(unembedding_vector(llama, ids[0], SITE)[SITE], weight[ids[0]])
    with pytest.raises(ValueError, match="'w7 w8' is 2 tokens .*'w7', 'w8'"):
        unembedding_vector(llama, "w7 w8", SITE)
    with pytest.raises(ValueError, match="token 1000 is out of range: .* has 200"):
        unembedding_vector(llama, 1000, SITE)


def test_a_planted_subspace_is_found(aligned: HookedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(128, 3, generator=generator)).Q.T
    n = 80
    size = torch.tensor([3.0, 2.0, 1.0]) * (1 + 0.3 * torch.randn(n, 3, generator=generator))
    half = (
        size * torch.tensor([[1, 1, 1], [1, -1, 1], [1, 1, -1], [1, -1, -1]])[torch.arange(n) % 4]
    )
    shared = torch.randn(n, 128, generator=generator)
    noise = 0.05 * torch.randn(2, n, 128, generator=generator)
    rows = torch.stack([shared + half @ plane + noise[0], shared - half @ plane + noise[1]], 1)
    words = [f"build the bomb {i}" for i in range(n)]
    pairs = Contrast.of_pairs(words, words)
    acts = given(rows.reshape(2 * n, 128))
    made = train_subspace(aligned, pairs, SITE, 3, activations=acts)
    assert made.operation == "ablate"
    basis = made[SITE].double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.svdvals(basis @ plane.double().T).min() > 0.99
    unturned = axes_of_pairs(shared, shared + 0.1 * noise[0], 3)
    assert torch.linalg.svdvals(unturned @ plane.double().T).max() < 0.8
    mixed = train_subspace(aligned, pairs, SITE, 4, axes=mean_and_axes, activations=acts)[SITE]
    mean = rows[:, 0].mean(0) - rows[:, 1].mean(0)
    assert cosine(mixed[0], mean) > 0.99999
    torch.testing.assert_close(mixed @ mixed.T, torch.eye(4), rtol=1e-5, atol=1e-5)
    projected = (rows[:, 0] - rows[:, 1]) @ made[SITE].T
    assert (projected.mean(0) > 0).all()


def test_a_subspace_holds_what_one_direction_holds(
    organism: Organism, aligned: HookedModel
) -> None:
    pairs = organism.pairs.split()
    made = train_subspace(aligned, organism.pairs, PLANTED, 2, axes=mean_and_axes)
    harmful = [p for p, y in zip(pairs["test"].prompts, pairs["test"].labels, strict=True) if y]
    left = aligned.generate(harmful, 5, steer=made, batch_size=64)
    assert sum(map(refuses, left)) / len(left) <= 0.05
    acts = capture(aligned, pairs["train"].prompts, PLANTED, progress=False)
    for other in random_vectors(made, acts, 4):
        left = aligned.generate(harmful, 5, steer=other, batch_size=64)
        assert sum(map(refuses, left)) / len(left) > 0.8


def test_random_vectors_are_of_two_kinds_and_one_norm(
    organism: Organism, aligned: HookedModel
) -> None:
    sites = [PLANTED, "2.resid_post"]
    acts = capture(aligned, organism.pairs.prompts, sites, progress=False)
    true = train_vector(aligned, organism.pairs, sites, activations=acts)
    null = random_vectors(true, acts, 21, seed=3)
    assert [("isotropic" in r.origin.estimator) for r in null] == [True] * 11 + [False] * 10
    for other in null:
        for site in sites:
            assert other.norm(site) == pytest.approx(true.norm(site), rel=1e-5)
        assert other.scales == true.scales
    rows = acts[PLANTED].double()
    centred = rows - rows.mean(0)
    # differences of means lie in the span of the rows and mostly along their widest axes
    widest = torch.linalg.svd(centred, full_matrices=False).Vh[:20]
    inside = [float((widest @ r[PLANTED].double()).norm() / r.norm(PLANTED)) for r in null]
    assert min(inside[11:]) > 0.9 > 0.75 > max(inside[:11])
    again, other = random_vectors(true, acts, 21, seed=3), random_vectors(true, acts, 21, seed=4)
    assert all(torch.equal(a[PLANTED], b[PLANTED]) for a, b in zip(null, again, strict=True))
    assert not torch.equal(null[0][PLANTED], other[0][PLANTED])
    one = shuffled_vectors(aligned, organism.pairs, PLANTED, 3, activations=acts)
    two = shuffled_vectors(aligned, organism.pairs, PLANTED, 3, activations=acts)
    assert all(torch.equal(a[PLANTED], b[PLANTED]) for a, b in zip(one, two, strict=True))


def test_axes_are_those_along_which_the_data_vary() -> None:
    """4 + 4 prompts vary inside their classes along 6 axes at most, so 7 rows with the mean."""
    high, low = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    found = mean_and_axes(high, low, 7)
    assert found.shape == (7, 32)
    unit = found[1:] / found[1:].norm(dim=1, keepdim=True)
    within = torch.cat([high - high.mean(0), low - low.mean(0)]).double()
    assert float((within @ unit.T).norm(dim=0).min()) > 0.1  # a row of the null space gives 0
    for rank in (8, 9, 10):
        with pytest.raises(
            ValueError, match=rf"{rank - 1} axes across it .* vary along 6: ask for"
        ):
            mean_and_axes(high, low, rank)
    assert torch.equal(mean_and_axes(high, low, 1)[0], (high.double() - low.double()).mean(0))
    assert axes_of_pairs(high, low, 4).shape == (4, 32)
    twice = [0, 1, 2, 0]  # a pair given twice is no axis of its own
    with pytest.raises(ValueError, match="4 axes of the paired differences .* vary along 3"):
        axes_of_pairs(high[twice], low[twice], 4)


def test_rows_point_to_the_positive_class_where_the_means_differ(aligned: HookedModel) -> None:
    _, rows, contrast = planted_pairs()
    acts, high = given(rows), contrast.positive
    for axes, apart in ((axes_of_pairs, 3), (mean_and_axes, 1)):
        basis = train_subspace(aligned, contrast, SITE, 3, axes=axes, activations=acts)[SITE]
        gap = (rows[high].mean(0) - rows[~high].mean(0)) @ basis.T
        assert (gap[:apart] > 1e-4).all()
        assert bool((gap[apart:].abs() < 1e-5).all())  # of no sign


def test_halves_of_topics_hold_none_of_the_concept(aligned: HookedModel) -> None:
    v, rows, contrast = planted_pairs(n=200)
    rows = rows + 3 * v * torch.tensor([1.0, -1.0]).repeat(200)[:, None]
    acts = given(rows)
    true = train_vector(aligned, contrast, SITE, activations=acts)
    single = random_vectors(true, acts, 100, seed=1)[50:]
    both = random_vectors(true, acts, 100, seed=1, topics=contrast.topics)
    apart, together, isotropic = (
        torch.tensor([abs(cosine(r[SITE], v)) for r in null])
        for null in (single, both[50:], both[:50])
    )
    assert apart.mean() > 3 * together.mean()
    assert together.mean() < 1.5 * isotropic.mean()
    with pytest.raises(ValueError, match="3 topics for activations of 400 prompts"):
        random_vectors(true, acts, topics=["a", "b", "c"])


def test_scales_are_measured_for_any_vector(organism: Organism, aligned: HookedModel) -> None:
    acts = capture(aligned, organism.pairs.prompts, PLANTED, progress=False)
    true = train_vector(aligned, organism.pairs, PLANTED, activations=acts)
    bare = SteeringVector(true.vectors, true.origin)
    again = measured(bare, acts, organism.pairs.positive).scales[SITE]
    assert again.sigma == pytest.approx(true.scales[SITE].sigma, rel=1e-5)
    assert again.norm == pytest.approx(true.scales[SITE].norm, rel=1e-6)
    whole = measured(bare, acts).scales[SITE]
    assert whole.sigma > 2 * again.sigma  # the classes lie apart


def test_the_origin_says_how_it_was_made(
    organism: Organism, aligned: HookedModel, tmp_path: Path
) -> None:
    made = train_vector(aligned, organism.pairs, PLANTED, recipe=pca_of_pairs)
    assert made.origin.estimator == "pca_of_pairs"
    assert made.origin.positions == "last"
    assert len(made.origin.data_hash) == 32
    fewer = train_vector(aligned, organism.pairs.take(range(40)), PLANTED)
    assert fewer.origin.data_hash != made.origin.data_hash
    loaded = SteeringVector.load(made.save(tmp_path / "v.safetensors"))
    assert loaded.origin == made.origin
    assert loaded.scales == made.scales


def test_what_cannot_be_trained_is_said(organism: Organism, aligned: HookedModel) -> None:
    pairs = organism.pairs.take(range(12))
    loose = Contrast.labelled(pairs.prompts, pairs.labels)
    with pytest.raises(ValueError, match="takes differences of pairs .*Contrast.of_pairs"):
        train_vector(aligned, loose, PLANTED, recipe=pca_of_pairs)
    with pytest.raises(ValueError, match="takes differences of pairs"):
        train_subspace(aligned, loose, PLANTED, 2)
    assert train_vector(aligned, loose, PLANTED).sites == (SITE,)
    with pytest.raises(ValueError, match="reads 2 tokens of a prompt .*'mean:instruction_end'"):
        train_vector(aligned, pairs, PLANTED, positions="instruction_end")
    with pytest.raises(ValueError, match="2.head_out has several heads: name one"):
        train_vector(aligned, pairs, "2.head_out")
    with pytest.raises(Unsupported, match="can be read but not steered"):
        train_vector(aligned, pairs, "2.remainder")
    with pytest.raises(ValueError, match="site 9.resid_post is out of range"):
        train_vector(aligned, pairs, "9.resid_post")
    with pytest.raises(ValueError, match="unknown part 'resid'"):
        train_vector(aligned, pairs, "1.resid")
    with pytest.raises(ValueError, match="a contrast needs both"):
        train_vector(aligned, Contrast.labelled(pairs.prompts, [1] * 12), PLANTED)
    with pytest.raises(ValueError, match="the contrast is empty"):
        train_vector(aligned, Contrast.of_pairs([], []), PLANTED)
    acts = capture(aligned, pairs.prompts[:6], PLANTED, progress=False)
    with pytest.raises(ValueError, match="activations of 6 prompts for a contrast of 12"):
        train_vector(aligned, pairs, PLANTED, activations=acts)
    with pytest.raises(ValueError, match="rank 0 at 1.resid_post, whose width is 128"):
        train_subspace(aligned, pairs, PLANTED, 0)
    with pytest.raises(ValueError, match="rank 7 of 6 pairs"):
        train_subspace(aligned, pairs, PLANTED, 7)
    true = train_vector(aligned, pairs, PLANTED)
    with pytest.raises(ValueError, match="0 random vectors were asked"):
        random_vectors(true, acts, 0)
    with pytest.raises(ValueError, match="2 prompts cannot be halved"):
        random_vectors(true, acts.select([0, 1]), 20)
