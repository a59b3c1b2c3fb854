"""Predicted memory and bytes beside what small real runs have and send: gloo ranks on this machine.

    python -m benchmarks.plan_check [--quick] [--json FILE]

Every rank of every layout is measured, dense and sparse. Memory: bytes of the tensors that DeepSpeed's optimizer holds
(parameters, gradients before they are reduced, masters and moments) and of those that autograd keeps at the fullest
moment of a step. Communication: payloads of torch.distributed's operations by the ranks that take part, turned into
bytes sent by the formulas of ring collectives. Exit status 1 if a ratio is off by more than a tenth.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rich.console
import torch
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.counters import GatheredBytes, GradientBytes, KeptBytes, SentBytes, bytes_of
from ssd_megatron.config.load import Hardware, RunConfig, load_config
from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.ffn import routers
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.model.memory import OPTIMIZER_BYTES, Layout, layout_of, stage_memory
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import KINDS
from ssd_megatron.planning.switches import bytes_moved
from ssd_megatron.planning.traffic import step_traffic
from ssd_megatron.switching.redistribute import plan_move
from ssd_megatron.switching.switch import neuron_tensor_names
from ssd_megatron.training.engine import Engine
from tests.ranks import run_ranks
from tests.small_engine import build, random_batch, run_config

LIMIT = 0.1
LAYOUTS = (
    Layout(data=2, microbatches=3),
    Layout(data=2, microbatches=3, zero_stage=2),
    Layout(data=4, expert=2, microbatches=2),
    Layout(data=2, expert=2, microbatches=2, zero_stage=2),
    Layout(tensor=2, microbatches=2),
    Layout(tensor=2, data=2, expert=2, microbatches=2),
    Layout(pipeline=2, microbatches=4),
    Layout(pipeline=4, microbatches=6),
    Layout(tensor=2, pipeline=2, microbatches=3),
    Layout(pipeline=2, data=2, expert=2, microbatches=3),
    Layout(tensor=2, data=2, expert=2, microbatches=2, recompute=True),
    Layout(pipeline=2, data=2, expert=2, microbatches=3, recompute=True),
    Layout(pipeline=2, data=2, expert=2, microbatches=3, gather_once=True),
    Layout(tensor=2, data=2, expert=2, microbatches=2, recompute=True, gather_once=True),
)
QUICK = (0, 5, 8, 9, 12)
MODELS: dict[str, dict[str, Any]] = {
    "GPT": {"activation": "relu"},
    "gated, rotary, untied": {
        "activation": "reglu",
        "position_embedding": "rope",
        "tie_embeddings": False,
        "add_bias": False,
        "num_query_groups": 2,
    },
}
SHAPE = {"num_layers": 8, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 512, "seq_length": 128}
MICRO_BATCH = 4


@dataclass(frozen=True)
class Check:
    """One number of one rank, measured and predicted, in bytes."""

    model: str
    layout: str
    mode: str
    rank: int
    what: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted

    @property
    def ok(self) -> bool:
        return abs(self.ratio - 1) <= LIMIT


def configured(model: dict[str, Any], layout: Layout) -> RunConfig:
    """A bf16 run of this layout."""
    base = run_config(bf16=True, stage=layout.zero_stage, **SHAPE, **model).resolved()
    base["train_micro_batch_size_per_gpu"] = MICRO_BATCH
    base["gradient_accumulation_steps"] = layout.microbatches
    base["train_batch_size"] = MICRO_BATCH * layout.microbatches * layout.data
    base["zero_optimization"]["reduce_bucket_size"] = 10_000_000
    section = base["ssd_megatron"]
    section["parallel"] = {
        "tensor_parallel_size": layout.tensor,
        "pipeline_parallel_size": layout.pipeline,
        "expert_parallel_size": layout.expert,
        "dense_gather": "step" if layout.gather_once else "microbatch",
    }
    section["ssd"] |= {"num_experts": 16, "top_k": 4}
    section["training"]["recompute"] = "full" if layout.recompute else "none"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(base))
        return load_config(path, world_size=layout.ranks, hardware=Hardware("cpu", False, "CPU"))


def measured(topology: Topology, name: str, layout: Layout) -> list[Check]:
    """What this rank has and sends, and what was predicted."""
    config = configured(MODELS[name], layout)
    section = config.ssd_megatron
    model, engine = build(topology, config)
    optimizer = engine.deepspeed.optimizer
    checks = []
    routers.expert_scores = even_scores
    gradients, gathered = GradientBytes(optimizer), GatheredBytes()
    for mode in ("dense", "sparse"):
        for ffn in model.ffns.values():
            ffn.mode = "sparse" if mode == "sparse" else "dense"
        kept, sent = KeptBytes(list(model.parameters())), SentBytes()
        for step in range(2):  # the first makes buffers, and tells neighbours what will be sent
            first = (2 * topology.data.rank + step) * layout.microbatches
            batches = [random_batch(config, first + m) for m in range(layout.microbatches)]
            if step == 0:
                engine.train_step(batches)
                continue
            with sent, saved_tensors_hooks(kept.pack, kept.unpack):
                engine.train_step(batches)
        flat = optimizer.single_partition_of_fp32_groups
        states = [optimizer.optimizer.state[f][kind] for f in flat for kind in KINDS[1:]]
        memory = stage_memory(
            section.model,
            section.ssd,
            layout_of(config),
            topology.pipeline.rank,
            mode,
            dtype=config.dtype,
            reduce_bucket_size=config.deepspeed["zero_optimization"]["reduce_bucket_size"],
        )
        numbers: dict[str, tuple[float, float]] = {
            "parameters": (sum(bytes_of(t) for t in optimizer.bit16_groups_flat), memory.parameters),
            "gradients": (gradients.peak, memory.gradients),
            "optimizer": (sum(bytes_of(t) for t in (*flat, *states)), memory.optimizer),
        }
        # What is saved while weights are gathered for a pass, or recomputed, is not seen here.
        if not layout.recompute and (layout.expert == 1 or mode == "sparse" or layout.gather_once):
            # Logits are kept with the activations; weights that are kept are not parameters.
            numbers["activations"] = (kept.peak, memory.activations + memory.logits + memory.kept_weights)
        if mode == "dense" and layout.gather_once:
            others = 1 - 1 / layout.expert  # the rank's own are among `gradients`
            numbers["kept gradients"] = (gathered.gradients * others, memory.kept_gradients)
            numbers["kept weights"] = (gathered.weights, memory.kept_weights)
        if mode == "sparse" and topology.is_first_stage and topology.homes > 1:
            numbers["switch"] = (
                moved_by_a_switch(model, engine, topology),
                bytes_moved(section.model, layout_of(config)),
            )
        place = (name, _named(layout), mode, topology.rank)
        checks += [Check(*place, what, *values) for what, values in numbers.items()]
        checks += [Check(*place, f"sent to {w}", m, p) for w, m, p in compared(config, topology, mode, sent.by_ranks)]
    engine.close()
    return checks


def moved_by_a_switch(model: LanguageModel, engine: Engine, topology: Topology) -> float:
    """Bytes that cross between ranks when every network's neurons get a random new order; only planned."""
    generator, moved = torch.Generator().manual_seed(0), 0
    for prefix, ffn in model.ffns.items():
        order = torch.randperm(ffn.settings.ffn_hidden_size, generator=generator)
        for name in neuron_tensor_names(prefix, ffn):
            spec = engine.state.specs[name]
            row = spec.numel // spec.shape[0]
            plan = plan_move(order, row, engine.state.owners(name), topology.stage.size)
            moved += plan.elements_moved() * OPTIMIZER_BYTES
    return float(moved)


