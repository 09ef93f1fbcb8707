"""How far a long job is: a bar when a person watches, a few plain lines otherwise."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUIET_FOR = 5.0
"""Seconds between two plain lines; a job shorter than this says nothing."""


@contextmanager
def progress(total: int, label: str, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of items just finished; writes to stderr."""
    if not enabled or total == 0:
        yield lambda n: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n: bar.advance(task, n)
        return
    done, said = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        if time.monotonic() - said > QUIET_FOR:
            said = time.monotonic()
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)  # noqa: T201

    yield advance
