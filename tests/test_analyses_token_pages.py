"""The page of each prompt: what it says, that nothing in it runs but its script, and how it is
driven in a browser."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_lineage
import torch

from analyses.tokens import pages
from analyses.tokens.pages import jaccard, write_pages
from analyses.tokens.shares import KINDS
from analyses.tokens.shift import token_shift
from analyses.tokens.shift_result import TokenShift
from probes import HookedModel

NASTY = (
    "</script><script>document.title='owned'</script>",
    '<img src=x onerror="document.title=1">',
    "\"quoted\" 'single' & {{ 7 * 7 }} `${1}`",
    "line\u2028separator\u2029and \\u003c",
)
LONG = "pneumono" * 30


@pytest.fixture(scope="module")
def shift() -> TokenShift:
    """Answers of a tiny model, of which some tokens are dangerous to print."""
    base, aligned = tiny_lineage.hooked("first"), tiny_lineage.hooked("second", 1, seed=4)
    found = token_shift(base, aligned, tiny.words(6, seed=5), ["a", "b"] * 3, max_new_tokens=14)
    first = ("", "\n", " ", *NASTY, LONG, *found.tokens[0][8:])
    strings = {**found.strings}
    for key, text in zip(
        sorted({str(int(i)) for i in found.top_base[:9].flatten()}), (*NASTY, LONG), strict=False
    ):
        strings[key] = text
    return dataclasses.replace(
        found,
        prompts=(f"{' '.join(NASTY)} {LONG}", *found.prompts[1:]),
        tokens=(tuple(f" {t}" if i > 7 else t for i, t in enumerate(first)), *found.tokens[1:]),
        strings=strings,
    )


@pytest.fixture(scope="module")
def index(shift: TokenShift, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pages(shift, tmp_path_factory.mktemp("pages"))


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL
    )
    return json.loads(found)


def test_there_is_a_page_for_each_prompt_and_an_index(shift: TokenShift, index: Path) -> None:
    folder = index.parent
    assert sorted(p.name for p in folder.iterdir()) == [
        *(f"answer-{n:04d}.html" for n in range(1, 7)), "index.html",
    ]  # fmt: skip
    said = index.read_text(encoding="utf-8")
    assert re.findall(r'href="(.*?)"', said) == [f"answer-{n:04d}.html" for n in range(1, 7)]
    middle = (folder / "answer-0003.html").read_text(encoding="utf-8")
    assert re.findall(r'href="(.*?)"', middle) == [
        "index.html", "answer-0002.html", "answer-0004.html",
    ]  # fmt: skip
    assert "<script>" not in said


def test_the_numbers_are_those_of_the_shift(shift: TokenShift, index: Path) -> None:
    start = 0
    for n, count in enumerate(shift.counts, 1):
        page = index.parent / f"answer-{n:04d}.html"
        data, text = data_of(page), page.read_text(encoding="utf-8")
        assert len(data["tokens"]) == count
        assert [t["kind"] for t in data["tokens"]] == [
            KINDS[k] for k in shift.kinds[start : start + count]
        ]
        for at, token in enumerate(data["tokens"], start):
            rank, again, lp, lq, kl, reverse, js, share = token["numbers"]
            assert (int(rank), int(again)) == (int(shift.ranks[at]), int(shift.aligned_ranks[at]))
            for shown, value in (
                (lp, shift.logp_base), (lq, shift.logp_aligned), (kl, shift.kl),
                (reverse, shift.reverse_kl), (js, shift.js),
            ):  # fmt: skip
                assert float(shown.removesuffix(" nats")) == pytest.approx(
                    float(value[at]), abs=6e-4
                )
            one, two = shift.top_base[at].tolist(), shift.top_aligned[at].tolist()
            both = len([i for i in one if i in two])
            assert float(share) == pytest.approx(both / (20 - both), abs=6e-3)
            for side, ids, p in (
                ("base", one, shift.top_base_p[at]), ("aligned", two, shift.top_aligned_p[at]),
            ):  # fmt: skip
                assert [row[2] for row in token[side]] == [i == int(shift.ids[at]) for i in ids]
                percent = [float(row[1].replace("<", "")) for row in token[side]]
                assert percent == pytest.approx((100 * p).tolist(), abs=6e-3)
        wavy = sum(
            int(shift.top_base[at, 0]) != int(shift.ids[at]) for at in range(start, start + count)
        )
        assert len(re.findall(r'class="t \w+ other"', text)) == wavy
        start += count
    assert jaccard(torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5])) == 1 / 5


def test_everything_is_escaped_and_only_the_own_script_is_let_through(index: Path) -> None:
    text = (index.parent / "answer-0001.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<script", text)) == 2 and "<img" not in text
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in ("script", "style"):
        (inside,) = re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
        own = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{own}'" in policy
    data = text[text.index('id="data">') :].partition("</script>")[0]
    assert "<" not in data and "\u2028" not in data
    assert not re.search(r"\son\w+=", re.sub(r"&.*?;", "", text.partition("<body>")[2].partition("<script")[0]).replace("src=x onerror=", ""))  # fmt: skip


def test_limit_record_and_leftovers(shift: TokenShift, tmp_path: Path) -> None:
    write_pages(shift, tmp_path)
    (tmp_path / "answer-notes.html").write_text("mine")
    record = dataclasses.replace(shift.record, command="a command <b>")
    index = write_pages(shift, tmp_path, record, limit=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "answer-0001.html", "answer-0002.html", "answer-notes.html", "index.html",
    ]  # fmt: skip
    assert "a command &lt;b&gt;" in index.read_text(encoding="utf-8")
    before = index.read_bytes()
    assert write_pages(shift, tmp_path, record, limit=1).read_bytes() == before
    with pytest.raises(ValueError, match="ask for a page or more"):
        write_pages(shift, tmp_path, limit=0)


def browser_path() -> str:
    for name in (os.environ.get("BROWSER"), "chromium", "google-chrome", "chromium-browser"):
        if name and (found := shutil.which(name)):
            return found
    pytest.fail("no browser found: install Debian's chromium or set BROWSER=/path/to/chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    quiet = ["disable-gpu", "no-first-run", "no-sandbox", "disable-component-update"]
    quiet += ["disable-background-networking", "disable-sync", "disable-quic"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=browser_path(), args=[f"--{option}" for option in quiet]
        )
        yield opened
        opened.close()


@pytest.fixture(params=(1100, 360))
def view(request: pytest.FixtureRequest, browser: Any, index: Path) -> Iterator[tuple[Any, list]]:
    """The first page, and what it asked for or complained of."""
    window = browser.new_page(viewport={"width": request.param, "height": 760})
    heard: list[str] = []
    window.on("request", lambda asked: heard.append(asked.url))
    window.on("console", lambda said: heard.append(f"console {said.text}"))
    window.on("pageerror", lambda error: heard.append(f"error {error}"))
    window.goto((index.parent / "answer-0001.html").as_uri(), wait_until="load")
    yield window, heard
    window.close()


@pytest.mark.slow
def test_a_token_opens_both_lists_and_keys_move(
    view: tuple[Any, list], shift: TokenShift, index: Path
) -> None:
    window, heard = view
    tokens, panel = window.locator(".tokens .t"), window.locator("#panel")
    assert panel.is_hidden() and tokens.count() == shift.counts[0]
    tokens.nth(9).click()
    assert panel.is_visible()
    assert window.locator("#which").inner_text().startswith(f"Token 10 of {shift.counts[0]}")
    for side, caption in (("left", shift.reader), ("right", shift.aligned)):
        assert window.locator(f"#{side} tbody tr").count() == 10
        assert window.locator(f"#{side} caption").inner_text() == caption
    left, right = (window.locator(f"#{side}").bounding_box() for side in ("left", "right"))
    assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 1
    assert window.locator("#numbers dt").count() == 8
    assert window.locator("#right tr.emitted").count() == 1  # greedy: it is the first choice
    assert "◄" in window.locator("#right tr.emitted").inner_text()

    def which() -> str:
        return window.locator("#which").inner_text().partition(":")[0]

    n = shift.counts[0]
    for key, place in (("ArrowRight", 11), ("ArrowLeft", 10), ("Home", 1), ("ArrowLeft", 1), ("End", n)):  # fmt: skip
        window.keyboard.press(key)
        assert which() == f"Token {place} of {n}"
    window.keyboard.press("Escape")
    assert panel.is_hidden()
    window.keyboard.press("ArrowLeft")
    assert panel.is_hidden()  # moves without opening
    window.keyboard.press("Enter")
    assert panel.is_visible() and which() == f"Token {n - 1} of {n}"
    assert window.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    token = window.evaluate(
        "(r => [r.top, r.bottom])(document.activeElement.getBoundingClientRect())"
    )
    assert token[1] <= panel.bounding_box()["y"] + 1  # not hidden behind the panel
    window.locator("#close").click()
    assert panel.is_hidden()
    assert [h for h in heard if not h.startswith("file:")] == []
    assert len(heard) == 1


@pytest.mark.slow
def test_nothing_runs_overflows_or_hides(view: tuple[Any, list], index: Path) -> None:
    window, heard = view
    assert "Answer 1 of 6" in window.title()
    shown = window.inner_text("main")
    for text in (NASTY[0], NASTY[1], NASTY[2], LONG):
        assert text in shown
    assert window.locator("img").count() == 0 and window.locator("script").count() == 2
    window.locator(".tokens .t").nth(3).click()
    width = window.viewport_size["width"]
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    assert window.evaluate(
        "(p => p.scrollWidth <= p.clientWidth)(document.getElementById('panel'))"
    )
    window.screenshot(path=str(index.parent.parent / f"page-{width}.png"))
    window.emulate_media(media="print")
    assert window.locator("nav").is_hidden() and window.locator(".tokens").is_visible()
    window.screenshot(path=str(index.parent.parent / f"print-{width}.png"), full_page=True)
    assert [h for h in heard if not h.startswith("file:")] == []


@pytest.mark.slow
def test_kinds_differ_without_colour_and_are_legible(view: tuple[Any, list]) -> None:
    window, _ = view
    looks = window.evaluate(
        """[...document.querySelectorAll('.key .t')].map(e => {
             const s = getComputedStyle(e);
             return [s.borderBottomStyle + s.borderBottomWidth, s.color, s.backgroundColor];})"""
    )
    assert len({look[0] for look in looks}) == 3 and len({look[1] for look in looks}) == 3

    def luminance(colour: str) -> float:
        parts = [float(x) / 255 for x in re.findall(r"[\d.]+", colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for _, ink, paper in looks:
        under = 1.0 if paper == "rgba(0, 0, 0, 0)" else luminance(paper)
        assert (under + 0.05) / (luminance(ink) + 0.05) > 4.5  # WCAG AA
    assert "wavy" in window.evaluate(
        "getComputedStyle(document.querySelector('.key .other')).textDecorationStyle"
    )


@pytest.mark.slow
def test_a_foreign_script_is_stopped_by_the_policy(
    browser: Any, index: Path, tmp_path: Path
) -> None:
    """The control of the escaping: were something let through, the policy would stop it."""
    page = tmp_path / "attacked.html"
    text = (index.parent / "answer-0001.html").read_text(encoding="utf-8")
    page.write_text(text.replace("<main>", f"<main>{NASTY[0]}{NASTY[1]}"), encoding="utf-8")
    window = browser.new_page()
    said: list[str] = []
    window.on("console", lambda line: said.append(line.text))
    window.goto(page.as_uri(), wait_until="load")
    assert "Answer 1 of 6" in window.title()
    assert any("Content Security Policy" in line for line in said)
    window.locator(".tokens .t").first.click()
    assert window.locator("#panel").is_visible()  # the page's own still runs
    window.close()


def test_a_model_against_itself_is_all_unshifted(tmp_path: Path) -> None:
    one: HookedModel = tiny_lineage.hooked("first")
    shift = token_shift(one, one, tiny.words(2, seed=5), ["a", "a"], max_new_tokens=5)
    write_pages(shift, tmp_path)
    for token in data_of(tmp_path / "answer-0001.html")["tokens"]:
        assert token["kind"] == "unshifted" and token["numbers"][4:] == ["0.000 nats"] * 3 + [
            "1.00"
        ]
        assert [row[:2] for row in token["base"]] == [row[:2] for row in token["aligned"]]
    assert pages._shown(" a\n") == "␣a⏎" and pages._shown("  ") == "␣␣"
