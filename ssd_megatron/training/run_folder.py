"""The folder of one run: one process group at a time, its resolved config and where everything lies."""

import fcntl
import hashlib
import json
import os
import platform
import secrets
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from ssd_megatron.errors import ConfigError
from ssd_megatron.files import sha256_of, write_atomically

PACKAGES = ("torch", "deepspeed", "megatron-core", "sentencepiece", "numpy", "safetensors", "triton", "apex")
LOCK = ".lock"


class RunFolder:
    """Paths below `run_dir`, and the lock that keeps a second run out.

    Args:
        path: run_dir, made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config = path / "config.json"
        self._lock: IO[str] | None = None

    def create_and_lock(self) -> str:
        """To be called on one rank. Returns a mark by which the others know the folder, see `check_is_shared`.

        Raises:
            ConfigError: another process trains here, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("a")
        except OSError as error:
            raise ConfigError(f"ssd_megatron.run_dir ({self.path}) cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                raise ConfigError(
                    f"ssd_megatron.run_dir ({self.path}) lies on a file system without locks ({error.strerror}), "
                    "so that two runs could train in it unseen: use another folder"
                ) from error
            raise ConfigError(
                f"ssd_megatron.run_dir ({self.path}) is in use by another running process: wait for it, stop it with "
                f"the file {self.path / 'STOP'}, or use another run_dir"
            ) from error
        mark = secrets.token_hex(8)
        self._lock.truncate(0)
        self._lock.write(mark)
        self._lock.flush()
        os.fsync(self._lock.fileno())
        return mark

    def check_is_shared(self, mark: str) -> None:
        """To be called on every rank.

        Raises:
            ConfigError: this process does not see the folder that was locked with `mark`, or cannot write there.
        """
        lock = self.path / LOCK
        if not lock.exists() or lock.read_text() != mark:
            raise ConfigError(
                f"ssd_megatron.run_dir ({self.path}) on {platform.node()} is not the folder that rank 0 has locked: "
                "use a folder on a file system that all nodes share, by its full path"
            )
        try:
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise ConfigError(f"ssd_megatron.run_dir ({self.path}) cannot be written: {error.strerror}") from error

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Write config.json, a ds.json that gives the same run, and versions.json with git commit and packages."""
        write_atomically(self.config, _json(resolved))
        write_atomically(self.path / "versions.json", _json(versions()))


def read_written(path: Path) -> dict[str, Any] | None:
    """What a run has written into one of its JSON files; None if it has not (yet)."""
    values: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return values


def versions() -> dict[str, str]:
    """Versions of what computes: Python, packages that are installed, git commit of the code."""
    commit = _git_commit()
    python = {"python": platform.python_version()}
    return python | package_versions() | ({"git_commit": commit} if commit else {})


def package_versions() -> dict[str, str]:
    """Versions of the packages that compute, where they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """What tells two versions of this package's code apart."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()[:12]


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _git_commit() -> str | None:
    source = Path(__file__).resolve().parents[2]
    try:
        git = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
