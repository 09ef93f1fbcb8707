"""The report on the built-in lineage, looked at in a browser, and on tiny models, twice."""

import csv
import dataclasses
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_lineage
import torch

from analyses import page as pages
from analyses import summary
from analyses.pairs import pairs
from analyses.report import Report, Size, measure, run
from analyses.tokens import contexts
from analyses.tokens.shift import KINDS
from probes import datasets

TINY = Size(18, 6, 12, 4, 3, 8, 4, 20, 10)
SCRIPT = "<script>alert(1)</script>"
LONG = "pneumono" * 30
WIDTHS = (1280, 420)


def pairs_file(folder: Path) -> Path:
    """Shipped twins as a user's file; what the page will show holds a script and a long word."""
    rows = [
        {"topic": t["topic"], "positive": t["harmful"], "negative": t["harmless"]}
        for t in datasets.twins("test")[:30]
    ]
    path = folder / "own pairs.jsonl"

    def write() -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write()
    parts, _, _ = pairs(str(path), TINY, 0)
    shown = set(parts["test"].limited(TINY.answered).limited(TINY.shifted).topics)
    for row in rows:
        if row["topic"] in shown:
            row["positive"] += f' {SCRIPT} <img src=x onerror="alert(2)"> & "quoted", $5'
            row["negative"] += f" {LONG}"
    write()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* groups")
        source = str(pairs_file(folder))
        return run(drifted=["builtin:drifted"], prompts=source, size=TINY, device="cpu")


@pytest.fixture(scope="module")
def page(report: Report, folder: Path) -> Path:
    return pages.write(report, folder / "out")


