"""Shortened patched passes are those of one prompt at a time, and what is equal changes nothing."""

from typing import Any

import pytest
import tiny
import tiny_lineage
import torch
from architectures import build
from torch import Tensor

from analyses.mechanisms.paths import path_map
from analyses.mechanisms.task import Task
from analyses.patching.cells import Cell
from analyses.patching.grid import patch_map
from analyses.patching.metrics import LogitDifference, RefusalLogOdds
from analyses.patching.patch import patch
from analyses.patching.patcher import Patcher
from analyses.patching.runs import Job, Runs, common
from analyses.patching.sources import From
from probes import HookedModel
from probes.sites import Site

METRIC = RefusalLogOdds((20, 21, 22))
SLIDING = ("gemma2", "gemma3-text", "gpt-oss", "cohere2")


def error(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def moved(architecture: str) -> HookedModel:
    """The same model with noise on its matrices."""
    model = build(architecture)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=generator)
    return HookedModel(model, tiny.tokenizer(), name="moved")


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("architecture", [*SLIDING, "llama"])
def test_shared_beginnings_give_the_logits_of_plain_single_prompts(
    architecture: str, seed: int
) -> None:
    """Requests of 2 to 9 words behind a template longer than the window of four tokens."""
    model, prompts = tiny.hooked(architecture), tiny.words(7, seed)
    patcher = Patcher(model, prompts, From(prompts=(*prompts[1:], prompts[0])), "last")
    assert patcher.settled().shared > 4 and patcher.notes == ()
    plain: Any = model.model
    with torch.no_grad():
        rows = [plain(torch.tensor([ids])).logits[0, -1] for ids in patcher.ids]
    assert error(patcher.target_logits, torch.stack(rows).float()) < 1e-5


@pytest.mark.parametrize("architecture", [*SLIDING, "llama"])
def test_patches_behind_a_shared_beginning_are_those_of_whole_single_prompts(
    architecture: str,
) -> None:
    model, source, prompts = tiny.hooked(architecture), moved(architecture), tiny.words(7, 1)
    short = Patcher(model, prompts, From(model=source))
    sites = ["0.mlp_out", "1.attn_out", "2.mlp_out"]
    cells = [Cell(short.checked(s), at) for s in sites for at in (None, "last", "content")]
    found = short.run(cells)
    assert short.runs.shared > 4 and short.runs.resume and short.notes == ()
    for i, prompt in enumerate(prompts):
        alone = Patcher(model, [prompt], From(model=source), batch_size=1, shorten=False)
        assert all(
            error(a[i : i + 1], b) < 1e-5 for a, b in zip(found, alone.run(cells), strict=True)
        )
        assert error(found[3][i : i + 1], alone.target_logits) > 1e-4


def test_padded_rows_behind_a_shared_beginning_are_those_of_whole_prompts() -> None:
    """Requests of 20 to 24 words, several lengths in one batch."""
    model = tiny.hooked("gemma2")
    ids = [r.ids for r in model.template.render_all(tiny.words(12, 2, 20, 24))]
    sites = [Site(2, "resid_post"), Site(1, "head_out")]
    shared, whole = (Runs(model, ids, shared=n) for n in (common(ids), 0))
    assert any(len({len(ids[i]) for i in chunk}) > 1 for chunk in shared.chunks)
    read, want = shared.read(sites), whole.read(sites)
    for site in sites:
        for a, b, own in zip(read[site], want[site], ids, strict=True):
            assert len(a) == len(b) == len(own)
            assert error(a.flatten(1), b.flatten(1)) < 1e-5
    every = Patcher(
        model, tiny.words(12, 2, 20, 24), From(prompts=tuple(tiny.words(12, 2, 20, 24)))
    )
    alone = torch.cat([Runs(model, [row]).logits([Job(0, 0)]) for row in ids])
    assert every.settled().shared > 4 and error(every.target_logits, alone) < 1e-5


