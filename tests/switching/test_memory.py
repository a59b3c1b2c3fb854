"""A switch moves one tensor of one bank at a time: the memory it takes does not grow with the number of layers."""

import pytest

from benchmarks.peak_memory import PeakMemory
from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.partition import random_partition
from ssd_megatron.switching.switch import regroup_neurons
from tests.ranks import run_ranks
from tests.small_engine import build, run_config, train_steps

EXPERTS = 8


def memory_of_a_move(topology: Topology, layers: int, parallel: ParallelConfig) -> float:
    """Most bytes of tensors made in a move, over the bytes of one bank's fp32 masters on this rank."""
    config = run_config(
        topology.world.size, num_layers=layers, hidden_size=64, ffn_hidden_size=1024, parallel=parallel.model_dump()
    )
    model, engine = build(topology, config)
    train_steps(engine, config, range(1))
    labels = {name: random_partition(1024, EXPERTS, seed).labels for seed, name in enumerate(model.ffns)}
    with PeakMemory() as memory:
        regroup_neurons(Networks(list(model.ffns), model.ffns, topology), labels, EXPERTS, engine.state)
    bank = next(iter(model.ffns.values())).bank
    return memory.peak / (4 * sum(parameter.numel() for parameter in bank.neuron_parameters().values()))


@pytest.mark.parametrize(
    ("ranks", "sizes"), [(1, {}), (2, {"tensor_parallel_size": 2}), (2, {"expert_parallel_size": 2})]
)
def test_memory_of_a_move_is_that_of_a_bank_however_many_layers(ranks: int, sizes: dict[str, int]) -> None:
    parallel = ParallelConfig(**sizes)
    few, many = (max(run_ranks(ranks, memory_of_a_move, layers, parallel, parallel=parallel)) for layers in (2, 6))
    assert 0.5 < few < 4
    # Three times as many layers; what crosses between ranks differs from one random order to the next, and gloo's
    # threads may hold a result for a moment.
    assert many < 4 and many < 2 * few
