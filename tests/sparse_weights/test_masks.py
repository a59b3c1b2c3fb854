"""Mask arithmetic against brute force, block by block."""

import math
import random

import pytest
import torch
from torch import Tensor

from ssd_megatron.seeding import generator_for
from ssd_megatron.sparse_weights.masks import (
    BlockMask,
    block_norms,
    elements,
    packed,
    unpacked,
)

NORMS = {
    "l1": lambda block: sum(abs(x) for x in block),
    "l2": lambda block: math.sqrt(sum(x * x for x in block)),
    "linf": lambda block: max(abs(x) for x in block),
}


@pytest.mark.parametrize("criterion", NORMS)
@pytest.mark.parametrize("size", [1, 4, 8])
def test_norms_of_blocks(criterion: str, size: int) -> None:
    weights = torch.randn(16, 24, generator=generator_for("norms"))
    norms = block_norms(weights, size, criterion)
    assert norms.shape == (16 // size, 24 // size)
    for m, row in enumerate(norms.tolist()):
        for n, norm in enumerate(row):
            block = weights[m * size : (m + 1) * size, n * size : (n + 1) * size].flatten().tolist()
            assert norm == pytest.approx(NORMS[criterion](block), rel=1e-5)


@pytest.mark.parametrize(("sparsity", "live"), [(0.9, 10), (0.5, 48), (0.25, 72), (0.999, 1)])
def test_the_first_mask_has_the_share_that_was_asked_for(sparsity: float, live: int) -> None:
    mask = BlockMask.random((8, 12), sparsity, generator_for("a"))
    assert int(mask.live.sum()) == live
    assert torch.equal(mask.ever, mask.live) and not mask.regrown.any()
    assert torch.equal(mask.live, BlockMask.random((8, 12), sparsity, generator_for("a")).live)
    assert live == 1 or not torch.equal(mask.live, BlockMask.random((8, 12), sparsity, generator_for("b")).live)


def by_hand(mask: BlockMask, norms: Tensor, scores: Tensor, share: float) -> tuple[set[int], set[int]]:
    """Blocks pruned and grown, by sorting lists."""
    live = [i for i, x in enumerate(mask.live.flatten().tolist()) if x]
    dead = [i for i, x in enumerate(mask.live.flatten().tolist()) if not x]
    norm, score = norms.flatten().tolist(), scores.flatten().tolist()
    pruned = sorted(live, key=lambda i: (norm[i], i))[: math.floor(share * len(live))]
    best = sorted(dead, key=lambda i: (-score[i], i)) + sorted(pruned, key=lambda i: (-score[i], i))
    return set(pruned), set(best[: len(pruned)])


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_updates_prune_the_smallest_and_grow_the_best(sparsity: float, share: float) -> None:
    """With sparsity 0.1 and half of the live blocks pruned, fewer are dead than have to grow."""
    draw = random.Random(f"{sparsity} {share}")
    mask = BlockMask.random((6, 10), sparsity, generator_for("first"))
    for _ in range(5):
        # Few different numbers: ties.
        norms, scores = (torch.tensor([[float(draw.randrange(7)) for _ in range(10)] for _ in range(6)]) for _ in "ab")
        pruned, grown = by_hand(mask, norms, scores, share)
        after, was_pruned = mask.updated(norms, scores, share)
        assert set(was_pruned.flatten().nonzero().flatten().tolist()) == pruned
        assert set(after.regrown.flatten().nonzero().flatten().tolist()) == grown
        live = set(mask.live.flatten().nonzero().flatten().tolist())
        assert set(after.live.flatten().nonzero().flatten().tolist()) == live - pruned | grown
        assert int(after.live.sum()) == int(mask.live.sum())
        assert torch.equal(after.ever, mask.ever | after.live)
        mask = after


@pytest.mark.parametrize("size", [1, 4])
def test_elements_of_any_interval(size: int) -> None:
    mask = torch.rand(3, 5, generator=generator_for("mask")) < 0.5
    whole = torch.kron(mask.int(), torch.ones(size, size, dtype=torch.int32)).bool().flatten()
    for start in range(whole.numel() + 1):
        for numel in {0, 1, 3, 17, whole.numel() - start}:
            if start + numel <= whole.numel():
                assert torch.equal(elements(mask, size, start, numel), whole[start : start + numel])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8)])
def test_packing(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=generator_for("bits")) < 0.5
    bits = packed(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == math.ceil(mask.numel() / 8)
    assert torch.equal(unpacked(bits, shape), mask)
