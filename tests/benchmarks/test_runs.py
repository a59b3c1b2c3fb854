"""Runs of benchmarks."""

import json
from pathlib import Path

import pytest

from benchmarks.runs import finish_run
from ssd_megatron.errors import ConfigError


def test_a_finished_run_is_taken_only_for_its_own_settings(tmp_path: Path) -> None:
    run_dir = tmp_path / "sparsity-0.9-plain"  # whose end is no suffix
    run_dir.mkdir()
    (run_dir / "summary.json").write_text(json.dumps({"status": "finished", "steps": 3}))
    config = {"train_batch_size": 2, "ssd_megatron": {"run_dir": str(run_dir)}}
    (tmp_path / "sparsity-0.9-plain.json").write_text(json.dumps(config, indent=2))
    assert finish_run(config, 1)["steps"] == 3
    with pytest.raises(ConfigError, match="has a run of other settings"):
        finish_run(config | {"train_batch_size": 4}, 1)
