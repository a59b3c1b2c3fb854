"""Does this cluster train right on every layout? Five minutes before a month.

    deepspeed --hostfile hostfile examples/selfcheck/selfcheck.py      (or torchrun, srun, mpirun; any number of ranks)

Trains a tiny GPT on random tokens for 20 steps with two switches to sparse, on every layout that fits the ranks, and
compares losses and gradient norms with those of one process; measures the bandwidth of each group. One verdict per
line; exit status 0 if all are good. fp32 throughout; --bf16 for a looser check in the precision that one trains in.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ssd_megatron.config.load import RunConfig, load_config
from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.parallel.collectives import Group
from ssd_megatron.parallel.device import IS_CUDA, detect_hardware, share_cores
from ssd_megatron.parallel.launch import find_launch
from ssd_megatron.parallel.topology import Topology, initialize_topology, leave_topology
from ssd_megatron.switching.switch import SwitchError
from ssd_megatron.training.synthetic import SyntheticJob

STEPS = 20
PHASES = ((1, "dense"), (6, "sparse"), (11, "dense"), (14, "sparse"), (18, "dense"))
HEADS, LAYERS, EXPERTS = 8, 8, 32
# Largest relative difference to one process: of losses and of gradient norms.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 2e-1)}
BANDWIDTH_BYTES = 256 * 2**20 if IS_CUDA else 8 * 2**20

Curve = list[tuple[float, float]]


class Sizes(NamedTuple):
    """Tensor, pipeline and expert parallel sizes, and the ZeRO stage."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    stage: int = 1

    def __str__(self) -> str:
        return f"TP {self.tensor} x PP {self.pipeline} x EP {self.expert}, ZeRO {self.stage}"


class Outcome(NamedTuple):
    """Of a layout: losses and gradient norms of all steps, bandwidths in words, why a switch failed or nothing, and
    whether this is the rank that speaks."""

    curve: Curve
    bandwidths: str
    failure: str
    is_first: bool


def main() -> int:
    arguments = _arguments()
    share_cores()
    if arguments.reference is not None:
        arguments.reference.write_text(json.dumps(train(Sizes(), 1, arguments).curve))
        return 0
    ranks = find_launch(os.environ).world_size
    console = Console(highlight=False)
    expected: Curve = []
    good = True
    table = Table("layout", "losses", "gradient norms", "bandwidth, GB/s", "seconds", "verdict")
    for sizes in layouts(ranks):
        started = time.perf_counter()
        outcome = train(sizes, ranks, arguments)
        if not outcome.is_first:
            continue
        expected = expected or reference(ranks, arguments)
        loss, norm = (worst(outcome.curve, expected, index) for index in (0, 1))
        allowed = TOLERANCE["bfloat16" if arguments.bf16 else "float32"]
        fine = loss <= allowed[0] and norm <= allowed[1]
        good &= fine
        seconds = time.perf_counter() - started
        verdict = "ok" if fine else "WRONG"
        table.add_row(str(sizes), f"{loss:.0e}", f"{norm:.0e}", outcome.bandwidths, f"{seconds:.1f}", verdict)
        if outcome.failure:
            console.print(f"{sizes}: {outcome.failure}", soft_wrap=True)
        console.print(f"{sizes}: losses differ by {loss:.0e}, gradient norms by {norm:.0e}: {verdict}", soft_wrap=True)
    if expected:
        console.print(table)
        console.print(f"allowed: {TOLERANCE['bfloat16' if arguments.bf16 else 'float32']}; {ranks} ranks")
    return 0 if good else 1


def layouts(ranks: int) -> list[Sizes]:
    """Each kind of parallelism alone, then together, as far as they fit; ZeRO 2 where there is no pipeline."""
    candidates = [
        *(Sizes(stage=stage) for stage in (1, 2)),
        *(Sizes(tensor=size) for size in (2, 4, 8)),
        *(Sizes(pipeline=size) for size in (2, 4, 8)),
        *(Sizes(expert=size) for size in (2, 4, 8)),
        *(
            Sizes(2, 2),
            Sizes(2, 1, 2),
            Sizes(2, 1, 2, 2),
            Sizes(1, 2, 2),
            Sizes(2, 2, 2),
            Sizes(4, 2, 2),
            Sizes(8, 2, 2),
        ),
    ]
    return [s for s in candidates if ranks % (s.tensor * s.pipeline * s.expert) == 0]


