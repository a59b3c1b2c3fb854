"""How much sooner does SSD reach the dense run's final loss? Seconds and FLOPs, on the embedded corpus.

    python -m benchmarks.time_to_loss [--trials NAME ...] [--steps 600] [--out FOLDER] [--json FILE] [--quick]

The dense run of --steps steps sets the loss. SSD runs of a few lengths, each with a whole learning-rate schedule of its
own, end around it; the length that ends with exactly the dense loss is interpolated. In the model feed-forward
networks take most of a step, in fp32. A machine may be shared, and hours apart: what a step of either mode takes comes
from one short run of the same settings in which the modes take turns every few steps (the median of each), switches and
checks from the runs themselves, in steps of theirs. Evaluations and checkpoints are left out. Runs that are finished
are not made again: a stopped benchmark goes on, and runs of several calls add up; --time_again makes the short ones
anew. Plots go to --out.
"""

import math
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.row import Row
from benchmarks.runs import finish_run, make_embedded_corpus
from benchmarks.table import parser_for, report
from ssd_megatron.parallel.device import IS_CUDA
from ssd_megatron.training.metrics import read_metrics

GOAL = 1.4 if IS_CUDA else 1.25  # times faster in wall-clock
DENSE = "dense"
TURN = 4  # steps of one mode before the other's, in the run that is timed

Phase = tuple[int, str]
StepSeconds = dict[str, float]  # of one step, by mode


@dataclass(frozen=True)
class Trial:
    """Shares of the steps: the first switch comes after `first`, and after `sparse` more the last one; settings of
    `ssd` and `model` beyond those of the default."""

    first: float = 0.1
    sparse: float = 0.7
    ssd: tuple[tuple[str, Any], ...] = ()
    model: tuple[tuple[str, Any], ...] = ()


TRIALS = {
    "default": Trial(),
    "half of the steps sparse": Trial(sparse=0.5),
    "85 % of the steps sparse": Trial(first=0.05, sparse=0.85),
    "first switch at 5 %": Trial(first=0.05),
    "first switch at 20 %": Trial(first=0.2, sparse=0.6),
    "one expert in eight": Trial(ssd=(("top_k", 2),)),
    "experts of 64": Trial(ssd=(("num_experts", 32), ("top_k", 8))),
    "experts of 256": Trial(ssd=(("num_experts", 8), ("top_k", 2))),
    "equal top_k": Trial(ssd=(("top_k_allocation", "equal"),)),
    "frozen router": Trial(ssd=(("router_update", "frozen"),)),
    "d_ff 4h": Trial(ssd=(("num_experts", 8), ("top_k", 2)), model=(("ffn_hidden_size", 1024),)),
    "squared relu": Trial(model=(("activation", "squared_relu"),)),
    "reglu": Trial(model=(("activation", "reglu"),)),
}


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
    parser.add_argument("--steps", type=int, default=600, help="of the dense run (default 600)")
    parser.add_argument("--lengths", type=float, nargs="+", default=[1.0, 1.2], help="of SSD runs, in dense runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timed_steps", type=int, default=64, help="of the run in which the modes take turns")
    parser.add_argument("--time_again", action="store_true", help="measure what steps take even if it is known")
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_loss"))
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.lengths, arguments.timed_steps = 20, [1.0, 1.5], 16
        arguments.out /= "quick"
    make_embedded_corpus()
    rows = (row for name in arguments.trials for row in compare(name, TRIALS[name], arguments))
    return 0 if report("time to the dense run's loss", rows, arguments.json) else 1


