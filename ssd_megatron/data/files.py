"""Habits of every writer here: a file appears complete or not at all, and is known by its content."""

import hashlib
import os
from pathlib import Path

from ssd_megatron.errors import DataError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name in its folder (made if missing), then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_cache_dir(path: Path) -> None:
    """Make the folder of the index cache, or a folder in it.

    Raises:
        DataError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir: the folder {path} cannot be made: {error}") from error
