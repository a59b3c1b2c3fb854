"""Statistics of the probe batch against direct counting, on one rank and on several."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.statistics import ProbeBatch, _Recorder, collect_statistics, expert_overlap, pack_bits
from tests.layouts import DP2, EP2, EP4, ONE, PP2, PP2_EP2_DP2, TP2, TP2_EP2, TP2_PP2_EP2, Layout
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


def test_centroids_follow_the_tokens_to_their_device() -> None:
    """On a GPU that is not there: fake tensors have a device and no values."""
    recorder = _Recorder(neurons=16, centroids_EH=torch.randn(4, 8), top_k=2, signatures=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        recorder(torch.empty(5, 8, device="cuda", dtype=torch.bfloat16), torch.empty(5, 16, device="cuda"))
    assert recorder.chosen[0].device.type == recorder.fired[0].device.type == "cuda"
    assert recorder.chosen[0].shape == (5, 2) and recorder.fired[0].shape == (16, 1)


Statistics = dict[str, tuple[float, list[list[int]], list[list[int]]]]

SAMPLES = 3
LAYOUTS = (DP2, Layout(data=3), TP2, PP2, EP2, EP4, TP2_EP2, PP2_EP2_DP2, TP2_PP2_EP2)


def statistics(topology: Topology, layout: Layout) -> Statistics:
    """Active share, packed bits and expert choices of each network of this stage, on 3 probe samples spread over the
    data-parallel ranks in order."""
    config = run_config(topology.world.size, parallel=layout.parallel.model_dump())
    model, engine = build(topology, config)
    samples = random_batch(config, 5), random_batch(config, 6)
    whole = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    rank, ranks = topology.data.rank, topology.data.size
    mine = slice(SAMPLES * rank // ranks, SAMPLES * (rank + 1) // ranks)
    # As many batches on each rank, of which some are empty.
    batches = [
        {name: values[mine][i : i + 1] for name, values in whole.items()} for i in range(math.ceil(SAMPLES / ranks))
    ]
    centroids = {name: torch.randn(8, 32, generator=torch.Generator().manual_seed(1)) for name in model.ffns}
    found = collect_statistics(
        model.ffns, ProbeBatch(batches, engine.mean_loss, topology), centroids, dict.fromkeys(model.ffns, 2)
    )
    assert all(ffn.observer is None and ffn.mode == "dense" for ffn in model.ffns.values())
    return {name: (s.active_fraction, s.signatures.tolist(), s.expert_ids.tolist()) for name, s in found.items()}


@pytest.fixture(scope="module")
def alone() -> Statistics:
    return run_ranks(1, statistics, ONE)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_together_measure_what_one_rank_does(alone: Statistics, layout: Layout) -> None:
    """Bit by bit and token by token. Two data-parallel ranks have one sample and two; of four one has none."""
    for found in run_ranks(layout.ranks, statistics, layout, parallel=layout.parallel):
        assert len(found) == 2 // layout.pipeline
        for name, values in found.items():
            assert values == alone[name], name


def active_share(topology: Topology) -> list[float]:
    config = run_config()
    model, engine = build(topology, config)
    for fires, ffn in zip((0, 16), model.ffns.values(), strict=True):
        ffn.bank.w_in.data.zero_()
        ffn.bank.b_in.data.fill_(-1.0)
        ffn.bank.b_in.data[:fires] = 1.0
    found = collect_statistics(
        model.ffns, ProbeBatch([random_batch(config, 0)], engine.mean_loss, topology), {}, dict.fromkeys(model.ffns, 2)
    )
    return [s.active_fraction for s in found.values()]


def test_active_share_of_known_neurons() -> None:
    assert run_ranks(1, active_share) == [[0.0, 0.25]]
