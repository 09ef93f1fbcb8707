"""A capture killed at any instant and run again ends in the same bytes as one left alone."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from probes import HookedModel, capture, datasets

N_PROMPTS, BATCH, KILLS = 256, 16, 20
SITES = "0-3.resid_post"


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    rows = datasets.twins()[: N_PROMPTS // 2]
    return [row[kind] for row in rows for kind in ("harmful", "harmless")]


def run(model: HookedModel, prompts: list[str], folder: Path) -> None:
    capture(model, prompts, SITES, store=folder, batch_size=BATCH, progress=False)


def fork(act: Callable[[], None]) -> int:
    """Run `act` in a child that has the model already; gives its process id."""
    child = os.fork()
    if child:
        return child
    try:
        act()
        os._exit(0)
    except BaseException:
        os._exit(1)


def finished(child: int, timeout: float) -> bool:
    """Wait so long; whether the child ended by itself."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.001)
    return False


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones and temporaries too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def lines(folder: Path) -> int:
    manifest = folder / "manifest.jsonl"
    return manifest.read_bytes().count(b"\n") if manifest.is_file() else 0


@pytest.fixture(scope="module")
def undisturbed(
    base: HookedModel, prompts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    run(base, prompts, folder)
    assert lines(folder) >= 16
    return folder


@pytest.mark.slow
def test_twenty_kills_at_any_instant(
    base: HookedModel, prompts: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    expected = contents(undisturbed)
    n_shards = lines(undisturbed)
    start = time.monotonic()
    child = fork(lambda: run(base, prompts, tmp_path / "timed"))
    assert os.waitpid(child, 0)[1] == 0
    whole = time.monotonic() - start
    assert contents(tmp_path / "timed") == expected
    between = 0
    for i in range(KILLS):
        instant = whole * (i + 0.5) / KILLS
        for attempt in range(6):
            folder = tmp_path / f"kill-{i}-{attempt}"
            child = fork(lambda folder=folder: run(base, prompts, folder))
            if not finished(child, instant):
                kill(child)
                break
            instant *= 0.8  # the machine is less busy than when the time was taken
        done = lines(folder)
        between += 0 < done < n_shards
        run(base, prompts, folder)
        assert contents(folder) == expected, f"killed at {instant:.2f} s, {done} shards done"
    assert between >= 15, f"only {between} kills fell between the first and the last shard"


def stop_at(event: str, number: int, tell: int) -> None:
    """In this process, stop for good at the number-th instant of a kind, after saying so."""
    seen = 0

    def arrive(descriptor: int | None = None, lost: int = 0) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            if descriptor is not None:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - lost)
            os.write(tell, b"x")
            time.sleep(600)

    replace, fsync = Path.replace, os.fsync

    def before_rename(self: Path, target: Path) -> Path:
        if "shards" in str(target):
            arrive()
        return replace(self, target)

    def before_sync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if event == "shard half written" and ".safetensors." in name:
            arrive(descriptor, os.fstat(descriptor).st_size // 2)
        if event == "shard not yet named" and name.endswith("shards"):
            arrive()
        if event == "line half written" and name.endswith("manifest.jsonl"):
            arrive(descriptor, 100)
        fsync(descriptor)

    os.fsync = before_sync
    if event == "between write and rename":
        Path.replace = before_rename  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "temporaries"),
    [
        ("shard half written", 1),
        ("between write and rename", 1),
        ("shard not yet named", 0),
        ("line half written", 0),
    ],
)
def test_a_kill_inside_a_write(
    event: str,
    temporaries: int,
    base: HookedModel,
    prompts: list[str],
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "store"
    hear, tell = os.pipe()

    def child_runs() -> None:
        stop_at(event, 3, tell)
        run(base, prompts, folder)

    child = fork(child_runs)
    try:
        assert os.read(hear, 1) == b"x"
    finally:
        kill(child)
        os.close(hear)
        os.close(tell)
    found = contents(folder)
    assert sum(name.endswith(".tmp") for name in found) == temporaries
    assert lines(folder) == 2
    torn = not found["manifest.jsonl"].endswith(b"\n")
    assert torn == (event == "line half written")
    run(base, prompts, folder)
    assert contents(folder) == contents(undisturbed)
