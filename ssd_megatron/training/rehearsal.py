"""--dry_run --rank: one rank of a job of any size on paper: its groups, its part of the model on the meta device, and
what it would send in a switch. Nothing is trained and nobody else is there."""

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass

import rich.console
import torch
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from rich.table import Table
from torch import nn

from ssd_megatron.config.load import RunConfig
from ssd_megatron.config.schema import expert_shape
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.kernels import choose_backend
from ssd_megatron.model.language_model import LanguageModel, stage_blocks
from ssd_megatron.parallel.experts import declare_expert_parallel
from ssd_megatron.parallel.logical_state import Interval
from ssd_megatron.parallel.sharding import row_shard, row_size
from ssd_megatron.parallel.topology import Topology, leave_topology, pretend_topology
from ssd_megatron.parallel.zero import KINDS, partition_stops
from ssd_megatron.switching.partition import partition_order, random_partition
from ssd_megatron.switching.redistribute import plan_move
from ssd_megatron.switching.switch import neuron_tensor_names
from ssd_megatron.training.engine import parameter_groups

MIB = 2**20


@dataclass(frozen=True)
class Rehearsal:
    """One rank on paper.

    Attributes:
        rank, world_size: which rank of how many.
        groups: ranks in each of its groups.
        blocks: layers of its stage.
        parameters: elements that it holds.
        sent, received: bytes of masters and moments to and from other ranks in a switch with random labels.
        seconds: that the rehearsal took.
    """

    rank: int
    world_size: int
    groups: dict[str, tuple[int, ...]]
    blocks: range
    parameters: int
    sent: int
    received: int
    seconds: float


def rehearse(config: RunConfig, rank: int) -> Rehearsal:
    """Build what one rank of the job would build before its first step, and plan a switch.

    Raises:
        ConfigError: there is no such rank.
    """
    section, sizes = config.ssd_megatron, config.ssd_megatron.parallel
    world_size = config.data_parallel_size * sizes.tensor_parallel_size * sizes.pipeline_parallel_size
    if not 0 <= rank < world_size:
        raise ConfigError(f"--rank ({rank}) must be between 0 and {world_size - 1}")
    started = time.perf_counter()
    topology = pretend_topology(sizes, rank, world_size)
    if topology.pipeline.size > 1:  # the groups that PipelineEngine makes for itself
        PipelineParallelGrid(
            PipeModelDataParallelTopology(
                num_pp=topology.pipeline.size, num_mp=topology.tensor.size, num_dp=topology.data.size
            )
        )
    shape = expert_shape(section.model, section.ssd)
    backend, _ = choose_backend(section.ssd.backend, topology.device, getattr(torch, config.dtype), shape)
    with torch.device("meta"):
        model = LanguageModel(section, backend, topology)
    sent, received = _switch_traffic(model, topology, section.ssd.num_experts, section.model.ffn_hidden_size)
    named_groups = (topology.tensor, topology.pipeline, topology.data, topology.expert, topology.expert_data)
    result = Rehearsal(
        rank=rank,
        world_size=world_size,
        groups={group.name: group.ranks for group in named_groups},
        blocks=stage_blocks(section.model.total_layers, topology),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sent=sent,
        received=received,
        seconds=time.perf_counter() - started,
    )
    leave_topology()
    return result


def owners_on_paper(model: LanguageModel, topology: Topology) -> dict[str, list[Interval]]:
    """Who will own what of this stage's neuron banks (see LogicalState.owners), known before any engine exists."""
    parameters = model.logical_parameters()
    banks = {
        tensor: parameters[tensor] for name, ffn in model.ffns.items() for tensor in neuron_tensor_names(name, ffn)
    }
    declare_expert_parallel(model, banks.values(), topology)
    copies = topology.expert_data if topology.expert.size > 1 else topology.data
    owners: dict[str, list[Interval]] = {}
    for group in parameter_groups(parameters, 0.0):
        members = group["params"]
        assert isinstance(members, list)
        for name, offset in _offsets(banks, members).items():
            stops = partition_stops([member.numel() for member in members], copies.size)
            owners[name] = _bank_owners(banks[name], offset, stops, topology)
    return owners


def print_rehearsal(rehearsal: Rehearsal) -> None:
    """Print one rank's groups, layers, parameters, and its part of a switch."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    table = Table(f"rank {rehearsal.rank} of {rehearsal.world_size}", "", title="Rehearsal", title_justify="left")
    for name, ranks in rehearsal.groups.items():
        shown = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
        table.add_row(f"{name} ranks", f"{len(ranks)}: {shown}")
    table.add_row("layers", f"{rehearsal.blocks.start} to {rehearsal.blocks.stop - 1}")
    table.add_row("parameters", f"{rehearsal.parameters:,}")
    table.add_row("sent in a switch, MiB", f"{rehearsal.sent / MIB:,.0f}")
    table.add_row("received in a switch, MiB", f"{rehearsal.received / MIB:,.0f}")
    table.add_row("rehearsed in, seconds", f"{rehearsal.seconds:.1f}")
    table.add_row("peak memory, MiB", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f}")
    console.print(table)


def _switch_traffic(model: LanguageModel, topology: Topology, num_experts: int, neurons: int) -> tuple[int, int]:
    owners, parameters = owners_on_paper(model, topology), model.logical_parameters()
    sent = received = 0
    for seed, (name, ffn) in enumerate(model.ffns.items()):
        order = partition_order(random_partition(neurons, num_experts, seed).labels, num_experts)
        for tensor in neuron_tensor_names(name, ffn):
            plan = plan_move(order, row_size(parameters[tensor]), owners[tensor], topology.stage.size)
            plan.moves(topology.stage.rank)
            traffic, me = plan.traffic(), topology.stage.rank
            own = int(traffic[me, me])
            sent += (int(traffic[me].sum()) - own) * 4 * len(KINDS)
            received += (int(traffic[:, me].sum()) - own) * 4 * len(KINDS)
    return sent, received


def _offsets(banks: Mapping[str, nn.Parameter], members: list[nn.Parameter]) -> dict[str, int]:
    """Where each of a group's bank tensors begins in the group's flat line."""
    names = {id(parameter): name for name, parameter in banks.items()}
    offsets, position = {}, 0
    for member in members:
        if id(member) in names:
            offsets[names[id(member)]] = position
        position += member.numel()
    return offsets


def _bank_owners(parameter: nn.Parameter, offset: int, stops: list[int], topology: Topology) -> list[Interval]:
    """Every home holds rows of its own, cut at the same places; copies of a home have the parts in turn."""
    numel, intervals = parameter.numel(), []
    assert row_shard(parameter).total == parameter.shape[0] * topology.homes
    for home in range(topology.homes):
        t, e = divmod(home, topology.expert.size)
        start = 0
        for copy, stop in enumerate(stops):
            end = min(max(stop - offset, 0), numel)
            if end > start:
                rank = (copy * topology.expert.size + e) * topology.tensor.size + t
                intervals.append(Interval(rank, home * numel + start, home * numel + end))
            start = max(start, end)
    return intervals
