"""Comparing two distributions over a vocabulary: laws, float64 loops, and SciPy."""

import math
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from architectures import BOS, EOS, VOCABULARY
from torch import Tensor

from analyses import TokenShift, token_shift
from analyses.tokens import paths
from analyses.tokens.paths import Steps, along, compared, pieces, reader, strings
from probes import HookedModel
from probes.prompts import pad

SIZE = 400


def rows(seed: int, n: int = 30, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, SIZE, generator=generator)


BASE = rows(1)
NEAR, FAR = BASE + rows(2, scale=0.3), rows(3)
EMITTED = FAR.argmax(1)


def same(a: Steps, b: Steps) -> bool:
    other = b.tensors()
    return all(torch.equal(value, other[name]) for name, value in a.tensors().items())


@pytest.mark.parametrize("aligned", [NEAR, FAR])
def test_every_number_is_that_of_a_loop_in_float64(aligned: Tensor) -> None:
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import entropy

    found = compared(BASE, aligned, EMITTED, top=7)
    for i, (x, y) in enumerate(zip(BASE.double(), aligned.double(), strict=True)):
        p, q = (z.softmax(0).numpy() for z in (x, y))
        token = int(EMITTED[i])
        assert int(found.ranks[i]) == 1 + sum(other > p[token] for other in p)
        assert int(found.aligned_ranks[i]) == 1 + sum(other > q[token] for other in q)
        for name, value in {
            "kl": entropy(q, p),
            "reverse_kl": entropy(p, q),
            "js": jensenshannon(p, q) ** 2,
            "entropy_base": entropy(p),
            "entropy_aligned": entropy(q),
            "logp_base": math.log(p[token]),
            "logp_aligned": math.log(q[token]),
        }.items():
            assert float(getattr(found, name)[i]) == pytest.approx(value, rel=1e-5, abs=2e-6), name
        for ids, chances, whole in (
            (found.top_base, found.top_base_p, p),
            (found.top_aligned, found.top_aligned_p, q),
        ):
            best = sorted(range(SIZE), key=lambda v, whole=whole: -whole[v])[:7]
            assert ids[i].tolist() == best
            assert chances[i].tolist() == pytest.approx([whole[v] for v in best], rel=1e-5)


def test_equal_rows_diverge_by_exactly_nothing() -> None:
    found = compared(FAR, FAR.clone(), EMITTED)
    for name in ("kl", "reverse_kl", "js"):
        assert not getattr(found, name).any()
    assert torch.equal(found.logp_base, found.logp_aligned)
    assert found.ranks.eq(1).all()
    # one logit of one row is enough to be seen
    moved = FAR.clone()
    moved[3, 5] += 1.0
    other = compared(FAR, moved, EMITTED)
    assert (other.kl > 0).nonzero().flatten().tolist() == [3]


def test_divergences_are_never_negative_however_small() -> None:
    for scale in (1e-7, 1e-5, 1e-3):
        found = compared(BASE, BASE + rows(4, scale=scale), EMITTED)
        for name in ("kl", "reverse_kl", "js"):
            assert bool((getattr(found, name) >= 0).all())
            assert bool((getattr(found, name) <= 2e-6 + scale**2).all())
    apart = compared(torch.tensor([[60.0, 0, 0]]), torch.tensor([[0.0, 0, 60]]), torch.tensor([2]))
    assert float(apart.js) == pytest.approx(math.log(2), abs=1e-6)
    assert float(apart.kl) == pytest.approx(60, rel=1e-5)


