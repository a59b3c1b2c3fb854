"""Plans: what a layout needs and how fast it is, and which layouts to take."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ssd_megatron.config.load import Dtype
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig, SsdMegatronConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.model.cost import flops_per_token
from ssd_megatron.model.memory import Layout, Memory, memory_per_rank, modes_of
from ssd_megatron.planning.cluster import GIB, TERA, Cluster
from ssd_megatron.planning.switches import SwitchTime, switch_time
from ssd_megatron.planning.times import StepTime, step_time
from ssd_megatron.planning.traffic import Transfer, step_traffic

# More tokens in a microbatch make no matrix product faster, only activations larger.
MOST_TOKENS_PER_MICROBATCH = 16384


@dataclass(frozen=True)
class Job:
    """What is trained where.

    Attributes:
        batch: samples of one optimizer step over all ranks.
        reduce_bucket_size, multi_rank: of `zero_optimization`: elements of the gradient buffer; whether gradients are
            reduced by all-reduces of whole buckets.
    """

    config: SsdMegatronConfig
    cluster: Cluster
    batch: int
    dtype: Dtype
    reduce_bucket_size: int
    multi_rank: bool

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def ssd(self) -> SSDConfig:
        return self.config.ssd

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch * self.model.sample_tokens


@dataclass(frozen=True)
class Plan:
    """One layout of a job.

    Attributes:
        memory: of the rank that needs most.
        seconds: of one step, by mode.
        traffic: what the busiest rank sends in one step, by mode.
        switch: to sparse; None for runs without one.
        mean_seconds: of a step, over the run's dense and sparse steps.
        mfu: share of the GPUs' peak that the dense model's FLOPs take, in a dense step.
    """

    layout: Layout
    memory: Memory
    fits: bool
    seconds: dict[str, StepTime]
    traffic: dict[str, list[Transfer]]
    switch: SwitchTime | None
    mean_seconds: float
    mfu: float | None


def plan(job: Job, layout: Layout) -> Plan:
    """Predict one layout."""
    return _predict(job, layout, _memory(job, layout))


def _memory(job: Job, layout: Layout) -> Memory:
    return memory_per_rank(job.model, job.ssd, layout, dtype=job.dtype, reduce_bucket_size=job.reduce_bucket_size)


def _predict(job: Job, layout: Layout, memory: Memory) -> Plan:
    model, ssd, cluster = job.model, job.ssd, job.cluster
    modes = modes_of(ssd)
    seconds = {
        mode: step_time(model, ssd, layout, mode, cluster, job.dtype, multi_rank=job.multi_rank) for mode in modes
    }
    sparse = sparse_share(job.config)
    mean = sum(time.total * (sparse if mode == "sparse" else 1 - sparse) for mode, time in seconds.items())
    mfu = None
    if "dense" in seconds:
        peak = cluster.gpus * cluster.gpu.peak_tflops * TERA
        mfu = flops_per_token(model, ssd).dense * job.tokens / (seconds["dense"].total * peak)
    return Plan(
        layout=layout,
        memory=memory,
        fits=memory.total <= cluster.usable_bytes,
        seconds=seconds,
        traffic={mode: busiest_traffic(job, layout, mode) for mode in modes},
        switch=switch_time(model, ssd, layout, cluster, job.dtype) if "sparse" in modes else None,
        mean_seconds=mean,
        mfu=mfu,
    )


def recommend(job: Job) -> list[Plan]:
    """The best plan of all TP, PP and EP that fit, fastest first; of those equally fast to three digits, the one with
    the largest microbatches (latencies, which are left out, favour them), then the one with most memory left.

    Raises:
        ConfigError: no layout fits; the message has the smallest.
    """
    needed = [(layout, _memory(job, layout)) for layout in layouts(job)]
    plans = [_predict(job, *one) for one in needed if one[1].total <= job.cluster.usable_bytes]
    if not plans:
        raise ConfigError(_nothing_fits(job, needed))
    best: dict[tuple[int, int, int], Plan] = {}
    for p in sorted(plans, key=_order):
        best.setdefault((p.layout.tensor, p.layout.pipeline, p.layout.expert), p)
    return list(best.values())


def _order(p: Plan) -> tuple[float, int, int]:
    return float(f"{p.mean_seconds:.3g}"), -p.layout.micro_batch_size, p.memory.total


def _nothing_fits(job: Job, needed: list[tuple[Layout, Memory]]) -> str:
    if not needed:
        return (
            f"no layout of {job.cluster.gpus} GPUs divides train_batch_size ({job.batch}) and the model: try "
            f"train_batch_size {math.lcm(job.batch, job.cluster.gpus)}"
        )
    layout, memory = min(needed, key=lambda one: one[1].total)
    sizes = f"tensor {layout.tensor}, pipeline {layout.pipeline}, expert {layout.expert}"
    return (
        f"no layout fits into the {job.cluster.usable_bytes / GIB:.1f} GiB that can be used of each GPU: the smallest "
        f"({sizes}) needs {memory.total / GIB:.1f} GiB: use more GPUs"
    )


def layouts(job: Job) -> Iterator[Layout]:
    """Every layout that the model, the experts and the batch can be cut into, tensor parallel within a node only."""
    model, ssd, gpus = job.model, job.ssd, job.cluster.gpus
    for tensor in divisors(min(gpus, job.cluster.gpus_per_node)):
        splits = (model.num_attention_heads, model.num_query_groups, model.padded_vocab_size, ssd.num_experts, gpus)
        if any(size % tensor for size in splits):
            continue
        for pipeline in divisors(gpus // tensor):
            data = gpus // tensor // pipeline
            if model.total_layers % pipeline or job.batch % data:
                continue
            for expert in divisors(data):
                if ssd.num_experts % (tensor * expert) == 0:
                    yield from _batches(job, tensor, pipeline, expert, data)


def _batches(job: Job, tensor: int, pipeline: int, expert: int, data: int) -> Iterator[Layout]:
    samples = job.batch // data
    for micro in divisors(samples):
        microbatches = samples // micro
        # With fewer microbatches than stages, some stage would never work.
        if (micro > 1 and micro * job.model.sample_tokens > MOST_TOKENS_PER_MICROBATCH) or microbatches < pipeline:
            continue
        for zero_stage in (1, 2) if pipeline == 1 else (1,):
            can_keep = expert > 1 and zero_stage == 1 and "dense" in modes_of(job.ssd)
            for recompute, gather_once in itertools.product((False, True), (False, True) if can_keep else (False,)):
                sizes = (tensor, pipeline, expert, data, micro, microbatches, zero_stage)
                yield Layout(*sizes, recompute, gather_once, masked=job.config.weight_sparsity is not None)


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def busiest_traffic(job: Job, layout: Layout, mode: str) -> list[Transfer]:
    """What the rank sends that sends most."""
    stages = [
        step_traffic(job.model, job.ssd, layout, stage, mode, job.dtype, multi_rank=job.multi_rank)
        for stage in range(layout.pipeline)
    ]
    return max(stages, key=lambda transfers: sum(transfer.step_bytes for transfer in transfers))


def sparse_share(config: SsdMegatronConfig) -> float:
    """Share of sparse steps in all steps: as scheduled, or as the adaptive schedule aims for."""
    ssd, steps = config.ssd, config.training.train_steps
    if ssd.schedule == "adaptive":
        return ssd.sparse_fraction
    if ssd.schedule != "fixed" or ssd.phases is None:
        return 1.0 if ssd.schedule == "sparse" else 0.0
    ends = [*(phase.start_step - 1 for phase in ssd.phases[1:]), steps]
    sparse = sum(
        min(end, steps) - phase.start_step + 1
        for phase, end in zip(ssd.phases, ends, strict=True)
        if phase.mode == "sparse" and phase.start_step <= steps
    )
    return sparse / steps
