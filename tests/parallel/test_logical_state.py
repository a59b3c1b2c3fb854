"""The adapter on ZeRO and the logical state, against DeepSpeed's own reading of the same tensors."""

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from ssd_megatron.config.load import RunConfig
from ssd_megatron.parallel.sharding import row_shard
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import EXP_AVG, EXP_AVG_SQ, KINDS, MASTER
from ssd_megatron.training.engine import Engine
from tests.layouts import DP2, EP2, EP2_DP2, ONE, PP2_EP2, TP2, TP2_EP2, TP2_PP2_EP2, Layout, zero2
from tests.ranks import run_ranks
from tests.small_engine import build, run_config, train_steps

# Layout, bf16
CASES = [
    *((layout, False) for layout in (ONE, DP2, zero2(DP2), Layout(data=3), TP2, EP2, zero2(TP2_EP2), EP2_DP2)),
    *((layout, True) for layout in (ONE, zero2(DP2), zero2(TP2), TP2_EP2, PP2_EP2, zero2(EP2_DP2), TP2_PP2_EP2)),
]
IDS = [f"{layout}, {'bf16' if bf16 else 'fp32'}" for layout, bf16 in CASES]
NAMES = ("embedding.word.weight", "blocks.0.layer.mlp.bank.w_in", "blocks.1.layer.mlp.bank.b_in", "head.norm.weight")


def make_engine(topology: Topology, layout: Layout, bf16: bool) -> tuple[RunConfig, Engine]:
    config = run_config(topology.world.size, parallel=layout.parallel.model_dump(), stage=layout.stage, bf16=bf16)
    return config, build(topology, config)[1]


def compare_with_deepspeed(topology: Topology, layout: Layout, bf16: bool) -> list[str]:
    """DeepSpeed reads this rank's rows of a tensor; returns the names."""
    config, engine = make_engine(topology, layout, bf16)
    train_steps(engine, config, range(2))
    # DeepSpeed links only the first group's moments by itself.
    optimizer = engine.deepspeed.optimizer
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
    for name in engine.state.specs:
        parameter = engine.state.parameter(name)
        rows = slice(first := row_shard(parameter).first, first + len(parameter))
        assert torch.equal(engine.state.read(name, MASTER)[rows], safe_get_full_fp32_param(parameter)), name
        for kind in (EXP_AVG, EXP_AVG_SQ):
            wanted = safe_get_full_optimizer_state(parameter, kind)
            assert torch.equal(engine.state.read(name, kind)[rows], wanted), name
    return list(engine.state.specs)


@pytest.mark.parametrize(("layout", "bf16"), CASES, ids=IDS)
def test_reads_what_deepspeed_reads(layout: Layout, bf16: bool) -> None:
    compared = run_ranks(layout.ranks, compare_with_deepspeed, layout, bf16, parallel=layout.parallel)
    assert len({name for names in compared for name in names}) == 30
    assert len({len(names) for names in compared}) == layout.pipeline


def write_and_train(topology: Topology, layout: Layout, bf16: bool) -> dict[str, float]:
    config, engine = make_engine(topology, layout, bf16)
    train_steps(engine, config, range(1))
    state = engine.state
    names = [name for name in NAMES if name in state.specs]
    for name in names:
        for index, kind in enumerate(KINDS):
            state.write(name, kind, torch.full(state.specs[name].shape, 0.5 + index))
    state.publish()
    seen = {f"{name} published": float(state.parameter(name).float().mean()) for name in names}
    for group in ("decay", "no_decay", "router"):
        state.set_learning_rate(group, 0.0)
        state.set_adam_step(group, 7)
    train_steps(engine, config, range(1, 2))
    seen |= {f"{name} kept": float(state.read(name, MASTER).mean()) for name in names}
    seen |= {f"{name} moment": float((state.read(name, EXP_AVG) / 1.5).mean()) for name in names}
    assert state.adam_steps() == {"decay": 8, "no_decay": 8, "router": 8}
    return seen


@pytest.mark.parametrize(("layout", "bf16"), CASES, ids=IDS)
def test_what_is_written_is_computed_with_and_stays(layout: Layout, bf16: bool) -> None:
    ranks = run_ranks(layout.ranks, write_and_train, layout, bf16, parallel=layout.parallel)
    assert {key.split()[0] for seen in ranks for key in seen} == set(NAMES)
    for seen in ranks:
        for key, value in seen.items():
            if key.endswith("moment"):
                assert value == pytest.approx(0.9, abs=0.05), key  # one decay by beta1, and a gradient
            else:
                assert value == 0.5, key  # also after a step, at learning rate 0


def refused_shape(topology: Topology) -> str:
    config = run_config()
    _, engine = build(topology, config)
    with pytest.raises(ValueError) as error:
        engine.state.write("head.norm.weight", MASTER, torch.zeros(3))
    return str(error.value)


def test_refuses_another_shape() -> None:
    assert run_ranks(1, refused_shape) == ["head.norm.weight has shape (32,), not (3,)"]
