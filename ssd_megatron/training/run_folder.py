"""The folder of one run: one process group at a time, its resolved config and where everything lies."""

import fcntl
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from ssd_megatron.errors import ConfigError
from ssd_megatron.files import write_atomically

PACKAGES = ("torch", "deepspeed", "megatron-core", "sentencepiece", "numpy", "safetensors", "triton", "apex")


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

    def create_and_lock(self) -> None:
        """Raises ConfigError if another process trains here, or if the folder cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
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

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Write config.json, a ds.json that gives the same run, and versions.json with git commit and packages."""
        write_atomically(self.config, _json(resolved))
        write_atomically(self.path / "versions.json", _json(versions()))


def versions() -> dict[str, str]:
    """Versions of what computes: Python, packages that are installed, git commit of the code."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _git_commit()
    return found | ({"git_commit": commit} if commit else {})


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _git_commit() -> str | None:
    source = Path(__file__).resolve().parents[2]
    try:
        git = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
