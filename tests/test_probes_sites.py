"""Site addresses: text forms, ranges, order, refusals."""

import random
import subprocess
import sys

import pytest

from probes.sites import HEADED, PARTS, READ_ONLY, Site, Unsupported, expand

N = 6


def texts(sites: tuple[Site, ...]) -> list[str]:
    return [str(site) for site in sites]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layer", [0, 11, -1])
def test_text_and_site_are_inverse(part: str, layer: int) -> None:
    for head in (None, 0, 13) if part in HEADED else (None,):
        site = Site(layer, part, head)
        assert Site.parse(str(site)) == site
        assert Site.parse(f" {site}\n") == site


def test_the_text_form_is_the_documented_one() -> None:
    assert Site.parse("12.resid_post") == Site(12, "resid_post")
    assert Site.parse("7.head_out.3") == Site(7, "head_out", 3)
    assert str(Site(7, "head_out", 3)) == "7.head_out.3"


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all.resid_post", [0, 1, 2, 3, 4, 5]),
        ("2-4.resid_post", [2, 3, 4]),
        ("2-2.resid_post", [2]),
        ("0,4,2.resid_post", [0, 2, 4]),
        ("0-1,3,-1.resid_post", [0, 1, 3, 5]),
        ("-1,-6.resid_post", [0, 5]),
        ("0-5.resid_post", [0, 1, 2, 3, 4, 5]),
        (" 3.resid_post ", [3]),
    ],
)
def test_ranges(text: str, layers: list[int]) -> None:
    assert [site.layer for site in expand(text, N)] == layers


def test_heads_of_ranges() -> None:
    assert texts(expand("1-2.q.3", N)) == ["1.q.3", "2.q.3"]


def test_doubles_are_dropped_and_kinds_may_be_mixed() -> None:
    found = expand(["0-2.q", Site(1, "q"), Site(-5, "q"), "1.q"], N)
    assert texts(found) == ["0.q", "1.q", "2.q"]
    assert expand(Site(-1, "q"), N) == (Site(5, "q"),)


def test_sites_come_in_forward_order() -> None:
    ordered = [Site(layer, part) for layer in range(3) for part in PARTS]
    ordered.insert(ordered.index(Site(1, "q")) + 1, Site(1, "q", 0))
    ordered.insert(ordered.index(Site(1, "q", 0)) + 1, Site(1, "q", 1))
    shuffled = ordered.copy()
    random.Random(0).shuffle(shuffled)
    assert shuffled != ordered
    assert list(expand(shuffled, 3)) == ordered


def test_parts_with_a_meaning() -> None:
    assert set(PARTS) >= HEADED | READ_ONLY
    assert all(PARTS.values())
    assert issubclass(Unsupported, ValueError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read site ''"),
        ("resid_post", "expected LAYER.PART"),
        ("3.resid_post.x", "cannot read site"),
        ("3..resid_post", "cannot read site"),
        ("3-.resid_post", "cannot read site"),
        ("1,,2.resid_post", "cannot read site"),
        ("3.RESID", "cannot read site"),
        ("3.stream", "unknown part 'stream': choose one of resid_pre,"),
        ("3.mlp_out.1", "'mlp_out' has no heads: write '3.mlp_out' without '.1'"),
        ("4-2.q", "layer range '4-2' runs backwards: write '2-4'"),
        ("-3-1.q", "layer range '-3-1' starts at the end"),
        ("-2-5.q", "starts at the end: ranges count from 0, or list the layers"),
        ("6.q", "site 6.q is out of range: the model has 6 layers, 0 to 5"),
        ("-7.q", "site -7.q is out of range"),
        ("0-9.q", "out of range"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        expand(text, N)
    assert message in str(caught.value)


def test_one_site_is_not_a_range() -> None:
    for text in ("all.q", "0-3.q", "0,3.q"):
        with pytest.raises(ValueError, match="cannot read site"):
            Site.parse(text)


def test_a_negative_head_is_refused() -> None:
    with pytest.raises(ValueError, match="heads are counted from 0"):
        Site(0, "q", -1)


def test_no_sites_at_all() -> None:
    with pytest.raises(ValueError, match="no sites given"):
        expand([], N)


def test_out_of_range_in_a_site_object() -> None:
    with pytest.raises(ValueError, match="0 to 5 \\(or -1 to -6 from the end\\)"):
        expand(Site(-7, "q"), N)


def test_addresses_need_no_torch() -> None:
    code = "import sys, probes.sites; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
