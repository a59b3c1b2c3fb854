"""What figures are made of: curves and heat maps as Plotly's traces, plain data of a size that a page can bear.

Wherever Plotly wants an x there is an object with one per axis of AXES; the page takes those of the axis that its
reader has chosen (page.js).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssd_megatron.reporting.run import AXES, Run
from ssd_megatron.training.series import as_array, values_of

Trace = dict[str, Any]

_MOST_POINTS = 1_500  # of a curve: more cannot be seen, and make the page slow
_MOST_COLUMNS = 500  # of a heat map
_MOST_MARKERS = 60
_DIGITS = 7


def line(
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
    """A curve over steps; `more` are properties of Plotly's trace."""
    steps, values = _thinned(steps, values)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x_of(run, steps),
        "y": _numbers(values),
        "line": {"color": color, "width": width, "dash": dash},
        **more,
    }


def points(run: Run, records: Sequence[Mapping[str, Any]], value: str, **style: Any) -> Trace:
    """A line with a marker at each record, if they are not too many."""
    trace = line(run, values_of(records, "step"), values_of(records, value), **style)
    return trace | {"mode": "lines+markers"} if len(records) <= _MOST_MARKERS else trace


def x_of(run: Run, steps: np.ndarray) -> dict[str, list[float | None]]:
    """Where steps stand on each axis."""
    found = run.spent.at(steps)
    return {axis: _numbers(found[axis]) for axis in AXES}


def heat_map(run: Run, steps: np.ndarray, rows: Sequence[Sequence[float]], colors: Mapping[str, Any]) -> Trace:
    """Rows by step as columns; layers go up. A column reaches back to the one before, but not over a stretch without
    records.

    Args:
        colors: Plotly's scale, and its limits where they are given.
    """
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
    return {
        "type": "heatmap",
        "x": x_of(run, np.array(edges)),
        "y": list(range(len(values))),
        "z": [_numbers(layer) for layer in values],
        "hovertemplate": "until %{x}, layer %{y}: %{z:.3f}<extra></extra>",
        # Plotly heeds a lower bound only with an upper one.
        "zmax": float(f"{np.nanmax(values):.{_DIGITS}g}"),
        **colors,
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
