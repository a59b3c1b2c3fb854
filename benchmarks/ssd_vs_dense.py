"""Does SSD reach the dense loss with fewer FLOPs? Real runs on the embedded corpus, same data and steps for each arm.

    python -m benchmarks.ssd_vs_dense --out runs/ssd_vs_dense [--seeds 1 2 3] [--steps 1000] [--jobs 2] [--quick]
    python -m benchmarks.ssd_vs_dense --out runs/bert --family bert [--beside sparse convert]
    python -m benchmarks.ssd_vs_dense --out runs/granularity --granularity 8 32 128

Arms: `dense`; `ssd` (adaptive schedule); `sparse` (experts from the first step to the last); `convert` (experts from
the step at which ssd first goes sparse, and never back). With --granularity instead of the last two, on longer samples:
`tiles of G` (as ssd and in its phases, but G tokens in a row share their experts). Runs that are finished are not run
again, so a stopped benchmark goes on. Writes table.md, table.json and loss.png into --out.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.runs import embedded_corpus, finish_run, make_embedded_corpus, runs_at_once
from ssd_megatron.switching.schedule import PhaseSpan
from ssd_megatron.training.metrics import phases_of, read_metrics

FIRST, FOLLOWING = ("dense", "ssd"), ("sparse", "convert")  # those that follow need what ssd's schedule has found
TILES = "tiles of "
TOKENS = 2048  # a step
# Goals for the ssd arm: dense validation loss above the dense arm's, and share of FLOPs saved.
LOSS_GOAL, SAVED_GOAL, LOSS_FLOOR, SAVED_FLOOR = 0.005, 0.25, 0.02, 0.20


@dataclass(frozen=True)
class Result:
    """One finished run."""

    arm: str
    seed: int
    loss_dense: float
    loss_sparse: float | None
    flops: float
    saved: float
    seconds: float


def base_config(steps: int, seed: int, run_dir: Path, seq_length: int, family: str = "gpt") -> dict[str, Any]:
    """4 layers (of T5 2 and 2), hidden 256, d_ff 1024 in 32 experts of which 8 are computed; 2,048 tokens a step."""
    corpus, t5 = embedded_corpus(family), {"num_layers": 2, "decoder_seq_length": seq_length // 4}
    return {
        "train_batch_size": TOKENS // seq_length,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {
            "type": "WSD",
            "params": {"warmup_num_steps": max(1, steps // 20), "decay_num_steps": steps * 3 // 10},
        },
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "ssd_megatron": {
            "run_dir": str(run_dir),
            "seed": seed,
            "model": {
                "family": family,
                "num_layers": 4,
                "hidden_size": 256,
                "num_attention_heads": 4,
                "ffn_hidden_size": 1024,
                "seq_length": seq_length,
                "vocab_size": 4096,
            }
            | (t5 if family == "t5" else {}),
            "data": {
                "paths": [f"{corpus}/corpus"],
                "tokenizer": f"{corpus}/tokenizer.model",
                "split": "949,50,1",
                "cache_dir": str(run_dir.parent / "data_cache"),
            },
            "ssd": {"num_experts": 32, "top_k": 8},
            "training": {"train_steps": steps, "eval_interval": max(1, steps // 10), "eval_steps": 32},
            "checkpoint": {"interval": max(1, steps // 4), "keep_last": 1},
        },
    }


def arm_settings(arm: str, steps: int, ssd_phases: Sequence[PhaseSpan]) -> dict[str, Any]:
    """The section ssd of one arm, beyond the experts; some follow what the ssd arm's schedule found."""
    if arm == "ssd":
        return {
            "schedule": "adaptive",
            "check_interval": max(1, steps // 50),
            "sparse_fraction": 0.76,
            "sparse_phase_fraction": 0.4,
            "warmup_fraction": 0.08,
            "final_dense_fraction": 0.11,
            "min_dense_steps": max(1, steps // 25),
        }
    phases = [{"start_step": phase.start_step, "mode": phase.mode} for phase in ssd_phases]
    if arm == "convert":
        return {"schedule": "fixed", "phases": phases[:2]}
    if arm.startswith(TILES):
        return {"schedule": "fixed", "phases": phases, "routing_granularity": int(arm.removeprefix(TILES))}
    return {"schedule": arm}


def run_arm(out: Path, arm: str, seed: int, steps: int, threads: int, seq_length: int, family: str = "gpt") -> Result:
    """Run, or resume, or take the finished run of one arm and seed."""
    run_dir = run_folder(out, arm, seed)
    config = base_config(steps, seed, run_dir, seq_length, family)
    follows = arm == "convert" or arm.startswith(TILES)
    phases = phases_of(read_metrics(run_folder(out, "ssd", seed))) if follows else []
    config["ssd_megatron"]["ssd"] |= arm_settings(arm, steps, phases)
    summary = finish_run(config, threads)
    saved = summary["flops_saved_fraction"]
    print(f"{arm} seed {seed}: dense {summary['loss_dense']:.4f}, {saved:.1%} of FLOPs saved", flush=True)
    return Result(
        arm,
        seed,
        summary["loss_dense"],
        summary["loss_sparse"],
        summary["flops"],
        saved,
        summary["seconds"],
    )


def run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(' ', '-')}-{seed}"


def table_rows(results: Sequence[Result], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Means over seeds by arm; `gap` is the paired mean of loss / dense arm's loss - 1 for the same seed."""
    reference = {result.seed: result.loss_dense for result in results if result.arm == "dense"}
    rows = []
    for arm in arms:
        runs = [result for result in results if result.arm == arm]
        gaps = [run.loss_dense / reference[run.seed] - 1 for run in runs]
        sparse = [run.loss_sparse for run in runs if run.loss_sparse is not None]
        rows.append(
            {
                "arm": arm,
                "seeds": len(runs),
                "loss_dense": statistics.fmean(run.loss_dense for run in runs),
                "loss_sparse": statistics.fmean(sparse) if sparse else None,
                "gap": statistics.fmean(gaps),
                "gap_worst": max(gaps),
                "saved": statistics.fmean(run.saved for run in runs),
                "seconds": statistics.fmean(run.seconds for run in runs),
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| arm | seeds | val. loss dense | val. loss sparse | against dense | worst seed | FLOPs saved | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sparse = "-" if row["loss_sparse"] is None else f"{row['loss_sparse']:.4f}"
        lines.append(
            f"| {row['arm']} | {row['seeds']} | {row['loss_dense']:.4f} | {sparse} | {row['gap']:+.2%} | "
            f"{row['gap_worst']:+.2%} | {row['saved']:.1%} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def verdict(rows: Sequence[dict[str, Any]]) -> tuple[str, bool]:
    """In words, and whether the goal is reached."""
    ssd = next(row for row in rows if row["arm"] == "ssd")
    goal = ssd["gap"] <= LOSS_GOAL and ssd["saved"] >= SAVED_GOAL
    floor = ssd["gap"] <= LOSS_FLOOR and ssd["saved"] >= SAVED_FLOOR
    reached = "goal reached" if goal else "floor reached, goal missed" if floor else "floor missed"
    text = (
        f"ssd: {ssd['gap']:+.2%} loss at {ssd['saved']:.1%} fewer FLOPs: {reached} (goal {LOSS_GOAL:+.1%} at "
        f"{SAVED_GOAL:.0%}, floor {LOSS_FLOOR:+.0%} at {SAVED_FLOOR:.0%})"
    )
    return text, goal


def draw(out: Path, results: Sequence[Result], arms: Sequence[str]) -> None:
    """Dense validation loss of every run over steps and over FLOPs."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for result in results:
        records = read_metrics(run_folder(out, result.arm, result.seed))
        flops = {r["step"]: r["flops"] for r in records if r["kind"] == "train"}
        evals = [r for r in records if r["kind"] == "eval"]
        color, label = f"C{arms.index(result.arm)}", result.arm if result.seed == results[0].seed else None
        axes[0].plot([r["step"] for r in evals], [r["loss_dense"] for r in evals], color=color, label=label, alpha=0.8)
        axes[1].plot([flops[r["step"]] for r in evals], [r["loss_dense"] for r in evals], color=color, alpha=0.8)
    best = min(result.loss_dense for result in results)
    axes[0].set(xlabel="step", ylabel="validation loss, run dense", ylim=(best - 0.05, best + 1.0))
    axes[1].set(xlabel="training FLOPs")
    axes[0].legend()
    FigureCanvasAgg(figure).print_png(out / "loss.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ssd_vs_dense"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each with its share of the cores")
    parser.add_argument("--quick", action="store_true", help="one seed, 50 steps: shows that it works, not how well")
    parser.add_argument("--family", choices=("gpt", "bert", "t5"), default="gpt")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--beside", nargs="*", choices=FOLLOWING, default=FOLLOWING, help="arms beside dense and ssd")
    others.add_argument("--granularity", type=int, nargs="+", default=[], help="tokens that share their experts")
    arguments = parser.parse_args(argv)
    seeds, steps = ([1], 50) if arguments.quick else (arguments.seeds, arguments.steps)
    out = arguments.out.resolve()
    make_embedded_corpus(arguments.family)
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    following = tuple(f"{TILES}{size}" for size in arguments.granularity) or tuple(arguments.beside)
    seq_length = 512 if arguments.granularity else 128
    results: list[Result] = []
    with runs_at_once(arguments.jobs) as pool:
        for arms in (FIRST, following):
            common = (steps, threads, seq_length, arguments.family)
            runs = [pool.submit(run_arm, out, arm, seed, *common) for seed in seeds for arm in arms]
            results += [run.result() for run in runs]
    arms = FIRST + following
    rows = table_rows(results, arms)
    found, met = verdict(rows)
    text = f"{markdown(rows)}\n\n{found}\n"
    (out / "table.md").write_text(text)
    (out / "table.json").write_text(json.dumps(rows, indent=2))
    draw(out, results, arms)
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
