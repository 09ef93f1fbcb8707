"""Log-ratio rewards: laws, a plain loop in float64, DPO's implicit reward, two tokenizers."""

import math
import warnings
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from architectures import BOS, EOS, PAD
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from analyses import checkpoints
from analyses.tokens.reward_ranking import RewardRanking, rank_by_reward
from analyses.tokens.rewards import log_ratios
from analyses.tokens.spans import common_spans
from probes import HookedModel, datasets
from probes.results import Result
from probes.scores import wilson
from steering.preferences import DPO, Answers

PROMPTS = tiny.words(6, seed=5)
ANSWERS = tiny.words(6, seed=9, longest=14)


@pytest.fixture(scope="module")
def models() -> tuple[HookedModel, HookedModel]:
    return tiny_lineage.hooked("second", 1, seed=4), tiny_lineage.hooked("first")


def letters() -> Any:
    """Another tokenizer: every character is a token, special tokens are none of its own."""
    known = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *sorted(set("abcdefghijklmnopqrstuvwxyz0123456789 <>/|,.!?:\n")),
    ]
    core = Tokenizer(WordLevel({c: i for i, c in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    assert (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (PAD, BOS, EOS)
    made.chat_template = tiny.TEMPLATE
    return made


@torch.no_grad()
def plain(model: HookedModel, prompt: Any, answer: str) -> list[float]:
    """log p of every answer token, one forward pass a token, float64."""
    given = list(model.template.render(prompt).ids)
    more = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    network: Any = model.model
    found = []
    for token in more:
        logits = network(torch.tensor([given])).logits[0, -1].double()
        found.append(float(logits[token] - logits.logsumexp(0)))
        given.append(token)
    return found


def test_ratios_are_those_of_a_plain_loop(models: tuple[HookedModel, HookedModel]) -> None:
    found = log_ratios(*models, PROMPTS, ANSWERS)
    expected = [
        a - b
        for p, y in zip(PROMPTS, ANSWERS, strict=True)
        for a, b in zip(plain(models[0], p, y), plain(models[1], p, y), strict=True)
    ]
    assert torch.allclose(found.ratios.double(), torch.tensor(expected).double(), atol=2e-5)
    assert found.token_level and bool(found.counted.all())
    assert found.lengths.tolist() == [len(y.split()) for y in ANSWERS]
    assert [t for t, _ in found.tokens(1)] == ANSWERS[1].split()
    assert float(found.sums[1]) == pytest.approx(sum(r for _, r in found.tokens(1)))
    assert torch.allclose(found.means, found.sums / found.lengths)
    assert found.frame()["sum"].tolist() == found.sums.tolist()


def test_a_model_against_itself_is_exactly_zero(models: tuple[HookedModel, HookedModel]) -> None:
    same = log_ratios(models[0], models[0], PROMPTS, ANSWERS)
    assert not same.ratios.any() and not same.sums.any()
    assert "exactly 0" in str(same)
    bias = same.length_bias()
    assert bias.summed == (0, 0, 0) and bias.null_95 == 0


def test_swapped_models_change_the_sign_only(models: tuple[HookedModel, HookedModel]) -> None:
    one, two = log_ratios(*models, PROMPTS, ANSWERS), log_ratios(*models[::-1], PROMPTS, ANSWERS)
    assert torch.equal(one.ratios, -two.ratios)
    assert one.ratios.any()


def test_company_and_padding_do_not_matter(models: tuple[HookedModel, HookedModel]) -> None:
    alone = [log_ratios(*models, [p], [y]) for p, y in zip(PROMPTS, ANSWERS, strict=True)]
    together = log_ratios(*models, PROMPTS, ANSWERS)
    assert torch.allclose(torch.cat([a.ratios for a in alone]), together.ratios, atol=1e-5)


def test_rewards_add_up_over_an_answer_and_its_continuation(
    models: tuple[HookedModel, HookedModel],
) -> None:
    first, more = "w1 w2 w3", " w4 w5"
    whole = log_ratios(*models, ["w9"], [first + more]).ratios
    begun = log_ratios(*models, ["w9"], [first]).ratios
    assert torch.allclose(whole[:3], begun, atol=1e-5)
    # the continuation's tokens are those behind a prompt that already holds the beginning
    logp = [plain(m, "w9", first + more) for m in models]
    rest = sum(a - b for a, b in zip(logp[0][3:], logp[1][3:], strict=True))
    assert float(whole.double().sum()) == pytest.approx(
        float(begun.double().sum()) + rest, abs=2e-5
    )


def test_the_reward_is_that_of_dpo_over_beta(models: tuple[HookedModel, HookedModel]) -> None:
    found = log_ratios(*models, ["w3"] * 2, ["w1 w2 </s>", "w4 </s>"], specials=True)
    sums = [
        torch.tensor([sum(plain(m, "w3", y))]) for y in ("w1 w2 </s>", "w4 </s>") for m in models
    ]
    n = torch.tensor([3])
    loss = DPO(0.3)(Answers(sums[0], n, sums[2], sums[1], sums[3]))
    implicit = math.log(1 / math.expm1(float(loss.double()))) / 0.3  # -log sigmoid turned round
    assert float(found.sums[0] - found.sums[1]) == pytest.approx(implicit, abs=1e-4)


def test_special_tokens_are_masked_by_their_text(models: tuple[HookedModel, HookedModel]) -> None:
    bare, ended = (log_ratios(*models, ["w9"], [y]) for y in ("w1 w2", "w1 w2 </s>"))
    assert ended.counted.tolist() == [True, True, False]
    assert torch.allclose(ended.sums, bare.sums) and ended.lengths.tolist() == [2]
    kept = log_ratios(*models, ["w9"], ["w1 w2 </s>"], specials=True)
    assert bool(kept.counted.all()) and not torch.allclose(kept.sums, bare.sums)
    chosen = log_ratios(*models, ["w9"], ["w1 w2 w3"], mask=("w2",))
    assert [t for t, _ in chosen.tokens(0)] == ["w1", "w3"]
    with pytest.raises(ValueError, match="nothing but masked text"):
        log_ratios(*models, ["w9"], ["</s>"])


def test_with_two_tokenizers_totals_of_the_same_text_are_compared() -> None:
    strong = tiny_lineage.hooked("words")
    weak = tiny_lineage.hooked("letters", 1, seed=3, tokenizer=letters())
    answers = ["w1 w23, w4", "w100", "w5 w6 </s>"]
    found = log_ratios(strong, weak, ["w9"] * 3, answers)
    assert not found.token_level
    texts = [text for text, _, _ in found.spans_of(0)]
    assert "".join(texts) == answers[0] and [t.strip() for t in texts] == ["w1", "w23", ",", "w4"]
    for i in range(2):
        expected = sum(plain(strong, "w9", answers[i])) - sum(plain(weak, "w9", answers[i]))
        assert float(found.sums[i]) == pytest.approx(expected, abs=1e-4)
    # masked by the characters: `</s>` is four tokens to the weak model and does not count
    assert [kept for _, _, kept in found.spans_of(2)][-1] is False
    logp = plain(weak, "w9", answers[2])
    assert float(found.sums[2]) == pytest.approx(
        sum(plain(strong, "w9", answers[2])[:2]) - sum(logp[:5]), abs=1e-4
    )
    with pytest.raises(ValueError, match="different tokens, so a token has no ratio"):
        found.tokens(0)
    back = log_ratios(weak, strong, ["w9"] * 3, answers)
    assert torch.allclose(back.sums, -found.sums, atol=1e-5)


def test_pieces_are_the_least_both_cut_off() -> None:
    # ab|c|de against a|b c|d|e: only before d; a character of two tokens is never cut
    spans, ends = common_spans([(0, 2), (2, 3), (3, 5)], [(0, 1), (1, 3), (3, 4), (4, 5)], 5)
    assert spans == [(0, 3), (3, 5)] and ends == [(2, 2), (3, 4)]
    spans, ends = common_spans([(0, 1), (0, 1), (1, 2)], [(0, 1), (1, 2)], 2)
    assert spans == [(0, 1), (1, 2)] and ends == [(2, 1), (3, 2)]
    # blanks that one tokenizer covers and the other drops
    spans, ends = common_spans([(0, 2), (3, 5)], [(0, 2), (2, 3), (3, 5)], 5)
    assert [e[0] for e in ends] == [1, 2] and ends[-1] == (2, 3)


def test_a_context_can_be_for_one_model_only(models: tuple[HookedModel, HookedModel]) -> None:
    system = [{"role": "system", "content": "w7 w8"}]
    framed = [*system, {"role": "user", "content": "w9"}]
    for who, read in (
        ("both", (framed, framed)),
        ("strong", (framed, "w9")),
        ("weak", ("w9", framed)),
    ):
        found = log_ratios(*models, ["w9"], ["w1 w2"], context=system, context_for=who)  # pyright: ignore
        one, two = (sum(plain(m, p, "w1 w2")) for m, p in zip(models, read, strict=True))
        assert float(found.sums[0]) == pytest.approx(one - two, abs=1e-4)
    with pytest.raises(ValueError, match="choose both, strong or weak"):
        log_ratios(*models, ["w9"], ["w1"], context=system, context_for="all")  # pyright: ignore


def ranking(summed: list[float], length: list[int], within: int = 1) -> RewardRanking:
    n = torch.tensor(length)
    values = torch.tensor(summed)
    return RewardRanking(
        "a", "b", tuple(f"t{i}" for i in range(len(n))), values, values / 10, n, within
    )


def test_a_reward_that_is_length_loses_everything_to_the_controls() -> None:
    length = [5, 4, 6, 3, 7, 2, 8, 9, -3, -4]
    only = ranking([float(n) for n in length], length)
    assert only.accuracy("summed").value == only.accuracy("length").value == 0.8
    assert only.balanced("summed").value == 0.5
    with pytest.raises(ValueError, match="no pair is left"):
        only.matched("summed")
    honest = ranking([1.0] * 10, length, within=3)
    assert honest.balanced("summed").value == 1 and honest.matched("summed").value == 1
    assert honest.accuracy("summed").low > 0.6
    same = ranking([0.0] * 10, length)
    assert "rank nothing" in str(same)
    with pytest.raises(ValueError, match="unknown reward 'sum'"):
        only.accuracy("sum")


def test_what_all_pairs_agree_on_is_no_point() -> None:
    sure = ranking([1.0] * 20, [3, -3] * 10)
    even, plain = sure.balanced(), sure.accuracy()
    assert even.value == even.high == 1 and 0.5 < even.low < plain.low < 0.9
    # Wilson's limit of 10 of 10 on both sides, their mean's by Zou and Donner
    assert even.low == pytest.approx(1 - (1 - wilson(10, 10).low) * 2**0.5 / 2)
    never = ranking([-1.0] * 20, [3, -3] * 10).balanced()
    assert never.value == 0 and never.high == pytest.approx(1 - even.low)
    half = ranking([1.0, -1.0] * 10, [3, -3] * 10).balanced()  # only length
    assert half.value == 0.5 and half.low < 0.4 and half.high > 0.6
    tied = ranking([0.0, 1.0] * 10, [3, -3] * 10).balanced()
    assert tied.value == 0.75 and tied.low < 0.5 and tied.high >= 1


@pytest.mark.parametrize("length", [[3, 0, 2, 4], [3, 1, 2, 4], [-3, 0, -2, -4], [0, 0, 0, 0]])
def test_answers_that_are_never_the_shorter_are_not_balanced(length: list[int]) -> None:
    found = ranking([1.0, 2.0, -1.0, 3.0], length)
    assert "not balanced" in str(found) and "75.0%" in str(found)
    table = found.frame()
    assert "balanced" not in table["control"].tolist() and "none" in table["control"].tolist()
    assert found.plot().get_legend() is not None
    with pytest.raises(ValueError, match="give pairs of both kinds"):
        found.balanced()


def test_length_bias_is_found_and_has_a_null(models: tuple[HookedModel, HookedModel]) -> None:
    found = log_ratios(*models, tiny.words(24, seed=1), tiny.words(24, seed=2, longest=20))
    n = found.lengths.double()
    planted = (n / 3).repeat_interleave(found.lengths) / n.repeat_interleave(found.lengths)
    biased = type(found)(**{**vars(found), "ratios": planted.float()})
    bias = biased.length_bias()
    assert bias.summed.value == pytest.approx(1) and bias.summed.low > bias.null_95
    assert bias.per_token.value == 0
    with pytest.raises(ValueError, match="two lengths at least"):
        log_ratios(*models, PROMPTS[:3], ["w1 w2"] * 3).length_bias()


def test_results_are_saved_and_drawn(
    models: tuple[HookedModel, HookedModel], tmp_path: Any
) -> None:
    pairs = [
        {"prompt": p, "chosen": a, "rejected": b}
        for p, a, b in zip(tiny.words(8, 1), tiny.words(8, 2), tiny.words(8, 3), strict=True)
    ]
    with pytest.warns(UserWarning, match="only 8 groups"):
        ranked = rank_by_reward(*models, pairs)
    results: list[Result] = [log_ratios(*models, PROMPTS, ANSWERS), ranked]
    for result in results:
        result.save(tmp_path)
        assert str(type(result).load(tmp_path)) == str(result)
        axes = result.plot()  # pyright: ignore
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() is not None
    assert ranked.record.fingerprints == (models[0].fingerprint, models[1].fingerprint)
    for bad, said in (
        ([pairs[0]], "1 preference pairs were given"),
        ([{"prompt": "w1", "chosen": "w2"}] * 2, "has no rejected"),
        ([{**pairs[0], "rejected": pairs[0]["chosen"]}] * 2, "are the same"),
        ([{**pairs[0], "rejected": " "}] * 2, "empty answer"),
    ):
        with pytest.raises(ValueError, match=said):
            rank_by_reward(*models, bad)


@pytest.mark.slow
def test_the_lineage_ranks_shipped_preferences() -> None:
    """The aligned checkpoint over its base; numbers are only checked to be sane."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = checkpoints.load("builtin:base", "builtin:aligned", device="cpu")
        found = rank_by_reward(pair.aligned, pair.base, datasets.preferences()[:12])
    assert 0 <= found.accuracy().value <= 1
    assert not torch.equal(found.summed, torch.zeros(12))
