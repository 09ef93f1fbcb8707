"""Requests to servers of language models, and servers started for a check. Standard library only."""

import http.client
import json
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Refused(RuntimeError):
    """A server answered with an error."""

    def __init__(self, url: str, status: int, said: str) -> None:
        super().__init__(f"{url} answered {status}: {said}")
        self.status = status


def ask(url: str, body: Mapping[str, Any] | None = None, seconds: float = 600.0) -> bytes:
    """Send JSON (or, without a body, just ask) and give the bytes that come back.

    Raises `Refused` with what the server said, `RuntimeError` when it does not answer.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:500]
        raise Refused(url, error.code, said) from error
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f"{url} does not answer ({error}): is the server running?") from error


def post(url: str, body: Mapping[str, Any] | None = None, seconds: float = 600.0) -> dict[str, Any]:
    """The same with JSON coming back; anything else is a `RuntimeError`."""
    text = ask(url, body, seconds)
    try:
        return json.loads(text) if text else {}
    except ValueError as error:
        raise RuntimeError(f"{url} answered something that is no JSON: {text[:200]!r}") from error


def served_model(address: str, wanted: str | None = None) -> str:
    """The name under which a server has its model: the only one, or the one wanted."""
    found = [
        str(entry.get("id")) for entry in post(f"{address.rstrip('/')}/v1/models").get("data") or []
    ]
    if wanted in found or (wanted is None and len(found) == 1):
        return wanted or found[0]
    names = ", ".join(found) or "none"
    if wanted is not None:
        raise ValueError(f"{address} does not serve {wanted!r}: it has {names}")
    raise ValueError(f"{address} serves {len(found)} models ({names}): say which")


def set_up(name: str) -> Path | None:
    """The folder made by `make serve-...`, `.serving/NAME` here or in a folder above."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".serving" / name).is_dir():
            return folder / ".serving" / name
    return None


@contextmanager
def serving(
    line: Sequence[str],
    ready: str = "/health",
    seconds: float = 600.0,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Run a server on a free port until the block ends; gives its address when it answers.

    `line` is its command, to which host and port are added. A server that ends before it answers
    is an error with the last lines that it wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        running = subprocess.Popen(
            [*line, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log, stderr=log, env=environment and dict(environment),
        )  # fmt: skip
        try:
            end = time.monotonic() + seconds
            while not _answers(address + ready):
                if running.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    last = "".join(log.readlines()[-15:])
                    how = (
                        "ended" if running.poll() is not None else f"was silent for {seconds:.0f} s"
                    )
                    raise RuntimeError(f"the server {line[0]} {how} before it answered:\n{last}")
                time.sleep(0.2)
            yield address
        finally:
            running.terminate()
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
