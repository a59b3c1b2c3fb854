"""How many experts each layer computes in a sparse phase.

Layers differ: the first fires densely and decides much, later ones fire sparsely. With the same number of experts in
every layer the first one alone causes most of what sparsity costs. So the experts of all layers (layers x top_k) are
dealt out by what they save of the probe loss, at the same cost. Not in the SSD paper; docs/log.md has what it gives.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.statistics import ProbeBatch

Curve = list[tuple[int, float]]


@torch.no_grad()
def sparsity_costs(networks: Networks, probe: ProbeBatch, num_experts: int, least: int) -> list[Curve]:
    """What the probe loss rises by when one network alone is sparse (collective over the job).

    To be called in dense mode, when neurons are grouped and routers are set.

    Returns:
        by network of all stages: (experts, rise of the loss) for experts = least, 2 least, 4 least ... and all (0).
    """
    dense = probe.loss()
    return [_cost_curve(networks.local.get(name), probe, dense, num_experts, least) for name in networks.names]


def allocate_experts(costs: Sequence[Curve], top_k: int, least: int) -> list[int]:
    """Deal out layers x top_k experts, one at a time, to the layer whose next expert saves most.

    Args:
        costs: by layer, as `sparsity_costs` gives them; between two points the cost is taken to fall evenly.
        top_k: mean over layers.
        least: every layer gets at least this many.
    """
    curves = [_interpolate(curve, least) for curve in costs]
    allocated = [least] * len(curves)
    for _ in range((top_k - least) * len(curves)):
        gains = [
            curve[experts - least] - curve[experts - least + 1] if experts - least + 1 < len(curve) else -float("inf")
            for curve, experts in zip(curves, allocated, strict=True)
        ]
        allocated[gains.index(max(gains))] += 1
    return allocated


def _cost_curve(ffn: SwitchableFFN | None, probe: ProbeBatch, dense: float, num_experts: int, least: int) -> Curve:
    """Of a network, which may be another stage's."""
    curve: Curve = []
    experts = least
    while experts < num_experts:
        with _sparse(ffn, experts):
            curve.append((experts, probe.loss() - dense))
        experts *= 2
    return [*curve, (num_experts, 0.0)]


@contextmanager
def _sparse(ffn: SwitchableFFN | None, experts: int) -> Iterator[None]:
    """Within: the network is sparse with so many experts per token."""
    if ffn is None:
        yield
        return
    before = ffn.router.top_k
    ffn.mode, ffn.router.top_k = "sparse", experts
    try:
        yield
    finally:
        ffn.mode, ffn.router.top_k = "dense", before


def _interpolate(curve: Curve, least: int) -> list[float]:
    """Cost of least, least + 1, ... experts. Costs do not rise again with more experts: what does is noise."""
    costs = [0.0]
    for (experts, cost), (more, _) in reversed(list(pairwise(curve))):
        fewest = max(cost, costs[0])
        slope = (fewest - costs[0]) / (more - experts)
        costs = [fewest - slope * step for step in range(more - experts)] + costs
    assert len(costs) == curve[-1][0] - least + 1
    return costs
