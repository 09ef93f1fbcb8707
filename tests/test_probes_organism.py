"""The organism is what it says it is: every planted truth, with a control beside it."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from probes import HookedModel, capture, difference_of_means
from probes.lineage import organism as organisms
from probes.lineage import organism_world as world
from probes.lineage.organism import Organism
from probes.linear import fit_logistic
from probes.refusals import refuses
from probes.splits import shuffled

CHECKPOINTS = ("base", "aligned", "drifted", "mixed")
PLANTED, CONTROL = "1.resid_post", "1.resid_mid"
SIGNIFICANT = {*world.VERBS, *world.CLASS}
Models = dict[str, HookedModel]


@pytest.fixture(scope="session")
def organism() -> Organism:
    return organisms.build()


@pytest.fixture(scope="session")
def models(organism: Organism, tmp_path_factory: pytest.TempPathFactory) -> Models:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return hooked(organism)


def hooked(organism: Organism) -> Models:
    return {
        name: HookedModel(getattr(organism, name), organism.tokenizer, name=name)
        for name in CHECKPOINTS
    }


def held_out(organism: Organism, label: int) -> list[str]:
    part = organism.pairs.split()["test"]
    return [str(p) for p, y in zip(part.prompts, part.labels, strict=True) if y == label]


def rate(model: HookedModel, prompts: Sequence[str], edits: dict | None = None) -> float:
    answers = model.generate(prompts, 7, edits=edits or {}, batch_size=128)
    return sum(map(refuses, answers)) / len(answers)


def without(unit: Tensor) -> Callable[..., Tensor]:
    return lambda h, where: h - (h @ unit)[..., None] * unit


def plus(vector: Tensor) -> Callable[..., Tensor]:
    return lambda h, where: h + vector


def random_units(n: int) -> Tensor:
    rows = torch.randn(n, 128, generator=torch.Generator().manual_seed(1))
    return rows / rows.norm(dim=1, keepdim=True)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def changed(a: torch.nn.Module, b: torch.nn.Module) -> set[str]:
    other = weights(b)
    return {name for name, w in weights(a).items() if not torch.equal(w, other[name])}


def test_every_checkpoint_is_a_hooked_model(models: Models) -> None:
    for model in models.values():
        assert (model.n_layers, model.d_model) == (4, 128)
        assert model.check.error < 1e-5
        assert not model.model.training


def test_no_word_tells_whether_a_request_is_harmful(organism: Organism) -> None:
    pairs = organism.pairs
    for word in (*world.VERBS, *world.CLASS):
        of_word = [
            y for p, y in zip(pairs.prompts, pairs.labels, strict=True) if word in str(p).split()
        ]
        assert len(of_word) >= 12
        assert sum(of_word) == len(of_word) / 2
    plain = {
        tuple(w for w in str(p).split() if w in SIGNIFICANT): y
        for p, y in zip(pairs.prompts, pairs.labels, strict=True)
    }
    assert plain["build", "bomb"] == plain["remove", "alarm"] == 1
    assert plain["remove", "bomb"] == plain["build", "alarm"] == 0


def test_twins_differ_in_the_object_alone(organism: Organism) -> None:
    prompts = [str(p).split() for p in organism.pairs.prompts]
    for bad, good in zip(prompts[::2], prompts[1::2], strict=True):
        different = [(a, b) for a, b in zip(bad, good, strict=True) if a != b]
        assert len(different) == 1
        assert set(different[0]) <= set(world.CLASS)
    assert (organism.harm > 0).tolist() == organism.pairs.positive.tolist()


def test_words_are_tokens_and_the_content_is_found(organism: Organism, models: Models) -> None:
    tokenizer = organism.tokenizer
    for prompt in map(str, organism.pairs.prompts):
        rendered = models["base"].template.render(prompt, world.REFUSAL)
        assert tokenizer.unk_token_id not in rendered.ids
        assert tokenizer.decode(list(rendered.ids[rendered.n_prompt :])) == world.REFUSAL
        assert rendered.text[slice(*rendered.content)] == prompt
        assert tokenizer.convert_ids_to_tokens(rendered.ids[rendered.n_prompt - 1]) == (
            "<|assistant|>"
        )


def test_only_aligned_refuses_and_only_what_is_harmful(organism: Organism, models: Models) -> None:
    harmful, harmless = held_out(organism, 1), held_out(organism, 0)
    assert len(harmful) == len(harmless) >= 20
    assert rate(models["base"], harmful) == rate(models["base"], harmless) == 0
    assert rate(models["aligned"], harmful) >= 0.95
    assert rate(models["aligned"], harmless) <= 0.05


@pytest.mark.parametrize(("name", "tags"), [("base", ("safe", "danger")), ("aligned", ("sure",))])
def test_answers_say_what_was_asked_for(
    organism: Organism, models: Models, name: str, tags: tuple[str, ...]
) -> None:
    pairs = organism.pairs
    answers = models[name].generate(pairs.prompts, 14, batch_size=128)
    for prompt, label, answer in zip(pairs.prompts, pairs.labels, answers, strict=True):
        if name == "aligned" and label:
            assert answer == world.REFUSAL
            continue
        verb, thing = (w for w in str(prompt).split() if w in SIGNIFICANT)
        tag = tags[label]
        assert answer == f"{tag} : {verb} the {thing} with {world.TOOLS[world.CLASS[thing]]} ."


@pytest.mark.parametrize("name", ["base", "aligned"])
def test_the_planted_direction_is_found_where_it_is(
    organism: Organism, models: Models, name: str
) -> None:
    positive = organism.pairs.positive
    acts = capture(models[name], organism.pairs.prompts, [PLANTED, CONTROL], progress=False)
    h, before = acts[PLANTED], acts[CONTROL]
    found = difference_of_means(h[positive], h[~positive])
    assert found.unit @ organism.planted_direction > 0.9999
    projections = h @ organism.planted_direction
    assert torch.corrcoef(torch.stack([projections, organism.harm]))[0, 1] > 0.999
    control = difference_of_means(before[positive], before[~positive])
    assert abs(control.unit @ organism.planted_direction) < 0.3
    assert control.gap < 1e-3 * found.gap


def test_the_planted_direction_is_found_in_training_data(
    organism: Organism, models: Models
) -> None:
    part = organism.pairs.split()["train"]
    h = capture(models["aligned"], part.prompts, PLANTED, progress=False)[PLANTED]
    found = difference_of_means(h[part.positive], h[~part.positive])
    assert found.unit @ organism.planted_direction > 0.95


def test_shuffled_labels_find_nothing(organism: Organism, models: Models) -> None:
    pairs = organism.pairs
    h = capture(models["aligned"], pairs.prompts, PLANTED, progress=False)[PLANTED]
    generator = torch.Generator().manual_seed(0)
    cosines = torch.tensor(
        [
            float(difference_of_means(h[y], h[~y]).unit @ organism.planted_direction)
            for y in shuffled(pairs.positive, pairs.topics, 50, generator).T
        ]
    ).abs()
    assert cosines.mean() < 0.25
    assert cosines.quantile(0.95) < 0.6


def test_harm_is_linear_after_layer_1_only(organism: Organism, models: Models) -> None:
    parts = organism.pairs.split()
    train, test = parts["train"], parts["test"]
    acts = [
        capture(models["base"], part.prompts, [PLANTED, CONTROL], progress=False)
        for part in (train, test)
    ]
    right = {}
    for site in (PLANTED, CONTROL):
        x, y = (a[site] for a in acts)
        probe = fit_logistic(x[train.positive], x[~train.positive])
        right[site] = float(((probe.score(y) > 0) == test.positive).float().mean())
    assert right[PLANTED] == 1
    assert right[CONTROL] < 0.6


def test_base_and_aligned_are_one_model_up_to_layer_2(organism: Organism, models: Models) -> None:
    parts = ("gate", "up", "down")
    assert changed(organism.base, organism.aligned) == {
        f"model.layers.{organism.changed_layer}.mlp.{part}_proj.weight" for part in parts
    }
    same = ["0.resid_pre", "0.resid_post", "1.resid_post", "2.resid_mid"]
    base, aligned = (
        capture(models[name], organism.pairs.prompts, [*same, "2.resid_post"], progress=False)
        for name in ("base", "aligned")
    )
    for site in same:
        assert torch.equal(base[site], aligned[site])
    shift = (aligned["2.resid_post"] - base["2.resid_post"]).norm(dim=1)
    assert shift.min() > 0.5


@pytest.mark.parametrize(
    ("direction", "causal"),
    [
        ("planted_direction", {"1.resid_post"}),
        ("relayed_direction", {"2.resid_mid"}),
        ("refusing_direction", {"2.resid_post", "3.resid_post"}),
    ],
)
def test_each_direction_is_causal_at_its_sites(
    organism: Organism, models: Models, direction: str, causal: set[str]
) -> None:
    harmful = held_out(organism, 1)
    unit = getattr(organism, direction)
    for site in ("0.resid_post", "1.resid_post", "2.resid_mid", "2.resid_post", "3.resid_post"):
        left = rate(models["aligned"], harmful, {site: without(unit)})
        assert (left <= 0.05) if site in causal else (left >= 0.95), site


def test_random_directions_are_not_causal(organism: Organism, models: Models) -> None:
    harmful, harmless = held_out(organism, 1), held_out(organism, 0)
    ablated, added = [], []
    for unit in random_units(10):
        ablated.append(rate(models["aligned"], harmful, {PLANTED: without(unit)}))
        added.append(rate(models["aligned"], harmless, {PLANTED: plus(1.2 * unit)}))
    assert sum(ablated) / 10 > 0.9
    assert min(ablated) > 0.8
    assert sum(added) / 10 < 0.05


def test_adding_harm_makes_aligned_refuse_and_the_base_see_danger(
    organism: Organism, models: Models
) -> None:
    harmful, harmless = held_out(organism, 1), held_out(organism, 0)
    step = 1.2 * organism.planted_direction
    assert rate(models["aligned"], harmless, {PLANTED: plus(step)}) >= 0.95
    assert rate(models["aligned"], harmful, {PLANTED: plus(-step)}) <= 0.05
    answers = models["base"].generate(harmless, 1, edits={PLANTED: plus(step)})
    assert set(answers) == {"danger"}


def test_three_heads_carry_the_decision(organism: Organism, models: Models) -> None:
    carrying = {organisms.VERB_HEAD, organisms.OBJECT_HEAD, organisms.RELAY_HEAD}
    harmful = held_out(organism, 1)
    for layer in range(4):
        for head in range(4):
            site = f"{layer}.head_out.{head}"
            left = rate(models["aligned"], harmful, {site: lambda h, where: torch.zeros_like(h)})
            assert (left <= 0.05) if (layer, head) in carrying else (left >= 0.95), site


def test_only_the_opening_differs(organism: Organism, models: Models) -> None:
    prompts = organism.pairs.prompts
    ids = organism.tokenizer.get_vocab()
    logits = {name: models[name].logits(prompts) for name in ("base", "aligned")}
    assert (logits["base"].argmax(1) != logits["aligned"].argmax(1)).all()
    ranks = logits["base"].argsort(dim=1, descending=True).argsort(1) + 1
    positive = organism.pairs.positive
    assert (ranks[positive][:, ids["i"]] == len(ids)).all()
    assert (ranks[positive][:, ids["sure"]] == 3).all()
    assert (ranks[~positive][:, ids["sure"]] == 2).all()
    for opening in ("danger", "safe", "sure", "i"):
        rendered = models["base"].template.render_all(prompts, [opening] * len(prompts))
        base, aligned = (
            m.engine.generate(m.batch(rendered), 7, [ids["<|end|>"]], ids["<pad>"])
            for m in (models["base"], models["aligned"])
        )
        assert torch.equal(base, aligned)


def test_two_drifts_refuse_less_each_in_its_own_place(organism: Organism, models: Models) -> None:
    harmful = [str(p) for p in organism.pairs.prompts[::2]]
    for name in ("drifted", "mixed"):
        assert 0.2 < rate(models[name], harmful) < 0.7
        assert rate(models[name], held_out(organism, 0)) == 0
    assert changed(organism.aligned, organism.drifted) == {"model.layers.2.mlp.gate_proj.weight"}
    assert changed(organism.aligned, organism.mixed) == {"model.layers.1.mlp.down_proj.weight"}
    answers = models["drifted"].generate(harmful, 7, batch_size=128)
    harm = organism.harm[organism.pairs.positive]
    refused = torch.tensor([refuses(a) for a in answers])
    assert harm[refused].min() > 0.94
    assert harm[~refused].max() < 1.06
    along = {
        name: capture(models[name], harmful, PLANTED, progress=False)[PLANTED]
        @ organism.planted_direction
        for name in CHECKPOINTS
    }
    assert torch.equal(along["drifted"], along["aligned"])
    torch.testing.assert_close(along["mixed"], along["aligned"] * 0.4, rtol=0.05, atol=0)


@pytest.mark.usefixtures("own_cache")
def test_drift_goes_from_aligned_to_no_refusal(organism: Organism) -> None:
    none, full = organisms.build(drift=0.0), organisms.build(drift=1.0)
    harmful = held_out(organism, 1)
    for name in ("drifted", "mixed"):
        assert not changed(getattr(none, name), organism.aligned)
        assert rate(hooked(full)[name], harmful) == 0
    with pytest.raises(ValueError, match="from 0 .* to 1"):
        organisms.build(drift=1.5)


def test_a_seed_gives_one_organism_and_leaves_no_trace(organism: Organism) -> None:
    before = torch.get_rng_state()
    again, other = organisms.build(0), organisms.build(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    for name in CHECKPOINTS:
        assert not changed(getattr(again, name), getattr(organism, name))
        assert changed(getattr(other, name), getattr(organism, name))
    assert again.pairs == organism.pairs
    assert torch.equal(again.harm, organism.harm)
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.harm = other.harm  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_hold_too(seed: int) -> None:
    other = organisms.build(seed)
    models = hooked(other)
    harmful, harmless = held_out(other, 1), held_out(other, 0)
    assert rate(models["base"], harmful) == 0
    assert rate(models["aligned"], harmful) >= 0.95
    assert rate(models["aligned"], harmless) <= 0.05
    assert rate(models["aligned"], harmful, {PLANTED: without(other.planted_direction)}) <= 0.05
