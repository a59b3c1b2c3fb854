"""How much sooner does SSD reach the dense run's final loss? Seconds and FLOPs, on real text.

    python -m benchmarks.time_to_loss [--model wide|gpt-124m] [--trials NAME ...] [--steps 600] [--minutes M]
                                      [--out FOLDER] [--json FILE] [--quick]

The dense run of --steps steps sets the loss. SSD runs of a few lengths, each with a whole learning-rate schedule of its
own, end around it; the length that ends with exactly the dense loss is interpolated. `wide`, on CPUs, is a small model
in fp32 whose feed-forward networks take most of a step, on the embedded corpus; `gpt-124m`, on GPUs, reads all Python
and documentation text of the machine. A machine may be shared, and hours apart: what a step of either mode takes comes
from one short run of the same settings in which the modes take turns every few steps (the median of each), switches and
checks from the runs themselves, in steps of theirs. Evaluations and checkpoints are left out. Runs that are finished
are not made again: a stopped benchmark goes on (--minutes stops runs, with status 3, but not the making of the corpus,
which tools/embedded_corpus.py --machine can do before), and runs of several calls add up; --time_again makes the short
ones anew. Plots go to --out.
"""

import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.row import Missing, Row
from benchmarks.runs import Unfinished, embedded_corpus, finish_run, make_embedded_corpus, make_machine_corpus
from benchmarks.table import parser_for, report
from benchmarks.trials import PROBLEMS, TRIALS, Phase, Problem, Trial, dense_trial, trial_config, trial_phases
from ssd_megatron.parallel.device import IS_CUDA
from ssd_megatron.training.metrics import read_metrics

GOAL = 1.4 if IS_CUDA else 1.25  # times faster in wall-clock
UNFINISHED = 3  # exit status
TURN = 4  # steps of one mode before the other's, in the run that is timed

StepSeconds = dict[str, float]  # of one step, by mode


@dataclass(frozen=True)
class Reached:
    """Where runs ended, and what it cost: means over seeds."""

    loss: float
    seconds: float
    flops: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for(__doc__)
    parser.add_argument(
        "--trials",
        nargs="+",
        default=["default"],
        choices=TRIALS,
        metavar="NAME",
        help=", ".join(TRIALS).replace("%", "%%"),
    )
    parser.add_argument("--model", choices=PROBLEMS, default="gpt-124m" if IS_CUDA else "wide")
    parser.add_argument("--steps", type=int, help="of the dense run (default: 600 of wide, 1500 of gpt-124m)")
    parser.add_argument("--lengths", type=float, nargs="+", default=[1.0, 1.2], help="of SSD runs, in dense runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timed_steps", type=int, default=64, help="of the run in which the modes take turns")
    parser.add_argument("--time_again", action="store_true", help="measure what steps take even if it is known")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the next call goes on")
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_loss"))
    arguments = parser.parse_args(argv)
    until = time.monotonic() + 60 * arguments.minutes
    if arguments.quick:
        arguments.model, arguments.steps, arguments.lengths, arguments.timed_steps = "wide", 20, [1.0, 1.5], 16
        arguments.out /= "quick"
    problem = PROBLEMS[arguments.model]
    arguments.steps = arguments.steps or problem.steps
    bench = Bench(arguments, problem, _make_corpus(arguments.model), until)
    all_met = report("time to the dense run's loss", bench.rows(), arguments.json)
    return UNFINISHED if bench.stopped else 0 if all_met else 1


def _make_corpus(model: str) -> str:
    if model != "wide":
        return make_machine_corpus()
    make_embedded_corpus()
    return embedded_corpus("gpt")


