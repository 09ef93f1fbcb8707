"""Ranking of heads and inference-time intervention: planted truth, shuffled controls, other code."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny import hooked, words
from torch import Tensor

from probes import Contrast, HookedModel, Site, capture
from probes.lineage import organism as organisms
from probes.splits import folds, shuffled
from steering import SteeringVector, steer
from steering.alphas import AlphaSearch, search_alpha
from steering.heads import HeadRanking
from steering.iti import AT_EACH_STEP, fit_iti, head_rows, rank_heads, rank_rows

PLANTED = (1, 2)


def contrast(pairs: int = 30) -> Contrast:
    return Contrast.of_pairs(
        [f"w1 w{i}" for i in range(pairs)], [f"w2 w{i}" for i in range(pairs)], name="planted"
    )


def rows(given: Contrast, seed: int = 0) -> dict[int, Tensor]:
    """Noise in 3 layers of 4 heads of 8; one head's output encodes the label along an axis."""
    generator = torch.Generator().manual_seed(seed)
    found = {layer: torch.randn(len(given), 4, 8, generator=generator) for layer in range(3)}
    found[PLANTED[0]][:, PLANTED[1], 5] += 4.0 * given.positive - 2.0
    return found


@cache
def ranked(direction: str = "mean", permutations: int = 200) -> HeadRanking:
    given = contrast()
    return rank_rows(rows(given), given, n_layers=3, direction=direction, permutations=permutations)


@pytest.fixture(scope="module")
def organism() -> organisms.Organism:
    return organisms.build()


@pytest.fixture(scope="module")
def aligned(organism: organisms.Organism) -> HookedModel:
    return HookedModel(organism.aligned, organism.tokenizer, name="aligned")


def test_the_head_that_encodes_the_label_is_first() -> None:
    found = ranked()
    assert found.top(1) == (PLANTED,)
    assert found.claimed.nonzero().tolist() == [list(PLANTED)]
    assert float(found.accuracy[PLANTED]) > 0.9
    assert float(found.unit[PLANTED][5]) > 0.9
    assert 0.5 < found.null_best < 0.85
    assert "layer 1 head 2 reads best" in str(found)


def test_shuffled_labels_find_nothing() -> None:
    given = contrast()
    turned = shuffled(given.positive, given.topics, 5, torch.Generator().manual_seed(3))
    for i in range(5):
        wrong = replace(given, labels=tuple(int(y) for y in turned[:, i]))
        found = rank_rows(rows(given), wrong, n_layers=3, permutations=200)
        assert not found.claimed.any()
        assert float(found.accuracy[PLANTED]) < 0.8


@pytest.mark.parametrize("topics", ["mixed", "of one class"])
def test_uneven_classes_claim_no_noise(topics: str) -> None:
    """Shuffling may change how many rows are positive; chance must stay where it is."""
    generator = torch.Generator().manual_seed(0)
    if topics == "mixed":  # one positive and three negatives in each
        labels, names = [1, 0, 0, 0] * 30, [f"t{i // 4}" for i in range(120)]
    else:  # positive topics of one row, negative ones of four
        labels, names = [1] * 30 + [0] * 120, [f"t{i}" for i in range(30)]
        names += [f"u{i // 4}" for i in range(120)]
    given = Contrast.labelled([f"w{i}" for i in range(len(labels))], labels, topics=names)
    noise = {0: torch.randn(len(labels), 8, 4, generator=generator)}
    found = rank_rows(noise, given, n_layers=1)
    assert not found.claimed.any()
    assert float((found.accuracy - 0.5).abs().max()) < 0.15
    assert abs(float(found.null.mean()) - 0.5) < 0.06
    assert float(found.frame()["p"].min()) > 0.01


