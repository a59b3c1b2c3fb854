"""Habits of every writer: a file appears complete or not at all, and is known by its content."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ssd_megatron.errors import ConfigError

LOCK, PARTIAL = ".lock", ".partial"


@contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write (its folder is made if missing) that appears under its name at the end of the context, on the
    disk; a reader, a failure or a crash within sees what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file at once, see `open_atomically`."""
    with open_atomically(path) as file:
        file.write(content)


def require_empty(folder: Path, but: Collection[str] = ()) -> None:
    """Raises ConfigError if a folder to write into has something in it.

    Args:
        but: names that may be there.
    """
    if folder.exists() and any(path.name not in but for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give a folder that is not there yet")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder inside the one that is wanted, whose files come up into it at the end of the context; after a failure
    within all is as before.

    Raises:
        ConfigError: there is one, and it is not empty but for what a killed process left of this.
    """
    require_empty(folder, but=(PARTIAL,))
    is_new, partial = not folder.exists(), folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.iterdir()):
            path.rename(folder / path.name)
        is_new = False
    finally:
        shutil.rmtree(folder if is_new else partial, ignore_errors=True)


@contextmanager
def locked(folder: Path, field: str) -> Iterator[None]:
    """A folder, made if missing, in which no other process works within.

    Args:
        field: what the user calls it.
    Raises:
        ConfigError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{field} ({folder}) is in use by another running process: wait for it, or give another folder"
            ) from error
        yield


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
