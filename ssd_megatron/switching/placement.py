"""Which home owns which experts: as many each, and about as many tokens.

Experts are numbered so that home h of n owns numbers [h * E/n, (h + 1) * E/n): a placement is a numbering.
"""

import torch
from torch import Tensor


def balanced_numbering(load_E: Tensor, homes: int) -> Tensor:
    """New number of each expert, [E] int64: the busiest expert first, each to the home with the least load so far that
    has room (Graham 1969, longest processing time first). Numbers stay where that would not be better, as with a single
    home.

    Args:
        load_E: tokens of each expert.
    """
    num_experts = len(load_E)
    room, loads = [num_experts // homes] * homes, [0] * homes
    members: list[list[int]] = [[] for _ in range(homes)]
    for expert in load_E.argsort(descending=True, stable=True).tolist():
        home = min((h for h in range(homes) if room[h]), key=lambda h: (loads[h], h))
        room[home] -= 1
        loads[home] += int(load_E[expert])
        members[home].append(expert)
    numbers = torch.empty(num_experts, dtype=torch.int64)
    numbers[torch.tensor([expert for experts in members for expert in sorted(experts)])] = torch.arange(num_experts)
    better = imbalance(load_E[numbers.argsort()], homes) < imbalance(load_E, homes)
    return numbers if better else torch.arange(num_experts)


def imbalance(load_E: Tensor, homes: int) -> float:
    """Load of the busiest home over the mean; 1 is even."""
    loads = load_E.view(homes, -1).sum(1).double()
    return float(loads.max() / loads.mean())
