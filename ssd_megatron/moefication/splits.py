"""Which neurons of a trained network form an expert together.

Source: MoEfication (arXiv 2110.01786). Shapes: N neurons, H hidden, T tokens, E experts.
"""

from typing import Literal

from torch import Tensor

from ssd_megatron.moefication.graph import graph_partition
from ssd_megatron.switching.clustering import numbered_by_first_neuron
from ssd_megatron.switching.partition import kmeans_partition, random_partition

Split = Literal["clustering", "graph", "random"]
SPLITS: tuple[Split, ...] = ("clustering", "graph", "random")


def split_neurons(split: Split, rows_NH: Tensor, fired_TN: Tensor, num_experts: int, seed: int) -> Tensor:
    """Expert of each neuron, [N] int64; an expert's number is its place by its first neuron.

    Args:
        rows_NH: what decides whether a neuron fires: its row of `w_in`, or of `w_gate`.
        fired_TN: bool, whether it fires on a token; `graph` alone looks at them.
    Raises:
        ValueError: num_experts does not divide N.
    """
    if split == "clustering":
        labels = kmeans_partition(rows_NH, num_experts, None, seed).labels
    elif split == "graph":
        labels = graph_partition(fired_TN, num_experts, seed).labels
    else:
        labels = random_partition(len(rows_NH), num_experts, seed).labels
    return numbered_by_first_neuron(labels)
