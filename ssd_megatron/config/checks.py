"""What fields must be to each other: sizes of the model, phases, data, learning rate; layout_checks.py has the layouts.
Each check names the fields it reads and yields the problems it sees.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ssd_megatron.config.check_list import CheckList, divisors_near
from ssd_megatron.config.layout_checks import LAYOUT_CHECKS
from ssd_megatron.config.report import problem
from ssd_megatron.config.schema import NEURON_ROUTERS, TOKEN_ROUTERS, PhaseConfig
from ssd_megatron.config.span_sizes import span_sizes

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
_T5_ONLY = ("model.num_decoder_layers", "model.decoder_seq_length", "data.mean_span_length")
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
        problem(path, values[path], f"has no effect: leave it out, or set {other} {_choices(wanted)}")
        for path, (other, wanted) in without_effect(values).items()
        if path in set(given) and values[path] is not None
    ]
    return [*problems, *CHECKS.run(values), *LAYOUT_CHECKS.run(values)]


def without_effect(values: Mapping[str, Any]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """The settings that do nothing with the others chosen."""
    return {
        path: (other, wanted)
        for path, (other, wanted) in ACTS_ONLY_IF.items()
        if path in values and other in values and values[other] not in wanted
    }


def _choices(values: tuple[Any, ...]) -> str:
    return " or ".join(f'"{value}"' if isinstance(value, str) else json.dumps(value) for value in values)


@CHECKS("model.hidden_size", "model.num_attention_heads", "model.position_embedding")
def _heads(hidden: int, heads: int, positions: str) -> Iterator[str]:
    if hidden % heads:
        hint = divisors_near(hidden, heads)
        yield problem("model.num_attention_heads", heads, f"must divide model.hidden_size ({hidden}): try {hint}")
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


@CHECKS("ssd.num_experts", "ssd.top_k", "ssd.router", "ssd.router_update")
def _top_k(experts: int, top_k: int, router: str, router_update: str) -> Iterator[str]:
    if top_k > experts:
        hint = max(1, experts // 4)
        yield problem("ssd.top_k", top_k, f"must be at most ssd.num_experts ({experts}): try {hint}")
    if top_k == 1 and router == "pkm":
        yield problem("ssd.top_k", top_k, 'gives ssd.router "pkm" no gradient: try 2')
    if top_k == 1 and router == "centroid" and router_update == "straight_through":
        yield problem(
            "ssd.top_k",
            top_k,
            'gives the router no gradient with ssd.router_update "straight_through": try 2, or router_update "frozen" '
            'or "avg_k"',
        )


@CHECKS("ssd.router", "ssd.num_experts", "model.ffn_hidden_size")
def _router_sizes(router: str, experts: int, neurons: int) -> Iterator[str]:
    if router in NEURON_ROUTERS and experts != neurons:
        yield problem(
            "ssd.router",
            router,
            f"chooses single neurons, and ssd.num_experts is {experts}: set it to model.ffn_hidden_size ({neurons})",
        )
    if router == "pkm" and math.isqrt(experts) ** 2 != experts:
        side = math.isqrt(experts)
        hint = f"{side**2} or {(side + 1) ** 2}"
        yield problem("ssd.num_experts", experts, f'must be a square with ssd.router "pkm": try {hint}')


@CHECKS("ssd.router", "ssd.router_update", "ssd.balance_bias")
def _balance_bias(router: str, router_update: str, balance_bias: bool) -> Iterator[str]:
    learns = router == "switch" or (router == "centroid" and router_update == "straight_through")
    if balance_bias and not learns:
        yield problem(
            "ssd.balance_bias",
            balance_bias,
            f'needs a router of one row per expert that learns, not ssd.router "{router}"'
            + f' with router_update "{router_update}"' * (router == "centroid")
            + ": use switch or a straight-through centroid, or leave it out",
        )


@CHECKS("ssd.router", "ssd.routing", "ssd.record_routing")
def _replayed_router(router: str, routing: str | Path, record: Path | None) -> Iterator[str]:
    for name, value in (("routing", None if routing == "live" else routing), ("record_routing", record)):
        if value is not None and router == "pkm":
            yield problem(f"ssd.{name}", value, 'cannot go with ssd.router "pkm", which learns by its own choice')


@CHECKS("ssd.router", "ssd.routing_granularity")
def _router_of_tiles(router: str, granularity: int) -> Iterator[str]:
    if granularity > 1 and router in TOKEN_ROUTERS:
        yield problem(
            "ssd.routing_granularity", granularity, f'needs a router that scores inputs, and "{router}" does not: use 1'
        )


@CHECKS("ssd.routing_granularity", "model.seq_length", "ssd.routing", "ssd.record_routing")
def _granularity(granularity: int, length: int, routing: str | Path, record: Path | None) -> Iterator[str]:
    for name, value in (("routing", None if routing == "live" else routing), ("record_routing", record)):
        if value is not None and granularity > 1:
            yield problem(f"ssd.{name}", value, "has experts of tokens, not of tiles: it needs routing_granularity 1")
    if granularity > length:
        yield problem(
            "ssd.routing_granularity",
            granularity,
            f"must be at most model.seq_length ({length}), where a sequence is one tile: try {max(1, length // 4)}",
        )


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


@CHECKS("data.mask_token_fraction", "data.random_token_fraction")
def _masking(mask: float, random: float) -> Iterator[str]:
    if mask + random > 1 + 1e-9:
        yield problem(
            "data.random_token_fraction",
            random,
            f"+ data.mask_token_fraction ({mask}) must be at most 1: try {max(0.0, 1 - mask):g}",
        )


@CHECKS("model.sentence_objective", "model.num_token_types")
def _segments(objective: str, token_types: int) -> Iterator[str]:
    if objective != "none" and token_types < 2:
        wanted = f'must be at least 2 with model.sentence_objective "{objective}": try 2'
        yield problem("model.num_token_types", token_types, wanted)


@CHECKS("model.family", "model.seq_length")
def _room_for_markers(family: str, length: int) -> Iterator[str]:
    if family == "bert" and length < 8:
        yield problem("model.seq_length", length, "must be at least 8 with bert, whose samples have up to 3 markers")


_T5_HAS = {"position_embedding": "relative", "norm_position": "pre", "add_bias": False}


@CHECKS("model.family", *(f"model.{name}" for name in _T5_HAS))
def _what_t5_has(family: str, *values: Any) -> Iterator[str]:
    for (name, wanted), value in zip(_T5_HAS.items(), values, strict=True):
        if family == "t5" and value != wanted:
            yield problem(f"model.{name}", value, f"does not go with t5: use {_choices((wanted,))}")
    if family != "t5" and values[0] == "relative":
        yield problem("model.position_embedding", "relative", f"does not go with {family}: use learned or rope")


@CHECKS("model.family", "model.num_attention_heads", "model.num_query_groups")
def _heads_of_t5(family: str, heads: int, groups: int) -> Iterator[str]:
    if family == "t5" and groups != heads:
        yield problem(
            "model.num_query_groups", groups, f"must be model.num_attention_heads ({heads}) with t5: leave it out"
        )


@CHECKS("model.relative_attention_num_buckets", "model.relative_attention_max_distance")
def _buckets(buckets: int, distance: int) -> Iterator[str]:
    if distance <= buckets // 2:
        yield problem(
            "model.relative_attention_max_distance",
            distance,
            f"must be above half of model.relative_attention_num_buckets ({buckets}): try {4 * buckets}",
        )


@CHECKS("model.family", "model.seq_length", "model.decoder_seq_length", "data.mask_fraction", "data.mean_span_length")
def _room_for_spans(family: str, length: int, decoder_length: int, fraction: float, mean: float) -> Iterator[str]:
    if family != "t5":
        return
    if length < 4:
        yield problem("model.seq_length", length, "must be at least 4 with t5")
        return
    sizes = span_sizes(length, fraction, mean)
    needed = sizes.targets
    if sizes.inputs != length:
        yield problem(
            "data.mask_fraction",
            fraction,
            f"with data.mean_span_length ({mean}) makes no samples of exactly model.seq_length ({length}) tokens: try "
            "a smaller fraction or longer spans",
        )
    elif decoder_length < needed:
        yield problem(
            "model.decoder_seq_length",
            decoder_length,
            f"is too short for the spans of model.seq_length ({length}), data.mask_fraction ({fraction}) and "
            f"data.mean_span_length ({mean}): try {needed}",
        )