def compare(name: str, trial: Trial, arguments: Any) -> Iterator[Row]:
    """Run what is missing of one trial."""
    out = arguments.out.resolve()
    step_seconds = _time_steps(out, trial, arguments, name)
    run = partial(_run, out, trial, arguments.threads, step_seconds)
    dense = _mean([run(DENSE, arguments.steps, seed) for seed in arguments.seeds])
    runs = [
        _mean([run(name, round(length * arguments.steps), seed) for seed in arguments.seeds])
        for length in arguments.lengths
    ]
    _draw(arguments.out / f"{name}.png", name, dense, runs)
    at = at_equal_loss(runs, dense.loss)
    details: dict[str, float | str] = {"dense loss": dense.loss, "dense s": dense.seconds}
    details["speed-up of a sparse step"] = step_seconds["dense"] / step_seconds["sparse"]
    for length, reached in zip(arguments.lengths, runs, strict=True):
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


def trial_phases(trial: Trial, steps: int) -> list[Phase]:
    """Dense, sparse, dense."""
    first = round(trial.first * steps)
    return [(1, "dense"), (first + 1, "sparse"), (first + round(trial.sparse * steps) + 1, "dense")]


def _config(trial: Trial, steps: int, phases: Sequence[Phase], seed: int, run_dir: Path) -> dict[str, Any]:
    """4 layers, hidden 256, d_ff 2048 in 16 experts of which 4 are computed; 2,048 tokens a step.

    Args:
        phases: none for a dense run.
    """
    schedule = {"schedule": "fixed", "phases": [{"start_step": step, "mode": mode} for step, mode in phases]}
    model = {
        "num_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "ffn_hidden_size": 2048,
        "seq_length": 128,
        "vocab_size": 4096,
    }
    return {
        "train_batch_size": 16,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {
            "type": "WSD",
            "params": {"warmup_num_steps": max(1, steps // 20), "decay_num_steps": steps * 3 // 10},
        },
        "gradient_clipping": 1.0,
        "bf16": {"enabled": IS_CUDA},
        "ssd_megatron": {
            "run_dir": str(run_dir),
            "seed": seed,
            "model": model | dict(trial.model),
            "data": {
                "paths": ["data/embedded/corpus"],
                "tokenizer": "data/embedded/tokenizer.model",
                "split": "949,50,1",
                "cache_dir": str(run_dir.parent / "data_cache"),
            },
            "ssd": {"num_experts": 16, "top_k": 4} | dict(trial.ssd) | (schedule if phases else {"schedule": "dense"}),
            "training": {"train_steps": steps, "eval_interval": max(1, steps // 10), "eval_steps": 32},
            "checkpoint": {"interval": max(1, steps // 4), "keep_last": 1},
            "logging": {"plots": False},
        },
    }


def _run(out: Path, trial: Trial, threads: int, step_seconds: StepSeconds, name: str, steps: int, seed: int) -> Reached:
    """`dense` runs depend on the model alone: trials of the same model share them."""
    of_model = "".join(f" {value}" for _, value in trial.model) if name == DENSE else ""
    run_dir = _folder(out, f"{name}{of_model} {steps} seed {seed}")
    phases = [] if name == DENSE else trial_phases(trial, steps)
    summary = finish_run(_config(trial, steps, phases, seed, run_dir), threads)
    return Reached(summary["loss_dense"], run_seconds(read_metrics(run_dir), step_seconds), summary["flops"])


def _time_steps(out: Path, trial: Trial, arguments: Any, name: str) -> StepSeconds:
    """Median seconds of a step in each mode, from a run in which they take turns."""
    run_dir = _folder(out, f"{name} in turns")
    if arguments.time_again and run_dir.exists():
        shutil.rmtree(run_dir)
    modes = cycle(("dense", "sparse"))
    phases = [(start, next(modes)) for start in range(1, arguments.timed_steps, TURN)]
    finish_run(_config(trial, arguments.timed_steps, phases, 1, run_dir), arguments.threads)
    return median_seconds(read_metrics(run_dir))


def _folder(out: Path, name: str) -> Path:
    return out / name.replace(" ", "-").replace("%", "percent")


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


def _mean(runs: Sequence[Reached]) -> Reached:
    return Reached(
        *(statistics.fmean(values) for values in zip(*((r.loss, r.seconds, r.flops) for r in runs), strict=True))
    )


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
