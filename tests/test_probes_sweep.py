"""A sweep finds the planted site on held-out topics, and its nulls find nothing."""

import pytest
import torch

from probes import figures
from probes.splits import split
from probes.sweeps import ProbeSweep, sweep

D, TOPICS, LAYERS = 32, 100, 5
GROUPS = [f"t{i:03d}" for i in range(TOPICS) for _ in range(2)]
LABELS = torch.arange(2 * TOPICS) % 2 == 0
PARTS = split(GROUPS)


def activations(gap: float = 2.0, seed: int = 0, where: int = 3) -> dict[str, torch.Tensor]:
    """Twins share most of each activation; the concept stands at one layer only."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    found = {}
    for layer in range(LAYERS):
        shared = torch.randn(TOPICS, D, generator=generator).repeat_interleave(2, 0)
        x = shared + torch.randn(2 * TOPICS, D, generator=generator) + 4
        if layer == where:
            x = x + (LABELS.float() - 0.5)[:, None] * gap * v
        found[f"{layer}.resid_post"] = x
    return found


@pytest.mark.parametrize("kind", ["logistic", "mean", "whitened", "ccs"])
def test_the_planted_layer_is_found_and_the_others_are_not(kind):
    gap = 6.0 if kind == "ccs" else 3.0
    found = sweep(activations(gap), LABELS, GROUPS, **PARTS, kind=kind, C=0.01)
    assert found.best == "3.resid_post"
    assert found.best_claimed
    assert found.claimed.tolist() == [False, False, False, True, False]
    assert float(found.auroc[3]) > 0.85
    assert bool(((found.low <= found.auroc) & (found.auroc <= found.high)).all())
    assert found.null.shape == (5, 200)
    # in the planted layer too: shuffled labels carry nothing
    assert bool(((found.null.mean(1) - 0.5).abs() < 0.1).all())
    assert (found.n_train, found.n_test, found.n_groups) == (120, 40, 20)


def test_claims_without_any_effect_are_as_rare_as_they_should_be():
    runs = [sweep(activations(0.0, seed=s), LABELS, GROUPS, **PARTS, kind="mean") for s in range(8)]
    # a claim needs the 2.5 % limit above a 95 % null, so at most about one in forty
    assert sum(int(run.claimed.sum()) for run in runs) <= 3
    assert sum(run.best_claimed for run in runs) <= 1


def test_the_maximum_has_a_higher_null_than_one_site():
    found = sweep(activations(), LABELS, GROUPS, **PARTS, kind="mean")
    assert torch.equal(found.null_max, found.null.amax(0))
    assert float(found.null_max.quantile(0.95)) > float(found.null_95.mean())


def test_the_null_repeats_the_choice_of_site():
    found = sweep(activations(), LABELS, GROUPS, **PARTS, kind="mean")
    assert found.null_chosen is not None
    assert bool((found.null_chosen[None] == found.null).any(0).all())
    # the choice is made on validation rows with shuffled labels, so it is not the test maximum
    assert float(found.null_chosen.mean()) < float(found.null_max.mean()) - 0.02
    assert abs(float(found.null_chosen.mean()) - 0.5) < 0.05


def test_a_dominant_concept_is_claimed_though_shuffled_fits_find_its_axis():
    acts = activations(12.0)
    found = sweep(acts, LABELS, GROUPS, **PARTS, kind="mean")
    assert found.best_claimed
    assert float(found.auroc[3]) > 0.99
    assert float(found.null_95[3]) < 0.75
    # against true test labels the null has both ends of that axis, and nothing can exceed it
    harder = sweep(acts, LABELS, GROUPS, **PARTS, kind="mean", shuffle="train")
    assert torch.equal(harder.auroc, found.auroc)
    assert float(harder.null_95[3]) > 0.99
    assert not bool(harder.claimed[3])


def test_test_labels_are_never_seen_by_fit_or_choice():
    """Turning every test label round turns the AUROC round and changes no choice."""
    one = sweep(activations(), LABELS, GROUPS, **PARTS)
    turned = LABELS.clone()
    turned[PARTS["test"]] = ~turned[PARTS["test"]]
    other = sweep(activations(), turned, GROUPS, **PARTS)
    assert torch.allclose(other.auroc, 1 - one.auroc, atol=1e-6)
    assert other.best == one.best
    assert one.validation is not None
    assert other.validation is not None
    assert torch.equal(one.validation, other.validation)


def test_labelled_sets_without_twins_are_swept_too():
    labels = torch.arange(200) < 80
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, D, generator=generator) + labels[:, None] * 0.7
    groups = [f"p{i}" for i in range(200)]
    parts = split(groups, strata=["harmful" if y else "harmless" for y in labels.tolist()])
    noise = torch.randn(200, D, generator=generator)
    found = sweep({"0.resid_post": noise, "1.resid_post": x}, labels, groups, **parts)
    assert found.best == "1.resid_post"
    assert found.claimed.tolist() == [False, True]
    assert float(found.accuracy[1]) > 0.8
    assert float(found.calibration_error[1]) < 0.3


def test_without_validation_rows_no_site_is_best():
    parts = {name: PARTS[name] for name in ("train", "test")}
    found = sweep(activations(), LABELS, GROUPS, **parts, permutations=20)
    assert found.validation is None
    assert found.null_chosen is None
    with pytest.raises(ValueError, match="must be chosen on validation rows"):
        _ = found.best
    assert "highest on test" in str(found)
    assert "validation" not in found.frame().columns


def test_the_seed_decides_and_sites_are_in_forward_order():
    acts = dict(reversed(list(activations().items())))
    first = sweep(acts, LABELS, GROUPS, **PARTS, permutations=20)
    again = sweep(activations(), LABELS, GROUPS, **PARTS, permutations=20)
    other = sweep(activations(), LABELS, GROUPS, **PARTS, permutations=20, seed=1)
    assert first.sites == tuple(f"{k}.resid_post" for k in range(LAYERS))
    assert first.layers.tolist() == list(range(LAYERS))
    assert torch.equal(first.null, again.null)
    assert torch.equal(first.auroc, other.auroc)
    assert not torch.equal(first.null, other.null)


@pytest.mark.parametrize("validated", [True, False])
def test_it_is_saved_and_loaded(tmp_path, validated):
    parts = PARTS if validated else {name: PARTS[name] for name in ("train", "test")}
    found = sweep(activations(), LABELS, GROUPS, **parts, permutations=20)
    again = ProbeSweep.load(found.save(tmp_path))
    assert again.frame().equals(found.frame())
    assert again.sites == found.sites
    assert str(again) == str(found)
    assert "\n" not in str(found)


def test_the_curve_shows_interval_null_chance_and_choice(tmp_path):
    found = sweep(activations(), LABELS, GROUPS, **PARTS, permutations=20)
    ax = found.plot()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        "resid_post, 95 % interval",
        "resid_post, shuffled labels, 5 to 95 %",
        "chance",
        "chosen on validation",
    ]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "AUROC (held out)")
    assert figures.svg(ax.figure) == figures.svg(found.plot().figure)


def test_heads_are_drawn_as_a_map():
    base = activations(gap=4.0)
    acts = {
        f"{k}.head_out.{h}": base[f"{(k + h) % 5}.resid_post"] for k in (0, 1, 2) for h in (0, 1)
    }
    found = sweep(acts, LABELS, GROUPS, **PARTS, permutations=40)
    assert found.best == "2.head_out.1"
    table = found.frame().set_index(["layer", "head"])
    ax = found.plot()
    grid = ax.images[0].get_array()
    assert grid is not None
    assert grid.shape == (3, 2)
    for (layer, head), row in table.iterrows():
        assert float(grid[layer, head]) == pytest.approx(row.auroc)
    assert ax.lines[0].get_xydata().tolist() == [[1.0, 2.0]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("head", "layer")


def call(**changes):
    given = {"activations": activations(), "labels": LABELS, "groups": GROUPS, **PARTS} | changes
    return sweep.__wrapped__(**given)


@pytest.mark.filterwarnings("ignore:only")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": PARTS["train"]}, "is in train and test"),
        ({"test": PARTS["test"][:0]}, "the test rows must be numbers from 0 to 199"),
        ({"test": torch.tensor([500])}, "the test rows must be numbers from 0 to 199"),
        ({"test": PARTS["test"][::2]}, "the test rows hold one class only"),
        ({"activations": {}}, "no activations were given"),
        ({"activations": {"layer 3": torch.ones(200, 2)}}, "cannot read site 'layer 3'"),
        ({"activations": {"3.resid_post": torch.ones(9, 2)}}, "has 9 rows for 200 examples"),
        ({"activations": {"3.resid_post": torch.full((200, 2), torch.nan)}}, "3.resid_post holds"),
        ({"labels": LABELS[:9]}, "labels have shape (9,)"),
        ({"permutations": 0}, "0 permutations"),
        ({"shuffle": "none"}, "shuffle was 'none'"),
        ({"kind": "forest"}, "unknown kind of probe 'forest'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=r".") as caught:
        call(**changes)
    assert message in str(caught.value)


def test_few_test_topics_are_said():
    with pytest.warns(UserWarning, match="only 5 groups"):
        sweep(
            activations(),
            LABELS,
            GROUPS,
            train=PARTS["train"],
            test=PARTS["test"][:10],
            kind="mean",
        )
