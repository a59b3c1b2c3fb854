"""Initial values, all in one place. They depend on a tensor's name and the seed, never on the layout or on what was
initialised before."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssd_megatron.parallel.sharding import row_shard
from ssd_megatron.seeding import generator_for

RESIDUAL_OUTPUTS = ("linear_proj.weight", "bank.w_out")


@torch.no_grad()
def initialize_parameters(parameters: Mapping[str, nn.Parameter], *, seed: int, std: float, num_layers: int) -> None:
    """Set every parameter: norms 1, biases and routers 0, matrices normal(0, std); those that write into the residual
    stream normal(0, std / sqrt(2 num_layers)) (GPT-2).

    Routers get their values at the first switch.

    Args:
        parameters: by logical name; of each, its rows of the logical tensor are set.
    """
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        if leaf.startswith(("bias", "b_")) or owner.endswith("router"):
            parameter.zero_()
        elif owner.endswith("norm"):
            parameter.fill_(1.0)
        elif parameter.device.type != "meta":
            scale = std / math.sqrt(2 * num_layers) if name.endswith(RESIDUAL_OUTPUTS) else std
            shard = row_shard(parameter)
            whole = named_normal(name, shard.shape(parameter), seed)
            parameter.copy_(whole.narrow(0, shard.first, parameter.shape[0]) * scale)


def named_normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal fp32 values from a generator seeded by `name` and `seed`."""
    return torch.randn(shape, generator=generator_for(f"{seed}/{name}"))