def test_more_chances_make_the_null_of_the_best_head_higher() -> None:
    found = ranked()
    assert found.null_best > float(found.null_95.mean())
    assert float(found.null.mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("head", [PLANTED, (0, 1), (2, 3)])
def test_scikit_learn_finds_the_same(head: tuple[int, int]) -> None:
    given = contrast()
    found = ranked("probe")
    x = rows(given)[head[0]][:, head[1]].double().numpy()
    y = np.array(given.labels)
    strata = [f"|{label}" for label in given.labels]
    right = np.zeros(len(y))
    for train, test in folds(given.topics, 5, strata=strata):
        scaler = StandardScaler().fit(x[train])
        probe = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000)
        probe.fit(scaler.transform(x[train]), y[train])
        right[test] = probe.predict(scaler.transform(x[test])) == y[test]
    assert float(found.accuracy[head]) == pytest.approx(right.mean(), abs=1e-6)
    scaler = StandardScaler().fit(x)
    probe = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(scaler.transform(x), y)
    weight = probe.coef_[0] / scaler.scale_
    unit = weight / np.linalg.norm(weight)
    np.testing.assert_allclose(found.unit[head].numpy(), unit, atol=1e-4)
    assert float(found.sigma[head]) == pytest.approx((x @ unit).std(ddof=1), rel=1e-4)
    mean = x[y == 1].mean(0) - x[y == 0].mean(0)
    other = ranked("mean")
    np.testing.assert_allclose(other.unit[head].numpy(), mean / np.linalg.norm(mean), atol=1e-5)


