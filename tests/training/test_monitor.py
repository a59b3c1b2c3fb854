import csv
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from ssd_megatron.training.monitor import Monitor, layer_tag, scalars_of, silence_engine_events

TRAIN = {
    "loss": 3.5,
    "lr": 0.001,
    "grad_norm": 0.75,
    "mode": "sparse",
    "tokens_per_second": 1000.0,
    "seconds": 0.5,
    "flops": 300.0,
    "flops_dense": 400.0,
    "skipped": False,
}


@pytest.fixture(autouse=True)
def rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's monitor asks for its rank, and nothing else, of a process group, which these tests do without."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)


def make_master(folder: Path, *writers: str) -> MonitorMaster:
    files = {"enabled": True, "output_path": str(folder)}
    configs = {
        "tensorboard": files | {"job_name": "tensorboard"},
        "csv_monitor": files | {"job_name": "csv"},
        "wandb": {"enabled": True, "project": "p"},
    }
    return MonitorMaster(get_monitor_config({name: configs[name] for name in writers}))


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def scalar(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_scalars_are_read_back_from_tensorboard_over_steps(tmp_path: Path) -> None:
    monitor = Monitor(make_master(tmp_path, "tensorboard"))
    for step in (1, 2):
        monitor.record("train", step, **{**TRAIN, "loss": 3.5 - step})
    monitor.record("eval", 2, loss_dense=2.5, loss_sparse=None)
    monitor.close()
    events = read_events(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/tokens_per_second",
        "flops/spent",
        "flops/saved_fraction",
        "eval/loss_dense",
    }
    assert scalar(events, "train/loss") == [(1, 2.5), (2, 1.5)]
    assert scalar(events, "flops/saved_fraction") == [(1, 0.25), (2, 0.25)]
    assert scalar(events, "eval/loss_dense") == [(2, 2.5)]


def test_checks_and_loads_have_a_number_per_layer() -> None:
    check = {"similarity": 0.5, "similarity_layers": [0.25, 0.75], "overlap": None, "active_fraction": [0.125, 0.25]}
    assert scalars_of("check", check | {"stable": 1}) == {
        "ssd/similarity": 0.5,
        "ssd/similarity/layer_00": 0.25,
        "ssd/similarity/layer_01": 0.75,
        "ssd/active_fraction/layer_00": 0.125,
        "ssd/active_fraction/layer_01": 0.25,
    }
    first = {"similarity": None, "similarity_layers": None, "overlap": None, "active_fraction": [0.5], "stable": 0}
    assert scalars_of("check", first) == {"ssd/active_fraction/layer_00": 0.5}
    assert scalars_of("load", {"expert_load": [1.5]}) == {"expert_load/max_over_mean/layer_00": 1.5}
    assert scalars_of("switch", {"from": "dense", "to": "sparse"}) == {}
    assert layer_tag("expert_load/tokens", 12) == "expert_load/tokens/layer_12"


def test_text_histogram_and_figure_are_read_back_from_tensorboard(tmp_path: Path) -> None:
    monitor = Monitor(make_master(tmp_path, "tensorboard"))
    monitor.record("switch", 7, **{"from": "dense", "to": "sparse", "reason": "stable"})
    monitor.text(8, "note", "hello")
    monitor.histogram(9, "expert_load/tokens/layer_00", np.array([1.0, 2.0, 2.0, 5.0]))
    figure = Figure(figsize=(2, 1), dpi=100)
    figure.subplots().plot([0, 1])
    monitor.figures(10, lambda: {"loss": figure})
    monitor.close()
    events = read_events(tmp_path)
    (switch,) = events.Tensors("switch/text_summary")
    assert switch.step == 7 and switch.tensor_proto.string_val[0] == b"from: dense, to: sparse, reason: stable"
    assert events.Tensors("note/text_summary")[0].tensor_proto.string_val[0] == b"hello"
    (load,) = events.Histograms("expert_load/tokens/layer_00")
    value = load.histogram_value
    assert (load.step, value.min, value.max, value.num, value.sum) == (9, 1.0, 5.0, 4.0, 10.0)
    (image,) = events.Images("plots/loss")
    assert (image.step, image.width, image.height) == (10, 200, 100)
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_a_resume_leaves_no_step_twice_in_tensorboard(tmp_path: Path) -> None:
    for last_step, until, loss in ((0, 6, 1.0), (4, 8, 2.0)):
        monitor = Monitor(make_master(tmp_path, "tensorboard"))
        if last_step:
            monitor.resume(last_step)
        for step in range(last_step + 1, until + 1):
            monitor.scalars(step, {"train/loss": loss})
        monitor.close()
        monitor._writer.close()
        for path in (tmp_path / "tensorboard").iterdir():  # files are read in the order of their names, by time
            path.rename(path.with_name(path.name.replace("tfevents.", f"tfevents.{last_step}", 1)))
    assert scalar(read_events(tmp_path), "train/loss") == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 2),
        (6, 2),
        (7, 2),
        (8, 2),
    ]


