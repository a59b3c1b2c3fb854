"""Figures of several runs together."""

from collections.abc import Sequence

import numpy as np

from ssd_megatron.reporting.figures import Figure
from ssd_megatron.reporting.run import Run
from ssd_megatron.reporting.traces import line, points
from ssd_megatron.training.series import DENSE, GREEN, GREY, SPARSE, TRAIN, settled_range, smoothed, values_of

_COLORS = (DENSE, SPARSE, GREEN, "#CC79A7", "#E69F00", TRAIN, GREY, "#F0E442")


def comparison_figures(runs: Sequence[Run]) -> list[Figure]:
    """The same numbers of several runs in one figure each."""
    losses, savings, speeds = [], [], []
    curves = []
    for number, run in enumerate(runs):
        color = _COLORS[number % len(_COLORS)]
        smooth = smoothed(values_of(run.train, "loss"))
        curves.append((run.spent.axes["step"], smooth))
        losses.append(line(run, run.spent.axes["step"], smooth, name=run.name, color=color, legendgroup=run.name))
        evals = run.of("eval")
        if evals:
            trace = points(run, evals, "loss_dense", name=f"{run.name}, validation", color=color)
            losses.append(trace | {"legendgroup": run.name, "showlegend": False})
            curves.append((values_of(evals, "step"), values_of(evals, "loss_dense")))
        savings.append(line(run, run.spent.axes["step"], run.flops_saved, name=run.name, color=color))
        speed = np.nansum(list(run.speeds.values()), axis=0)  # each step has one mode
        speeds.append(line(run, run.spent.axes["step"], speed, name=run.name, color=color))
    ranges = [settled_range(y, [(x, y)]) for x, y in curves]
    shown = [limits for limits in ranges if limits is not None]
    vertical = {"range": [min(low for low, _ in shown), max(high for _, high in shown)]} if shown else {}
    return [
        Figure(
            "Loss",
            "Training loss, smoothed; markers: dense loss on the validation samples",
            losses,
            {"yaxis": {"title": "loss (nats per token)"} | vertical},
        ),
        Figure("FLOPs saved", "Against the same steps, all dense", savings, {"yaxis": {"tickformat": ".0%"}}),
        Figure(
            "Throughput", "Tokens per second, smoothed", speeds, {"yaxis": {"rangemode": "tozero", "tickformat": "~s"}}
        ),
    ]
