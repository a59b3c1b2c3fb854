"""Exactly balanced assignment: every expert gets as many neurons as any other, at the largest possible sum of scores.

This is a transportation problem. It is solved in two steps, each vectorised over the whole score matrix:

1. Prices. With a price on every expert, each neuron takes the expert that is best after paying. Newton's method on the
   smoothed dual problem (neurons spread over experts by a softmax) finds prices under which almost all experts fill up
   evenly, while the temperature falls.
2. Surplus. What the prices leave unbalanced moves along cheapest paths from expert to expert (successive shortest
   paths). Any prices are a valid start for this step, so its result is optimal however good they were. It counts in
   whole numbers: equal is equal, and rounding cannot make a way around in circles look like a gain.
"""

# Shapes: N neurons, E experts. An expert holds N / E neurons.

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.config.check_list import divisors_near
from ssd_megatron.errors import ConfigError

# The temperature starts at the typical stake of a neuron (what its best expert gives it above the mean) and falls ...
_COOLING = 0.25
_COLDEST = 1e-7
# ... whenever the soft surplus is below this share of the neurons. So few whole neurons are moved faster by paths.
_SMALL_SURPLUS = 0.004
_MAX_NEWTON_STEPS = 100
# Whole scores reach this far up and down: float64 adds them exactly along paths over up to 2**12 experts.
_LARGEST_UNIT = 2**40


def expert_size(num_neurons: int, num_experts: int) -> int:
    """Neurons per expert. Raises ConfigError when the experts cannot all have the same size."""
    if not 1 <= num_experts <= num_neurons or num_neurons % num_experts:
        hint = divisors_near(num_neurons, num_experts)
        raise ConfigError(f"num_experts ({num_experts}) must divide the {num_neurons} neurons: try {hint}")
    return num_neurons // num_experts


def balanced_assignment(scores_NE: Tensor) -> Tensor:
    """Label each neuron with an expert: experts of equal size, the largest possible sum of the chosen scores.

    Optimal up to rounding (2**-40 of the largest centred score for each neuron); nothing depends on chance.

    Args:
        scores_NE: score of each neuron with each expert, any floating dtype, finite; E divides N.
    Returns:
        expert labels [N], int64, each value 0..E-1 exactly N / E times, on the device of the scores.
    Raises:
        ConfigError: E does not divide N.
        ValueError: a score is NaN or infinite.
    Source: the balanced assignment of SSD (arXiv 2410.03440), which uses auction rounds; the method here is ours.
    """
    size = expert_size(*scores_NE.shape)
    scores_NE = scores_NE.double()
    if not bool(scores_NE.isfinite().all()):
        raise ValueError("scores of neurons and experts hold NaN or infinity: look at the weights they come from")
    # Constants per neuron or per expert change nothing in a balanced assignment, but would hide the scale of the rest.
    scores_NE = scores_NE - scores_NE.mean(0)
    scores_NE -= scores_NE.mean(1, keepdim=True)
    prices_E = _find_prices(scores_NE, size)
    unit = max(float(scores_NE.abs().amax()), torch.finfo(torch.float32).tiny) / _LARGEST_UNIT
    units_NE = (scores_NE / unit).round()
    labels_N = (units_NE - (prices_E / unit).round()).argmax(1)
    return _move_surplus(units_NE, labels_N, size)


