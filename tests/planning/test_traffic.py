"""Bytes of a step against numbers worked out by hand, and against each other."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from ssd_megatron.model.memory import Layout, expert_ranks_per_token, rank_parameters
from ssd_megatron.planning.traffic import Transfer, all_gather, all_reduce, step_traffic
from tests.planning.helpers import model, ssd

TOKENS, H, BF16 = 2 * 32, 64, 2  # two samples of 32 tokens a microbatch


def sent(mode: str, layout: Layout, stage: int = 0, **settings: Any) -> dict[tuple[str, str], Transfer]:
    networks = settings.pop("ssd", ssd())
    multi_rank = settings.pop("multi_rank", True)
    transfers = step_traffic(model(**settings), networks, layout, stage, mode, "bfloat16", multi_rank=multi_rank)
    return {(transfer.group, transfer.what): transfer for transfer in transfers}


def test_one_rank_sends_nothing() -> None:
    assert sent("dense", Layout()) == sent("sparse", Layout()) == {}


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    assert all_reduce(1000, 4) == 2 * all_gather(1000, 4) == 1500


@pytest.mark.parametrize(("recompute", "reductions"), [(False, 4), (True, 5)])
def test_tensor_parallel_layers_add_up_hidden_states(recompute: bool, reductions: int) -> None:
    transfers = sent("dense", Layout(tensor=4, micro_batch_size=2, microbatches=3, recompute=recompute))
    row = TOKENS * H * BF16
    assert transfers["tensor", "layers"].step_bytes == 3 * 4 * reductions * row * 2 * 3 / 4
    assert transfers["tensor", "embedding"].sent == row * 1.5
    assert transfers["tensor", "head and loss"].sent == (row + TOKENS * 12) * 1.5


def test_gate_gradients_are_added_up_only_where_the_router_learns() -> None:
    layout = Layout(tensor=2, micro_batch_size=2)
    gates = ("tensor", "gate gradients")
    assert sent("sparse", layout)[gates].sent == 4 * TOKENS * 4 * 4  # layers, tokens, experts, fp32; 2 (2-1)/2 = 1
    assert gates not in sent("sparse", layout, ssd=ssd(router_update="frozen"))
    assert gates not in sent("dense", layout)


def test_dense_expert_parallel_ranks_gather_weights_twice_and_reduce_gradients_once() -> None:
    transfers = sent("dense", Layout(tensor=2, expert=4, data=4, micro_batch_size=2, microbatches=5), add_bias=False)
    whole = 4 * 2 * H * 256 / 2 * BF16  # layers, matrices, half of the neurons
    assert transfers["expert", "weights"].sent == 2 * whole * 3 / 4
    assert transfers["expert", "weight gradients"].step_bytes == 5 * whole * 3 / 4


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_gathered_once_travel_once_a_step(recompute: bool) -> None:
    layout = Layout(expert=4, data=4, microbatches=5, recompute=recompute, gather_once=True)
    transfers = sent("dense", layout, add_bias=False)
    whole = 4 * 2 * H * 256 * BF16
    assert transfers["expert", "weights"].step_bytes == whole * 3 / 4
    assert transfers["expert", "weight gradients"].step_bytes == whole * 3 / 4
    assert sent("sparse", layout) == sent("sparse", replace(layout, gather_once=False))


def test_sparse_tokens_travel_once_to_each_rank_that_has_one_of_their_experts() -> None:
    layout = Layout(expert=4, data=4, micro_batch_size=2)
    transfers = sent("sparse", layout)
    # 4 of 16 experts at each of 4 ranks; a rank has none of a token's 4 with C(12, 4) / C(16, 4).
    needed = 1 - math.comb(12, 4) / math.comb(16, 4)
    assert transfers["expert", "tokens"].sent == pytest.approx(4 * 4 * TOKENS * 3 * needed * H * BF16)
    assert transfers["expert", "routing"].sent == pytest.approx(4 * TOKENS * 3 * needed * 4 * (8 + 4))


@pytest.mark.parametrize(("tensor", "expert", "top_k"), [(1, 2, 2), (2, 2, 3), (1, 4, 1), (2, 4, 4)])
def test_ranks_that_a_token_needs_are_those_of_all_equally_likely_choices(tensor: int, expert: int, top_k: int) -> None:
    """The mean over every choice of experts, for the homes of one tensor-parallel rank (its first `expert` ones)."""
    held = 8 // (tensor * expert)
    ranks = [
        len({e // held for e in chosen if e // held < expert}) for chosen in itertools.combinations(range(8), top_k)
    ]
    layout = Layout(tensor=tensor, expert=expert, data=expert)
    mean = sum(ranks) / len(ranks)
    assert expert_ranks_per_token(ssd(num_experts=8, top_k=top_k), layout) == pytest.approx(mean)


def test_stages_send_each_microbatch_forth_and_back() -> None:
    layout = Layout(pipeline=4, data=2, micro_batch_size=2, microbatches=8)
    row = TOKENS * H * BF16
    stages = [sent("dense", layout, stage) for stage in range(4)]
    forth = [s.get(("pipeline", "activations")) for s in stages]
    back = [s.get(("pipeline", "gradients")) for s in stages]
    assert [t and t.step_bytes for t in forth] == [8 * row, 8 * row, 8 * row, None]
    assert [t and t.step_bytes for t in back] == [None, 8 * row, 8 * row, 8 * row]


def test_tensor_parallel_stages_send_a_part_each_and_gather_what_arrives() -> None:
    layout = Layout(tensor=4, pipeline=4, micro_batch_size=2, microbatches=8)
    row = TOKENS * H * BF16
    stages = [sent("dense", layout, stage) for stage in range(4)]
    assert stages[1]["pipeline", "activations"].sent == stages[1]["pipeline", "gradients"].sent == row / 4
    # Inputs, gradients, and outputs again: two, three, three and one of them.
    assert [s["tensor", "stage inputs"].sent / (row * 3 / 4) for s in stages] == [2, 3, 3, 1]


def test_tied_embeddings_of_two_stages_are_added_up() -> None:
    layout = Layout(tensor=2, pipeline=2, data=1, microbatches=2)
    tied = ("embedding", "tied embedding")
    assert sent("dense", layout)[tied].step_bytes == 512 / 2 * H * BF16
    assert tied in sent("dense", layout, stage=1)
    assert tied not in sent("dense", layout, tie_embeddings=False)
    assert tied not in sent("dense", Layout(pipeline=4, microbatches=4), stage=1)


def test_zero_1_reduces_once_a_step_and_zero_2_in_every_microbatch() -> None:
    one = sent("dense", Layout(data=4, microbatches=6, zero_stage=1))
    two = sent("dense", Layout(data=4, microbatches=6, zero_stage=2))
    plain = rank_parameters(model(), ssd(), Layout(data=4), 0).plain
    assert one["data", "gradients"].step_bytes == 2 * 3 / 4 * plain * BF16
    assert two["data", "gradients"].step_bytes == 6 * one["data", "gradients"].step_bytes
    assert two["data", "parameters"] == one["data", "parameters"]
    assert one["data", "parameters"].step_bytes == 3 / 4 * plain * BF16


def test_reducing_to_owners_sends_half() -> None:
    owners = sent("dense", Layout(data=4), multi_rank=False)["data", "gradients"]
    assert owners.step_bytes == sent("dense", Layout(data=4))["data", "gradients"].step_bytes / 2


def test_banks_are_reduced_over_the_ranks_that_hold_the_same_neurons() -> None:
    transfers = sent("dense", Layout(expert=2, data=4))
    bank = rank_parameters(model(), ssd(), Layout(expert=2, data=4), 0).bank
    assert transfers["expert_data", "gradients (banks)"].step_bytes == all_reduce(bank * BF16, 2)
    assert ("expert_data", "gradients (banks)") not in sent("dense", Layout(expert=4, data=4))


def test_more_ways_to_cut_a_step_never_change_what_all_pipelines_move() -> None:
    """The sum over all ranks of activations sent depends on stages alone, not on how the batch is cut."""
    totals = set()
    for data, micro, microbatches in ((1, 2, 8), (2, 2, 4), (4, 1, 4)):
        layout = Layout(pipeline=4, data=data, micro_batch_size=micro, microbatches=microbatches)
        stages = [sent("dense", layout, stage) for stage in range(4)]
        totals.add(data * sum(t.step_bytes for s in stages for (group, _), t in s.items() if group == "pipeline"))
    assert totals == {2 * 3 * 16 * 32 * H * BF16}
