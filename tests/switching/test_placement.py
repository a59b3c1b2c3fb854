"""Placement of experts against the best there is, by trying all."""

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch

from ssd_megatron.switching.placement import balanced_numbering, imbalance


def busiest_homes(load: list[int], size: int) -> Iterator[int]:
    """Load of the busiest home for every way to share out experts, `size` to each home."""
    if not load:
        yield 0
        return
    for others in combinations(range(1, len(load)), size - 1):
        mine = load[0] + sum(load[i] for i in others)
        rest = [tokens for i, tokens in enumerate(load) if i and i not in others]
        for busiest in busiest_homes(rest, size):
            yield max(mine, busiest)


def random_load(seed: int, experts: int, skew: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(experts, generator=generator) ** skew * 1000).long() + 1


@pytest.mark.parametrize("skew", [1, 3, 6])
@pytest.mark.parametrize(("experts", "homes"), [(8, 1), (8, 2), (8, 4), (8, 8), (9, 3), (6, 3)])
def test_placements_are_never_worse_than_before_and_near_the_best(experts: int, homes: int, skew: int) -> None:
    excess = []
    for seed in range(30):
        load = random_load(seed, experts, skew)
        numbers = balanced_numbering(load, homes)
        assert numbers.sort().values.tolist() == list(range(experts))
        before, after = imbalance(load, homes), imbalance(load[numbers.argsort()], homes)
        best = min(busiest_homes(load.tolist(), experts // homes)) / (float(load.sum()) / homes)
        assert best - 1e-9 <= after <= before
        excess.append(after / best - 1)
    assert max(excess) < 0.25 and sum(excess) / len(excess) < 0.02


def test_experts_keep_their_homes_if_moving_them_gains_nothing() -> None:
    even, uneven = torch.tensor([4, 1, 2, 3]), torch.tensor([4, 3, 2, 1])
    assert balanced_numbering(even, 2).tolist() == [0, 1, 2, 3]
    assert balanced_numbering(uneven, 2).tolist() == [0, 2, 3, 1]
    assert balanced_numbering(uneven, 1).tolist() == [0, 1, 2, 3]
    # The busiest expert first gives 3 + 2 + 2 = 7 against 5; as it is 6 against 6.
    assert balanced_numbering(torch.tensor([3, 3, 0, 2, 2, 2]), 2).tolist() == [0, 1, 2, 3, 4, 5]


def test_imbalance_is_the_busiest_home_over_the_mean() -> None:
    assert imbalance(torch.tensor([1, 2, 3, 6]), 2) == 1.5
    assert imbalance(torch.tensor([1, 2, 3, 6]), 1) == 1.0
