"""Laws of component masking on a tiny model in which one head is known to copy the answer."""

from typing import Any

import pytest
import tiny
import tiny_copying
import torch
from torch import Tensor

from analyses.mechanisms.desiderata import Desideratum, desideratum
from analyses.mechanisms.masking import ComponentMask, mask_components
from analyses.mechanisms.mixing import Components, Mixture
from analyses.patching.patcher import Patcher
from analyses.patching.sources import From
from probes import HookedModel

N = 60
TOPICS = [f"topic {i}" for i in range(N)]
FIRST = [i % 12 for i in range(N)]
SECOND = [(5 * i + 1 + i // 12) % 12 for i in range(N)]
SECOND = [(b + 1) % 12 if a == b else b for a, b in zip(FIRST, SECOND, strict=True)]


def texts(words: list[int]) -> list[str]:
    """Prompts of three lengths, which run padded together."""
    return [
        f"w60 {tiny_copying.word(k)} w6{i % 9}{' w2' * (1 + i % 3)}" for i, k in enumerate(words)
    ]


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel(tiny_copying.copying(), tiny.tokenizer(), name="copying")


@pytest.fixture(scope="module")
def parts(model: HookedModel) -> tuple[Desideratum, Desideratum, Desideratum]:
    labels = [tiny_copying.word(k) for k in SECOND]
    made = desideratum(
        model, "the source's word", texts(FIRST), texts(SECOND), labels, {"last": "last"},
        others=[tiny_copying.word(k) for k in FIRST], topics=TOPICS,
        base_index=FIRST, source_index=SECOND,
    )  # fmt: skip
    return made.split()


def masked(model: HookedModel, data: tuple, **options) -> ComponentMask:
    settings = {"penalties": (0.05,), "epochs": 6, "batch_size": 8, "progress": False}
    return mask_components(model, *data, **(settings | options))


@pytest.fixture(scope="module")
def found(model: HookedModel, parts: tuple) -> ComponentMask:
    return masked(model, parts)


def test_the_planted_head_is_found_and_no_other(found: ComponentMask) -> None:
    assert found.selected == (("last", "1.head_out.2"),)
    assert found.accuracy.value == 1 and found.baseline.value == 0
    assert found.hits == found.sizes == (30, 15, 15)
    assert found.everything == 15
    # one head of eight is drawn by chance in every eighth random mask
    assert len(found.null_hits) == 20 and set(found.null_hits) == {0, 15} and not found.claimed
    assert "1 of 8 components from the source prompts give the label in 100% [80, 100]" in str(
        found
    )
    assert str(found).endswith("20 random masks at most 100%: not told from random masks")


def test_among_more_components_it_is_told_from_random_masks(
    model: HookedModel, parts: tuple
) -> None:
    found = masked(model, parts, parts=["head_out", "q", "k", "mlp_out"])
    assert found.selected == (("last", "1.head_out.2"),) and len(found.components) == 22
    assert found.claimed and found.null_95 < 0.5


@pytest.mark.parametrize("loss", ["log-probability", "logit difference"])
def test_every_loss_finds_the_planted_head(model: HookedModel, parts: tuple, loss: str) -> None:
    assert masked(model, parts, loss=loss, draws=0).selected == (("last", "1.head_out.2"),)


def test_a_huge_penalty_leaves_the_mask_empty(model: HookedModel, parts: tuple) -> None:
    empty = masked(model, parts, penalties=(1e4,))
    assert empty.selected == () and torch.equal(empty.mask, torch.ones(1, 8))
    assert empty.hits == empty.unpatched and empty.null_hits == ()
    assert str(empty) == (
        "the source's word: no component is taken from the source prompts; unpatched accuracy 0% "
        "of 15"
    )


def test_without_a_penalty_training_accuracy_is_at_least_that_with_one(
    model: HookedModel, parts: tuple
) -> None:
    free = masked(model, parts, penalties=(0.0,), draws=0)
    for penalty in (0.05, 1.0, 1e4):
        assert free.hits[0] >= masked(model, parts, penalties=(penalty,), draws=0).hits[0]
    assert free.hits[0] == 30


def test_ties_go_to_fewer_components(model: HookedModel, parts: tuple) -> None:
    """Without a penalty distractors are patched too; with both tried, the one head wins."""
    free = masked(model, parts, penalties=(0.0,), draws=0)
    assert int(free.history[-1][2]) > 1
    both = masked(model, parts, penalties=(0.0, 0.05), draws=0)
    best = max(row[4] for row in both.history)
    assert sum(row[4] == best for row in both.history) > 1
    assert int(both.patched.sum()) == min(row[2] for row in both.history if row[4] == best) == 1


def test_a_rounded_mask_is_a_patch(model: HookedModel, parts: tuple) -> None:
    """The mixture at 0 and 1 against the exact patcher, and in between against a plain loop."""
    test = parts[2]
    mixture = Mixture(model, test, Components.of(model, ["head_out"], None, None))
    rows = list(range(len(test)))
    patcher = Patcher(model, test.base, From(prompts=test.source), "last", shorten=False)
    mask = torch.ones(1, 8)
    assert torch.equal(mixture.logits(rows, mask), patcher.target_logits)
    mask[0, 6] = mask[0, 1] = 0
    want = patcher.logits(["1.head_out.2", "0.head_out.1"])
    assert torch.allclose(mixture.logits(rows, mask), want, atol=1e-5)
    assert not torch.allclose(want, patcher.target_logits, atol=1e-2)
    mask[0, 6] = 0.3
    for i in (0, 7):
        assert torch.allclose(
            mixture.logits([i], mask)[0], by_hand(model, test, i, mask[0]), atol=1e-4
        )


def by_hand(model: HookedModel, examples: Desideratum, i: int, mask: Tensor) -> Tensor:
    """One example by torch hooks of our own on the modules."""
    plain: Any = model.model
    given: dict[int, Tensor] = {}
    ids = [
        torch.tensor([r.ids])
        for r in model.template.render_all([examples.source[i], examples.base[i]])
    ]

    def keep(layer: int, h: Tensor) -> None:
        given[layer] = h[0, -1].clone()

    def put(layer: int, h: Tensor) -> tuple[Tensor]:
        h = h.clone()
        m = mask[4 * layer : 4 * layer + 4].repeat_interleave(16)
        h[0, -1] = m * h[0, -1] + (1 - m) * given[layer]
        return (h,)

    blocks = list(enumerate(plain.model.layers))
    logits = torch.empty(0)
    for step, act in enumerate((keep, put)):
        hooks = [
            block.self_attn.o_proj.register_forward_pre_hook(
                lambda _m, a, layer=layer, act=act: act(layer, a[0])
            )
            for layer, block in blocks
        ]
        with torch.no_grad():
            logits = plain(ids[step]).logits[0, -1]
        for hook in hooks:
            hook.remove()
    return logits


def test_other_components(model: HookedModel, parts: tuple) -> None:
    """Directions of the stream: those in which the head writes carry the word, others do not."""
    U = torch.linalg.qr(torch.randn(40, 4, generator=torch.Generator().manual_seed(0))).Q.T
    elsewhere = torch.zeros(16, 64)
    elsewhere[:12, 12:24] = torch.eye(12)
    elsewhere[12:, 24:] = U
    found = masked(
        model, parts, subspace=("1.resid_post", elsewhere), penalties=(0.02,), epochs=8, draws=0
    )
    assert found.accuracy.value == 1
    assert not found.patched[0, 12:].any() and int(found.patched[0, :12].sum()) >= 6
    assert found.components[3] == "1.resid_post direction 3"
    mlps = masked(model, parts, parts=["mlp_out"], draws=2)
    assert mlps.components == ("0.mlp_out", "1.mlp_out")
    assert mlps.hits[2] == mlps.everything == 0 and mlps.selected == ()


def test_groups_have_masks_of_their_own(model: HookedModel) -> None:
    """What moves at the word's token is its value, so a head there carries it only at that group."""
    made = desideratum(
        model, "word", texts(FIRST), texts(SECOND), [tiny_copying.word(k) for k in SECOND],
        {"word": [[r.ids.index(tiny_copying.WORDS[k])] for r, k in zip(
            model.template.render_all(texts(FIRST)), FIRST, strict=True)], "last": "last"},
        topics=TOPICS,
    )  # fmt: skip
    found = masked(model, made.split(), draws=3)
    assert found.groups == ("word", "last")
    assert found.selected == (("last", "1.head_out.2"),)


def test_the_model_is_left_as_it_was(model: HookedModel, parts: tuple, found: object) -> None:
    flags = [p.requires_grad for p in model.model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()]
    before = model.logits(texts(FIRST)[:3])
    masked(model, parts, draws=0, epochs=2)
    assert flags == [p.requires_grad for p in model.model.parameters()] and all(flags)
    assert hooks == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()
    ]
    assert all(p.grad is None for p in model.model.parameters()) and not model.model.training
    assert torch.equal(model.logits(texts(FIRST)[:3]), before)


def test_saved_and_drawn(found: ComponentMask, tmp_path) -> None:
    again = ComponentMask.load(found.save(tmp_path / "mask"))
    assert str(again) == str(found) and again.frame().equals(found.frame())
    assert found.frame()["patched"].tolist().count(True) == 1
    ax = found.plot()
    assert "(%)" in ax.get_ylabel() and ax.get_legend() is not None
    assert "head of head_out" in found.plot_mask().get_xlabel()
    with pytest.raises(ValueError, match="no position group 'first': there are last"):
        found.plot_mask("first")


def test_what_the_builder_refuses(model: HookedModel) -> None:
    base, source = texts(FIRST)[:4], texts(SECOND)[:4]
    labels = [tiny_copying.word(k) for k in SECOND[:4]]

    def build(**changes):
        given = {"labels": labels, "groups": {"last": "last"}} | changes
        return desideratum(model, "x", given.pop("base", base), source, **given)  # pyright: ignore

    with pytest.raises(ValueError, match="example 1 of 'x' have the same index 3"):
        build(base_index=[1, 3, 2, 0], source_index=[2, 3, 0, 1])
    with pytest.raises(ValueError, match="give both"):
        build(base_index=[1, 3, 2, 0])
    with pytest.raises(ValueError, match="the label 'w8 w9' is 2 tokens behind"):
        build(labels=["w8 w9", *labels[1:]])
    with pytest.raises(ValueError, match="label id 200 lies outside the vocabulary of 200 rows"):
        build(labels=[200, *labels[1:]])
    with pytest.raises(ValueError, match="4 base prompts and 3 labels: give one for each"):
        build(labels=labels[1:])
    with pytest.raises(ValueError, match="picks 14 tokens of target prompt 0"):
        build(base=["w60 w7 w61 w2 w2 w2", *base[1:]], groups={"all": "all"})
    with pytest.raises(ValueError, match="'all' and 'last' share token 11 of base prompt 0"):
        build(groups={"all": "all", "last": "last"})
    with pytest.raises(ValueError, match="has no position groups"):
        build(groups={})
    with pytest.raises(ValueError, match=r"names tokens \[99\] of example 0, whose shorter"):
        build(groups={"here": [[99], [1], [1], [1]]})


def test_what_masking_refuses(model: HookedModel, parts: tuple) -> None:
    train, validation, test = parts
    with pytest.raises(ValueError, match="training and validation parts share topic"):
        masked(model, (train, train, test))
    with pytest.raises(ValueError, match="4 steps of size 0.1 cannot move a mask"):
        masked(model, parts, epochs=1)
    with pytest.raises(ValueError, match="loss='accuracy': choose 'logit'"):
        masked(model, parts, loss="accuracy")
    with pytest.raises(ValueError, match="the directions are not orthonormal"):
        masked(model, parts, subspace=("1.resid_post", torch.ones(2, 64)))
    with pytest.raises(ValueError, match=r"choose some of head_out, q, k, v, attn_out, mlp_out"):
        masked(model, parts, parts=["pattern"])
    same = train.only(range(len(train)))
    same = type(same)(**{**same.__dict__, "source": same.base})
    with pytest.raises(ValueError, match="are the same prompts of the same model"):
        masked(model, (same, validation, test))
    lens = HookedModel(tiny_copying.copying(), tiny.tokenizer(), engine="nnsight")
    with pytest.raises(ValueError, match="gradients need the plain engine and .* uses nnsight"):
        masked(lens, parts)
