"""What the sizes of a layout (`parallel`) and ZeRO's settings must be to the model and to each other."""

import math
from collections.abc import Iterator

from ssd_megatron.config.check_list import CheckList, divisors_near
from ssd_megatron.config.report import problem
from ssd_megatron.config.schema import HASH_ROUTERS

LAYOUT_CHECKS = CheckList()


@LAYOUT_CHECKS("parallel.tensor_parallel_size", "model.num_attention_heads", "model.num_query_groups")
def _heads_by_tensor(tensor: int, heads: int, groups: int) -> Iterator[str]:
    for name, value in (("num_attention_heads", heads), ("num_query_groups", groups)):
        if value % tensor:
            hint = divisors_near(value, tensor)
            yield problem("parallel.tensor_parallel_size", tensor, f"must divide model.{name} ({value}): try {hint}")
            return


@LAYOUT_CHECKS("parallel.tensor_parallel_size", "model.vocab_size", "model.make_vocab_size_divisible_by")
def _vocabulary_by_tensor(tensor: int, vocab_size: int, multiple: int) -> Iterator[str]:
    padded = math.ceil(vocab_size / multiple) * multiple
    if padded % tensor:
        yield problem(
            "parallel.tensor_parallel_size",
            tensor,
            f"must divide the padded vocabulary ({padded}): try model.make_vocab_size_divisible_by "
            f"{math.lcm(multiple, tensor)}",
        )


@LAYOUT_CHECKS("parallel.pipeline_parallel_size", "model.family", "model.num_layers", "model.num_decoder_layers")
def _layers_by_pipeline(stages: int, family: str, layers: int, decoder_layers: int) -> Iterator[str]:
    total, what = layers, "model.num_layers"
    if family == "t5":
        total, what = layers + decoder_layers, "model.num_layers + model.num_decoder_layers"
    if total % stages:
        hint = divisors_near(total, stages)
        yield problem("parallel.pipeline_parallel_size", stages, f"must divide {what} ({total}): try {hint}")


@LAYOUT_CHECKS("parallel.tensor_parallel_size", "parallel.expert_parallel_size", "ssd.num_experts")
def _experts_by_homes(tensor: int, expert: int, num_experts: int) -> Iterator[str]:
    if num_experts % (tensor * expert):
        hint = divisors_near(num_experts // math.gcd(num_experts, tensor), expert)
        yield problem(
            "parallel.expert_parallel_size",
            expert,
            f"* parallel.tensor_parallel_size ({tensor}) must divide ssd.num_experts ({num_experts}): try "
            f"expert_parallel_size {hint}, or num_experts {math.lcm(num_experts, tensor * expert)}",
        )


@LAYOUT_CHECKS(
    "weight_sparsity.block_size",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "parallel.tensor_parallel_size",
    "parallel.expert_parallel_size",
)
def _blocks_by_shards(
    size: int, hidden: int, neurons: int, heads: int, groups: int, channels: int | None, tensor: int, expert: int
) -> Iterator[str]:
    """A block lies on one rank."""
    head = channels or hidden // heads
    queries, keys = heads * head, (heads + 2 * groups) * head
    matrices = {
        f"model.hidden_size ({hidden})": (hidden, 1 if channels else tensor),
        f"outputs for queries ({queries})": (queries, tensor),
        f"outputs for queries, keys and values ({keys})": (keys, tensor),
        f"model.ffn_hidden_size ({neurons})": (neurons, tensor * expert),
    }
    fits = [b for b in (8, 4, 1) if all(rows % (b * ranks) == 0 for rows, ranks in matrices.values())]
    for what, (rows, ranks) in matrices.items():
        if size > 1 and rows % (size * ranks):
            where = f" on each of {ranks} ranks" if rows % size == 0 else ""
            yield problem("weight_sparsity.block_size", size, f"must divide the {what}{where}: try {fits[0]}")
            return


@LAYOUT_CHECKS("ssd.router", "parallel.pipeline_parallel_size")
def _hashes_by_pipeline(router: str, stages: int) -> Iterator[str]:
    if stages > 1 and router in HASH_ROUTERS:
        yield problem(
            "parallel.pipeline_parallel_size",
            stages,
            f'does not work with ssd.router "{router}": only the first stage knows the token ids; use 1',
        )


@LAYOUT_CHECKS("parallel.pipeline_parallel_size", "zero_optimization.stage")
def _zero_with_pipeline(stages: int, stage: int) -> Iterator[str]:
    if stages > 1 and stage != 1:
        yield problem(
            "zero_optimization.stage", stage, f"does not work with pipeline_parallel_size ({stages}): use stage 1"
        )


@LAYOUT_CHECKS("parallel.dense_gather", "zero_optimization.stage")
def _zero_with_kept_weights(dense_gather: str, stage: int) -> Iterator[str]:
    if dense_gather == "step" and stage != 1:
        yield problem(
            "zero_optimization.stage",
            stage,
            'reduces gradients per microbatch; parallel.dense_gather "step" needs 1',
        )


@LAYOUT_CHECKS("parallel.dense_gather", "parallel.expert_parallel_size", "ssd.schedule")
def _gather_without_effect(dense_gather: str, expert: int, schedule: str) -> Iterator[str]:
    if dense_gather == "step" and (expert == 1 or schedule == "sparse"):
        other = f'ssd.schedule "{schedule}"' if expert > 1 else "expert_parallel_size 1"
        yield problem("parallel.dense_gather", dense_gather, f"has no effect with {other}: leave it out")


@LAYOUT_CHECKS("ssd.rebalance_limit", "parallel.tensor_parallel_size", "parallel.expert_parallel_size")
def _rebalance_without_effect(limit: float | None, tensor: int, expert: int) -> Iterator[str]:
    if limit is not None and tensor * expert == 1:
        yield problem(
            "ssd.rebalance_limit",
            limit,
            "has no effect with tensor_parallel_size 1 and expert_parallel_size 1, where one rank has all experts: "
            "leave it out",
        )


@LAYOUT_CHECKS("zero_optimization.overlap_comm", "parallel.pipeline_parallel_size")
def _overlap_with_pipeline(overlap: bool, stages: int) -> Iterator[str]:
    if overlap and stages > 1:
        yield problem(
            "zero_optimization.overlap_comm",
            overlap,
            f"has no effect with pipeline_parallel_size ({stages}), where DeepSpeed switches it off: leave it out",
        )


@LAYOUT_CHECKS(
    "parallel.expert_parallel_size",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.reduce_scatter",
)
def _zero_with_experts(expert: int, contiguous: bool, scatter: bool) -> Iterator[str]:
    for name, value in (("contiguous_gradients", contiguous), ("reduce_scatter", scatter)):
        if expert > 1 and not value:
            yield problem(f"zero_optimization.{name}", value, f"must be true with expert_parallel_size ({expert})")


@LAYOUT_CHECKS("zero_optimization.allgather_bucket_size")
def _allgather_bucket(size: int) -> Iterator[str]:
    if size % 2:
        yield problem("zero_optimization.allgather_bucket_size", size, f"must be even: try {size + 1}")
