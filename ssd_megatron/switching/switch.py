"""The switch from dense to sparse, in place, in the running job: plan -> check -> apply -> verify -> commit.

Neurons move so that every expert is a contiguous slice; weights, masters and moments move together, and nothing else
of the model changes: the dense loss stays what it was. From sparse to dense nothing moves at all.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_megatron.ffn.routers import expert_directions
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.parallel.logical_state import LogicalState
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import EXP_AVG, EXP_AVG_SQ, KINDS, MASTER
from ssd_megatron.switching.fingerprint import bank_fingerprints, replica_digest, stale_parameters
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.partition import partition_order
from ssd_megatron.switching.redistribute import move_neurons

ROUTER_GROUP = "router"


class SwitchError(RuntimeError):
    """A switch could not be verified. Nothing of it was saved; the newest checkpoint is from before it."""


@dataclass(frozen=True)
class Applied:
    """What moving the neurons took: bytes between ranks, and seconds of each part."""

    bytes_moved: int
    transfer_seconds: float
    verify_seconds: float


@torch.no_grad()
def regroup_neurons(networks: Networks, labels: Mapping[str, Tensor], num_experts: int, state: LogicalState) -> Applied:
    """Reorder every bank of this stage by its labels, and verify neuron by neuron (collective over the stage).

    Banks move one after the other, so that what is in flight is a part of one tensor of one bank.

    Args:
        labels: expert of each neuron by identity, [F] int64, by network name; the same on every rank.
    Raises:
        SwitchError: a neuron does not have exactly the values it had before.
    """
    transfer = verify = 0.0
    moved = 0
    expected: dict[str, Tensor] = {}
    ffns, topology = networks.local, networks.topology
    for name, ffn in ffns.items():
        names = neuron_tensor_names(name, ffn)
        started = time.perf_counter()
        expected[name] = fingerprints_by_identity(ffn, bank_fingerprints(state, names, topology.stage))
        fingerprinted = time.perf_counter()
        order = partition_order(labels[name][ffn.bank.neuron_ids.cpu()], num_experts)
        moved += move_neurons(state, names, order, topology.stage)
        ffn.bank.neuron_ids.copy_(ffn.bank.neuron_ids[order.to(ffn.bank.neuron_ids.device)])
        verify += fingerprinted - started
        transfer += time.perf_counter() - fingerprinted
    started = time.perf_counter()
    state.publish()
    transfer += time.perf_counter() - started
    started = time.perf_counter()
    for name, ffn in ffns.items():
        verify_bank(name, ffn, expected[name], state, topology)
    verify += time.perf_counter() - started
    return Applied(moved, transfer, verify)


def verify_bank(name: str, ffn: SwitchableFFN, expected: Tensor, state: LogicalState, topology: Topology) -> None:
    """Check that each neuron has the fingerprint it had before and that the model computes with the masters' values.

    Args:
        expected: fingerprints [N] int64 by neuron identity, from before.
    Raises:
        SwitchError: on every rank alike.
    """
    names = neuron_tensor_names(name, ffn)
    now = fingerprints_by_identity(ffn, bank_fingerprints(state, names, topology.stage))
    wrong = int((now != expected).sum())
    # Each rank compares the masters that it owns with its own copy of the parameters; copies must be the same.
    mine = stale_parameters(state, names), replica_digest(state, names), topology.bank.rank
    seen = topology.stage.gather_objects("parameters after a switch", mine)
    stale = sorted({leaf for part, _, _ in seen for leaf in part})
    unlike = len({(digest, home) for _, digest, home in seen}) != topology.bank.size
    if stale or unlike:
        what = f": {stale}" if stale else " on all ranks alike"
        raise SwitchError(f"{name}: the model's parameters are not their fp32 masters after a switch{what}")
    if wrong:
        raise SwitchError(
            f"{name}: {wrong} of {now.numel()} neurons do not have the weights and moments they had before the switch"
        )


@torch.no_grad()
def set_routers(networks: Networks, num_experts: int, state: LogicalState) -> None:
    """Make every router from its experts' centroids, without moments, as if its optimizer had just begun
    (collective)."""
    for name, ffn in networks.local.items():
        directions_EH, norms_F = expert_directions(ffn.bank.rows().detach(), num_experts // ffn.homes.count)
        directions_EH, norms_F = ffn.homes.all_rows(directions_EH), ffn.homes.all_rows(norms_F)
        if ffn.router.kind.by_identity:
            directions_EH = directions_EH[ffn.bank.expert_numbers(num_experts).argsort()]
        for leaf, value in ffn.router.initial_values(directions_EH, norms_F).items():
            state.write(f"{name}.router.{leaf}", MASTER, value)
            for kind in (EXP_AVG, EXP_AVG_SQ):
                state.write(f"{name}.router.{leaf}", kind, torch.zeros_like(value))
    state.set_adam_step(ROUTER_GROUP, 0)
    state.publish()


@torch.no_grad()
def renumber_routers(networks: Networks, numbers: Mapping[str, Tensor], state: LogicalState) -> None:
    """Give the experts of every router that knows them by position new numbers, moments included (collective over the
    stage).

    Args:
        numbers: by network, new number of each expert, [E] int64.
    """
    for name, ffn in networks.local.items():
        if ffn.router.kind.by_identity:
            continue
        order = numbers[name].argsort()
        for leaf, _ in ffn.router.named_parameters():
            for kind in KINDS:
                whole = state.read(f"{name}.router.{leaf}", kind)
                state.write(f"{name}.router.{leaf}", kind, whole[order.to(whole.device)])
    state.publish()


def fingerprints_by_identity(ffn: SwitchableFFN, by_position: Tensor) -> Tensor:
    """Reorder fingerprints from position to neuron identity."""
    by_identity = torch.zeros_like(by_position)
    by_identity[ffn.bank.neuron_ids] = by_position
    return by_identity


def neuron_tensor_names(name: str, ffn: SwitchableFFN) -> list[str]:
    """Global names of a network's tensors that have one row per neuron."""
    return [f"{name}.bank.{leaf}" for leaf in ffn.bank.neuron_parameters()]
