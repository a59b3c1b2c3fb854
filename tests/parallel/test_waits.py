"""Whoever waits too long says for what, also where the library that waits would end the process without a word."""

import time

import pytest

from ssd_megatron.parallel.collectives import UNDER_WAY, named
from ssd_megatron.parallel.waits import waits_watched


def test_a_long_wait_is_told_once_with_all_its_names() -> None:
    told: list[str] = []
    with waits_watched(3, 0.2, told.append), named("switch before step 12"), named("plan"):
        time.sleep(0.6)
    assert len(told) == 1
    assert told[0].startswith("rank 3 has been for 0.")
    assert "at: switch before step 12: plan. Another rank may have ended" in told[0]
    assert told[0].endswith("parallel.timeout_seconds is 0.2")


def test_what_is_over_in_time_is_not_told() -> None:
    told: list[str] = []
    with waits_watched(0, 2.0, told.append):
        for _ in range(50):
            with named("training step"):
                time.sleep(0.05)
    assert told == []


def test_a_failure_leaves_no_name_behind() -> None:
    with pytest.raises(ValueError, match="broken"), named("training step"):
        raise ValueError("broken")
    assert UNDER_WAY == []
