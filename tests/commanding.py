"""`alignlens ...` run in the tests' own process."""

import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest

from analyses import cli


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def runner(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *before: str,
    quiet: bool = True,
) -> Run:
    """A function that runs `alignlens BEFORE ARGUMENTS` in the current folder; `quiet` without the
    warnings of Python, of which few topics give some."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards

    def outcome(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["alignlens", *before, *map(str, arguments)])
        capfd.readouterr()
        code = 0
        with warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore")
            try:
                cli.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Outcome(code, *capfd.readouterr())

    return outcome