def browser_path() -> str:
    for name in (os.environ.get("BROWSER"), "chromium", "google-chrome", "chromium-browser"):
        if name and (found := shutil.which(name)):
            return found
    pytest.fail("no browser found: install Debian's chromium or set BROWSER=/path/to/chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = browser_path()
    quiet = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    quiet += ["no-sandbox", "disable-component-update", "disable-sync"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=path, args=[f"--{option}" for option in quiet]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=WIDTHS)
def view(request: pytest.FixtureRequest, browser: Any, page: Path) -> Iterator[tuple[Any, list]]:
    """The page in a window of one width, and what it asked for while it loaded."""
    window = browser.new_page(viewport={"width": request.param, "height": 900})
    heard: list[str] = []
    window.on("request", lambda asked: heard.append(asked.url))
    window.on("dialog", lambda dialog: (heard.append("dialog"), dialog.dismiss()))
    window.on("pageerror", lambda error: heard.append(f"error {error}"))
    window.goto(page.resolve().as_uri(), wait_until="load")
    window.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    window.screenshot(path=str(page.parent / f"page-{request.param}.png"), full_page=True)
    yield window, heard
    window.close()


OUTSIDE = """() => {
  const wide = document.documentElement.clientWidth;
  return [...document.body.querySelectorAll('*')]
    .filter(e => !e.parentElement.closest('.scroll') && !e.closest('pre'))
    .filter(e => [...e.getClientRects()].some(r => r.right > wide + 0.5 || r.left < -0.5))
    .map(e => e.tagName + '.' + e.className);
}"""


@pytest.mark.slow
def test_the_page_fits_the_window(view: tuple[Any, list]) -> None:
    window, _ = view
    size = window.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert size[0] <= size[1]
    assert window.evaluate(OUTSIDE) == []


@pytest.mark.slow
def test_prompts_are_text_and_nothing_runs_or_is_loaded(view: tuple[Any, list]) -> None:
    window, heard = view
    shown = window.inner_text("main")
    assert SCRIPT in shown
    assert '<img src=x onerror="alert(2)">' in shown
    assert LONG in shown
    assert window.locator("script").count() == 0
    assert window.locator("img").count() == 8
    assert heard
    assert {url.partition(":")[0] for url in heard} <= {"file", "data"}


@pytest.mark.slow
def test_every_figure_is_there(view: tuple[Any, list]) -> None:
    window, _ = view
    widths = window.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert len(widths) == 8
    assert min(widths) > 0
    alternatives = window.evaluate("[...document.images].map(i => i.alt)")
    assert all(alternatives)
    assert len(set(alternatives)) == 8


@pytest.mark.slow
def test_tokens_are_coloured_by_kind(view: tuple[Any, list], report: Report) -> None:
    window, _ = view
    for k, kind in enumerate(KINDS):
        count = window.locator(f".tokens span.t.{kind}").count()
        assert count == int((report.tokens.kinds == k).sum())
        assert window.locator(f".key span.{kind}").count() == 1
    marked = window.evaluate(
        """[...new Set([...document.querySelectorAll('.key .t')].map(e => {
             const s = getComputedStyle(e);
             return s.backgroundColor + ' ' + s.borderBottomStyle;}))]"""
    )
    assert len(marked) == 3  # colour and line differ, so that colour is not needed


@pytest.mark.slow
def test_the_report_says_what_there_was(report: Report, page: Path) -> None:
    said = page.read_text(encoding="utf-8")
    assert (report.size.train, report.size.test, report.size.tokens) == (18, 6, 8)
    assert f"{report.size.test} to measure" in said
    assert any("only 6 test topics" in note for note in report.notes)
    assert "own pairs" in said
    assert report.record.settings["threads"] == torch.get_num_threads() == 1
    assert report.separation.first_changed(report.tokens.aligned) == 10
    assert not bool(report.separation.unchanged[1, 10:].any())
    below = report.separation.cosine[1, :10]
    assert torch.equal(below, torch.ones_like(below))
    panels = "a-refusals b-token-shift c-probes d-separation e-maps f-steering g-weights h-drift"
    for name in panels.split():
        assert (page.parent / f"{name}.png").stat().st_size > 10_000
        assert "<script" not in (page.parent / f"{name}.svg").read_text()
    rows = list(csv.DictReader(io.StringIO((page.parent / "table.csv").read_text())))
    assert {row["panel"] for row in rows} == set("abcdfgh")
    within = [r for r in rows if r["low"]]
    assert all(float(r["low"]) <= float(r["value"]) + 1e-6 for r in within)
    assert all(float(r["high"]) >= float(r["value"]) - 1e-6 for r in within)


def tiny_report(seed: int = 0, base_context: str = "same") -> Report:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* groups")
        parts = tiny_lineage.pairs().split(seed=seed)
        size = Size(24, 8, 12, 6, 6, 6, 6, 20, 1)
        parts = {
            "train": parts["train"].limited(24),
            "validation": parts["validation"].limited(8),
            "test": parts["test"].limited(12),
        }
        found = tiny_lineage.checkpoints()
        classes = ("w7", 'w8, "the other"')
        return measure(found, parts, classes, "words", size, seed, base_context=base_context)


@pytest.fixture(scope="module")
def small() -> Report:
    return tiny_report()


def test_the_same_run_writes_the_same_bytes(small: Report, tmp_path: Path) -> None:
    for name, found in (("one", small), ("two", tiny_report())):
        pages.write(found, tmp_path / name)
    files = sorted(
        p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()
    )
    assert len(files) > 20
    for file in files:
        if file != Path("record.json"):  # the only place for times
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    other = pages.write(tiny_report(seed=1), tmp_path / "three").parent
    assert (other / "table.csv").read_bytes() != (tmp_path / "one" / "table.csv").read_bytes()


def test_the_table_is_csv_whatever_the_names(small: Report, tmp_path: Path) -> None:
    folder = pages.write(small, tmp_path / "out").parent
    rows = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    kept = json.loads((folder / "result.json").read_text())["table"]
    assert len(rows) == len(kept)
    assert {r["group"] for r in rows if r["panel"] == "a"} == {"w7", 'w8, "the other"'}
    for row, other in zip(rows, kept, strict=True):
        assert float(row["value"]) == pytest.approx(other["value"], rel=1e-5)
        assert row["group"] == other["group"]


def test_the_summary_claims_only_what_the_intervals_allow(small: Report) -> None:
    shift = small.tokens

    def said(first: int, second: int) -> str:
        """The sentence when all tokens of the two groups have these ranks."""
        owner = [g for g, answer in zip(shift.groups, shift.tokens, strict=True) for _ in answer]
        ranks = torch.tensor([first if g == "w7" else second for g in owner])
        changed = dataclasses.replace(small, tokens=dataclasses.replace(shift, ranks=ranks))
        return summary.sentences(changed)[1]

    assert "concentrated on w7" in said(9, 1)
    assert 'concentrated on w8, "the other"' in said(1, 9)
    assert "no difference" in said(9, 9)


def test_the_context_of_the_base_is_said_and_changes_panel_b_only(
    small: Report, tmp_path: Path
) -> None:
    other = tiny_report(base_context="minimal")
    hashes = set()
    for name, found in (("same", small), ("minimal", other)):
        folder = pages.write(found, tmp_path / name).parent
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert (contexts.sentence("same", "first", "second") in page) == (name == "same")
        assert ("base context &#39;minimal&#39;" in page) == (name == "minimal")
        assert ("Only panel b is measured so" in page) == (name == "minimal")
        assert ("(context minimal)" in summary.sentences(found)[1]) == (name == "minimal")
        assert json.loads((folder / "result.json").read_text())["base_context"] == name
        for file in (folder, folder / "results" / "tokens"):
            settings = json.loads((file / "record.json").read_text())["settings"]
            assert settings["base_context"] == name
            hashes.add(settings["base_prompts_hash"])
    assert len(hashes) == 2
    assert not torch.equal(small.tokens.p_base, other.tokens.p_base)
    assert torch.equal(small.tokens.p_aligned, other.tokens.p_aligned)
    assert small.refusals.answers == other.refusals.answers
    assert torch.equal(small.separation.distance, other.separation.distance)
    for (_, one), (_, two) in zip(small.sweeps, other.sweeps, strict=True):
        assert torch.equal(one.auroc, two.auroc)
    assert small.record.template_hash == other.record.template_hash


def test_a_file_that_is_not_pairs_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="holds plain prompts"):
        pairs(str(plain), TINY, 0)
    labelled = tmp_path / "labelled.jsonl"
    rows = [{"prompt": f"w{i}", "label": i % 2} for i in range(60)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="not made of pairs"):
        pairs(str(labelled), TINY, 0)
