"""Tells DeepSpeed which parameters are expert-parallel: it then reduces their gradients over the ranks that hold the
same ones, and divides by the size of the whole data-parallel group, as for all others."""

from collections.abc import Iterable

from deepspeed.moe.layer import MoE
from torch import nn

from ssd_megatron.parallel.sharding import mark_expert_parallel
from ssd_megatron.parallel.topology import Topology, expert_group_name


class _Marker(MoE):  # type: ignore[misc]
    """DeepSpeedEngine handles expert parameters if it finds a module of this class; it computes nothing."""

    def __init__(self, topology: Topology) -> None:
        nn.Module.__init__(self)
        self.num_experts = self.ep_size = topology.expert.size

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already."""


def declare_expert_parallel(module: nn.Module, parameters: Iterable[nn.Parameter], topology: Topology) -> None:
    """Before `deepspeed.initialize(module, ...)`: `parameters` differ between expert-parallel ranks."""
    if topology.expert.size == 1:
        return
    for parameter in parameters:
        mark_expert_parallel(parameter, expert_group_name(topology))
    module.add_module("expert_parallelism", _Marker(topology))
