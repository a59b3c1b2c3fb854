"""Every split with every router and several shares of the neurons: what they keep of the dense model."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ssd_megatron.moefication.allocation import Allocation, deal_out
from ssd_megatron.moefication.conversion import Workshop
from ssd_megatron.moefication.experts import set_mode, set_top_k, use
from ssd_megatron.moefication.layers import Router, recall_of
from ssd_megatron.moefication.splits import SPLITS, Split
from ssd_megatron.moefication.task import Quality
from ssd_megatron.training.plots import new_figure

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
COLORS = {"oracle": "#555555", "mlp": "#1f77b4", "similarity": "#2ca02c", "random": "#d62728"}


@dataclass(frozen=True)
class Point:
    """One split with one router and one number of experts.

    Attributes:
        top_k: experts, mean over layers.
        share: of the neurons that a token computes.
        recall: mean share of the activation mass that its experts have.
        seconds_over_dense: time of the whole model on the held-out data, once, over the dense model's median of three.
    """

    split: Split
    router: Router
    top_k: int
    share: float
    loss: float
    accuracy: float | None
    recall: float
    seconds_over_dense: float

    def record(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    workshop: Workshop,
    num_experts: int,
    allocation: Allocation,
    splits: Sequence[Split] = SPLITS,
    shares: Sequence[float] = SHARES,
) -> tuple[Quality, list[Point]]:
    """The dense model's quality, and every point. The model's neurons end up in another order, its function does not
    change."""
    task = workshop.task
    found = {split: workshop.split(split, num_experts) for split in splits}
    numbers = sorted({max(1, round(share * num_experts)) for share in shares})
    bar = workshop.progress.add_task("measuring", total=len(splits) * len(workshop.routers) * len(numbers))
    dense = task.evaluate()  # and warm up
    dense_seconds = statistics.median(_timed(workshop)[1] for _ in range(3))
    points: list[Point] = []
    for split in splits:
        for router in workshop.routers:
            use(task.ffns, found[split], router)
            dealt = deal_out(task, workshop.saved.settings.model, num_experts, numbers, allocation)
            set_mode(task.ffns, "sparse")
            for number, top_k in zip(numbers, dealt, strict=True):
                set_top_k(task.ffns, top_k)
                quality, seconds = _timed(workshop)
                recall = statistics.mean(recall_of(found[split], router, top_k))
                share, ratio = number / num_experts, seconds / dense_seconds
                points.append(Point(split, router, number, share, quality.loss, quality.accuracy, recall, ratio))
                workshop.progress.update(bar, advance=1)
    set_mode(task.ffns, "dense")
    return dense, points


def compared(dense: Quality, points: Sequence[Point]) -> Table:
    """Quality by share of the neurons, a row for each split and router; accuracy kept where there is one, else loss."""
    numbers = sorted({(point.share, point.top_k) for point in points})
    what = "loss" if dense.accuracy is None else "accuracy, share of the dense model's"
    columns = [f"{share:.0%}" for share, _ in numbers]
    title = f"{what} by share of neurons; {_shown(dense)}"
    result = Table("split", "router", *columns, "recall, 20 %", title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for split, router in dict.fromkeys((point.split, point.router) for point in points):
        row = {point.top_k: point for point in points if (point.split, point.router) == (split, router)}
        cells = [_cell(row[top_k], dense) for _, top_k in numbers]
        near = min(row.values(), key=lambda point: abs(point.share - 0.2))
        result.add_row(split, router, *cells, f"{near.recall:.3f}")
    return result


def draw(dense: Quality, points: Sequence[Point]) -> Figure:
    """Quality and recall over the share of the neurons, a column for each split."""
    splits = list(dict.fromkeys(point.split for point in points))
    figure, axes = new_figure(2, len(splits), size=(4.6 * len(splits), 7.5))
    shown = [_value(dense), *(_value(point) for point in points if point.router != "random")]
    margin = 0.05 * (max(shown) - min(shown))
    for column, split in enumerate(splits):
        quality, recall = axes[column], axes[len(splits) + column]
        for router, color in COLORS.items():
            line = [point for point in points if (point.split, point.router) == (split, router)]
            shares = [point.share for point in line]
            quality.plot(shares, [_value(point) for point in line], marker="o", ms=3, color=color, label=router)
            recall.plot(shares, [point.recall for point in line], marker="o", ms=3, color=color)
        quality.axhline(_value(dense), color="black", lw=0.8, ls="--", label="dense")
        quality.set(title=split, ylabel="loss" if dense.accuracy is None else "accuracy")
        quality.set_ylim(min(shown) - margin, max(shown) + margin)  # a random choice may lie outside
        recall.set(xlabel="share of the neurons", ylabel="share of the activation", ylim=(0, 1.02))
        for one in (quality, recall):
            one.xaxis.set_major_formatter(PercentFormatter(1))
    axes[0].legend(fontsize=9)
    return figure


def _timed(workshop: Workshop) -> tuple[Quality, float]:
    started = time.perf_counter()
    return workshop.task.evaluate(), time.perf_counter() - started


def _value(quality: Quality | Point) -> float:
    return quality.loss if quality.accuracy is None else quality.accuracy


def _cell(point: Point, dense: Quality) -> str:
    if point.accuracy is None or dense.accuracy is None:
        return f"{point.loss:.4f}"
    return f"{point.accuracy / dense.accuracy:.1%}"


def _shown(dense: Quality) -> str:
    return f"dense loss {dense.loss:.4f}" + ("" if dense.accuracy is None else f", accuracy {dense.accuracy:.1%}")
