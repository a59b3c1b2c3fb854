"""How cost grows: times beside the law that they should follow.

    python -m benchmarks.scale [--quick] [--json FILE] [--plot PNG] [--only SWEEP ...]

A sweep changes one size. In one process: the feed-forward network (forward and backward) against experts, expert size,
tokens and hidden size, the training step against layers, tokens and hidden size; law: FLOPs. Switches against layers;
law: elements of the banks. On gloo ranks of one thread each, the work of a rank being the same: the step against ranks;
law: the step of one rank times ranks per core, plus the bytes that the planner says over the speed of a ring all-reduce
of these ranks.

The law passes through the smallest size. A row is measured / law at another size: above 1 cost grows faster than the
law, below 1 slower, as it does where fixed costs weigh at the smallest size.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, ScalarFormatter

from benchmarks.row import Row
from benchmarks.scale_sweeps import Sizes, Sweep, ffn_sweeps, rank_sweeps, step_sweeps, switch_sweep
from benchmarks.table import parser_for, report
from ssd_megatron.parallel.device import keep_freed_memory
from ssd_megatron.parallel.topology import Topology, initialize_topology, leave_topology

GOAL = 1.2  # measured / law

QUICK = Sizes(
    hidden=(128, 256),
    expert_size=(32, 64, 128),
    experts=(8, 16, 32),
    tokens=(512, 1024, 2048),
    layers=(1, 2, 4),
    ranks=(1, 2),
    switch_layers=(1, 2, 4),
    neurons=1024,
    turns=3,
)
FULL = Sizes(
    hidden=(128, 256, 512, 1024),
    expert_size=(16, 32, 64, 128, 256),
    experts=(8, 16, 32, 64, 128),
    tokens=(512, 1024, 2048, 4096, 8192),
    layers=(1, 2, 4, 8),
    ranks=(1, 2, 4, 8),
    switch_layers=(1, 2, 4, 8),
    neurons=2048,
    turns=7,
)
KINDS: dict[str, Callable[[Sizes, Topology], Iterator[Sweep]]] = {
    "ffn": ffn_sweeps,
    "step": step_sweeps,
    "switch": switch_sweep,
    "ranks": lambda sizes, _: rank_sweeps(sizes),
}


def rows(sweeps: Iterator[Sweep], kept: list[Sweep]) -> Iterator[Row]:
    """Every point of every sweep but the first; sweeps are kept for the plot."""
    for sweep in sweeps:
        kept.append(sweep)
        for point in sweep.points[1:]:
            yield Row(
                f"{sweep.what}, {sweep.size} {point.size}: measured / law",
                point.seconds / sweep.law(point),
                GOAL,
                1.0,
                details={"ms": point.seconds * 1e3, "law ms": sweep.law(point) * 1e3, **point.details},
            )


def draw(sweeps: list[Sweep], path: Path) -> None:
    """Measured times and laws; dense and sparse of the same sweep in one plot."""
    plots: dict[tuple[str, str], list[Sweep]] = {}
    for sweep in sweeps:
        plots.setdefault((sweep.what.removeprefix("dense ").removeprefix("sparse "), sweep.size), []).append(sweep)
    columns = min(4, len(plots))
    lines = -(-len(plots) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for (what, size), members in plots.items():
        axes = places.pop(0)
        for sweep in members:
            sizes = [point.size for point in sweep.points]
            color = "C0" if sweep.what.startswith("dense") else "C1"
            mode = sweep.what.partition(" ")[0]
            axes.plot(sizes, [point.seconds * 1e3 for point in sweep.points], "o-", color=color, label=mode)
            axes.plot(sizes, [sweep.law(point) * 1e3 for point in sweep.points], "--", color=color, alpha=0.6)
        axes.set(title=f"{what} against {size}", ylabel="ms", xscale="log", yscale="log")
        axes.set_xlabel(f"dashed: {members[0].law_in_words}", fontsize="small")
        axes.xaxis.set_major_locator(FixedLocator([point.size for point in members[0].points]))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_locator(NullLocator())
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom / 1.3, top * 1.3)
        axes.legend(fontsize="small")
    for axes in places:
        axes.axis("off")
    FigureCanvasAgg(figure).print_png(path)


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    sizes, sweeps = QUICK if arguments.quick else FULL, list[Sweep]()
    topology = initialize_topology()
    measured = (sweep for kind in arguments.only for sweep in KINDS[kind](sizes, topology))
    met = report("How cost grows", rows(measured, sweeps), arguments.json)
    if arguments.plot is not None:
        draw(sweeps, arguments.plot)
    leave_topology()
    return 0 if met else 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw measured times beside their laws")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="these sweeps alone")
    parser.add_argument("--threads", type=int, help="of the sweeps in one process")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
