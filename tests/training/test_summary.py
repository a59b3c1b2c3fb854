import json
import math
from pathlib import Path
from typing import Any

import pytest

from ssd_megatron.training.metrics import MetricsLog
from ssd_megatron.training.summary import build_summary, print_summary, write_summary

CONFIG = {"ssd_megatron": {"ssd": {"schedule": "adaptive"}, "training": {"train_steps": 12}}}
SWITCH = {"seconds": 0.5, "bytes_moved": 64, "loss_before": 3.25, "loss_after": 3.25, "loss_sparse": 3.5}


def write_steps(log: MetricsLog, first: int, last: int, mode: str, seconds: float = 2.0) -> None:
    for step in range(first, last + 1):
        spent = 100.0 * min(step, 4) + 40.0 * max(0, min(step - 4, 4)) + 100.0 * max(0, step - 8)
        log.write(
            "train",
            step,
            loss=math.nan if step == 9 else 5.0 - step / 4,
            grad_norm=1.0,
            lr=0.1,
            mode=mode,
            tokens_per_second=(100.0 if mode == "dense" else 300.0) + (step if step > 1 else -99),  # a slow first step
            seconds=seconds,
            flops=spent * 1e9,
            flops_dense=step * 100e9,
            skipped=step == 9,
        )


def make_run(run_dir: Path) -> None:
    """12 steps, sparse from 5 to 8, which cost 40 % there; killed at 10 and resumed from 8."""
    log = MetricsLog(run_dir, last_step=0)
    write_steps(log, 1, 4, "dense")
    log.write("eval", 4, loss_dense=3.5, loss_sparse=None, seconds=0.25)
    log.write("switch", 4, **{"from": "dense", "to": "sparse"}, **SWITCH, reason="stable", similarity=[0.9])
    write_steps(log, 5, 8, "sparse", seconds=1.0)
    write_steps(log, 9, 10, "sparse")
    log.close()
    log = MetricsLog(run_dir, last_step=8)
    log.write("resume", 8, checkpoint="checkpoints/step_8")
    log.write("switch", 9, **{"from": "sparse", "to": "dense"}, **SWITCH, reason="share used", similarity=None)
    write_steps(log, 9, 12, "dense")
    log.write("fault", 9, what="loss is nan")
    log.write("eval", 12, loss_dense=2.5, loss_sparse=2.75, seconds=0.75)
    log.write("save", 12, seconds=4.0)
    log.close()


def summarise(run_dir: Path) -> dict[str, Any]:
    state = {"status": "finished", "steps": 12, "tokens": 12_345_678}
    return build_summary(run_dir, config=CONFIG, versions={"torch": "2.13.0"}, state=state)


def test_the_summary_is_computed_from_the_metrics(tmp_path: Path) -> None:
    make_run(tmp_path)
    summary = summarise(tmp_path)
    switches = summary.pop("switches")
    saved = summary.pop("flops_saved_fraction")
    assert saved == pytest.approx(0.2)
    assert [(switch["step"], switch["from"], switch["to"], switch["reason"]) for switch in switches] == [
        (4, "dense", "sparse", "stable"),
        (9, "sparse", "dense", "share used"),
    ]
    assert summary == {
        "status": "finished",
        "steps": 12,
        "tokens": 12_345_678,
        "train_steps": 12,
        "schedule": "adaptive",
        "loss_dense": 2.5,
        "loss_sparse": 2.75,
        "eval_step": 12,
        "loss_train": pytest.approx(sum(5.0 - step / 4 for step in range(1, 13) if step != 9) / 11),
        "phases": [
            {"start_step": 1, "end_step": 4, "mode": "dense"},
            {"start_step": 5, "end_step": 8, "mode": "sparse"},
            {"start_step": 9, "end_step": 12, "mode": "dense"},
        ],
        "masks": None,
        "flops": 960e9,
        "flops_dense": 1200e9,
        "seconds": 4 * 2.0 + 4 * 1.0 + 4 * 2.0 + 2 * 0.5 + 0.25 + 0.75 + 4.0,  # steps, switches, evaluations, save
        "tokens_per_second": {"dense": 106.5, "sparse": 306.5},
        "skipped_steps": 1,
        "faults": [{"step": 9, "what": "loss is nan"}],
        "resumes": 1,
        "versions": {"torch": "2.13.0"},
    }


def test_a_run_that_stopped_before_its_first_step_has_a_summary(tmp_path: Path) -> None:
    MetricsLog(tmp_path, last_step=0).close()
    summary = summarise(tmp_path)
    assert summary["loss_dense"] is None and summary["loss_train"] is None and summary["phases"] == []
    assert summary["flops_saved_fraction"] == 0.0 and summary["tokens_per_second"] == {"dense": None, "sparse": None}


def test_summary_json_holds_the_summary(tmp_path: Path) -> None:
    make_run(tmp_path)
    summary = summarise(tmp_path)
    for _ in range(2):  # the second replaces the first
        write_summary(tmp_path, summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]


def test_a_summary_that_is_no_json_leaves_the_old_one(tmp_path: Path) -> None:
    write_summary(tmp_path, {"status": "stopped"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_summary(tmp_path, {"status": "finished", "loss_dense": math.nan})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "stopped"}


def test_the_printed_summary_says_what_happened_and_where_things_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    run_dir = tmp_path / ("long_" * 20) / "my run"
    make_run(run_dir)
    print_summary(summarise(run_dir), run_dir)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    assert rows[:3] == [
        ["1 - 4", "dense", "", ""],
        ["5 - 8", "sparse", "0.50 s", "3.2500 -> 3.2500"],
        ["9 - 12", "dense", "0.50 s", "3.2500 -> 3.2500"],
    ]
    assert dict(rows[3:]) == {
        "steps": "12 of 12",
        "validation loss, dense": "2.5000",
        "validation loss, sparse": "2.7500",
        "FLOPs spent": "960G (20.0% saved against 1.2T all-dense)",
        "tokens": "12.3M",
        "training time": "0:00:26",
        "tokens/s, dense": "106",
        "tokens/s, sparse": "306",
        "steps skipped (not finite)": "1",
    }
    lines = out.splitlines()
    assert f"TensorBoard  tensorboard --logdir '{run_dir}/tensorboard'" in lines  # to be pasted into a shell
    assert f"plots        {run_dir}/plots" in lines
    assert f"checkpoints  {run_dir}/checkpoints" in lines


def test_what_was_never_measured_is_printed_as_a_dash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MetricsLog(tmp_path, last_step=0).close()
    print_summary(summarise(tmp_path), tmp_path)
    out = capsys.readouterr().out
    assert out.count(" - ") == 4  # two losses, two speeds
