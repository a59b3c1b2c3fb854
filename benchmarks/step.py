"""A whole training step: dense and sparse, beside the same GPT with a plain network and beside Hugging Face's models.

    python -m benchmarks.step [--quick] [--model NAME] [--json FILE] [--profile DIR] [--compile]

A step is data, forward, backward, clipping and optimizer, on random tokens through the real engine. All models live in
one process and take turns; a row compares medians. What the feed-forward network's speed-up implies for the step
follows from Amdahl's law: its forward and backward are timed alone in both modes, layer by layer, on inputs of a real
step. Memory is what one step makes, workspaces included, beyond parameters and optimizer state (on a GPU: all).
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.jobs import MODELS, job_config, sparse_settings
from benchmarks.our_job import Ours, network_variants, switch_and_compare_memory
from benchmarks.references import Reference, hugging_face_steps, plain_step
from benchmarks.row import Missing, Row
from benchmarks.table import parser_for, report
from benchmarks.timing import matmul_rate, paired, take_turns, wait
from ssd_megatron.config.load import RunConfig
from ssd_megatron.ffn.switchable import Mode
from ssd_megatron.model.cost import flops_per_token
from ssd_megatron.parallel.device import IS_CUDA, keep_freed_memory
from ssd_megatron.parallel.topology import Topology, initialize_topology, leave_topology

PLAIN_GOAL, REFERENCE_GOAL, AMDAHL_GOAL, ROUTING_GOAL, MEMORY_GOAL, MFU_GOAL = 1.02, 1.0, 0.85, 0.05, 1.0, 0.45
DENSE, SPARSE = "dense step", "sparse step"
CARD_TFLOPS = 790.0  # what an H200 gives for bf16 products of random numbers


def configured(arguments: argparse.Namespace, training: dict[str, Any] | None = None) -> RunConfig:
    """The job of a model by name, with what the arguments say otherwise."""
    model = {"vocab_size": 50257} | MODELS[arguments.model]
    if arguments.layers is not None:
        model["num_layers"] = arguments.layers
    neurons = model.get("ffn_hidden_size", 4 * model["hidden_size"])
    experts = arguments.experts or neurons // (256 if neurons < 8192 else 512)
    samples = max(1, arguments.tokens // model["seq_length"])
    micro = max(1, min(samples, arguments.micro_tokens // model["seq_length"]))
    return job_config(
        model,
        samples=samples,
        micro_batch=micro,
        bf16=arguments.dtype == "bf16",
        ssd=sparse_settings(experts),
        training=training,
    )


def rows(
    config: RunConfig, topology: Topology, turns: int, *, compiled: bool, families: list[str]
) -> Iterator[Row | Missing]:
    ours = Ours(config, topology)
    ours.step("dense")
    yield switch_and_compare_memory(ours, MEMORY_GOAL)

    references: list[Reference | Missing] = [plain_step(config, ours.job)]
    references += [r for family in families for r in hugging_face_steps(family, config, topology, compiled)]
    variants: dict[str, Callable[[int], object]] = {DENSE: lambda _: ours.step("dense")}
    variants |= {reference.name: reference.step for reference in references if isinstance(reference, Reference)}
    variants |= {SPARSE: lambda _: ours.step("sparse")} | network_variants(ours)
    times = take_turns(variants, turns)
    medians = {name: statistics.median(values) for name, values in times.items()}

    tokens = config.train_batch_size * config.ssd_megatron.model.seq_length
    products = _seconds_of_products(config, tokens, topology.device)
    for reference in references:
        if isinstance(reference, Missing):
            yield reference
            continue
        goal = PLAIN_GOAL if reference is references[0] else REFERENCE_GOAL
        ideal = 1.0 if reference is references[0] else products / medians[reference.name]
        yield Row(
            f"dense step / {reference.name}",
            paired(times[DENSE], times[reference.name]),
            goal,
            ideal,
            details={
                "ours s": medians[DENSE],
                "theirs s": medians[reference.name],
                "ours tokens/s": tokens / medians[DENSE],
                "theirs tokens/s": tokens / medians[reference.name],
                "parameters theirs / ours": reference.parameters / _parameters(ours),
            },
        )
    yield from _sparse_rows(ours, times, tokens)
    yield _mfu_row(config, tokens / medians[DENSE])
    ours.job.engine.close()


def _sparse_rows(ours: Ours, times: dict[str, list[float]], tokens: int) -> Iterator[Row | Missing]:
    passes = ours.config.gradient_accumulation_steps
    measured = zip(times[DENSE], times[SPARSE], times["dense network"], times["sparse network"], strict=True)
    turns = [(dense, sparse, passes * network, passes * experts) for dense, sparse, network, experts in measured]
    dense, sparse, network, experts = (statistics.median(column) for column in zip(*turns, strict=True))
    yield Row(
        "speed-up of a sparse step / what the network's implies",
        statistics.median((d - n + e) / s for d, s, n, e in turns),  # d / s over d / (d - n + e)
        AMDAHL_GOAL,
        1.0,
        at_least=True,
        details={
            "dense s": dense,
            "sparse s": sparse,
            "sparse tokens/s": tokens / sparse,
            "speed-up": dense / sparse,
            "implied": dense / (dense - network + experts),
            "network's": network / experts,
            "network's share of a dense step": network / dense,
        },
    )
    yield Row(
        "router, top-k and metadata / sparse network",
        paired(times["routing"], times["sparse network"]),
        ROUTING_GOAL,
        0.0,
        details={"routing ms": passes * statistics.median(times["routing"]) * 1e3, "network ms": experts * 1e3},
    )


def compiled_rows(config: RunConfig, compiled: RunConfig, topology: Topology, turns: int) -> Iterator[Row]:
    """What `training.compile` gains in each mode."""
    modes: tuple[Mode, ...] = ("dense", "sparse")
    variants: dict[str, Callable[[int], object]] = {}
    for name, run in (("plain", config), ("compiled", compiled)):
        ours = Ours(run, topology)
        ours.step("dense")
        ours.job.switch(1)
        variants |= {f"{name} {mode}": partial(_step_in, ours, mode) for mode in modes}
    times = take_turns(variants, turns)
    for mode in modes:
        plain, faster = times[f"plain {mode}"], times[f"compiled {mode}"]
        details = {"compiled s": statistics.median(faster), "plain s": statistics.median(plain)}
        yield Row(f"{mode} step, compiled blocks / plain", paired(faster, plain), 1.0, 0.0, details=details)


def _step_in(ours: Ours, mode: Mode, _turn: int) -> None:
    ours.step(mode)


def _mfu_row(config: RunConfig, tokens_per_second: float) -> Row | Missing:
    name = f"MFU of dense steps against {CARD_TFLOPS:.0f} TFLOP/s"
    if not IS_CUDA:
        return Missing(name, "needs CUDA")
    flops = flops_per_token(config.ssd_megatron.model, config.ssd_megatron.ssd).dense * tokens_per_second
    return Row(name, flops / (CARD_TFLOPS * 1e12), MFU_GOAL, 1.0, at_least=True, details={"TFLOP/s": flops / 1e12})


def _seconds_of_products(config: RunConfig, tokens: int, device: torch.device) -> float:
    """Of a dense step, if nothing but its matrix products took time."""
    model, ssd = config.ssd_megatron.model, config.ssd_megatron.ssd
    micro_tokens = config.micro_batch_size * model.seq_length
    dtype = getattr(torch, config.dtype)
    rate = matmul_rate(micro_tokens, model.hidden_size, model.ffn_hidden_size, dtype, device)
    return tokens * flops_per_token(model, ssd).dense / rate


def _parameters(ours: Ours) -> int:
    return sum(parameter.numel() for parameter in ours.job.model.parameters())


def profile_phases(config: RunConfig, topology: Topology, folder: Path) -> None:
    """A table of operators and a trace of one step in each mode."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = Ours(config, topology)
    ours.step("dense")
    ours.job.switch(1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if IS_CUDA else [])]
    modes: tuple[Mode, ...] = ("dense", "sparse")
    for mode in modes:
        ours.step(mode)
        with profile(activities=activities) as profiled:
            ours.step(mode)
            wait()
        by = "self_device_time_total" if IS_CUDA else "self_cpu_time_total"
        (folder / f"{mode}.txt").write_text(profiled.key_averages().table(sort_by=by, row_limit=40) + "\n")
        profiled.export_chrome_trace(str(folder / f"{mode}.trace.json.gz"))
    ours.job.engine.close()


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    config = configured(arguments)
    topology = initialize_topology(config.ssd_megatron.parallel)
    families = ["opt"] if arguments.quick else ["opt", "gpt2"]
    compiled = not arguments.quick and not arguments.eager
    found: Iterator[Row | Missing]
    if arguments.compile:
        found = compiled_rows(config, configured(arguments, {"compile": "blocks"}), topology, arguments.turns)
    else:
        found = rows(config, topology, arguments.turns, compiled=compiled, families=families)
    model = config.ssd_megatron.model
    title = (
        f"{arguments.model}: {model.num_layers} layers, h {model.hidden_size}, d_ff {model.ffn_hidden_size}, "
        f"{config.ssd_megatron.ssd.num_experts} experts, {arguments.tokens} tokens a step, {config.dtype}"
    )
    met = report(title, found, arguments.json)
    if arguments.profile is not None:
        profile_phases(config, topology, arguments.profile)
    leave_topology()
    return 0 if met else 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--layers", type=int, help="layers instead of the model's")
    parser.add_argument("--experts", type=int, help="experts per layer; of 256 or 512 neurons without it")
    parser.add_argument("--tokens", type=int, help="tokens of one optimizer step")
    parser.add_argument("--micro_tokens", type=int, default=8192, help="tokens of one forward pass, at most")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16" if IS_CUDA else "fp32")
    parser.add_argument("--turns", type=int, help="timed steps of each variant")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--eager", action="store_true", help="leave torch.compile of Hugging Face's models out")
    parser.add_argument("--compile", action="store_true", help="only compare training.compile with steps without it")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="keep tables of operators and traces here")
    arguments = parser.parse_args(argv)
    if arguments.model is None:
        arguments.model = ("gpt-124m" if arguments.quick else "gpt-1.3b") if IS_CUDA else "wide"
    if arguments.tokens is None:
        arguments.tokens = 16384 if IS_CUDA else 1024 if arguments.quick else 2048
    if arguments.layers is None and arguments.quick and not IS_CUDA:
        arguments.layers = 2
    if arguments.turns is None:
        arguments.turns = 5 if arguments.quick else 9
    return arguments


if __name__ == "__main__":
    sys.exit(main())
