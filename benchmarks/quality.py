"""What do models lose that compute a share of their neurons: one trained with SSD, and one trained dense and MoEfied?

    python -m benchmarks.quality [--out runs/quality] [--steps 800] [--seed 1] [--json FILE] [--quick]
    python -m benchmarks.quality --dense RUN --ssd RUN

Trains the arms `dense` and `ssd` of benchmarks.ssd_vs_dense, unless runs of equal model, data and steps are given. The
dense model gets as many experts as the SSD model has, by clustering, and routers by similarity and by a trained MLP
(MoEfication, arXiv 2110.01786): as many in every layer, as there, and dealt out among layers by what they save, as SSD
does. The SSD model keeps its own. A row is the loss on the validation text at one share of the neurons over the same
model's dense loss. quality.png, loss above the own dense loss, goes to --out. What is finished is not done again: a
stopped benchmark goes on.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import Progress

from benchmarks.row import Row
from benchmarks.runs import make_embedded_corpus
from benchmarks.ssd_vs_dense import LOSS_FLOOR, run_arm, run_folder
from benchmarks.table import parser_for, report
from ssd_megatron.config.load import FREE_TO_CHANGE
from ssd_megatron.errors import ConfigError
from ssd_megatron.files import write_atomically
from ssd_megatron.inference.load import layer_top_k
from ssd_megatron.moefication.comparison import compare
from ssd_megatron.moefication.conversion import Workshop
from ssd_megatron.moefication.experts import set_mode, use
from ssd_megatron.moefication.layers import Router
from ssd_megatron.moefication.task import LanguageTask
from ssd_megatron.parallel.topology import Topology, initialize_topology, leave_topology
from ssd_megatron.switching.allocation import Curve, allocate_experts, sparsity_costs
from ssd_megatron.training.exit_status import exit_status
from ssd_megatron.training.model_alone import load_alone
from ssd_megatron.training.plots import new_figure, png
from ssd_megatron.training.saved_model import SavedModel, open_model

ROUTERS: tuple[Router, ...] = ("similarity", "mlp")
BATCH = 16  # samples evaluated together
SEQ_LENGTH = 128
LINEAR_BELOW = 0.01  # nats, on the plot's logarithmic axis


@dataclass(frozen=True)
class Line:
    """A model with a router: its loss run dense, and run sparse by share of the neurons that a token computes."""

    name: str
    dense: float
    sparse: Mapping[float, float]


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for(__doc__)
    parser.add_argument("--dense", type=Path, metavar="RUN", help="a dense run (default: one is made)")
    parser.add_argument("--ssd", type=Path, metavar="RUN", help="a run with SSD (default: one is made)")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--steps", type=int, default=800, help="of the runs that are made (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=65536, help="on which networks are observed")
    parser.add_argument("--eval_tokens", type=int, default=65536, help="of the validation text")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of runs; processes that make routers")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.tokens, arguments.eval_tokens = 50, 4096, 4096
        arguments.out /= "quick"
    met: list[bool] = []
    return exit_status(lambda: met.append(_main(arguments))) or int(not all(met))


def _main(arguments: Namespace) -> bool:
    out = arguments.out.resolve()
    dense, ssd = (open_model(getattr(arguments, arm) or _trained(arm, out, arguments)) for arm in ("dense", "ssd"))
    check_pair(dense, ssd)
    topology = initialize_topology()
    lines = [*moefied_lines(dense, ssd.settings.ssd.num_experts, out, arguments, topology)]
    lines.append(ssd_line(ssd, list(lines[0].sparse), _task(ssd, out, arguments, topology)))
    leave_topology()
    write_atomically(out / "quality.png", png(draw(lines)))
    return report("loss by share of the neurons", rows(lines), arguments.json)


def _trained(arm: str, out: Path, arguments: Namespace) -> Path:
    make_embedded_corpus()
    run_arm(out, arm, arguments.seed, arguments.steps, arguments.threads, SEQ_LENGTH)
    return run_folder(out, arm, arguments.seed)


def check_pair(dense: SavedModel, ssd: SavedModel) -> None:
    """Raises ConfigError unless the two are a dense model and one with experts, trained alike."""
    if dense.settings.has_experts:
        raise ConfigError(f'--dense ({dense.folder}) has formed experts: give a run with ssd.schedule "dense"')
    if not ssd.settings.has_experts:
        raise ConfigError(
            f"--ssd ({ssd.folder}) has never formed experts: give a run that has switched, or more --steps"
        )
    for saved in (dense, ssd):
        if saved.data is None:
            raise ConfigError(f"{saved.folder} does not say what it was trained on: give a run")
    one, other = (saved.index.values["identity"] | {"steps": saved.index.step} for saved in (dense, ssd))
    differing = [
        f"{field} ({one.get(field)}, {other.get(field)})"
        for field in sorted(one.keys() | other.keys())
        if not field.startswith("ssd.") and field not in FREE_TO_CHANGE and one.get(field) != other.get(field)
    ]
    if differing:
        raise ConfigError(
            f"--dense and --ssd must be equal in {', '.join(differing)}: give runs that were trained alike"
        )


def moefied_lines(
    dense: SavedModel, num_experts: int, out: Path, arguments: Namespace, topology: Topology
) -> Iterator[Line]:
    """The dense model with experts by clustering, a line for each router."""
    with Progress(console=Console(stderr=True)) as progress:
        workshop = Workshop(
            dense,
            _task(dense, out, arguments, topology),
            out / "moefied",
            ROUTERS,
            tokens=arguments.tokens,
            seed=arguments.seed,
            processes=arguments.threads,
            progress=progress,
        )
        level, points = compare(workshop, num_experts, splits=("clustering",))
        layers = workshop.split("clustering", num_experts)
    numbers = sorted({p.top_k for p in points})
    for router in ROUTERS:
        yield Line(f"MoEfied, {router}", level.loss, {p.share: p.loss for p in points if p.router == router})
        use(workshop.task.ffns, layers, router, 1)
        costs = layer_costs(workshop.task, num_experts)
        dealt = {number / num_experts: allocate_experts(costs, number, least=1) for number in numbers}
        sparse = {share: loss_with(workshop.task, top_k) for share, top_k in dealt.items()}
        yield Line(f"MoEfied, {router}, dealt out", level.loss, sparse)


def layer_costs(task: LanguageTask, num_experts: int) -> list[Curve]:
    """What a training batch's loss rises by when one network alone is sparse, as a switch measures it."""
    batch = next(task.batches())
    probe = SimpleNamespace(loss=torch.no_grad()(lambda: task.forward_backward(batch)))
    set_mode(task.ffns, "dense")
    return sparsity_costs(SimpleNamespace(names=list(task.ffns), local=task.ffns), probe, num_experts, least=1)


