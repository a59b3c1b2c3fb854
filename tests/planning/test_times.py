"""Times of steps against numbers worked out by hand."""

from dataclasses import replace

import pytest

from ssd_megatron.model.cost import Layer, flops_per_token, forward_flops, head_flops
from ssd_megatron.model.memory import Layout
from ssd_megatron.planning.times import sparse_ffn_seconds, step_time
from tests.planning.helpers import cluster, model, ssd

RATE = 500e12  # FLOP/s of one GPU


def test_one_gpu_takes_its_flops_at_the_reached_rate() -> None:
    layout = Layout(micro_batch_size=2, microbatches=4)
    time = step_time(model(), ssd(), layout, "dense", cluster(1), "bfloat16")
    assert time.compute == pytest.approx(8 * 32 * flops_per_token(model(), ssd()).dense / RATE)
    assert time.tensor == time.expert == time.pipeline == time.data == time.bubble == 0.0
    parameters = 34 * 235_968  # counted by tests/model
    assert time.update * 4000e9 == pytest.approx(parameters, rel=0.1)
    assert time.total == pytest.approx(time.compute + time.update)


def test_recomputation_is_a_third_more_for_layers_and_nothing_for_the_head() -> None:
    plain, again = (
        step_time(model(), ssd(), Layout(recompute=recompute), "dense", cluster(1), "bfloat16").compute
        for recompute in (False, True)
    )
    flops = forward_flops(model(), ssd(), Layer(32))
    assert again - plain == pytest.approx(32 * 4 * (flops.attention + flops.ffn) / RATE)


def test_routers_that_learn_nothing_have_no_backward() -> None:
    """Frozen centroids are scored with the same products as those that learn, forward and again."""
    routers = 32 * 4 * forward_flops(model(), ssd(), Layer(32)).router / RATE
    for recompute in (False, True):
        layout = Layout(recompute=recompute)
        learning, frozen = (
            step_time(model(), ssd(router_update=update), layout, "sparse", cluster(1), "bfloat16").compute
            for update in ("straight_through", "frozen")
        )
        assert learning - frozen == pytest.approx(2 * routers)


def test_the_bubble_is_one_stage_less_than_stages_over_microbatches() -> None:
    layout = Layout(pipeline=4, data=1, micro_batch_size=1, microbatches=8)
    time = step_time(model(), ssd(), layout, "dense", cluster(4), "bfloat16")
    assert time.bubble == pytest.approx(3 / 8 * (time.compute + time.pipeline))
    # The last stage sets the pace: one layer and the head.
    flops = forward_flops(model(), ssd(), Layer(32))
    assert time.compute == pytest.approx(8 * 32 * 3 * (flops.attention + flops.ffn + head_flops(model())) / RATE)


def test_stages_wait_for_what_others_do_once_a_step() -> None:
    """Weights gathered once: the first microbatch is late by it at every stage, the others are not."""
    layout = Layout(pipeline=4, expert=2, data=2, microbatches=8)
    passes, once = (
        step_time(model(), ssd(), replace(layout, gather_once=once), "dense", cluster(8), "bfloat16")
        for once in (False, True)
    )
    bank = (2 * 64 * 256 + 256) * 2 / 2  # bytes that travel of the only layer of a stage
    assert once.expert == pytest.approx(2 * bank / 400e9)
    assert passes.expert > 8 * once.expert
    assert once.bubble == pytest.approx(3 * ((once.compute + once.pipeline) / 8 + once.expert))
    assert once.total < passes.total


def test_wide_experts_are_bound_by_arithmetic_and_narrow_ones_by_memory() -> None:
    wide = model(hidden_size=4096, ffn_hidden_size=16384, num_attention_heads=32)
    layout = Layout(micro_batch_size=512)
    products = 2 * 2 * 4096 * 16384 / 4
    rows = 8 / 3 * 4 * 4096 * 2 / 4000e9
    assert sparse_ffn_seconds(wide, ssd(), layout, cluster(), "bfloat16", 32) == pytest.approx(products / RATE + rows)
    # 16 neurons each: 1 / (1/16 + 1/4096 + 1/4096) = 15.9 FLOPs a byte of 4,000 GB/s; 256 rows for each token.
    narrow = ssd(num_experts=1024, top_k=256)
    bound = products / (1 / (1 / 16 + 1 / 4096 + 1 / 4096)) / 4000e9 + rows * 64
    assert sparse_ffn_seconds(wide, narrow, layout, cluster(), "bfloat16", 32) == pytest.approx(bound)


def test_sparse_steps_of_a_large_model_are_faster() -> None:
    large = model(hidden_size=4096, ffn_hidden_size=16384, num_attention_heads=32, num_layers=32, seq_length=2048)
    layout = Layout(tensor=2, pipeline=2, data=4, expert=2, micro_batch_size=1, microbatches=8)
    dense, sparse = (step_time(large, ssd(), layout, m, cluster(16), "bfloat16").total for m in ("dense", "sparse"))
    assert 0.4 < sparse / dense < 0.9


def test_communication_takes_longer_over_slower_links() -> None:
    layout = Layout(tensor=4, pipeline=2, expert=2, data=2, micro_batch_size=2, microbatches=4)
    fast, slow = (
        step_time(model(), ssd(), layout, "dense", cluster(16, inter_gbs=gbs), "bfloat16") for gbs in (50.0, 5.0)
    )
    assert slow.pipeline == pytest.approx(10 * fast.pipeline)
    assert slow.tensor == fast.tensor and slow.compute == fast.compute
    assert slow.expert == fast.expert  # 2 x 4 neighbours are one node
