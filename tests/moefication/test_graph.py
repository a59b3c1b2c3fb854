"""Experts from the co-activation graph."""

import pytest
import torch
from torch import Tensor

from ssd_megatron.moefication.graph import NEIGHBOURS, balanced_near, graph_partition, heaviest_edges
from ssd_megatron.switching.partition import structure_similarity


def groups_that_fire_together(tokens: int, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Neurons in mixed order: those of a group fire together on a tenth of the tokens, all now and then alone."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.arange(groups * size)[torch.randperm(groups * size, generator=generator)] % groups
    together = torch.rand(tokens, groups, generator=generator) < 0.1
    alone = torch.rand(tokens, groups * size, generator=generator) < 0.02
    return planted, together[:, planted] | alone


def weight_inside(fired_TN: Tensor, labels: Tensor) -> float:
    bits = fired_TN.float()
    weights = bits.T @ bits
    weights.fill_diagonal_(0)
    return float(weights[labels[:, None] == labels].sum() / weights.sum())


def test_groups_that_fire_together_become_experts() -> None:
    planted, fired = groups_that_fire_together(2000, groups=8, size=16)
    labels = graph_partition(fired, 8, seed=1).labels
    assert structure_similarity(planted, labels) == 1.0


@pytest.mark.parametrize("experts", [1, 5, 24, 120])
def test_experts_have_equal_sizes_and_keep_most_of_the_weight(experts: int) -> None:
    _, fired = groups_that_fire_together(1500, groups=10, size=12)
    labels = graph_partition(fired, experts, seed=2).labels
    assert torch.bincount(labels, minlength=experts).tolist() == [120 // experts] * experts
    if experts == 5:
        assert weight_inside(fired, labels) > 2 * weight_inside(fired, torch.arange(120) % 5)


def test_the_same_seed_gives_the_same_experts() -> None:
    _, fired = groups_that_fire_together(500, groups=7, size=8)
    first, again = (graph_partition(fired, 8, seed=3).labels for _ in range(2))
    assert first.equal(again)


def test_as_few_neurons_move_as_can_and_the_loosest_ones() -> None:
    _, fired = groups_that_fire_together(2000, groups=4, size=8)
    neighbours, weights = heaviest_edges(fired)
    cut = graph_partition(fired, 4, seed=1).labels
    crowded = cut.clone()
    stray = int((cut == 1).nonzero()[0])
    crowded[stray] = 0  # 9, 7, 8, 8: one must move, and only this one belongs elsewhere
    assert balanced_near(crowded, neighbours, weights, 4).equal(cut)


def test_edges_are_the_heaviest_and_none_leads_to_itself() -> None:
    _, fired = groups_that_fire_together(800, groups=5, size=16)
    neighbours, weights = heaviest_edges(fired)
    together = fired.float().T @ fired.float()
    assert neighbours.shape == weights.shape == (80, NEIGHBOURS)
    assert not (neighbours == torch.arange(80)[:, None]).any()
    assert together.gather(1, neighbours).equal(weights)
    others = together.scatter(1, neighbours, -1).fill_diagonal_(-1)
    assert bool((others.amax(1) <= weights[:, -1]).all())


def test_neurons_that_never_fire_do_not_disturb() -> None:
    fired = torch.zeros(100, 32, dtype=torch.bool)
    fired[:, :4] = True
    labels = graph_partition(fired, 8, seed=0).labels
    assert torch.bincount(labels).tolist() == [4] * 8
