"""Saves that fail on one of several ranks, and damaged checkpoints of several ranks: one message, and what was good
stays good."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ssd_megatron.training.checkpoint_files import TEMPORARY, checkpoints
from tests.faults.jobs import (
    INTERVAL,
    LAYOUTS,
    STEPS,
    Job,
    assert_one_error,
    assert_same_training,
    assert_whole,
    make_job,
)
from tests.faults.kill import Undisturbed
from tests.faults.limits import Powerless, SmallFiles
from tests.small_run import Ranks, write_config


@pytest.fixture
def finished(undisturbed: Undisturbed, tmp_path: Path) -> Job:
    """A copy of a finished job on TP2, with checkpoints after 10 and 12 steps, which the test may damage."""
    original = undisturbed.job("TP2", 1)
    shutil.copytree(original.run_dir, tmp_path / "run")
    config = json.loads(original.config.read_text())
    config["ssd_megatron"]["run_dir"] = str(tmp_path / "run")
    write_config(config, tmp_path / "run.json")
    return Job(tmp_path, original.layout)


def assert_ended(ranks: Ranks, *said: str) -> None:
    assert ranks.wait() == [1] * len(ranks.processes)
    assert_one_error(ranks, "rank 0: error: ", *said)


@pytest.mark.parametrize("layout", ["TP2", "PP2", "EP2"])
def test_a_full_disk_of_one_rank_ends_all_and_leaves_the_checkpoint_before(tmp_path: Path, layout: str) -> None:
    job = make_job(tmp_path / "job", LAYOUTS[layout])
    ranks = job.start(prepare=SmallFiles(rank=1, limit=60_000, save=2))
    assert_ended(ranks, "a checkpoint could not be written to", "rank 1: ", "File too large")
    assert_whole(job, INTERVAL)


def test_a_read_only_folder_ends_all_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", LAYOUTS["PP2"])
    ranks = job.start(prepare=Powerless((0, 1)))
    ranks.wait_for(f"step {INTERVAL}: checkpoint")
    job.checkpoints.chmod(0o555)
    newest = job.newest()
    assert_ended(ranks, "a checkpoint could not be written to", "rank 0: ", "Permission denied")
    job.checkpoints.chmod(0o755)
    assert job.newest() - newest in (0, INTERVAL)  # one may have been written meanwhile
    assert_whole(job, job.newest())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_really_full_disk_ends_all_and_leaves_a_whole_checkpoint(tmp_path: Path, small_disk: Path) -> None:
    job = make_job(tmp_path / "job", LAYOUTS["TP2"])
    job.run_dir.symlink_to(small_disk)
    ranks = job.start("ssd_megatron.checkpoint.keep_last=null")
    assert_ended(ranks, "No space left on device")
    assert_whole(job, job.newest())
    assert not list(job.checkpoints.glob(f"{TEMPORARY}*"))


@pytest.mark.parametrize("free_pages", [0, 2])
def test_a_disk_too_full_for_the_index_of_the_samples_is_named(
    tmp_path: Path, small_disk: Path, free_pages: int
) -> None:
    job = make_job(tmp_path / "job", LAYOUTS["TP2"])
    (small_disk / "other").write_bytes(bytes((700 // 4 - free_pages) * 4096))
    ranks = job.start(f"ssd_megatron.data.cache_dir={small_disk}")
    assert ranks.wait()[0] == 2
    assert_one_error(ranks, "data.cache_dir: ", "No space left on device")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("rank_00001.safetensors", flip_bit, "rank_00001.safetensors does not have its checksum"),
        ("rank_00001.safetensors", truncate, "rank_00001.safetensors has"),
    ],
)
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_taken(
    finished: Job, undisturbed: Undisturbed, file: str, damage: Callable[[Path], None], said: str
) -> None:
    damage(finished.checkpoints / "step_00000012" / file)
    output = finished.finish()
    assert "step_00000012 is damaged" in output and said in output
    assert f"resuming after step {STEPS - INTERVAL} of" in output
    assert_same_training(finished, undisturbed.job("TP2", 1))


def test_without_a_whole_checkpoint_all_ranks_end(finished: Job) -> None:
    for folder in checkpoints(finished.checkpoints):
        flip_bit(folder / "rank_00001.safetensors")
    assert_ended(finished.start(), "no checkpoint in", "is whole")
    assert len(checkpoints(finished.checkpoints)) == 2