def test_divergences_forgive_the_rounding_of_log_probabilities() -> None:
    """The textbook sum over as many ids is off by more, and by so much again the other way."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(20, 50_000, generator=generator) + 1000
    y = x + 0.01 * torch.randn(20, 50_000, generator=generator)
    P, Q = (z.double().log_softmax(1) for z in (x, y))
    p, q = (z.log_softmax(1) for z in (x, y))
    found = compared(x, y, torch.zeros(20, dtype=torch.long))
    for own, exact, plain in (
        (found.kl, (Q.exp() * (Q - P)).sum(1), (q.exp() * (q - p)).sum(1)),
        (found.reverse_kl, (P.exp() * (P - Q)).sum(1), (p.exp() * (p - q)).sum(1)),
    ):
        assert float((own - exact).abs().max()) < 4e-7 < float((plain - exact).abs().max())


def test_ranks_see_only_the_order_of_the_base() -> None:
    plain = compared(BASE, FAR, EMITTED)
    for changed in (0.25 * BASE, 2.0 * BASE, BASE + 3, BASE.softmax(1), BASE.log_softmax(1)):
        assert torch.equal(compared(changed, FAR, EMITTED).ranks, plain.ranks)
    # c added to one logit: it rises, everything it passes falls by one, nothing else moves
    at = 17
    raised = BASE.clone()
    raised[:, at] += 2.0
    for token in range(0, SIZE, 13):
        before, after = (compared(x, FAR, torch.full((30,), token)).ranks for x in (BASE, raised))
        if token == at:
            assert bool((after <= before).all()) and bool((after < before).any())
        else:
            passed = (BASE[:, at] <= BASE[:, token]) & (raised[:, at] > BASE[:, token])
            assert torch.equal(after - before, passed.long())


def test_ties_are_not_above() -> None:
    flat = torch.zeros(1, 5)
    assert int(compared(flat, flat, torch.tensor([4])).ranks) == 1
    two = torch.tensor([[3.0, 3.0, 1.0]])
    assert [int(compared(two, two, torch.tensor([i])).ranks) for i in range(3)] == [1, 1, 3]


def test_a_base_with_the_first_two_swapped_is_marginal_everywhere() -> None:
    first, second = FAR.topk(2).indices.T
    swapped = FAR.clone()
    swapped[torch.arange(30), first] = FAR[torch.arange(30), second]
    swapped[torch.arange(30), second] = FAR[torch.arange(30), first]
    assert compared(swapped, FAR, first).ranks.eq(2).all()


def test_divergences_turn_round_with_the_models() -> None:
    there, back = compared(BASE, FAR, EMITTED), compared(FAR, BASE, EMITTED)
    torch.testing.assert_close(there.kl, back.reverse_kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(there.js, back.js, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(there.kl, there.reverse_kl, atol=1e-2)


PROMPTS = tiny.words(9, seed=8)


@pytest.fixture(scope="module")
def models() -> tuple[HookedModel, HookedModel]:
    return tiny_lineage.hooked("first"), tiny_lineage.hooked("second", 1, seed=4)


def measure(models: tuple[HookedModel, HookedModel], **options: Any) -> TokenShift:
    return token_shift(*models, PROMPTS, ["a"] * 9, max_new_tokens=6, **options)


def test_batches_and_chunks_change_nothing(
    models: tuple[HookedModel, HookedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = measure(models, batch_size=1)
    many = measure(models, batch_size=9)
    monkeypatch.setattr(paths, "DECODED", VOCABULARY)
    monkeypatch.setattr(paths, "COMPARED", VOCABULARY)
    small = measure(models, batch_size=9)
    for other in (many, small):
        assert torch.equal(one.ranks, other.ranks)
        for name in ("kl", "reverse_kl", "js", "logp_base", "logp_aligned", "entropy_base"):
            expected = getattr(one, name)
            torch.testing.assert_close(getattr(other, name), expected, rtol=1e-4, atol=1e-5)


def test_padding_on_either_side_gives_the_same_states(
    models: tuple[HookedModel, HookedModel],
) -> None:
    base, aligned = models
    rendered = aligned.template.render_all(PROMPTS)
    answers = tuple(tuple(ids) for ids in aligned.generate_ids(PROMPTS, 6))
    found = along(reader(aligned, rendered, 6), [reader(base, rendered, 6)], answers, VOCABULARY)[0]
    batch = pad([(*r.ids, *a) for r, a in zip(rendered, answers, strict=True)], 0, "right")
    logits = [m.engine.logits(batch) for m in models]
    start = 0
    for i, (r, answer) in enumerate(zip(rendered, answers, strict=True)):
        at = slice(len(r.ids) - 1, len(r.ids) + len(answer) - 1)
        own = compared(logits[0][i, at], logits[1][i, at], torch.tensor(answer))
        part = slice(start, start + len(answer))
        assert torch.equal(own.ranks, found.ranks[part])
        torch.testing.assert_close(own.kl, found.kl[part], rtol=1e-4, atol=1e-5)
        start += len(answer)


def test_no_tensor_holds_the_logits_of_a_batch(
    models: tuple[HookedModel, HookedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits pass by in parts, and heads run at answer positions only."""
    seen: list[int] = []
    plain = paths.compared

    def counting(base: Tensor, *rest: Tensor | int) -> Steps:
        seen.append(len(base))
        return plain(base, *rest)  # pyright: ignore

    monkeypatch.setattr(paths, "compared", counting)
    monkeypatch.setattr(paths, "COMPARED", 3 * VOCABULARY)
    found = measure(models, batch_size=9)
    assert max(seen) == 3
    assert sum(seen) == len(found.ids)


