"""Which tokens of a prompt are read, said in words and found from the tokens themselves.

last                  the last token of the prompt (the default)
all                   every token
content               the last user message
instruction_end       what the template puts after the last user message
after:TEXT            the first token after the last occurrence of TEXT
generated             the tokens of the answer
thinking              the tokens inside <think> ... </think>
after_thinking        what follows </think>
tokens:START:STOP     a slice of the tokens, as in Python
mean:ANY OF THESE     their mean
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from probes.prompts import Rendered

THINKING = re.compile(r"<think>(.*?)(</think>|$)", re.DOTALL)


@dataclass(frozen=True)
class Positions:
    """A rule that picks tokens, and whether their mean is taken."""

    text: str
    find: Callable[[Rendered], Sequence[int]]
    mean: bool = False

    def indices(self, rendered: Rendered) -> list[int]:
        """Token indices in the unpadded prompt, ascending; none at all is an error."""
        found = sorted(set(self.find(rendered)))
        if not found:
            raise ValueError(
                f"position {self.text!r} picks no token of the prompt {rendered.text[:80]!r}: "
                "check that the prompt holds what the position looks for"
            )
        if found[0] < 0 or found[-1] >= len(rendered.ids):
            raise ValueError(
                f"position {self.text!r} picks token {found[-1]}, but the prompt "
                f"{rendered.text[:60]!r} has {len(rendered.ids)} tokens"
            )
        return found


def parse(positions: "str | Positions") -> Positions:
    """Read a position rule from its text form (see the module's table)."""
    if isinstance(positions, Positions):
        return positions
    name, _, rest = positions.partition(":")
    if name == "mean" and rest:
        inner = parse(rest)
        return Positions(positions, inner.find, mean=True)
    if positions in _SIMPLE:
        return Positions(positions, _SIMPLE[positions])
    if name == "after" and rest:
        return Positions(positions, lambda r: _after(r, rest))
    if name == "tokens" and re.fullmatch(r"(-?\d+)?:(-?\d+)?", rest):
        start, stop = (int(n) if n else None for n in rest.split(":"))
        return Positions(positions, lambda r: range(len(r.ids))[start:stop])
    raise ValueError(
        f"unknown position {positions!r}: choose one of {', '.join(_SIMPLE)}, after:TEXT, "
        "tokens:START:STOP, or any of these after 'mean:'"
    )


def _content(r: Rendered) -> list[int]:
    return r.tokens_in(*r.content)


def _instruction_end(r: Rendered) -> Sequence[int]:
    content = _content(r)
    return range(content[-1] + 1, r.n_prompt) if content else []


def _after(r: Rendered, marker: str) -> list[int]:
    at = r.text.rfind(marker)
    if at < 0:
        return []
    return r.tokens_in(at + len(marker), len(r.text))[:1]


def _thinking(r: Rendered) -> list[int]:
    match = THINKING.search(r.text)
    return r.tokens_in(*match.span(1)) if match else []


def _after_thinking(r: Rendered) -> list[int]:
    match = THINKING.search(r.text)
    return r.tokens_in(match.end(), len(r.text)) if match and match[2] else []


_SIMPLE: dict[str, Callable[[Rendered], Sequence[int]]] = {
    "last": lambda r: [r.n_prompt - 1],
    "all": lambda r: range(len(r.ids)),
    "content": _content,
    "instruction_end": _instruction_end,
    "generated": lambda r: range(r.n_prompt, len(r.ids)),
    "thinking": _thinking,
    "after_thinking": _after_thinking,
}
