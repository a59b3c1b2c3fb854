import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from ssd_megatron.errors import DataError
from ssd_megatron.training.metrics import MetricsLog, Record, read_metrics
from ssd_megatron.training.plots import draw_loss_over_flops, draw_loss_over_steps, draw_run, draw_ssd

TOOL = Path(__file__).parents[2] / "tools" / "plot_run.py"


def mode_of(step: int) -> str:
    return "sparse" if 101 <= step <= 150 else "dense"


def loss_of(step: int) -> float:
    return 3 + 6 * math.exp(-step / 10)


def make_run(run_dir: Path, steps: int = 200, evals: bool = True, checks: bool = True) -> list[Record]:
    """A run with one sparse phase (steps 101 to 150) at half the FLOPs; step 180 is skipped for a loss of nan."""
    log = MetricsLog(run_dir, last_step=0)
    flops = 0.0
    for step in range(1, steps + 1):
        flops += 1e12 if mode_of(step) == "dense" else 0.5e12
        loss = math.nan if step == 180 else loss_of(step)
        log.write("train", step, loss=loss, mode=mode_of(step), flops=flops, flops_dense=step * 1e12)
        if evals and step % 20 == 0:
            log.write("eval", step, loss_dense=3.1, loss_sparse=3.4 if step > 100 else None)
        if checks and step % 10 == 0:
            known = None if step == 10 else 0.9
            log.write("check", step, similarity=known, overlap=known, active_fraction=[0.3, step / 1000])
    log.close()
    return read_metrics(run_dir)


