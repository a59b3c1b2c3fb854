"""Dealing out experts to layers: the arithmetic, and what is measured on a real model."""

import pytest
import torch

from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.allocation import (
    MOST_MEASURED,
    allocate_alike,
    allocate_experts,
    measured_together,
    sparsity_costs,
)
from ssd_megatron.switching.statistics import ProbeBatch
from tests.ranks import run_ranks
from tests.small_engine import build, random_batch, run_config


def test_experts_go_where_the_next_one_saves_most() -> None:
    costly, cheap = [(2, 0.8), (4, 0.4), (8, 0.0)], [(2, 0.02), (4, 0.01), (8, 0.0)]
    assert allocate_experts([costly, cheap], top_k=4, least=2) == [6, 2]
    assert allocate_experts([cheap, costly, cheap], top_k=4, least=2) == [2, 8, 2]


def test_layers_of_more_tokens_do_not_get_the_experts_of_others() -> None:
    costly, cheap = [(2, 0.8), (4, 0.4), (8, 0.0)], [(2, 0.02), (4, 0.01), (8, 0.0)]
    costs = [costly, cheap, cheap, cheap]
    assert allocate_experts(costs, top_k=4, least=2)[0] == 8
    assert allocate_alike(costs, [64, 64, 16, 16], top_k=4, least=2) == [6, 2, 4, 4]


def test_cost_falls_evenly_between_two_points() -> None:
    # 0.1 saved per expert up to 4 and 0.01 beyond, against 0.05 throughout.
    bent, straight = [(2, 0.24), (4, 0.04), (8, 0.0)], [(2, 0.3), (4, 0.2), (8, 0.0)]
    assert allocate_experts([bent, straight], top_k=5, least=2) == [4, 6]


def test_noise_is_no_reason_to_refuse_experts() -> None:
    noisy, flat = [(1, 0.5), (2, -0.1), (4, 0.1), (8, 0.0)], [(1, 0.0), (2, 0.0), (4, 0.0), (8, 0.0)]
    assert allocate_experts([noisy, flat], top_k=3, least=1)[0] >= 4


def test_the_number_of_experts_is_kept_and_no_layer_gets_more_than_it_has() -> None:
    costs = [[(1, 0.3 / layer), (2, 0.2 / layer), (4, 0.1 / layer), (8, 0.0)] for layer in range(1, 6)]
    for top_k in range(1, 9):
        allocated = allocate_experts(costs, top_k, least=1)
        assert sum(allocated) == 5 * top_k
        assert max(allocated) <= 8 and min(allocated) >= 1


@pytest.mark.parametrize("layers", [1, 2, MOST_MEASURED, MOST_MEASURED + 1, 24, 80])
def test_deep_models_are_measured_in_runs_of_neighbours(layers: int) -> None:
    names = [str(layer) for layer in range(layers)]
    runs = measured_together(names)
    assert [name for run in runs for name in run] == names
    assert len(runs) == min(layers, MOST_MEASURED)
    assert len(runs[0]) == 1
    assert max(map(len, runs[1:]), default=1) - min(map(len, runs[1:]), default=1) <= 1


def measured(topology: Topology) -> tuple[list[list[tuple[int, float]]], list[list[float]]]:
    """Cost curves, and the same rises of the loss computed one by one."""
    config = run_config(topology.world.size)
    model, engine = build(topology, config)
    for index, ffn in enumerate(model.ffns.values()):
        ffn.bank.w_in.data.mul_(30), ffn.bank.w_out.data.mul_(30)
        ffn.router.weight.data.normal_(generator=torch.Generator().manual_seed(index))
    batch = random_batch(config, 7)
    mine = {name: values[topology.rank :: topology.world.size] for name, values in batch.items()}
    probe = ProbeBatch([mine], engine.mean_loss, topology)
    curves = sparsity_costs(list(model.ffns), model.ffns, probe.loss, num_experts=8, least=2)
    assert all(ffn.mode == "dense" and ffn.router.top_k == 2 for ffn in model.ffns.values())
    dense = engine.mean_loss([batch])
    rises = []
    for ffn in model.ffns.values():
        ffn.mode = "sparse"
        rises.append([])
        for experts in (2, 4, 8):
            ffn.router.top_k = experts
            rises[-1].append(engine.mean_loss([batch]) - dense)
        ffn.mode = "dense"
    return curves, rises


@pytest.mark.parametrize("world_size", [1, 2])
def test_costs_are_the_rises_of_the_probe_loss_on_all_ranks(world_size: int) -> None:
    for curves, rises in run_ranks(world_size, measured):
        assert [[experts for experts, _ in curve] for curve in curves] == [[2, 4, 8], [2, 4, 8]]
        for curve, rise in zip(curves, rises, strict=True):
            assert [cost for _, cost in curve] == pytest.approx(rise, abs=2e-6)
            assert abs(curve[0][1]) > 1e-4
