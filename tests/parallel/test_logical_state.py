"""The adapter on ZeRO and the logical state, against DeepSpeed's own reading of the same tensors."""

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import EXP_AVG, EXP_AVG_SQ, KINDS, MASTER
from tests.ranks import run_ranks
from tests.small_engine import build, run_config, train_steps

LAYOUTS = [(1, 1, False), (1, 1, True), (2, 1, False), (2, 2, False), (2, 2, True), (3, 1, False)]
NAMES = ("embedding.word.weight", "blocks.0.layer.mlp.bank.w_in", "blocks.1.layer.mlp.bank.b_in", "head.norm.weight")


def compare_with_deepspeed(topology: Topology, stage: int, bf16: bool) -> int:
    config = run_config(topology.world.size, stage=stage, bf16=bf16)
    _, engine = build(topology, config)
    train_steps(engine, config, range(2))
    # DeepSpeed links only the first group's moments by itself.
    optimizer = engine.deepspeed.optimizer
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
    compared = 0
    for name in engine.state.specs:
        parameter = engine.state.parameter(name)
        assert torch.equal(engine.state.read(name, MASTER), safe_get_full_fp32_param(parameter)), name
        for kind in (EXP_AVG, EXP_AVG_SQ):
            assert torch.equal(engine.state.read(name, kind), safe_get_full_optimizer_state(parameter, kind)), name
        compared += 1
    return compared


@pytest.mark.parametrize(("world_size", "stage", "bf16"), LAYOUTS)
def test_reads_what_deepspeed_reads(world_size: int, stage: int, bf16: bool) -> None:
    compared = run_ranks(world_size, compare_with_deepspeed, stage, bf16)
    assert compared == [30] * world_size


def write_and_train(topology: Topology, stage: int, bf16: bool) -> dict[str, float]:
    config = run_config(topology.world.size, stage=stage, bf16=bf16)
    _, engine = build(topology, config)
    train_steps(engine, config, range(1))
    state = engine.state
    for name in NAMES:
        for index, kind in enumerate(KINDS):
            state.write(name, kind, torch.full(state.specs[name].shape, 0.5 + index))
    state.publish()
    seen = {f"{name} published": float(state.parameter(name).float().mean()) for name in NAMES}
    for group in ("decay", "no_decay", "router"):
        state.set_learning_rate(group, 0.0)
        state.set_adam_step(group, 7)
    train_steps(engine, config, range(1, 2))
    seen |= {f"{name} kept": float(state.read(name, MASTER).mean()) for name in NAMES}
    seen |= {f"{name} moment": float((state.read(name, EXP_AVG) / 1.5).mean()) for name in NAMES}
    assert state.adam_steps() == {"decay": 8, "no_decay": 8, "router": 8}
    return seen


@pytest.mark.parametrize(("world_size", "stage", "bf16"), LAYOUTS)
def test_what_is_written_is_computed_with_and_stays(world_size: int, stage: int, bf16: bool) -> None:
    for seen in run_ranks(world_size, write_and_train, stage, bf16):
        for name in NAMES:
            assert seen[f"{name} published"] == 0.5
            assert seen[f"{name} kept"] == 0.5  # learning rate 0
            assert seen[f"{name} moment"] == pytest.approx(0.9, abs=0.05)  # one decay by beta1, and a gradient


def refused_shape(topology: Topology) -> str:
    config = run_config()
    _, engine = build(topology, config)
    with pytest.raises(ValueError) as error:
        engine.state.write("head.norm.weight", MASTER, torch.zeros(3))
    return str(error.value)


def test_refuses_another_shape() -> None:
    assert run_ranks(1, refused_shape) == ["head.norm.weight has shape (32,), not (3,)"]
