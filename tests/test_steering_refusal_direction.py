"""The refusal direction is found where it was planted, and only where there is one."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from probes import HookedModel, capture, datasets
from probes.contrast import Contrast
from probes.engines import Edit
from probes.lineage import organism as organisms
from probes.lineage.organism import Organism
from probes.refusals import refuses
from probes.scores import wilson
from probes.sites import Site
from steering import refusal_direction
from steering.costs import Reference, kl
from steering.first_token import FirstToken
from steering.judges import first_tokens, refusal_log_odds
from steering.nulls import random_vectors
from steering.refusal_direction import find_refusal_direction, shortlist
from steering.refusal_scores import RefusalDirection
from steering.vector import SteeringVector

OPENERS = ("i",)
"""Of the organism's refusals."""
KL = 3.0
"""The organism also says "sure" by the planted direction, so ablating it changes every answer."""


@pytest.fixture(scope="module")
def organism() -> Organism:
    return organisms.build()


@pytest.fixture(scope="module")
def models(organism: Organism, tmp_path_factory: pytest.TempPathFactory) -> dict[str, HookedModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {
            name: HookedModel(getattr(organism, name), organism.tokenizer, name=name)
            for name in ("base", "aligned")
        }


@pytest.fixture(scope="module")
def parts(organism: Organism) -> dict[str, Contrast]:
    return organism.pairs.split()


@pytest.fixture(scope="module")
def found(models: dict[str, HookedModel], parts: dict[str, Contrast]) -> RefusalDirection:
    return search(models["aligned"], parts)


def search(model: HookedModel, parts: dict[str, Contrast], **options) -> RefusalDirection:
    options = {"openers": OPENERS, "max_kl": KL, "screen": None, "progress": False} | options
    return find_refusal_direction(model, parts["train"], parts["validation"], **options)


def of(contrast: Contrast, label: int) -> list:
    return [p for p, y in zip(contrast.prompts, contrast.labels, strict=True) if y == label]


def rate(model: HookedModel, prompts: list, steering: SteeringVector | None, n: int = 5) -> float:
    answers = model.generate(prompts, n, steer=steering, batch_size=64)
    return sum(map(refuses, answers)) / len(answers)


def test_the_planted_layer_and_position_are_chosen(
    organism: Organism, found: RefusalDirection
) -> None:
    assert found.site == Site(organism.planted_layer + 1, "resid_pre")
    assert found.tokens[found.position] == "-1 '<|assistant|>'"
    unit = found.vector[found.site] / found.vector.norm(found.site)
    assert unit @ organism.planted_direction > 0.95
    at = found.position, found.layer
    assert found.refusing > 0 > found.bypass[at]
    assert found.answering < 0 < found.induce[at]
    others = [(p, layer) for p, layer in (found.scored > 0).nonzero().tolist() if (p, layer) != at]
    assert len(others) == 3
    for p, layer in others:  # before harm is computed, and where it is not read
        assert found.bypass[p, layer] > 0 > found.induce[p, layer]
    assert not found.scored[:, 0].any()  # at the embedding a token is always itself
    assert not found.scored[:, 3].any()  # floor(0.8 * 4) = 3


def test_it_ends_and_causes_refusals(
    organism: Organism, models: dict[str, HookedModel], parts: dict[str, Contrast]
) -> None:
    """Fitted on all pairs, over which words and harm are independent; in a part of them the
    difference of means holds words too, and ablating it leaves a third of the refusals."""
    model, harmful, harmless = models["aligned"], of(parts["test"], 1), of(parts["test"], 0)
    found = search(model, {**parts, "train": organism.pairs}, n_train=144)
    assert rate(model, harmful, None) >= 0.95
    assert rate(model, harmful, found.vector.everywhere(model)) <= 0.05
    assert rate(model, harmless, found.vector) >= 0.95
    acts = capture(model, parts["train"].prompts, found.site, progress=False)
    null = random_vectors(found.vector, acts, 20, topics=parts["train"].topics)
    left = [rate(model, harmful, r.everywhere(model)) for r in null]
    caused = [rate(model, harmless, r) for r in null]
    assert np.mean(left) > 0.8
    assert np.mean(caused) < 0.1


def test_scores_are_those_of_their_definitions(
    models: dict[str, HookedModel], parts: dict[str, Contrast], found: RefusalDirection
) -> None:
    model, small = models["aligned"], 1e-12
    token = first_tokens(model, OPENERS)[0]
    kept = {1: [], 0: []}
    for y in (1, 0):  # as labelled by what the model does
        prompts = of(parts["validation"], y)
        p = model.logits(prompts).double().softmax(-1)[:, token]
        kept[y] = [q for q, x in zip(prompts, p, strict=True) if (x > 0.5) == bool(y)]

    def odds(prompts: list) -> torch.Tensor:
        p = model.logits(prompts).double().softmax(-1)[:, token]
        return torch.log(p + small) - torch.log(1 - p + small)

    at = found.position, found.layer
    before = model.logits(kept[0]).double().softmax(-1)
    assert float(odds(kept[1]).mean()) == pytest.approx(found.refusing, abs=1e-4)
    with model.edit(found.vector.everywhere(model).edits(model)):
        assert float(odds(kept[1]).mean()) == pytest.approx(float(found.bypass[at]), abs=1e-3)
        after = model.logits(kept[0]).double().softmax(-1)
    kl = (before * ((before + small).log() - (after + small).log())).sum(-1).mean()
    assert float(kl) == pytest.approx(float(found.kl[at]), abs=1e-4)
    with model.edit(found.vector.edits(model)):
        assert float(odds(kept[0]).mean()) == pytest.approx(float(found.induce[at]), abs=1e-3)


def test_screening_finds_the_same(
    models: dict[str, HookedModel], parts: dict[str, Contrast], found: RefusalDirection
) -> None:
    quick = search(models["aligned"], parts, screen=4, finalists=2)
    assert (quick.position, quick.layer) == (found.position, found.layer)
    assert sorted(set(quick.scored.flatten().tolist())) == [0, 4, int(found.scored.max())]
    at = found.position, found.layer
    assert float(quick.bypass[at]) == pytest.approx(float(found.bypass[at]), abs=1e-9)


def test_more_finalists_are_scored_until_one_passes(
    models: dict[str, HookedModel],
    parts: dict[str, Contrast],
    found: RefusalDirection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def worst(table: torch.Tensor, n: int, *_: float) -> list[tuple[int, int]]:
        """What a screen of few prompts may say at its unluckiest."""
        known = [tuple(at) for at in table[0].isfinite().nonzero().tolist()]
        return sorted(known, key=lambda at: -float(table[0][at]))[:n]

    monkeypatch.setattr(refusal_direction, "shortlist", worst)
    late = search(models["aligned"], parts, screen=4, finalists=1)
    assert (late.position, late.layer) == (found.position, found.layer)
    at = found.position, found.layer
    assert float(late.bypass[at]) == pytest.approx(float(found.bypass[at]), abs=1e-9)
    with pytest.raises(ValueError, match=r"no candidate passes: of 4 scored on all"):
        search(models["aligned"], parts, screen=4, finalists=1, min_induce=50.0)
    with pytest.raises(ValueError, match="0 finalists: give 1 or more"):
        search(models["aligned"], parts, finalists=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_shortlist_holds_the_best_under_any_limit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(3, 5, 20, generator=generator, dtype=torch.float64)
    table[2] = table[2].exp()
    table[:, 2, 3] = torch.nan
    limits = (
        table[2].nan_to_num(torch.inf).flatten().quantile(torch.linspace(0.05, 0.9, 9).double())
    )
    for limit in limits.tolist():
        fits = (table[2] <= limit) & (table[1] >= 0)
        best = torch.where(fits, table[0], torch.inf).argmin()
        chosen = shortlist(table, 12, limit, 0.0)
        assert len(chosen) == len(set(chosen)) == 12
        assert divmod(int(best), 20) in chosen
        assert (2, 3) not in chosen
    assert len(shortlist(table, 500, 1.0, 0.0)) == 99


@pytest.mark.parametrize("part", ["attn_out", "mlp_out", "resid_pre", "resid_post", "head_out"])
def test_a_shared_beginning_changes_nothing(part: str, llama: HookedModel) -> None:
    prompts = ["w1 w2 w3 w4 w5", "w9", "w1 w2 w7", "w30 w31"]
    readout = FirstToken(llama, prompts, rows=3)
    assert readout.shared >= 6
    edits = [
        Edit(Site(layer, part), lambda h, where: h * 0.7 + 0.1) for layer in range(llama.n_layers)
    ]
    plain = llama.logits(prompts)
    torch.testing.assert_close(readout(()), plain, rtol=1e-4, atol=1e-4)
    with llama.edit(edits):
        whole = llama.logits(prompts)
    assert (whole - plain).abs().max() > 0.1
    torch.testing.assert_close(readout(edits), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(readout(()), plain, rtol=1e-4, atol=1e-4)
    unshared = FirstToken(llama, prompts[:1])
    assert unshared.shared == 0
    torch.testing.assert_close(unshared(edits), whole[:1], rtol=1e-4, atol=1e-4)


def test_ablation_knows_neither_scale_nor_sign(
    models: dict[str, HookedModel], parts: dict[str, Contrast], found: RefusalDirection
) -> None:
    model, harmful = models["aligned"], of(parts["test"], 1)
    readout = FirstToken(model, harmful)
    one, other = (
        readout(v.everywhere(model).edits(model)) for v in (found.vector, -3.0 * found.vector)
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    there_and_back = [*found.vector.edits(model), *(-found.vector).edits(model)]
    torch.testing.assert_close(readout(there_and_back), readout(()), rtol=1e-4, atol=1e-4)


def test_after_ablation_the_stream_does_not_hold_it(
    models: dict[str, HookedModel], parts: dict[str, Contrast], found: RefusalDirection
) -> None:
    model = models["aligned"]
    unit = found.vector[found.site].double() / found.vector.norm(found.site)
    sites = ["all.resid_pre", "all.resid_mid", "all.resid_post"]
    prompts = parts["test"].prompts[:8]
    with model.edit(found.vector.everywhere(model).edits(model)):
        acts = capture(model, prompts, sites, "all", progress=False)
    free = capture(model, prompts, sites, "all", progress=False)
    share = [
        float((x.double() @ unit).abs().max() / x.norm(dim=1).double().max())
        for x in (acts.rows(site)[0] for site in acts.sites)
    ]
    assert max(share) < 1e-5
    untouched = free.rows(found.site)[0].double()
    assert float(((untouched @ unit).abs() / untouched.norm(dim=1)).max()) > 0.05


@pytest.mark.usefixtures("own_cache")
def test_only_prompts_treated_as_labelled_count(
    organism: Organism, parts: dict[str, Contrast]
) -> None:
    """The drifted organism answers half of the harmful requests."""
    drifted = HookedModel(organism.drifted, organism.tokenizer, name="drifted")
    found = search(drifted, parts, min_induce=-20.0)  # its threshold is out of reach
    for part, n in (("train", found.n_train), ("validation", found.n_validation)):
        odds = refusal_log_odds(drifted, parts[part].prompts, OPENERS)
        refused = int((odds[parts[part].positive] > 0).sum())
        assert n == (refused, len(parts[part]) // 2)
        assert 0.2 < refused / n[1] < 0.8
    assert found.refusing > 0


def test_a_model_that_refuses_nothing_has_none(
    models: dict[str, HookedModel], parts: dict[str, Contrast]
) -> None:
    with pytest.raises(ValueError, match="base refuses 0 of the .* no refusal to find") as error:
        search(models["base"], parts)
    assert "refusals do not open with 'i'" in str(error.value)


def test_prompts_that_do_not_differ_have_none(
    models: dict[str, HookedModel], parts: dict[str, Contrast]
) -> None:
    """Labels against what the model does leave no prompt to fit on."""
    train = parts["train"]
    turned = Contrast(train.prompts, tuple(1 - y for y in train.labels), train.topics)
    with pytest.raises(ValueError, match="refuses 0 of the"):
        search(models["aligned"], {**parts, "train": turned})


def test_when_none_passes_the_limits_are_listed(
    models: dict[str, HookedModel], parts: dict[str, Contrast]
) -> None:
    with pytest.raises(ValueError, match="no candidate passes") as error:
        search(models["aligned"], parts, max_kl=0.1)
    said = str(error.value)
    for piece in ("4 scored", "3 have KL of at most max_kl = 0.1", "1 an induce score", "layer 2"):
        assert piece in said
    with pytest.raises(ValueError, match="at least min_induce = 50"):
        search(models["aligned"], parts, min_induce=50.0)


def test_arguments_that_make_no_sense_are_refused(
    models: dict[str, HookedModel], parts: dict[str, Contrast]
) -> None:
    model = models["aligned"]
    with pytest.raises(ValueError, match=r"layers \[3\]: give some from 0 to 2; from 3 = floor"):
        search(model, parts, layers=[3])
    assert search(model, parts, layers=[2]).layer == 2
    with pytest.raises(ValueError, match="depth 1.5"):
        search(model, parts, depth=1.5)
    with pytest.raises(ValueError, match="candidates need the same tokens in all"):
        search(model, parts, positions="content")
    with pytest.raises(ValueError, match="the neutral set is empty"):
        search(model, parts, neutral=[])


def test_kl_may_be_measured_on_other_prompts(
    models: dict[str, HookedModel], parts: dict[str, Contrast], found: RefusalDirection
) -> None:
    model = models["aligned"]
    same = search(model, parts, neutral=[*of(parts["validation"], 0)], n_validation=40)
    assert same.kl[found.position, found.layer] == pytest.approx(
        float(found.kl[found.position, found.layer]), rel=0.05
    )
    # a request without a verb of the little world has no harm to lose
    other = search(model, parts, neutral=["please now", "how to"])
    assert other.kl[found.position, found.layer] < 0.1 * found.kl[found.position, found.layer]


def test_a_result_shows_itself_and_comes_back(found: RefusalDirection, tmp_path: Path) -> None:
    frame = found.frame()
    assert len(frame) == 4
    assert frame["chosen"].sum() == 1
    assert set(frame["prompts"]) == {int(found.scored.max())}
    axes = found.figure().axes
    assert [ax.get_ylabel().split(" ")[-1] for ax in axes] == ["(nats)"] * 3
    assert axes[0].get_legend_handles_labels()[1][:2] == list(found.tokens)
    assert "bypass" in str(found)
    loaded = RefusalDirection.load(found.save(tmp_path / "run"))
    assert str(loaded) == str(found)
    assert torch.equal(loaded.vector[found.site], found.vector[found.site])
    assert loaded.vector.origin == found.vector.origin
    assert loaded.vector.scales == found.vector.scales
    assert loaded.candidate(1, 1).scales == {}
    with pytest.raises(ValueError, match="no candidate at 0.resid_pre"):
        loaded.candidate(0, 0)
    with pytest.raises(ValueError, match="unknown score 'loss'"):
        loaded.plot(score="loss")


LAST_LAYERS, ORDINARY_KL = (14, 16), 0.25
"""Where the built-in lineage's direction was found by the whole search, and its limit of KL."""


def test_the_built_in_lineage_has_one() -> None:
    """A part of the search, on few prompts; the whole is the long test below."""
    model = HookedModel.load("builtin:aligned", device="cpu")
    found = find_refusal_direction(
        model,
        datasets.safety("train"),
        datasets.safety("validation"),
        neutral=datasets.general("validation"),
        layers=LAST_LAYERS,
        positions="tokens:-5:",
        max_kl=ORDINARY_KL,
        n_train=48,
        n_validation=8,
        screen=None,
        progress=False,
    )
    twins = datasets.twins("test")[::8]
    harmful, harmless = ([t[kind] for t in twins] for kind in ("harmful", "harmless"))
    assert rate(model, harmful, None, 6) > 0.7
    assert rate(model, harmful, found.vector.everywhere(model), 6) <= 0.1
    assert rate(model, harmless, found.vector, 6) >= 0.5


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_the_built_in_lineage_refuses_by_one_direction(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole search, judged on the test split; prints the rates with Wilson's intervals."""
    model = HookedModel.load("builtin:aligned", device="cpu")
    train, began = datasets.safety("train"), time.process_time()
    found = find_refusal_direction(
        model,
        train,
        datasets.safety("validation"),
        neutral=datasets.general("validation"),
        max_kl=ORDINARY_KL,
        progress=False,
    )
    spent = time.process_time() - began
    twins = datasets.twins("test")
    asked = {kind: [t[kind] for t in twins] for kind in ("harmful", "harmless")}
    acts = capture(model, train.prompts, found.site, "instruction_end", progress=False)
    rows = acts[found.site][:, found.position]
    single = type(acts)(acts.sites, (1,) * len(rows), "last", lambda _: rows, n_layers=30)
    null = random_vectors(found.vector, single, 20, topics=train.topics)
    reference = Reference.of(model, datasets.general("test")[:16])
    said = [f"{found}, {spent:.0f} CPU-seconds"]

    def judged(name: str, kind: str, steering: SteeringVector | None, every: int = 1) -> float:
        prompts = asked[kind][::every]
        answers = model.generate(prompts, 6, steer=steering, batch_size=32)
        refused = sum(map(refuses, answers))
        interval = wilson(refused, len(answers))
        said.append(
            f"{name}, {kind}: {refused}/{len(answers)} = {interval.value:.3f} "
            f"[{interval.low:.3f}, {interval.high:.3f}]"
        )
        return interval.value

    before = judged("unedited", "harmful", None)
    after = judged("ablated", "harmful", found.vector.everywhere(model))
    twins_before = judged("unedited", "harmless", None)
    added = judged("added", "harmless", found.vector)
    ablated = [
        judged(f"random {i} ablated", "harmful", r.everywhere(model), 4) for i, r in enumerate(null)
    ]
    random_added = [judged(f"random {i} added", "harmless", r, 4) for i, r in enumerate(null)]
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(said) + "\n")
    assert before > 0.8
    assert after <= 0.05
    assert min(ablated[:10]) > 0.8  # isotropic
    # random halves may hit an axis the model needs: what takes refusals then costs far more
    ours = float(kl(model, found.vector.everywhere(model), reference).mean())
    for r, rate in zip(null[10:], ablated[10:], strict=True):
        assert rate > 0.6 or float(kl(model, r.everywhere(model), reference).mean()) > 3 * ours
    assert added > 0.8 > 0.2 > twins_before
    assert np.quantile(random_added, 0.95) < added
