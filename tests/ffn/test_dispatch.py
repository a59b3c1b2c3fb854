import pytest
import torch

from ssd_megatron.ffn.kernels.dispatch import MAX_PADDING, Dispatch, dispatch, plan_segments, round_capacity
from tests.ffn.helpers import choose


def check(plan: Dispatch, expert_ids_TK: torch.Tensor, experts: int) -> None:
    tokens, top_k = expert_ids_TK.shape
    expert_S = torch.full((len(plan.token_S),), -1)
    slot = expert = 0
    for segment in plan.segments:
        assert (segment.first_slot, segment.first_expert) == (slot, expert)
        for i in range(segment.num_experts):
            expert_S[slot : slot + segment.capacity] = expert
            # The tokens of an expert fill its bucket from the front, in order; the rest is padding.
            mine = (expert_ids_TK == expert).any(dim=1).nonzero().flatten()
            assert torch.equal(plan.token_S[slot : slot + len(mine)], mine), (segment, i)
            assert (plan.token_S[slot + len(mine) : slot + segment.capacity] == tokens).all(), (segment, i)
            slot, expert = slot + segment.capacity, expert + 1
    assert (slot, expert) == (len(plan.token_S), experts)
    assert torch.equal(expert_S[plan.slot_TK], expert_ids_TK)
    assert torch.equal(plan.token_S[plan.slot_TK], torch.arange(tokens).unsqueeze(1).expand(tokens, top_k))
    assert plan.slot_TK.flatten().unique().numel() == tokens * top_k


@pytest.mark.parametrize("skew", [0.0, 1.0, 20.0])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(500, 16, 4), (37, 6, 6), (1, 8, 3), (300, 300, 5)])
def test_every_copy_has_a_slot_of_its_own_expert(tokens: int, experts: int, top_k: int, skew: float) -> None:
    torch.manual_seed(0)
    expert_ids_TK = choose(tokens, experts, top_k, skew)
    check(dispatch(expert_ids_TK, experts, row_bytes=2048), expert_ids_TK, experts)


def test_no_tokens_need_no_slots() -> None:
    plan = dispatch(torch.empty(0, 2, dtype=torch.int64), 4, row_bytes=64)
    assert plan.token_S.numel() == 0
    assert [(segment.num_experts, segment.capacity) for segment in plan.segments] == [(4, 0)]


def test_capacities_take_few_values_and_waste_at_most_a_thirty_second() -> None:
    capacities = {round_capacity(count) for count in range(4097)}
    assert len(capacities) == 129  # 0, then multiples of 16 up to 1,024, then 32 for each of two doublings
    for count in range(512, 4097):
        assert count <= round_capacity(count) <= count * 33 / 32 + 1
    assert [round_capacity(count) for count in (0, 1, 16, 17, 512, 513)] == [0, 16, 16, 32, 512, 528]


def test_even_load_is_one_matmul_and_uneven_load_is_cut_where_it_is_uneven() -> None:
    assert [tuple(s) for s in plan_segments([500, 510, 490, 505], 10**6)] == [(0, 4, 0, 512)]
    assert [tuple(s) for s in plan_segments([500, 510, 100, 90], 10**6)] == [(0, 2, 0, 512), (2, 2, 1024, 112)]
    assert [tuple(s) for s in plan_segments([0, 0, 0, 2000], 10**6)] == [(0, 2, 0, 0), (2, 1, 0, 0), (3, 1, 0, 2016)]


def test_segments_stay_small_enough_for_the_cache() -> None:
    segments = plan_segments([500] * 16, max_slots=2048)
    assert [(s.num_experts, s.capacity) for s in segments] == [(4, 512)] * 4


def test_padding_stays_within_its_limit_for_any_load() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        counts = (2048 * torch.rand(32, generator=generator) ** 3).int().tolist()
        slots = plan_segments(counts, 10**6)[-1].slots.stop
        assert slots <= MAX_PADDING * sum(counts) + 16 * len(counts)
