"""The class contrast across checkpoints where topics have several pairs; halves by topic."""

import pytest
import torch
from torch import Tensor

from analyses.subspaces.concept import ConceptSubspace, _strangers, measure_concept
from analyses.subspaces.halves import halves_by_topic

WIDTH, TOPICS = 12, 60


def twins(topics: int = TOPICS) -> tuple[Tensor, Tensor]:
    """`[topic, class, width]` of a reference and of a checkpoint whose contrasts moved at random."""
    generator = torch.Generator().manual_seed(1)
    shift = torch.zeros(2, WIDTH)
    shift[0, 0] = 2
    base = torch.randn(topics, 2, WIDTH, generator=generator) + shift
    return base, base + torch.randn(topics, 2, WIDTH, generator=generator)


def measured(paraphrases: int, topics: int = TOPICS) -> ConceptSubspace:
    """Each twin pair that many times over, as good as unchanged."""
    generator = torch.Generator().manual_seed(2)

    def rows(x: Tensor) -> Tensor:
        many = x[:, None].expand(len(x), paraphrases, 2, WIDTH)
        return (many + 1e-4 * torch.randn(many.shape, generator=generator)).reshape(1, -1, WIDTH)

    base, other = twins(topics)
    names = [f"t{i:02d}" for i in range(topics) for _ in range(2 * paraphrases)]
    index, half = torch.arange(len(names)), topics // 2 * 2 * paraphrases
    return measure_concept(
        {"a": rows(base), "b": rows(other)}, torch.tensor([True, False] * (len(names) // 2)), names,
        train=index[:half], test=index[half:], rank=2,
    )  # fmt: skip


def test_paraphrases_add_no_certainty() -> None:
    once, often = measured(1), measured(8)
    assert often.topics == once.topics == (30, 30)
    for name in ("retained", "cosine"):
        # the same topics are drawn, so that all but the paraphrases' noise is the same
        assert torch.allclose(getattr(often, name)[1, 0], getattr(once, name)[1, 0], atol=2e-4)
    assert float(often.cosine_null[1, 0]) == pytest.approx(float(once.cosine_null[1, 0]), abs=2e-4)
    assert float(often.null[1, 0]) == pytest.approx(float(once.null[1, 0]), abs=0.15)
    assert once.notes == often.notes == ()


def test_few_topics_are_few_however_many_pairs_they_have() -> None:
    found = measured(8, topics=20)
    assert found.topics == (10, 10)
    assert "only 10 test topics" in found.notes[0]
    with pytest.raises(ValueError, match="2 test topics and 100 draws .* at least 3 topics"):
        measured(30, topics=4)


def test_strangers_are_of_two_topics() -> None:
    topics = [f"t{i // 6}" for i in range(60)]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = _strangers(torch.arange(0, 60, 2), topics, generator)
        assert len(a) == len(b) == 15 and not set(a.tolist()) & set(b.tolist())
        assert all(topics[i] != topics[j] for i, j in zip(a.tolist(), b.tolist(), strict=True))


SETS = {
    "a": [f"t{i}" for i in range(10)],
    "b": [f"t{i}" for i in range(4)],
    "c": [f"t{i}" for i in range(3, 14)],
    "d": [f"u{i // 2}" for i in range(14)],
}


def test_sets_that_share_some_topics_have_them_in_the_same_half() -> None:
    halves = halves_by_topic(SETS, 30, 0)
    other: dict[str, set[frozenset[str]]] = {name: set() for name in SETS}
    for split in zip(*halves.values(), strict=True):
        named = {
            name: [{SETS[name][i] for i in half.tolist()} for half in pair]
            for name, pair in zip(SETS, split, strict=True)
        }
        for name, (first, second) in named.items():
            assert first | second == set(SETS[name]) and not first & second
            assert abs(len(first) - len(second)) <= 3
            other[name].add(frozenset(first))
        for one in named.values():
            assert all(not one[0] & two[1] and not one[1] & two[0] for two in named.values())
    assert len(other["a"]) > 20  # another split each time
    with pytest.raises(ValueError, match="x has one topic only"):
        halves_by_topic({"x": ["t", "t"]}, 20, 0)
