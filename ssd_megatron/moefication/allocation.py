"""How many experts each layer of a MoEfied model computes."""

from collections.abc import Sequence
from itertools import islice
from typing import Literal, get_args

import torch

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.model.cost import layers_of
from ssd_megatron.moefication.experts import set_mode
from ssd_megatron.moefication.task import Task
from ssd_megatron.switching.allocation import allocate_alike, sparsity_costs

Allocation = Literal["equal", "measured"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
PROBE_BATCHES = 4


def deal_out(
    task: Task, model: ModelConfig, num_experts: int, numbers: Sequence[int], allocation: Allocation
) -> list[list[int]]:
    """Experts by layer for each mean number of experts: as many in all (MoEfication, arXiv 2110.01786), or more where
    they save more of the loss on training batches, as `ssd.top_k_allocation` does. Networks have their experts and
    routers, and are dense afterwards."""
    set_mode(task.ffns, "dense")
    if allocation == "equal" or set(numbers) <= {1, num_experts}:
        return [[number] * len(task.ffns) for number in numbers]
    batches = list(islice(task.batches(), PROBE_BATCHES))

    @torch.no_grad()
    def probe_loss() -> float:
        return sum(task.forward_backward(batch) for batch in batches) / len(batches)

    costs = sparsity_costs(list(task.ffns), task.ffns, probe_loss, num_experts, least=1)
    parts = [layer.context for layer in layers_of(model)]  # an encoder's layers have none; a decoder has fewer tokens
    return [allocate_alike(costs, parts, number, least=1) for number in numbers]
