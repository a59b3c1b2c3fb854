"""What fields must be to each other: sizes of the model, phases, data, learning rate; router_checks.py,
family_checks.py and layout_checks.py have theirs.
Each check names the fields it reads and yields the problems it sees.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ssd_megatron.config.check_list import CheckList, choices, divisors_near
from ssd_megatron.config.family_checks import FAMILY_CHECKS
from ssd_megatron.config.layout_checks import LAYOUT_CHECKS
from ssd_megatron.config.report import problem
from ssd_megatron.config.router_checks import ROUTER_CHECKS
from ssd_megatron.config.schema import PhaseConfig

CHECKS = CheckList()

_ADAPTIVE_ONLY = (
    "sparse_fraction",
    "sparse_phase_fraction",
    "stable_checks",
    "similarity_threshold",
    "min_dense_steps",
    "warmup_fraction",
    "final_dense_fraction",
)
_GPT_ONLY = ("data.eod_mask_loss", "data.reset_position_ids")
_BERT_ONLY = (
    "model.num_token_types",
    "model.sentence_objective",
    "data.mask_token_fraction",
    "data.random_token_fraction",
    "data.whole_words",
)
_T5_ONLY = (
    "model.num_decoder_layers",
    "model.decoder_seq_length",
    "model.decoder_start_token",
    "data.mean_span_length",
)
_RELATIVE_ONLY = ("model.relative_attention_num_buckets", "model.relative_attention_max_distance")
_DYNAMIC_ONLY = ("updates", "prune_ratio", "criterion", "regrow")
# Settings that act only if another field has one of some values.
ACTS_ONLY_IF: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{f"ssd.{name}": ("ssd.schedule", ("adaptive",)) for name in _ADAPTIVE_ONLY},
    "ssd.router_update": ("ssd.router", ("centroid",)),
    "ssd.load_balance": ("ssd.router", ("switch",)),
    "ssd.z_loss": ("ssd.router", ("switch",)),
    "ssd.phases": ("ssd.schedule", ("fixed",)),
    "ssd.on_spike": ("ssd.schedule", ("adaptive",)),
    "ssd.rebalance_limit": ("ssd.schedule", ("adaptive", "fixed", "sparse")),
    "ssd.spike_factor": ("ssd.schedule", ("adaptive", "fixed")),
    "model.rotary_base": ("model.position_embedding", ("rope",)),
    "data.split": ("data.train_paths", (None,)),
    **{path: ("model.family", ("gpt",)) for path in _GPT_ONLY},
    **{path: ("model.family", ("bert",)) for path in _BERT_ONLY},
    **{path: ("model.family", ("t5",)) for path in _T5_ONLY},
    "data.mask_fraction": ("model.family", ("bert", "t5")),
    **{path: ("model.position_embedding", ("relative",)) for path in _RELATIVE_ONLY},
    **{f"weight_sparsity.{name}": ("weight_sparsity.mask", ("dynamic",)) for name in _DYNAMIC_ONLY},
    "optimizer.params.adam_w_mode": ("optimizer.type", ("Adam",)),
}


def run_checks(values: Mapping[str, Any], given: Iterable[str]) -> list[str]:
    """All problems between usable `values`; `given` are the fields that the file or `--set` names."""
    problems = [
        problem(path, values[path], f"has no effect: leave it out, or set {other} {choices(wanted)}")
        for path, (other, wanted) in without_effect(values).items()
        if path in set(given) and values[path] is not None
    ]
    lists = (CHECKS, ROUTER_CHECKS, FAMILY_CHECKS, LAYOUT_CHECKS)
    return [*problems, *(found for checks in lists for found in checks.run(values))]


def without_effect(values: Mapping[str, Any]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """The settings that do nothing with the others chosen."""
    return {
        path: (other, wanted)
        for path, (other, wanted) in ACTS_ONLY_IF.items()
        if path in values and other in values and values[other] not in wanted
    }


@CHECKS("model.hidden_size", "model.num_attention_heads", "model.kv_channels", "model.position_embedding")
def _heads(hidden: int, heads: int, channels: int | None, positions: str) -> Iterator[str]:
    if channels is not None:
        if positions == "rope" and channels % 2:
            yield problem("model.kv_channels", channels, f"must be even with rope: try {channels + 1}")
    elif hidden % heads:
        hint = divisors_near(hidden, heads)
        yield problem(
            "model.num_attention_heads",
            heads,
            f"must divide model.hidden_size ({hidden}): try {hint}, or say model.kv_channels",
        )
    elif positions == "rope" and (hidden // heads) % 2:
        yield problem(
            "model.position_embedding",
            positions,
            f"needs an even head size, but model.hidden_size ({hidden}) / model.num_attention_heads ({heads}) = "
            f"{hidden // heads}: change one of them, or use learned",
        )


@CHECKS("model.num_attention_heads", "model.num_query_groups")
def _query_groups(heads: int, groups: int) -> Iterator[str]:
    if heads % groups:
        hint = divisors_near(heads, groups)
        yield problem("model.num_query_groups", groups, f"must divide model.num_attention_heads ({heads}): try {hint}")


@CHECKS("model.ffn_hidden_size", "ssd.num_experts")
def _experts(neurons: int, experts: int) -> Iterator[str]:
    if neurons % experts:
        hint = divisors_near(neurons, experts)
        yield problem("ssd.num_experts", experts, f"must divide model.ffn_hidden_size ({neurons}): try {hint}")


@CHECKS("ssd.schedule", "ssd.sparse_fraction", "ssd.warmup_fraction", "ssd.final_dense_fraction")
def _fractions(schedule: str, sparse: float, warmup: float, final: float) -> Iterator[str]:
    if schedule == "adaptive" and sparse + warmup + final > 1 + 1e-9:
        room = max(0.0, 1 - warmup - final)
        yield problem(
            "ssd.sparse_fraction",
            sparse,
            f"+ ssd.warmup_fraction ({warmup}) + ssd.final_dense_fraction ({final}) = {sparse + warmup + final:g} must "
            f"be at most 1: try sparse_fraction {room:g}",
        )


@CHECKS("ssd.schedule", "ssd.phases", "training.train_steps")
def _phases(schedule: str, phases: tuple[PhaseConfig, ...] | None, steps: int) -> Iterator[str]:
    if schedule != "fixed":
        return
    if not phases:
        yield 'ssd.phases is missing: ssd.schedule "fixed" needs it, such as [{"start_step": 1, "mode": "dense"}]'
        return
    starts = [phase.start_step for phase in phases]
    if starts[0] != 1:
        yield problem("ssd.phases[0].start_step", starts[0], "must be 1: the first phase starts with the run")
    for i in range(1, len(phases)):
        if starts[i] <= starts[i - 1]:
            yield problem(f"ssd.phases[{i}].start_step", starts[i], f"must be above the one before ({starts[i - 1]})")
        if phases[i].mode == phases[i - 1].mode:
            yield problem(f"ssd.phases[{i}].mode", phases[i].mode, "must differ from the one before: join the two")
    if starts[-1] > steps:
        last = f"ssd.phases[{len(phases) - 1}].start_step"
        yield problem(last, starts[-1], f"must be at most training.train_steps ({steps})")


@CHECKS("ssd.check_layers", "model.family", "model.num_layers", "model.num_decoder_layers")
def _check_layers(check_layers: int | None, family: str, layers: int, decoder_layers: int) -> Iterator[str]:
    total = layers + decoder_layers if family == "t5" else layers
    if check_layers is not None and check_layers > total:
        yield problem("ssd.check_layers", check_layers, f"must be at most the number of layers ({total})")


@CHECKS("ssd.partition")
def _recorded_partition(partition: str | Path) -> Iterator[str]:
    if isinstance(partition, Path) and not partition.is_file():
        yield problem("ssd.partition", partition, "is no file: record it first, or use kmeans")


@CHECKS("ssd.routing", "ssd.record_routing", "ssd.schedule", "training.recompute")
def _recorded_routing(routing: str | Path, record: Path | None, schedule: str, recompute: str) -> Iterator[str]:
    if isinstance(routing, Path) and not routing.is_dir():
        yield problem("ssd.routing", routing, "is no folder: record it first with ssd.record_routing, or use live")
    if isinstance(routing, Path) and record is not None:
        yield problem("ssd.record_routing", record, f"cannot go with ssd.routing ({routing}): keep one of them")
    for name, value in (("routing", None if routing == "live" else routing), ("record_routing", record)):
        if value is not None and schedule == "dense":
            yield problem(f"ssd.{name}", value, f'has no effect with ssd.schedule "{schedule}": leave it out')
        if value is not None and recompute != "none":
            yield problem(f"ssd.{name}", value, f'needs training.recompute "none", and it is "{recompute}"')


@CHECKS("weight_sparsity.mask", "weight_sparsity.updates", "training.train_steps")
def _mask_updates(mask: str, updates: int, steps: int) -> Iterator[str]:
    if mask == "dynamic" and updates > steps:
        yield problem("weight_sparsity.updates", updates, f"must be at most training.train_steps ({steps})")


@CHECKS("weight_sparsity.sparsity", "ssd.schedule")
def _masks_and_switches(_sparsity: float, schedule: str) -> Iterator[str]:
    if schedule != "dense":
        yield problem(
            "ssd.schedule",
            schedule,
            'cannot go with weight_sparsity: a switch moves neurons, and masks lie on them. Use "dense", or leave '
            "weight_sparsity out",
        )


@CHECKS("training.train_steps", "training.stop_after_step")
def _stop(steps: int, stop: int | None) -> Iterator[str]:
    if stop is not None and stop > steps:
        yield problem(
            "training.stop_after_step", stop, f"must be at most training.train_steps ({steps}): leave it out to run on"
        )


@CHECKS("data.paths", "data.train_paths", "data.valid_paths", "data.test_paths")
def _data_paths(paths: Any, train: Any, valid: Any, test: Any) -> Iterator[str]:
    if paths is not None and train is not None:
        yield problem("data.paths", paths, "cannot go with data.train_paths: keep one of them")
    if paths is None and train is None:
        yield "data.paths is missing: one path or a weighted blend, or train_paths and valid_paths"
    if train is not None and valid is None:
        yield "data.valid_paths is missing: data.train_paths needs it"
    for name, value in (("valid_paths", valid), ("test_paths", test)):
        if value is not None and train is None:
            yield problem(f"data.{name}", value, "needs data.train_paths: or use data.paths and data.split")


@CHECKS("scheduler", "training.train_steps")
def _scheduler_steps(scheduler: Any, steps: int) -> Iterator[str]:
    if scheduler is None or scheduler.type == "WarmupLR":
        return
    params = scheduler.params
    total = steps if params.total_num_steps == "auto" else params.total_num_steps
    source = f"training.train_steps ({steps})" if params.total_num_steps == "auto" else f"total_num_steps ({total})"
    if params.warmup_num_steps >= total:
        hint = max(1, total // 10)
        yield problem(
            "scheduler.params.warmup_num_steps", params.warmup_num_steps, f"must be below {source}: try {hint}"
        )
    elif scheduler.type == "WSD" and params.warmup_num_steps + params.decay_num_steps > total:
        yield problem(
            "scheduler.params.decay_num_steps",
            params.decay_num_steps,
            f"+ warmup_num_steps ({params.warmup_num_steps}) must be at most {source}: try "
            f"{total - params.warmup_num_steps} or less",
        )


@CHECKS("scheduler", "optimizer.params.lr")
def _peak_rate(scheduler: Any, lr: float) -> Iterator[str]:
    if scheduler is not None and scheduler.type in ("WarmupLR", "WarmupDecayLR"):
        peak, start = scheduler.params.warmup_max_lr, scheduler.params.warmup_min_lr
        if peak not in ("auto", lr):
            yield problem(
                "scheduler.params.warmup_max_lr",
                peak,
                f"contradicts optimizer.params.lr ({lr}): leave it out, the peak rate is said there",
            )
        if start > lr:
            yield problem("scheduler.params.warmup_min_lr", start, f"must be at most optimizer.params.lr ({lr})")


@CHECKS("fp16.enabled", "bf16.enabled")
def _one_precision(fp16: bool, bf16: bool | str) -> Iterator[str]:
    if fp16 and bf16 is True:
        yield problem("fp16.enabled", fp16, "cannot go with bf16.enabled: keep one of them")


@CHECKS("optimizer.params.torch_adam")
def _torch_adam(torch_adam: bool | str) -> Iterator[str]:
    if torch_adam is False:
        yield problem(
            "optimizer.params.torch_adam",
            torch_adam,
            "is not supported: a switch moves the moments of torch's; leave it out",
        )


@CHECKS("model.position_embedding", "data.reset_position_ids")
def _reset_positions(positions: str, reset: bool) -> Iterator[str]:
    if reset and positions == "rope":
        yield problem("data.reset_position_ids", reset, "has no effect with rope: use false, or learned positions")
