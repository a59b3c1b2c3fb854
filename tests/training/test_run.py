"""Runs in one call of Python, several after each other in one process."""

import ctypes
import os
import signal
from pathlib import Path

import pytest

from ssd_megatron.errors import ConfigError
from ssd_megatron.training.run import train
from tests.ranks import start_process
from tests.small_run import Corpus, curve, small_config, write_config

PR_GET_PDEATHSIG = 2


def test_runs_follow_each_other_in_one_process(corpus: Corpus, tmp_path: Path) -> None:
    config = small_config(corpus, tmp_path / "run")
    config["ssd_megatron"]["ssd"] = {"schedule": "dense", "num_experts": 8, "backend": "torch"}
    config["ssd_megatron"]["training"] = {"train_steps": 4, "eval_interval": 4, "eval_steps": 1}
    process = start_process(started_refused_finished, write_config(config, tmp_path / "ds.json"))
    process.join(240)
    assert process.exitcode == 0
    assert [step for step, _, _ in curve(tmp_path / "run")] == [1, 2, 3, 4]


def started_refused_finished(config: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # nobody launched this process
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    handler = signal.getsignal(signal.SIGTERM)
    run_dir = train(config, ["ssd_megatron.training.stop_after_step=2"])
    with pytest.raises(ConfigError, match=r"num_layers \(0\) must be at least 1"):  # before there are groups
        train(config, ["ssd_megatron.model.num_layers=0"])
    with pytest.raises(ConfigError, match=r"optimizer\.params\.lr was 0\.01 and is 0\.5"):  # in them
        train(config, ["optimizer.params.lr=0.5"])
    assert train(str(config)) == run_dir
    assert signal.getsignal(signal.SIGTERM) is handler
    killed_with_its_parent = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(killed_with_its_parent))
    assert killed_with_its_parent.value == 0
