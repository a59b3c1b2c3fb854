"""The processes of a job and their groups, held by one object that is passed in. The only file that sets up
torch.distributed, DeepSpeed's and megatron-core's process groups."""

import logging
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ssd_megatron.parallel.device import IS_CUDA, local_device
from ssd_megatron.parallel.launch import join_launch


@dataclass(frozen=True)
class Topology:
    """Where this process stands.

    Attributes:
        rank, world_size: in the whole job.
        data_parallel_rank, data_parallel_size: among the processes that hold the same parameters.
        data_parallel_group: their process group.
        device: where this process computes.
        launched: a launcher started this process, with which it ends; False for plain python.
    """

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    data_parallel_group: dist.ProcessGroup
    device: torch.device
    launched: bool

    @property
    def is_first(self) -> bool:
        """True on the one process that speaks, decides and writes for the job."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum of small numbers over the data-parallel group, in float64, the same on every rank."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.data_parallel_group)
        return [float(value) for value in total.tolist()]

    def max(self, values: list[int]) -> list[int]:
        """Largest of small integers over all processes: how they agree on flags."""
        largest = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return [int(value) for value in largest.tolist()]


def initialize_topology(*, timeout: timedelta = timedelta(minutes=30)) -> Topology:
    """Join the job and build its groups; reads the launcher's environment (deepspeed, torchrun, or none)."""
    launched = join_launch()
    if IS_CUDA:
        torch.cuda.set_device(local_device())
    deepspeed.init_distributed(
        dist_backend="nccl" if IS_CUDA else "gloo",
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    deepspeed.utils.logger.setLevel(logging.ERROR)  # its warnings speak to those who program it
    parallel_state.initialize_model_parallel(order="tp-dp-pp", create_gloo_process_groups=False)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        data_parallel_group=parallel_state.get_data_parallel_group(),
        device=local_device(),
        launched=launched,
    )


def leave_topology() -> None:
    """Leave the job: destroy every group, so that the process can end (or join another job)."""
    parallel_state.destroy_model_parallel()
    deepspeed.comm.destroy_process_group()
