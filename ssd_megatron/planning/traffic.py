"""What a rank sends in one optimizer step, by group and collective.

Sent bytes of ring algorithms over n ranks (Patarasuk and Yuan, 2009): an all-reduce of S bytes sends 2 (n-1)/n S from
each rank, an all-gather or reduce-scatter whose whole has S bytes (n-1)/n S.

Left out, being small: gradient norms, numbers that ranks agree on, expert numbers that travel with tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ssd_megatron.config.load import Dtype
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.model.cost import bank_parameters, ffn_matrices, position_rows, stage_layers
from ssd_megatron.model.memory import BYTES, Layout, expert_ranks_per_token, rank_parameters
from ssd_megatron.planning.cluster import Cluster

GroupName = Literal["tensor", "pipeline", "expert", "data", "expert_data", "embedding"]
Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send"]


@dataclass(frozen=True)
class Transfer:
    """What one rank sends for one purpose.

    Attributes:
        sent: bytes at a time.
        times: how often in a step: in every microbatch, or once.
    """

    group: GroupName
    what: str
    collective: Collective
    sent: float
    times: int

    @property
    def step_bytes(self) -> float:
        return self.sent * self.times


def group_of(layout: Layout, name: GroupName) -> tuple[int, int]:
    """Number of ranks of a group, and the distance between their numbers."""
    tp, stage = layout.tensor, layout.tensor * layout.data
    return {
        "tensor": (tp, 1),
        "expert": (layout.expert, tp),
        "data": (layout.data, tp),
        "expert_data": (layout.data // layout.expert, tp * layout.expert),
        "pipeline": (layout.pipeline, stage),
        "embedding": (2, stage * (layout.pipeline - 1)),
    }[name]


def seconds(transfer: Transfer, layout: Layout, cluster: Cluster) -> float:
    """Time of one occurrence."""
    size, stride = group_of(layout, transfer.group)
    if transfer.collective == "send":
        return cluster.send_seconds(transfer.sent, stride)
    if transfer.collective == "all-to-all":
        return cluster.exchange_seconds(transfer.sent, size, stride)
    return cluster.ring_seconds(transfer.sent, size, stride)


def off_node(transfer: Transfer, layout: Layout, cluster: Cluster) -> float:
    """Bytes of one occurrence that leave the node, per rank."""
    size, stride = group_of(layout, transfer.group)
    if transfer.collective == "send":
        return transfer.sent if stride >= cluster.gpus_per_node else 0.0
    return cluster.off_node(transfer.sent, size, stride, ring=transfer.collective != "all-to-all")


def step_traffic(
    model: ModelConfig, ssd: SSDConfig, layout: Layout, stage: int, mode: str, dtype: Dtype, *, multi_rank: bool = True
) -> list[Transfer]:
    """Everything that a rank of one stage sends in one step, empty transfers left out.

    Args:
        multi_rank: `zero_optimization.use_multi_rank_bucket_allreduce`.
    """
    transfers = [
        *_tensor(model, ssd, layout, stage, mode, BYTES[dtype]),
        *_expert(model, ssd, layout, stage, mode, BYTES[dtype]),
        *_pipeline(model, layout, stage, BYTES[dtype]),
        *_zero(model, ssd, layout, stage, BYTES[dtype], multi_rank),
    ]
    return [transfer for transfer in transfers if transfer.sent]


def all_reduce(payload: float, ranks: int) -> float:
    """Bytes that each of n ranks sends for the sum of `payload` bytes."""
    return 2 * (ranks - 1) / ranks * payload


def all_gather(whole: float, ranks: int) -> float:
    """Bytes that each of n ranks sends until all have `whole` bytes; a reduce-scatter of `whole` sends the same."""
    return (ranks - 1) / ranks * whole


def _layer_tokens(model: ModelConfig, layout: Layout, stage: int) -> int:
    """Tokens of a microbatch, counted once for each of the stage's layers that they go through."""
    return layout.micro_batch_size * sum(layer.length for layer in stage_layers(model, layout.pipeline, stage))