def spread(scores_NE: Tensor, prices_E: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Soft balanced assignment under the given prices, and better prices: one Newton step on the smoothed dual problem.

    Args:
        scores_NE: centred scores; the precision of the difference to the prices is theirs.
        prices_E: what each expert costs, in units of the scores.
        temperature: in units of the scores, > 0; the assignment hardens as it falls.
    Returns:
        shares [N, E] float32 (rows sum to 1), prices [E] for the next call.
    """
    num_neurons, num_experts = scores_NE.shape
    size = num_neurons / num_experts
    shares_NE = torch.softmax(((scores_NE - prices_E) / temperature).float(), dim=1)
    F.threshold(shares_NE, 1e-12, 0.0, inplace=True)  # products of denormal numbers would slow the Hessian down tenfold
    load_E = shares_NE.sum(0)
    # The dual function is flat along equal prices and nearly so between groups of neurons that do not compete.
    damping_EE = 1e-3 * size * torch.eye(num_experts, device=scores_NE.device)
    hessian_EE = torch.diag(load_E) - shares_NE.T @ shares_NE + damping_EE
    step_E = torch.linalg.solve(hessian_EE, load_E - size).clamp_(-2.0, 2.0)
    return shares_NE, prices_E + temperature * step_E


def _find_prices(scores_NE: Tensor, size: int) -> Tensor:
    """Prices [E] float64 under which taking the best expert leaves few neurons over."""
    num_neurons, num_experts = scores_NE.shape
    prices_E = best_E = scores_NE.new_zeros(num_experts)
    least_surplus = num_neurons + 1
    stake = float(scores_NE.amax(1).mean())
    temperature = stake
    for _ in range(_MAX_NEWTON_STEPS):
        if temperature <= _COLDEST * stake:  # also where all scores are equal
            break
        shares_NE, next_E = spread(scores_NE, prices_E, temperature)
        counts_E = torch.bincount(shares_NE.argmax(1), minlength=num_experts)
        surplus = int((counts_E - size).clamp_(min=0).sum())
        if surplus < least_surplus:
            least_surplus, best_E = surplus, prices_E
        if surplus <= _SMALL_SURPLUS * num_neurons:
            break
        if float((shares_NE.sum(0) - size).clamp_(min=0).sum()) <= _SMALL_SURPLUS * num_neurons:
            temperature *= _COOLING
        else:
            prices_E = next_E
    return best_E


def _move_surplus(units_NE: Tensor, labels_N: Tensor, size: int) -> Tensor:
    """Balance labels that are optimal for some prices, at the least loss of score (successive shortest paths).

    Neurons stay on their device; paths over the few experts are looked for on the CPU, step by step.
    """
    num_experts = units_NE.shape[1]
    surplus_E = torch.bincount(labels_N, minlength=num_experts).cpu() - size
    loss_EE = _losses_of_leaving(units_NE, labels_N, range(num_experts))
    while bool((surplus_E > 0).any()):
        path = _cheapest_path(loss_EE, surplus_E)
        legs = list(pairwise(path))
        amount = min(int(surplus_E[path[0]]), -int(surplus_E[path[-1]]))
        movers = []
        for source, target in legs:
            members = (labels_N == source).nonzero()[:, 0]
            losses, order = (units_NE[members, source] - units_NE[members, target]).sort(stable=True)
            # Neurons that tie move together: without this, a thousand equal neurons would take a thousand paths.
            amount = min(amount, int((losses == losses[0]).sum()))
            movers.append(members[order])
        for (_, target), candidates in zip(legs, movers, strict=True):
            labels_N[candidates[:amount]] = target
        surplus_E[path[0]] -= amount
        surplus_E[path[-1]] += amount
        loss_EE[path] = _losses_of_leaving(units_NE, labels_N, path)
    return labels_N


def _losses_of_leaving(units_NE: Tensor, labels_N: Tensor, experts: Iterable[int]) -> Tensor:
    """[experts, E] on the CPU: what it costs at least to move one neuron of each expert to each other one; infinite if
    it has none."""

    def loss_E(expert: int) -> Tensor:
        members_ME = units_NE[labels_N == expert]
        if len(members_ME) == 0:
            return units_NE.new_full((units_NE.shape[1],), float("inf"))
        return (members_ME[:, expert : expert + 1] - members_ME).amin(0)

    return torch.stack([loss_E(expert) for expert in experts]).cpu()


def _cheapest_path(loss_EE: Tensor, surplus_E: Tensor) -> list[int]:
    """Experts on the cheapest path from one with a surplus to one with room (Bellman-Ford: losses may be negative)."""
    distance_E = torch.where(surplus_E > 0, 0.0, float("inf")).to(loss_EE)
    previous_E = torch.full_like(surplus_E, -1)
    for _ in range(len(surplus_E)):
        through_E, via_E = (distance_E[:, None] + loss_EE).min(0)
        shorter_E = through_E < distance_E
        if not bool(shorter_E.any()):
            break
        distance_E = torch.where(shorter_E, through_E, distance_E)
        previous_E = torch.where(shorter_E, via_E, previous_E)
    previous = previous_E.tolist()
    path = [int(torch.where(surplus_E < 0, distance_E, float("inf")).argmin())]
    while previous[path[-1]] >= 0:
        path.append(previous[path[-1]])
    return path[::-1]
