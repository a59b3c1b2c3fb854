"""The schedule as a state machine: no model, no processes."""

import json

import pytest

from ssd_megatron.config.schema import PhaseConfig, SSDConfig
from ssd_megatron.switching.schedule import PhaseSpan, Schedule

STEPS = 100


def adaptive(**settings: object) -> SSDConfig:
    """Sparse phases of 20 steps, 40 sparse steps in all, dense until 10 and from 85 on, 5 dense steps between."""
    return SSDConfig(
        **{
            "sparse_fraction": 0.4,
            "sparse_phase_fraction": 0.2,
            "warmup_fraction": 0.1,
            "final_dense_fraction": 0.15,
            "min_dense_steps": 5,
            "stable_checks": 2,
            "similarity_threshold": 0.5,
            **settings,
        }
    )


def run(
    schedule: Schedule, similarities: dict[int, float], *, spikes: frozenset[int] = frozenset(), until: int = STEPS
) -> None:
    for step in range(1, until + 1):
        schedule.after_step(step, similarity=similarities.get(step), spike=step in spikes)


def always(value: float, interval: int = 2) -> dict[int, float]:
    return dict.fromkeys(range(interval, STEPS + 1, interval), value)


def test_switches_once_stable_and_uses_its_share() -> None:
    schedule = Schedule(adaptive(), STEPS)
    run(schedule, always(0.9))
    assert schedule.phases(STEPS) == [
        PhaseSpan(1, 10, "dense"),
        PhaseSpan(11, 30, "sparse"),
        PhaseSpan(31, 35, "dense"),
        PhaseSpan(36, 55, "sparse"),
        PhaseSpan(56, 100, "dense"),
    ]
    assert schedule.sparse_steps(STEPS) == 40


def test_never_stable_stays_dense() -> None:
    schedule = Schedule(adaptive(), STEPS)
    run(schedule, always(0.4))
    assert schedule.phases(STEPS) == [PhaseSpan(1, 100, "dense")]


def test_one_different_check_starts_the_count_again() -> None:
    schedule = Schedule(adaptive(), STEPS)
    run(schedule, {10: 0.9, 12: 0.1, 14: 0.9, 16: 0.9}, until=20)
    assert schedule.phases(20) == [PhaseSpan(1, 16, "dense"), PhaseSpan(17, 20, "sparse")]
    assert schedule.decision(17).reason == "2 similar checks in a row"


def test_ends_dense_whatever_the_share() -> None:
    schedule = Schedule(adaptive(sparse_fraction=0.7, sparse_phase_fraction=0.6), STEPS)
    run(schedule, {70: 0.9, 72: 0.9})
    assert schedule.phases(STEPS) == [
        PhaseSpan(1, 72, "dense"),
        PhaseSpan(73, 85, "sparse"),
        PhaseSpan(86, 100, "dense"),
    ]


def test_a_spike_ends_a_sparse_phase_and_its_steps_count() -> None:
    schedule = Schedule(adaptive(), STEPS)
    run(schedule, always(0.9), spikes=frozenset({14}))
    assert schedule.phases(STEPS)[:3] == [
        PhaseSpan(1, 10, "dense"),
        PhaseSpan(11, 14, "sparse"),
        PhaseSpan(15, 19, "dense"),
    ]
    assert schedule.sparse_steps(STEPS) == 40


@pytest.mark.parametrize(("name", "mode"), [("dense", "dense"), ("sparse", "sparse")])
def test_one_mode_throughout(name: str, mode: str) -> None:
    schedule = Schedule(SSDConfig(schedule=name), STEPS)
    run(schedule, always(0.9))
    assert schedule.phases(STEPS) == [PhaseSpan(1, 100, mode)]


def test_fixed_phases_are_followed() -> None:
    phases = (PhaseConfig(start_step=1, mode="dense"), PhaseConfig(start_step=30, mode="sparse"))
    schedule = Schedule(SSDConfig(schedule="fixed", phases=phases), STEPS)
    run(schedule, always(0.9))
    assert [schedule.mode(step) for step in (1, 29, 30, 100)] == ["dense", "dense", "sparse", "sparse"]


@pytest.mark.parametrize("stop", [9, 10, 11, 25, 30, 31, 36, 60])
def test_goes_on_after_a_restart_as_if_not_stopped(stop: int) -> None:
    whole = Schedule(adaptive(), STEPS)
    run(whole, always(0.9))
    first = Schedule(adaptive(), STEPS)
    run(first, always(0.9), until=stop)
    second = Schedule(adaptive(), STEPS)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(stop + 1, STEPS + 1):
        second.after_step(step, similarity=always(0.9).get(step))
    assert second.decisions == whole.decisions
