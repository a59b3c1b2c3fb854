"""The processes of a job and their groups, held by one object that is passed in. The only file that sets up
a job's torch.distributed, DeepSpeed's and megatron-core's process groups.

Ranks are numbered tensor parallel first, then data parallel, then pipeline stages:
rank = (stage * data + d) * tensor + t. Expert-parallel ranks are neighbours among the data-parallel ones:
e = d mod expert.
"""

import logging
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.parallel.collectives import Group
from ssd_megatron.parallel.device import IS_CUDA, local_device
from ssd_megatron.parallel.launch import join_launch
from ssd_megatron.parallel.meeting import Meeting


@dataclass(frozen=True)
class Topology:
    """Where this process stands.

    Attributes:
        world: the whole job.
        tensor: ranks that share each layer.
        pipeline: ranks that hold the stages of one copy of the model.
        data: ranks that hold the same shard of the same layers and see different samples.
        expert: those of `data` that share the neurons of each feed-forward network.
        expert_data: those of `data` that hold the same neurons.
        bank: ranks that hold one copy of every neuron bank of the stage together (tensor x expert); index is
            e * tensor + t, see `bank_home`.
        stage: all ranks that hold layers of this stage (tensor x data).
        embedding: first and last stage of one copy of the model, which share tied embeddings; None on the others.
        device: where this process computes.
        launched: a launcher started this process, with which it ends; False for plain python.
    """

    world: Group
    tensor: Group
    pipeline: Group
    data: Group
    expert: Group
    expert_data: Group
    bank: Group
    stage: Group
    embedding: Group | None
    device: torch.device
    launched: bool

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def is_first(self) -> bool:
        """True on the one process that speaks, decides and writes for the job."""
        return self.world.rank == 0

    @property
    def homes(self) -> int:
        """Ranks over which the neurons of one feed-forward network are split."""
        return self.tensor.size * self.expert.size

    @property
    def home(self) -> int:
        """Which of the homes this rank is: neurons of one tensor rank's expert-parallel group follow each other."""
        return self.tensor.rank * self.expert.size + self.expert.rank

    def bank_home(self, bank_rank: int) -> int:
        """Home of a rank of the bank group."""
        e, t = divmod(bank_rank, self.tensor.size)
        return t * self.expert.size + e

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1


def initialize_topology(sizes: ParallelConfig | None = None, meeting: Meeting | None = None) -> Topology:
    """Join the job and build its groups; reads the launcher's environment.

    Args:
        sizes: data parallel only without them.
        meeting: where the ranks have met, if they have.
    """
    sizes = sizes or ParallelConfig()
    timeout = timedelta(seconds=sizes.timeout_seconds)
    launched = join_launch() if meeting is None else meeting.launched
    # What torch gives to groups that are made without a timeout: DeepSpeed's own.
    vars(distributed_c10d).update(default_pg_timeout=timeout, default_pg_nccl_timeout=timeout)
    if IS_CUDA:
        torch.cuda.set_device(local_device())
    # Not by DeepSpeed, which would bind the device: then NCCL makes each of a large job's thousands of groups at once,
    # all ranks together, and not only those that are used.
    dist.init_process_group("nccl" if IS_CUDA else "gloo", timeout=timeout)
    _join_deepspeed()
    return _build(sizes, launched)


def pretend_topology(sizes: ParallelConfig, rank: int, world_size: int) -> Topology:
    """Where one rank of a job of any size would stand: all groups are made, and what they do together does nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    _join_deepspeed()
    return _build(sizes, launched=False)


def _join_deepspeed() -> None:
    # On CPUs DeepSpeed would compile an all-reduce for inference: 40 s, a lock on which later jobs wait for ever
    # when a start is killed meanwhile, and 64 MB of /dev/shm that outlive every killed job.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def leave_topology() -> None:
    """Leave the job, if it was joined: destroy every group, so that the process can end (or join another job)."""
    for known in _DEEPSPEED_EXPERT_GROUPS:
        known.clear()
    deepspeed_groups.mpu = None
    parallel_state.destroy_model_parallel()
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()


def _build(sizes: ParallelConfig, launched: bool) -> Topology:
    deepspeed.utils.logger.setLevel(logging.ERROR)  # its warnings speak to those who program it
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor_parallel_size,
        pipeline_model_parallel_size=sizes.pipeline_parallel_size,
        expert_model_parallel_size=sizes.expert_parallel_size,
        expert_tensor_parallel_size=sizes.tensor_parallel_size,
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
        distributed_timeout_minutes=sizes.timeout_seconds / 60,
    )
    ps = parallel_state
    ends = ps.get_embedding_group(check_initialized=False)
    topology = Topology(
        world=_group("all", dist.group.WORLD),
        tensor=_group("tensor-parallel", ps.get_tensor_model_parallel_group()),
        pipeline=_group("pipeline", ps.get_pipeline_model_parallel_group()),
        data=_group("data-parallel", ps.get_data_parallel_group()),
        expert=_group("expert-parallel", ps.get_expert_model_parallel_group()),
        expert_data=_group("expert-data-parallel", ps.get_expert_data_parallel_group()),
        bank=_group("bank", ps.get_expert_tensor_and_model_parallel_group()),
        stage=_group("stage", ps.get_tensor_and_data_parallel_group()),
        embedding=_group("embedding", ends) if ends is not None else None,
        device=local_device(),
        launched=launched,
    )
    _tell_deepspeed(topology)
    return topology


def expert_group_name(topology: Topology) -> str:
    """DeepSpeed's name of the expert-parallel groups."""
    return f"ep_size_{topology.expert.size}"


class ModelParallelUnit:
    """What DeepSpeedEngine asks about tensor parallelism (it calls the object `mpu`)."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.data.handle

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data.size

    def get_data_parallel_rank(self) -> int:
        return self._topology.data.rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.tensor.handle

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._topology.tensor.size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._topology.tensor.rank

    # Ranks over which gradient norms and overflows are summed up beside the data-parallel ones.
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank


_DEEPSPEED_EXPERT_GROUPS: tuple[dict[str, object], ...] = (
    deepspeed_groups._EXPERT_PARALLEL_GROUP,
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
)


def _tell_deepspeed(topology: Topology) -> None:
    """DeepSpeed finds the groups of expert parameters by name, and makes none of its own then."""
    expert, expert_data = topology.expert, topology.expert_data
    values = (expert.handle, list(expert.ranks), expert_data.handle, list(expert_data.ranks))
    for known, value in zip(_DEEPSPEED_EXPERT_GROUPS, values, strict=True):
        known[expert_group_name(topology)] = value


def _group(name: str, handle: dist.ProcessGroup | None) -> Group:
    assert handle is not None, name
    ranks = tuple(dist.get_process_group_ranks(handle))
    return Group(name, dist.get_rank(handle), len(ranks), ranks, handle, local_device())
