"""Stopping and killing real runs: signals, the file STOP, a rank that dies, a launcher that dies, a second start."""

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.ranks import free_port
from tests.small_run import Corpus, Ranks, curve, records, small_config, train, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def long_run(corpus: Corpus, tmp_path: Path) -> Path:
    """A run of 3,000 steps, which no test waits for."""
    config = small_config(corpus, tmp_path / "run")
    config["ssd_megatron"]["training"] |= {"train_steps": 3000, "eval_interval": 1000}
    config["ssd_megatron"]["logging"]["log_interval"] = 1
    return write_config(config, tmp_path / "run.json")


def last_step(run: Path) -> int:
    return curve(run.parent / "run")[-1][0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_saves_and_ends_all(long_run: Path, number: signal.Signals) -> None:
    ranks = Ranks(long_run, world_size=2)
    ranks.wait_for("step 6/3000")
    ranks.signal(number, rank=1)
    assert ranks.wait() == [0, 0]
    stopped = last_step(long_run)
    assert f"step {stopped}: saved and stopped by a request to another rank" in ranks.output()
    output = train(long_run, f"ssd_megatron.training.stop_after_step={stopped + 2}", world_size=2)
    assert f"resuming after step {stopped} of 3000" in output
    assert [step for step, _, _ in curve(long_run.parent / "run")] == list(range(1, stopped + 3))


def test_a_signal_to_all_processes_of_a_rank_saves_and_ends(long_run: Path) -> None:
    """As torchrun, scancel and a preemption send it: the loader's worker gets it too."""
    command = [sys.executable, str(ROOT / "pretrain_ssd.py"), "--ds_config", str(long_run)]
    output = long_run.with_suffix(".log")
    with output.open("w") as file:
        rank = subprocess.Popen(
            [*command, "--set", "ssd_megatron.data.num_workers=1"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    wait_until(lambda: "step 3/3000" in output.read_text(), f"training did not start: {output.read_text()}")
    (worker,) = (p for p in psutil.Process(rank.pid).children() if p.cmdline() == rank.args)
    os.killpg(rank.pid, signal.SIGTERM)
    assert rank.wait(60) == 0, output.read_text()
    assert f"step {last_step(long_run)}: saved and stopped by signal SIGTERM" in output.read_text()
    assert not alive(worker)


FAILS = """
import sys
import pretrain_ssd
from ssd_megatron.training.trainer import Trainer

def fail(trainer, step):
    raise RuntimeError("no memory is left")

Trainer._save = fail
sys.exit(pretrain_ssd.main(sys.argv[1:]))
"""


def test_a_rank_that_fails_ends_with_its_loader(long_run: Path) -> None:
    """By an exception that nobody expects, while a worker runs that ignores signals."""
    arguments = ["--ds_config", str(long_run), "--set", "ssd_megatron.data.num_workers=1"]
    rank = subprocess.run(
        [sys.executable, "-c", FAILS, *arguments, "ssd_megatron.checkpoint.interval=2"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert rank.returncode == 1 and "RuntimeError: no memory is left" in rank.stderr


def test_the_file_stop_saves_and_ends_and_is_removed(long_run: Path) -> None:
    ranks = Ranks(long_run)
    ranks.wait_for("step 4/3000")
    stop_file = long_run.parent / "run" / "STOP"
    stop_file.touch()
    assert ranks.wait() == [0]
    assert "stopped by the file STOP in the run folder" in ranks.output()
    assert not stop_file.exists()
    assert f"resuming after step {last_step(long_run)}" in train(
        long_run, f"ssd_megatron.training.stop_after_step={last_step(long_run) + 1}"
    )


def test_killed_runs_go_on_from_the_newest_checkpoint_and_end_alike(corpus: Corpus, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        config = small_config(corpus, tmp_path / name)
        config["ssd_megatron"]["checkpoint"] = {"interval": 2, "keep_last": 2}
        config["ssd_megatron"]["logging"]["log_interval"] = 1
        write_config(config, tmp_path / f"{name}.json")
    train(tmp_path / "whole.json")
    for moment in ("step 5: switch", "step 8: checkpoint", "step 11/16"):
        ranks = Ranks(tmp_path / "killed.json")
        ranks.wait_for(moment)
        ranks.signal(signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL]
    train(tmp_path / "killed.json")
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_a_second_start_on_the_same_folder_is_refused(long_run: Path) -> None:
    first = Ranks(long_run)
    first.wait_for("step 2/3000")
    second_config = write_config_copy(long_run)
    second = Ranks(second_config)
    assert second.wait() == [2]
    assert "is in use by another running process" in second.output()
    first.signal(signal.SIGTERM)
    assert first.wait() == [0]


def write_config_copy(path: Path) -> Path:
    copy = path.with_name("second.json")
    copy.write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_save_and_end_when_the_deepspeed_command_is_gone(long_run: Path, number: signal.Signals) -> None:
    command = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", "29731"]
    output = long_run.with_suffix(".log")
    with output.open("w") as file:
        launcher = subprocess.Popen(
            [*command, str(ROOT / "pretrain_ssd.py"), "--ds_config", str(long_run)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    wait_until(lambda: "step 3/3000" in output.read_text(), f"training did not start: {output.read_text()}")
    family = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(number)
    launcher.wait(10)
    wait_until(lambda: not any(alive(process) for process in family), "a rank outlives its launcher")
    assert "saved and stopped by signal SIGTERM" in output.read_text()
    assert records(long_run.parent / "run", "train")


# Stands for sshd: starts a command and hands its output on.
CONNECTION = """
import subprocess, sys
command = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
for line in command.stdout:
    sys.stdout.buffer.write(line)
    sys.stdout.flush()
"""


def test_ranks_save_and_end_when_the_connection_to_their_host_is_gone(long_run: Path) -> None:
    """As `deepspeed --hostfile` starts them on another host: sshd, a shell, DeepSpeed's launcher, the ranks. Who reads
    their output is gone too."""
    world = base64.urlsafe_b64encode(b'{"localhost": [0]}').decode()
    launch = f"{sys.executable} -m deepspeed.launcher.launch --world_info={world} --master_port={free_port()}"
    shell = f"cd {ROOT}; {launch} pretrain_ssd.py --ds_config {long_run}; exit $?"
    output = long_run.with_suffix(".log")
    with output.open("w") as file:
        connection = subprocess.Popen(
            [sys.executable, "-c", CONNECTION, "sh", "-c", shell],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    wait_until(lambda: "step 3/3000" in output.read_text(), f"training did not start: {output.read_text()}")
    family = psutil.Process(connection.pid).children(recursive=True)
    connection.kill()
    connection.wait(10)
    wait_until(lambda: not any(alive(process) for process in family), "a rank outlives the connection")
    (saved,) = (long_run.parent / "run" / "checkpoints").glob("step_*")
    assert int(saved.name.removeprefix("step_")) == last_step(long_run) >= 3


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_until(condition: Callable[[], bool], message: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.1)
