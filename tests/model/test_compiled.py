"""Compiled blocks against blocks as they are: losses, gradient norms, evaluation, and how many graphs there are."""

import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.parallel.topology import Topology
from tests.ranks import run_ranks
from tests.small_engine import build, make_coordinator, random_batch, run_config, train_steps

PHASES = [(1, "dense"), (3, "sparse"), (5, "dense")]


def curve(topology: Topology, backend: str, settings: dict[str, Any], compiled: str) -> list[float]:
    """Losses of steps through two switches, then the loss of an evaluation."""
    torch.compile = partial(torch.compile, backend=backend)
    training = {"compile": compiled} | settings.get("training", {})
    config = run_config(topology.world.size, **settings | {"training": training, "phases": PHASES})
    model, engine = build(topology, config)
    coordinator = make_coordinator(topology, config, model, engine)
    losses = train_steps(engine, config, range(1, 7), coordinator)
    losses.append(engine.mean_loss([random_batch(config, 0)]))
    engine.close()
    return losses


def both(topology: Topology, backend: str, settings: dict[str, Any]) -> tuple[list[float], list[float], int]:
    plain = curve(topology, backend, settings, "none")
    assert not counters["stats"]
    return plain, curve(topology, backend, settings, "blocks"), counters["stats"]["unique_graphs"]


# With aot_eager torch.compile also traces the backward pass; eager is quicker.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("aot_eager", {"training": {"recompute": "full"}}),
    ("eager", {"position_embedding": "rope", "activation": "reglu", "normalization": "rmsnorm"}),
    ("eager", {"parallel": {"tensor_parallel_size": 2}}),
    ("eager", {"parallel": {"pipeline_parallel_size": 2}}),
    ("eager", {"parallel": {"expert_parallel_size": 2}}),
]


@pytest.mark.parametrize(("backend", "settings"), CASES, ids=str)
def test_compiled_blocks_train_as_others_do(backend: str, settings: dict[str, Any]) -> None:
    parallel = settings.get("parallel", {})
    ranks = 2 if parallel else 1
    for plain, compiled, graphs in run_ranks(ranks, both, backend, settings, parallel=ParallelConfig(**parallel)):
        assert compiled == pytest.approx(plain, rel=1e-5)
        assert graphs > 0


def graphs_of(topology: Topology, layers: int) -> int:
    curve(topology, "eager", {"num_layers": layers}, "blocks")
    return int(counters["stats"]["unique_graphs"])


def test_layers_share_their_graphs() -> None:
    assert run_ranks(1, graphs_of, 1) == run_ranks(1, graphs_of, 4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_changes_losses_by_rounding() -> None:
    ((plain, compiled, graphs),) = run_ranks(1, both, "inductor", {})
    assert graphs > 0 and compiled != plain
    assert compiled == pytest.approx(plain, rel=1e-4)
