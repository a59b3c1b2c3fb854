"""DeepSpeed's batch arithmetic, train_batch_size = micro batch * accumulation * data parallel size, with `"auto"`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ssd_megatron.config.report import problem
from ssd_megatron.errors import ConfigError

Count = int | Literal["auto"]

MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
# A micro batch of this many tokens keeps the device busy and its activations small.
TOKENS_PER_MICRO_BATCH: dict[str, int] = {"cpu": 8192, "cuda": 16384}


@dataclass(frozen=True)
class Batch:
    """Samples per step over all ranks, per rank and forward pass, and forward passes per step."""

    train: int
    micro: int
    accumulation: int


def check_loss_chunk(chunk: int | None, tokens: int) -> Iterator[str]:
    """Problems of `training.loss_chunk_tokens` with microbatches of so many tokens that have logits."""
    if chunk is not None and chunk >= tokens:
        yield problem(
            "training.loss_chunk_tokens",
            chunk,
            f"has no effect on microbatches with logits of {tokens} tokens: leave it out, or try {max(1, tokens // 8)}",
        )


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, at least 1."""
    return next((d for d in range(min(number, limit), 1, -1) if number % d == 0), 1)


def data_parallel_size(world_size: int, tensor: int, pipeline: int, expert: int) -> int:
    """Ranks that hold the same layers and see different samples.

    Raises:
        ConfigError: the sizes do not fit the number of processes.
    """
    data_parallel, rest = divmod(world_size, tensor * pipeline)
    if rest:
        raise ConfigError(
            f"parallel.tensor_parallel_size ({tensor}) * pipeline_parallel_size ({pipeline}) = {tensor * pipeline} "
            f"must divide the number of processes ({world_size}): start {math.lcm(world_size, tensor * pipeline)}, or "
            "use smaller sizes"
        )
    if data_parallel % expert:
        raise ConfigError(
            f"parallel.expert_parallel_size ({expert}) must divide the data parallel size ({data_parallel} = "
            f"{world_size} processes / {tensor} tensor / {pipeline} pipeline): try {math.gcd(data_parallel, expert)}"
        )
    return data_parallel


def resolve_batch(train: Count, micro: Count, accumulation: Count, data_parallel: int, micro_limit: int) -> Batch:
    """Fill in what is `"auto"`; an automatic micro batch is the largest divisor that is at most `micro_limit`.

    Raises:
        ConfigError: too little is given, or the numbers do not multiply up; the message has the arithmetic.
    """
    if train == "auto":
        if micro == "auto":
            raise ConfigError("train_batch_size is missing: samples per optimizer step over all ranks, such as 32")
        steps = 1 if accumulation == "auto" else accumulation
        return Batch(micro * steps * data_parallel, micro, steps)
    per_rank, rest = divmod(train, data_parallel)
    if rest:
        smaller, larger = per_rank * data_parallel, (per_rank + 1) * data_parallel
        raise ConfigError(
            f"train_batch_size ({train}) must be a multiple of the data parallel size ({data_parallel}, the number of "
            f"processes): try {f'{smaller} or {larger}' if smaller else larger}"
        )
    if micro == "auto" and accumulation == "auto":
        micro = largest_divisor(per_rank, micro_limit)
    elif micro == "auto" and accumulation != "auto":
        micro = max(1, per_rank // accumulation)
    assert micro != "auto"
    steps = max(1, per_rank // micro) if accumulation == "auto" else accumulation
    if micro * steps * data_parallel != train:
        raise ConfigError(
            f"train_batch_size ({train}) must be {MICRO} ({micro}) * {ACCUMULATION} ({steps}) * data parallel size "
            f"({data_parallel}) = {micro * steps * data_parallel}: try train_batch_size "
            f'{micro * steps * data_parallel}, or {MICRO} {largest_divisor(per_rank, micro)}, {ACCUMULATION} "auto"'
        )
    return Batch(train, micro, steps)
