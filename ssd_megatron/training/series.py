"""Numbers of a run as arrays, and what every drawing of them needs alike, whatever draws it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssd_megatron.switching.schedule import PhaseSpan
from ssd_megatron.training.metrics import Record, phases_of

# Okabe and Ito's palette: told apart by colour-blind readers too.
TRAIN, DENSE, SPARSE, GREY, GREEN = "#56B4E9", "#0072B2", "#D55E00", "#808080", "#009E73"

_SMOOTHING = 100  # the smoothed curve averages over this part of the run: 1 / 100
_STEEP_PART = 0.1  # of the run: the vertical range is chosen for what comes after


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def values_of(records: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return as_array([record[name] for record in records])


def as_array(values: Sequence[float | None]) -> np.ndarray:
    """float64, null as nan, which drawings leave out."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Average over a centred window of 1 / _SMOOTHING of the run, leaving out what is nan."""
    half = len(values) // (2 * _SMOOTHING)
    window = np.ones(2 * half + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(np.float64), window, mode="same")
    average: np.ndarray = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)
    return average


def settled_range(raw: np.ndarray, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float] | None:
    """Vertical range for losses: the steep fall of the first steps leaves the picture at the top.

    Args:
        raw: values that must not leave it at the bottom.
        curves: x and y of each; the last x of the first is the run's last.
    Returns:
        None if no value after the steep part is known.
    """
    start = curves[0][0][-1] * _STEEP_PART
    shown = np.concatenate([y[x >= start] for x, y in curves])
    if not np.isfinite(shown).any():
        return None
    low, high = float(np.nanmin(np.concatenate([raw, shown]))), float(np.nanmax(shown))
    margin = max(0.05 * (high - low), 1e-3)
    return low - margin, high + margin


def phase_stretches(records: Sequence[Record]) -> list[PhaseSpan]:
    """The phases of a run for shading: each but the first starts at the last step of the one before, without a gap."""
    stretches: list[PhaseSpan] = []
    for phase in phases_of(records):
        start = stretches[-1].end_step if stretches else phase.start_step
        stretches.append(PhaseSpan(start, phase.end_step, phase.mode))
    return stretches


def similarity_threshold(config: Mapping[str, Any] | None) -> float | None:
    """The threshold the schedule of a run goes by, of its resolved config."""
    if config is None:
        return None
    ssd = config["ssd_megatron"]["ssd"]
    return float(ssd["similarity_threshold"]) if ssd["schedule"] == "adaptive" else None
