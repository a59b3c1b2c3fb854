"""Where every token copy goes, worked out on the GPU: a counting sort by expert that never waits for the device.

Shapes: T tokens, E experts, K experts per token, C = T * K rows (token copies, sorted by expert), M tiles of rows,
P parts of the copies that are counted by one program each.

Every size is known from the shapes alone, so that nothing is read back and the kernels can be captured in a graph. The
order of tokens is kept inside an expert and nothing is added up atomically: the same ids give the same rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

COPIES_PER_PART = 128
MAX_ROWS_PER_TILE = 128
MIN_ROWS_PER_TILE = 16  # the smallest matmul there is


class Rows(NamedTuple):
    """The rows of the experts' matmuls. Expert e has rows [first_row[e], first_row[e + 1]).

    Attributes:
        tile_size: rows of a tile; a tile never has rows of two experts.
        load: rows per expert if all are equally busy, rounded up to a power of two. What the kernels are tuned for.
        token_C: int32, the token of each row; undefined from first_row[E] on.
        row_TK: int32, the row of each token copy; -1 for one that is computed elsewhere.
        first_row_E: int32 [E + 1].
        tile_expert_M: int32, the expert of each tile of `tile_size` rows; -1 in the tiles that are left over.
        tile_row_M: int32, its first row.
    """

    tile_size: int
    load: int
    token_C: Tensor
    row_TK: Tensor
    first_row_E: Tensor
    tile_expert_M: Tensor
    tile_row_M: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields that are tensors: the last five."""
        return self[2:]


def sort_copies(expert_ids_TK: Tensor, num_experts: int) -> Rows:
    """Sort token copies by expert.

    Args:
        expert_ids_TK: int64 in [0, num_experts), no expert twice for one token; -1 for one that is computed elsewhere.
    """
    num_tokens, top_k = expert_ids_TK.shape
    copies = num_tokens * top_k
    assert copies < 2**31, (num_tokens, top_k)
    ids_C = expert_ids_TK.contiguous()
    load = triton.next_power_of_2(max(1, triton.cdiv(copies, num_experts)))
    tile_size = min(MAX_ROWS_PER_TILE, max(MIN_ROWS_PER_TILE, load))
    parts, tiles = triton.cdiv(copies, COPIES_PER_PART), copies // tile_size + min(num_experts, copies)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids_C.device)

    count_EP, total_E = new(num_experts, parts), new(num_experts)
    rows = Rows(tile_size, load, new(copies), new(num_tokens, top_k), new(num_experts + 1), new(tiles), new(tiles))
    bins = triton.next_power_of_2(num_experts + 1)
    _count[(parts,)](ids_C, count_EP, copies, parts, E=num_experts, BINS=bins, PART=COPIES_PER_PART)
    _count_before[(num_experts,)](count_EP, total_E, parts, BLOCK=1024)
    _list_tiles[(num_experts + 1,)](
        total_E, rows.first_row_E, rows.tile_expert_M, rows.tile_row_M, tiles, E=num_experts, BINS=bins, ROWS=tile_size
    )
    _place[(parts,)](
        ids_C, count_EP, rows.first_row_E, rows.token_C, rows.row_TK, copies, parts, K=top_k, PART=COPIES_PER_PART
    )
    return rows


@triton.jit(do_not_specialize=["copies", "parts"])
def _count(ids, count, copies, parts, E: tl.constexpr, BINS: tl.constexpr, PART: tl.constexpr):
    """count[e, part] = copies of the part that go to expert e."""
    part = tl.program_id(0)
    copy = part * PART + tl.arange(0, PART)
    expert = tl.load(ids + copy, mask=copy < copies, other=-1).to(tl.int32)
    # Copies for elsewhere are counted as one more expert, which is not stored.
    here = tl.histogram(tl.where(expert < 0, E, expert), BINS)
    e = tl.arange(0, BINS)
    tl.store(count + e.to(tl.int64) * parts + part, here, mask=e < E)


@triton.jit(do_not_specialize=["parts"])
def _count_before(count, total, parts, BLOCK: tl.constexpr):
    """count[e, part] becomes the copies for e in earlier parts; total[e] is their number in all."""
    e = tl.program_id(0)
    count += e.to(tl.int64) * parts
    before = 0
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        here = tl.load(count + part, mask=part < parts, other=0)
        tl.store(count + part, before + tl.cumsum(here, 0) - here, mask=part < parts)
        before += tl.sum(here, 0)
    tl.store(total + e, before)


@triton.jit(do_not_specialize=["tiles"])
def _list_tiles(
    total, first_row, tile_expert, tile_row, tiles, E: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr
):
    """One program per expert lists its tiles; the last one, for e = E, marks those that are left over."""
    BLOCK: tl.constexpr = 128
    e = tl.program_id(0)
    expert = tl.arange(0, BINS)
    total_E = tl.load(total + expert, mask=expert < E, other=0)
    tiles_E = (total_E + ROWS - 1) // ROWS
    row = tl.sum(tl.where(expert < e, total_E, 0), 0)
    first = tl.sum(tl.where(expert < e, tiles_E, 0), 0)
    end = first + tl.sum(tl.where(expert == e, tiles_E, 0), 0)
    end = tl.where(e == E, tiles, end)
    tl.store(first_row + e, row)
    for t in range(first, end, BLOCK):
        tile = t + tl.arange(0, BLOCK)
        tl.store(tile_expert + tile, tl.where(e == E, -1, e), mask=tile < end)
        tl.store(tile_row + tile, row + (tile - first) * ROWS, mask=tile < end)


@triton.jit(do_not_specialize=["copies", "parts"])
def _place(ids, count, first_row, token, row_of_copy, copies, parts, K: tl.constexpr, PART: tl.constexpr):
    """A copy's row: after those of earlier experts, of earlier parts, and of earlier copies of this part."""
    part = tl.program_id(0)
    lane = tl.arange(0, PART)
    copy = part * PART + lane
    expert = tl.load(ids + copy, mask=copy < copies, other=-1).to(tl.int32)
    here = expert >= 0
    earlier = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
    row = tl.sum(earlier.to(tl.int32), 1)
    row += tl.load(first_row + expert, mask=here, other=0)
    row += tl.load(count + expert.to(tl.int64) * parts + part, mask=here, other=0)
    tl.store(row_of_copy + copy, tl.where(here, row, -1), mask=copy < copies)
    tl.store(token + row, copy // K, mask=here)
