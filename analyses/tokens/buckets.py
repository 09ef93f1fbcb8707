"""What kind of word is an answer token? A rule of eight buckets, the first that matches wins.

The paper (Lin et al. 2023) names kinds of shifted tokens and gives no classifier; this rule is
ours. It reads the answer's text: a token belongs to a phrase if it covers any of its characters.
In this order:

1. `end of turn`: a token that stops generation;
2. `opener`: one of the first three tokens of the answer;
3. `refusal`: part of a phrase of `REFUSAL`;
4. `discourse`: part of a phrase of `DISCOURSE`;
5. `format`: line breaks and other blanks alone, list marks and headings at the start of a line,
   emphasis, code fences and table bars;
6. `digits`: digits, perhaps with blanks or signs around them, and no letter;
7. `punctuation`: only punctuation or symbols;
8. `content`: everything else.
"""

import re
import unicodedata
from collections.abc import Sequence

from probes.refusals import OPENERS

BUCKETS = (
    "end of turn",
    "opener",
    "refusal",
    "discourse",
    "format",
    "digits",
    "punctuation",
    "content",
)

OPENING = 3
"""Tokens of an answer that are its opener."""

REFUSAL = (
    *(phrase.rstrip(",") for phrase in OPENERS),
    "sorry",
    "cannot",
    "can't",
    "unable",
    "not able to",
    "won't",
    "apologies",
    "against the law",
    "illegal",
    "unlawful",
    "unethical",
    "harmful",
    "dangerous",
    "unsafe",
    "inappropriate",
    "not appropriate",
    "against my",
    "as a language model",
)
"""Phrases of refusals and safety disclaimers; upper case and the form of apostrophes do not
matter. The first are the openings by which `probes.refusals` judges."""

DISCOURSE = (
    "however",
    "therefore",
    "thus",
    "moreover",
    "furthermore",
    "additionally",
    "in addition",
    "instead",
    "for example",
    "for instance",
    "such as",
    "in other words",
    "in general",
    "on the other hand",
    "first",
    "firstly",
    "second",
    "secondly",
    "third",
    "finally",
    "lastly",
    "next",
    "then",
    "overall",
    "in summary",
    "in conclusion",
    "to summarize",
    "to summarise",
    "remember",
    "please note",
    "it's important to",
    "it is important to",
    "here is",
    "here are",
    "here's",
    "sure",
    "certainly",
    "of course",
    "absolutely",
    "great question",
    "good question",
    "hello",
    "thank you",
    "thanks",
    "you're welcome",
    "feel free",
    "let me know",
    "i hope",
    "i'd be happy to",
    "happy to help",
)
"""Markers that lead the reader and manners of an assistant."""


def _phrases(phrases: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(set(phrases), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


_REFUSAL, _DISCOURSE = _phrases(REFUSAL), _phrases(DISCOURSE)

_FORMAT = re.compile(
    r"[\r\n]+"
    r"|^[ \t]*(?:[-*+\u2022]|\d{1,3}[.)]|#{1,6})(?=\s)"
    r"|\*\*|__|`+|~~~+|\|",
    re.MULTILINE,
)


def buckets_of(tokens: Sequence[str], stops: Sequence[bool]) -> list[int]:
    """The bucket of each token of one answer, as an index into `BUCKETS`.

    `tokens` are the texts the tokens add, which together are the answer; `stops` says which of
    them stop generation. A token that adds no text (a part of a character) is content.
    """
    # a stop token ends the text, so its name can be part of no phrase
    text = "".join(token if not stop else "" for token, stop in zip(tokens, stops, strict=True))
    text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    covered = [_covered(pattern, text) for pattern in (_REFUSAL, _DISCOURSE, _FORMAT)]
    found, start = [], 0
    for place, (token, stop) in enumerate(zip(tokens, stops, strict=True)):
        end = start if stop else start + len(token)
        inside = [any(marks[start:end]) for marks in covered]
        found.append(BUCKETS.index(_bucket(place, token, stop, inside)))
        start = end
    return found


def _bucket(place: int, token: str, stop: bool, inside: Sequence[bool]) -> str:
    refusal, discourse, form = inside
    if stop:
        return "end of turn"
    if place < OPENING:
        return "opener"
    if refusal or discourse:
        return "refusal" if refusal else "discourse"
    if form or (token and token.isspace()):
        return "format"
    if any(c.isdigit() for c in token) and not any(c.isalpha() for c in token):
        return "digits"
    bare = token.strip()
    if bare and all(unicodedata.category(c)[0] in "PS" for c in bare):
        return "punctuation"
    return "content"


def _covered(pattern: re.Pattern[str], text: str) -> list[bool]:
    """Which characters of the text are part of a match; blanks inside a phrase count, too."""
    marks = [False] * len(text)
    for match in pattern.finditer(text):
        marks[match.start() : match.end()] = [True] * (match.end() - match.start())
    return marks
