"""Kills ranks of real jobs and starts the jobs again, many times: nothing may be lost, doubled or changed.

    python -m tests.faults.kill --runs 50 --layouts DP2 TP2 PP2 EP2 TP2xPP2 TP2xEP2

Each run of the script takes a layout and a moment in turn, and the rest by its seed: ZeRO stage, saves in the
background or not, which rank is killed and how late, how the other ranks end (left alone, or by signals as a launcher
would), and whether a second kill follows in the start after the first. Exit status 1 if a run went wrong.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tests.faults.jobs import (
    INTERVAL,
    LAYOUTS,
    STEPS,
    Job,
    assert_one_error,
    assert_same_training,
    assert_whole,
    make_job,
)
from tests.faults.moments import BY_NAME, MOMENTS, Fault
from tests.small_run import Ranks

Ending = Literal["alone", "launcher"]
LIMIT_SECONDS = 300.0  # no start and no end takes so long


@dataclass(frozen=True)
class Case:
    """One run of the script: a job, and who is killed in its first starts."""

    layout: str
    stage: int
    async_save: bool
    faults: tuple[Fault, ...]
    ending: Ending

    def __str__(self) -> str:
        kills = ", then ".join(f"rank {fault.rank} {fault.moment} ({fault.call})" for fault in self.faults)
        save = "async" if self.async_save else "sync"
        return f"{self.layout:<8} ZeRO {self.stage} {save:<5} {self.ending:<8} {kills}"


class WrongError(AssertionError):
    """A run did not do what it must after a kill."""


def draw(seed: int, layout: str) -> Case:
    """The case of a seed; seeds that follow each other strike at different moments."""
    rng = random.Random(seed)
    moment = MOMENTS[seed % len(MOMENTS)]
    ranks = LAYOUTS[layout].ranks
    faults = [_draw_fault(rng, moment.name, ranks)]
    if moment.at_start:  # a first kill makes the start that the second one strikes
        training = [other for other in MOMENTS if not other.at_start and other.target.endswith("step")]
        first = _draw_fault(rng, rng.choice(training).name, ranks)
        faults.insert(0, replace(first, call=rng.randint(INTERVAL + 2, STEPS)))
    elif rng.random() < 0.25:
        faults.append(_draw_fault(rng, "any time", ranks))
    stage = 1 if LAYOUTS[layout].pipeline > 1 else rng.choice((1, 2))
    return Case(layout, stage, rng.random() < 0.4, tuple(faults), rng.choice(("alone", "launcher")))


def _draw_fault(rng: random.Random, name: str, ranks: int) -> Fault:
    moment = BY_NAME[name]
    rank = 0 if moment.first_rank else rng.randrange(ranks)
    return Fault(name, rank, rng.randint(1, moment.calls), rng.uniform(0, moment.seconds))


@dataclass(frozen=True)
class Restart:
    """The start after a kill went on after `step` (0: from the beginning); all ranks ended `seconds` after the kill."""

    step: int
    seconds: float


def run_case(case: Case, folder: Path, undisturbed: Job) -> list[Restart]:
    """Kill and restart a job until it is finished, and compare it with one that was left in peace.

    Raises:
        WrongError, AssertionError: something was lost, doubled or changed, or a rank did not end as it must.
    """
    job = make_job(folder, replace(LAYOUTS[case.layout], stage=case.stage), async_save=case.async_save)
    restarts: list[Restart] = []
    for fault in case.faults:
        if restarts and restarts[-1].step == STEPS:
            break  # the job is done: there is nothing left to strike at
        ranks = job.start(prepare=fault)
        seconds = _end(ranks, fault, case.ending)
        if restarts:
            _assert_resumed(ranks.output(), restarts[-1].step, whole_start=False)
        newest = job.newest()
        due = (job.trained_step() - 1) // INTERVAL * INTERVAL - (INTERVAL if case.async_save else 0)
        if newest < due:
            raise WrongError(f"the checkpoint of step {due} should be there, the newest is of step {newest}")
        if newest:
            assert_whole(job, newest)
        restarts.append(Restart(newest, seconds))
    _assert_resumed(job.finish(), restarts[-1].step, whole_start=True)
    assert_same_training(job, undisturbed)
    return restarts


def _end(ranks: Ranks, fault: Fault, ending: Ending) -> float:
    """Wait for the kill, and see the other ranks end. Returns the seconds that this takes."""
    victim = ranks.processes[fault.rank]
    victim.join(LIMIT_SECONDS)
    if victim.exitcode != -signal.SIGKILL:
        raise WrongError(f"rank {fault.rank} ended with {victim.exitcode}, not by SIGKILL: {ranks.output(fault.rank)}")
    killed = time.monotonic()
    others = [rank for rank in range(len(ranks.processes)) if rank != fault.rank]
    if ending == "launcher":
        for rank in others:
            if ranks.processes[rank].is_alive():
                ranks.signal(signal.SIGTERM, rank)
    for rank in others:
        process = ranks.processes[rank]
        process.join(LIMIT_SECONDS)
        if process.exitcode is None:
            ranks.signal(signal.SIGKILL, rank)
            raise WrongError(f"rank {rank} did not end: {ranks.output(rank)}")
        # 0: the job was done; SIGTERM: it came before the rank took over the signals
        fine = {1} | ({0} if fault.moment in ("any time", "after the last step") else set())
        if process.exitcode == 1:
            assert_one_error(ranks, f"rank {rank}: error: ", rank=rank)
        elif process.exitcode not in fine | ({-signal.SIGTERM} if ending == "launcher" else set()):
            raise WrongError(f"rank {rank} ended with {process.exitcode}: {ranks.output(rank)}")
    return time.monotonic() - killed


def _assert_resumed(output: str, step: int, *, whole_start: bool) -> None:
    """A start went on after `step`; one that was killed itself may not have come so far as to say it."""
    if " is damaged" in output:
        raise WrongError(f"a kill damaged a checkpoint: {output}")
    said = f"resuming after step {step} of" if 0 < step < STEPS else "is finished: all" if step else ""
    if (whole_start and said not in output) or ("resuming" in output and (step == 0 or said not in output)):
        raise WrongError(f"the restart did not go on after step {step}: {output}")


class Undisturbed:
    """Runs without a fault, one for each layout and ZeRO stage, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs: dict[tuple[str, int], Job] = {}

    def job(self, layout: str, stage: int) -> Job:
        if (layout, stage) not in self._jobs:
            job = make_job(self._folder / f"{layout}-{stage}", replace(LAYOUTS[layout], stage=stage))
            job.finish()
            self._jobs[layout, stage] = job
        return self._jobs[layout, stage]


