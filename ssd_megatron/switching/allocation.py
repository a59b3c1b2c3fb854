"""How many experts each layer computes in a sparse phase.

Layers differ: the first fires densely and decides much, later ones fire sparsely. With the same number of experts in
every layer the first one alone causes most of what sparsity costs. So the experts of all layers (layers x top_k) are
dealt out by what they save of the probe loss, at the same cost. Not in the SSD paper; docs/log.md has what it gives.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch

from ssd_megatron.ffn.switchable import SwitchableFFN

Curve = list[tuple[int, float]]

# Deep models would spend most of a switch on measuring: their networks are measured in so many runs of neighbours.
MOST_MEASURED = 16


@torch.no_grad()
def sparsity_costs(
    names: Sequence[str],
    local: Mapping[str, SwitchableFFN],
    probe_loss: Callable[[], float],
    num_experts: int,
    least: int,
) -> list[Curve]:
    """What the probe loss rises by when one network alone is sparse (collective over the job).

    Of a run of neighbours that are measured together, each is taken to cause an equal part. To be called in dense mode,
    when neurons are grouped and routers are set.

    Args:
        names: of the networks of all stages.
        local: this stage's.
        probe_loss: of the same tokens at every call, over the whole job.
    Returns:
        by network of all stages: (experts, rise of the loss) for experts = least, 2 least, 4 least ... and all (0).
    """
    dense = probe_loss()
    curves: list[Curve] = []
    for run in measured_together(names):
        mine = [local[name] for name in run if name in local]
        together = _cost_curve(mine, probe_loss, dense, num_experts, least)
        curves += [[(experts, rise / len(run)) for experts, rise in together]] * len(run)
    return curves


def measured_together(names: Sequence[str]) -> list[Sequence[str]]:
    """The networks one by one, or if there are more than MOST_MEASURED the first alone, as it differs most, and the
    others in equal runs of neighbours."""
    first, rest, runs = names[:1], names[1:], MOST_MEASURED - 1
    if len(rest) <= runs:
        return [[name] for name in names]
    ends = [round(len(rest) * run / runs) for run in range(runs + 1)]
    return [first, *(rest[start:end] for start, end in pairwise(ends))]


def allocate_alike(costs: Sequence[Curve], parts: Sequence[int], top_k: int, least: int) -> list[int]:
    """allocate_experts among the layers of each part, an encoder's and a decoder's: an expert of one costs more than
    one of the other, as other numbers of tokens go through it.

    Args:
        parts: which one each layer is of.
    """
    allocated = [0] * len(costs)
    for part in set(parts):
        layers = [index for index, other in enumerate(parts) if other == part]
        experts = allocate_experts([costs[index] for index in layers], top_k, least)
        for index, number in zip(layers, experts, strict=True):
            allocated[index] = number
    return allocated


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


def _cost_curve(
    local: Sequence[SwitchableFFN], probe_loss: Callable[[], float], dense: float, num_experts: int, least: int
) -> Curve:
    """Of these networks together, which may be none."""
    curve: Curve = []
    experts = least
    while experts < num_experts:
        with ExitStack() as sparse:
            for ffn in local:
                sparse.enter_context(_sparse(ffn, experts))
            curve.append((experts, probe_loss() - dense))
        experts *= 2
    return [*curve, (num_experts, 0.0)]


@contextmanager
def _sparse(ffn: SwitchableFFN, experts: int) -> Iterator[None]:
    """Within: the network is sparse with so many experts per token."""
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
