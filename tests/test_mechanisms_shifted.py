"""Shifted tokens traced to layers and heads: planted, exact where nothing can change, refused."""

import pytest
import tiny_lineage
import torch

from analyses.checkpoints import Checkpoints
from analyses.mechanisms.shifted import ShiftedTokens, trace_shift
from analyses.tokens.shift import token_shift
from probes.contrast import Contrast


@pytest.fixture(scope="module")
def lineage() -> Checkpoints:
    return tiny_lineage.checkpoints()


@pytest.fixture(scope="module")
def parts() -> dict[str, Contrast]:
    whole = tiny_lineage.pairs(60)
    return whole.split(seed=0)


@pytest.fixture(scope="module")
def traced(lineage: Checkpoints, parts: dict[str, Contrast]) -> ShiftedTokens:
    return trace_shift(
        lineage.base, lineage.aligned, parts, max_new_tokens=3, heads=2, draws=6, resamples=100,
        progress=False,
    )  # fmt: skip


def test_layers_that_are_equal_take_nothing_back(traced: ShiftedTokens) -> None:
    # the tiny aligned model differs from its base from layer 1 on
    assert torch.equal(traced.single_share[:, 0], torch.zeros(len(traced.kinds)))
    assert torch.equal(traced.heads[0], torch.zeros_like(traced.heads[0]))
    assert float(traced.single_share[:, 1:].abs().max()) > 0
    assert traced.projection_gap[0].abs().max() == 0


def test_all_layers_together_take_everything_back(traced: ShiftedTokens) -> None:
    # embeddings, norms and head are shared, so that all outputs of the base are its whole run
    assert float(traced.below[-1]) == pytest.approx(1, abs=1e-4)
    assert float(traced.above[0]) == pytest.approx(1, abs=1e-4)


def test_the_tokens_are_the_first_shifted_ones(
    lineage: Checkpoints, parts: dict[str, Contrast], traced: ShiftedTokens
) -> None:
    test = parts["test"].limited(40, 0)
    prompts = [p for p, label in zip(test.prompts, test.labels, strict=True) if label]
    shift = token_shift(
        lineage.base, lineage.aligned, prompts, ["x"] * len(prompts), max_new_tokens=3
    )
    kinds = torch.split(shift.kinds, list(shift.counts))
    want = [int((k == 2).nonzero()[0]) for k in kinds if bool((k == 2).any())]
    assert traced.places.tolist() == want
    first = [t[p] for t, p in zip(
        [t for t, k in zip(shift.tokens, kinds, strict=True) if bool((k == 2).any())],
        want, strict=True)]  # fmt: skip
    assert [t.strip() for t in traced.tokens] == [t.strip() for t in first]
    assert all(a != b for a, b in zip(traced.tokens, traced.instead, strict=True))


def test_projections_are_those_of_a_plain_pass(
    lineage: Checkpoints, parts: dict[str, Contrast], traced: ShiftedTokens
) -> None:
    train = parts["train"].limited(64, 0)
    model = lineage.aligned.model

    def last(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
        return out.hidden_states[1][0, -1].double()  # what leaves block 0

    render = lineage.aligned.template.render
    rows = [last(list(render(p).ids)) for p in train.prompts]
    high = torch.stack([r for r, label in zip(rows, train.labels, strict=True) if label]).mean(0)
    low = torch.stack([r for r, label in zip(rows, train.labels, strict=True) if not label]).mean(0)
    d = high - low
    test = parts["test"].limited(40, 0)
    prompts = [p for p, label in zip(test.prompts, test.labels, strict=True) if label]
    shift = token_shift(
        lineage.base, lineage.aligned, prompts, ["x"] * len(prompts), max_new_tokens=3
    )
    values = []
    for prompt, ids, kinds in zip(
        prompts,
        torch.split(shift.ids, list(shift.counts)),
        torch.split(shift.kinds, list(shift.counts)),
        strict=True,
    ):
        at = (kinds == 2).nonzero().flatten().tolist()
        if at:
            h = last([*render(prompt).ids, *ids[: at[0]].tolist()])
            values.append(float((h - low) @ d / d.square().sum()))
    want = sum(values) / len(values)
    assert float(traced.projection[1, 0, 0]) == pytest.approx(want, abs=1e-4)


def test_it_is_kept_and_drawn(traced: ShiftedTokens, tmp_path: object) -> None:
    again = ShiftedTokens.load(traced.save(str(tmp_path)))
    assert str(again) == str(traced) and again.frame().equals(traced.frame())
    assert len(traced.token_frame()) == len(traced.tokens)
    assert traced.plot().get_ylabel().startswith("shift of the token taken back")
    assert traced.plot_projection().get_legend() is not None
    assert traced.plot_heads().get_xlabel() == "head"


def test_equal_models_and_other_templates_are_refused(
    lineage: Checkpoints, parts: dict[str, Contrast]
) -> None:
    with pytest.raises(ValueError, match="there is no shift to trace"):
        trace_shift(lineage.aligned, lineage.aligned, parts, max_new_tokens=2, progress=False)
    with pytest.raises(ValueError, match="a window of 9 layers"):
        trace_shift(lineage.base, lineage.aligned, parts, window=9, progress=False)
