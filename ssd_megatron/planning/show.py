"""Plans as tables (for the console and in Markdown) and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import rich.console
from rich.table import Table as RichTable

from ssd_megatron.planning.cluster import GIB, GIGA
from ssd_megatron.planning.recommend import Job, Plan
from ssd_megatron.planning.traffic import off_node, seconds


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", self._line(self.columns), "|---" * len(self.columns) + "|"]
        return "\n".join([*lines, *(self._line(row) for row in self.rows), ""])

    def show(self, console: rich.console.Console) -> None:
        console.print(self.title)
        table = RichTable(*self.columns)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    @staticmethod
    def _line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"


def overview(job: Job, plans: Sequence[Plan]) -> Table:
    """One line for each plan."""
    columns = (
        "TP",
        "PP",
        "EP",
        "DP",
        "microbatches",
        "ZeRO",
        "recompute",
        "gather",
        "GiB",
        "dense s",
        "sparse s",
        "mean s",
    )
    rows = []
    for plan in plans:
        layout = plan.layout
        sizes = (layout.tensor, layout.pipeline, layout.expert, layout.data)
        times = [f"{plan.seconds[mode].total:.3f}" if mode in plan.seconds else "-" for mode in ("dense", "sparse")]
        rows.append(
            (
                *(str(size) for size in sizes),
                f"{layout.microbatches} x {layout.micro_batch_size}",
                str(layout.zero_stage),
                "full" if layout.recompute else "none",
                "-" if layout.expert == 1 else "step" if layout.gather_once else "microbatch",
                f"{plan.memory.total / GIB:.1f}" + ("" if plan.fits else " (too much)"),
                *times,
                f"{plan.mean_seconds:.3f}",
                "-" if plan.mfu is None else f"{plan.mfu:.1%}",
                "-" if plan.switch is None else f"{plan.switch.total:.1f}",
            )
        )
    cluster = job.cluster
    title = (
        f"{job.tokens:,} tokens a step on {cluster.gpus} GPUs, {cluster.gpus_per_node} a node, of "
        f"{cluster.usable_bytes / GIB:.1f} GiB to use"
    )
    return Table(title, (*columns, "MFU dense", "switch s"), rows)


def details(job: Job, plan: Plan) -> list[Table]:
    """Memory, bytes and times of one plan."""
    return [_memory(plan), *(_traffic(job, plan, mode) for mode in plan.traffic), _times(plan), *_switch(plan)]


def as_json(job: Job, plans: Sequence[Plan]) -> dict[str, Any]:
    """Everything of the plans as plain values, bytes and seconds."""
    return {
        "cluster": asdict(job.cluster),
        "batch": job.batch,
        "dtype": job.dtype,
        "plans": [
            asdict(plan)
            | {
                "memory_total": plan.memory.total,
                "step_seconds": {mode: time.total for mode, time in plan.seconds.items()},
            }
            for plan in plans
        ],
    }


def name_of(plan: Plan) -> str:
    layout = plan.layout
    return f"TP {layout.tensor} x PP {layout.pipeline} x DP {layout.data}, EP {layout.expert}"


def _memory(plan: Plan) -> Table:
    rows = [(part, f"{size / GIB:.2f}") for part, size in vars(plan.memory).items()]
    return Table(f"{name_of(plan)}: memory of the fullest rank", ("part", "GiB"), [*rows, ("peak", _gib(plan))])


def _gib(plan: Plan) -> str:
    return f"{plan.memory.total / GIB:.2f}" + ("" if plan.fits else " (does not fit)")


def _traffic(job: Job, plan: Plan, mode: str) -> Table:
    rows = [
        (
            transfer.group,
            transfer.what,
            transfer.collective,
            str(transfer.times),
            f"{transfer.step_bytes / GIGA:.3f}",
            f"{off_node(transfer, plan.layout, job.cluster) * transfer.times / GIGA:.3f}",
            f"{seconds(transfer, plan.layout, job.cluster) * transfer.times:.4f}",
        )
        for transfer in plan.traffic[mode]
    ]
    columns = ("group", "what", "collective", "times", "GB", "of it off the node", "seconds")
    return Table(f"{name_of(plan)}: sent by the busiest rank in a {mode} step", columns, rows)


def _times(plan: Plan) -> Table:
    parts = [(mode, vars(time), time.total) for mode, time in plan.seconds.items()]
    rows = [(part, *(f"{times[part]:.4f}" for _, times, _ in parts)) for part in parts[0][1]]
    rows.append(("all", *(f"{total:.4f}" for _, _, total in parts)))
    return Table(f"{name_of(plan)}: seconds of a step", ("part", *(mode for mode, _, _ in parts)), rows)


def _switch(plan: Plan) -> list[Table]:
    if plan.switch is None:
        return []
    switch = plan.switch
    rows = [(part, f"{getattr(switch, part):.2f}") for part in ("clustering", "transfer", "probe", "total")]
    sent = f"{switch.bytes_moved / GIGA:.3f} GB sent by each rank"
    return [Table(f"{name_of(plan)}: seconds of a switch to sparse ({sent})", ("part", "seconds"), rows)]
