"""The numbers of a run for TensorBoard, wandb and CSV files, through DeepSpeed's monitor.

Which of them are written is DeepSpeed's config (`tensorboard`, `wandb`, `csv_monitor`, `comet`). Scalars go to all of
them; text, histograms and figures, which DeepSpeed's monitor does not know, go to TensorBoard. The x-axis is the step.

Names: train/{loss, lr, grad_norm, tokens_per_second}, flops/{spent, saved_fraction}, eval/{loss_dense, loss_sparse},
ssd/{similarity, overlap}, ssd/active_fraction/layer_00, ssd/similarity/layer_00, expert_load/max_over_mean/layer_00,
mask/{share, live, ever, regrown_pruned}, and as text switch, resume, fault; at the end of a run its plots as images.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from deepspeed.monitor.monitor import MonitorMaster
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

_SCALARS = {
    "train": {name: f"train/{name}" for name in ("loss", "lr", "grad_norm", "tokens_per_second")}
    | {"flops": "flops/spent"},
    "eval": {name: f"eval/{name}" for name in ("loss_dense", "loss_sparse")},
    "check": {name: f"ssd/{name}" for name in ("similarity", "overlap")},
    "mask": {name: f"mask/{name}" for name in ("share", "live", "ever", "regrown_pruned")},
}
_PER_LAYER = {
    "check": {"active_fraction": "ssd/active_fraction", "similarity_layers": "ssd/similarity"},
    "load": {"expert_load": "expert_load/max_over_mean"},
}
# TensorBoard's custom scalars: what belongs together in one chart. Tags are regular expressions.
_CHARTS = {
    "loss": {"training and validation": ["Multiline", ["train/loss", "eval/loss_.*"]]},
    "structure": {
        "structure similarity and expert overlap": ["Multiline", ["ssd/similarity$", "ssd/overlap"]],
        "structure similarity by layer": ["Multiline", ["ssd/similarity/.*"]],
        "active neurons by layer": ["Multiline", ["ssd/active_fraction/.*"]],
    },
    "expert load": {"busiest expert over mean, by layer": ["Multiline", ["expert_load/max_over_mean/.*"]]},
}
_TEXTS = ("switch", "resume", "fault")


def silence_engine_events(deepspeed_monitor: MonitorMaster) -> None:
    """Stop the engine from writing events of its own. Call it on every rank, after the engine is made.

    The engine writes its learning rate over samples. wandb has one x-axis, which must not go back, and would throw away
    every event of ours after that: samples run ahead of steps.
    """
    deepspeed_monitor.enabled = False  # asked by the engine only: write_events goes on working


def layer_tag(prefix: str, layer: int) -> str:
    """Name a number of one layer: ('ssd/active_fraction', 3) -> 'ssd/active_fraction/layer_03'."""
    return f"{prefix}/layer_{layer:02}"


def scalars_of(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Name the numbers of a metrics record (see metrics.py); those that are None are left out."""
    scalars = {tag: values[name] for name, tag in _SCALARS.get(kind, {}).items()}
    for name, prefix in _PER_LAYER.get(kind, {}).items():
        scalars |= {layer_tag(prefix, layer): value for layer, value in enumerate(values[name] or [])}
    if kind == "train":
        scalars["flops/saved_fraction"] = 1 - values["flops"] / values["flops_dense"]
    return {tag: value for tag, value in scalars.items() if value is not None}


class Monitor:
    """Writes to whatever DeepSpeed's monitor (`engine.monitor`) has been configured for. Rank 0 has one."""

    def __init__(self, deepspeed_monitor: MonitorMaster) -> None:
        self._master = deepspeed_monitor
        tensorboard = deepspeed_monitor.tb_monitor
        # torch's SummaryWriter, whose annotations are not to be relied on.
        self._writer: Any = None if tensorboard is None else tensorboard.summary_writer
        if self._writer is not None:
            self._writer.add_custom_scalars(_CHARTS)

    def resume(self, last_step: int) -> None:
        """Tell TensorBoard to forget what an earlier process wrote for steps after `last_step`."""
        if self._writer is not None:
            start = Event(step=last_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._writer.file_writer.add_event(start)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Write a metrics record under the names above: call it with what MetricsLog.write is called with."""
        self.scalars(step, scalars_of(kind, values))
        if kind in _TEXTS:
            self.text(step, kind, ", ".join(f"{name}: {value}" for name, value in values.items()))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by name."""
        if values:
            self._master.write_events([(name, value, step) for name, value in values.items()])

    def text(self, step: int, tag: str, text: str) -> None:
        """Write Markdown text (TensorBoard only)."""
        if self._writer is not None:
            self._writer.add_text(tag, text, step)

    def histogram(self, step: int, tag: str, values: Sequence[float] | np.ndarray) -> None:
        """Write the distribution of finite values (TensorBoard only)."""
        if self._writer is not None:
            self._writer.add_histogram(tag, np.asarray(values), step)

    def figures(self, step: int, draw: Callable[[], Mapping[str, Figure]]) -> None:
        """Write plots as images under their names (TensorBoard only; without it, nothing is drawn)."""
        if self._writer is not None:
            for name, figure in draw().items():
                self._writer.add_figure(f"plots/{name}", figure, step, close=False)

    def close(self) -> None:
        """Write what is still buffered."""
        if self._writer is not None:
            self._writer.flush()
