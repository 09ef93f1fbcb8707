"""Which token of one run takes its value from which token of another.

Prompts of equal length correspond token by token. Where lengths differ nothing is guessed: a rule
of `probes.positions` that picks as many tokens in both prompts, or spans with a name, say it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from probes import positions as places
from probes.positions import Positions
from probes.prompts import Rendered

Indices = tuple[tuple[int, ...], ...]
"""Token indices of each unpadded prompt, one tuple a prompt."""


@dataclass(frozen=True)
class Spans:
    """Stretches of text with the same names in the prompts of the target and of the source.

    `target["subject"][i]` is the text of that span in the i-th prompt; its last occurrence counts.
    Two spans must cover as many tokens as each other, unless only their last tokens are taken.
    """

    target: Mapping[str, Sequence[str]]
    source: Mapping[str, Sequence[str]]
    last_token_only: bool = False

    def __post_init__(self) -> None:
        if set(self.target) != set(self.source) or not self.target:
            raise ValueError(
                f"the spans of the target are named {sorted(self.target)}, those of the source "
                f"{sorted(self.source)}: give both the same names, at least one"
            )

    @property
    def text(self) -> str:
        names = ", ".join(self.target)
        return f"spans {names}" + (" (last token)" if self.last_token_only else "")


@dataclass(frozen=True)
class Alignment:
    """Tokens of each target prompt that are patched, and where their values come from."""

    target: tuple[tuple[int, ...], ...]
    """Token indices in the unpadded target prompt, ascending."""
    source: tuple[tuple[int, ...], ...]
    """The token of the source prompt that goes with each."""
    partner: tuple[int, ...]
    """The source prompt of each target prompt."""
    text: str
    """The rule in words."""


def align(
    target: Sequence[Rendered],
    source: Sequence[Rendered],
    positions: "str | Positions | Spans | Indices" = "all",
) -> Alignment:
    """Pair the tokens of the i-th target prompt with those of the i-th source prompt.

    Token indices name the same tokens of both.
    """
    if len(target) != len(source):
        raise ValueError(
            f"{len(target)} target prompts and {len(source)} source prompts: give one source "
            "prompt for each target prompt, in the same order"
        )
    pairs = [_pair(i, t, s, positions) for i, (t, s) in enumerate(zip(target, source, strict=True))]
    return Alignment(
        tuple(t for t, _ in pairs),
        tuple(s for _, s in pairs),
        tuple(range(len(pairs))),
        said(positions),
    )


def said(positions: "str | Positions | Spans | Indices") -> str:
    """Positions in words."""
    if isinstance(positions, str):
        return positions
    return "given tokens" if isinstance(positions, tuple) else positions.text


def chosen(positions: "str | Positions | Indices", rendered: Rendered, i: int) -> list[int]:
    """Token indices that a rule picks in the i-th prompt, or that were given for it; ascending."""
    if not isinstance(positions, tuple):
        return places.parse(positions).indices(rendered)
    if i >= len(positions):
        raise ValueError(
            f"token indices are given for {len(positions)} prompts: give them for every prompt"
        )
    found = sorted(set(positions[i]))
    bad = [k for k in found if not 0 <= k < len(rendered.ids)]
    if bad:
        raise ValueError(
            f"token {bad[0]} is given for prompt {i}, which has {len(rendered.ids)} tokens: count "
            "them from 0 in the rendered prompt"
        )
    return found


def agreed(sets: Sequence[Sequence[int]], bound: int) -> int:
    """How many of the first tokens lie in all of these sets or in none of them."""
    known = [set(tokens) for tokens in sets]
    for token in range(bound):
        if len({token in tokens for tokens in known}) > 1:
            return token
    return bound


def align_ends(
    target: Sequence[Rendered],
    source: Sequence[Rendered],
    partner: Sequence[int],
    positions: "str | Positions | Indices" = "all",
) -> Alignment:
    """Pair prompts that have nothing to do with each other: what both begin with token by token,
    the rest from the last token backwards; what the shorter one lacks is not patched."""
    rule = positions if isinstance(positions, tuple) else _rule(positions)
    found = []
    for i, j in enumerate(partner):
        t, s = target[i].ids, source[j].ids
        same = 0
        while same < min(len(t), len(s)) and t[same] == s[same]:
            same += 1
        rest = min(len(t), len(s)) - same
        pairs = {k: k for k in range(same)}
        pairs |= {len(t) - k: len(s) - k for k in range(1, rest + 1)}
        picked = sorted(set(chosen(rule, target[i], i)) & pairs.keys())
        found.append((tuple(picked), tuple(pairs[k] for k in picked)))
    return Alignment(
        tuple(t for t, _ in found), tuple(s for _, s in found), tuple(partner), said(rule)
    )


def _rule(positions: str | Positions) -> Positions:
    rule = places.parse(positions)
    if rule.mean:
        raise ValueError(
            f"positions={rule.text!r} takes a mean, and a patch needs a value for each token: "
            f"write {rule.text.partition(':')[2]!r}"
        )
    return rule


def _pair(
    i: int,
    target: Rendered,
    source: Rendered,
    positions: "str | Positions | Spans | Indices",
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(positions, Spans):
        return _of_spans(i, target, source, positions)
    if isinstance(positions, tuple):
        both = tuple(chosen(positions, target, i))
        chosen(positions, source, i)
        return both, both
    rule = _rule(positions)
    t, s = rule.indices(target), rule.indices(source)
    if len(t) != len(s):
        raise ValueError(
            f"positions={rule.text!r} picks {len(t)} tokens of target prompt {i} "
            f"({len(target.ids)} tokens long) and {len(s)} of its source prompt "
            f"({len(source.ids)} tokens long): give prompts of equal length, positions='last', or "
            "Spans that name what corresponds"
        )
    return tuple(t), tuple(s)


def _of_spans(
    i: int, target: Rendered, source: Rendered, spans: Spans
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pairs: dict[int, int] = {}
    for name in spans.target:
        found = []
        for side, rendered, texts in (
            ("target", target, spans.target[name]),
            ("source", source, spans.source[name]),
        ):
            if i >= len(texts):
                raise ValueError(
                    f"span {name!r} of the {side} has {len(texts)} texts: give one for each prompt"
                )
            at = rendered.text.rfind(texts[i]) if texts[i] else -1
            tokens = [] if at < 0 else rendered.tokens_in(at, at + len(texts[i]))
            if not tokens:
                raise ValueError(
                    f"span {name!r} of {side} prompt {i} is {texts[i]!r}, which "
                    f"{rendered.text[:60]!r} does not hold: give a text of the prompt"
                )
            found.append(tokens[-1:] if spans.last_token_only else tokens)
        t, s = found
        if len(t) != len(s):
            raise ValueError(
                f"span {name!r} of prompt {i} has {len(t)} tokens in the target and {len(s)} in "
                "the source: give spans of equal length, or last_token_only=True"
            )
        if pairs.keys() & set(t):
            raise ValueError(
                f"span {name!r} of target prompt {i} overlaps another span: give each token once"
            )
        pairs |= dict(zip(t, s, strict=True))
    order = sorted(pairs)
    return tuple(order), tuple(pairs[k] for k in order)
