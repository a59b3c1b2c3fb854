"""Runs of benchmarks."""

import json
import time
from pathlib import Path

import pytest

from benchmarks.runs import Unfinished, finish_run, is_finished
from ssd_megatron.errors import ConfigError
from tests.small_run import Corpus, small_config


def test_a_finished_run_is_taken_only_for_its_own_settings(tmp_path: Path) -> None:
    run_dir = tmp_path / "sparsity-0.9-plain"  # whose end is no suffix
    run_dir.mkdir()
    (run_dir / "summary.json").write_text(json.dumps({"status": "finished", "steps": 3}))
    config = {"train_batch_size": 2, "ssd_megatron": {"run_dir": str(run_dir)}}
    (tmp_path / "sparsity-0.9-plain.json").write_text(json.dumps(config, indent=2))
    assert finish_run(config, 1)["steps"] == 3
    with pytest.raises(ConfigError, match="has a run of other settings"):
        finish_run(config | {"train_batch_size": 4}, 1)


def test_a_run_that_was_stopped_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    config = small_config(corpus, tmp_path / "run")
    config["ssd_megatron"]["ssd"] = {"schedule": "dense", "num_experts": 8}
    config["ssd_megatron"]["training"] = {"train_steps": 4, "eval_interval": 4, "eval_steps": 1}
    with pytest.raises(Unfinished, match="run was stopped: the same command goes on with it"):
        finish_run(config, 1, until=time.monotonic())
    assert not is_finished(tmp_path / "run")
    assert finish_run(config, 1)["steps"] == 4
    assert is_finished(tmp_path / "run")
