"""What does a switch cost? Seconds by part beside those of training steps, memory beside that of one layer's bank, and
what many switches leave behind.

    python -m benchmarks.switch [--model gpt-1.3b|gpt-124m|small] [--layers N] [--tokens N] [--repeat N] [--json FILE]
    torchrun --nproc-per-node 2 -m benchmarks.switch --tensor 2

Random tokens, a model of the given shape (of which --layers limits the number of layers: steps and switches both grow
with it), one optimizer step of --tokens tokens. A pair is dense -> sparse -> dense.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peak_memory import PeakMemory
from benchmarks.row import Row
from ssd_megatron.config.load import load_config
from ssd_megatron.parallel.device import IS_CUDA, detect_hardware
from ssd_megatron.parallel.launch import world_size_of_launch
from ssd_megatron.parallel.topology import initialize_topology, leave_topology
from ssd_megatron.switching.coordinator import Coordinator
from ssd_megatron.switching.partition import random_partition
from ssd_megatron.switching.reports import SwitchReport
from ssd_megatron.switching.switch import regroup_neurons
from ssd_megatron.training.run_folder import versions
from ssd_megatron.training.synthetic import SyntheticJob

MODELS = {
    "gpt-1.3b": {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "seq_length": 2048},
    "gpt-124m": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 1024},
    "small": {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 128},
}
# A switch costs less than this many training steps, and memory for at most this many banks of one layer, where a bank
# is all its fp32 masters on this rank. Memory of --repeat switches grows by less than this share.
STEPS_GOAL, BANKS_GOAL, GROWTH_GOAL = 10.0, 4.0, 0.01


@dataclass
class Job:
    """What is measured, and how far it is."""

    job: SyntheticJob
    step: int = 0

    @property
    def coordinator(self) -> Coordinator:
        return self.job.coordinator

    def train_step(self) -> float:
        """Seconds of one optimizer step."""
        _wait()
        started = time.perf_counter()
        self.job.train_step(self.step + 1)
        _wait()
        return time.perf_counter() - started

    def switch(self) -> SwitchReport:
        """The next switch: the schedule changes the mode at every step."""
        self.step += 1
        report = self.job.switch(self.step)
        assert report is not None
        return report


def main() -> int:
    arguments = _arguments()
    job = build(arguments)
    dense = [job.train_step() for _ in range(arguments.steps)]
    switches: list[SwitchReport] = []
    sparse: list[float] = []
    for _ in range(3):
        switches.append(job.switch())
        sparse += [job.train_step() for _ in range(max(1, arguments.steps // 3))]
        job.switch()
    extra = [_memory_of_a_move(job, seed) for seed in range(3)]
    growth = _growth(job, arguments.repeat) if arguments.repeat else None
    rows = _rows(job, dense, sparse, switches, extra, growth)
    if job.job.topology.is_first:
        _show(rows, switches, dense, sparse)
        if arguments.json is not None:
            _write(arguments, rows, switches, dense, sparse, job.job.topology.world.size)
    job.job.engine.close()
    leave_topology()
    return 0 if all(row.ok for row in rows) else 1


def build(arguments: argparse.Namespace) -> Job:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(_ds_config(arguments)))
        config = load_config(path, world_size=world_size_of_launch(), hardware=detect_hardware())
    return Job(SyntheticJob.build(config, initialize_topology(config.ssd_megatron.parallel)))


def _ds_config(arguments: argparse.Namespace) -> dict[str, Any]:
    model = MODELS[arguments.model] | {"vocab_size": arguments.vocab}
    if arguments.layers is not None:
        model["num_layers"] = arguments.layers
    steps = 8 + 2 * arguments.repeat
    modes = ("dense", "sparse")
    return {
        "train_batch_size": max(1, arguments.tokens // model["seq_length"]),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000},
        "tensorboard": {"enabled": False},
        "ssd_megatron": {
            "run_dir": "unused",
            "model": model,
            "data": {"paths": ["unused"], "tokenizer": "unused"},
            "parallel": {
                "tensor_parallel_size": arguments.tensor,
                "pipeline_parallel_size": arguments.pipeline,
                "expert_parallel_size": arguments.expert,
            },
            "ssd": {
                "schedule": "fixed",
                "phases": [{"start_step": 1, "mode": "sparse"}]
                + [{"start_step": step, "mode": modes[step % 2]} for step in range(2, steps)],
                "num_experts": arguments.experts,
                "top_k": arguments.experts // 4,
                "top_k_allocation": "equal",
            },
            "training": {"train_steps": steps},
        },
    }


def _rows(
    job: Job,
    dense: list[float],
    sparse: list[float],
    switches: list[SwitchReport],
    extra: list[int],
    growth: float | None,
) -> list[Row]:
    first, later = switches[0], statistics.median(report.seconds for report in switches[1:])
    step = statistics.median(dense)
    ffn = next(iter(job.coordinator.networks.local.values()))
    elements = sum(parameter.numel() for parameter in ffn.bank.neuron_parameters().values())
    rows = [
        Row("first switch / dense training step", first.seconds / step, STEPS_GOAL, 0.0),
        Row("later switch / dense training step", later / step, STEPS_GOAL, 0.0),
        Row("memory of a move / masters of one bank", max(extra) / (4 * elements), BANKS_GOAL, 1.0),
    ]
    if growth is not None:
        rows.append(Row("memory grown by repeated switches", growth, GROWTH_GOAL, 0.0))
    return rows


def _memory_of_a_move(job: Job, seed: int) -> int:
    """Most bytes of tensors made while all banks move to random orders."""
    networks, experts = job.coordinator.networks, job.job.config.ssd_megatron.ssd.num_experts
    neurons = job.job.config.ssd_megatron.model.ffn_hidden_size
    labels = {
        name: random_partition(neurons, experts, seed + index).labels for index, name in enumerate(networks.local)
    }
    with PeakMemory() as memory:
        regroup_neurons(networks, labels, experts, job.job.engine.state)
    return memory.peak


def _growth(job: Job, repeat: int) -> float:
    """Share by which memory grew from the first tenth of the switches to the end."""
    used = []
    for _ in range(repeat):
        job.switch()
        job.switch()
        used.append(_memory())
    early, late = used[: max(1, repeat // 10)], used[-max(1, repeat // 10) :]
    return statistics.median(late) / statistics.median(early) - 1


def _memory() -> int:
    return torch.cuda.memory_allocated() if IS_CUDA else psutil.Process().memory_info().rss


def _wait() -> None:
    if IS_CUDA:
        torch.cuda.synchronize()


def _show(rows: list[Row], switches: list[SwitchReport], dense: list[float], sparse: list[float]) -> None:
    console = Console()
    table = Table("measurement", "value", "goal", "ideal", "")
    for row in rows:
        table.add_row(row.name, f"{row.value:.3f}", f"<= {row.goal:g}", f"{row.ideal:g}", "ok" if row.ok else "missed")
    console.print(table)
    console.print(f"training step: dense {statistics.median(dense):.2f} s, sparse {statistics.median(sparse):.2f} s")
    for report in switches:
        console.print(
            f"switch {report.seconds:.2f} s: {_parts(report)}, {report.bytes_moved / 1e6:.1f} MB between ranks"
        )


def _parts(report: SwitchReport) -> str:
    parts = {
        "statistics": report.seconds_statistics,
        "clustering": report.seconds_cluster,
        "transfer": report.seconds_transfer,
        "verification": report.seconds_verify,
    }
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())


def _write(
    arguments: argparse.Namespace,
    rows: list[Row],
    switches: list[SwitchReport],
    dense: list[float],
    sparse: list[float],
    ranks: int,
) -> None:
    hardware = detect_hardware()
    result = {
        "command": " ".join(["benchmarks.switch", *sys.argv[1:]]),
        "hardware": hardware.name,
        "cores": os.cpu_count(),
        "ranks": ranks,
        "versions": versions(),
        "rows": [vars(row) | {"ok": row.ok} for row in rows],
        "dense_step_seconds": dense,
        "sparse_step_seconds": sparse,
        "switches": [vars(report) for report in switches],
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small")
    integers: dict[str, tuple[int | None, str]] = {
        "layers": (None, "layers instead of the model's"),
        "vocab": (4096, "vocabulary"),
        "experts": (64, "experts per layer"),
        "tokens": (4096, "tokens of one optimizer step"),
        "steps": (5, "timed steps"),
        "repeat": (0, "pairs of switches whose memory is watched"),
        "tensor": (1, "tensor parallel size"),
        "pipeline": (1, "pipeline parallel size"),
        "expert": (1, "expert parallel size"),
    }
    for name, (default, text) in integers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
