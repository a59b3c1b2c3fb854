"""How long a step takes: arithmetic at a fraction of the peak, communication at the speed of links, none of
it hidden behind the other (DeepSpeed overlaps nothing by default), latencies left out."""

from dataclasses import dataclass

from ssd_megatron.config.load import Dtype
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.model.cost import ffn_matrices, forward_flops, head_flops, stage_layers
from ssd_megatron.model.memory import BYTES, Layout, rank_parameters
from ssd_megatron.planning.cluster import GIGA, Cluster
from ssd_megatron.planning.traffic import Transfer, seconds, step_traffic

# A row of every token copy is read or written this often beside the matrix products (ffn/kernels/torch_bmm.py):
# gathered (read, written) for x forward and backward and for dy, and read once each for the sums that make y and dx.
ROW_PASSES = 8
# Bytes of memory traffic for each parameter in the update: gradient read and written in fp32 (8), master and moments
# read and written (24), the new parameter (2).
UPDATE_TRAFFIC = 34


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what they go into; `bubble` is waiting for the first microbatch to arrive and
    the last to come back."""

    compute: float
    tensor: float
    expert: float
    pipeline: float
    data: float
    bubble: float
    update: float

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


def step_time(
    model: ModelConfig,
    ssd: SSDConfig,
    layout: Layout,
    mode: str,
    cluster: Cluster,
    dtype: Dtype,
    *,
    multi_rank: bool = True,
) -> StepTime:
    """Of the whole job: the slowest stage sets the pace of 1F1B, bubble (PP - 1) times what it needs for a microbatch
    (GPipe, arXiv 1811.06965; PipeDream-flush, arXiv 2006.09503). What it does once a step, it does in the first or the
    last microbatch, and the other stages wait for that too."""
    stages = []
    for stage in range(layout.pipeline):
        traffic = step_traffic(model, ssd, layout, stage, mode, dtype, multi_rank=multi_rank)
        spent = {name: 0.0 for name in ("tensor", "expert", "pipeline", "data")}
        microbatch = microbatch_compute(model, ssd, layout, stage, mode, cluster, dtype)
        compute = layout.microbatches * microbatch
        for transfer in traffic:
            once, part = seconds(transfer, layout, cluster), _spent_on(transfer)
            spent[part] += once * transfer.times
            microbatch += once if part != "data" else 0.0
        stages.append({"compute": compute, "microbatch": microbatch, **spent})
    slowest = max(stages, key=lambda stage: stage["compute"] + stage["tensor"] + stage["expert"] + stage["pipeline"])
    return StepTime(
        compute=slowest["compute"],
        tensor=slowest["tensor"],
        expert=slowest["expert"],
        pipeline=slowest["pipeline"],
        data=max(stage["data"] for stage in stages),
        bubble=slowest["microbatch"] * (layout.pipeline - 1),
        update=max(
            rank_parameters(model, ssd, layout, stage).owned(layout) * UPDATE_TRAFFIC / (cluster.gpu.memory_gbs * GIGA)
            for stage in range(layout.pipeline)
        ),
    )


def microbatch_compute(
    model: ModelConfig, ssd: SSDConfig, layout: Layout, stage: int, mode: str, cluster: Cluster, dtype: Dtype
) -> float:
    """Seconds of arithmetic of one stage for one microbatch: backward is twice forward and left out of routers that
    learn nothing, recomputation one more, of layers and, where the loss keeps no logits, of the head."""
    samples, rate = layout.micro_batch_size, cluster.flops_per_second * layout.tensor
    passes, seconds = 4 if layout.recompute else 3, 0.0
    router_passes = passes if ssd.router_learns else passes - 2
    for layer in stage_layers(model, layout.pipeline, stage):
        flops = forward_flops(model, ssd, layer)
        token = passes * flops.attention / rate
        if mode == "dense":
            token += passes * flops.ffn / rate
        else:
            token += router_passes * flops.router / cluster.flops_per_second
            token += passes * sparse_ffn_seconds(model, ssd, layout, cluster, dtype, layer.length)
        seconds += layer.length * token
    repeated = 3 if layout.loss_chunk_tokens is None else 4
    head = repeated * head_flops(model) / rate if stage == layout.pipeline - 1 else 0.0
    return samples * (seconds + model.predicted_tokens * head)


def sparse_ffn_seconds(
    model: ModelConfig, ssd: SSDConfig, layout: Layout, cluster: Cluster, dtype: Dtype, length: int
) -> float:
    """Seconds of a sparse feed-forward network's forward pass for one of `length` tokens of a sample, a third of
    forward and backward.

    The products over one expert's m tokens have 1 / (1/n + 1/h + 1/m) FLOPs per byte in bf16; below the GPU's balance
    of peak to memory speed they wait for memory (roofline, Williams et al. 2009). Then rows are moved.
    """
    size, share = BYTES[dtype], ssd.top_k / ssd.num_experts
    tokens = layout.micro_batch_size * length * layout.expert * share
    neurons = model.ffn_hidden_size / ssd.num_experts
    intensity = 2 / size / (1 / neurons + 1 / model.hidden_size + 1 / tokens)
    memory = cluster.gpu.memory_gbs * GIGA
    products = 2 * ffn_matrices(model) * model.hidden_size * model.ffn_hidden_size * share / layout.tensor
    rows = ROW_PASSES / 3 * ssd.top_k / layout.tensor * model.hidden_size * size
    return max(products / cluster.flops_per_second, products / intensity / memory) + rows / memory


def _spent_on(transfer: Transfer) -> str:
    if transfer.group in ("tensor", "expert", "pipeline"):
        return transfer.group
    return "data"
