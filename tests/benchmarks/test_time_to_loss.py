"""benchmarks.time_to_loss: what a run that ends with the dense loss would cost."""

import json
from pathlib import Path

import pytest

from benchmarks.time_to_loss import Reached, at_equal_loss, run_seconds
from benchmarks.trials import PROBLEMS, TRIALS, Trial, dense_trial, trial_config, trial_phases
from ssd_megatron.config.load import Hardware, load_config


def test_cost_at_equal_loss_lies_between_runs_in_the_logarithm() -> None:
    runs = [Reached(4.2, 100.0, 10.0), Reached(4.0, 200.0, 40.0), Reached(3.9, 300.0, 90.0)]
    at = at_equal_loss(runs, 4.1)
    assert at is not None
    assert (at.loss, at.seconds, at.flops) == pytest.approx((4.1, (100 * 200) ** 0.5, 20.0))
    assert at_equal_loss(runs, 4.3) == runs[0]
    second = at_equal_loss(runs, 4.0)
    assert second is not None and second.seconds == pytest.approx(200.0)
    assert at_equal_loss(runs, 3.8) is None


def test_a_run_is_counted_in_steps_measured_elsewhere() -> None:
    """A machine that was three times as slow, and once slower still, while it ran."""
    steps = [("dense", 3.0), ("dense", 3.0), ("dense", 90.0), ("sparse", 1.5), ("sparse", 1.5)]
    records = [{"kind": "train", "mode": mode, "seconds": seconds} for mode, seconds in steps]
    records += [{"kind": "switch", "seconds": 6.0}, {"kind": "check", "seconds": 0.3}, {"kind": "eval"}]
    assert run_seconds(records, {"dense": 1.0, "sparse": 0.6}) == pytest.approx(3 * 1.0 + 2 * 0.6 + 6.3 / 3)


def test_trials_of_the_same_model_share_its_dense_run(tmp_path: Path) -> None:
    def dense(trial: Trial) -> object:
        return trial_config(PROBLEMS["wide"], dense_trial(trial), "corpus", 600, [], 1, tmp_path)

    same = {name for name, trial in TRIALS.items() if dense(trial) == dense(TRIALS["default"])}
    assert set(TRIALS) - same == {"d_ff 4h", "squared relu", "reglu", "reglu, 85 % of the steps sparse"}


@pytest.mark.parametrize("model", PROBLEMS)
@pytest.mark.parametrize("name", TRIALS)
def test_every_trial_is_a_run_that_can_be_made(name: str, model: str, tmp_path: Path) -> None:
    trial = TRIALS[name]
    phases = trial_phases(trial, 600)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(trial_config(PROBLEMS[model], trial, "corpus", 600, phases, 1, tmp_path / "run")))
    ssd = load_config(path, world_size=1, hardware=Hardware("cpu", False, "test")).ssd_megatron.ssd
    assert ssd.phases is not None
    assert [phase.mode for phase in ssd.phases] == ["dense", "sparse", "dense"]
    assert ssd.num_experts == trial.one_in * ssd.top_k
