"""Folders of finished layers: gone on with by the same call, refused to any other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from torch import Tensor

from analyses.drift.attribution import attribute_drift
from analyses.patching import swaps
from analyses.patching.cells import Kept
from analyses.patching.grid import patch_map
from analyses.patching.metrics import Divergence, LogitDifference, RefusalLogOdds
from analyses.patching.patcher import Patcher
from analyses.patching.sources import From
from probes import HookedModel
from probes.engines import Edit
from probes.sites import Site

PROMPTS = tiny.words(8, seed=4)
N = len(PROMPTS)
ANOTHER = "holds the layers of another map"


@pytest.fixture(scope="module")
def lineage() -> tuple[HookedModel, HookedModel]:
    return tiny_lineage.hooked("target"), tiny_lineage.hooked("source", 1, seed=1)


def mapped(
    pair: tuple[HookedModel, HookedModel], metric: Any, folder: Path | None, **more: Any
) -> Any:
    options = {"kind": "parts", "draws": 0, "progress": False, "folder": folder, **more}
    return patch_map(pair[0], PROMPTS, From(model=pair[1]), metric, **options)


def column(token: int, factor: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda logits: factor * logits[:, token]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LogitDifference((20,) * N, (30,) * N), LogitDifference((40,) * N, (50,) * N)),
        (RefusalLogOdds((20,)), RefusalLogOdds((33,))),
        (column(20), column(40)),
        (column(20), column(20, 1.01)),
    ],
)
def test_a_metric_of_the_same_name_gets_no_foreign_numbers(
    lineage: tuple[HookedModel, HookedModel], tmp_path: Path, one: Any, other: Any
) -> None:
    found = mapped(lineage, one, tmp_path)
    with pytest.raises(ValueError, match=ANOTHER):
        mapped(lineage, other, tmp_path)
    again = mapped(lineage, one, tmp_path)
    assert again.frame().equals(found.frame())


def test_the_same_function_made_again_goes_on_in_batches_of_another_size(
    lineage: tuple[HookedModel, HookedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = mapped(lineage, column(20), tmp_path)
    monkeypatch.setattr(Patcher, "_pass", None)  # nothing is run again
    again = mapped(lineage, column(20), tmp_path, batch_size=3)
    assert torch.allclose(again.change, found.change, atol=1e-5)


def test_values_without_a_patch_are_compared_but_for_rounding(tmp_path: Path) -> None:
    ends, values = torch.tensor([1.0, -3.0, torch.nan]), torch.ones(2, 3)
    Kept(tmp_path, "a map", ends).write(1, values)
    again = Kept(tmp_path, "a map", ends * (1 + 1e-5)).read(1)
    assert again is not None and torch.equal(again, values)
    for described, other in (("a map", ends * 1.01), ("a map", ends[:2]), ("another", ends)):
        with pytest.raises(ValueError, match=ANOTHER):
            Kept(tmp_path, described, other).read(1)


def test_weights_and_activations_at_the_same_sites_are_two_things(
    lineage: tuple[HookedModel, HookedModel], tmp_path: Path
) -> None:
    target, source = lineage
    one, other = (
        kind(source, target, PROMPTS, column(20), 32, tmp_path, lambda n: None)
        for kind in (swaps.ActivationSwap, swaps.WeightSwap)
    )
    unit = (Site(1, "mlp_out"),)
    one.change([unit], "any")
    with pytest.raises(ValueError, match=ANOTHER):
        other.change([unit], "any")


@dataclass(frozen=True)
class Power:
    """Two powers of what is 0 or 1 in both runs without a patch."""

    power: int
    name: str = "power"

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.ones(len(logits)) ** self.power


def test_fields_of_a_metric_tell_what_its_values_do_not(
    lineage: tuple[HookedModel, HookedModel], tmp_path: Path
) -> None:
    mapped(lineage, Power(1), tmp_path / "power")
    with pytest.raises(ValueError, match=ANOTHER):
        mapped(lineage, Power(2), tmp_path / "power")
    reference = lineage[0].logits(["w1 w2"]).expand(N, -1)
    mapped(lineage, Divergence(reference.clone()), tmp_path / "kl")
    mapped(lineage, Divergence(reference.clone()), tmp_path / "kl")
    nearly = reference.clone()
    nearly[0, 0] += 1e-4
    with pytest.raises(ValueError, match=ANOTHER):
        mapped(lineage, Divergence(nearly), tmp_path / "kl")


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_that_is_being_edited_keeps_nothing(
    lineage: tuple[HookedModel, HookedModel], tmp_path: Path, which: int
) -> None:
    metric = column(20)
    mapped(lineage, metric, tmp_path)
    plain = mapped(lineage, metric, None)
    name = ("target", "source")[which]
    with lineage[which].edit([Edit(Site(1, "mlp_out"), lambda h, where: 3 * h)]):
        with pytest.raises(ValueError, match=f"{name} is being edited, which the files in"):
            mapped(lineage, metric, tmp_path)
        edited = mapped(lineage, metric, None)
    assert not torch.equal(edited.change, plain.change)


@pytest.mark.parametrize("how", ["activations", "weights"])
def test_an_attribution_goes_on_where_it_stopped(
    lineage: tuple[HookedModel, HookedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    options: dict[str, Any] = {
        "validation": PROMPTS, "test": tiny.words(8, seed=9), "window": 1, "heads": 1, "draws": 3,
        "metric": column(20), "progress": False, "folder": tmp_path, "resamples": 50,
    }  # fmt: skip
    target, source = lineage
    found = attribute_drift(source, target, how, **options)
    parts = {"layers", "heads", "up-to", "from", "windows", "chosen", "null"}
    assert {p.name for p in tmp_path.iterdir()} == parts
    ran: list[str] = []
    weights, run = swaps.patched_weights, Patcher._pass
    monkeypatch.setattr(swaps, "patched_weights", lambda *a: ran.append("w") or weights(*a))
    monkeypatch.setattr(Patcher, "_pass", lambda *a: ran.append("a") or run(*a))
    again = attribute_drift(source, target, how, **options)
    assert not ran and str(again) == str(found) and again.frame().equals(found.frame())
    assert torch.equal(again.window_null, found.window_null)
    (tmp_path / "layers" / "layer-001.safetensors").unlink()
    again = attribute_drift(source, target, how, **options)
    assert len(ran) == 1 and again.frame().equals(found.frame())
    other = "weights" if how == "activations" else "activations"
    for wrong in ({"metric": column(40)}, {"how": other}):
        with pytest.raises(ValueError, match=ANOTHER):
            attribute_drift(source, target, **{**options, "how": how, **wrong})


def test_an_attribution_reports_on_other_topics_than_it_chose_on(
    lineage: tuple[HookedModel, HookedModel],
) -> None:
    target, source = lineage
    test = tiny.words(8, seed=9)
    options: dict[str, Any] = {"metric": column(20), "progress": False, "draws": 1}
    named = {"validation_topics": list("abcdefgh"), "test_topics": list("hijklmno")}
    with pytest.raises(ValueError, match="prompts share 1 topics, such as 'h': layers are chosen"):
        attribute_drift(source, target, validation=PROMPTS, test=test, **named, **options)
    with pytest.raises(ValueError, match="1 validation prompts are test prompts too, the first"):
        attribute_drift(source, target, validation=PROMPTS, test=[*test, PROMPTS[3]], **options)
