"""Plots of a run, drawn from metrics.jsonl: while it runs, at its end, or later (tools/plot_run.py).

Only matplotlib's objects are used, not pyplot: nothing here changes the state of the process that draws.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from ssd_megatron.errors import DataError
from ssd_megatron.files import write_atomically
from ssd_megatron.training import series
from ssd_megatron.training.metrics import Record, read_metrics
from ssd_megatron.training.run_folder import read_written
from ssd_megatron.training.series import as_array, of_kind, smoothed, values_of

_SHADE = "#F6D9B8"
_MOST_MARKERS = 60


def draw_run(run_dir: Path) -> list[Path]:
    """Draw a run's plots into run_dir/plots and return their paths. Raises as `run_figures` does."""
    paths = []
    for name, figure in run_figures(run_dir).items():
        paths.append(run_dir / "plots" / f"{name}.png")
        write_atomically(paths[-1], png(figure))
    return paths


def run_figures(run_dir: Path) -> dict[str, Figure]:
    """A run's plots by name; what has no data yet is left out.

    Raises:
        DataError: the run has no step yet, or its metrics cannot be read.
    """
    records = read_metrics(run_dir)
    if not of_kind(records, "train"):
        raise DataError(f"{run_dir} has no training step in its metrics.jsonl yet: draw it when it has")
    figures = {"loss_over_steps": draw_loss_over_steps(records), "loss_over_flops": draw_loss_over_flops(records)}
    if of_kind(records, "check"):
        figures["ssd"] = draw_ssd(records, series.similarity_threshold(read_written(run_dir / "config.json")))
    return figures


def draw_loss_over_steps(records: Sequence[Record]) -> Figure:
    """Training and validation loss over steps."""
    figure, (axes,) = new_figure()
    x_of_step = _steps(records)
    _draw_losses(axes, records, x_of_step)
    mark_phases(axes, records, x_of_step)
    axes.set(xlabel="step")
    axes.set_title("Loss over steps", pad=14)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right", fontsize=9, framealpha=0.9)
    return figure


def draw_loss_over_flops(records: Sequence[Record]) -> Figure:
    """Training and validation loss over the FLOPs spent, and the same training losses had all steps been dense."""
    figure, (axes,) = new_figure()
    train = of_kind(records, "train")
    spent = {record["step"]: float(record["flops"]) for record in train}
    _draw_losses(axes, records, spent)
    losses = smoothed(values_of(train, "loss"))
    axes.plot(
        values_of(train, "flops_dense"),
        losses,
        color=series.GREY,
        lw=1.4,
        ls=":",
        zorder=1.5,
        label="training, at all-dense cost",
    )
    mark_phases(axes, records, spent)
    saved = 1 - train[-1]["flops"] / train[-1]["flops_dense"]
    axes.set(xlabel="training FLOPs")
    axes.set_title(f"Loss over FLOPs: {saved:.1%} saved against all-dense", pad=14)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend(loc="upper right", fontsize=9, framealpha=0.9)
    return figure


def draw_ssd(records: Sequence[Record], similarity_threshold: float | None) -> Figure:
    """What the schedule sees: the share of active neurons of each layer, and how alike the structure stays."""
    figure, (top, bottom) = new_figure(rows=2, size=(10, 7.5))
    bottom.sharex(top)
    checks = of_kind(records, "check")
    steps = [record["step"] for record in checks]
    draw_layers(top, steps, [check["active_fraction"] for check in checks])
    top.set(ylabel="active")
    top.set_title("Active neurons (share of the neurons that fire, per layer)", pad=14)
    top.yaxis.set_major_formatter(PercentFormatter(1))
    top.set_ylim(bottom=0)

    bottom.plot(
        steps, values_of(checks, "similarity"), color=series.DENSE, lw=2, marker="o", ms=4, label="structure similarity"
    )
    bottom.plot(
        steps, values_of(checks, "overlap"), color=series.GREEN, lw=1.4, marker="s", ms=3, label="top-k expert overlap"
    )
    if similarity_threshold is not None:
        bottom.axhline(
            similarity_threshold, color=series.SPARSE, ls="--", lw=1.4, label=f"threshold {similarity_threshold:g}"
        )
    bottom.set(xlabel="step", ylabel="similarity", ylim=(None, 1.02))
    bottom.set_title("Structure similarity between checks", pad=14)
    for axes in (top, bottom):
        mark_phases(axes, records)
    bottom.legend(loc="lower right", fontsize=9, framealpha=0.9)
    return figure


