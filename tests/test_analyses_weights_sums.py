"""Updates and alignment in different weights: what is summed, grouped, decomposed and recorded."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from architectures import build
from test_analyses_weights import adapter
from test_analyses_weights_projections import made, measured, noise, overlap
from torch import Tensor

from analyses.subspaces import bases, projections
from analyses.subspaces.deltas import Deltas, difference
from analyses.subspaces.edited import Projected, applied, write_edited
from analyses.subspaces.grouping import grouped, layers_of, place, places
from analyses.subspaces.projection_energy import projection_energy
from analyses.subspaces.projections import Directions, projection
from analyses.subspaces.weights import weight_overlap
from probes import HookedModel


def apart(n: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """V in attention and in the embedding, U a little there and mostly in MLPs."""
    V = {"model.embed.weight": 5 * noise(50, 16, seed=99)}
    U = {"model.embed.weight": torch.zeros(50, 16)}
    for i in range(n):
        q, up = f"model.layers.{i}.q.weight", f"model.layers.{i}.up.weight"
        V[q], V[up] = noise(16, 16, seed=i), torch.zeros(16, 16)
        U[q], U[up] = 0.1 * V[q], 3 * noise(16, 16, seed=50 + i)
    return V, U


def total(*pairs: tuple[Tensor, Tensor]) -> float:
    return float(sum((a.double() * b.double()).sum() for a, b in pairs))


def test_all_weights_are_in_the_denominators_wherever_the_updates_lie() -> None:
    V, U = apart()
    found = measured(V, U, 0.5)
    P = {name: projection(U[name], V[name], 0.5) for name in U}
    UU, VV = (total(*((d[n], d[n]) for n in d)) for d in (U, V))
    UV = total(*((U[n], V[n]) for n in U))
    PP = total(*((P[n], P[n]) for n in P))
    assert found.share("top-k", 0.5).value == pytest.approx(PP / UU, rel=1e-5)
    assert found.share("top-k", 0.5).value < 0.01
    assert found.cosine("top-k", 0.5) == pytest.approx(math.sqrt(PP / UU), rel=1e-5)
    assert found.cosine_alignment == pytest.approx(UV / math.sqrt(UU * VV), rel=1e-6)
    attention = [n for n in U if "q" in n]
    inside = total(*((U[n], U[n]) for n in attention))
    assert found.null(0.5).mean == pytest.approx(0.5 * inside / UU, rel=1e-6)
    assert found.share("random", 0.5).value == pytest.approx(0.5 * inside / UU, rel=1e-6)
    # as what selectivity adds to a model
    added = [row[2:] for row in applied(made(V), made(U), Projected(0.5))]
    E = sum(a for a, _ in added) / sum(b for _, b in added)
    assert found.share("top-k", 0.5).value == pytest.approx(E, rel=1e-5)
    # one group is all there is
    row = found.frame().query("subspace == 'top-k'").iloc[0]
    assert row["energy"] == pytest.approx(PP / UU, rel=1e-5)
    assert row["cosine_alignment"] == pytest.approx(found.cosine_alignment)
    assert row["elsewhere"] == pytest.approx(1 - inside / UU, rel=1e-6)


def test_what_lies_elsewhere_is_said_by_group() -> None:
    V, U = apart()
    found = measured(V, U, 0.5)
    assert (found.skipped, len(found.tensors)) == (6, 11)
    kinds = found.frame("kind").query("subspace == 'top-k'").set_index("kind")
    assert kinds["elsewhere"].to_dict() == {"q": 0.0, "up": 1.0}  # the embedding: no update
    assert kinds.loc["up", "energy"] == 0 and kinds.loc["q", "energy"] > 0.5
    layers = found.frame("layer").query("subspace == 'top-k'").set_index("layer")
    assert layers["elsewhere"].between(0.98, 0.9999).all() and len(layers) == 5
    assert f"{found.elsewhere:.1%} of the update lies in weights that alignment left" in str(found)
    assert "rest on 5 of them" in found.notes[-1]
    both = overlap(V, U)
    share = total(*((U[n], U[n]) for n in U if "q" in n)) / total(*((U[n], U[n]) for n in U))
    assert both.compared[1] == pytest.approx(share, rel=1e-6)
    assert 0 < both.compared[0] < 1
    assert f"with {both.compared[0]:.1%} and {both.compared[1]:.1%} of the updates" in str(both)


def falling(seed: int, m: int = 60, n: int = 40) -> Tensor:
    s = 0.7 ** torch.arange(min(m, n), dtype=torch.float64)
    left, right = (
        bases.haar(d, len(s), torch.Generator().manual_seed(seed + i)) for i, d in enumerate((m, n))
    )
    return (left * s) @ right.T


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_certified_directions_hold_what_exact_ones_do(shape: tuple[int, int]) -> None:
    V, U = {"l.0.w": falling(1, *shape)}, {"l.0.w": falling(2, *shape)}
    exact, quick = (
        projection_energy(made(V), made(U), (0.1, 0.25), method=method, progress=False)
        for method in ("exact", "certified")
    )
    assert (exact.certified, quick.certified) == (0, 1)
    assert torch.equal(exact.ranks, quick.ranks)
    assert torch.allclose(exact.kept, quick.kept, rtol=1e-4)
    assert quick.variance[1].isnan().all()
    assert torch.equal(exact.variance[::2], quick.variance[::2])
    for fractions in ((0.1, 0.9), (0.99,)):
        with pytest.raises(ValueError, match="l.0.w: .* does not settle .* method='exact'"):
            projection_energy(made(V), made(U), fractions, method="certified", progress=False)
    with pytest.raises(ValueError, match=r"fractions \(25.0,\) were given: give some above 0"):
        projection_energy(made(V), made(U), (25.0,), progress=False)
    with pytest.raises(ValueError, match="a fraction of 25 was asked: give one above 0"):
        Projected(25.0)


def test_two_stacks_of_layers_are_kept_apart() -> None:
    names = [f"{stack}.layers.{i}.q.weight" for stack in ("vision", "text") for i in range(3)]
    assert [at[1:] for at in places(names[:3])] == [place(n) for n in names[:3]]
    assert len({at[1:] for at in places(names)}) == 6
    assert grouped([*names, "norm.weight"], "kind") == {
        "vision.layers.q": [0, 1, 2],
        "text.layers.q": [3, 4, 5],
        "norm": [6],
    }
    assert list(grouped(names, "layer"))[2:4] == ["vision.layers.2", "text.layers.0"]
    assert len(set(layers_of(names))) == 6
    X = {n: noise(8, 8, seed=i) for i, n in enumerate(names)}
    Y = {n: x if n.startswith("vision") else noise(8, 8, seed=70) for n, x in X.items()}
    shown = overlap(X, Y, 0.9)
    ax = shown.plot_layers(0.9)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["vision.layers.q", "text.layers.q"]
    wanted = (shown.overlap - shown.null).reshape(2, 3)
    drawn = torch.tensor(ax.images[0].get_array().filled(math.nan))  # type: ignore[union-attr]
    assert torch.allclose(drawn.float(), wanted)


def test_a_weight_is_decomposed_once_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    real, made_ = projections.left_svd, []
    monkeypatch.setattr(projections, "left_svd", lambda *a, **k: made_.append(1) or real(*a, **k))
    tensors = {f"l.{i}.w": noise(12, 9, seed=i) for i in range(4)}
    V, U = made(tensors), made({n: noise(12, 9, seed=9 + i) for i, n in enumerate(tensors)})
    cells = [Projected(f, s, seed=d) for f in (0.2, 0.7) for s in ("top-k", "random-k", "random")
             for d in range(2)]  # fmt: skip
    plain = [[row[1] for row in applied(V, U, cell)] for cell in cells]
    assert len(made_) == 4 * len(cells)
    made_[:] = []
    directions = Directions()
    kept = [[row[1] for row in applied(V, U, cell, directions)] for cell in cells]
    assert len(made_) == 4
    assert all(torch.equal(a, b) for x, y in zip(plain, kept, strict=True)
               for a, b in zip(x, y, strict=True))  # fmt: skip
    # room for two: these stay, and a random subspace needs the rank alone
    made_[:] = []
    small = Directions(limit=2 * 12 * 9 * 8)
    for cell in cells:
        list(applied(V, U, cell, small))
    assert len(made_) == 4 + 2 * (8 - 1)
    assert small._held <= small.limit


def test_records_hold_the_fingerprints_of_what_was_compared(tmp_path: Path) -> None:
    base, tuned = tiny_lineage.save(tmp_path / "base"), tiny_lineage.save(tmp_path / "tuned", 1)
    V = difference(tuned, base)
    found = weight_overlap(V, V, progress=False).record
    assert found.models == ("tuned", "base", "tuned", "base")
    assert [len(f) for f in found.fingerprints] == [64] * 4
    assert found.fingerprints[:2] == found.fingerprints[2:] and len(set(found.fingerprints)) == 2
    again = tiny_lineage.save(tmp_path / "again", 1)
    assert difference(again, base).fingerprints == V.fingerprints  # content, not names
    first, second = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2)
    U = difference(f"{base}+{second}", f"{base}+{first}")
    measured_ = projection_energy(U, U, (0.5,), progress=False).record
    assert len(set(measured_.fingerprints)) == 2 and "" not in measured_.fingerprints
    assert not set(measured_.fingerprints) & set(found.fingerprints)
    assert difference(second, first).fingerprints != U.fingerprints  # adapters alone
    model = HookedModel(build("llama"), tiny.tokenizer())
    assert difference(model, model.model).fingerprints[0] == model.fingerprint
    assert made({"w": torch.zeros(2)}).fingerprints == ("", "")


def tied(folder: Path) -> str:
    model = build("gemma2")
    assert model.config.tie_word_embeddings
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("stored", [False, True])
def test_an_adapter_of_a_tied_head_is_refused_as_such(tmp_path: Path, stored: bool) -> None:
    from safetensors.torch import load_file, save_file

    base = tied(tmp_path / "tied")
    if stored:  # some files hold the head all the same
        file = tmp_path / "tied" / "model.safetensors"
        held = load_file(file)
        head = {"lm_head.weight": held["model.embed_tokens.weight"].clone()}
        save_file(held | head, file, metadata={"format": "pt"})
    given: dict[str, Any] = {"target_modules": ["lm_head", "q_proj"]}
    folder = adapter(tmp_path / "head", 1, "gemma2", **given)
    with pytest.raises(ValueError, match=r"lm_head.weight, which the model ties to model.embed"):
        difference(f"{base}+{folder}", base)
    plain = adapter(tmp_path / "plain", 1, "gemma2", target_modules=["q_proj"])
    assert difference(f"{base}+{plain}", base).factored


def test_a_rewritten_folder_holds_no_weights_but_the_edited(tmp_path: Path) -> None:
    base, aligned = tiny_lineage.save(tmp_path / "base"), tiny_lineage.save(tmp_path / "a", 1)
    old = ("tf_model.h5", "consolidated.00.pth", "model.Q8_0.gguf", "pytorch_model.bin", "flax.msgpack",
           "pytorch_model.bin.index.json", "model.onnx")  # fmt: skip
    for name in (*old, "merges.txt"):
        (Path(aligned) / name).write_text("as it was")
    V: Deltas = difference(aligned, base)
    written = write_edited(aligned, V, V, Projected(0.5), tmp_path / "out")
    names = {path.name for path in written.iterdir()}
    assert not names & set(old)
    assert {"merges.txt", "config.json", "tokenizer.json", "model.safetensors"} <= names
