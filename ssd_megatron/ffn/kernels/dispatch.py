"""Dispatch: sorts token copies into one bucket of rows per expert, so that a few batched matmuls do the work.

Shapes: T tokens, E experts, K experts per token, S slots (rows of the buckets, padding included).

Buckets of neighbouring experts that are about equally full form a *segment* with one common capacity: one batched
matmul. An even load gives few large segments, a skewed one many small ones, and padding stays under a quarter.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor

# A segment may have this many slots per token copy before it is split.
MAX_PADDING = 1.25
# Rows gathered for one segment. Smaller ones stay nearer the cache (fp32 likes 8 MiB a little better), larger ones make
# fewer parallel regions, each of which waits for the slowest thread: on a busy machine that is what counts.
SEGMENT_BYTES = 16 * 2**20


class Segment(NamedTuple):
    """Experts [first_expert, first_expert + num_experts) in slots from first_slot, `capacity` slots for each."""

    first_expert: int
    num_experts: int
    first_slot: int
    capacity: int

    @property
    def experts(self) -> slice:
        return slice(self.first_expert, self.first_expert + self.num_experts)

    @property
    def slots(self) -> slice:
        return slice(self.first_slot, self.first_slot + self.num_experts * self.capacity)

    def bucket(self, t_SX: Tensor) -> Tensor:
        """The segment's slots of a tensor, [num_experts, capacity, X]."""
        return t_SX[self.slots].view(self.num_experts, self.capacity, t_SX.shape[1])


class Dispatch(NamedTuple):
    """Where every token copy lies.

    Attributes:
        token_S: int64, the token in each slot; T, which is no token, in padding slots.
        slot_TK: int64, the slot of each token copy; S, which is no slot, for experts that are computed elsewhere.
        segments: cover all experts and slots in order.
        complete: every copy has a slot.
    """

    token_S: Tensor
    slot_TK: Tensor
    segments: list[Segment]
    complete: bool


def round_capacity(count: int) -> int:
    """At most a thirty-second more than `count`, on a grid of 32 sizes per power of two, in multiples of 16.

    bf16 matmuls on CPU compile code for each new shape (about 1 ms): capacities that follow the exact counts make a
    training step several times slower than dense, which a benchmark with constant routing does not show.
    """
    step = max(16, (1 << max(count - 1, 0).bit_length()) // 64)
    return -(-count // step) * step


def plan_segments(counts: list[int], max_slots: int) -> list[Segment]:
    """Halve the range of experts until each part is evenly full and at most `max_slots` large (or is one expert)."""
    segments: list[Segment] = []

    def plan(first: int, num: int, slot: int) -> int:
        capacity = round_capacity(max(counts[first : first + num]))
        slots = num * capacity
        # Rounding alone may exceed the limit where experts have few tokens, and splitting would not help.
        even = slots <= MAX_PADDING * sum(counts[first : first + num]) + 16 * num
        if num == 1 or (even and slots <= max_slots):
            segments.append(Segment(first, num, slot, capacity))
            return slot + slots
        return plan(first + num // 2, num - num // 2, plan(first, num // 2, slot))

    plan(0, len(counts), 0)
    return segments


def dispatch(expert_ids_TK: Tensor, num_experts: int, row_bytes: int) -> Dispatch:
    """Give every token copy a slot in its expert's bucket, in the order of tokens. Waits for the device once.

    Args:
        expert_ids_TK: int64 in [0, num_experts), no expert twice for one token; -1 for one that is computed elsewhere.
        row_bytes: size of one gathered row.
    """
    device, (num_tokens, top_k) = expert_ids_TK.device, expert_ids_TK.shape
    # -1 is one more expert, the last, whose bucket is not there.
    expert_KT = expert_ids_TK.remainder(num_experts + 1).T
    chosen_ET = torch.zeros(num_experts + 1, num_tokens, dtype=torch.int32, device=device).scatter_(0, expert_KT, 1)
    place_KT = chosen_ET.cumsum(1, dtype=torch.int32).gather(0, expert_KT) - 1
    max_slots = SEGMENT_BYTES // row_bytes if device.type == "cpu" else sys.maxsize
    *counts, elsewhere = chosen_ET.sum(1).tolist()
    segments = plan_segments(counts, max_slots)
    num_slots = segments[-1].slots.stop
    first_slots = [s.first_slot + i * s.capacity for s in segments for i in range(s.num_experts)]
    slot_KT = torch.tensor([*first_slots, num_slots]).to(device)[expert_KT] + place_KT
    slot_TK = slot_KT.T if elsewhere == 0 else slot_KT.clamp_(max=num_slots).T
    token_S = torch.full((num_slots + 1,), num_tokens, dtype=torch.int64, device=device)
    token_S.index_copy_(0, slot_TK.flatten(), torch.arange(num_tokens, device=device).repeat_interleave(top_k))
    return Dispatch(token_S[:num_slots], slot_TK, segments, elsewhere == 0)
