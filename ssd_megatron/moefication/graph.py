"""Experts from the co-activation graph: neurons that fire on the same tokens are joined, and the graph is cut.

METIS cuts it into parts of about the same size; neurons then move, as few as can be, until all have the same.
Source: MoEfication (arXiv 2110.01786). Shapes: N neurons, E experts, T tokens.
"""

import math

import numpy as np
import pymetis
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.switching.assignment import balanced_assignment, expert_size
from ssd_megatron.switching.partition import Partition

NEIGHBOURS = 32  # heaviest edges of a neuron: the whole graph has N^2, most of them light
ROWS_AT_ONCE = 4096
HEAVIEST = 2**20  # edge weights are whole numbers up to here


def graph_partition(fired_TN: Tensor, num_experts: int, seed: int) -> Partition:
    """Cut the co-activation graph into experts of equal size with most of its weight inside them.

    Args:
        fired_TN: bool, the neuron fires on the token.
    Raises:
        ValueError: num_experts does not divide N.
    """
    neurons = fired_TN.shape[1]
    expert_size(neurons, num_experts)
    neighbours_NM, weights_NM = heaviest_edges(fired_TN)
    cut = _metis(neighbours_NM, weights_NM, num_experts, seed)
    return Partition(balanced_near(cut, neighbours_NM, weights_NM, num_experts), math.nan)


def heaviest_edges(fired_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Each neuron's neighbours with which it fires most often: their numbers and on how many tokens, [N, M] both."""
    bits_TN = fired_TN.float()
    neurons = bits_TN.shape[1]
    found = []
    for start in range(0, neurons, ROWS_AT_ONCE):
        counts_RN = bits_TN[:, start : start + ROWS_AT_ONCE].T @ bits_TN
        rows = torch.arange(len(counts_RN), device=counts_RN.device)
        counts_RN[rows, start + rows] = -1  # not with itself
        found.append(counts_RN.topk(min(NEIGHBOURS, neurons - 1), dim=1))
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def balanced_near(labels: Tensor, neighbours_NM: Tensor, weights_NM: Tensor, num_experts: int) -> Tensor:
    """Labels [N] of experts of equal size from labels of parts of any size: only as many neurons move as must, and of
    these the ones that lose least of the weight to neighbours in their part."""
    inside_NE = weights_NM.new_zeros(len(labels), num_experts)
    inside_NE.scatter_add_(1, labels[neighbours_NM], weights_NM)
    # To stay is worth more than all that moving could win everywhere.
    stay = 1 + len(labels) * float(inside_NE.amax())
    return balanced_assignment(inside_NE + stay * F.one_hot(labels, num_experts))


def _metis(neighbours_NM: Tensor, weights_NM: Tensor, num_experts: int, seed: int) -> Tensor:
    """Labels [N] int64 of about as many neurons each."""
    neurons, neighbours = neighbours_NM.shape
    if num_experts == 1 or not neighbours:
        return torch.zeros(neurons, dtype=torch.int64) if num_experts == 1 else torch.arange(neurons)
    first = np.repeat(np.arange(neurons), neighbours)
    second, weight = neighbours_NM.flatten().cpu().numpy(), weights_NM.flatten().double().cpu().numpy()
    kept = weight > 0
    first, second, weight = first[kept], second[kept], weight[kept]
    # An edge belongs to both ends, whichever of them counts it among its heaviest.
    low, high = np.minimum(first, second), np.maximum(first, second)
    edges, where = np.unique(low * neurons + high, return_index=True)
    whole = np.maximum(1, np.rint(weight[where] / weight.max(initial=1.0) * HEAVIEST)).astype(np.int64)
    low, high = edges // neurons, edges % neurons
    order = np.argsort(np.concatenate([low, high]), kind="stable")
    ends = np.concatenate([high, low])[order]
    starts = np.searchsorted(np.concatenate([low, high])[order], np.arange(neurons + 1))
    _, parts = pymetis.part_graph(
        num_experts,
        xadj=starts,
        adjncy=ends,
        eweights=np.concatenate([whole, whole])[order],
        recursive=False,
        options=pymetis.Options(seed=seed % 2**31),
    )
    return torch.tensor(parts, dtype=torch.int64)