def test_a_beginning_that_goes_wrong_without_any_patch_is_not_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Passes that start above the first block do not show it."""
    model, prompts = tiny_lineage.hooked("target"), tiny.words(7, 1)
    logits = Runs.logits

    def wrong(self: Runs, jobs: Any, first: int = 0, *args: Any, **more: Any) -> Tensor:
        found = logits(self, jobs, first, *args, **more)
        return found if first or not self.shared else 1.01 * found

    monkeypatch.setattr(Runs, "logits", wrong)
    source = From(model=tiny_lineage.hooked("source", 1, seed=1))
    patcher = Patcher(model, prompts, source)
    assert patcher.settled().shared == 0 and patcher.runs.resume
    assert len(patcher.notes) == 1 and "cannot share a beginning here" in patcher.notes[0]
    whole = Patcher(model, prompts, source, shorten=False)
    assert error(patcher.target_logits, whole.target_logits) < 1e-5


OPENED = [f"w1 w2 w3 w4 w{k}" + " w9" * (k % 3) for k in range(20, 32)]


def test_positions_that_cut_what_is_shared_leave_an_identity_exact() -> None:
    """Counted from the end, the same rule picks a token of the beginning in one prompt and none in
    another: less is shared, and all passes round as it then is."""
    model, twin = tiny_lineage.hooked("one"), tiny_lineage.hooked("two")
    columns = ["last", "tokens:-6:-5"]
    assert Patcher(model, OPENED, From(model=twin)).settled().shared == 10
    for source in (From(model=twin), From(prompts=tuple(OPENED))):
        found = patch_map(
            model, OPENED, source, METRIC, "positions", part="resid_post", columns=columns,
            draws=0, progress=False,
        )  # fmt: skip
        assert found.change.eq(0).all() and torch.equal(found.source, found.target)
    patcher = Patcher(model, OPENED, From(model=twin))
    patcher.run([Cell(patcher.checked("1.resid_post"), at) for at in columns])
    assert patcher.runs.shared < 10  # it was cut
    other = patch_map(
        model, OPENED, From(model=tiny_lineage.hooked("other", 1, seed=1)), METRIC, "positions",
        part="resid_post", columns=columns, draws=0, progress=False,
    )  # fmt: skip
    assert other.change[1].ne(0).all()


def test_a_refused_beginning_leaves_an_identity_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortening is given up before anything is measured."""
    model, twin = tiny_lineage.hooked("one"), tiny_lineage.hooked("two")
    entering = Runs._entering
    monkeypatch.setattr(Runs, "_entering", lambda *a: 1.01 * entering(*a))
    found = patch(model, OPENED, From(model=twin), "1.head_out", METRIC, draws=3, progress=False)
    assert len(found.notes) == 3 and "cannot start at a patched block" in found.notes[2]
    assert found.change.eq(0).all() and found.null_change.eq(0).all()


def test_paths_from_equal_values_are_exactly_zero() -> None:
    """The source's prompts begin alike for longer than what is shared of the target's."""
    n = 8
    clean = [f"w1 w2 w3 w{k} w5 w6" for k in range(20, 20 + n)]
    corrupt = [f"w1 w2 w3 w{k} w5 w7" for k in range(20, 20 + n)]
    metric = LogitDifference((30,) * n, (31,) * n)
    task = Task(
        "words", tuple(clean), tuple(corrupt), "a word", metric.answers, metric.others,
        tuple(map(str, range(n))), metric, True,
    )  # fmt: skip
    before = tuple(((6,) if k % 2 else (7,)) for k in range(n))  # the words that differ stand later
    found = path_map(
        tiny.hooked(), task, ["2.v"], senders_at=before, receivers_at=before, null=None,
        progress=False,
    )  # fmt: skip
    assert found.each[:2].eq(0).all() and found.change[:2].eq(0).all()
    every = path_map(tiny.hooked(), task, ["2.v"], null=None, progress=False)
    assert every.change[:2].ne(0).all()
