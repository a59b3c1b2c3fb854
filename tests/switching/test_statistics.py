"""Statistics of the probe batch against direct counting, on one rank and on several."""

import numpy as np
import pytest
import torch

from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.statistics import ProbeBatch, collect_statistics, expert_overlap, pack_bits
from tests.ranks import run_ranks
from tests.small_engine import build, random_batch, run_config


@pytest.mark.parametrize("tokens", [1, 8, 13, 64])
def test_bits_are_packed_as_numpy_packs_them(tokens: int) -> None:
    bits = torch.rand(5, tokens, generator=torch.Generator().manual_seed(tokens)) > 0.5
    packed = pack_bits(bits)
    assert packed.numpy().tolist() == np.packbits(bits.numpy(), axis=1).tolist()


def test_overlap_is_the_share_of_common_experts() -> None:
    a = torch.tensor([[0, 1], [2, 3], [4, 5]])
    b = torch.tensor([[1, 0], [2, 7], [6, 7]])
    assert expert_overlap(a, a, 8) == 1.0
    assert expert_overlap(a, b, 8) == pytest.approx((2 + 1 + 0) / 6)


def statistics(topology: Topology) -> dict[str, tuple[float, list[int], list[int]]]:
    """Active share, packed bits and expert choices of each network on 4 probe samples spread over the ranks."""
    config = run_config(topology.world.size)
    model, engine = build(topology, config)
    samples = random_batch(config, 5), random_batch(config, 6)
    whole = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    mine = range(topology.rank, 4, topology.world.size)
    batches = [{name: values[i : i + 1] for name, values in whole.items()} for i in mine]
    centroids = {name: torch.randn(8, 32, generator=torch.Generator().manual_seed(1)) for name in model.ffns}
    found = collect_statistics(model.ffns, ProbeBatch(batches, engine.mean_loss, topology), centroids, 2)
    assert all(ffn.observer is None and ffn.mode == "dense" for ffn in model.ffns.values())
    return {
        name: (s.active_fraction, sorted(s.signatures.sum(1).tolist()), sorted(s.expert_ids.flatten().tolist()))
        for name, s in found.items()
    }


def test_ranks_together_measure_what_one_rank_does() -> None:
    alone = run_ranks(1, statistics)[0]
    for world_size in (2, 3):  # with three, one rank has two samples and the others one
        for found in run_ranks(world_size, statistics):
            assert found == alone


def active_share(topology: Topology) -> list[float]:
    config = run_config()
    model, engine = build(topology, config)
    for fires, ffn in zip((0, 16), model.ffns.values(), strict=True):
        ffn.bank.w_in.data.zero_()
        ffn.bank.b_in.data.fill_(-1.0)
        ffn.bank.b_in.data[:fires] = 1.0
    found = collect_statistics(model.ffns, ProbeBatch([random_batch(config, 0)], engine.mean_loss, topology), {}, 2)
    return [s.active_fraction for s in found.values()]


def test_active_share_of_known_neurons() -> None:
    assert run_ranks(1, active_share) == [[0.0, 0.25]]
