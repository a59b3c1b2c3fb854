"""Everything a run says: metrics.jsonl, DeepSpeed's monitors and the console. Rank 0 speaks; the others are silent."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ssd_megatron.sparse_weights.masked_weights import MaskReport
from ssd_megatron.switching.reports import CheckReport, PlacementReport, SwitchReport
from ssd_megatron.training.checkpoint_files import folder_name
from ssd_megatron.training.console import Console, StepLine, short_number
from ssd_megatron.training.metrics import MetricsLog
from ssd_megatron.training.monitor import Monitor, layer_tag


@dataclass(frozen=True)
class RunLog:
    """The three voices of rank 0, or None on every other rank."""

    metrics: MetricsLog | None
    monitor: Monitor | None
    console: Console | None

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One record for metrics.jsonl and the monitors (see metrics.py for kinds and keys)."""
        if self.metrics is not None and self.monitor is not None:
            self.metrics.write(kind, step, **values)
            self.monitor.record(kind, step, **values)

    def note(self, text: str) -> None:
        if self.console is not None:
            self.console.note(text)

    def event(self, text: str) -> None:
        if self.console is not None:
            self.console.event(text)

    def step(self, line: StepLine) -> None:
        if self.console is not None:
            self.console.step(line)

    def resumed(self, step: int, train_steps: int, checkpoints: Path) -> None:
        """The run goes on after `step`; what an earlier process wrote for later steps is forgotten."""
        if self.monitor is not None:
            self.monitor.resume(step)
        self.record("resume", step, checkpoint=str(checkpoints / folder_name(step)))
        self.event(f"resuming after step {step} of {train_steps}")

    def switch(self, step: int, report: SwitchReport) -> None:
        self.record(
            "switch",
            step,
            **{"from": report.from_mode, "to": report.to_mode},
            seconds=report.seconds,
            seconds_statistics=report.seconds_statistics,
            seconds_cluster=report.seconds_cluster,
            seconds_transfer=report.seconds_transfer,
            seconds_verify=report.seconds_verify,
            bytes_moved=report.bytes_moved,
            loss_before=report.loss_before,
            loss_after=report.loss_after,
            loss_sparse=report.loss_sparse,
            reason=report.reason,
            similarity=report.similarity,
            top_k=report.top_k,
            imbalance_before=report.imbalance_before,
            imbalance_after=report.imbalance_after,
        )
        self.event(
            f"step {step}: switch {report.from_mode} -> {report.to_mode} in {report.seconds:.2f} s ({report.reason}); "
            f"probe loss dense {report.loss_before:.4f} -> {report.loss_after:.4f}, sparse {report.loss_sparse:.4f}, "
            f"experts by layer {report.top_k}, {short_number(report.bytes_moved)}B between ranks"
        )

    def check(self, step: int, report: CheckReport) -> None:
        self.record(
            "check",
            step,
            similarity=report.similarity,
            similarity_layers=report.similarity_layers,
            overlap=report.overlap,
            active_fraction=report.active_fraction,
            stable=report.stable,
            seconds=report.seconds,
        )
        similarity = "first look"
        if report.similarity is not None:
            similarity = f"structure similarity {report.similarity:.3f}"
        if report.overlap is not None:
            similarity += f", expert overlap {report.overlap:.3f}"
        active = sum(report.active_fraction) / len(report.active_fraction)
        self.event(
            f"step {step}: {similarity}, {active:.1%} of neurons active, {report.stable} similar checks in a row"
        )

    def placement(self, step: int, report: PlacementReport) -> None:
        self.record("placement", step, **vars(report))
        self.event(
            f"step {step}: experts moved to other ranks in {report.seconds:.2f} s, "
            f"{short_number(report.bytes_moved)}B between ranks; the busiest has {report.imbalance_after:.2f} times "
            f"the mean load, was {report.imbalance_before:.2f}"
        )

    def masks(self, step: int, report: MaskReport) -> None:
        self.record("mask", step, **vars(report))
        again = "" if report.regrown_pruned is None else f", {report.regrown_pruned:.1%} of those regrown before"
        self.event(
            f"step {step}: masks moved {report.share:.1%} of their blocks{again} in {report.seconds:.2f} s; "
            f"{report.live:.1%} of the weights live, {report.ever:.1%} have been"
        )

    def loads(self, step: int, loads: list[list[int]], homes: int) -> None:
        """Tokens per expert by layer, of a sparse step's last microbatch on all data-parallel ranks; experts of one
        home follow each other."""
        ratios = [max(layer) * len(layer) / max(1, sum(layer)) for layer in loads]
        size = len(loads[0]) // homes
        by_home = [[sum(layer[first : first + size]) for first in range(0, len(layer), size)] for layer in loads]
        self.record("load", step, expert_load=ratios, home_load=by_home)
        if self.monitor is not None:
            for index, layer in enumerate(loads):
                self.monitor.histogram(step, layer_tag("expert_load", index), [float(tokens) for tokens in layer])

    def plots(self, step: int, draw: Callable[[], Mapping[str, Figure]]) -> None:
        if self.monitor is not None:
            self.monitor.figures(step, draw)

    def flush(self) -> None:
        if self.metrics is not None and self.monitor is not None:
            self.metrics.flush()
            self.monitor.close()
