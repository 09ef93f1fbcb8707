"""Files that survive a crash: written whole or not at all, and named by what is in them.

Every file of the project goes through `write_bytes` or `folder`: a temporary name beside the
target, an fsync, a rename, an fsync of the directory. A reader therefore sees the old file, the
new file or none, never a part of one.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Where converted weights, fingerprints and checks are kept: `ALIGNLENS_CACHE`, or the
    platform's user cache folder."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("ALIGNLENS_CACHE") or user_cache_dir("alignlens"))


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable (a no-op where directories cannot be opened)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON with sorted keys; NaN is refused, not written."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder that becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()  # not mkdtemp, whose folders nobody else may read
    try:
        yield temporary
        if path.exists():  # somebody else finished the same content first
            shutil.rmtree(temporary)
        else:
            for file in temporary.rglob("*"):
                sync_directory(file)
            temporary.rename(path)
            sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sha256(path: Path) -> str:
    """Content hash of a file, remembered in the cache by path, size and modification time."""
    stat = path.stat()
    key = hashlib.sha256(
        f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()
    ).hexdigest()
    memo = cache_dir() / "hashes" / key
    if memo.is_file() and len(known := memo.read_text()) == 64:
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_text(memo, digest)
    return digest
