"""The card says model, site, strength, effect and null; without a network everything else works."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tiny import hooked

from probes.sites import Site
from steering import HeadOffsets, Origin, SteeringVector
from steering.export.exports import Export, export
from steering.export.hub import card, pull, push
from steering.sweep_result import SteeringSweep


@pytest.fixture
def shipped(tmp_path: Path) -> Export:
    v = torch.randn(64, generator=torch.Generator().manual_seed(0))
    vector = SteeringVector({Site(1, "resid_post"): v}, Origin.of(hooked()))
    return export(vector, "gguf", tmp_path / "out", strength=2.0)


def swept(strength: float = 2.0, n_null: int = 20, unit: str = "raw") -> SteeringSweep:
    """One cell: refusals rise by 0.5 [0.4, 0.6], nulls stay within 0.1."""
    return SteeringSweep(
        vectors=("mine",), sites=("1.resid_post",), operations=("add",),
        strengths=torch.tensor([strength]), unit=unit, effects=("refusal rate",), costs=("KL",),
        unsteered=torch.tensor([0.1, 0.0]), value=torch.tensor([[0.6, 0.02]]),
        change=torch.tensor([[0.5, 0.02]]), low=torch.tensor([[0.4, 0.01]]),
        high=torch.tensor([[0.6, 0.03]]),
        null=torch.linspace(-0.1, 0.1, n_null).expand(1, 2, n_null).clone(),
        kinds=("isotropic",) * n_null, n_prompts=(40, 40), n_groups=(40, 40), keys=("", ""),
    )  # fmt: skip


def test_the_card_stands_with_effect_null_and_proof(shipped: Export, tmp_path: Path) -> None:
    text = card(shipped, swept())
    for said in (
        "`tiny llama`", "`1.resid_post`", "2, multiplied into the file",
        "| 1.resid_post | refusal rate | 0.5 | 0.4 to 0.6 | -0.09 to 0.09 | yes |",
        "| 1.resid_post | KL | 0.02 | 0.01 to 0.03 | -0.09 to 0.09 | no |",
        "20 null vectors of equal norm: isotropic", "**not run**: see `alignlens verify`",
    ):  # fmt: skip
        assert said in text
    assert text.startswith("---\nlibrary_name: alignlens\n") and "base_model" not in text
    hosted = replace(shipped.steering.what.origin, model="org/model@v1")
    what = replace(shipped.steering.what, origin=hosted)
    assert "\nbase_model: org/model\n" in card(export(what, "gguf", tmp_path / "hosted"))


def test_what_was_not_measured_is_said(shipped: Export) -> None:
    assert "**not measured**" in card(shipped)
    other = card(shipped, swept(strength=3.0))
    assert "**not measured**" in other and "has strengths 3 raw" in other
    assert "**not measured**" in card(shipped, swept(unit="sigma"))
    assert "| yes |" not in card(shipped, swept(n_null=5))  # too few to claim anything


def test_head_offsets_have_a_card_too(tmp_path: Path) -> None:
    model = hooked()
    width = model.layout.blocks[0].widths["head_out"]
    heads = HeadOffsets({(1, 0): torch.ones(width)}, Origin.of(model))
    made = export(heads, "checkpoint", tmp_path / "out", model=model)
    assert "`1.head_out.0`" in card(made)


def test_an_upload_is_the_folder_with_its_card(
    shipped: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            names = sorted(p.name for p in Path(folder_path).rglob("*") if p.is_file())
            calls.append((repo_id, names))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push(shipped.folder, "org/name", sweep=swept()) == "https://huggingface.co/org/name"
    assert calls == [
        ("org/name", {"private": True, "exist_ok": True}),
        ("org/name", ["README.md", "export.json", "source.safetensors", "vector.gguf"]),
    ]
    with pytest.raises(ValueError, match="give org/name"):
        push(shipped.folder, "name")


def test_without_a_network_the_card_lies_in_the_folder(
    shipped: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    with pytest.raises(ConnectionError, match="no network.*with its card is in"):
        push(shipped.folder, "org/name")
    assert (shipped.folder / "README.md").is_file()


def test_an_export_is_fetched_and_read(shipped: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def found(name: str, revision: str | None = None) -> str:
        asked.append((name, revision))
        return str(shipped.folder if name == "org/name" else shipped.folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert pull("org/name", "v1").steering.strength == 2.0
    assert asked == [("org/name", "v1")]
    with pytest.raises(ValueError, match="holds no export"):
        pull("org/other")


def test_offline_and_unknown_is_one_sentence() -> None:
    with pytest.raises(ConnectionError, match="neither on this machine nor reachable"):
        pull("org/surely-not-here")