def train(sizes: Sizes, ranks: int, arguments: argparse.Namespace) -> Outcome:
    config = run_config(sizes, ranks, arguments)
    topology = initialize_topology(config.ssd_megatron.parallel)
    job = SyntheticJob.build(config, topology)
    curve: Curve = []
    failure = ""
    try:
        for step in range(1, STEPS + 1):
            job.switch(step)
            result = job.train_step(step)
            curve.append((result.loss, result.grad_norm))
            job.coordinator.after_step(step, result.loss)
    except SwitchError as error:  # on every rank alike
        failure = str(error)
        curve += [(math.nan, math.nan)] * (STEPS - len(curve))
    shown = (
        ", ".join(f"{group.name.removesuffix('-parallel')} {bandwidth(group):.3g}" for group in groups(topology)) or "-"
    )
    outcome = Outcome(curve, shown, failure, topology.is_first)
    job.engine.close()
    leave_topology()
    # The next job of this process meets at another port, where rank 0 listens and not torchrun's agent.
    os.environ.update(MASTER_PORT=str(int(os.environ["MASTER_PORT"]) + 1), TORCHELASTIC_USE_AGENT_STORE="False")
    return outcome


def run_config(sizes: Sizes, ranks: int, arguments: argparse.Namespace) -> RunConfig:
    data = ranks // (sizes.tensor * sizes.pipeline)
    batch = math.lcm(8, arguments.batch or ranks)
    modes = [{"start_step": step, "mode": mode} for step, mode in PHASES]
    raw: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": max(1, batch // data // max(2, sizes.pipeline)),
        # An update proportional to the gradient: Adam would hide a wrong scale.
        "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "eps": 1.0}},
        "gradient_clipping": 0.5,
        "bf16": {"enabled": arguments.bf16},
        "zero_optimization": {"stage": sizes.stage, "reduce_bucket_size": 5_000_000},
        "tensorboard": {"enabled": False},
        "ssd_megatron": {
            "run_dir": "unused",
            "model": {
                "num_layers": LAYERS,
                "hidden_size": 128,
                "num_attention_heads": HEADS,
                "seq_length": 32,
                "vocab_size": 512,
            },
            "data": {"paths": ["unused"], "tokenizer": "unused"},
            "parallel": ParallelConfig(
                tensor_parallel_size=sizes.tensor,
                pipeline_parallel_size=sizes.pipeline,
                expert_parallel_size=sizes.expert,
                timeout_seconds=arguments.timeout,
            ).model_dump(),
            "ssd": {
                "schedule": "fixed",
                "phases": modes,
                "partition": "random",
                "num_experts": EXPERTS,
                "top_k": 8,
                "top_k_allocation": "equal",
                "check_interval": 4,
            },
            "training": {"train_steps": STEPS},
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(raw))
        return load_config(path, world_size=ranks, hardware=detect_hardware())


def reference(ranks: int, arguments: argparse.Namespace) -> Curve:
    """The curve of one process, computed by one of its own."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI", "TORCHELASTIC", "GROUP_", "ROLE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.json"
        command = [sys.executable, __file__, "--reference", str(path), "--batch", str(arguments.batch or ranks)]
        command += ["--bf16"] if arguments.bf16 else []
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        curve: Curve = json.loads(path.read_text())
    return curve


def worst(curve: Curve, expected: Curve, index: int) -> float:
    """Largest relative difference; infinity where one is not finite."""
    differences = [abs(mine[index] / wanted[index] - 1) for mine, wanted in zip(curve, expected, strict=True)]
    return max(difference if math.isfinite(difference) else math.inf for difference in differences)


def groups(topology: Topology) -> list[Group]:
    candidates = (topology.tensor, topology.pipeline, topology.data, topology.expert, topology.world)
    return [group for group in candidates if group.size > 1]


def bandwidth(group: Group) -> float:
    """GB/s that each rank sends in an all-reduce of its group (2 (n - 1) / n of the bytes), median of five."""
    tensor = torch.zeros(BANDWIDTH_BYTES // 4, device=group.device)
    seconds = []
    for _ in range(6):
        dist.barrier(group.handle)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group.handle)
        if IS_CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * (group.size - 1) / group.size * BANDWIDTH_BYTES / sorted(seconds[1:])[2] / 1e9


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", action="store_true", help="train in bf16 instead of fp32")
    parser.add_argument("--timeout", type=int, default=120, help="seconds to wait for a rank (default 120)")
    parser.add_argument("--reference", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
