"""Loads ds.json: reads, overrides, checks, resolves `"auto"`. Nothing here needs torch or a process group."""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssd_megatron.config.batch import (
    ACCUMULATION,
    MICRO,
    TOKENS_PER_MICRO_BATCH,
    Batch,
    check_loss_chunk,
    data_parallel_size,
    resolve_batch,
)
from ssd_megatron.config.checks import run_checks, without_effect
from ssd_megatron.config.deepspeed_keys import CsvKeys, DsJson, TensorBoardKeys, WSDParams
from ssd_megatron.config.expansion import expand_networks
from ssd_megatron.config.model import SPARSE_ACTIVATIONS
from ssd_megatron.config.refused import reason_for
from ssd_megatron.config.report import SECTION, known_fields, nearest_path, shown, validate, without_switched_off
from ssd_megatron.config.schema import SsdMegatronConfig
from ssd_megatron.config.source import assign, parse_assignment, read_json
from ssd_megatron.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
SHORT_NAMES: dict[Dtype, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Below run_dir, for monitors whose output_path is "auto".
FOLDERS = {"tensorboard": "tensorboard", "csv_monitor": "csv"}


@dataclass(frozen=True)
class Hardware:
    """What the config needs to know of the machine to resolve `"auto"`."""

    device: Literal["cpu", "cuda"]
    bf16: bool  # computes in bf16 at least as fast as in fp32
    name: str
    fp16: bool = False  # computes in fp16 at all


@dataclass(frozen=True)
class RunConfig:
    """A checked config in which every `"auto"` is resolved."""

    ssd_megatron: SsdMegatronConfig
    deepspeed: dict[str, Any]  # for deepspeed.initialize: without our section, and without a scheduler of our own
    scheduler: WSDParams | None  # total_num_steps is a number; None: DeepSpeed's own scheduler, or none
    train_batch_size: int  # samples per optimizer step over all ranks
    micro_batch_size: int
    gradient_accumulation_steps: int
    data_parallel_size: int
    dtype: Dtype
    zero_stage: Literal[1, 2]
    notes: tuple[str, ...]  # to be said once, at the start

    def resolved(self) -> dict[str, Any]:
        """The whole config as JSON, defaults included; a ds.json that gives the same run."""
        section = self.ssd_megatron.model_dump(mode="json")
        for path in without_effect(flatten(section)):
            name, _, field = path.partition(".")
            section.get(name, {}).pop(field, None)
        ours: dict[str, Any] = {}
        if self.scheduler is not None:
            ours["scheduler"] = {"type": "WSD", "params": self.scheduler.model_dump(mode="json")}
        for monitor, folder in FOLDERS.items():
            if self.deepspeed[monitor]["output_path"] == str(self.ssd_megatron.run_dir / folder):
                # With another run_dir, the same config logs into that one.
                ours[monitor] = {**self.deepspeed[monitor], "output_path": "auto"}
        return {**self.deepspeed, **ours, SECTION: section}

    def for_deepspeed(self) -> dict[str, Any]:
        """`deepspeed` with the learning rates that sparse weights have (weight_sparsity.scale_learning_rate)."""
        masks = self.ssd_megatron.weight_sparsity
        factor = 1.0 if masks is None else masks.learning_rate_factor
        scaled = copy.deepcopy(self.deepspeed)
        for block in ("optimizer", "scheduler"):
            params = scaled.get(block, {}).get("params", {})
            params |= {name: factor * params[name] for name in _RATES if name in params}
        return scaled

    def flat(self) -> dict[str, Any]:
        """`resolved` as values by dotted path."""
        return {path: value for path, value in flatten(self.resolved()).items() if not isinstance(value, dict)}

    def identity(self) -> dict[str, Any]:
        """The fields, by dotted path, that must not change when a run is resumed."""
        flat = flatten(self.resolved()[SECTION]) | flatten(
            {key: self.resolved().get(key) for key in _DEEPSPEED_IDENTITY}
        )
        return {
            path: value
            for path, value in flat.items()
            if path.partition(".")[0] in _IDENTITY and path not in FREE_TO_CHANGE and not isinstance(value, dict)
        }

    def fingerprint(self) -> str:
        """Hash of `identity`: equal for runs that may resume each other."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size")
SAMPLE_KEYS = ("model.family", "model.seq_length", "model.decoder_seq_length")
BATCH_KEYS = ("train_batch_size", MICRO, ACCUMULATION)
_RATES = ("lr", "warmup_min_lr", "warmup_max_lr")
_DEEPSPEED_IDENTITY = ("train_batch_size", "optimizer", "scheduler", "gradient_clipping")
_IDENTITY = frozenset({"model", "data", "ssd", "seed", "training", "weight_sparsity", *_DEEPSPEED_IDENTITY})
FREE_TO_CHANGE = frozenset(
    {
        "data.cache_dir",
        "data.num_workers",
        "optimizer.params.fused",
        "optimizer.params.torch_adam",
        "ssd.backend",
        "ssd.record_routing",
        "ssd.routing",
        "ssd.rebalance_limit",
        "training.compile",
        "training.eval_interval",
        "training.eval_steps",
        "training.loss_chunk_tokens",
        "training.max_bad_steps",
        "training.recompute",
        "training.stop_after_step",
    }
)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted path, objects included under their own path."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat[prefix + name] = value
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
    return flat


def load_config(path: Path, overrides: Sequence[str] = (), *, world_size: int, hardware: Hardware) -> RunConfig:
    """Read, override and check a ds.json, and resolve every `"auto"` for this machine and number of processes.

    Raises:
        ConfigError: with all problems in one message, each with field, value and what would work.
    """
    raw = read_json(path)
    problems = _override(raw, overrides)
    raw = without_switched_off(raw)
    problems += expand_networks(raw)
    values, found = validate(raw)
    problems += found
    problems += run_checks(values, {shown(field) for field in flatten(raw)})
    problems += _precision(values, hardware)
    problems += _recording(values, world_size)
    batch, batch_problems = _batch(values, world_size, hardware)
    problems += batch_problems
    if problems or batch is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n".join([f"{count} in {path}:", *(f"  - {line}" for line in problems)]))
    return _resolve(DsJson.model_validate(raw), batch, hardware)


def _override(raw: dict[str, Any], assignments: Sequence[str]) -> list[str]:
    """Apply `--set` assignments in place; returns the problems of those that cannot be applied."""
    problems = []
    for assignment in assignments:
        try:
            path, value = parse_assignment(assignment)
            if path in known_fields() or reason_for(shown(path)):
                assign(raw, path, value)
            else:
                problems.append(f"--set {path}: no such field: {nearest_path(path)}")
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _precision(values: dict[str, Any], hardware: Hardware) -> Iterator[str]:
    """What depends on the machine."""
    if values.get("fp16.enabled") and not hardware.fp16:
        yield f"fp16.enabled (true) needs a device that computes in fp16; {hardware.name} does not: use bf16"
    needed = ("fp16.enabled", "bf16.enabled", "communication_data_type", "parallel.expert_parallel_size")
    if all(name in values for name in needed):
        fp16, bf16, sent, expert = (values[name] for name in needed)
        dtype = SHORT_NAMES[_dtype(fp16, bf16, hardware)]
        if expert > 1 and sent not in (None, dtype):
            yield (
                f'communication_data_type ("{sent}") does not hold for expert-parallel weights, whose gradients are '
                f"reduced in the type of training, {dtype}: leave it out, or use expert_parallel_size 1"
            )


def _recording(values: dict[str, Any], world_size: int) -> Iterator[str]:
    if values.get("ssd.record_routing") is not None and world_size > 1:
        yield (
            f"ssd.record_routing ({values['ssd.record_routing']}) works in one process, and this job has {world_size}: "
            "record there, then replay with ssd.routing on any layout"
        )


def _dtype(fp16: bool, bf16: bool | Literal["auto"], hardware: Hardware) -> Dtype:
    if bf16 is True or (bf16 == "auto" and hardware.bf16 and not fp16):
        return "bfloat16"
    return "float16" if fp16 else "float32"


def _batch(values: dict[str, Any], world_size: int, hardware: Hardware) -> tuple[Batch | None, list[str]]:
    needed = (*BATCH_KEYS, *SAMPLE_KEYS, *(f"parallel.{name}" for name in PARALLEL_SIZES))
    if not all(name in values for name in needed):
        return None, []
    train, micro, accumulation = (values[name] for name in BATCH_KEYS)
    family, length, decoder_length = (values[name] for name in SAMPLE_KEYS)
    sample_tokens = length + decoder_length if family == "t5" else length
    limit = TOKENS_PER_MICRO_BATCH[hardware.device] // sample_tokens
    try:
        data_parallel = data_parallel_size(world_size, *(values[f"parallel.{name}"] for name in PARALLEL_SIZES))
        batch = resolve_batch(train, micro, accumulation, data_parallel=data_parallel, micro_limit=limit)
    except ConfigError as error:
        return None, [str(error)]
    predicted_tokens = batch.micro * (decoder_length if family == "t5" else length)
    return batch, list(check_loss_chunk(values.get("training.loss_chunk_tokens"), predicted_tokens))


def _resolve(keys: DsJson, batch: Batch, hardware: Hardware) -> RunConfig:
    section = keys.ssd_megatron
    dtype = _dtype(keys.fp16.enabled, keys.bf16.enabled, hardware)
    bf16 = dtype == "bfloat16"
    deepspeed = keys.model_dump(mode="json", exclude_unset=True, exclude={SECTION, "scheduler"})
    deepspeed |= {
        "train_batch_size": batch.train,
        MICRO: batch.micro,
        ACCUMULATION: batch.accumulation,
        "bf16": {"enabled": bf16},
        "fp16": keys.fp16.model_dump(mode="json"),
        "optimizer": _optimizer(keys),
        "zero_optimization": keys.zero_optimization.model_dump(mode="json"),
        "gradient_clipping": keys.gradient_clipping,
        "tensorboard": _monitor(keys.tensorboard, section.run_dir / FOLDERS["tensorboard"]),
        "csv_monitor": _monitor(keys.csv_monitor, section.run_dir / FOLDERS["csv_monitor"]),
    }
    scheduler = _scheduler(keys)
    if scheduler is not None and scheduler["type"] != "WSD":
        deepspeed["scheduler"] = scheduler
    own = WSDParams(**scheduler["params"]) if scheduler is not None and scheduler["type"] == "WSD" else None
    return RunConfig(
        ssd_megatron=section,
        deepspeed=deepspeed,
        scheduler=own,
        train_batch_size=batch.train,
        micro_batch_size=batch.micro,
        gradient_accumulation_steps=batch.accumulation,
        data_parallel_size=batch.train // (batch.micro * batch.accumulation),
        dtype=dtype,
        zero_stage=keys.zero_optimization.stage,
        notes=tuple(_notes(keys, batch, bf16, hardware)),
    )


def _optimizer(keys: DsJson) -> dict[str, Any]:
    dumped = keys.optimizer.model_dump(mode="json")
    params = dumped["params"]
    params |= {name: True for name in ("torch_adam", "fused") if params[name] == "auto"}
    if keys.optimizer.type == "AdamW":
        del params["adam_w_mode"]
    return dumped


def _scheduler(keys: DsJson) -> dict[str, Any] | None:
    if keys.scheduler is None:
        return None
    dumped = keys.scheduler.model_dump(mode="json")
    automatic = {
        "total_num_steps": keys.ssd_megatron.training.train_steps,
        "warmup_max_lr": keys.optimizer.params.lr,
    }
    dumped["params"] |= {name: automatic[name] for name, value in dumped["params"].items() if value == "auto"}
    return dumped


def _monitor(keys: TensorBoardKeys | CsvKeys, folder: Path) -> dict[str, Any]:
    return keys.model_dump(mode="json") | ({"output_path": str(folder)} if keys.output_path == "auto" else {})


def _notes(keys: DsJson, batch: Batch, bf16: bool, hardware: Hardware) -> list[str]:
    section = keys.ssd_megatron
    notes = []
    if "auto" in (keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps):
        limit = TOKENS_PER_MICRO_BATCH[hardware.device]
        notes.append(
            f"micro batch {batch.micro}, accumulation {batch.accumulation} (auto: at most {limit} tokens per micro "
            f"batch on {hardware.device})"
        )
    if keys.fp16.enabled:
        notes.append("precision fp16 with fp32 masters and loss scaling")
    elif keys.bf16.enabled == "auto":
        reason = "computes bf16 fast" if bf16 else "has no fast bf16"
        notes.append(f"precision {'bf16 with fp32 masters' if bf16 else 'fp32'} (auto: {hardware.name} {reason})")
    elif bf16 and not hardware.bf16:
        notes.append(f"bf16.enabled is true, but {hardware.name} has no fast bf16: fp32 is faster here")
    if keys.scheduler is None:
        notes.append("no scheduler: the learning rate is constant")
    if section.model.activation not in SPARSE_ACTIVATIONS:
        notes.append(
            f"model.activation {section.model.activation} leaves more neurons active than relu, squared_relu or reglu: "
            "sparse phases lose more"
        )
    masks = section.weight_sparsity
    if masks is not None and masks.scale_learning_rate:
        notes.append(f"learning rates times {masks.learning_rate_factor:.4g} (weight_sparsity.scale_learning_rate)")
    return notes + _adaptive_notes(section)


def _adaptive_notes(section: SsdMegatronConfig) -> list[str]:
    ssd, steps = section.ssd, section.training.train_steps
    if ssd.schedule != "adaptive":
        return []
    first_switch = max(int(ssd.warmup_fraction * steps), ssd.check_interval * (ssd.stable_checks + 1))
    last_sparse = int((1 - ssd.final_dense_fraction) * steps)
    if first_switch >= last_sparse:
        return [
            f"ssd.schedule adaptive can make no switch: {ssd.stable_checks} similar checks every {ssd.check_interval} "
            f"steps end at step {first_switch}, the final dense part starts at {last_sparse}: lower ssd.check_interval"
        ]
    return []