def even_scores(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """Scores by which every expert is as likely as any other; of the same tokens, the same."""
    generator = torch.Generator().manual_seed(int(x_TH.detach().view(torch.int16).sum(dtype=torch.int64)) % 2**32)
    return torch.rand(len(x_TH), len(weight_EH), generator=generator)


def compared(
    config: RunConfig, topology: Topology, mode: str, sent: Counter[tuple[int, ...]]
) -> Iterator[tuple[str, float, float]]:
    """Measured and predicted bytes sent, by group; groups of the same ranks are one."""
    layout, pipeline = layout_of(config), topology.pipeline
    predicted: Counter[tuple[int, ...]] = Counter()
    names: dict[tuple[int, ...], list[str]] = defaultdict(list)
    section = config.ssd_megatron
    for t in step_traffic(section.model, section.ssd, layout, pipeline.rank, mode, config.dtype):
        if t.collective == "send":
            other = pipeline.rank + (1 if t.what == "activations" else -1)
            ranks = tuple(sorted((topology.rank, pipeline.ranks[other])))
        else:
            group = getattr(topology, t.group)
            ranks = group.ranks
        predicted[ranks] += int(t.step_bytes)
        names[ranks].append(t.group)
    for ranks, expected in predicted.items():
        yield "+".join(dict.fromkeys(names[ranks])), float(sent.pop(ranks, 0)), float(expected)
    # Gradient norms and the like.
    rest = sum(sent.values())
    assert rest < 0.01 * sum(predicted.values()) + 10_000, f"bytes that nothing predicts: {sent}"


def main() -> int:
    """Run all checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five layouts of one model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to a file")
    arguments = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"  # for the ranks
    checks: list[Check] = []
    console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for name in list(MODELS)[: 1 if arguments.quick else None]:
        for layout in [LAYOUTS[i] for i in QUICK] if arguments.quick or name != "GPT" else LAYOUTS:
            sizes = ParallelConfig(
                tensor_parallel_size=layout.tensor,
                pipeline_parallel_size=layout.pipeline,
                expert_parallel_size=layout.expert,
            )
            found = [c for rank in run_ranks(layout.ranks, measured, name, layout, parallel=sizes) for c in rank]
            console.print(_table(found))
            checks += found
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(check) | {"ratio": check.ratio} for check in checks], indent=1))
    wrong = [check for check in checks if not check.ok]
    print(f"{len(checks) - len(wrong)} of {len(checks)} numbers within {LIMIT:.0%}")
    return 1 if wrong else 0


def _table(checks: list[Check]) -> Table:
    """For each number the rank that is furthest off."""
    title = f"{checks[0].model}: {checks[0].layout}"
    table = Table("what", "mode", "rank", "measured", "predicted", "ratio", title=title)
    worst: dict[tuple[str, str], Check] = {}
    for check in checks:
        key = (check.what, check.mode)
        if key not in worst or abs(check.ratio - 1) > abs(worst[key].ratio - 1):
            worst[key] = check
    for (what, mode), c in worst.items():
        table.add_row(what, mode, str(c.rank), f"{c.measured:,.0f}", f"{c.predicted:,.0f}", f"{c.ratio:.3f}")
    return table


def _named(layout: Layout) -> str:
    whole = replace(layout, micro_batch_size=MICRO_BATCH)
    default = asdict(Layout())
    return " ".join(f"{name}={value}" for name, value in asdict(whole).items() if value != default[name]) or "one rank"


if __name__ == "__main__":
    sys.exit(main())
