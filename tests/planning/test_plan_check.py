"""What small real runs hold and send is what was predicted."""

import pytest

from benchmarks.plan_check import LIMIT, measured
from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.model.memory import Layout
from tests.ranks import run_ranks

LAYOUTS = [
    Layout(tensor=2, pipeline=2, microbatches=2),
    Layout(tensor=2, data=2, expert=2, microbatches=2, zero_stage=2),
    Layout(pipeline=2, data=2, expert=2, microbatches=2, gather_once=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["TP2 x PP2", "TP2 x EP2, ZeRO 2", "PP2 x EP2, gathered once"])
def test_memory_and_bytes_of_a_real_run_are_within_a_tenth(layout: Layout) -> None:
    sizes = ParallelConfig(
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        expert_parallel_size=layout.expert,
    )
    checks = [check for rank in run_ranks(4, measured, "GPT", layout, parallel=sizes) for check in rank]
    assert len(checks) >= 4 * 2 * 5
    kept = [c.mode for c in checks if c.what in ("kept weights", "kept gradients")]
    assert kept == ["dense"] * (2 * 4 * layout.gather_once)
    assert not [check for check in checks if abs(check.ratio - 1) > LIMIT]
