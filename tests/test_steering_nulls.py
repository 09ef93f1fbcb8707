"""Shuffled labels hold nothing of the concept, of pairs and of topics of one class."""

import math

import pytest
import torch
from torch import Tensor

from probes import HookedModel, Site
from probes.activations import Activations
from probes.contrast import Contrast
from probes.splits import shuffled
from steering import train_vector
from steering.nulls import shuffled_vectors

SITE = Site(1, "resid_post")


def given(rows: Tensor) -> Activations:
    return Activations((SITE,), (1,) * len(rows), "last", lambda _: rows, n_layers=3)


def planted(contrast: Contrast, concept: float = 3.0) -> tuple[Tensor, Activations]:
    """A concept far wider than the noise of single prompts, as in pairs of like prompts."""
    generator = torch.Generator().manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    noise = 0.3 * torch.randn(len(contrast), 64, generator=generator)
    return v, noise + concept * contrast.positive.float()[:, None] * v


def cosines(model: HookedModel, contrast: Contrast, n: int = 200) -> Tensor:
    v, rows = planted(contrast)
    drawn = shuffled_vectors(model, contrast, SITE, n, activations=given(rows))
    return torch.stack([torch.cosine_similarity(d[SITE], v, dim=0) for d in drawn])


def by_coins(contrast: Contrast, n: int = 200) -> Tensor:
    """The same with a coin for each topic, or any exchange: the negative control."""
    v, rows = planted(contrast)
    labels = shuffled(contrast.positive, contrast.topics, n, torch.Generator().manual_seed(0))
    found = [rows[y].mean(0) - rows[~y].mean(0) for y in labels.T]
    return torch.stack([torch.cosine_similarity(d, v, dim=0) for d in found])


PROMPTS = [f"w{i} w{i + 1}" for i in range(40)]
CONTRASTS = {
    "pairs": Contrast.of_pairs(PROMPTS, PROMPTS),
    "single": Contrast.labelled(PROMPTS, [1, 0] * 20),
    "uneven": Contrast.labelled(PROMPTS[:32], [1] * 8 + [0] * 24),
    "paraphrases": Contrast(
        tuple(PROMPTS), (1, 1, 0, 0) * 10, tuple(f"t{i // 4}" for i in range(40))
    ),
}


@pytest.mark.parametrize("name", CONTRASTS)
def test_shuffled_labels_hold_nothing_of_a_wide_concept(llama: HookedModel, name: str) -> None:
    contrast = CONTRASTS[name]
    found, coins = cosines(llama, contrast), by_coins(contrast)
    # a random direction in 64 dimensions has 0.1 on average
    chance = math.sqrt(2 / math.pi / 64)
    assert float(coins.abs().mean()) > 3 * chance
    assert float(found.abs().mean()) < 1.6 * chance
    assert float(found.abs().max()) < 0.6
    assert abs(float(found.mean())) < 0.03


def test_odd_numbers_leave_no_sign(llama: HookedModel) -> None:
    """What is left over of 21 topics goes now with the true labels and now against them."""
    for contrast in (
        Contrast.of_pairs(PROMPTS[:21], PROMPTS[:21]),
        Contrast.labelled(PROMPTS, [1] * 10 + [0] * 30),  # 7.5 of each would exchange
    ):
        found = cosines(llama, contrast)
        assert float((found > 0).double().mean()) == pytest.approx(0.5, abs=0.1)
        assert float(found.abs().max()) < 0.8


def test_a_shuffle_keeps_pairs_and_class_sizes(llama: HookedModel) -> None:
    contrast = CONTRASTS["uneven"]
    rows = torch.eye(64)[:32]  # so that a vector tells the labels it was made from
    (one,) = shuffled_vectors(llama, contrast, SITE, 1, activations=given(rows))
    high = one[SITE][:32] > 0
    assert int(high.sum()) == 8
    assert int((high & contrast.positive).sum()) == 2  # a quarter, as of all
    pairs = CONTRASTS["pairs"]
    (two,) = shuffled_vectors(llama, pairs, SITE, 1, activations=given(torch.eye(80)[:, :64]))
    signs = two[SITE][:64].sign().reshape(32, 2)
    assert bool((signs.sum(1) == 0).all())


def test_the_own_norm_is_a_fraction_of_the_true_one(llama: HookedModel) -> None:
    contrast = CONTRASTS["pairs"]
    _, rows = planted(contrast)
    true = train_vector(llama, contrast, SITE, activations=given(rows))
    drawn = shuffled_vectors(llama, contrast, SITE, 20, activations=given(rows))
    assert max(d.norm(SITE) for d in drawn) < 0.4 * true.norm(SITE)


def test_too_few_topics_are_refused(llama: HookedModel) -> None:
    contrast = Contrast.of_pairs(PROMPTS[:3], PROMPTS[:3])
    with pytest.raises(ValueError, match="labels of 3 topics cannot be shuffled"):
        cosines(llama, contrast, 1)
