"""The DeepSpeed keys of ds.json that this project accepts; refused.py has those that it refuses by name.

DeepSpeed itself swallows a misspelt top-level key without a word. Meanings and defaults are DeepSpeed's own unless the
description says otherwise. `"auto"` is resolved before DeepSpeed sees it.
"""

from typing import Annotated, Literal

from pydantic import Field

from ssd_megatron.config.fields import NonNegative, Positive, PositiveFloat, Section, optional, refuse, required
from ssd_megatron.config.schema import SsdMegatronConfig

Auto = Literal["auto"]
Size = Annotated[int, Field(ge=1, strict=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class AdamParams(Section):
    """`optimizer.params`."""

    lr: PositiveFloat = required("Peak learning rate.")
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = optional((0.9, 0.999), "Decay of the two moments.")
    eps: PositiveFloat = optional(1e-8, "Added to the root of the second moment.")
    weight_decay: NonNegativeFloat = optional(0.01, "Decay of matrices; norms, biases and routers have none.")
    adam_w_mode: bool = optional(True, "`Adam` only: decay the weights (AdamW, as DeepSpeed does), not the gradient.")
    torch_adam: bool | Auto = optional("auto", "torch's optimizer; `auto`: true, nothing else is accepted.")
    fused: bool | Auto = optional("auto", "torch's fused kernel, on CPU too; `auto`: true.")


class OptimizerKeys(Section):
    """`optimizer`: Adam, whose two moments a switch moves with the neurons."""

    type: Literal["AdamW", "Adam"] = required("Optimizer.")
    params: AdamParams = required("Its parameters.")


class _Warmup(Section):
    warmup_num_steps: Positive = required("Steps of rising learning rate.")
    warmup_type: Literal["log", "linear"] = optional("log", "Form of the rise.")


class WarmupParams(_Warmup):
    """`scheduler.params` of WarmupLR."""

    warmup_min_lr: NonNegativeFloat = optional(0.0, "Learning rate before the first step.")
    warmup_max_lr: PositiveFloat | Auto = optional("auto", "`auto`: `optimizer.params.lr`; nothing else is accepted.")


class WarmupDecayParams(WarmupParams):
    """`scheduler.params` of WarmupDecayLR."""

    total_num_steps: Positive | Auto = optional("auto", "Step at which the rate is 0; `auto`: `training.train_steps`.")


class WarmupCosineParams(_Warmup):
    """`scheduler.params` of WarmupCosineLR."""

    total_num_steps: Positive | Auto = optional("auto", "Last step of the decay; `auto`: `training.train_steps`.")
    warmup_min_ratio: Ratio = optional(0.0, "Share of the peak rate at the first step.")
    cos_min_ratio: Ratio = optional(0.0001, "Share of the peak rate at the end.")


class WSDParams(Section):
    """`scheduler.params` of WSD: linear warm-up, constant, linear decay."""

    warmup_num_steps: Positive = required("Steps of rising learning rate.")
    decay_num_steps: Positive = required("Last steps, of linearly falling learning rate.")
    min_lr_ratio: Ratio = optional(0.0, "Share of the peak rate at the end.")
    total_num_steps: Positive | Auto = optional("auto", "Last step of the decay; `auto`: `training.train_steps`.")


class WarmupLR(Section):
    """DeepSpeed's warm-up, then constant."""

    type: Literal["WarmupLR"] = required("Schedule.")
    params: WarmupParams = required("Its parameters.")


class WarmupDecayLR(Section):
    """DeepSpeed's warm-up, then linear decay to 0."""

    type: Literal["WarmupDecayLR"] = required("Schedule.")
    params: WarmupDecayParams = required("Its parameters.")


class WarmupCosineLR(Section):
    """DeepSpeed's warm-up, then cosine decay."""

    type: Literal["WarmupCosineLR"] = required("Schedule.")
    params: WarmupCosineParams = required("Its parameters.")


class WSD(Section):
    """Warm-up, stable, decay: this project's own schedule."""

    type: Literal["WSD"] = required("Schedule.")
    params: WSDParams = required("Its parameters.")


Scheduler = WarmupLR | WarmupDecayLR | WarmupCosineLR | WSD


class Bf16Keys(Section):
    """`bf16`."""

    enabled: bool | Auto = optional("auto", "bf16 with fp32 masters; `auto`: on CUDA, and on CPUs with fast bf16.")


class Fp16Keys(Section):
    """`fp16`; loss scaling is DeepSpeed's."""

    enabled: bool = optional(False, "fp16 with fp32 masters and loss scaling; bf16 needs no scaling.")
    loss_scale: NonNegativeFloat = optional(0.0, "Fixed loss scale; 0: dynamic.")
    initial_scale_power: NonNegative = optional(16, "Dynamic: it starts at 2 to this power.")
    loss_scale_window: Positive = optional(1000, "Dynamic: steps without overflow after which it doubles.")
    hysteresis: Positive = optional(2, "Dynamic: overflows after which it halves.")
    consecutive_hysteresis: bool = optional(False, "Dynamic: overflows count only in a row.")
    min_loss_scale: Positive = optional(1, "Dynamic: smallest; an overflow there is a bad step.")


_NO_ZERO = {0: "is not supported: use 1, which costs the same on one process", 3: "is not supported yet: use 1 or 2"}


class ZeroKeys(Section):
    """`zero_optimization`: ZeRO 1 or 2 and their tuning keys."""

    stage: Annotated[Literal[1, 2], refuse(_NO_ZERO)] = optional(
        1, "Split optimizer states (1), gradients too (2), over the data parallel ranks."
    )
    contiguous_gradients: bool = optional(True, "Copy gradients into one buffer as they come, where ranks reduce them.")
    reduce_scatter: bool = optional(True, "Reduce gradients to their owners instead of to all ranks.")
    reduce_bucket_size: Size = optional(500_000_000, "Elements reduced at a time.")
    use_multi_rank_bucket_allreduce: bool = optional(True, "One all-reduce for the buckets of several ranks.")
    allgather_bucket_size: Size = optional(500_000_000, "Elements gathered at a time.")
    overlap_comm: bool = optional(False, "Overlap the reduction of gradients with the backward pass.")


class TensorBoardKeys(Section):
    """`tensorboard`."""

    enabled: bool = optional(True, "Write TensorBoard logs (on here, off in DeepSpeed).")
    output_path: str = optional("auto", "Folder; `auto`: `<run_dir>/tensorboard`.")
    job_name: str = optional("", "Folder inside it.")


class CsvKeys(Section):
    """`csv_monitor`."""

    enabled: bool = optional(False, "Write one CSV file per number.")
    output_path: str = optional("auto", "Folder; `auto`: `<run_dir>/csv`.")
    job_name: str = optional("", "Folder inside it.")


class WandbKeys(Section):
    """`wandb`; needs the package wandb."""

    enabled: bool = optional(False, "Log to Weights & Biases.")
    group: str | None = optional(None, "Group of runs.")
    team: str | None = optional(None, "Team.")
    project: str = optional("deepspeed", "Project.")


class CometKeys(Section):
    """`comet`; needs the package comet_ml."""

    enabled: bool = optional(False, "Log to Comet.")
    samples_log_interval: Positive = optional(100, "Samples between two reports.")
    project: str | None = optional(None, "Project.")
    workspace: str | None = optional(None, "Workspace.")
    experiment_name: str | None = optional(None, "Name of the experiment.")
    experiment_key: str | None = optional(None, "Key of the experiment.")
    online: bool | None = optional(None, "Send while running, or keep offline.")
    mode: Literal["get", "create", "get_or_create"] | None = optional(None, "Continue or create an experiment.")


class FlopsProfilerKeys(Section):
    """`flops_profiler`."""

    enabled: bool = optional(False, "Profile one step.")
    recompute_fwd_factor: NonNegativeFloat = optional(0.0, "Share of the forward pass that is recomputed.")
    profile_step: Positive = optional(1, "The step that is profiled.")
    module_depth: Annotated[int, Field(ge=-1)] = optional(-1, "Depth of modules shown; -1: all.")
    top_modules: Positive = optional(1, "Modules listed per depth.")
    detailed: bool = optional(True, "Show the profile of every module.")
    output_file: str | None = optional(None, "File of the profile; null: console.")


class CommsLoggerKeys(Section):
    """`comms_logger`."""

    enabled: bool = optional(False, "Log collectives.")
    prof_all: bool = optional(True, "All of them.")
    prof_ops: Annotated[tuple[str, ...], Field(strict=False)] = optional((), "Or those named.")
    verbose: bool = optional(False, "Each call as it happens.")
    debug: bool = optional(False, "With the calling function.")


class DsJson(Section):
    """The whole file: DeepSpeed's keys and our section."""

    ssd_megatron: SsdMegatronConfig = required("This project's section.")
    train_batch_size: Positive | Auto = optional("auto", "Samples per optimizer step over all ranks.")
    train_micro_batch_size_per_gpu: Positive | Auto = optional("auto", "Samples per rank and forward pass.")
    gradient_accumulation_steps: Positive | Auto = optional("auto", "Forward passes per optimizer step.")
    optimizer: OptimizerKeys = required("Optimizer and peak learning rate.")
    scheduler: Annotated[Scheduler, Field(discriminator="type")] | None = optional(
        None, "Learning rate over the steps; without it the rate is constant."
    )
    bf16: Bf16Keys = optional(Bf16Keys(), "Precision.")
    fp16: Fp16Keys = optional(Fp16Keys(), "Another precision.")
    zero_optimization: ZeroKeys = optional(ZeroKeys(), "ZeRO.")
    gradient_clipping: NonNegativeFloat = optional(1.0, "Largest global gradient norm; 0: no clipping.")
    communication_data_type: Annotated[
        Literal["bf16", "fp32"] | None, refuse({"fp16": "overflows without loss scaling: use bf16 or fp32"})
    ] = optional(None, "Type in which gradients are reduced; null: that of the parameters.")
    tensorboard: TensorBoardKeys = optional(TensorBoardKeys(), "TensorBoard monitor.")
    csv_monitor: CsvKeys = optional(CsvKeys(), "CSV monitor.")
    wandb: WandbKeys = optional(WandbKeys(), "Weights & Biases monitor.")
    comet: CometKeys = optional(CometKeys(), "Comet monitor.")
    steps_per_print: Positive | None = optional(None, "Steps between DeepSpeed's own lines; null: none.")
    wall_clock_breakdown: bool = optional(False, "DeepSpeed's timers of forward, backward and step.")
    memory_breakdown: bool = optional(False, "DeepSpeed's lines on device memory.")
    flops_profiler: FlopsProfilerKeys = optional(FlopsProfilerKeys(), "DeepSpeed's FLOPs profiler.")
    comms_logger: CommsLoggerKeys = optional(CommsLoggerKeys(), "DeepSpeed's log of collectives.")
    dump_state: bool = optional(False, "DeepSpeed prints its state after the start.")
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = optional(
        None, "Level of DeepSpeed's own log."
    )
