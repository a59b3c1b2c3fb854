"""Whoever waits too long says for what, also where the library that waits would end the process without a word."""

import os
import time
from pathlib import Path

import pytest

from ssd_megatron.parallel.collectives import UNDER_WAY, CollectiveError, named
from ssd_megatron.parallel.meeting import Meeting
from ssd_megatron.parallel.waits import waits_watched
from tests.ranks import free_port, rank_environment, start_process


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


def meet(rank: int, port: int, said: Path, worker: int, at_work: bool) -> None:
    """One rank works for twice as long as others wait, and may say so; the other one writes down what comes of it."""
    os.environ.update(rank_environment(rank, 2, port))
    meeting = Meeting(timeout_seconds=4)

    def work() -> None:
        for _ in range(16):
            time.sleep(0.5)
            if at_work:
                meeting.at_work()

    try:
        meeting.together("reading", lambda: work() if rank == worker else None)
        result = "all are through"
    except CollectiveError as error:
        result = str(error)
    if rank != worker:
        said.write_text(result)
    while not said.exists():  # rank 0 holds the store
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("worker", "at_work", "expected"),
    [
        (0, True, "all are through"),
        (1, True, "all are through"),
        (0, False, "meeting of all ranks, reading: another rank ended or did not answer"),
        (1, False, "meeting of all ranks, reading: rank 1 ended or did not answer"),
    ],
)
def test_ranks_wait_for_one_that_is_at_work(tmp_path: Path, worker: int, at_work: bool, expected: str) -> None:
    port = free_port()
    ranks = [start_process(meet, rank, port, tmp_path / "said", worker, at_work) for rank in range(2)]
    for process in ranks:
        process.join(60)
    assert (tmp_path / "said").read_text().startswith(expected)
