"""What does a switch cost? Seconds by part beside those of training steps, memory beside that of one layer's bank, and
what many switches leave behind.

    python -m benchmarks.switch [--model gpt-1.3b|gpt-124m|small] [--layers N] [--tokens N] [--repeat N] [--json FILE]
    torchrun --nproc-per-node 2 -m benchmarks.switch --tensor 2

Random tokens, a model of the given shape (of which --layers limits the number of layers: steps and switches both grow
with it), one optimizer step of --tokens tokens. A pair is dense -> sparse -> dense.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from benchmarks.jobs import MODELS, job_config, sparse_settings
from benchmarks.peak_memory import PeakMemory
from benchmarks.row import Row
from benchmarks.table import parser_for, report
from benchmarks.timing import seconds
from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.parallel.device import IS_CUDA
from ssd_megatron.parallel.topology import Topology, initialize_topology, leave_topology
from ssd_megatron.switching.coordinator import Coordinator
from ssd_megatron.switching.partition import random_partition
from ssd_megatron.switching.reports import SwitchReport
from ssd_megatron.switching.switch import regroup_neurons
from ssd_megatron.training.synthetic import SyntheticJob

# A switch costs less than this many training steps, and memory for at most this many banks of one layer, where a bank
# is all its fp32 masters on this rank. Memory of --repeat switches grows by less than this share.
STEPS_GOAL, BANKS_GOAL, GROWTH_GOAL = 10.0, 4.0, 0.01


@dataclass
class Job:
    """What is measured, and how far it is."""

    job: SyntheticJob
    step: int = 0

    @classmethod
    def alternating(
        cls, model: dict[str, Any], topology: Topology, *, experts: int, samples: int, switches: int
    ) -> "Job":
        """A job that begins dense and may change its mode `switches` times, at every step from the first."""
        sizes = {name: getattr(topology, name).size for name in ("tensor", "pipeline", "expert")}
        ssd = sparse_settings(experts) | {"top_k_allocation": "measured"}  # the default, and the dearest
        modes = ("dense", "sparse")
        ssd["phases"] += [{"start_step": step, "mode": modes[step % 2]} for step in range(2, switches + 1)]
        config = job_config(
            model,
            samples=samples,
            ranks=topology.world.size,
            ssd=ssd,
            parallel={f"{name}_parallel_size": size for name, size in sizes.items()},
            steps=switches + 1,
        )
        return cls(SyntheticJob.build(config, topology))

    @property
    def coordinator(self) -> Coordinator:
        return self.job.coordinator

    def train_step(self) -> float:
        """Seconds of one optimizer step."""
        return seconds(lambda: self.job.train_step(self.step + 1))

    def switch(self) -> SwitchReport:
        """The next switch: the schedule changes the mode at every step."""
        self.step += 1
        report = self.job.switch(self.step)
        assert report is not None
        return report


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    sizes = ParallelConfig(
        tensor_parallel_size=arguments.tensor,
        pipeline_parallel_size=arguments.pipeline,
        expert_parallel_size=arguments.expert,
    )
    topology = initialize_topology(sizes)
    model = {"vocab_size": arguments.vocab} | MODELS[arguments.model]
    if arguments.layers is not None:
        model["num_layers"] = arguments.layers
    samples = max(1, arguments.tokens // model["seq_length"])
    switches = 6 + 2 * arguments.repeat
    job = Job.alternating(model, topology, experts=arguments.experts, samples=samples, switches=switches)
    found = _rows(job, arguments.steps, arguments.repeat)
    if topology.is_first:
        met = report(f"Switches of {arguments.model}, {topology.world.size} ranks", found, arguments.json)
    else:
        met = all([row.ok for row in found])
    job.job.engine.close()
    leave_topology()
    return 0 if met else 1


def _rows(job: Job, steps: int, repeat: int) -> Iterator[Row]:
    dense = [job.train_step() for _ in range(steps)]
    sparse: list[float] = []
    switches: list[SwitchReport] = []
    for _ in range(3):
        switches.append(job.switch())
        sparse += [job.train_step() for _ in range(max(1, steps // 3))]
        job.switch()
    step = statistics.median(dense)
    times: dict[str, float | str] = {"dense step s": step, "sparse step s": statistics.median(sparse)}
    yield _switch_row("first switch / dense training step", switches[:1], times)
    yield _switch_row("later switch / dense training step", switches[1:], times)
    extra = [_memory_of_a_move(job, seed) for seed in range(3)]
    ffn = next(iter(job.coordinator.networks.local.values()))
    elements = sum(parameter.numel() for parameter in ffn.bank.neuron_parameters().values())
    yield Row("memory of a move / masters of one bank", max(extra) / (4 * elements), BANKS_GOAL, 1.0)
    if repeat:
        yield Row("memory grown by repeated switches", _growth(job, repeat), GROWTH_GOAL, 0.0)


def _switch_row(name: str, switches: list[SwitchReport], times: dict[str, float | str]) -> Row:
    taken, step = statistics.median(switch.seconds for switch in switches), times["dense step s"]
    assert isinstance(step, float)
    details = {
        "switch s": taken,
        "statistics s": statistics.median(switch.seconds_statistics for switch in switches),
        "clustering s": statistics.median(switch.seconds_cluster for switch in switches),
        "transfer s": statistics.median(switch.seconds_transfer for switch in switches),
        "verification s": statistics.median(switch.seconds_verify for switch in switches),
        "MB between ranks": statistics.median(switch.bytes_moved for switch in switches) / 1e6,
    }
    return Row(name, taken / step, STEPS_GOAL, 0.0, details=details | times)


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
    return torch.cuda.memory_allocated() if IS_CUDA else int(psutil.Process().memory_info().rss)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__, quick=False)
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
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
