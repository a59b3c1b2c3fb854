import math
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects
import pytest

from ssd_megatron.errors import DataError
from ssd_megatron.reporting.comparison import comparison_figures
from ssd_megatron.reporting.figures import Figure, run_figures
from ssd_megatron.reporting.run import AXES, Run, read_run, read_runs
from ssd_megatron.training.metrics import MetricsLog
from tests.reporting.runs import CHECK_SECONDS, EVAL_SECONDS, SAVE_SECONDS, SWITCH_SECONDS, TOKENS, loss_of, write_run

ALL = [
    "Loss",
    "FLOPs and time saved",
    "What the schedule watches",
    "Active neurons",
    "Structure similarity by layer",
    "Expert load",
    "Load of ranks",
    "Throughput",
    "Memory",
    "Gradient norm and learning rate",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(write_run(tmp_path_factory.mktemp("run")), "run")


@pytest.fixture(scope="module")
def figures(run: Run) -> dict[str, Figure]:
    return {figure.title: figure for figure in run_figures(run)}


def trace(figure: Figure, name: str) -> dict[str, Any]:
    (found,) = [trace for trace in figure.traces if trace["name"] == name]
    return found


def test_a_run_has_all_figures_and_plotly_knows_every_property(run: Run, figures: dict[str, Figure]) -> None:
    assert list(figures) == ALL
    for figure in [*figures.values(), *comparison_figures([run, run])]:
        for axis in AXES:
            traces = [trace | {"x": trace["x"][axis]} for trace in figure.traces]
            plotly.graph_objects.Figure(traces, figure.layout)  # refuses what it does not know


def test_a_point_stands_at_its_step_and_at_what_was_spent_by_then(figures: dict[str, Figure]) -> None:
    validation = trace(figures["Loss"], "validation, dense")
    assert validation["y"] == [3.1] * 10
    place = {axis: x[5] for axis, x in validation["x"].items()}
    between = 5 * (CHECK_SECONDS + EVAL_SECONDS + SAVE_SECONDS)  # those after step 120 come before step 121
    seconds = 100 * 0.5 + 20 * 0.25 + SWITCH_SECONDS + between
    assert place == {"step": 120, "tokens": 120 * TOKENS, "flops": 110e12, "seconds": seconds}


def test_losses_are_those_of_the_metrics_and_the_steep_part_is_left_out(figures: dict[str, Figure]) -> None:
    raw, smooth = trace(figures["Loss"], "each step"), trace(figures["Loss"], "training")
    assert raw["y"][9] == pytest.approx(loss_of(10)) and len(raw["y"]) == 200
    assert smooth["y"][99] == pytest.approx((loss_of(99) + loss_of(100) + loss_of(101)) / 3)
    low, high = figures["Loss"].layout["yaxis"]["range"]
    assert 2.9 < low < 3 and 3.4 < high < loss_of(10)


def test_phases_are_shaded_and_switches_marked(figures: dict[str, Figure]) -> None:
    for title in ALL:
        stretches = figures[title].stretches
        spans = [(stretch["mode"], stretch["start"]["step"], stretch["end"]["step"]) for stretch in stretches]
        assert spans == [("dense", 1, 100), ("sparse", 100, 150), ("dense", 150, 200)]
        assert [stretch["color"] is not None for stretch in stretches] == [False, True, False]
    switch = trace(figures["Loss"], "switch")
    assert switch["x"]["step"] == [100, 150]
    assert switch["text"] == ["to sparse in 1.00 s (stable)", "to dense in 1.00 s (stable)"]


def test_savings_count_checks_and_switches_as_loss(figures: dict[str, Figure]) -> None:
    flops, time = (trace(figures["FLOPs and time saved"], name)["y"] for name in ("FLOPs", "time"))
    assert flops[99] == 0 and flops[-1] == 0.125
    lost = 10 * CHECK_SECONDS + 2 * SWITCH_SECONDS
    alike = EVAL_SECONDS + SAVE_SECONDS  # each time, had all steps been dense
    all_dense = 200 * 0.5 + 10 * alike
    assert time[-1] == pytest.approx((50 * 0.25 - lost) / all_dense)
    # What follows step 100 is step 101's.
    assert time[99] == pytest.approx(-4 * CHECK_SECONDS / (100 * 0.5 + 4 * alike))


def test_heat_maps_have_a_row_per_layer_and_columns_that_end_at_their_check(figures: dict[str, Figure]) -> None:
    (active,) = figures["Active neurons"].traces
    assert active["x"]["step"] == [1, *range(20, 201, 20)]  # edges; no step is before the first
    assert active["z"] == [[0.3] * 10, [step / 1000 for step in range(20, 201, 20)]]
    assert (active["zmin"], active["zmax"]) == (0, 0.3)
    (similarity,) = figures["Structure similarity by layer"].traces
    assert similarity["x"]["step"] == list(range(20, 201, 20)) and similarity["z"] == [[0.85] * 9, [0.95] * 9]
    (homes,) = figures["Load of ranks"].traces
    assert homes["x"]["step"] == [100, 120, 140] and homes["z"] == [[1.5, 1.5], [1.0, 1.0]]


def test_a_heat_map_is_empty_between_two_sparse_phases(run: Run) -> None:
    again = [record | {"step": record["step"] + 60} for record in run.of("load")]
    records = sorted([*run.records, *again], key=lambda record: record["step"])
    figures = {figure.title: figure for figure in run_figures(Run("run", records, None, None, None))}
    (load,) = figures["Expert load"].traces
    assert load["x"]["step"] == [100, 120, 140, 160, 180, 200] and load["z"][0] == [2.0, 2.0, None, 2.0, 2.0]


def test_throughput_is_split_by_mode(figures: dict[str, Figure]) -> None:
    dense, sparse = (trace(figures["Throughput"], mode)["y"] for mode in ("dense", "sparse"))
    assert dense[99] == TOKENS / 0.5 and dense[100] is None
    assert sparse[99] is None and sparse[100] == TOKENS / 0.25


def test_what_was_not_recorded_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, steps=10, homes=1)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"peak_memory"', '"other"') + '{"step": 11, "kind": "tr')
    (tmp_path / "config.json").unlink()
    run = read_run(tmp_path, "run")
    assert [figure.title for figure in run_figures(run)] == ["Loss", "Throughput", "Gradient norm and learning rate"]
    assert (run.status, run.train_steps, run.last_step) == ("not ended", None, 10)


def test_time_saved_is_not_known_where_no_step_was_dense(tmp_path: Path) -> None:
    write_run(tmp_path, steps=110)
    records = [record for record in read_run(tmp_path, "run").records if record["step"] > 100]
    run = Run("run", records, None, None, None)
    (savings,) = [figure for figure in run_figures(run) if figure.title == "FLOPs and time saved"]
    assert [trace["name"] for trace in savings.traces] == ["FLOPs"]


def test_long_curves_are_thinned_to_averages(tmp_path: Path) -> None:
    template = {
        "mode": "dense",
        "tokens_per_second": 1.0,
        "seconds": 1.0,
        "grad_norm": 1.0,
        "lr": 1.0,
        "flops_dense": 1,
    }
    records = [
        {"kind": "train", "step": step, "loss": None if step % 4 else float(step), "flops": 1} | template
        for step in range(1, 6001)
    ]
    losses, *_ = run_figures(Run("run", records, None, None, None))
    raw = trace(losses, "each step")
    assert len(raw["y"]) == 1500
    assert raw["x"]["step"][:2] == [4, 8] and raw["y"][:2] == [4, 8]  # nothing known is averaged with what is not


def test_losses_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, steps=10), "run")
    run.train[4]["loss"] = None
    losses, *_ = run_figures(run)
    assert trace(losses, "each step")["y"][4] is None


