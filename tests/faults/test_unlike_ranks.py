"""Ranks that are not alike, or of which one cannot start: all refuse, at once, with status 2 and one message."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ssd_megatron.config.load import Hardware
from ssd_megatron.training.checkpoint_files import checkpoints
from tests.faults.jobs import LAYOUTS, STEPS, Job, assert_one_error, assert_same_training, make_job
from tests.faults.kill import Undisturbed
from tests.faults.limits import ClockAhead, ElsewhereAt, Powerless
from tests.small_run import Ranks, write_config

FIRST, LAST = 0, 1


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path / "job", LAYOUTS["TP2"], timeout=600)  # nobody waits for it


def changed(job: Job, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Another ds.json beside the job's."""
    config = json.loads(job.config.read_text())
    change(config)
    return write_config(config, job.config.with_name(name))


def assert_refused(ranks: Ranks, *said: str) -> None:
    assert ranks.wait() == [2] * len(ranks.processes)
    assert_one_error(ranks, *said)
    assert "error" not in ranks.output(LAST)


def test_another_config_on_one_rank_is_refused_by_every_difference(job: Job) -> None:
    def change(config: dict[str, Any]) -> None:
        config["optimizer"]["params"]["lr"] = 0.02
        config["ssd_megatron"]["training"]["train_steps"] = 14

    ranks = job.start(differently={LAST: changed(job, "other.json", change)})
    assert_refused(
        ranks,
        "error: rank 1: ",
        "optimizer.params.lr is 0.02, on rank 0 0.01",
        f"training.train_steps is 14, on rank 0 {STEPS}",
        "give every rank the same ds.json, code and packages",
    )
    assert not job.run_dir.exists()


def test_another_layout_on_one_rank_is_refused(job: Job) -> None:
    def change(config: dict[str, Any]) -> None:
        config["ssd_megatron"]["parallel"] |= {"tensor_parallel_size": 1, "timeout_seconds": 500}

    ranks = job.start(differently={LAST: changed(job, "other.json", change)})
    assert_refused(ranks, "parallel.tensor_parallel_size is 1, on rank 0 2", "parallel.timeout_seconds is 500")


@pytest.mark.parametrize("rank", [FIRST, LAST])
def test_an_unusable_config_on_one_rank_is_told_by_rank_0(job: Job, rank: int) -> None:
    def change(config: dict[str, Any]) -> None:
        config["gradient_cliping"] = 1.0

    ranks = job.start(differently={rank: changed(job, "other.json", change)})
    assert ranks.wait() == [2, 2]
    assert f"error: rank {rank}: 1 problem in {job.folder}/other.json:" in ranks.output()
    assert "gradient_cliping (1.0) is not a known key" in ranks.output()
    assert ranks.output(LAST) == ""


@dataclass(frozen=True)
class Unlike:
    """What the package finds out about the last rank's process is not what it finds on rank 0."""

    what: str

    def __call__(self, rank: int) -> None:
        import pretrain_ssd  # noqa: F401
        from ssd_megatron.training import start

        if rank == LAST and self.what == "hardware":
            start.detect_hardware = lambda: Hardware("cpu", bf16=True, name="another CPU")
        if rank == FIRST and self.what == "hardware":
            start.detect_hardware = lambda: Hardware("cpu", bf16=False, name="a CPU")
        if rank == LAST and self.what == "torch":
            versions = start.package_versions()
            start.package_versions = lambda: versions | {"torch": "2.0.0"}
        if rank == LAST and self.what == "code":
            start.code_digest = lambda: "0123456789ab"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("hardware", "bf16.enabled is True, on rank 0 False"),
        ("torch", "version of torch is '2.0.0', on rank 0 '2."),
        ("code", "code of ssd_megatron is '0123456789ab', on rank 0 '"),
    ],
)
def test_another_machine_or_installation_is_refused(job: Job, what: str, said: str) -> None:
    config = changed(job, "auto.json", lambda config: config["bf16"].update(enabled="auto"))
    job.config.write_bytes(config.read_bytes())
    assert_refused(job.start(prepare=Unlike(what)), "error: rank 1: ", said)


def test_two_jobs_on_one_run_folder(job: Job) -> None:
    first = job.start()
    first.wait_for("step 1/")
    second = Ranks(changed(job, "second.json", lambda config: None), world_size=2)
    assert_refused(second, f"ssd_megatron.run_dir ({job.run_dir}) is in use by another running process")
    assert first.wait() == [0, 0]


@pytest.fixture
def somewhere(job: Job) -> Path:
    folder = job.folder / "somewhere"
    folder.mkdir()
    return folder


def test_a_rank_that_sees_another_run_folder(job: Job, somewhere: Path) -> None:
    config = changed(job, "relative.json", lambda config: config["ssd_megatron"].update(run_dir="run"))
    ranks = Ranks(config, world_size=2, prepare=ElsewhereAt(LAST, somewhere, job.folder))
    assert_refused(ranks, "error: rank 1: ssd_megatron.run_dir (run) on ", "is not the folder that rank 0 has locked")


def test_a_rank_that_does_not_see_the_data(job: Job, somewhere: Path) -> None:
    config = changed(job, "relative.json", lambda config: config["ssd_megatron"]["data"].update(paths=["corpus"]))
    ranks = Ranks(config, world_size=2, prepare=ElsewhereAt(LAST, somewhere, job.folder))
    assert_refused(ranks, "error: rank 1: corpus.bin and corpus.idx not found")


@pytest.mark.skipif(os.geteuid() != 0, reason="rank 0 must be allowed what rank 1 is not")
def test_a_rank_that_cannot_write_the_run_folder(job: Job) -> None:
    job.run_dir.mkdir(mode=0o555)
    ranks = job.start(prepare=Powerless((LAST,)))
    assert_refused(ranks, f"error: rank 1: ssd_megatron.run_dir ({job.run_dir}) cannot be written: Permission denied")


def test_clocks_apart_and_files_from_the_future_change_nothing(job: Job, undisturbed: Undisturbed) -> None:
    """One rank is six hours ahead; on the way, the newest files become the oldest ones."""
    ahead = ClockAhead(LAST, 6 * 3600.0)
    assert job.start("ssd_megatron.training.stop_after_step=6", prepare=ahead).wait() == [0, 0]
    for age, folder in enumerate(reversed(checkpoints(job.checkpoints))):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (path.stat().st_mtime - 1000.0 * age,) * 2)
    ranks = job.start(prepare=ClockAhead(FIRST, 6 * 3600.0))
    assert ranks.wait() == [0, 0]
    assert "resuming after step 6 of" in ranks.output()
    assert_same_training(job, undisturbed.job("TP2", 1))