@dataclass(frozen=True)
class Bench:
    """Makes the runs that are missing.

    Attributes:
        corpus: folder of the corpus and its tokenizer.
        until: when to stop, by time.monotonic.
        stopped: why there are rows missing.
    """

    arguments: Any
    problem: Problem
    corpus: str
    until: float
    stopped: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[Row | Missing]:
        for name in self.arguments.trials:
            try:
                yield from self.compare(name)
            except Unfinished as stop:
                self.stopped.append(str(stop))
                yield Missing(f"{name}: seconds dense / SSD at equal loss", str(stop))
                return

    def compare(self, name: str) -> Iterator[Row]:
        arguments, trial = self.arguments, TRIALS[name]
        step_seconds = self.time_steps(name)
        of_model = "".join(f" {value}" for value in (trial.widening, *dict(trial.model).values()) if value is not None)
        dense = self.run(f"dense{of_model}", dense_trial(trial), arguments.steps, step_seconds, is_dense=True)
        runs = [self.run(name, trial, round(length * arguments.steps), step_seconds) for length in arguments.lengths]
        _draw(self.folder(name).with_suffix(".png"), name, dense, runs)
        yield from compared(name, dense, dict(zip(arguments.lengths, runs, strict=True)), step_seconds)

    def run(self, name: str, trial: Trial, steps: int, step_seconds: StepSeconds, *, is_dense: bool = False) -> Reached:
        """Means over seeds. Trials of the same model share its dense runs."""
        phases = [] if is_dense else trial_phases(trial, steps)
        ends = []
        for seed in self.arguments.seeds:
            run_dir = self.folder(f"{name} {steps} seed {seed}")
            summary = self.finish(trial, steps, phases, seed, run_dir)
            seconds = run_seconds(read_metrics(run_dir), step_seconds)
            ends.append((summary["loss_dense"], seconds, summary["flops"]))
        return Reached(*map(statistics.fmean, zip(*ends, strict=True)))

    def time_steps(self, name: str) -> StepSeconds:
        """Median seconds of a step in each mode, from a run in which they take turns."""
        run_dir, steps = self.folder(f"{name} in turns"), self.arguments.timed_steps
        if self.arguments.time_again and run_dir.exists():
            shutil.rmtree(run_dir)
        modes = cycle(("dense", "sparse"))
        self.finish(TRIALS[name], steps, [(start, next(modes)) for start in range(1, steps, TURN)], 1, run_dir)
        return median_seconds(read_metrics(run_dir))

    def finish(self, trial: Trial, steps: int, phases: Sequence[Phase], seed: int, run_dir: Path) -> dict[str, Any]:
        config = trial_config(self.problem, trial, self.corpus, steps, phases, seed, run_dir)
        return finish_run(config, self.arguments.threads, self.until)

    def folder(self, name: str) -> Path:
        out: Path = self.arguments.out.resolve() / self.arguments.model
        return out / name.replace(" ", "-").replace("%", "percent")


def compared(name: str, dense: Reached, runs: Mapping[float, Reached], step_seconds: StepSeconds) -> Iterator[Row]:
    """Rows of one trial.

    Args:
        runs: SSD runs by length, in dense runs; ascending.
    """
    at = at_equal_loss(list(runs.values()), dense.loss)
    details: dict[str, float | str] = {"dense loss": dense.loss, "dense s": dense.seconds}
    details["speed-up of a sparse step"] = step_seconds["dense"] / step_seconds["sparse"]
    for length, reached in runs.items():
        details[f"loss x{length:g}"] = f"{reached.loss / dense.loss - 1:+.2%}"
        details[f"time x{length:g}"] = reached.seconds / dense.seconds
    if at is None:
        details["equal loss"] = "not reached"
    faster, cheaper = (0.0, 0.0) if at is None else (dense.seconds / at.seconds, dense.flops / at.flops)
    yield Row(f"{name}: seconds dense / SSD at equal loss", faster, GOAL, 4.0, True, details)
    yield Row(f"{name}: FLOPs dense / SSD at equal loss", cheaper, GOAL, 4.0, True)


def at_equal_loss(runs: Sequence[Reached], loss: float) -> Reached | None:
    """What a run that ends with `loss` costs, from runs of ascending length: between the last that ends above it and
    the next, evenly in the logarithm of cost; of the first if that ends below already; None if all end above."""
    if runs[0].loss <= loss:
        return runs[0]
    for short, long in pairwise(runs):
        if long.loss <= loss:
            share = (short.loss - loss) / (short.loss - long.loss)
            cost = (math.exp((1 - share) * math.log(a) + share * math.log(b)) for a, b in _costs(short, long))
            return Reached(loss, *cost)
    return None


def _costs(short: Reached, long: Reached) -> tuple[tuple[float, float], tuple[float, float]]:
    return (short.seconds, long.seconds), (short.flops, long.flops)


def median_seconds(records: Sequence[dict[str, Any]]) -> StepSeconds:
    """Of the steps of each mode."""
    steps = [record for record in records if record["kind"] == "train"]
    modes = {record["mode"] for record in steps}
    return {mode: statistics.median(step["seconds"] for step in steps if step["mode"] == mode) for mode in modes}


def run_seconds(records: Sequence[dict[str, Any]], step_seconds: StepSeconds) -> float:
    """What a run takes where steps take `step_seconds`; its switches and checks in dense steps of its own."""
    between = sum(record["seconds"] for record in records if record["kind"] in ("switch", "check"))
    steps = sum(step_seconds[record["mode"]] for record in records if record["kind"] == "train")
    return float(steps + between * step_seconds["dense"] / median_seconds(records)["dense"])


def _draw(path: Path, name: str, dense: Reached, runs: Sequence[Reached]) -> None:
    """Final loss over seconds and over FLOPs."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, cost in zip(axes, ("seconds", "flops"), strict=True):
        axis.plot([getattr(dense, cost)], [dense.loss], "ko", label="dense")
        axis.axhline(dense.loss, color="black", linewidth=0.8)
        axis.plot([getattr(r, cost) for r in runs], [r.loss for r in runs], "o-", color="C1", label=f"SSD, {name}")
        axis.set(xlabel=cost)
    axes[0].set(ylabel="final validation loss, run dense")
    axes[0].legend()
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    sys.exit(main())