def draw_layers(axes: Axes, steps: Sequence[int], rows: Sequence[Sequence[float]]) -> None:
    """A curve for each layer, coloured by depth, with a scale beside the axes; `rows` are by step."""
    layers, colours = len(rows[0]), colormaps["viridis"]
    last = max(1, layers - 1)
    for layer in range(layers):
        values = as_array([row[layer] for row in rows])
        axes.plot(steps, values, color=colours(layer / last), lw=1.6, marker=".", ms=5, label=f"layer {layer}")
    depth = ScalarMappable(Normalize(0, last), colours)
    axes.figure.colorbar(depth, ax=axes, label="layer", pad=0.01, ticks=MaxNLocator(integer=True))


def _draw_losses(axes: Axes, records: Sequence[Record], x_of_step: dict[int, float]) -> None:
    """Draw training loss, raw and smoothed, and validation loss in both modes."""
    x = np.array(list(x_of_step.values()))
    losses = values_of(of_kind(records, "train"), "loss")
    smooth = smoothed(losses)
    axes.plot(x, losses, color=series.TRAIN, lw=0.5, alpha=0.5)
    axes.plot(x, smooth, color=series.TRAIN, lw=2, label="training")
    evals = [record for record in of_kind(records, "eval") if record["step"] in x_of_step]
    x_eval = np.array([x_of_step[record["step"]] for record in evals])
    curves = [(x, smooth)]
    for mode, color, line, marker in (("dense", series.DENSE, "-", "o"), ("sparse", series.SPARSE, "--", "s")):
        values = values_of(evals, f"loss_{mode}")
        curves.append((x_eval, values))
        if np.isfinite(values).any():
            marker = marker if len(evals) <= _MOST_MARKERS else ""
            axes.plot(x_eval, values, color=color, lw=1.6, ls=line, marker=marker, ms=4, label=f"validation, {mode}")
    axes.set_ylabel("loss (nats per token)")
    visible = series.settled_range(losses, curves)
    if visible is not None:
        axes.set_ylim(*visible)


def mark_phases(axes: Axes, records: Sequence[Record], x_of_step: Mapping[int, float] | None = None) -> None:
    """Shade the sparse phases, and mark each switch with a line and a triangle on top: down to sparse, up to dense.

    Args:
        x_of_step: where each step stands; at its own number without it.
    """
    x_of_step = _steps(records) if x_of_step is None else x_of_step
    labelled = set()

    def once(label: str) -> str:
        """The label for the first of its kind; matplotlib leaves out of the legend what begins with "_"."""
        is_new = label not in labelled
        labelled.add(label)
        return label if is_new else f"_{label}"

    for number, phase in enumerate(series.phase_stretches(records)):
        start, end = x_of_step[phase.start_step], x_of_step[phase.end_step]
        if phase.mode == "sparse":
            axes.axvspan(start, end, color=_SHADE, alpha=0.6, lw=0, zorder=0.5, label=once("sparse phase"))
        if number > 0:  # every phase but the first begins with a switch
            marker, color = ("v", series.SPARSE) if phase.mode == "sparse" else ("^", series.DENSE)
            axes.axvline(start, color=series.GREY, lw=0.6, alpha=0.7, zorder=0.6)
            axes.plot(
                start,
                1.015,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                marker=marker,
                color=color,
                ms=7,
                ls="",
                label=once(f"switch to {phase.mode}"),
            )


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (10, 5.6)) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row."""
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each in axes:
        style(each)
    return figure, axes


def style(axes: Axes) -> None:
    axes.grid(color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _steps(records: Sequence[Record]) -> dict[int, float]:
    """The x-axis of steps: each step at its own number."""
    return {record["step"]: float(record["step"]) for record in of_kind(records, "train")}
