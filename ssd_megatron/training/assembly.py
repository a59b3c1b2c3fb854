"""Model, engine and coordinator of a job, put together in one way whatever its samples are."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ssd_megatron.config.load import RunConfig
from ssd_megatron.config.schema import SsdMegatronConfig, expert_shape
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.kernels import SPECIAL, choose_backend, cpp_build
from ssd_megatron.ffn.kernels.trial import trial
from ssd_megatron.model.cost import layers_of
from ssd_megatron.model.language_model import LanguageModel, ffn_names
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.sparse_weights.masked_weights import MaskedWeights
from ssd_megatron.sparse_weights.schedule import MaskSchedule
from ssd_megatron.switching.coordinator import Coordinator
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.schedule import Schedule
from ssd_megatron.switching.statistics import ProbeBatch
from ssd_megatron.training.engine import Batch, DataParallelEngine, Engine
from ssd_megatron.training.pipeline_engine import PipelineParallelEngine
from ssd_megatron.training.saved_model import is_router


@dataclass(frozen=True)
class Assembly:
    """What a job computes with; `masks`: None if weights are dense; `backend_reason` says in words which kernels sparse
    mode has, and why."""

    model: LanguageModel
    engine: Engine
    coordinator: Coordinator
    masks: MaskedWeights | None
    backend_reason: str


def assemble(config: RunConfig, topology: Topology, probe_batches: Sequence[Batch]) -> Assembly:
    """Build everything (collective).

    Args:
        probe_batches: this rank's part of the probe samples, cut by `probe_parts`.
    """
    section = config.ssd_megatron
    backend, reason = choose_kernels(config, topology)
    model = LanguageModel(section, backend, topology)
    engine = make_engine(model, config, topology)
    probe = ProbeBatch(list(probe_batches), engine.mean_loss, topology)
    tokens = [layer.length for layer in layers_of(section.model)]
    networks = Networks(ffn_names(section.model.total_layers), model.ffns, topology, tokens)
    schedule = Schedule(section.ssd, section.training.train_steps)
    coordinator = Coordinator(section.ssd, networks, engine.state, probe, schedule, section.seed)
    return Assembly(model, engine, coordinator, make_masks(model, engine, section, topology), reason)


def make_masks(
    model: LanguageModel, engine: Engine, section: SsdMegatronConfig, topology: Topology
) -> MaskedWeights | None:
    """Masks as `weight_sparsity` asks for; from here on masked weights are 0 (collective)."""
    settings = section.weight_sparsity
    if settings is None:
        return None
    updates = settings.updates if settings.mask == "dynamic" else 0
    schedule = MaskSchedule(section.training.train_steps, updates, settings.prune_ratio)
    names = masked_tensors(model.logical_parameters())
    return MaskedWeights(settings, names, engine.state, topology, schedule, section.seed)


def masked_tensors(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the matrices of the Transformer blocks: attention and feed-forward networks, without routers."""
    return [
        name
        for name, parameter in parameters.items()
        if name.startswith("blocks.") and parameter.dim() == 2 and not is_router(name)
    ]


def choose_kernels(config: RunConfig, topology: Topology) -> tuple[str, str]:
    """The backend of sparse mode and the reason in words: kernels of our own only if all ranks see that they are right
    on their devices (collective).

    Raises:
        ConfigError: what `ssd.backend` asks for cannot run, or is wrong here.
    """
    section, dtype = config.ssd_megatron, getattr(torch, config.dtype)
    requested = section.ssd.backend
    backend, reason = choose_backend(requested, topology.device, dtype, expert_shape(section.model, section.ssd))
    if requested not in ("auto", *SPECIAL):
        return backend, reason
    lacking = None if backend in SPECIAL else reason
    wrong: str | None = None
    for first in (True, False):  # the first rank of each host compiles what the others load
        if lacking is None and first == (os.environ.get("LOCAL_RANK", "0") == "0"):
            wrong = trial(backend, topology.device, dtype, section.model.activation)
        seen = topology.world.gather_objects("trial of the sparse kernels", (lacking, wrong))
    if lacking is not None:
        return backend, lacking
    failed = next((f"on rank {rank} {why[0] or why[1]}" for rank, why in enumerate(seen) if any(why)), None)
    if failed is None:
        return backend, reason + cpp_build.spent(backend)
    if requested != "auto":
        raise ConfigError(f"ssd.backend ({requested}) fails its trial: {failed}. Use torch")
    return "torch", f"sparse kernels: torch ({backend}, which should be faster, fails its trial: {failed})"


def make_engine(model: LanguageModel, config: RunConfig, topology: Topology) -> Engine:
    """The engine that fits the layout."""
    kind = DataParallelEngine if topology.pipeline.size == 1 else PipelineParallelEngine
    return kind(model, config, topology)


def probe_parts(config: RunConfig, topology: Topology) -> list[range]:
    """Numbers of this rank's probe samples by microbatch: all data-parallel ranks together have them in order, and as
    many microbatches, of which some may be empty."""
    samples, rank, ranks = config.ssd_megatron.ssd.probe_samples, topology.data.rank, topology.data.size
    mine = range(samples * rank // ranks, samples * (rank + 1) // ranks)
    micro, most = config.micro_batch_size, -(-samples // ranks)
    return [mine[start : start + micro] for start in range(0, most, micro)]
