"""Where tokens and texts stand in an answer, and the pieces of it that two tokenizers share."""

from collections.abc import Sequence

from probes.prompts import Rendered

Span = tuple[int, int]
"""Characters of an answer, from the first to before the second."""


def token_spans(r: Rendered, answer: str) -> list[Span]:
    """Characters of the answer each of its tokens covers, in order; a token that covers none
    stands where the one before it ends."""
    if not r.offsets:
        raise ValueError(
            "this tokenizer does not say which characters a token covers, so masked text cannot be "
            "found in the answer: load the model with a fast tokenizer"
        )
    start, done, found = len(r.text) - len(answer), 0, []
    for a, b in r.offsets[r.n_prompt :]:
        a, b = (a - start, b - start) if b > a else (done, done)
        found.append((a, b))
        done = max(done, b)
    return found


def text_spans(answer: str, texts: Sequence[str]) -> list[Span]:
    """Where the texts stand in the answer."""
    found = []
    for text in texts:
        at = answer.find(text)
        while at >= 0:
            found.append((at, at + len(text)))
            at = answer.find(text, at + 1)
    return found


def _cuts(spans: Sequence[Span], length: int) -> list[tuple[int, int, int]]:
    """(tokens before, first, last character) of each place where one may cut between tokens:
    nothing before it reaches beyond, nothing after it begins before."""
    following = [length]
    for a, _ in reversed(spans):
        following.append(min(a, following[-1]))
    following.reverse()
    reach, found = 0, []
    for k, (_, b) in enumerate(spans, 1):
        reach = max(reach, b)
        if reach <= following[k]:
            found.append((k, reach, following[k]))
    return found


def common_spans(
    one: Sequence[Span], two: Sequence[Span], length: int
) -> tuple[list[Span], list[tuple[int, int]]]:
    """The least pieces of text that both tokenizers cut off, and how many tokens of each lie up to
    the end of every piece. A character made of several tokens is never cut."""
    left, right = _cuts(one, length)[:-1], _cuts(two, length)[:-1]
    spans, ends, start, i, j = [], [], 0, 0, 0
    while i < len(left) and j < len(right):
        (k, a, b), (m, c, d) = left[i], right[j]
        if b < c:
            i += 1
        elif d < a:
            j += 1
        else:
            at = max(a, c)
            spans.append((start, at))
            ends.append((k, m))
            start, i, j = at, i + 1, j + 1
    return [*spans, (start, length)], [*ends, (len(one), len(two))]
