"""One feed-forward network over real ranks against the same network on one."""

import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ssd_megatron.ffn import gathered_weights
from ssd_megatron.ffn.homes import Homes
from ssd_megatron.ffn.switchable import FFNSettings, SwitchableFFN
from ssd_megatron.parallel.topology import Topology
from tests.ffn.helpers import relative_error
from tests.layouts import EP2, EP2_DP2, EP4, TP2, TP2_EP2
from tests.ranks import run_ranks

HIDDEN, NEURONS, EXPERTS = 12, 48, 8
SETTINGS = FFNSettings(
    hidden_size=HIDDEN,
    ffn_hidden_size=NEURONS,
    activation="relu",
    add_bias=True,
    num_experts=EXPERTS,
    top_k=3,
    router_update="straight_through",
    backend="torch",
)
NETWORKS = {
    "relu": SETTINGS,
    "relu without bias, reference kernels": replace(SETTINGS, add_bias=False, backend="reference"),
    "swiglu": replace(SETTINGS, activation="swiglu", add_bias=False),
    "reglu with bias": replace(SETTINGS, activation="reglu", top_k=2),
    "frozen": replace(SETTINGS, router_update="frozen", top_k=1),
    "avg_k": replace(SETTINGS, router_update="avg_k", activation="reglu"),
    "tiles": replace(SETTINGS, routing_granularity=3),
    "switch": replace(SETTINGS, router="switch", top_k=2, load_balance=0.3, z_loss=0.2),
    "pkm": replace(SETTINGS, num_experts=16, router="pkm"),
    "mlp": replace(SETTINGS, router="mlp"),
    "hash": replace(SETTINGS, router="hash", add_bias=False),
    "oracle": replace(SETTINGS, router="oracle", activation="swiglu"),
    "vanilla": replace(SETTINGS, num_experts=NEURONS, top_k=12, router="vanilla", activation="reglu"),
    "random": replace(SETTINGS, router="random"),
    "all experts": replace(SETTINGS, router_update="frozen", top_k=EXPERTS),
}
# Sequence length of each data-parallel rank's input [sequence, 2, HIDDEN].
LENGTHS = {"even": (5, 5, 5, 5), "uneven": (4, 7, 1, 2), "none on the first rank": (0, 6, 3, 0)}

LAYOUTS = {str(layout): layout for layout in (TP2, EP2, EP4, TP2_EP2, EP2_DP2)}


class Given(NamedTuple):
    """What every rank starts from: parameters of the whole network by name, and x and dy of each data-parallel rank."""

    parameters: dict[str, Tensor]
    x: list[Tensor]
    dy: list[Tensor]


class Result(NamedTuple):
    """What one rank got: its home, output, and gradients of x, its bank shard and its router, by name."""

    home: int
    y: Tensor
    gradients: dict[str, Tensor]
    load: Tensor


def given(name: str, lengths: str, router: str) -> Given:
    """Float64 from a seed; b_out is not part of the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parameters = {key: 0.5 * normal(*p.shape) for key, p in network(name).named_parameters()}
    if router == "first home":
        if "router.weight" in parameters:
            parameters["router.weight"][0 : EXPERTS // 4] += 4.0  # of four homes; two have more experts each
        for rows in ("bank.w_in", "bank.w_gate"):
            if rows in parameters:
                parameters[rows][: NEURONS // 4] += 4.0
    x = [normal(length, 2, HIDDEN).abs() for length in LENGTHS[lengths]]
    return Given(parameters, x, [normal(*x_sbh.shape) for x_sbh in x])


def network(name: str, homes: Homes | None = None) -> SwitchableFFN:
    return SwitchableFFN(SimpleNamespace(params_dtype=torch.float64), NETWORKS[name], homes)


def load_parameters(ffn: SwitchableFFN, parameters: dict[str, Tensor]) -> None:
    """Of bank tensors, this home's rows."""
    with torch.no_grad():
        for key, parameter in ffn.named_parameters():
            whole, rows = parameters[key], len(parameter)
            first = ffn.homes.index * rows if rows < len(whole) else 0
            parameter.copy_(whole[first : first + rows])


