"""Folders of runs as training leaves them, made without training."""

import json
import math
from pathlib import Path
from typing import Any

from ssd_megatron.training.metrics import MetricsLog

TOKENS = 4096  # of a step
DENSE_SECONDS, SPARSE_SECONDS = 0.5, 0.25
CHECK_SECONDS, SWITCH_SECONDS = 0.125, 1.0
EVAL_SECONDS, SAVE_SECONDS = 0.375, 0.0625
SWITCHES = {101: "sparse", 151: "dense"}


def mode_of(step: int) -> str:
    return "sparse" if 101 <= step <= 150 else "dense"


def loss_of(step: int) -> float:
    return 3 + 6 * math.exp(-step / 10)


def write_run(run_dir: Path, steps: int = 200, *, homes: int = 2, lr: float = 0.001) -> Path:
    """A run of 200 steps, two layers, sparse in steps 101 to 150 at half the FLOPs and seconds; checks every 20 steps.

    Args:
        steps: that are done; the run is finished, and has a summary, if it is all of them.
        homes: ranks that share the experts.
    """
    log = MetricsLog(run_dir, last_step=0)
    flops = 0.0
    for step in range(1, steps + 1):
        mode = mode_of(step)
        if step in SWITCHES:
            log.write("switch", step, **_switch(SWITCHES[step]))
        seconds = SPARSE_SECONDS if mode == "sparse" else DENSE_SECONDS
        flops += 1e12 if mode == "dense" else 0.5e12
        log.write(
            "train",
            step,
            loss=loss_of(step),
            grad_norm=1.5,
            lr=lr,
            mode=mode,
            tokens_per_second=TOKENS / seconds,
            seconds=seconds,
            flops=flops,
            flops_dense=step * 1e12,
            skipped=False,
            loss_scale=1.0,
            peak_memory=2_000_000 + step,
        )
        if step % 20 == 0:
            log.write("check", step, **_check(step))
            log.write("eval", step, loss_dense=3.1, loss_sparse=3.4 if step > 100 else None, seconds=EVAL_SECONDS)
            log.write("save", step, seconds=SAVE_SECONDS)
            if mode == "sparse":
                home_load = [[30, 10], [20, 20]] if homes == 2 else [[40], [40]]
                log.write("load", step, expert_load=[2.0, 1.25], home_load=home_load)
    log.write("fault", steps, what="the loss rose after the last switch </script>")
    log.close()
    config = {"train_batch_size": 32, "optimizer": {"params": {"lr": lr}}, "ssd_megatron": _section()}
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "versions.json").write_text(json.dumps({"torch": "2.13.0"}))
    if steps == 200:
        (run_dir / "summary.json").write_text(json.dumps({"status": "finished", "steps": steps}))
    return run_dir


def _section() -> dict[str, Any]:
    return {
        "ssd": {"schedule": "adaptive", "similarity_threshold": 0.65},
        "training": {"train_steps": 200},
    }


def _check(step: int) -> dict[str, Any]:
    first = step == 20
    return {
        "similarity": None if first else 0.9,
        "similarity_layers": [] if first else [0.85, 0.95],
        "overlap": None if first else 0.8,
        "active_fraction": [0.3, step / 1000],
        "stable": 1,
        "seconds": CHECK_SECONDS,
    }


def _switch(to: str) -> dict[str, Any]:
    return {
        "from": "dense" if to == "sparse" else "sparse",
        "to": to,
        "seconds": SWITCH_SECONDS,
        "seconds_statistics": 0.5,
        "seconds_cluster": 0.25,
        "seconds_transfer": 0.125,
        "seconds_verify": 0.0625,
        "bytes_moved": 12_000_000,
        "loss_before": 3.25,
        "loss_after": 3.25,
        "loss_sparse": 3.5,
        "reason": "stable",
        "similarity": [0.5, 0.75] if to == "sparse" else [],
        "top_k": [6, 2],
        "imbalance_before": 1.5 if to == "sparse" else None,
        "imbalance_after": 1.1 if to == "sparse" else None,
    }
