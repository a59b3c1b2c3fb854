"""summary.json and what is printed at the end of a run."""

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.console
from rich.table import Table

from ssd_megatron.files import write_atomically
from ssd_megatron.training.console import format_loss, format_seconds, short_number
from ssd_megatron.training.metrics import Record, phases_of, read_metrics

_MODES = ("dense", "sparse")
_TRAIN_LOSS_STEPS = 50  # the loss of one step is noise


def build_summary(
    run_dir: Path, *, config: Mapping[str, Any], versions: Mapping[str, str], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Sum up a run from its metrics.jsonl, over all its resumes.

    Args:
        run_dir: folder of the run.
        config: the resolved config.
        versions: package name -> version.
        state: `status` (finished, stopped), `steps` (done), `tokens` (seen), and what else should be in the summary.
    Returns:
        what summary.json holds; a loss that was never measured, or was not finite, is None.
    Raises:
        DataError: the metrics cannot be read.
    """
    records = read_metrics(run_dir)
    train = [record for record in records if record["kind"] == "train"]
    masks = [record for record in records if record["kind"] == "mask"]
    evals = [record for record in records if record["kind"] == "eval"]
    last_eval = evals[-1] if evals else {"step": None, "loss_dense": None, "loss_sparse": None}
    losses = [record["loss"] for record in train[-_TRAIN_LOSS_STEPS:] if record["loss"] is not None]
    flops = train[-1]["flops"] if train else 0
    flops_dense = train[-1]["flops_dense"] if train else 0
    return {
        **state,
        "train_steps": config["ssd_megatron"]["training"]["train_steps"],
        "schedule": config["ssd_megatron"]["ssd"]["schedule"],
        "loss_dense": last_eval["loss_dense"],
        "loss_sparse": last_eval["loss_sparse"],
        "eval_step": last_eval["step"],
        "loss_train": statistics.fmean(losses) if losses else None,
        "phases": [asdict(phase) for phase in phases_of(records)],
        "switches": [_without_kind(record) for record in records if record["kind"] == "switch"],
        "masks": _without_kind(masks[-1]) if masks else None,
        "flops": flops,
        "flops_dense": flops_dense,
        "flops_saved_fraction": 1 - flops / flops_dense if flops_dense else 0.0,
        "seconds": sum(record.get("seconds") or 0.0 for record in records),
        "tokens_per_second": {mode: _median_speed(train, mode) for mode in _MODES},
        "skipped_steps": sum(record["skipped"] for record in train),
        "faults": [_without_kind(record) for record in records if record["kind"] == "fault"],
        "resumes": sum(record["kind"] == "resume" for record in records),
        "versions": dict(versions),
    }


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write run_dir/summary.json, whole or not at all."""
    write_atomically(run_dir / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())


def print_summary(summary: Mapping[str, Any], run_dir: Path) -> None:
    """Print what a newcomer wants to know of a run: what it did, how good it is, what it cost, where things lie."""
    console = rich.console.Console(file=sys.stdout, force_terminal=sys.stdout.isatty(), highlight=False, markup=False)
    console.print()
    console.print(_phase_table(summary))
    console.print(_result_table(summary))
    for name, place in _places(run_dir):
        console.print(f"{name:12} {place}", soft_wrap=True)


def _phase_table(summary: Mapping[str, Any]) -> Table:
    table = Table("steps", "mode", "switch took", "dense loss before -> after", title="Phases and switches")
    table.title_justify = "left"
    for phase in summary["phases"]:
        start, mode = phase["start_step"], phase["mode"]
        # A switch bears the number of the step before it or after it.
        found = [s for s in summary["switches"] if s["to"] == mode and s["step"] in (start - 1, start)]
        switch = found[0] if found else None
        table.add_row(
            f"{start} - {phase['end_step']}",
            mode,
            f"{switch['seconds']:.2f} s" if switch else "",
            f"{format_loss(switch['loss_before'])} -> {format_loss(switch['loss_after'])}" if switch else "",
        )
    return table


def _result_table(summary: Mapping[str, Any]) -> Table:
    table = Table("", "", title=f"Run {summary['status']}", show_header=False)
    table.title_justify = "left"
    speed = summary["tokens_per_second"]
    table.add_row("steps", f"{summary['steps']} of {summary['train_steps']}")
    table.add_row("validation loss, dense", format_loss(summary["loss_dense"]))
    table.add_row("validation loss, sparse", format_loss(summary["loss_sparse"]))
    saved = f"{summary['flops_saved_fraction']:.1%} saved against {short_number(summary['flops_dense'])} all-dense"
    table.add_row("FLOPs spent", f"{short_number(summary['flops'])} ({saved})")
    if summary["masks"] is not None:
        masks = summary["masks"]
        table.add_row("live weights", f"{masks['live']:.1%} ({masks['ever']:.1%} have been, {masks['update']} updates)")
    table.add_row("tokens", short_number(summary["tokens"]))
    table.add_row("training time", format_seconds(summary["seconds"]))
    for mode in _MODES:
        table.add_row(f"tokens/s, {mode}", "-" if speed[mode] is None else short_number(speed[mode]))
    if summary["skipped_steps"]:
        table.add_row("steps skipped (not finite)", str(summary["skipped_steps"]))
    return table


def _places(run_dir: Path) -> Sequence[tuple[str, str]]:
    return (
        ("TensorBoard", f"tensorboard --logdir {shlex.quote(str(run_dir / 'tensorboard'))}"),
        ("plots", str(run_dir / "plots")),
        ("checkpoints", str(run_dir / "checkpoints")),
        ("metrics", str(run_dir / "metrics.jsonl")),
        ("summary", str(run_dir / "summary.json")),
    )


def _median_speed(train: Sequence[Record], mode: str) -> float | None:
    speeds = [record["tokens_per_second"] for record in train if record["mode"] == mode]
    return statistics.median(speeds) if speeds else None


def _without_kind(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "kind"}