def run(ffn: SwitchableFFN, mode: str, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of x, bank and, where it learns, router."""
    ffn.mode = mode
    x = x.clone().requires_grad_()
    ffn.token_ids = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[1], x.shape[0])
    y, _ = ffn(x)
    wanted = {"x": x, **ffn.bank.neuron_parameters()}
    if mode == "sparse" and ffn.router.learns:
        wanted["router"] = ffn.router.weight
    return y.detach(), dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))


# Network, mode, lengths, and where tokens go: as a random router says, or all of them to experts of the first home.
Key = tuple[str, str, str, str]
KEYS: list[Key] = [
    *((name, mode, "even", "random") for name in NETWORKS for mode in ("dense", "sparse")),
    *((name, "sparse", "uneven", "first home") for name in NETWORKS if NETWORKS[name].top_k < 4),
    *((name, mode, "none on the first rank", "random") for name in ("relu", "swiglu") for mode in ("dense", "sparse")),
]


def compute_on_ranks(topology: Topology) -> dict[Key, Result]:
    results = {}
    for name, mode, lengths, router in KEYS:
        ffn = network(name, Homes(topology))
        inputs = given(name, lengths, router)
        load_parameters(ffn, inputs.parameters)
        rank = topology.data.rank
        y, gradients = run(ffn, mode, inputs.x[rank], inputs.dy[rank])
        results[name, mode, lengths, router] = Result(topology.home, y, gradients, ffn.expert_load)
    return results


@cache
def results_of(layout: str) -> list[dict[Key, Result]]:
    return run_ranks(LAYOUTS[layout].ranks, compute_on_ranks, parallel=LAYOUTS[layout].parallel)


@pytest.mark.parametrize("key", KEYS, ids=", ".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_homes_together_are_the_network(layout: str, key: Key) -> None:
    """Bank gradients are added up over the data-parallel ranks that have the same neurons, router gradients over all
    of them (which the engine does); tensor-parallel ranks have the same outputs and router gradients."""
    name, mode, lengths, router = key
    sizes, inputs = LAYOUTS[layout], given(name, lengths, router)
    whole = network(name)
    load_parameters(whole, inputs.parameters)
    wanted = []
    for x, dy in zip(inputs.x[: sizes.data], inputs.dy, strict=False):
        y, gradients = run(whole, mode, x, dy)
        wanted.append(Result(0, y, gradients, whole.expert_load))

    results = [by_key[key] for by_key in results_of(layout)]
    for tensor_rank in range(sizes.tensor):  # ranks are numbered tensor parallel first
        ranks = results[tensor_rank :: sizes.tensor]
        assert relative_error(*(torch.cat([r.y for r in of]) for of in (ranks, wanted))) < 1e-12
        assert relative_error(*(torch.cat([r.gradients["x"] for r in of]) for of in (ranks, wanted))) < 1e-12
        if "router" in wanted[0].gradients:
            assert relative_error(*(sum(r.gradients["router"] for r in of) for of in (ranks, wanted))) < 1e-12
    for leaf in whole.bank.neuron_parameters():
        shards = [sum(r.gradients[leaf] for r in results if r.home == home) for home in range(sizes.homes)]
        assert relative_error(torch.cat(shards), sum(r.gradients[leaf] for r in wanted)) < 1e-12, leaf
    if mode == "sparse":
        loads = torch.stack([r.load for r in results[:: sizes.tensor]])
        assert loads.sum(0).tolist() == sum(r.load for r in wanted).tolist()
        if router == "first home" and NETWORKS[name].top_k <= 2:
            assert loads[:, EXPERTS // sizes.homes :].sum() == 0  # so every other home computes nothing


class Memory(NamedTuple):
    """Gathers until then, and how many of their results are still in memory, after forward and after backward."""

    gathered: tuple[int, int]
    alive: tuple[int, int]


def memory_of_gathered_weights(topology: Topology, activation: str) -> dict[str, Memory]:
    """Of a dense pass with weights gathered again in backward, with weights kept, and with the pass recomputed."""
    gathered: list[StorageWeakRef] = []
    gather_rows = gathered_weights.gather_rows

    def watched(shard: Tensor, group: object) -> Tensor:
        whole = gather_rows(shard, group)
        gathered.append(StorageWeakRef(whole.untyped_storage()))
        return whole

    gathered_weights.gather_rows = watched
    results = {}
    for case in ("again", "kept", "recomputed"):
        gathered.clear()
        ffn = network(activation, Homes(topology, gather_again=case == "again"))
        inputs = given(activation, "even", "random")
        load_parameters(ffn, inputs.parameters)
        x = inputs.x[topology.data.rank].requires_grad_()
        y = checkpoint(lambda t, ffn=ffn: ffn(t)[0], x, use_reentrant=False) if case == "recomputed" else ffn(x)[0]
        after_forward = len(gathered), still_alive(gathered)
        y.backward(inputs.dy[topology.data.rank])
        after_backward = len(gathered), still_alive(gathered)
        results[case] = Memory(*zip(after_forward, after_backward, strict=True))
    return results


def still_alive(gathered: list[StorageWeakRef]) -> int:
    """How many are in memory; gloo's threads let go of a collective's result some moments after it is there."""
    counts = []
    for _ in range(20):
        counts.append(sum(not ref.expired() for ref in gathered))
        time.sleep(0.02)
    return min(counts)


@pytest.mark.parametrize(("activation", "weights", "tensors"), [("relu", 2, 3), ("swiglu", 3, 3)])
def test_no_gathered_weight_lives_between_forward_and_backward(activation: str, weights: int, tensors: int) -> None:
    """Of the gathered tensors the weights are needed in backward, biases are not."""
    for memory in run_ranks(2, memory_of_gathered_weights, activation, parallel=EP2.parallel):
        assert memory["again"] == Memory(gathered=(tensors, tensors + weights), alive=(0, 0))
        assert memory["kept"] == Memory(gathered=(tensors, tensors), alive=(weights, 0))
        assert memory["recomputed"] == Memory(gathered=(tensors, 2 * tensors), alive=(0, 0))
