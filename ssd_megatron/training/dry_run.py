"""--dry_run: what a run would be, without making it."""

import json

import rich.console
from rich.table import Table

from ssd_megatron.config.load import RunConfig
from ssd_megatron.model.cost import flops_per_token, parameter_counts
from ssd_megatron.model.memory import Layout, Memory, layout_of, memory_per_rank

GIB = 2**30


def print_dry_run(config: RunConfig) -> None:
    """Print the resolved config, parameters by part, memory per rank, FLOPs per token and tokens per step."""
    section = config.ssd_megatron
    console = rich.console.Console(highlight=False, soft_wrap=True)
    console.print(json.dumps(config.resolved(), indent=2), markup=False)
    for note in config.notes:
        console.print(f"note: {note}", markup=False)
    console.print(_parameter_table(config))
    console.print(_memory_table(run_memory(config), layout_of(config)))
    flops = flops_per_token(section.model, section.ssd)
    masked = flops_per_token(section.model, section.ssd, section.live_weights).dense
    tokens = config.train_batch_size * section.model.sample_tokens
    less, what = (flops.sparse, "sparse") if section.weight_sparsity is None else (masked, "with masked weights")
    console.print(f"FLOPs per token: {flops.dense:.4g} dense, {less:.4g} {what} ({less / flops.dense:.1%})")
    console.print(
        f"tokens per step: {config.train_batch_size} samples x {section.model.sample_tokens} = {tokens} "
        f"({config.data_parallel_size} ranks x {config.gradient_accumulation_steps} microbatches x "
        f"{config.micro_batch_size} samples)"
    )
    console.print(f"tokens in all: {tokens * section.training.train_steps:.4g}")


def run_memory(config: RunConfig) -> Memory:
    """Estimated memory of the rank of a run that needs most."""
    return memory_per_rank(
        config.ssd_megatron.model,
        config.ssd_megatron.ssd,
        layout_of(config),
        dtype=config.dtype,
        reduce_bucket_size=config.deepspeed["zero_optimization"]["reduce_bucket_size"],
    )


def _parameter_table(config: RunConfig) -> Table:
    counts = parameter_counts(config.ssd_megatron.model, config.ssd_megatron.ssd)
    table = Table("part", "parameters", title="Parameters", title_justify="left")
    for part, count in counts.items():
        table.add_row(part, f"{count:,}")
    table.add_row("all", f"{sum(counts.values()):,}")
    return table


def _memory_table(memory: Memory, layout: Layout) -> Table:
    sizes = f"TP {layout.tensor} x PP {layout.pipeline} x DP {layout.data}, EP {layout.expert}"
    table = Table("memory per rank", "GiB", title=f"Memory (estimate), {sizes}", title_justify="left")
    for part, size in vars(memory).items():
        table.add_row(part, f"{size / GIB:.2f}")
    table.add_row("peak", f"{memory.total / GIB:.2f}")
    return table
