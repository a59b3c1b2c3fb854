"""Says for what this rank has waited too long. gloo raises when a wait times out, and the error has a name
(collectives.py); NCCL's watchdog ends the process without one."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ssd_megatron.parallel.collectives import UNDER_WAY

TOLD_AT = 0.9  # of the timeout: before the watchdog ends the process


@contextmanager
def waits_watched(rank: int, timeout_seconds: float, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within: a thread tells once of each operation that has lasted nine tenths of the timeout.

    Args:
        timeout_seconds: of the job's process groups.
        tell: gets the message; without it standard error.
    """
    ended = threading.Event()
    arguments = (ended, rank, timeout_seconds, tell or _to_stderr)
    thread = threading.Thread(target=_watch, args=arguments, name="watch of waits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(ended: threading.Event, rank: int, timeout: float, tell: Callable[[str], None]) -> None:
    told = None
    while not ended.wait(min(1.0, timeout / 20)):
        under_way = list(UNDER_WAY)
        if not under_way or under_way[-1] == told:
            continue
        seconds = time.monotonic() - under_way[-1][1]
        if seconds >= TOLD_AT * timeout:
            told = under_way[-1]
            tell(
                f"rank {rank} has been for {seconds:.3g} s at: {': '.join(name for name, _ in under_way)}. Another "
                f"rank may have ended or hang; parallel.timeout_seconds is {timeout:g}"
            )


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
