"""How gradients are looked at: their norms, and what happens to one that is not finite."""

import math

import pytest
import torch

from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import KINDS, NORM_ROW, row_norms
from tests.ranks import run_ranks
from tests.small_engine import build, run_config, train_steps


@pytest.mark.parametrize("size", [0, 1, NORM_ROW - 1, NORM_ROW, 9 * NORM_ROW + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_the_row_norms_is_the_gradients(size: int, dtype: torch.dtype) -> None:
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert float(row_norms(gradient).double().norm()) == pytest.approx(float(gradient.double().norm()), rel=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_element_shows(value: float) -> None:
    gradient = torch.zeros(3 * NORM_ROW + 1)
    for position in (0, NORM_ROW, 3 * NORM_ROW):
        spoilt = gradient.clone()
        spoilt[position] = value
        assert not bool(row_norms(spoilt).norm().isfinite())


def spoilt_step(topology: Topology, bf16: bool, stage: int) -> tuple[bool, bool, bool]:
    """A step with a bad gradient on the last rank: was it skipped, did it change nothing, does the next one train?"""
    config = run_config(topology.world.size, bf16=bf16, stage=stage)
    model, engine = build(topology, config)
    train_steps(engine, config, range(1))
    spoil = topology.rank == topology.world.size - 1
    parameter = model.logical_parameters()["blocks.1.layer.mlp.bank.w_out"]
    hook = parameter.register_hook(lambda gradient: gradient * math.nan if spoil else gradient)
    before = [engine.state.read(name, kind).clone() for name in engine.state.specs for kind in KINDS]
    losses = train_steps(engine, config, range(1, 2))
    skipped = bool(engine.deepspeed.optimizer.overflow)
    after = [engine.state.read(name, kind) for name in engine.state.specs for kind in KINDS]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    hook.remove()
    train_steps(engine, config, range(2, 3))
    assert config.gradient_accumulation_steps > 1 and math.isfinite(losses[0])
    return skipped, same, not engine.deepspeed.optimizer.overflow


@pytest.mark.parametrize(
    ("ranks", "bf16", "stage"), [(1, False, 1), (1, True, 1), (1, False, 2), (2, True, 1), (2, True, 2)]
)
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(ranks: int, bf16: bool, stage: int) -> None:
    assert run_ranks(ranks, spoilt_step, bf16, stage) == [(True, True, True)] * ranks


def copies(topology: Topology) -> bool:
    """Whether DeepSpeed copies gradients into a bucket."""
    return bool(build(topology, run_config(topology.world.size))[1].deepspeed.optimizer.contiguous_gradients)


@pytest.mark.parametrize(("ranks", "expected"), [(1, False), (2, True)])
def test_gradients_of_one_rank_stay_where_they_are(ranks: int, expected: bool) -> None:
    assert run_ranks(ranks, copies) == [expected] * ranks