def _tensor(model: ModelConfig, ssd: SSDConfig, layout: Layout, stage: int, mode: str, size: int) -> Iterator[Transfer]:
    """Megatron's all-reduces of [T, h]: after attention and feed-forward network in forward, before them in backward
    (arXiv 1909.08053); recomputation repeats the attention's, and ends before the other. Attention to an encoder has
    one more of each, and in backward one of the encoder's tokens."""
    samples, ranks = layout.micro_batch_size, layout.tensor
    row = model.hidden_size * size
    times, repeated = layout.microbatches, int(layout.recompute)

    def transfer(what: str, payload: float) -> Transfer:
        return Transfer("tensor", what, "all-reduce", all_reduce(payload, ranks), times)

    tokens = (4 + repeated) * _layer_tokens(model, layout, stage)
    for layer in stage_layers(model, layout.pipeline, stage):
        if layer.context:
            tokens += samples * ((2 + repeated) * layer.length + layer.context)
    yield transfer("layers", tokens * row)
    if mode == "sparse" and ssd.router_learns:
        tiles = _layer_tokens(model, layout, stage) / ssd.routing_granularity
        yield transfer("gate gradients", tiles * ssd.top_k * 4)
    if stage == 0:
        yield transfer("embedding", samples * model.sample_tokens * row)
    if stage == layout.pipeline - 1:
        # In fp32 for each token: the largest logit, the label's logit, the sum of exponentials.
        yield transfer("head and loss", samples * model.predicted_tokens * (row + 3 * 4))


def _expert(model: ModelConfig, ssd: SSDConfig, layout: Layout, stage: int, mode: str, size: int) -> Iterator[Transfer]:
    layers, times, ranks = model.total_layers // layout.pipeline, layout.microbatches, layout.expert
    if ranks == 1:
        return
    if mode == "dense":
        whole = layers * bank_parameters(model) / layout.tensor * size
        weights = layers * ffn_matrices(model) * model.hidden_size * model.ffn_hidden_size / layout.tensor * size
        # Forward needs all, backward (or the recomputed forward) the matrices again, unless they were kept.
        again = 0.0 if layout.gather_once else whole if layout.recompute else weights
        times = 1 if layout.gather_once else times
        yield Transfer("expert", "weights", "all-gather", all_gather(whole + again, ranks), times)
        yield Transfer("expert", "weight gradients", "reduce-scatter", all_gather(whole, ranks), times)
        return
    # Evenly routed tokens go to their own rank as often as to any other, which costs nothing.
    tokens = _layer_tokens(model, layout, stage)
    rows = tokens * expert_ranks_per_token(ssd, layout) * (ranks - 1) / ranks
    # There and back, in forward and in backward; recomputation sends them there once more.
    trips = 5 if layout.recompute else 4
    yield Transfer("expert", "tokens", "all-to-all", trips * rows * model.hidden_size * size, times)
    # Expert numbers there (int64), and gates that scale (fp32); gate gradients back (fp32).
    forth = 2 if layout.recompute else 1
    ids = forth * 8
    gates = (4 if ssd.router_learns else 0) + (forth * 4 if ssd.router == "switch" else 0)
    yield Transfer("expert", "routing", "all-to-all", rows * ssd.top_k * (ids + gates), times)


def _pipeline(model: ModelConfig, layout: Layout, stage: int, size: int) -> Iterator[Transfer]:
    """DeepSpeed's PipelineEngine: each tensor-parallel rank sends its part of activations and gradients, and the
    receivers gather the parts. For the backward they also gather their outputs again."""
    rows = layout.micro_batch_size * (model.sample_tokens + position_rows(model))
    row, times = rows * model.hidden_size * size, layout.microbatches
    first, last = stage == 0, stage == layout.pipeline - 1
    if not last:
        yield Transfer("pipeline", "activations", "send", row / layout.tensor, times)
    if not first:
        yield Transfer("pipeline", "gradients", "send", row / layout.tensor, times)
    gathered = (0 if first else 1) + (0 if last else 2)
    yield Transfer("tensor", "stage inputs", "all-gather", gathered * all_gather(row, layout.tensor), times)
    if model.tie_embeddings and layout.pipeline > 1 and stage in (0, layout.pipeline - 1):
        word = model.padded_vocab_size // layout.tensor * model.hidden_size * size
        yield Transfer("embedding", "tied embedding", "all-reduce", all_reduce(word, 2), 1)


def _zero(
    model: ModelConfig, ssd: SSDConfig, layout: Layout, stage: int, size: int, multi_rank: bool
) -> Iterator[Transfer]:
    """DeepSpeed's ZeRO 1 and 2: gradients once a step (stage 1) or in every microbatch (stage 2), by all-reduces of
    whole buckets, or by one reduction to each owner, which sends half as much; then updated parameters once."""
    parameters = rank_parameters(model, ssd, layout, stage)
    times = layout.microbatches if layout.zero_stage == 2 else 1
    parts: tuple[tuple[GroupName, str, int], ...] = (
        ("data", "", parameters.plain),
        ("expert_data", " (banks)", parameters.bank),
    )
    for group, suffix, count in parts:
        ranks, _ = group_of(layout, group)
        sent = (all_reduce if multi_rank else all_gather)(count * size, ranks)
        yield Transfer(group, f"gradients{suffix}", "all-reduce" if multi_rank else "reduce-scatter", sent, times)
        yield Transfer(group, f"parameters{suffix}", "all-gather", all_gather(count * size, ranks), 1)