def test_greedy_answers_are_the_first_choice_read_again(
    models: tuple[HookedModel, HookedModel],
) -> None:
    assert measure(models).agreement >= 0.99
    assert not any("most probable" in note for note in measure(models).notes)


def test_a_shipped_repetition_penalty_changes_nothing(
    models: tuple[HookedModel, HookedModel],
) -> None:
    base, aligned = models
    plain = measure(models)
    config = aligned.model.generation_config
    before = config.repetition_penalty  # pyright: ignore
    try:
        config.repetition_penalty = 1.7  # pyright: ignore
        penalised = measure((base, aligned))
    finally:
        config.repetition_penalty = before  # pyright: ignore
    assert penalised.tokens == plain.tokens
    assert same(penalised, plain)


def test_a_template_with_bos_is_read_with_one(bos_tokenizer: Any) -> None:
    pair = [tiny_lineage.hooked(n, k, 4, None, bos_tokenizer) for n, k in (("a", None), ("b", 1))]
    read: list[tuple[int, ...]] = []
    plain = pair[0].engine.read

    def listening(batch: Any, *rest: Any) -> Any:
        for ids, mask in zip(batch.ids, batch.mask, strict=True):
            read.append(tuple(ids[mask.bool()].tolist()))
        return plain(batch, *rest)

    pair[0].engine.read = listening  # pyright: ignore
    measure((pair[0], pair[1]))
    for prompt in pair[1].template.render_all(PROMPTS):
        assert prompt.ids.count(BOS) == 1
        assert any(row[: len(prompt.ids)] == prompt.ids for row in read)


def test_stop_tokens_are_known() -> None:
    aligned = tiny_lineage.weights(1, seed=4)
    with torch.no_grad():
        aligned.lm_head.weight[EOS] *= 2.5
    found = measure(
        (tiny_lineage.hooked("first"), HookedModel(aligned, tiny.tokenizer(), name="b"))
    )
    assert found.stops.any()
    assert torch.equal(found.stops, found.ids == EOS)


class Rubble:
    """Loses a leading blank, and holds one part of a character."""

    names = (" I", " am", "\ufffd", "!")

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(self.names[i] for i in ids).lstrip()

    def convert_ids_to_tokens(self, i: int) -> str | None:
        return None if i == 3 else f"<{i}>"


def test_ids_keep_apart_what_decoding_confuses() -> None:
    assert strings(Rubble(), [1, 0, 2]) == {"0": " I", "1": " am", "2": "<2>"}
    assert pieces(Rubble(), [0, 1, 3]) == ("I", " am", "!")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"groups": ["a"]}, "9 prompts came with 1 groups: give one for each"),
        ({"vocab_size": 500}, "vocab_size=500: the models have 200 ids in common"),
        ({"base_context": "nope"}, "unknown base context 'nope'"),
        ({"vocab_size": 1}, "the 9 answers of second have no token that the other model knows"),
    ],
)
def test_mistakes_are_one_sentence(
    models: tuple[HookedModel, HookedModel], wrong: dict, said: str
) -> None:
    options = {"groups": ["a"] * 9, "max_new_tokens": 3, **wrong}
    with pytest.raises(ValueError, match=said) as error:
        token_shift(*models, PROMPTS, **options)
    assert "\n" not in str(error.value)


def test_prompts_beyond_the_vocabulary_are_refused() -> None:
    small = tiny_lineage.hooked("small", vocab=100)
    with pytest.raises(ValueError, match="and the vocabulary of small has 100 rows: use a templ"):
        measure((small, tiny_lineage.hooked("second", 1)))


def test_two_tokenizers_are_refused_with_the_way_out() -> None:
    other = tiny.tokenizer()
    vocabulary = other.get_vocab()
    swapped = {**vocabulary, "w1": vocabulary["w2"], "w2": vocabulary["w1"]}
    other.get_vocab = lambda: swapped
    pair = tiny_lineage.hooked("first", tokenizer=other), tiny_lineage.hooked("second", 1)
    with pytest.raises(
        ValueError, match=r"id \d+ means 'w2' in one and 'w1' in the other"
    ) as error:
        measure(pair)
    assert "analyses.tokens.rewards.log_ratios compares by bytes" in str(error.value)


def test_a_model_that_gives_nan_is_refused(models: tuple[HookedModel, HookedModel]) -> None:
    base = tiny_lineage.hooked("broken")
    with torch.no_grad():
        base.model.lm_head.weight[7] = math.nan  # pyright: ignore
    with pytest.raises(ValueError, match="of broken and second along the answers holds"):
        measure((base, models[1]))
