"""The difference lens says what was planted, and nothing of models that are one."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from torch import Tensor

from analyses.subspaces.difference_lens import DifferenceLens, measure_difference
from analyses.subspaces.difference_reading import (
    Reader,
    beginnings,
    half_cosine,
    relative_norm,
    without_template,
)
from analyses.subspaces.difference_steering import SteeredByDifference, steer_by_difference
from probes import HookedModel, datasets
from probes.unembed import unembedding

TEXTS = tiny.words(24, seed=5, shortest=8, longest=12)
WORDS = tuple(f"w{i}" for i in range(20, 26))


def planted(size: float = 1.0, direction: Tensor | None = None) -> HookedModel:
    """The tiny model; the last MLP adds a constant that promotes the words of the list."""
    model = HookedModel(tiny_lineage.weights(), tiny.tokenizer(), name="planted")
    ids = torch.tensor(model.tokenizer.convert_tokens_to_ids(list(WORDS)))
    plain: Any = model.model
    constant = plain.lm_head.weight[ids].mean(0).detach() / plain.model.norm.weight.detach()
    constant = constant if direction is None else direction
    block = plain.model.layers[-1]
    inner = block.mlp.forward
    block.mlp.forward = lambda x: inner(x) + size * constant / constant.norm()
    return model


def reference() -> HookedModel:
    return HookedModel(tiny_lineage.weights(), tiny.tokenizer(), name="reference")


def lens(model: HookedModel, other: HookedModel, **options: Any) -> DifferenceLens:
    given: dict[str, Any] = {"positions": 3, "words": WORDS, "top": 6, "resamples": 200} | options
    return measure_difference(model, other, TEXTS, **given)


def test_a_planted_word_list_is_read_at_its_layer_and_nowhere_below() -> None:
    found = lens(planted(), reference())
    last = found.layers[-1]
    assert not found.difference[:-1].any()  # bit for bit
    assert not found.relative[:-1].any() and not found.share[:-1].any()
    assert found.promoted[0] == ((), (), ())
    assert found.difference[-1].norm(dim=-1).tolist() == pytest.approx([1.0] * 3, rel=1e-5)
    assert found.share[-1].min() > 0.6
    assert found.p(last) == pytest.approx(1 / 21)
    assert set(found.promoted[-1][0]) & set(WORDS)
    assert not set(found.suppressed[-1][0]) & set(WORDS)
    assert found.halves[-1].min() > 0.999
    assert found.halves[-1].min() > found.halves_null[-1].max()
    assert f"p = {found.p():.3f}" in str(found)


def test_another_direction_or_sign_says_nothing_of_the_list() -> None:
    width = reference().d_model
    noise = torch.randn(width, generator=torch.Generator().manual_seed(4))
    assert lens(planted(direction=noise), reference()).p() > 0.05
    turned = lens(planted(-1.0), reference())
    assert turned.share.max() == 0 and turned.p() == 1
    assert set(turned.suppressed[-1][0]) & set(WORDS)


def test_the_lens_is_antisymmetric() -> None:
    a, b = tiny_lineage.hooked("a"), tiny_lineage.hooked("b", 1, seed=1)
    one, other = lens(a, b), lens(b, a)
    assert torch.equal(one.difference, -other.difference)
    assert one.difference[0].abs().max() == 0 < one.difference[1].abs().max()


def test_identical_models_differ_by_exactly_nothing() -> None:
    found = lens(reference(), reference())
    assert found.identical
    assert not found.difference.any() and not found.relative.any() and not found.halves.any()
    assert found.p() == 1
    assert str(found).endswith("the models are identical, every difference is exactly zero")
    with pytest.raises(ValueError, match="exactly zero"):
        steer_by_difference(reference(), found, ["w1"])


def test_the_difference_is_that_of_plain_forward_passes() -> None:
    """A loop over texts one by one through transformers, without our capture."""
    a, b = tiny_lineage.hooked("a"), tiny_lineage.hooked("b", 0, seed=1)
    found = lens(a, b, layers=[0])
    sums = torch.zeros(3, a.d_model, dtype=torch.float64)
    norms = torch.zeros(3, dtype=torch.float64)
    for text in TEXTS:
        ids = torch.tensor([a.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            x, y = (
                m.model(ids, output_hidden_states=True).hidden_states[1][0, :3].double()
                for m in (a, b)
            )
        sums += x - y
        norms += y.norm(dim=-1)
    assert torch.allclose(found.difference[0].double(), sums / len(TEXTS), atol=1e-5)
    expected = sums.norm(dim=-1) / norms
    assert torch.allclose(found.relative[0, :, 0].double(), expected, rtol=1e-4)


def test_texts_are_read_no_further_than_needed() -> None:
    template = without_template(reference()).template
    long = " ".join(f"w{i}" for i in range(60))
    (cut,) = beginnings(template, [long], 3)
    assert len(cut.split()) == 12
    assert template.render(cut).ids[:3] == template.render(long).ids[:3]
    a, b = tiny_lineage.hooked("a"), tiny_lineage.hooked("b", 0, seed=1)
    texts = [f"{t} {long}" for t in TEXTS[:6]]
    whole = measure_difference(a, b, texts, positions=3)
    short = measure_difference(a, b, [" ".join(t.split()[:12]) for t in texts], positions=3)
    assert torch.allclose(whole.difference, short.difference, atol=1e-6)


def test_halves_of_noise_agree_no_more_than_their_null() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(20, 40, generator=generator).argsort(1) < 20
    one = torch.ones(1, 40, dtype=torch.float64)
    signs = torch.randint(2, (200, 40), generator=generator).double() * 2 - 1
    x = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    noise = half_cosine(x @ x.T, half, one).mean()
    noisy = x - x.mean(0)
    null = half_cosine(noisy @ noisy.T, half[:1], signs).quantile(0.95)
    assert noise < null < 0.5
    y = x + 1.0
    assert half_cosine(y @ y.T, half, one).mean() > 0.9
    plain = [torch.cosine_similarity(y[h].mean(0), y[~h].mean(0), dim=0) for h in half]
    assert torch.allclose(half_cosine(y @ y.T, half, one), torch.stack(plain))


def test_the_relative_norm_holds_the_truth() -> None:
    held = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(60, 4, generator=generator, dtype=torch.float64) + 2.0
        h = torch.randn(60, 4, generator=generator, dtype=torch.float64) + 10
        drawn = torch.randint(60, (400, 60), generator=generator)
        boot = torch.zeros(400, 60, dtype=torch.float64)
        boot.scatter_add_(1, drawn, torch.ones_like(boot))
        value, low, high = relative_norm(x, h, boot).tolist()
        assert low <= value <= high
        assert value == pytest.approx(float(x.mean(0).norm() / h.norm(dim=1).mean()))
        held += low <= 4 / float(h.norm(dim=1).mean()) <= high
    assert held >= 16


def test_the_reader_reads_what_the_unembedding_says() -> None:
    model = reference()
    state = torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(1))
    everything = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))
    words = [t.strip("<>|/") for t in everything]
    strong, weak, hit = Reader(model, words, 4)(torch.cat([state, torch.zeros_like(state)]))
    logits = unembedding(model)(state)[0]
    ids = logits.topk(4).indices.tolist()
    assert list(strong[0]) == [model.tokenizer.decode([i]).strip() or strong[0][n]
                               for n, i in enumerate(ids)]  # fmt: skip
    assert set(strong[0]).isdisjoint(weak[0])
    assert hit.tolist() == [1, 0]  # no direction, no word


def test_steering_by_the_difference_makes_the_model_write_the_words() -> None:
    model = reference()
    found = lens(planted(), model)
    asked = tiny.words(6, seed=9)
    steered = steer_by_difference(
        model, found, asked, layer=found.layers[-1], strengths=(0.0, 60.0), words=WORDS,
        max_new_tokens=3, draws=20,
    )  # fmt: skip
    assert steered.answers[0] == tuple(model.generate(asked, 3))  # bit for bit unsteered
    assert steered.hits[1] == 6 > steered.hits[0]
    assert steered.p(60.0) < 0.1 and steered.p(0.0) == 1
    assert steered.norms == pytest.approx((0.0, 60.0), rel=1e-4)
    assert len(steered.null[1]) == 20 and set(steered.null[0]) == {steered.hits[0]}


def test_random_directions_are_as_long_as_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lens(planted(3.0), reference())
    norms = []

    def answered(_self: Any, given: Any, _n: int, *, steer: Any) -> list[str]:
        (site,) = steer.what.sites
        assert site.layer == found.layers[-1]
        norms.append(steer.strength * steer.what.norm(site))
        return ["w1"] * len(given)

    monkeypatch.setattr(HookedModel, "generate", answered)
    steer_by_difference(reference(), found, ["w1"], layer=found.layers[-1], strengths=(2.0,))
    assert norms == pytest.approx([6.0] * 21, rel=1e-4)


def test_lens_and_steering_show_and_save_themselves(tmp_path: Path) -> None:
    found = lens(planted(), reference())
    loaded = DifferenceLens.load(found.save(tmp_path / "lens"))
    assert torch.equal(loaded.null, found.null) and loaded.promoted == found.promoted
    assert len(found.frame()) == len(found.layers) * 3
    assert "24 unrelated texts" in found.plot().get_title(loc="left")
    assert found.plot_share().get_ylabel() == "share of the top 6 tokens in the list"
    steered = steer_by_difference(reference(), found, ["w1 w2"], strengths=(1.0,),
                                  layer=found.layers[-1], max_new_tokens=2)  # fmt: skip
    assert SteeredByDifference.load(steered.save(tmp_path / "steer")).hits == steered.hits
    assert len(steered.frame()) == 1
    assert "multiples" in steered.plot().get_xlabel()


def test_mistakes_are_said() -> None:
    model = reference()
    with pytest.raises(ValueError, match="24 texts and 5 random directions"):
        lens(model, model, draws=5)
    with pytest.raises(ValueError, match="texts have fewer than 90 tokens, the first"):
        lens(model, model, positions=90)
    with pytest.raises(ValueError, match="0 words and 6 tokens"):
        lens(model, model, words=())
    found = lens(planted(), model)
    with pytest.raises(ValueError, match="layer 9 was not measured"):
        steer_by_difference(model, found, ["w1"], layer=9)
    with pytest.raises(ValueError, match="0 prompts"):
        steer_by_difference(model, found, [])


def test_a_token_that_all_texts_share_does_not_dilute_the_null() -> None:
    """Half differences are zero at <s>: counted as a share of 0 they would halve that null."""
    tokens = tiny.tokenizer(bos=True)
    a, b = (tiny_lineage.hooked(n, f, 1, tokenizer=tokens) for n, f in (("a", 1), ("b", None)))
    many = tuple(f"w{i}" for i in range(70))
    found = lens(a, b, words=many, top=20, draws=40)
    assert not found.apart[:, :, 0].any() and found.apart[:, :, 1:].abs().sum(-1).all()
    changed = found.share[1:, 0] > 0
    assert changed.any()
    first = found.null[:, 1:, 0]
    assert first.min() > 0  # about a third of the vocabulary is in the list
    assert float(first[20:].mean()) == pytest.approx(float(first[:20].mean()), abs=0.06)
    assert "position 0 is one token in all texts: the null there is of isotropic" in found.notes[0]
    plain = lens(*(tiny_lineage.hooked(n, f, 1) for n, f in (("a", 1), ("b", None))))
    assert plain.notes == () and plain.apart.abs().sum(-1).all()
    assert lens(reference(), reference()).null.shape == (20, 3, 3)
    few = measure_difference(a, b, TEXTS[:5], positions=1)
    assert few.notes[-1] == "Intervals rest on 5 texts; 20 are advised."


def test_half_of_the_directions_steered_by_are_those_in_which_texts_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = lens(planted(3.0), reference(), draws=24)
    added = []

    def answered(_self: Any, given: Any, _n: int, *, steer: Any) -> list[str]:
        (vector,) = steer.what.vectors.values()
        added.append(vector.double().flatten())
        return ["w1"] * len(given)

    monkeypatch.setattr(HookedModel, "generate", answered)
    steer_by_difference(reference(), found, ["w1"], layer=1 + 1, strengths=(4.0,), draws=24)
    given = torch.stack(added[1:])
    assert len(given) == 24
    wanted = found.apart[:, 2, 1:].double().mean(1)
    cosines = torch.nn.functional.cosine_similarity(given[:, None], wanted[None], dim=2).amax(1)
    assert (cosines > 0.9999).tolist() == [True] * 12 + [False] * 12
    assert cosines[12:].max() < 0.7
    for texts, draws, said in ((found, 19, "19 random directions were asked: a null needs at"),
                               (lens(planted(), reference()), 24, "with 20 draws has at most 21")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            steer_by_difference(reference(), texts, ["w1"], draws=draws, layer=2)


def test_steering_has_a_record_of_its_own() -> None:
    found = lens(planted(), reference())
    model = reference()
    one, other = (
        steer_by_difference(model, found, [text], strengths=(1.0,), layer=2, max_new_tokens=1)
        for text in ("w1 w2", "w3")
    )
    assert one.record.models == ("reference", *found.record.models)
    assert one.record.fingerprints == (model.fingerprint, *found.record.fingerprints)
    assert one.record.prompts_hash not in ("", found.record.prompts_hash, other.record.prompts_hash)
    assert one.record.template_hash == model.template.hash
    assert (one.record.dtype, one.record.seeds) == ("float32", (0,))
    assert one.record.settings["lens"]["prompts_hash"] == found.record.prompts_hash


@pytest.mark.slow
def test_the_built_in_lineage_differs_from_its_first_adapted_layer_on() -> None:
    aligned, base = (HookedModel.load(f"builtin:{name}") for name in ("aligned", "base"))
    found = measure_difference(aligned, base, datasets.paragraphs()[:12], layers=[9, 10, 24])
    assert not found.difference[0].any()
    assert found.relative[1:, 1:, 1].min() > 0
    assert found.halves[2, 1:].min() > found.halves_null[2, 1:].max()