def run_all(seeds: Iterator[tuple[int, str]]) -> int:
    """Run the cases of (seed, layout) and print a table. Returns how many went wrong."""
    kills = wrong = runs = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        undisturbed = Undisturbed(Path(name) / "undisturbed")
        for seed, layout in seeds:
            case = draw(seed, layout)
            runs += 1
            try:
                restarts = run_case(case, Path(name) / str(seed), undisturbed.job(layout, case.stage))
                kills += len(restarts)
                went_on = ", then ".join(f"{r.step} ({r.seconds:.1f} s)" for r in restarts)
                print(f"{seed:>4} {case}: went on after step {went_on}", flush=True)
            except AssertionError as error:
                wrong += 1
                print(f"{seed:>4} {case}: WRONG: {error}", flush=True)
                print(f"     again with: python -m tests.faults.kill --runs 1 --seed {seed} --layouts {layout}")
    seconds = time.monotonic() - started
    print(f"{runs} runs, {kills} kills, {runs - wrong} ended as if undisturbed, {wrong} wrong, {seconds:.0f} s")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill ranks of real jobs and start the jobs again.")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each run has the next one")
    arguments = parser.parse_args()
    layouts = arguments.layouts
    seeds = range(arguments.seed, arguments.seed + arguments.runs)
    return int(run_all((seed, layouts[i % len(layouts)]) for i, seed in enumerate(seeds)) > 0)


if __name__ == "__main__":
    sys.exit(main())
