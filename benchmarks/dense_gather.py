"""Dense phases with expert parallelism: weights gathered in every pass, or once per optimizer step. Time and memory.

    torchrun --nproc-per-node 2 -m benchmarks.dense_gather [--hidden 512] [--layers 4] [--microbatches 4] [--rounds 5]

Both engines live in one process and step in turn. Memory is what a step makes beyond what it began with, on rank 0.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peak_memory import PeakMemory
from ssd_megatron.config.load import RunConfig, load_config
from ssd_megatron.parallel.device import detect_hardware, share_cores
from ssd_megatron.parallel.launch import world_size_of_launch
from ssd_megatron.parallel.topology import initialize_topology, leave_topology
from ssd_megatron.training.synthetic import SyntheticJob

KINDS = ("microbatch", "step")


def main() -> int:
    arguments = _arguments()
    share_cores()
    configs = {kind: _config(kind, arguments) for kind in KINDS}
    topology = initialize_topology(configs["step"].ssd_megatron.parallel)
    jobs = {kind: SyntheticJob.build(config, topology) for kind, config in configs.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in range(1, arguments.rounds + 2):
        for kind, job in jobs.items():
            topology.world.agree("round", step)
            started = time.perf_counter()
            job.train_step(step)
            seconds[kind].append(time.perf_counter() - started)
    memory = {}
    for kind, job in jobs.items():
        with PeakMemory() as made:
            job.train_step(arguments.rounds + 2)
        memory[kind] = made.peak
    if topology.is_first:
        table = Table("gathered once per", "seconds", "ratio", "MiB made in a step", "ratio")
        medians = {kind: statistics.median(values[1:]) for kind, values in seconds.items()}
        for kind in KINDS:
            table.add_row(
                kind,
                f"{medians[kind]:.3f}",
                f"{medians[kind] / medians['microbatch']:.2f}",
                f"{memory[kind] / 2**20:.1f}",
                f"{memory[kind] / memory['microbatch']:.2f}",
            )
        Console().print(table)
    for job in jobs.values():
        job.engine.close()
    leave_topology()
    return 0


def _config(kind: str, arguments: argparse.Namespace) -> RunConfig:
    ranks = world_size_of_launch()
    raw: dict[str, Any] = {
        "train_batch_size": 2 * ranks * arguments.microbatches,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000_000},
        "tensorboard": {"enabled": False},
        "ssd_megatron": {
            "run_dir": "unused",
            "model": {
                "num_layers": arguments.layers,
                "hidden_size": arguments.hidden,
                "num_attention_heads": 8,
                "seq_length": 128,
                "vocab_size": 1024,
            },
            "data": {"paths": ["unused"], "tokenizer": "unused"},
            "parallel": {"expert_parallel_size": ranks, "dense_gather": kind},
            "ssd": {"schedule": "dense"},
            "training": {"train_steps": 1000},
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(raw))
        return load_config(path, world_size=ranks, hardware=detect_hardware())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("layers", 4), ("microbatches", 4), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