def curve(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def labels(axes: Axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def shaded(axes: Axes) -> list[tuple[float, float]]:
    return [
        (patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches if isinstance(patch, Rectangle)
    ]


def is_drawn(path: Path) -> bool:
    pixels = imread(path)
    return pixels.shape[0] > 500 and pixels.shape[1] > 1000 and bool(pixels.std() > 0.05)


def test_draw_run_writes_three_pictures(tmp_path: Path) -> None:
    make_run(tmp_path)
    paths = draw_run(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "plots/loss_over_steps.png",
        "plots/loss_over_flops.png",
        "plots/ssd.png",
    ]
    assert all(is_drawn(path) for path in paths)
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)


def test_loss_over_steps_shows_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    axes = draw_loss_over_steps(make_run(tmp_path)).axes[0]
    assert labels(axes) == [
        "training",
        "validation, dense",
        "validation, sparse",
        "sparse phase",
        "switch to sparse",
        "switch to dense",
    ]
    x, raw = (np.asarray(data, dtype=float) for data in axes.get_lines()[0].get_data())
    assert x.tolist() == list(range(1, 201))
    assert raw[0] == loss_of(1) and np.isnan(raw[179]) and np.isnan(raw).sum() == 1
    x, smooth = curve(axes, "training")
    assert smooth[100] == pytest.approx((loss_of(100) + loss_of(101) + loss_of(102)) / 3)
    assert smooth[179] == pytest.approx((loss_of(179) + loss_of(181)) / 2)  # the skipped step is bridged
    assert smooth[0] == pytest.approx((loss_of(1) + loss_of(2)) / 2)
    x, sparse = curve(axes, "validation, sparse")
    assert x.tolist() == list(range(20, 201, 20))
    assert np.isnan(sparse[:5]).all() and sparse[5:].tolist() == [3.4] * 5
    assert shaded(axes) == [(100.0, 150.0)]
    assert curve(axes, "switch to sparse")[0].tolist() == [100] and curve(axes, "switch to dense")[0].tolist() == [150]


def test_the_picture_shows_the_settled_part_and_every_late_evaluation(tmp_path: Path) -> None:
    axes = draw_loss_over_steps(make_run(tmp_path)).axes[0]
    low, high = axes.get_ylim()
    assert 2.9 < low < loss_of(200) and 3.4 < high < 4


def test_loss_over_flops_has_the_all_dense_cost_beside_it(tmp_path: Path) -> None:
    axes = draw_loss_over_flops(make_run(tmp_path)).axes[0]
    x, smooth = curve(axes, "training")
    x_dense, same = curve(axes, "training, at all-dense cost")
    assert x[-1] == 175e12 and x_dense[-1] == 200e12
    assert same.tolist() == smooth.tolist()
    assert axes.get_title() == "Loss over FLOPs: 12.5% saved against all-dense"
    assert shaded(axes) == [(100e12, 125e12)]
    assert curve(axes, "validation, dense")[0][-1] == 175e12


def test_ssd_shows_every_layer_and_the_threshold(tmp_path: Path) -> None:
    top, bottom = draw_ssd(make_run(tmp_path), similarity_threshold=0.85).axes[:2]
    assert curve(top, "layer 0")[1].tolist() == [0.3] * 20
    x, last_layer = curve(top, "layer 1")
    assert x.tolist() == list(range(10, 201, 10)) and last_layer[-1] == 0.2
    similarity = curve(bottom, "structure similarity")[1]
    assert np.isnan(similarity[0]) and similarity[1:].tolist() == [0.9] * 19
    assert curve(bottom, "threshold 0.85")[1].tolist() == [0.85, 0.85]
    assert shaded(top) == shaded(bottom) == [(100.0, 150.0)]


def test_a_second_sparse_phase_is_named_once_in_the_legend() -> None:
    modes = ["sparse", "dense", "sparse", "dense"]
    records: list[Record] = [
        {"step": step, "kind": "train", "loss": 3.0, "mode": mode} for step, mode in enumerate(modes, start=1)
    ]
    axes = draw_loss_over_steps(records).axes[0]
    assert shaded(axes) == [(1.0, 1.0), (2.0, 3.0)]
    assert labels(axes) == ["training", "sparse phase", "switch to dense", "switch to sparse"]


def config(schedule: str) -> dict[str, Any]:
    return {"ssd_megatron": {"ssd": {"schedule": schedule, "similarity_threshold": 0.7}}}


@pytest.mark.parametrize(("schedule", "threshold"), [("adaptive", 0.7), ("fixed", None)])
def test_the_threshold_is_the_one_of_the_run_s_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, threshold: float | None
) -> None:
    make_run(tmp_path, steps=20)
    (tmp_path / "config.json").write_text(json.dumps(config(schedule)))
    seen = []

    def spy(records: list[Record], similarity_threshold: float | None) -> Figure:
        seen.append(similarity_threshold)
        return draw_ssd(records, similarity_threshold)

    monkeypatch.setattr("ssd_megatron.training.plots.draw_ssd", spy)
    draw_run(tmp_path)
    assert seen == [threshold]


def test_a_running_job_without_checks_and_evaluations_is_drawn(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1, evals=False, checks=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "kind": "tr')
    paths = draw_run(tmp_path)
    assert [path.stem for path in paths] == ["loss_over_steps", "loss_over_flops"]
    assert all(is_drawn(path) for path in paths)
    assert labels(draw_loss_over_steps(read_metrics(tmp_path)).axes[0]) == ["training"]


def test_a_run_without_a_finite_loss_is_drawn() -> None:
    records: list[Record] = [{"step": 1, "kind": "train", "loss": None, "mode": "dense"}]
    assert np.isnan(curve(draw_loss_over_steps(records).axes[0], "training")[1]).all()


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    MetricsLog(tmp_path, last_step=0).close()
    with pytest.raises(DataError, match=r"has no training step in its metrics\.jsonl yet: draw it when it has"):
        draw_run(tmp_path)


def run_tool(monkeypatch: pytest.MonkeyPatch, *run_dirs: Path) -> int | str | None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, run_dirs)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(TOOL), run_name="__main__")
    return exit_.value.code


def test_plot_run_draws_every_run_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, steps=20, checks=False)
    assert run_tool(monkeypatch, tmp_path / "a", tmp_path / "b") == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 4 and all(is_drawn(path) for path in printed)


def test_plot_run_names_a_folder_that_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, tmp_path / "none") == 2
    assert f"error: {tmp_path / 'none'} has no metrics.jsonl" in capsys.readouterr().err
