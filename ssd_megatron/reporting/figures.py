"""Figures of a report as plain data: Plotly's traces and layout, before the page gives them colours of text and grid.

Every figure is drawn over the progress of a run, on any of its axes (traces.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssd_megatron.reporting.run import Run
from ssd_megatron.reporting.traces import Trace, heat_map, line, points, x_of
from ssd_megatron.switching.schedule import PhaseSpan
from ssd_megatron.training.series import (
    DENSE,
    GREEN,
    GREY,
    SPARSE,
    TRAIN,
    phase_stretches,
    settled_range,
    similarity_threshold,
    smoothed,
    values_of,
)

_IN_THE_BACK: dict[str, Any] = {"hoverinfo": "skip", "showlegend": False}
_SHADE = "rgba(213, 94, 0, 0.13)"


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        title, note: its heading, and what one sees in it.
        traces: Plotly's, with an x per axis.
        layout: Plotly's, without what all figures have alike.
        stretches: phases, shaded and separated by lines, each with `mode`, `start` and `end`, an x per axis.
    """

    title: str
    note: str
    traces: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    stretches: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"traces": self.traces, "layout": self.layout, "stretches": self.stretches}


def run_figures(run: Run) -> list[Figure]:
    """What is there to see of one run; figures of what it has not recorded are left out."""
    drawn = (
        _losses(run),
        _savings(run),
        _structure(run),
        _layer_map(run, "check", "active_fraction", "Active neurons", "Share of the neurons that fire", _SHARES),
        _layer_map(
            run,
            "check",
            "similarity_layers",
            "Structure similarity by layer",
            "How alike the partitions of a layer are at a check and the one before (adjusted Rand index)",
            _SIMILARITIES,
        ),
        _layer_map(
            run,
            "load",
            "expert_load",
            "Expert load",
            "Tokens of the busiest expert over the mean of its layer; 1 is even",
            _LOADS,
        ),
        _home_loads(run),
        _throughput(run),
        _memory(run),
        _gradients(run),
    )
    return [figure for figure in drawn if figure is not None]


def _losses(run: Run) -> Figure:
    steps, losses = run.spent.axes["step"], values_of(run.train, "loss")
    smooth = smoothed(losses)
    curves = [(steps, smooth)]
    traces = [
        line(run, steps, losses, name="each step", color=TRAIN, width=0.7, opacity=0.5, **_IN_THE_BACK),
        line(run, steps, smooth, name="training", color=TRAIN, width=2.5),
    ]
    evals = run.of("eval")
    for mode, color, dash, symbol in (("dense", DENSE, "solid", "circle"), ("sparse", SPARSE, "dash", "square")):
        values = values_of(evals, f"loss_{mode}")
        if np.isfinite(values).any():
            curves.append((values_of(evals, "step"), values))
            trace = points(run, evals, f"loss_{mode}", name=f"validation, {mode}", color=color, dash=dash)
            traces.append(trace | {"marker": {"symbol": symbol, "size": 6}})
    layout: dict[str, Any] = {"yaxis": {"title": "loss (nats per token)"}}
    limits = settled_range(losses, curves)
    if limits is not None:
        layout["yaxis"]["range"] = list(limits)
    switches = run.of("switch")
    if switches:
        traces.append(_switch_marks(run, switches))
        layout["yaxis2"] = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    return _figure(
        run,
        "Loss",
        "Training, smoothed (thin: each step), and the fixed validation samples in both modes",
        traces,
        layout,
    )


def _switch_marks(run: Run, switches: Sequence[Mapping[str, Any]]) -> Trace:
    """Triangles at the top: down to sparse, up to dense. A switch stands where the step before it ended."""
    to_sparse = [switch["to"] == "sparse" for switch in switches]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "switch",
        "x": x_of(run, values_of(switches, "step") - 1),
        "y": [0.97] * len(switches),
        "yaxis": "y2",
        "text": [f"to {switch['to']} in {switch['seconds']:.2f} s ({switch['reason']})" for switch in switches],
        "hovertemplate": "%{text}<extra>switch</extra>",
        "marker": {
            "symbol": ["triangle-down" if sparse else "triangle-up" for sparse in to_sparse],
            "color": [SPARSE if sparse else DENSE for sparse in to_sparse],
            "size": 11,
        },
    }


def _savings(run: Run) -> Figure | None:
    """None for a run that never was sparse: there is nothing to save."""
    if all(record["mode"] == "dense" for record in run.train):
        return None
    saved = run.spent.saved_seconds
    traces = [
        line(run, run.spent.axes["step"], run.flops_saved, name="FLOPs", color=GREEN),
        line(run, run.spent.axes["step"], saved / (run.spent.axes["seconds"] + saved), name="time", color=SPARSE),
    ]
    return _figure(
        run,
        "FLOPs and time saved",
        "Against the same steps all dense: sparse steps against the median dense one, less checks and switches",
        traces if np.isfinite(saved).any() else traces[:1],
        {"yaxis": {"tickformat": ".0%", "rangemode": "tozero"}},
    )