def test_csv_files_get_the_scalars_and_nothing_else(tmp_path: Path) -> None:
    monitor = Monitor(make_master(tmp_path, "csv_monitor"))
    monitor.record("check", 20, similarity=0.5, similarity_layers=None, overlap=0.25, active_fraction=[0.125], stable=1)
    monitor.record("switch", 20, to="sparse")
    monitor.histogram(20, "h", [1.0])
    monitor.figures(20, lambda: pytest.fail("drawn for nobody"))
    monitor.resume(20)
    monitor.close()
    files = {path.name: list(csv.reader(path.open())) for path in (tmp_path / "csv").iterdir()}
    assert files == {
        "ssd_similarity.csv": [["step", "similarity"], ["20", "0.5"]],
        "ssd_overlap.csv": [["step", "overlap"], ["20", "0.25"]],
        "ssd_active_fraction_layer_00.csv": [["step", "layer_00"], ["20", "0.125"]],
    }


def test_wandb_gets_the_scalars_at_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, Any], int]] = []
    wandb = SimpleNamespace(
        init=lambda **options: None, log=lambda data, step, commit: logged.append((data, step)), __version__="0"
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monitor = Monitor(make_master(tmp_path, "wandb"))
    monitor.scalars(3, {"train/loss": 1.5, "train/lr": 0.5})
    monitor.text(3, "switch", "not for wandb")
    assert logged == [({"train/loss": 1.5}, 3), ({"train/lr": 0.5}, 3)]


def test_a_silenced_engine_does_not_stop_our_events(tmp_path: Path) -> None:
    master = make_master(tmp_path, "tensorboard")
    assert master.enabled is True
    silence_engine_events(master)
    assert master.enabled is False  # the engine writes nothing when this is false
    monitor = Monitor(master)
    monitor.scalars(1, {"train/loss": 2.0})
    monitor.close()
    assert scalar(read_events(tmp_path), "train/loss") == [(1, 2.0)]


def test_without_any_writer_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = Monitor(make_master(tmp_path))
    monitor.record("train", 1, **TRAIN)
    monitor.record("fault", 1, what="loss is nan")
    monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_charts_of_tensorboard_find_the_scalars_of_every_layer(tmp_path: Path) -> None:
    monitor = Monitor(make_master(tmp_path, "tensorboard"))
    monitor.close()
    (event,) = read_events(tmp_path).Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    tags = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    check = {"similarity": 0.5, "similarity_layers": [0.25, 0.75], "overlap": None, "active_fraction": [0.125, 0.25]}
    written = scalars_of("check", check)

    def found(title: str) -> list[str]:
        return [name for name in written if any(re.match(tag, name) for tag in tags[title])]

    assert found("structure similarity and expert overlap") == ["ssd/similarity"]
    assert found("structure similarity by layer") == [layer_tag("ssd/similarity", layer) for layer in (0, 1)]
    assert found("active neurons by layer") == [layer_tag("ssd/active_fraction", layer) for layer in (0, 1)]
