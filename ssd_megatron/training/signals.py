"""Requests to stop: SIGTERM, SIGUSR1 (SLURM's warning), Ctrl-C, a file STOP in the run folder; launchers that die.

A request only sets a flag. The trainer asks for it at each step boundary, all ranks agree, save and end together.
A rank whose launcher is gone asks itself to stop, and is ended by force if its peers do not answer in time.
"""

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import psutil

STOP_FILE = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds that a rank without launcher has for its step, its save and its end.
ORPHAN_GRACE_SECONDS = 300.0
_PR_SET_PDEATHSIG = 1


class StopRequests:
    """Collects requests to stop this process; `install` once, in the main thread.

    Args:
        launched: a launcher started this process, which must not outlive it. A process that a person started from a
            shell goes on when the shell ends.
    """

    def __init__(self, run_dir: Path, *, launched: bool) -> None:
        self._launched = launched
        self._stop_file = run_dir / STOP_FILE
        self._received: str | None = None

    def install(self) -> None:
        """Take over the signals, and watch the launcher, if there is one."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        if self._launched:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            threading.Thread(target=_watch, args=(_launchers(),), daemon=True).start()

    def reason(self, *, look_for_file: bool) -> str | None:
        """Why this process was asked to stop; None if it was not. One rank of a job looks for the file."""
        if self._received is None and look_for_file and self._stop_file.exists():
            return f"the file {STOP_FILE} in the run folder"
        return self._received

    def clear_stop_file(self) -> None:
        """Remove the file STOP once it was obeyed, so that the next start runs."""
        self._stop_file.unlink(missing_ok=True)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received is not None:
            signal.default_int_handler(number, frame)  # who presses Ctrl-C twice does not want to wait
        self._received = f"signal {signal.Signals(number).name}"


def _launchers() -> list[psutil.Process]:
    """The processes above this one that it must not outlive.

    torchrun, slurmstepd (srun) and MPI's daemon are the parent, and end their ranks when the command that a person
    started is gone. DeepSpeed's launcher survives what started it: the `deepspeed` command, or on another host the
    shell and the sshd of the connection, which are watched too.
    """
    above = []
    for process in psutil.Process().parents():
        above.append(process)
        if "deepspeed.launcher.launch" not in _command(process):
            break
    return above


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _watch(launchers: list[psutil.Process]) -> None:
    while all(_is_alive(launcher) for launcher in launchers):
        threading.Event().wait(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(ORPHAN_GRACE_SECONDS)
    print("the launcher is gone and the other ranks do not answer: this rank ends without saving", file=sys.stderr)
    os._exit(1)