def loss_with(task: LanguageTask, top_k: Sequence[int]) -> float:
    """On the validation text, with so many experts by layer."""
    set_mode(task.ffns, "sparse")
    for ffn, number in zip(task.ffns.values(), top_k, strict=True):
        ffn.router.top_k = number
    return task.evaluate().loss


def ssd_line(ssd: SavedModel, shares: Iterable[float], task: LanguageTask) -> Line:
    """The model with its own experts and router; layers share the neurons out as its last switch did."""
    settings = ssd.settings
    every = settings.ssd.num_experts
    level = task.evaluate()
    dealt = [layer_top_k(settings, round(share * every)) for share in shares]
    sparse = {sum(top_k) / len(top_k) / every: loss_with(task, top_k) for top_k in dealt}
    trained = sum(settings.top_k) / len(settings.top_k) / every
    return Line(f"SSD with {trained:.0%} in sparse phases", level.loss, sparse)


def _task(saved: SavedModel, out: Path, arguments: Namespace, topology: Topology) -> LanguageTask:
    assert saved.data is not None
    return LanguageTask(
        load_alone(saved, topology),
        saved.settings.model,
        saved.data,
        out / "data_cache",
        seed=arguments.seed,
        tokens=arguments.tokens,
        steps=0,
        batch_size=BATCH,
        held_out_tokens=arguments.eval_tokens,
    )


def rows(lines: Iterable[Line]) -> Iterator[Row]:
    for line in lines:
        for share, loss in line.sparse.items():
            name = f"{line.name}, {share:.0%} of the neurons: loss / dense"
            yield Row(name, loss / line.dense, 1 + LOSS_FLOOR, 1.0, details={"loss": loss, "dense": line.dense})


def draw(lines: Iterable[Line]) -> Figure:
    """Loss above the own dense loss over the share of the neurons."""
    figure, (axes,) = new_figure(size=(8, 5))
    least = 0.0
    for line in lines:
        above = [loss - line.dense for loss in line.sparse.values()]
        least = min(least, *above)
        axes.plot(list(line.sparse), above, marker="o", ms=4, label=f"{line.name} (dense {line.dense:.3f})")
    axes.axhline(0, color="black", lw=0.8, ls="--", label="dense")
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.set_ylim(bottom=1.2 * least - LINEAR_BELOW / 10)
    axes.set(xlabel="share of the neurons that a token computes", ylabel="validation loss above dense, nats")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main())
