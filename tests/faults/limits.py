"""Limits on one rank's process, set in it before it begins; each is a `prepare` of Ranks."""

import ctypes
import os
import resource
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ssd_megatron.training import checkpoint_files

_CAPABILITY_VERSION_3 = 0x20080522


@dataclass(frozen=True)
class SmallFiles:
    """From its `save`-th save on, no file of the rank can grow beyond `limit` bytes: writing ends as on a full disk."""

    rank: int
    limit: int
    save: int

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            original, saves = checkpoint_files.write_tensors, 0

            def limited(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> checkpoint_files.FileRecord:
                nonlocal saves
                saves += 1
                if saves == self.save:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
                return original(folder, name, tensors)

            checkpoint_files.write_tensors = limited


@dataclass(frozen=True)
class Powerless:
    """The rank obeys the permissions of files, also if root runs the tests: it gives up all capabilities."""

    ranks: tuple[int, ...]

    def __call__(self, rank: int) -> None:
        if rank in self.ranks:
            header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
            none = (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None).capset(header, none) == 0


@dataclass(frozen=True)
class ElsewhereAt:
    """The rank begins in another working directory, where relative paths lead somewhere else."""

    rank: int
    folder: Path
    others: Path

    def __call__(self, rank: int) -> None:
        os.chdir(self.folder if rank == self.rank else self.others)


@dataclass(frozen=True)
class ClockAhead:
    """The rank's clock is ahead of the others'."""

    rank: int
    seconds: float

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            now, now_ns, ahead = time.time, time.time_ns, self.seconds
            time.time = lambda: now() + ahead
            time.time_ns = lambda: now_ns() + int(ahead * 1e9)
