"""What a person sees while a run trains: a progress line, and one line per event above it.

On a terminal the progress line is updated in place. Elsewhere (a file, a pipe, a batch system's log) every line is
plain text without escape codes, and the progress is printed every few steps.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

_REFRESH_SECONDS = 0.1
_AVERAGE_STEPS = 20  # how far the average step time looks back


@dataclass(frozen=True)
class StepLine:
    """The numbers of one step. `tflops` is per second over all ranks; `mfu` is None where the peak is not known."""

    step: int
    loss: float
    mode: str
    tokens_per_second: float
    tflops: float
    seconds: float
    mfu: float | None = None


class Console:
    """Prints the progress and the events of a run. Rank 0 has one."""

    def __init__(
        self,
        train_steps: int,
        *,
        is_terminal: bool | None = None,
        log_interval: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the display.

        Args:
            train_steps: the step at which the run will be finished.
            is_terminal: whether lines can be updated in place; None: find out from stdout.
            log_interval: steps between two lines where they cannot.
            clock: seconds, from any start.
        """
        self._train_steps = train_steps
        self._log_interval = log_interval
        self._clock = clock
        self._eta = _Eta()
        self._next_refresh = clock()
        self._progress: Progress | None = None
        if is_terminal is None:
            is_terminal = sys.stdout.isatty() and not rich.console.Console().is_dumb_terminal
        if is_terminal:
            # Refreshed by step(): a refreshing thread of its own would compete with training for the interpreter.
            self._progress = Progress(
                BarColumn(bar_width=None),
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                console=rich.console.Console(file=sys.stdout, force_terminal=True),
                auto_refresh=False,
                expand=True,
            )
            self._task = self._progress.add_task("", total=train_steps)
            self._progress.start()

    def step(self, line: StepLine) -> None:
        """Show a step that is done."""
        now = self._clock()
        self._eta.add(line, now)
        is_last = line.step == self._train_steps
        if self._progress is not None:
            if now >= self._next_refresh or is_last:
                self._next_refresh = now + _REFRESH_SECONDS
                self._progress.update(
                    self._task, completed=line.step, description=self._format(line, now), refresh=True
                )
        elif line.step % self._log_interval == 0 or is_last:
            self._print(self._format(line, now))

    def event(self, text: str) -> None:
        """Show something that happened to the run: a switch, an evaluation, a checkpoint, a fault."""
        self._print(text, style="bold")

    def note(self, text: str) -> None:
        """Show something that is good to know, such as what an absent package costs."""
        self._print(f"note: {text}", style="dim")

    def close(self) -> None:
        """Leave the last progress line standing and give the terminal back."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, text: str, style: str = "") -> None:
        if self._progress is None:
            try:
                print(text, flush=True)
            except (
                BrokenPipeError
            ):  # who read it is gone, often a launcher that died: the run saves and ends in silence
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            self._progress.console.print(Text(text, style=style), soft_wrap=True)

    def _format(self, line: StepLine, now: float) -> str:
        # A narrow terminal cuts off the end, so what matters least comes last.
        parts = [
            f"step {line.step}/{self._train_steps}",
            f"{line.mode:6}",
            f"loss {line.loss:.4f}",
            f"{short_number(line.tokens_per_second)} tokens/s",
            f"ETA {format_seconds(self._eta.seconds(self._train_steps - line.step, now))}",
            f"{line.tflops:.3g} TFLOP/s",
            f"MFU {line.mfu:.1%}" if line.mfu is not None else "",
        ]
        return "  ".join(part for part in parts if part)


@dataclass
class _Eta:
    """Estimates the time left from the recent step times of each mode.

    Modes differ in speed, so each has its own moving average, and the steps to come are taken to be split between the
    modes like the steps so far. Evaluations, checks and checkpoints are counted by the time between the steps.
    """

    started: float = 0.0
    busy: float = 0.0
    average: dict[str, float] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def add(self, line: StepLine, now: float) -> None:
        if not self.count:
            self.started = now - line.seconds
        self.busy += line.seconds
        self.count[line.mode] = self.count.get(line.mode, 0) + 1
        average = self.average.get(line.mode, 0.0)
        self.average[line.mode] = average + (line.seconds - average) / min(self.count[line.mode], _AVERAGE_STEPS)

    def seconds(self, steps_left: int, now: float) -> float:
        per_step = sum(self.average[mode] * self.count[mode] for mode in self.count) / sum(self.count.values())
        overhead = max(1.0, (now - self.started) / self.busy)
        return steps_left * per_step * overhead


def short_number(value: float) -> str:
    """Write a number with three digits and a unit prefix: 12345.6 -> '12.3k'."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if not 999.5 <= abs(value) < math.inf:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g}Y"


def format_loss(loss: float | None) -> str:
    """Write a loss with four decimals, or a dash where there is none."""
    return "-" if loss is None else f"{loss:.4f}"


def format_seconds(seconds: float) -> str:
    """Write a time as h:mm:ss, with days in front where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02}:{second:02}"
