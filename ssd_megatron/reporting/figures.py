"""Figures of a report as plain data: Plotly's traces and layout, before the page gives them colours of text and grid.

Every figure is drawn over the progress of a run. Wherever Plotly wants an x there is an object with one per axis of
AXES; the page takes those of the axis that its reader has chosen (page.js).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssd_megatron.reporting.run import AXES, Run
from ssd_megatron.switching.schedule import PhaseSpan
from ssd_megatron.training.series import (
    DENSE,
    GREEN,
    GREY,
    SPARSE,
    TRAIN,
    as_array,
    phase_stretches,
    settled_range,
    similarity_threshold,
    smoothed,
    values_of,
)

RUN_COLORS = (DENSE, SPARSE, GREEN, "#CC79A7", "#E69F00", TRAIN, GREY, "#F0E442")
_IN_THE_BACK = {"hoverinfo": "skip", "showlegend": False}
_SHADE = "rgba(213, 94, 0, 0.13)"
_MOST_POINTS = 1_500  # of a curve: more cannot be seen, and make the page slow
_MOST_COLUMNS = 500  # of a heat map
_MOST_MARKERS = 60
_DIGITS = 7

Trace = dict[str, Any]


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


def comparison_figures(runs: Sequence[Run]) -> list[Figure]:
    """The same numbers of several runs in one figure each."""
    losses, savings, speeds = [], [], []
    curves = []
    for number, run in enumerate(runs):
        color = RUN_COLORS[number % len(RUN_COLORS)]
        smooth = smoothed(values_of(run.train, "loss"))
        curves.append((run.spent.axes["step"], smooth))
        losses.append(_line(run, run.spent.axes["step"], smooth, name=run.name, color=color, legendgroup=run.name))
        evals = run.of("eval")
        if evals:
            trace = _points(run, evals, "loss_dense", name=f"{run.name}, validation", color=color)
            losses.append(trace | {"legendgroup": run.name, "showlegend": False})
            curves.append((values_of(evals, "step"), values_of(evals, "loss_dense")))
        savings.append(_line(run, run.spent.axes["step"], _flops_saved(run), name=run.name, color=color))
        speed = np.nansum(list(_speeds(run).values()), axis=0)  # each step has one mode
        speeds.append(_line(run, run.spent.axes["step"], speed, name=run.name, color=color))
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
        Figure("Throughput", "Tokens per second, smoothed", speeds, {"yaxis": {"rangemode": "tozero"}}),
    ]


def _losses(run: Run) -> Figure:
    steps, losses = run.spent.axes["step"], values_of(run.train, "loss")
    smooth = smoothed(losses)
    curves = [(steps, smooth)]
    traces = [
        _line(run, steps, losses, name="each step", color=TRAIN, width=0.7, opacity=0.5, **_IN_THE_BACK),
        _line(run, steps, smooth, name="training", color=TRAIN, width=2.5),
    ]
    evals = run.of("eval")
    for mode, color, dash, symbol in (("dense", DENSE, "solid", "circle"), ("sparse", SPARSE, "dash", "square")):
        values = values_of(evals, f"loss_{mode}")
        if np.isfinite(values).any():
            curves.append((values_of(evals, "step"), values))
            trace = _points(run, evals, f"loss_{mode}", name=f"validation, {mode}", color=color, dash=dash)
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
        "x": _x(run, values_of(switches, "step") - 1),
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
        _line(run, run.spent.axes["step"], _flops_saved(run), name="FLOPs", color=GREEN),
        _line(run, run.spent.axes["step"], saved / (run.spent.axes["seconds"] + saved), name="time", color=SPARSE),
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
        _points(run, checks, "similarity", name="structure similarity", color=DENSE),
        _points(run, checks, "overlap", name="expert overlap", color=GREEN),
    ]
    threshold = similarity_threshold(run.config)
    if threshold is not None:
        ends = run.spent.axes["step"][[0, -1]]
        traces.append(_line(run, ends, np.full(2, threshold), name="threshold", color=SPARSE, dash="dash"))
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
    """Rows by step; layers go up. A column reaches back to the one before, but not over a stretch without records."""
    every = -(-len(rows) // _MOST_COLUMNS)
    steps, columns = steps[::every], [as_array(row) for row in rows[::every]]
    width = np.median(np.diff(steps)) if len(steps) > 1 else steps[0]
    edges, cells = [max(0.0, steps[0] - width)], []
    for step, column in zip(steps, columns, strict=True):
        start = max(edges[-1], step - width)
        if start > edges[-1]:
            edges.append(start)
            cells.append(np.full_like(column, np.nan))
        edges.append(step)
        cells.append(column)
    values = np.stack(cells, axis=1)
    trace = {
        "type": "heatmap",
        "x": _x(run, np.array(edges)),
        "y": list(range(len(values))),
        "z": [_numbers(layer) for layer in values],
        "hovertemplate": "until %{x}, layer %{y}: %{z:.3f}<extra></extra>",
        # Plotly heeds a lower bound only with an upper one.
        "zmax": float(f"{np.nanmax(values):.{_DIGITS}g}"),
        **colors,
    }
    layout = {"yaxis": {"title": "layer", "dtick": max(1, len(values) // 8)}, "hovermode": "closest"}
    return _figure(run, title, note, [trace], layout)


def _throughput(run: Run) -> Figure:
    steps, speeds = run.spent.axes["step"], values_of(run.train, "tokens_per_second")
    raw = _line(run, steps, speeds, name="each step", color=GREY, width=0.7, opacity=0.5, **_IN_THE_BACK)
    colors = {"dense": DENSE, "sparse": SPARSE}
    by_mode = [
        _line(run, steps, smooth, name=mode, color=colors[mode], width=2.5) for mode, smooth in _speeds(run).items()
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
    trace = _line(
        run, values_of(records, "step"), values_of(records, "peak_memory"), name="peak of rank 0", color="#CC79A7"
    )
    layout = {"yaxis": {"title": "bytes", "rangemode": "tozero", "tickformat": "~s"}}
    note = "The most that rank 0 has held so far: device memory, on a CPU its process"
    return _figure(run, "Memory", note, [trace], layout)


def _gradients(run: Run) -> Figure:
    steps = run.spent.axes["step"]
    traces = [
        _line(run, steps, values_of(run.train, "grad_norm"), name="gradient norm", color=TRAIN, width=1),
        _line(run, steps, values_of(run.train, "lr"), name="learning rate", color=GREEN) | {"yaxis": "y2"},
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
    ends = _x(run, np.array([phase.start_step, phase.end_step], dtype=np.float64))
    start, end = ({axis: values[i] for axis, values in ends.items()} for i in (0, 1))
    return {"mode": phase.mode, "start": start, "end": end, "color": _SHADE if phase.mode == "sparse" else None}


def _line(
    run: Run,
    steps: np.ndarray,
    values: np.ndarray,
    *,
    name: str,
    color: str,
    width: float = 2,
    dash: str = "solid",
    **more: Any,
) -> Trace:
    steps, values = _thinned(steps, values)
    line = {"color": color, "width": width, "dash": dash}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": _x(run, steps),
        "y": _numbers(values),
        "line": line,
        **more,
    }


def _points(run: Run, records: Sequence[Mapping[str, Any]], value: str, **style: Any) -> Trace:
    """A line with a marker at each record, if they are not too many."""
    trace = _line(run, values_of(records, "step"), values_of(records, value), **style)
    return trace | {"mode": "lines+markers"} if len(records) <= _MOST_MARKERS else trace


def _x(run: Run, steps: np.ndarray) -> dict[str, list[float | None]]:
    found = run.spent.at(steps)
    return {axis: _numbers(found[axis]) for axis in AXES}


def _flops_saved(run: Run) -> np.ndarray:
    saved: np.ndarray = 1 - values_of(run.train, "flops") / values_of(run.train, "flops_dense")
    return saved


def _speeds(run: Run) -> dict[str, np.ndarray]:
    """Tokens per second by mode, smoothed over steps of the same mode; nan where the run was in the other."""
    speeds = values_of(run.train, "tokens_per_second")
    is_sparse = np.array([record["mode"] == "sparse" for record in run.train])
    modes = {"dense": ~is_sparse, "sparse": is_sparse}
    return {
        mode: np.where(mine, smoothed(np.where(mine, speeds, np.nan)), np.nan)
        for mode, mine in modes.items()
        if mine.any()
    }


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages over neighbours, each at the last of their steps, where there are more than can be seen."""
    size = -(-len(values) // _MOST_POINTS)
    if size <= 1:
        return steps, values
    starts = np.arange(0, len(values), size)
    known = np.isfinite(values)
    count = np.add.reduceat(known.astype(np.float64), starts)
    total = np.add.reduceat(np.where(known, values, 0.0), starts)
    means = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return steps[np.minimum(starts + size, len(steps)) - 1], means


def _numbers(values: np.ndarray) -> list[float | None]:
    """For JSON, with as many digits as can be seen; nan is null, a gap."""
    return [float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]
