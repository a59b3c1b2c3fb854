import json
import math
from pathlib import Path

import pytest

from ssd_megatron.errors import DataError
from ssd_megatron.switching.schedule import PhaseSpan
from ssd_megatron.training.metrics import MetricsLog, phases_of, read_metrics


def write_steps(run_dir: Path, last_step: int, until: int) -> None:
    log = MetricsLog(run_dir, last_step)
    for step in range(last_step + 1, until + 1):
        log.write("train", step, loss=10.0 - step)
    log.close()


def steps_in(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir)]


def test_a_line_is_one_object_that_begins_with_step_and_kind(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "run", last_step=0)
    log.write("switch", 7, **{"from": "dense", "to": "sparse", "loss_sparse": None, "similarity": [0.5, 1]})
    log.close()
    line = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert line == (
        '{"step": 7, "kind": "switch", "from": "dense", "to": "sparse", "loss_sparse": null, "similarity": [0.5, 1]}\n'
    )


def test_what_is_written_can_be_read_before_the_log_is_flushed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, last_step=0)
    log.write("train", 1, loss=2.0)
    assert read_metrics(tmp_path) == [{"step": 1, "kind": "train", "loss": 2.0}]
    log.close()


def test_numbers_that_are_not_finite_are_null_with_their_text(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, last_step=0)
    log.write("train", 1, loss=math.nan, grad_norm=math.inf, lr=0.1)
    log.write("load", 1, expert_load=[1.5, -math.inf], shares=(0.25, 0.75))
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    train, load = (json.loads(line, parse_constant=refuse) for line in lines)
    assert train == {
        "step": 1,
        "kind": "train",
        "loss": None,
        "loss_text": "nan",
        "grad_norm": None,
        "grad_norm_text": "inf",
        "lr": 0.1,
    }
    assert load["expert_load"] == [1.5, None] and load["expert_load_text"] == [1.5, "-inf"]
    assert load["shares"] == [0.25, 0.75] and "shares_text" not in load


def test_a_resume_drops_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, last_step=0, until=9)
    write_steps(tmp_path, last_step=6, until=12)
    assert steps_in(tmp_path) == list(range(1, 13))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resume_keeps_every_record_of_the_checkpoint_s_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, last_step=0)
    for kind in ("train", "eval", "check"):
        log.write(kind, 4)
    log.write("train", 5)
    log.close()
    MetricsLog(tmp_path, last_step=4).close()
    assert [record["kind"] for record in read_metrics(tmp_path)] == ["train", "eval", "check"]


def test_a_start_at_step_0_drops_everything(tmp_path: Path) -> None:
    write_steps(tmp_path, last_step=0, until=3)
    MetricsLog(tmp_path, last_step=0).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"step": 4, "ki', '{"step": 4, "kind": "train"}', "\0\0\0", "\xff"])
def test_a_torn_last_line_is_not_read_and_a_resume_drops_it(tmp_path: Path, torn: str) -> None:
    write_steps(tmp_path, last_step=0, until=3)
    with (tmp_path / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(torn)
    assert steps_in(tmp_path) == [1, 2, 3]
    write_steps(tmp_path, last_step=3, until=5)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("broken", [b'{"step": 2, "ki', b'{"step": 2}', b"[2]", b"\xff", b""])
def test_a_broken_line_inside_is_named_and_nothing_is_dropped(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1, "kind": "train"}\n' + broken + b'\n{"step": 3, "kind": "train"}\n'
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 is not a metrics record: remove the line"):
        MetricsLog(tmp_path, last_step=1)
    assert path.read_bytes() == content


def test_reading_a_folder_that_is_no_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no metrics\.jsonl: give the run_dir"):
        read_metrics(tmp_path)


def test_phases_are_the_stretches_of_one_mode() -> None:
    modes = ["dense", "dense", "sparse", "dense", "dense"]
    records = [{"step": step, "kind": "train", "mode": mode} for step, mode in enumerate(modes, start=1)]
    records.insert(2, {"step": 2, "kind": "eval"})
    assert phases_of(records) == [PhaseSpan(1, 2, "dense"), PhaseSpan(3, 3, "sparse"), PhaseSpan(4, 5, "dense")]
    assert phases_of([]) == []