def _structure(run: Run) -> Figure | None:
    checks = [check for check in run.of("check") if check["similarity"] is not None]
    if not checks:
        return None
    traces = [
        points(run, checks, "similarity", name="structure similarity", color=DENSE),
        points(run, checks, "overlap", name="expert overlap", color=GREEN),
    ]
    threshold = similarity_threshold(run.config)
    if threshold is not None:
        ends = run.spent.axes["step"][[0, -1]]
        traces.append(line(run, ends, np.full(2, threshold), name="threshold", color=SPARSE, dash="dash"))
    return _figure(
        run,
        "What the schedule watches",
        "How alike the partitions of consecutive checks are, mean over layers; share of a token's experts that stayed",
        traces,
    )


_SHARES = {"colorscale": "Viridis", "zmin": 0, "colorbar": {"tickformat": ".0%", "thickness": 14}}
_SIMILARITIES = {"colorscale": "Viridis", "zmin": 0, "zmax": 1, "colorbar": {"thickness": 14}}
_LOADS = {"colorscale": "Cividis", "zmin": 1, "colorbar": {"thickness": 14}}


def _layer_map(run: Run, kind: str, name: str, title: str, note: str, colors: Mapping[str, Any]) -> Figure | None:
    """Heat map over layers and steps of what records of a kind have by layer, where they have it."""
    records = [record for record in run.of(kind) if record[name]]
    if not records:
        return None
    return _heat_map(run, values_of(records, "step"), [record[name] for record in records], title, note, colors)


def _home_loads(run: Run) -> Figure | None:
    """None where one rank has all experts."""
    loads = [record for record in run.of("load") if len(record["home_load"][0]) > 1]
    if not loads:
        return None
    ratios = [[max(layer) * len(layer) / max(1, sum(layer)) for layer in record["home_load"]] for record in loads]
    note = "Tokens of the busiest of the ranks that share the experts over their mean; 1 is even"
    return _heat_map(run, values_of(loads, "step"), ratios, "Load of ranks", note, _LOADS)


def _heat_map(
    run: Run, steps: np.ndarray, rows: Sequence[Sequence[float]], title: str, note: str, colors: Mapping[str, Any]
) -> Figure:
    layers = len(rows[0])
    layout = {"yaxis": {"title": "layer", "dtick": max(1, layers // 8)}, "hovermode": "closest"}
    return _figure(run, title, note, [heat_map(run, steps, rows, colors)], layout)


def _throughput(run: Run) -> Figure:
    steps, speeds = run.spent.axes["step"], values_of(run.train, "tokens_per_second")
    raw = line(run, steps, speeds, name="each step", color=GREY, width=0.7, opacity=0.5, **_IN_THE_BACK)
    colors = {"dense": DENSE, "sparse": SPARSE}
    by_mode = [
        line(run, steps, smooth, name=mode, color=colors[mode], width=2.5) for mode, smooth in run.speeds.items()
    ]
    traces = [raw, *by_mode]
    layout = {"yaxis": {"title": "tokens/s", "rangemode": "tozero", "tickformat": "~s"}}
    return _figure(
        run,
        "Throughput",
        "Tokens per second of all ranks, smoothed (thin: each step), without checks and switches",
        traces,
        layout,
    )


def _memory(run: Run) -> Figure | None:
    records = [record for record in run.train if record.get("peak_memory") is not None]
    if not records:
        return None
    trace = line(
        run, values_of(records, "step"), values_of(records, "peak_memory"), name="peak of rank 0", color="#CC79A7"
    )
    layout = {"yaxis": {"title": "bytes", "rangemode": "tozero", "tickformat": "~s"}}
    note = "The most that rank 0 has held so far: device memory, on a CPU its process"
    return _figure(run, "Memory", note, [trace], layout)


def _gradients(run: Run) -> Figure:
    steps = run.spent.axes["step"]
    traces = [
        line(run, steps, values_of(run.train, "grad_norm"), name="gradient norm", color=TRAIN, width=1),
        line(run, steps, values_of(run.train, "lr"), name="learning rate", color=GREEN) | {"yaxis": "y2"},
    ]
    layout = {
        "yaxis": {"title": "gradient norm", "type": "log"},
        "yaxis2": {
            "title": "learning rate",
            "type": "linear",
            "tickmode": "auto",
            "overlaying": "y",
            "side": "right",
            "rangemode": "tozero",
            "showgrid": False,
        },
    }
    return _figure(run, "Gradient norm and learning rate", "The norm is before clipping", traces, layout)


def _figure(run: Run, title: str, note: str, traces: list[Trace], layout: dict[str, Any] | None = None) -> Figure:
    """With the phases of the run."""
    return Figure(title, note, traces, layout or {}, [_stretch(run, phase) for phase in phase_stretches(run.records)])


def _stretch(run: Run, phase: PhaseSpan) -> dict[str, Any]:
    ends = x_of(run, np.array([phase.start_step, phase.end_step], dtype=np.float64))
    start, end = ({axis: values[i] for axis, values in ends.items()} for i in (0, 1))
    return {"mode": phase.mode, "start": start, "end": end, "color": _SHADE if phase.mode == "sparse" else None}
