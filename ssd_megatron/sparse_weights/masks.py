"""Block masks of one weight matrix: which blocks live, which die, which grow anew. Pure arithmetic on global blocks.

Shapes: R rows and C columns of the matrix, b block size, M = R / b and N = C / b blocks. Masks are bool [M, N].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


class Change(NamedTuple):
    """What an update did: the mask after it, and which of the blocks before it were pruned."""

    after: "BlockMask"
    pruned_MN: Tensor


@dataclass(frozen=True)
class BlockMask:
    """One matrix's mask, and what is remembered of its past.

    Attributes:
        live: blocks that are trained; all others are 0.
        ever: blocks that have been live at some time.
        regrown: blocks that became live at the last update.
    """

    live: Tensor
    ever: Tensor
    regrown: Tensor

    @classmethod
    def random(cls, shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> "BlockMask":
        """A first mask of [M, N] blocks, of which all but the share `sparsity` live."""
        everywhere = torch.ones(shape, dtype=torch.bool)
        live = grow(torch.rand(shape, generator=generator), everywhere, live_count(everywhere.numel(), sparsity))
        return cls(live, live, torch.zeros_like(live))

    def updated(self, norms_MN: Tensor, scores_MN: Tensor, share: float) -> Change:
        """Prune the share of the live blocks with the smallest norms, and let as many dead ones grow, best score first.

        Blocks that were pruned just now grow again only where no others are left. (The paper does not say.)
        Source: Structured Dynamic Sparse Pre-Training of BERT (arXiv 2108.06277).
        """
        live = self.live.to(norms_MN.device)
        pruned = smallest(norms_MN, live, int(share * int(live.sum())))
        count, elsewhere = int(pruned.sum()), ~live
        grown = grow(scores_MN, elsewhere, min(count, int(elsewhere.sum())))
        grown |= grow(scores_MN, pruned, count - int(grown.sum()))
        pruned, grown = pruned.cpu(), grown.cpu()
        return Change(BlockMask((self.live & ~pruned) | grown, self.ever | grown, grown), pruned)


def live_count(blocks: int, sparsity: float) -> int:
    """Blocks that live: the nearest number to their share, and at least one."""
    return max(1, round(blocks * (1 - sparsity)))


def block_norms(weights_RC: Tensor, block_size: int, criterion: str) -> Tensor:
    """Norm of each block, [M, N]; `criterion` one of ORDERS."""
    rows, columns = weights_RC.shape
    tiles_MbNb = weights_RC.view(rows // block_size, block_size, columns // block_size, block_size)
    norms: Tensor = torch.linalg.vector_norm(tiles_MbNb, ORDERS[criterion], dim=(1, 3))
    return norms


def smallest(norms_MN: Tensor, among_MN: Tensor, count: int) -> Tensor:
    """The `count` blocks of least norm among some; of equal ones the first."""
    order = norms_MN.masked_fill(~among_MN, math.inf).flatten().argsort(stable=True)
    return _mask_of(order[:count], among_MN)


def grow(scores_MN: Tensor, among_MN: Tensor, count: int) -> Tensor:
    """The `count` blocks of highest score among some; of equal ones the first."""
    order = scores_MN.masked_fill(~among_MN, -math.inf).flatten().argsort(descending=True, stable=True)
    return _mask_of(order[:count], among_MN)


def elements(mask_MN: Tensor, block_size: int, start: int, numel: int) -> Tensor:
    """Elements [start, start + numel) of the flattened matrix as its mask says, bool [numel]."""
    block_row = mask_MN.shape[1] * block_size**2
    first, last = start // block_row, -(-(start + numel) // block_row)
    rows = mask_MN[first:last].repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return rows.flatten().narrow(0, start - first * block_row, numel)


def packed(mask: Tensor) -> Tensor:
    """A mask as uint8, eight blocks a byte."""
    return torch.from_numpy(np.packbits(mask.numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask that `packed` was given."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape))).bool().view(*shape)


def _mask_of(positions: Tensor, like_MN: Tensor) -> Tensor:
    mask = torch.zeros_like(like_MN)
    mask.view(-1)[positions] = True
    return mask