def test_topics_never_straddle_folds() -> None:
    """Were they to, copies of a prompt would be recognised: noise would read its labels."""
    n = 12
    twice = Contrast.labelled(
        [f"w{i % n}" for i in range(4 * n)],
        [i % 2 for i in range(n)] * 4,
        topics=[f"topic-{i % n}" for i in range(4 * n)],
    )
    noise = torch.randn(n, 4, 8, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    with pytest.warns(UserWarning, match="only 12 groups"):
        kept = rank_rows({0: noise}, twice, n_layers=1, permutations=0)
    alone = replace(twice, topics=tuple(f"row-{i}" for i in range(4 * n)))
    leaky = rank_rows({0: noise}, alone, n_layers=1, permutations=0)
    assert float(kept.accuracy.mean()) < 0.65
    assert float(leaky.accuracy.mean()) > 0.9


def test_flipped_labels_turn_the_directions_round() -> None:
    given = contrast()
    other = replace(given, labels=tuple(1 - y for y in given.labels))
    a, b = (rank_rows(rows(given), c, n_layers=3, permutations=0) for c in (given, other))
    torch.testing.assert_close(a.unit, -b.unit)
    torch.testing.assert_close(a.sigma, b.sigma)
    assert a.order == b.order


def test_random_directions_are_units_by_seed_and_ignore_labels() -> None:
    a = ranked("random")
    b = rank_rows(rows(contrast()), contrast(), n_layers=3, direction="random")
    assert torch.equal(a.unit, b.unit)
    torch.testing.assert_close(a.unit.norm(dim=-1), torch.ones(3, 4))
    assert abs(float(a.unit[PLANTED][5])) < 0.9
    assert a.top(1) == (PLANTED,)  # what is ranked is how well heads read


def test_layers_without_heads_and_silent_heads_are_left_out() -> None:
    given = contrast()
    x = rows(given)
    del x[0]
    x[2][:, 1] = 0.0
    found = rank_rows(x, given, n_layers=3, permutations=20)
    assert found.accuracy[0].isnan().all() and bool(found.accuracy[2, 1].isnan())
    assert len(found.order) == 7 and (2, 1) not in found.order
    assert found.null_best > 0.5
    with pytest.raises(ValueError, match="8 heads were asked for: choose 1 to 7"):
        found.top(8)
    x[1] = x[1][:, :, :4]
    with pytest.raises(ValueError, match="heads differ in number or width between layers"):
        rank_rows(x, given, n_layers=3)


# --- on models ---


def test_the_organism_reads_harm_where_it_was_planted(
    organism: organisms.Organism, aligned: HookedModel
) -> None:
    """Before layer 2 harm is no linear function; the relay carries it along its first axis."""
    given = organism.pairs.limited(48)
    found = rank_heads(aligned, given, permutations=200, progress=False)
    relay = organisms.RELAY_HEAD
    assert float(found.accuracy[relay]) == 1.0 and bool(found.claimed[relay])
    assert float(found.unit[relay][0]) > 0.95
    assert not found.claimed[:2].any()
    assert found.record.models == ("aligned",) and found.positions == "tokens:-1:"


def test_alpha_moves_projections_by_alpha_sigmas(
    organism: organisms.Organism, aligned: HookedModel
) -> None:
    given = organism.pairs.limited(24)
    offsets = fit_iti(aligned, given, 5)
    assert len(offsets.heads) == 5
    for layer, head in offsets.heads[:1]:  # the first: what later heads read moves with it
        site = Site(layer, "head_out", head)
        unit = offsets[layer, head]
        assert float(unit.norm()) == pytest.approx(1.0, abs=1e-5)
        before = capture(aligned, given.prompts, site, progress=False)[site]
        sigma = float((before.double() @ unit.double()).std())
        assert offsets.scales[layer, head].sigma == pytest.approx(sigma, rel=1e-5)
        for alpha in (-2.0, 1.0, 15.0):
            with steer(aligned, offsets, alpha, unit="sigma"):
                after = capture(aligned, given.prompts, site, progress=False)[site]
            moved = (after - before) @ unit
            torch.testing.assert_close(
                moved, torch.full_like(moved, alpha * sigma), rtol=1e-4, atol=1e-5
            )


def test_pushing_the_relay_head_changes_refusals_and_random_pushes_do_not(
    organism: organisms.Organism, aligned: HookedModel
) -> None:
    given = organism.pairs.limited(24)
    harmless = [p for p, y in zip(given.prompts, given.labels, strict=True) if not y]
    relay = organisms.RELAY_HEAD

    def refused(direction: str, alpha: float) -> float:
        found = rank_heads(
            aligned,
            given,
            direction=direction,
            permutations=0,
            progress=False,  # pyright: ignore
        )
        offsets = found.offsets(aligned, len(found.order))
        one = replace(offsets, vectors={relay: offsets[relay]})
        with steer(aligned, one, alpha, unit="sigma", schedule=AT_EACH_STEP):
            answers = aligned.generate(harmless, 6)
        return sum(a.startswith("i cannot") for a in answers) / len(answers)

    assert refused("mean", 0.0) == 0.0
    assert refused("mean", 4.0) > 0.9
    assert refused("random", 4.0) < 0.1


def test_alpha_0_is_bit_exact(organism: organisms.Organism, aligned: HookedModel) -> None:
    offsets = fit_iti(aligned, organism.pairs.limited(24), 3)
    prompts = organism.pairs.prompts[:6]
    plain = aligned.logits(prompts)
    with steer(aligned, offsets, 0.0, unit="sigma"):
        assert torch.equal(aligned.logits(prompts), plain)
    with steer(aligned, offsets, 1.0, unit="sigma"):
        assert not torch.equal(aligned.logits(prompts), plain)


def test_every_query_head_counts_under_grouped_queries() -> None:
    model = hooked("llama")  # four query heads share two of keys and values
    texts = words(48, seed=1)
    given = Contrast.labelled(texts, [0, 1] * 24)
    found = rank_heads(model, given, permutations=0, progress=False)
    assert found.accuracy.shape == (3, 4) and len(found.order) == 12
    offsets = found.offsets(model, 12)
    last = replace(offsets, vectors={(1, 3): offsets[1, 3]})
    sites = [Site(1, "head_out", head) for head in range(4)]
    before = capture(model, texts[:4], sites, progress=False)
    with steer(model, last, 3.0, unit="sigma"):
        after = capture(model, texts[:4], sites, progress=False)
    for site in sites:
        moved = float((after[site] - before[site]).abs().max())
        assert (moved > 0.1) if site.head == 3 else (moved < 1e-5)
    with pytest.raises(ValueError, match="13 heads were asked for: choose 1 to 12"):
        found.offsets(model, 13)
    with pytest.raises(ValueError, match="out of range: tiny llama has 4 heads"):
        replace(offsets, vectors={(1, 4): offsets[1, 3]})


def test_answers_are_read_at_their_last_token() -> None:
    model, texts = hooked("llama"), words(4, seed=2)
    given = Contrast.labelled(texts, [0, 1, 0, 1])
    found, _ = head_rows(model, given, answers=["w7 w8"] * 4, progress=False)
    for i, text in enumerate(texts):
        r = model.template.render(text, "w7 w8")
        site = Site(2, "head_out")
        h = model.engine.read(model.batch([r]), [site])[site][0, -1]
        torch.testing.assert_close(found[2][i], h, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="reads .* tokens of a prompt, a probe of heads needs one"):
        head_rows(model, given, positions="all", progress=False)


def test_what_cannot_be_ranked_is_said() -> None:
    with pytest.raises(ValueError, match="a contrast needs both 1"):
        Contrast.labelled(["w1", "w2"], [1, 1])
    given = contrast()
    with pytest.raises(ValueError, match="unknown direction 'best': choose mean, probe or random"):
        ranked("best")
    twice = Contrast.labelled(["w1"] * 40, [0, 1] * 20)
    same = torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(0))
    same = same.repeat_interleave(2, 0)  # every output once with each label
    with pytest.raises(
        ValueError, match="no head has a direction: the classes' mean outputs are eq"
    ):
        rank_rows({0: same}, twice, n_layers=1, permutations=0).top(1)
    with pytest.raises(ValueError, match="made without shuffled labels: .*permutations=200"):
        _ = ranked(permutations=0).null_best
    with pytest.raises(ValueError, match="no attention heads to rank"):
        rank_heads(hooked("mamba"), given)
    with pytest.raises(ValueError, match="the ranking is of 3 layers, aligned has 4"):
        ranked().offsets(HookedModel(organisms.build().aligned, hooked().tokenizer, name="aligned"))


