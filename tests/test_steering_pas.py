"""Personality alignment: items, letters that tell nothing, planted heads, biases, honest splits."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import build
from tiny import SPECIALS, TEMPLATE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from probes import HookedModel, Site, capture
from steering import steer
from steering.iti import rank_rows
from steering.pas import Alignment, _random_units, align, fit_pas
from steering.questionnaire import (
    POINTS,
    WORST,
    Item,
    contrast_of,
    errors,
    items,
    of_persona,
    parse,
    points,
    split,
)
from steering.weights import agreement, fold_offsets

BOLD = {"extraversion": 5.0, "calmness": 1.0}
VERBS = {
    "extraversion": ("talk", "run", "sing", "dance"),
    "calmness": ("fear", "sleep", "rest", "cry"),
}
FEW = tuple(
    Item(f"{verb}-{int(reverse)}", trait, reverse, f"I {verb} {'less' if reverse else 'more'}")
    for trait, verbs in VERBS.items()
    for verb in verbs
    for reverse in (False, True)
)
"""Eight short statements for each of two traits."""


@pytest.fixture(scope="module")
def model() -> HookedModel:
    """A tiny random model whose tokenizer knows the words of `FEW`."""
    known = dict.fromkeys(SPECIALS)
    found = Whitespace()
    for text in (*(item.prompt() for item in FEW), "you are helpful user assistant"):
        known |= dict.fromkeys(word for word, _ in found.pre_tokenize_str(text))
    assert len(known) <= 200
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = found  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIALS[4:]),
    )
    fast.chat_template = TEMPLATE
    return HookedModel(build("llama"), fast, name="tiny llama of few words")


# --- the questionnaire ---


def test_the_items_that_ship_are_balanced() -> None:
    found = items()
    assert len(found) == len({item.text for item in found}) == len({i.id for i in found}) == 60
    traits = sorted({item.trait for item in found})
    assert len(traits) == 5
    for trait in traits:
        own = [item for item in found if item.trait == trait]
        assert len(own) == 12 and sum(item.reverse for item in own) == 6
    assert all(item.text.endswith(".") and len(item.text) < 80 for item in found)


def test_a_reverse_key_turns_the_answer_round() -> None:
    forward, reverse = FEW[0], FEW[1]
    assert forward.target(BOLD) == 5 and reverse.target(BOLD) == 1
    assert FEW[8].target(BOLD) == 1 and FEW[9].target(BOLD) == 5
    assert "A. very accurate\nB." in forward.prompt()
    assert "A. very inaccurate\nB." in forward.prompt(turned=True)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("E.", "E"),
        ("B. moderately accurate", "B"),
        ("Answer: C", "C"),
        ("(D)", "D"),
        ("A very good question", "A"),
        ("About A", "A"),
        ("F", None),
        ("Certainly", None),
        ("", None),
        ("I would say, A", None),  # behind the first 12 characters
        ("AE", None),
    ],
)
def test_letters_are_found_in_the_first_12_characters(answer: str, letter: str | None) -> None:
    assert parse(answer) == letter


def test_what_cannot_be_read_counts_as_the_worst() -> None:
    given = FEW[:3]  # 5, 1 and 5 points are wanted
    found = torch.tensor([[5.0, 5.0], [1.0, math.nan], [math.nan, math.nan]])
    assert errors(found, given, BOLD).tolist() == [0.0, WORST / 2, WORST]
    always_a = torch.tensor([[POINTS[0], POINTS[-1]]] * 3)  # a letter, whatever it stands for
    assert errors(always_a, given, BOLD).tolist() == [2.0, 2.0, 2.0]


def test_items_go_to_one_part_each_with_even_keys() -> None:
    parts = split(items())
    ids = [item.id for part in parts.values() for item in part]
    assert len(ids) == len(set(ids)) == 60
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 30,
        "validation": 15,
        "test": 15,
    }
    assert sum(item.reverse for item in parts["train"]) == 15
    assert {item.trait for item in parts["test"]} == {item.trait for item in items()}
    assert split(items()) == parts and split(items(), seed=1) != parts


def test_personas_that_make_no_sense_are_refused(model: HookedModel) -> None:
    with pytest.raises(ValueError, match="no item asks for 'humour': choose among calmness, extr"):
        of_persona(FEW, {"humour": 3.0})
    with pytest.raises(ValueError, match="extraversion is 7.0: give a level from 1"):
        of_persona(FEW, {"extraversion": 7.0})
    with pytest.raises(ValueError, match="the persona has no trait"):
        of_persona(FEW, {})
    with pytest.raises(ValueError, match="in the middle of every scale"):
        contrast_of(FEW, {"extraversion": 3.0})
    with pytest.raises(ValueError, match="by 'text' or by 'odds', not 'guess'"):
        points(model, FEW, read="guess")


# --- the contrast ---


def test_neither_letter_nor_agreement_tells_the_label() -> None:
    """The released code's probes can read the letter alone; here it is even in every item, and
    agreement is even over the items of a trait with its keys."""
    contrast, answers = contrast_of(FEW, BOLD)
    assert len(contrast) == 4 * len(FEW) and len(set(contrast.topics)) == len(FEW)
    for letter in "AE":
        own = [y for y, a in zip(contrast.labels, answers, strict=True) if a == letter]
        assert sum(own) == len(own) / 2
    agrees = [
        (a == "A") == ("A. very accurate" in str(p))
        for p, a in zip(contrast.prompts, answers, strict=True)
    ]
    assert sum(y == g for y, g in zip(contrast.labels, agrees, strict=True)) == len(contrast) / 2
    unbalanced, _ = contrast_of(tuple(i for i in FEW if not i.reverse), {"extraversion": 5.0})
    assert sum(unbalanced.labels) == len(unbalanced) / 2


def test_the_opposite_persona_has_the_opposite_labels() -> None:
    a, _ = contrast_of(FEW, BOLD)
    b, _ = contrast_of(FEW, {"extraversion": 1.0, "calmness": 5.0})
    assert a.prompts == b.prompts
    assert all(x != y for x, y in zip(a.labels, b.labels, strict=True))
    half, _ = contrast_of(FEW, {"extraversion": 4.0, "calmness": 3.0})
    assert set(half.topics) == {item.id for item in FEW[:8]}


def test_a_planted_head_is_the_best_reader() -> None:
    contrast, _ = contrast_of(items(), dict.fromkeys({i.trait for i in items()}, 5.0))
    generator = torch.Generator().manual_seed(0)
    rows = {layer: torch.randn(len(contrast), 4, 8, generator=generator) for layer in range(4)}
    rows[2][:, 1, 3] += 3.0 * contrast.positive
    found = rank_rows(rows, contrast, n_layers=4, permutations=200)
    assert found.top(1) == ((2, 1),)
    assert found.claimed.nonzero().tolist() == [[2, 1]]


# --- on a model ---


def test_flipping_the_persona_flips_the_direction(model: HookedModel) -> None:
    a = fit_pas(model, BOLD, 6, items=FEW)
    b = fit_pas(model, {"extraversion": 1.0, "calmness": 5.0}, 6, items=FEW)
    assert a.heads == b.heads
    for head in a.heads:
        torch.testing.assert_close(a[head], -b[head], atol=1e-5, rtol=0)
        assert a.scales[head].sigma == pytest.approx(b.scales[head].sigma, rel=1e-4)


def test_one_trait_has_probes_of_its_own(model: HookedModel) -> None:
    alone = fit_pas(model, {"extraversion": 5.0}, 12, items=FEW)
    both = fit_pas(model, BOLD, 12, items=FEW)
    assert alone.heads == both.heads  # all twelve
    assert any(not torch.allclose(alone[h], both[h], atol=1e-3) for h in alone.heads)


def test_the_bias_equals_the_hooks_and_alpha_0_nothing(model: HookedModel) -> None:
    offsets = fit_pas(model, BOLD, 6, items=FEW)
    prompts = [item.prompt() for item in FEW[:3]]
    plain = model.logits(prompts)
    for alpha in (2.0, 8.0):
        folded = fold_offsets(model, offsets, alpha, "sigma")
        with steer(model, offsets, alpha, unit="sigma"):
            live = model.logits(prompts)
        torch.testing.assert_close(folded.logits(prompts), live, atol=1e-4, rtol=1e-4)
        assert agreement(model, offsets.edits(model, alpha, "sigma"), folded).holds
        assert not torch.allclose(live, plain, atol=1e-2)
    assert torch.equal(fold_offsets(model, offsets, 0.0, "sigma").logits(prompts), plain)


def test_projections_rise_with_alpha_by_sigmas(model: HookedModel) -> None:
    offsets = fit_pas(model, BOLD, 1, items=FEW)
    (head,) = offsets.heads
    site, sigma = Site(head[0], "head_out", head[1]), offsets.scales[head].sigma
    assert sigma is not None
    prompts = [item.prompt() for item in FEW[:4]]
    seen: list[Tensor] = []
    for alpha in (0.0, 1.0, 2.0, 4.0, 8.0):
        with steer(model, offsets, alpha, unit="sigma"):
            seen.append(capture(model, prompts, site, progress=False)[site] @ offsets[head])
    for alpha, now in zip((1.0, 2.0, 4.0, 8.0), seen[1:], strict=True):
        torch.testing.assert_close(
            now - seen[0], torch.full((4,), alpha * sigma), rtol=1e-3, atol=1e-5
        )


def test_points_by_odds_are_the_mean_over_the_letters(model: HookedModel) -> None:
    found = points(model, FEW[:3], read="odds")
    assert found.shape == (3, 2) and bool(((found > 1) & (found < 5)).all())
    ids = model.tokenizer.convert_tokens_to_ids(list("ABCDE"))
    chances = model.logits([FEW[1].prompt(turned=True)])[0, ids].softmax(-1)
    expected = float((chances * torch.tensor([1.0, 2, 3, 4, 5])).sum())
    assert float(found[1, 1]) == pytest.approx(expected, rel=1e-4)
    letters = points(model, FEW[:3], read="text")
    assert bool((letters.isnan() | torch.isin(letters, torch.arange(1.0, 6))).all())


@pytest.fixture(scope="module")
def aligned(model: HookedModel) -> Alignment:
    with pytest.warns(UserWarning, match="groups"):
        return align(
            model,
            BOLD,
            items=FEW,
            n_heads=4,
            alphas=(2.0, 20.0),
            read="odds",
            permutations=5,
            nulls=4,
        )


def test_alpha_is_chosen_on_items_that_are_not_reported(
    model: HookedModel, aligned: Alignment
) -> None:
    parts = split(of_persona(FEW, BOLD))
    assert aligned.items == tuple(item.id for item in parts["test"])
    assert not set(aligned.items) & {item.id for item in parts["validation"]}
    assert aligned.alphas.tolist() == [0.0, 2.0, 20.0]
    assert aligned.validation.shape == (3, len(parts["validation"]))
    offsets = aligned.offsets(model)
    for alpha, found in zip(aligned.alphas.tolist(), aligned.validation, strict=True):
        with steer(model, offsets, alpha, unit="sigma"):
            again = errors(
                points(model, parts["validation"], read="odds"), parts["validation"], BOLD
            )
        torch.testing.assert_close(found, again)
    with steer(model, offsets, aligned.alpha, unit="sigma"):
        again = errors(points(model, parts["test"], read="odds"), parts["test"], BOLD)
    torch.testing.assert_close(aligned.steered, again)
    torch.testing.assert_close(
        aligned.plain, errors(points(model, parts["test"], read="odds"), parts["test"], BOLD)
    )
    means = aligned.validation.double().mean(1)
    assert float(means[aligned.alphas.tolist().index(aligned.alpha)]) <= float(means.min()) + 1e-9


def test_the_null_is_pushed_as_far(model: HookedModel, aligned: Alignment) -> None:
    if aligned.alpha == 0:
        assert len(aligned.null) == 0 and not aligned.claimed and math.isnan(aligned.null_5)
        return
    assert aligned.null.shape == (4, len(aligned.items))
    assert not torch.allclose(aligned.null[0], aligned.steered)
    torch.testing.assert_close(aligned.unit.norm(dim=1), torch.ones(4))


def test_random_halves_know_nothing_of_the_persona() -> None:
    """The rows of an item carry both labels: halves of whole items hold the persona alike."""
    generator = torch.Generator().manual_seed(0)
    topics = [f"item {i // 4}" for i in range(120)]
    label = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(30)
    rows = torch.randn(120, 1, 64, generator=generator)
    rows[:, 0, 0] += 10 * label
    heads = torch.tensor([[0, 0]])

    def along(topics: list[str]) -> float:
        drawn = list(_random_units({0: rows}, heads, topics, 40, 0))[20:]
        return max(abs(float(unit[0, 0])) for unit in drawn)

    assert along([f"row {i}" for i in range(120)]) > 0.9  # the control: single rows
    assert along(topics) < 0.5


def test_an_alignment_folds_shows_itself_and_is_saved(
    model: HookedModel, aligned: Alignment, tmp_path: Path
) -> None:
    folded = aligned.folded(model)
    prompts = [FEW[0].prompt()]
    with steer(model, aligned.offsets(model), aligned.alpha, unit="sigma"):
        torch.testing.assert_close(
            folded.logits(prompts), model.logits(prompts), atol=1e-4, rtol=1e-4
        )
    again = Alignment.load(aligned.save(tmp_path))
    assert again.alpha == aligned.alpha and torch.equal(again.unit, aligned.unit)
    assert again.persona == BOLD and again.items == aligned.items
    assert str(again) == str(aligned)
    assert "calmness 1, extraversion 5 in tiny llama of few words: alpha" in str(aligned)
    frame = aligned.frame()
    assert frame["trait"].tolist()[-1] == "all" and set(frame["trait"]) == {*BOLD, "all"}
    assert "points" in aligned.plot().get_ylabel()
    assert "alpha" in aligned.search.plot().get_xlabel()


def test_an_effect_is_claimed_below_chance_only(aligned: Alignment) -> None:
    n = len(aligned.items)
    plain = torch.full((n,), 3.0) + torch.linspace(0, 0.1, n)
    better, chance = (
        plain - 1.0 + torch.linspace(-0.1, 0.1, n),
        plain + torch.randn(20, 1, generator=torch.Generator().manual_seed(0)) * 0.1,
    )
    found = replace(aligned, plain=plain, steered=better, null=chance)
    assert found.claimed and "an effect" in str(found)
    assert not replace(found, null=chance - 1.2).claimed  # chance does as well
    few = replace(found, null=chance[:19])
    assert few.claimed is None and "too few for a claim" in str(few)
    assert not replace(found, steered=plain + 0.5).claimed
