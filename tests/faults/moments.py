"""Moments at which a fault strikes, hit on purpose: in the forked process of one rank, a function of the package is
wrapped so that the process signals itself there. The package knows nothing of it, and the signal is a real one."""

import os
import pkgutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Moment:
    """A call of one function.

    Attributes:
        target: "module:name" or "module:class.name", looked up where it is called.
        when: before or after the call; during: some milliseconds into it, at its end at the latest; torn: after it,
            with the file that it wrote cut in half.
        calls: the fault strikes at one of the first so many calls.
        seconds: during: the fault strikes at most so late.
        first_rank: only rank 0 gets there.
        at_start: in a start that finds a checkpoint.
    """

    name: str
    target: str
    when: Literal["before", "after", "during", "torn"]
    calls: int = 1
    seconds: float = 0.0
    first_rank: bool = False
    at_start: bool = False


_TRAINER, _SWITCH, _COORDINATOR, _FILES, _JOB = (
    f"ssd_megatron.{name}:"
    for name in (
        "training.trainer",
        "switching.switch",
        "switching.coordinator",
        "training.checkpoint_files",
        "training.job",
    )
)

MOMENTS = (
    Moment("any time", f"{_TRAINER}Trainer.run", "during", seconds=4.0),
    Moment("making the engine", "ssd_megatron.training.assembly:make_engine", "during", seconds=0.3),
    Moment("in a training step", f"{_TRAINER}Trainer._train_step", "during", calls=12, seconds=0.1),
    Moment(
        "before Adam's step",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step",
        "before",
        calls=12,
    ),
    Moment("switch: planned, not moved", f"{_COORDINATOR}regroup_neurons", "before", calls=2),
    Moment("switch: part of a bank moved", "ssd_megatron.switching.redistribute:apply_move", "before", calls=18),
    Moment("switch: a bank moved", f"{_SWITCH}move_neurons", "after", calls=2),
    Moment("switch: in verification", f"{_SWITCH}verify_bank", "before", calls=2),
    Moment("switch: verified, not committed", f"{_COORDINATOR}Coordinator._verify_loss", "before", calls=4),
    Moment("save: half a file", f"{_FILES}save_file", "torn", calls=6),
    Moment("save: own files written", f"{_FILES}write_tensors", "after", calls=6),
    Moment("save: files written, index not", f"{_FILES}commit", "before", calls=6, first_rank=True),
    Moment("save: index written, not renamed", "pathlib:Path.rename", "before", calls=5, first_rank=True),
    Moment("save: renamed, old ones not removed", f"{_FILES}remove_old", "before", calls=5, first_rank=True),
    Moment("in an evaluation", f"{_TRAINER}Trainer._evaluate", "during", calls=3, seconds=0.02),
    Moment("restore: checking files", f"{_FILES}damages", "before", at_start=True),
    Moment("restore: reading tensors", f"{_FILES}read_intervals", "during", seconds=0.02, at_start=True),
    Moment("restore: metrics cut back", f"{_JOB}MetricsLog", "after", first_rank=True, at_start=True),
    Moment("after the last step", f"{_JOB}finish", "before", first_rank=True),
)
# Before there are process groups the others learn of a killed rank by waiting for it only.
BEFORE_GROUPS = Moment("checking the data", "ssd_megatron.training.start:check_run_data", "before")
BY_NAME = {moment.name: moment for moment in (*MOMENTS, BEFORE_GROUPS)}


@dataclass(frozen=True)
class Fault:
    """What happens to one rank: at the `call`-th call of the moment's function, `delay` seconds into it if during.

    To be given to Ranks as `prepare`.
    """

    moment: str
    rank: int
    call: int = 1
    delay: float = 0.0
    number: signal.Signals = signal.SIGKILL

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            moment = BY_NAME[self.moment]
            module, _, path = moment.target.partition(":")
            *owner, name = path.split(".")
            holder = pkgutil.resolve_name(f"{module}:{owner[0]}" if owner else module)
            setattr(holder, name, self._wrap(getattr(holder, name), moment))

    def _wrap(self, original: Callable[..., Any], moment: Moment) -> Callable[..., Any]:
        calls = 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != self.call:
                return original(*args, **kwargs)
            if moment.when == "before":
                self._strike()
            if moment.when == "during":
                threading.Timer(self.delay, self._strike).start()
            result = original(*args, **kwargs)
            if moment.when == "torn":
                written = Path(args[1])
                os.truncate(written, written.stat().st_size // 2)
            if moment.when != "before":
                self._strike()
            return result

        return wrapped

    def _strike(self) -> None:
        os.kill(os.getpid(), self.number)
