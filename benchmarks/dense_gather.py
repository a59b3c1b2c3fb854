"""Dense phases with expert parallelism: weights gathered in every pass, or once per optimizer step. Time and memory.

    torchrun --nproc-per-node 2 -m benchmarks.dense_gather [--hidden 512] [--layers 4] [--microbatches 4] [--rounds 5]

Both engines live in one process and step in turn. Memory is what a step makes beyond what it began with, on rank 0.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.jobs import job_config
from benchmarks.peak_memory import PeakMemory
from benchmarks.row import Row
from benchmarks.table import parser_for, report
from benchmarks.timing import seconds
from ssd_megatron.config.load import RunConfig
from ssd_megatron.parallel.device import share_cores
from ssd_megatron.parallel.launch import world_size_of_launch
from ssd_megatron.parallel.topology import initialize_topology, leave_topology
from ssd_megatron.training.synthetic import SyntheticJob

KINDS = ("microbatch", "step")
# Of a gather per microbatch: gathering once must pay, and costs the whole banks of all layers.
TIME_GOAL, MEMORY_GOAL = 1.0, 2.0


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    share_cores()
    found = list(_rows(arguments))
    met = all(row.ok for row in found)
    if found:
        met = report("Gathered once per step / per microbatch", found, arguments.json)
    leave_topology()
    return 0 if met else 1


def _rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """On the first rank; every rank runs through."""
    configs = {kind: _config(kind, arguments) for kind in KINDS}
    topology = initialize_topology(configs["step"].ssd_megatron.parallel)
    jobs = {kind: SyntheticJob.build(config, topology) for kind, config in configs.items()}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in range(1, arguments.rounds + 2):
        for kind, job in jobs.items():
            topology.world.agree("round", step)
            times[kind].append(seconds(partial(job.train_step, step)))
    memory = {}
    for kind, job in jobs.items():
        with PeakMemory() as made:
            job.train_step(arguments.rounds + 2)
        memory[kind] = made.peak / 2**20
        job.engine.close()
    medians = {kind: statistics.median(values[1:]) for kind, values in times.items()}
    if topology.is_first:
        yield _row("time of a step", medians, TIME_GOAL, "s")
        yield _row("memory made in a step", memory, MEMORY_GOAL, "MiB")


def _row(name: str, values: dict[str, float], goal: float, unit: str) -> Row:
    details = {f"per {kind} {unit}": value for kind, value in values.items()}
    return Row(name, values["step"] / values["microbatch"], goal, 0.0, details=details)


def _config(kind: str, arguments: argparse.Namespace) -> RunConfig:
    ranks = world_size_of_launch()
    model = {
        "num_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "num_attention_heads": 8,
        "seq_length": 128,
        "vocab_size": 1024,
    }
    return job_config(
        model,
        samples=2 * ranks * arguments.microbatches,
        micro_batch=2,
        ranks=ranks,
        bf16=False,
        parallel={"expert_parallel_size": ranks, "dense_gather": kind},
        bucket=10_000_000,
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__, quick=False)
    for name, default in (("hidden", 512), ("layers", 4), ("microbatches", 4), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
