"""Attention biases by distance in buckets (T5, arXiv 1910.10683, section 2.1)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.parallel.regions import enter_region
from ssd_megatron.parallel.topology import Topology


def position_bias(table_BN: Tensor, length: int, model: ModelConfig, topology: Topology, *, causal: bool) -> Tensor:
    """Biases [1, heads of this tensor-parallel rank, length, length] to be added to attention scores.

    Args:
        table_BN: a bias for each bucket and head, the same on all tensor-parallel ranks.
        causal: later positions are hidden: their bias is -infinity.
    """
    tensor = topology.tensor
    heads = table_BN.shape[1] // tensor.size
    mine_BN = enter_region(table_BN, tensor.handle).narrow(1, tensor.rank * heads, heads)
    positions = torch.arange(length, device=table_BN.device)
    return bias_between(mine_BN, positions, positions, model, causal=causal)


def bias_between(table_BN: Tensor, queries_s: Tensor, keys_S: Tensor, model: ModelConfig, *, causal: bool) -> Tensor:
    """The same of queries and keys at any positions and all heads of the table, [1, n, s, S]."""
    distance = keys_S[None, :] - queries_s[:, None]  # from a query to a key
    bias = F.embedding(distance_buckets(distance, model, causal=causal), table_BN).permute(2, 0, 1)[None]
    return bias.masked_fill(distance > 0, float("-inf")) if causal else bias


def distance_buckets(distance: Tensor, model: ModelConfig, *, causal: bool) -> Tensor:
    """The bucket of each distance: half of them have one distance each, the others ranges that grow with the logarithm
    up to `relative_attention_max_distance`; of an encoder's, half are for later positions."""
    buckets, furthest = model.relative_attention_num_buckets, model.relative_attention_max_distance
    if causal:
        offset, distance = torch.zeros_like(distance), (-distance).clamp(min=0)
    else:
        buckets //= 2
        offset, distance = (distance > 0).long() * buckets, distance.abs()
    exact = buckets // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)
