"""What a study of activations found, as PNG pictures and CSV tables."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ssd_megatron.files import write_atomically
from ssd_megatron.study.activations import OTHER_SAMPLE, Look, similarities
from ssd_megatron.training.metrics import Record
from ssd_megatron.training.plots import draw_layers, mark_phases, new_figure, png
from ssd_megatron.training.series import GREY

_MOST_MATRICES = 8
_MOST_NUMBERED = 8  # checkpoints: a larger matrix has no room for numbers
_MOST_CURVES = 6  # checkpoints of which the distribution over neurons is drawn
_QUANTILES = np.linspace(0, 1, 101)


def write_study(out: Path, looks: Sequence[Look], records: Sequence[Record], chance: float) -> list[Path]:
    """Write all pictures and tables into a folder and return their paths.

    Args:
        looks: in the order of their steps.
        records: the run's metrics, for its phases.
        chance: overlap of the experts of two tokens if they were chosen at random.
    """
    matrices = [similarities(looks, layer) for layer in range(len(looks[0].layers))]
    files = {
        "active_neurons.png": png(draw_active(looks, records)),
        "neurons.png": png(draw_neurons(looks, records)),
        "structure.png": png(draw_structure(looks, matrices)),
        "expert_overlap.png": png(draw_overlap(looks, chance)),
        "layers.csv": _csv(("step", "layer", "active", "dead", "always_on"), _layer_rows(looks)),
        "neuron_rates.csv": _csv(("step", "layer", "quantile", "rate"), _rate_rows(looks)),
        "structure.csv": _csv(("layer", "step_a", "step_b", "similarity"), _structure_rows(looks, matrices)),
        "expert_overlap.csv": _csv(("step", "layer", "distance", "overlap"), _overlap_rows(looks)),
    }
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


def draw_active(looks: Sequence[Look], records: Sequence[Record]) -> Figure:
    """Share of active neurons of each layer over training."""
    figure, (axes,) = new_figure()
    draw_layers(axes, [look.step for look in looks], [[layer.active for layer in look.layers] for look in looks])
    axes.set(xlabel="step", ylabel="active")
    axes.set_title("Active neurons (share that fires on a token)", pad=14)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(bottom=0)
    mark_phases(axes, records)
    return figure


def draw_neurons(looks: Sequence[Look], records: Sequence[Record]) -> Figure:
    """How firing is spread over neurons, over training and by layer, and how many never or always fire."""
    figure, (spread, by_layer, dead, always) = new_figure(2, 2, size=(12, 8.5))
    chosen = _evenly(len(looks), _MOST_CURVES)
    for place in chosen:
        rates = np.concatenate([layer.rates.numpy() for layer in looks[place].layers])
        color = colormaps["plasma"](0.85 * place / max(1, len(looks) - 1))
        spread.plot(_QUANTILES, np.quantile(rates, 1 - _QUANTILES), color=color, label=f"step {looks[place].step}")
    spread.set_title("All layers, over training")
    spread.legend(fontsize=9)
    last = looks[-1]
    for number, layer in enumerate(last.layers):
        color = colormaps["viridis"](number / max(1, len(last.layers) - 1))
        by_layer.plot(_QUANTILES, np.quantile(layer.rates.numpy(), 1 - _QUANTILES), color=color)
    by_layer.set_title(f"Each layer, at step {last.step}")
    for axes in (spread, by_layer):
        axes.set(xlabel="neurons, the busiest first", ylabel="share of tokens it fires on")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    steps = [look.step for look in looks]
    draw_layers(dead, steps, [[layer.dead for layer in look.layers] for look in looks])
    draw_layers(always, steps, [[layer.always_on for layer in look.layers] for look in looks])
    dead.set_title("Dead: fire on no probe token", pad=14)
    always.set_title("Always on: fire on 99 % of them", pad=14)
    for axes in (dead, always):
        axes.set(xlabel="step", ylabel="neurons")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(bottom=0)
        mark_phases(axes, records)
    return figure


def draw_structure(looks: Sequence[Look], matrices: Sequence[list[list[float]]]) -> Figure:
    """Structure similarity between all checkpoints: the mean over layers, and some layers."""
    shown = _evenly(len(matrices), _MOST_MATRICES)
    named = [("mean of the layers", np.mean(matrices, axis=0))]
    named += [(f"layer {layer}", np.array(matrices[layer])) for layer in shown]
    columns = min(3, len(named))
    rows = -(-len(named) // columns)
    figure, all_axes = new_figure(rows, columns, size=(4 * columns, 3.7 * rows))
    labels = [str(look.step) for look in looks]
    ticks = _evenly(len(looks), 6)
    for axes, (title, matrix) in zip(all_axes, named, strict=False):
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", origin="lower")
        axes.set_title(title)
        axes.set_xticks(ticks, [labels[tick] for tick in ticks], rotation=45)
        axes.set_yticks(ticks, [labels[tick] for tick in ticks])
        axes.grid(visible=False)
        for (y, x), similarity in np.ndenumerate(matrix) if len(looks) <= _MOST_NUMBERED else ():
            color = "black" if similarity > 0.6 else "white"
            axes.text(x, y, f"{similarity:.2f}", ha="center", va="center", color=color, fontsize=8)
    for axes in all_axes[len(named) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=all_axes, label="structure similarity (adjusted Rand index)", shrink=0.6)
    figure.suptitle(
        "Which neurons fire together: similarity between checkpoints (steps)\n"
        "on the diagonal: of two clusterings of the same weights"
    )
    return figure


def draw_overlap(looks: Sequence[Look], chance: float) -> Figure:
    """Experts that two tokens have in common, over how far apart they are: over training, and by layer."""
    figure, (over_time, by_layer) = new_figure(1, 2, size=(12, 4.8))
    distances = list(looks[0].layers[0].overlap)
    names = ["other\nsample" if distance == OTHER_SAMPLE else str(distance) for distance in distances]
    places = range(len(distances))
    for place in _evenly(len(looks), _MOST_CURVES):
        means = np.mean([list(layer.overlap.values()) for layer in looks[place].layers], axis=0)
        color = colormaps["plasma"](0.85 * place / max(1, len(looks) - 1))
        over_time.plot(places, means, color=color, marker="o", ms=4, label=f"step {looks[place].step}")
    over_time.set_title("Mean of the layers, over training")
    last = looks[-1]
    for number, layer in enumerate(last.layers):
        color = colormaps["viridis"](number / max(1, len(last.layers) - 1))
        by_layer.plot(places, list(layer.overlap.values()), color=color, marker="o", ms=4, label=f"layer {number}")
    by_layer.set_title(f"Each layer, at step {last.step}")
    for axes in (over_time, by_layer):
        axes.axhline(chance, color=GREY, ls=":", label="chosen at random")
        axes.set_xticks(places, names)
        axes.set(xlabel="distance of the two tokens", ylabel="experts in common", ylim=(0, None))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    over_time.legend(fontsize=9)
    if len(last.layers) <= 2 * _MOST_CURVES:
        by_layer.legend(fontsize=9)
    return figure


def _layer_rows(looks: Sequence[Look]) -> Iterable[tuple[object, ...]]:
    for look in looks:
        for number, layer in enumerate(look.layers):
            yield look.step, number, layer.active, layer.dead, layer.always_on


def _rate_rows(looks: Sequence[Look]) -> Iterable[tuple[object, ...]]:
    for look in looks:
        for number, layer in enumerate(look.layers):
            for quantile, rate in zip(_QUANTILES, np.quantile(layer.rates.numpy(), _QUANTILES), strict=True):
                yield look.step, number, round(float(quantile), 2), float(rate)


def _structure_rows(
    looks: Sequence[Look], matrices: Sequence[Sequence[Sequence[float]]]
) -> Iterable[tuple[object, ...]]:
    for layer, matrix in enumerate(matrices):
        for a, row in zip(looks, matrix, strict=True):
            for b, similarity in zip(looks, row, strict=True):
                yield layer, a.step, b.step, similarity


def _overlap_rows(looks: Sequence[Look]) -> Iterable[tuple[object, ...]]:
    for look in looks:
        for number, layer in enumerate(look.layers):
            for distance, overlap in layer.overlap.items():
                yield look.step, number, "other sample" if distance == OTHER_SAMPLE else distance, overlap


def _csv(header: Sequence[str], rows: Iterable[tuple[object, ...]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
    return text.getvalue().encode()


def _evenly(count: int, most: int) -> list[int]:
    """At most that many of 0 to count - 1, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})
