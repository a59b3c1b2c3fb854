"""When masks change, and by how much."""

import math

import pytest

from ssd_megatron.sparse_weights.schedule import MaskSchedule


@pytest.mark.parametrize(("steps", "updates"), [(100, 10), (100, 7), (10, 10), (1000, 160), (9, 2)])
def test_updates_come_evenly_and_none_at_the_end(steps: int, updates: int) -> None:
    schedule = MaskSchedule(steps, updates, 0.5)
    found = {step: schedule.update_after(step) for step in range(1, steps + 1)}
    assert {k: v for k, v in found.items() if v is not None} == {
        math.floor(k * steps / updates): k for k in range(1, updates)
    }


def test_static_masks_have_no_update() -> None:
    schedule = MaskSchedule(20, 0, 0.5)
    assert [schedule.update_after(step) for step in range(1, 21)] == [None] * 20


def test_the_share_is_a_cosine() -> None:
    schedule = MaskSchedule(200, 20, 0.5)
    assert [schedule.share(step) for step in (0, 100, 200)] == pytest.approx([0.5, 0.25, 0.0], abs=1e-12)
    for step in (10, 50, 190):
        assert schedule.share(step) == pytest.approx(0.5 * math.cos(math.pi * step / 400) ** 2)
