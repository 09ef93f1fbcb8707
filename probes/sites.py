"""Addresses of activations: `12.resid_post`, `7.head_out.3`, and ranges of them. No torch here."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

PARTS = {
    "resid_pre": "the residual stream that enters the block",
    "resid_mid": "the stream between attention and MLP (sequential blocks only)",
    "resid_post": "the stream that leaves the block",
    "attn_out": "what attention (or the state-space mixer) adds to the stream",
    "mlp_out": "what the MLP adds to the stream",
    "remainder": "resid_post - resid_pre - attn_out - mlp_out; zero in most architectures",
    "head_out": "head outputs before the attention output projection, per query head",
    "q": "query projections before any norm and before rotary, per query head",
    "k": "key projections before any norm and before rotary, per key-value head",
    "v": "value projections, per key-value head",
    "pattern": "attention probabilities, per query head (read only); rows sum to 1, to less where "
    "a sink takes its share (GPT-OSS)",
}
"""The parts of a block that have an address, with their meaning."""

HEADED = frozenset({"head_out", "q", "k", "v", "pattern"})
"""Parts with a head axis; a site may name one head of them."""

READ_ONLY = frozenset({"pattern", "remainder"})
"""Parts that can be read but not edited."""

_FORM = re.compile(
    r"(?P<layers>all|-?\d+(?:-\d+)?(?:,-?\d+(?:-\d+)?)*)\.(?P<part>[a-z_]+)(?:\.(?P<head>\d+))?"
)
_ORDER = {part: i for i, part in enumerate(PARTS)}


class Unsupported(ValueError):
    """This engine or architecture has no such activation; the message says why."""


@dataclass(frozen=True)
class Site:
    """One activation: a block, a part of it, and for parts with heads optionally one head.

    `layer` counts blocks from 0; a negative layer counts from the end and must be resolved with
    `resolve` before use. `str(site)` is the text form and `Site.parse` its inverse.
    """

    layer: int
    part: str
    head: int | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"unknown part {self.part!r}: choose one of {', '.join(PARTS)}")
        if self.head is not None and self.part not in HEADED:
            raise ValueError(
                f"{self.part!r} has no heads: write '{self.layer}.{self.part}' without "
                f"'.{self.head}', or use one of {', '.join(sorted(HEADED))}"
            )
        if self.head is not None and self.head < 0:
            raise ValueError(f"head {self.head} of site {self}: heads are counted from 0")

    def __str__(self) -> str:
        return f"{self.layer}.{self.part}" + ("" if self.head is None else f".{self.head}")

    def __lt__(self, other: "Site") -> bool:
        """Forward order by layer, then by part as in `PARTS`, then by head."""
        return self._key < other._key

    @property
    def _key(self) -> tuple[int, int, int]:
        return self.layer, _ORDER[self.part], -1 if self.head is None else self.head

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read one site from its text form; a range is refused."""
        match = _FORM.fullmatch(text.strip())
        if match is None or not re.fullmatch(r"-?\d+", match["layers"]):
            raise ValueError(_bad_form(text))
        head = match["head"]
        return cls(int(match["layers"]), match["part"], None if head is None else int(head))

    def resolve(self, n_layers: int) -> "Site":
        """The same site with a layer counted from 0; out of range is an error."""
        layer = self.layer + n_layers if self.layer < 0 else self.layer
        if not 0 <= layer < n_layers:
            raise ValueError(
                f"site {self} is out of range: the model has {n_layers} layers, "
                f"0 to {n_layers - 1} (or -1 to -{n_layers} from the end)"
            )
        return Site(layer, self.part, self.head)


Sites = str | Site | Iterable[str | Site]
"""What functions accept as sites: one or several, as `Site`, text or range text."""


def expand(sites: Sites, n_layers: int) -> tuple[Site, ...]:
    """All sites named, resolved, without doubles, in forward order.

    Text may hold ranges and lists of layers: `"8-20.resid_post"`, `"0,4,8.resid_post"`,
    `"all.head_out"`, `"-1.resid_post"`.
    """
    items = [sites] if isinstance(sites, str | Site) else list(sites)
    found: set[Site] = set()
    for item in items:
        if isinstance(item, Site):
            found.add(item.resolve(n_layers))
            continue
        match = _FORM.fullmatch(item.strip())
        if match is None:
            raise ValueError(_bad_form(item))
        head = None if match["head"] is None else int(match["head"])
        for layer in _layers(match["layers"], n_layers):
            found.add(Site(layer, match["part"], head).resolve(n_layers))
    if not found:
        raise ValueError("no sites given: name at least one, for example 'all.resid_post'")
    return tuple(sorted(found))


def _layers(text: str, n_layers: int) -> list[int]:
    if text == "all":
        return list(range(n_layers))
    layers: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"(-?\d+)(?:-(\d+))?", piece)
        assert match is not None  # _FORM allows nothing else
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if first < 0 and match[2] is not None:
            raise ValueError(
                f"layer range {piece!r} starts at the end: ranges count from 0, or list the "
                "layers, for example '-3,-2,-1'"
            )
        if last < first:
            raise ValueError(f"layer range {piece!r} runs backwards: write '{last}-{first}'")
        layers += range(first, last + 1)
    return layers


def _bad_form(text: str) -> str:
    return (
        f"cannot read site {text!r}: expected LAYER.PART or LAYER.PART.HEAD, for example "
        "'12.resid_post', '7.head_out.3', '8-20.resid_post' or 'all.head_out'"
    )