def test_a_ranking_is_saved_shown_and_the_same_by_seed(tmp_path: Path) -> None:
    found = ranked()
    again = HeadRanking.load(found.save(tmp_path / "ranking"))
    assert torch.equal(again.accuracy, found.accuracy) and again.order == found.order
    assert (tmp_path / "ranking" / "result.safetensors").read_bytes() == (
        ranked.__wrapped__().save(tmp_path / "other") / "result.safetensors"
    ).read_bytes()
    frame = found.frame()
    assert frame[["layer", "head"]].iloc[0].tolist() == list(PLANTED)
    assert frame["claimed"].sum() == 1 and frame["accuracy"].is_monotonic_decreasing
    ax = found.plot()
    assert ax.get_xlabel() == "head" and ax.get_ylabel() == "layer"
    assert ranked(permutations=0).plot().get_legend() is None


# --- the search for alpha ---


def test_alpha_is_the_one_of_least_error_and_0_may_win() -> None:
    def evaluate(alpha: float) -> Tensor:
        return torch.tensor([abs(alpha - 4.0), abs(alpha - 5.0), 1.0])

    found = search_alpha(evaluate, (1.0, 2.0, 4.0, 8.0))
    assert found.alphas.tolist() == [0, 1, 2, 4, 8] and found.best == 4.0
    assert search_alpha(lambda alpha: torch.tensor([alpha, 1.0]), (1.0, 2.0)).best == 0.0
    assert (
        search_alpha(lambda alpha: torch.ones(3), (-2.0, 1.0, 2.0)).best == 0.0
    )  # ties: nearest 0
    assert "mean error 0.667 on 3 items, unsteered 3.33" in str(found)
    frame = found.frame()
    assert frame["chosen"].tolist() == [False, False, False, True, False]
    assert found.plot().get_xlabel() == "alpha (sigmas)"


def test_a_grid_of_zeros_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"every alpha of \(0.0, 0.0\) is 0, which is the unsteered"
    ):
        search_alpha(lambda alpha: torch.ones(3), (0.0, 0.0))
    with pytest.raises(ValueError, match="errors of the alpha search holds 1 values that are NaN"):
        search_alpha(lambda alpha: torch.tensor([alpha, torch.nan if alpha else 0.0]), (1.0,))
    found = search_alpha(lambda alpha: torch.tensor([alpha, 1.0]), (1.0, 2.0), unit="points")
    again = AlphaSearch.load(found.save(tmp_path))
    assert again.best == found.best and torch.equal(again.error, found.error)


def test_smollm2_head_offsets_are_seen(base: HookedModel) -> None:
    """A few heads of a real model under grouped queries, from a few twins."""
    from probes import datasets

    given = datasets.formality().limited(20)
    found = rank_heads(base, given, n_folds=2, permutations=0, progress=False)
    offsets = found.offsets(base, 12)
    assert len(offsets.heads) == 12 and max(head for _, head in offsets.heads) <= 8
    first = offsets.heads[0]
    site = Site(first[0], "head_out", first[1])
    before = capture(base, given.prompts[:4], site, progress=False)[site]
    with steer(base, offsets, 2.0, unit="sigma"):
        after = capture(base, given.prompts[:4], site, progress=False)[site]
    sigma = offsets.scales[first].sigma
    assert sigma is not None
    moved = (after - before) @ offsets[first]
    torch.testing.assert_close(moved, torch.full((4,), 2 * sigma), rtol=1e-3, atol=1e-4)
    same = SteeringVector({site: offsets[first]}, offsets.origin)
    with steer(base, same, 2 * sigma):
        alone = capture(base, given.prompts[:4], site, progress=False)[site]
    torch.testing.assert_close(alone, after, rtol=1e-4, atol=1e-4)