def test_runs_are_compared_by_name(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=120)])
    losses, saved, speed = comparison_figures(runs)
    assert [trace["name"] for trace in losses.traces] == ["a", "a, validation", "b", "b, validation"]
    assert [trace["y"][-1] for trace in saved.traces] == [0.125, pytest.approx(1 - 110 / 120)]
    assert [trace["y"][-1] for trace in speed.traces] == [TOKENS / 0.5, TOKENS / 0.25]
    assert len({trace["line"]["color"] for trace in saved.traces}) == 2
    low, high = losses.layout["yaxis"]["range"]
    assert low < 3 and high < loss_of(10) and not math.isnan(low)


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / part / "run", steps=5) for part in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    MetricsLog(tmp_path, last_step=0).close()
    with pytest.raises(
        DataError, match=r"has no training step in its metrics\.jsonl yet: ask for its report when it has"
    ):
        read_run(tmp_path, "run")


def test_a_summary_of_earlier_steps_is_not_the_run_s_status(tmp_path: Path) -> None:
    write_run(tmp_path, steps=120)
    (tmp_path / "summary.json").write_text('{"status": "stopped", "steps": 100}')
    assert read_run(tmp_path, "run").status == "not ended"
    (tmp_path / "summary.json").write_text('{"status": "stopped", "steps": 120}')
    assert read_run(tmp_path, "run").status == "stopped"


def test_spent_is_one_number_per_step(run: Run) -> None:
    assert {len(values) for values in run.spent.axes.values()} == {200}
    assert np.all(np.diff(run.spent.axes["seconds"]) > 0)
