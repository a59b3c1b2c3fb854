"""How long a switch to sparse takes and what it moves; back to dense nothing moves."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ssd_megatron.config.load import Dtype
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.model.cost import (
    ffn_matrices,
    forward_flops,
    head_flops,
    head_matrices,
    layers_of,
    qkv_size,
    query_size,
    small_embeddings,
    stage_layers,
)
from ssd_megatron.model.memory import OPTIMIZER_BYTES, Layout
from ssd_megatron.planning.cluster import Cluster
from ssd_megatron.planning.traffic import all_gather, seconds, step_traffic
from ssd_megatron.switching.allocation import MOST_MEASURED

# Fresh balanced k-means on a CPU: 6.1 s for 16,384 neurons of 4,096 into 64 experts (docs/log.md, 2 cores).
KMEANS_SECONDS = 6.1 / (16384 * 4096 * 64)


@dataclass(frozen=True)
class SwitchTime:
    """Seconds of a switch to sparse: making experts, moving neurons, probe losses."""

    clustering: float
    transfer: float
    probe: float
    bytes_moved: float  # sent by each rank

    @property
    def total(self) -> float:
        return self.clustering + self.transfer + self.probe


def switch_time(model: ModelConfig, ssd: SSDConfig, layout: Layout, cluster: Cluster, dtype: Dtype) -> SwitchTime:
    """A switch to sparse with k-means.

    The ranks of a stage take its layers in turns: each gets the fp32 rows of one layer from the layer's homes and
    clusters them. Masters and moments of all banks go to their neurons' new homes, and parameters are gathered again.
    """
    stage_ranks, copies = layout.tensor * layout.data, layout.data // layout.expert
    layers = model.total_layers // layout.pipeline
    rows = math.ceil(layers / copies) * model.ffn_hidden_size * model.hidden_size * 4
    one = KMEANS_SECONDS * model.ffn_hidden_size * model.hidden_size * ssd.num_experts
    gather = cluster.ring_seconds(all_gather(rows, layout.homes), layout.homes, 1)

    moved = bytes_moved(model, layout) / stage_ranks
    publish = [t for t in step_traffic(model, ssd, layout, 0, "dense", dtype) if t.what.startswith("parameters")]
    return SwitchTime(
        clustering=math.ceil(layers / stage_ranks) * one + gather,
        transfer=cluster.exchange_seconds(moved, stage_ranks, 1) + sum(seconds(t, layout, cluster) for t in publish),
        probe=probe_seconds(model, ssd, layout, cluster),
        bytes_moved=moved,
    )


def bytes_moved(model: ModelConfig, layout: Layout) -> float:
    """Bytes of masters and moments that cross between the ranks of a stage when its neurons are grouped anew.

    A neuron's new place is as likely to be any rank's as that rank's share of the matrix. ZeRO cuts a line of matrices
    into equal parts, so that a rank has whole matrices of few layers rather than a part of every one: with one home,
    most neurons stay where they are.
    """
    size = model.hidden_size * model.ffn_hidden_size / layout.homes
    part = sum(length for length, _ in _line(model, layout)) / (layout.data // layout.expert)
    moved = start = 0.0
    for length, is_bank in _line(model, layout):
        if is_bank:
            moved += size * layout.homes * (1 - _same_part(start, length, part) / layout.homes)
        start += length
    return moved * OPTIMIZER_BYTES


def _line(model: ModelConfig, layout: Layout) -> Iterator[tuple[float, bool]]:
    """Sizes of the matrices on one rank of the first stage as ZeRO lays them out, and whether they are a bank's.

    With expert parallelism banks have a line of their own.
    """
    h, tp, alone = model.hidden_size, layout.tensor, layout.expert > 1
    if not alone:
        yield model.padded_vocab_size * h / tp, False
        yield small_embeddings(model), False
    for layer in stage_layers(model, layout.pipeline, 0):
        if not alone:
            cross = 4 * query_size(model) if layer.context else 0
            yield (query_size(model) + qkv_size(model) + cross) * h / tp, False
        for _ in range(ffn_matrices(model)):
            yield h * model.ffn_hidden_size / layout.homes, True
    if not alone and layout.pipeline == 1 and not model.tie_embeddings:
        yield model.padded_vocab_size * h / tp, False
    if not alone and layout.pipeline == 1:
        yield head_matrices(model), False


def _same_part(start: float, length: float, part: float) -> float:
    """Chance that two random elements of [start, start + length) lie in the same of equal parts of a line."""
    chance, position = 0.0, start
    while position < start + length - 1e-6 * part:
        end = min(start + length, (math.floor(position / part + 1e-9) + 1) * part)
        chance += ((end - position) / length) ** 2
        position = end
    return chance


def probe_seconds(model: ModelConfig, ssd: SSDConfig, layout: Layout, cluster: Cluster) -> float:
    """Forward passes of the probe batch, spread over the data-parallel ranks: dense before and after the switch, sparse
    after it, and with top_k_allocation measured, one for each layer (of deep models,
    run of layers) and number of experts 2, 4, 8 ... tried."""
    passes = 3
    if ssd.top_k_allocation == "measured":
        passes += 1 + min(model.total_layers, MOST_MEASURED) * max(0, math.ceil(math.log2(ssd.num_experts)) - 1)
    forward = float(model.predicted_tokens * head_flops(model))
    for layer in layers_of(model):
        flops = forward_flops(model, ssd, layer)
        forward += layer.length * (flops.attention + flops.ffn)
    samples = math.ceil(ssd.probe_samples / layout.data)
    return passes * samples * forward / (cluster.flops_per_second * layout.tensor)
