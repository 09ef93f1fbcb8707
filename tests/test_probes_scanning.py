"""A scan against activations captured and projected by hand."""

import pytest
import tiny
import torch

from probes import HookedModel, capture, scan
from probes.scanning import Scan, monitor

PROMPT = "w1 w2 w3"
BENIGN = tiny.words(12, seed=4)


def unit(model: HookedModel) -> torch.Tensor:
    return torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))


def by_hand(model: HookedModel, layer: int, answer: list[str] | None) -> torch.Tensor:
    site = f"{layer}.resid_post"
    acts = capture(model, [PROMPT], site, "all", answers=answer, progress=False)
    direction = unit(model)
    return acts[site].float() @ (direction / direction.norm())


@pytest.mark.parametrize("tokens", [0, 4])
def test_projections_and_band_are_those_of_captured_vectors(
    llama: HookedModel, tokens: int
) -> None:
    found = scan(llama, 5 * unit(llama), PROMPT, BENIGN, max_new_tokens=tokens)
    answer = llama.generate([PROMPT], tokens) if tokens else None
    assert found.layers == (0, 1, 2)
    assert found.n_prompt == len(llama.template.render(PROMPT).ids)
    assert (len(found.tokens) > found.n_prompt) == bool(tokens)
    for layer in found.layers:
        assert torch.allclose(found.projection[layer], by_hand(llama, layer, answer), atol=1e-5)
    direction = unit(llama) / unit(llama).norm()
    usual, *_ = capture(llama, BENIGN, "1.resid_post", "content", progress=False).rows(
        "1.resid_post"
    )
    assert found.n_benign == len(usual)
    ends = (usual.float() @ direction).quantile(torch.tensor([0.05, 0.95]))
    assert torch.allclose(torch.stack([found.low[1], found.high[1]]), ends, atol=1e-5)


def test_layers_keep_their_rows_in_any_order(llama: HookedModel) -> None:
    """Sites come back in forward order, and the rows must be named after them."""
    found = scan(llama, unit(llama), PROMPT, BENIGN, layers=[-1, 0])
    assert found.layers == (0, 2)
    for row, layer in enumerate(found.layers):
        assert torch.allclose(found.projection[row], by_hand(llama, layer, None), atol=1e-5)


def test_a_direction_of_another_model_is_refused(llama: HookedModel) -> None:
    with pytest.raises(ValueError, match="made for another model"):
        scan(llama, torch.ones(llama.d_model + 1), PROMPT, BENIGN)
    with pytest.raises(ValueError, match="points nowhere"):
        scan(llama, torch.zeros(llama.d_model), PROMPT, BENIGN)


def test_monitor_hears_every_step_and_changes_nothing(llama: HookedModel) -> None:
    heard: list[tuple[int, torch.Tensor]] = []
    prompts = [PROMPT, "w9"]
    before = llama.generate_ids(prompts, 3)
    with monitor(llama, unit(llama), 1, lambda step, values: heard.append((step, values))):
        assert llama.generate_ids(prompts, 3) == before
    assert [step for step, _ in heard] == list(range(len(heard)))
    direction = unit(llama) / unit(llama).norm()
    last = capture(llama, prompts, "1.resid_post", progress=False)["1.resid_post"].float()
    expected = (last @ direction).sort().values
    assert torch.allclose(heard[0][1].sort().values, expected, atol=1e-5)
    count = len(heard)
    llama.generate_ids(prompts, 2)
    assert len(heard) == count


def test_the_figure_marks_what_leaves_the_band(llama: HookedModel) -> None:
    found = scan(llama, unit(llama), "w1 $5 w2", BENIGN, max_new_tokens=3)
    ax = found.plot()
    assert len(ax.collections[0].get_offsets()) == int(found.outside.sum())
    assert ax.get_xticklabels()[0].get_text().startswith("<")
    assert ax.get_legend() is not None
    assert isinstance(found, Scan)
    assert len(found.frame()) == 3 * len(found.tokens)
    ax.get_figure().draw_without_rendering()  # pyright: ignore
