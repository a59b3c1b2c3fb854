"""A rank that does not go on, and does not end either: the others say what they waited for, and end."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import pytest
from torch.distributed import distributed_c10d

from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.parallel.topology import Topology
from tests.faults.jobs import LAYOUTS, Job, assert_one_error, assert_whole, make_job
from tests.faults.moments import Fault
from tests.ranks import run_ranks
from tests.small_engine import build, run_config
from tests.small_run import Ranks

TIMEOUT_SECONDS = 10


@dataclass
class Hanging:
    job: Job
    ranks: Ranks
    fault: Fault


CASES = {
    "starting": ("DP2", Fault("checking the data", 1), "meeting of all ranks, checking the data: rank 1 ended", 0),
    # DeepSpeed makes process groups of its own for pipelines.
    "training": ("PP2", Fault("in a training step", 1, call=5, delay=0.03), "training step 5: ", 4),
    "switching": ("TP2", Fault("switch: part of a bank moved", 1, call=12), "switch before step 4: moving neurons", 2),
    "saving": ("EP2", Fault("save: own files written", 1, call=2), "checkpoint after step 4: agreement on a chec", 2),
}


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Hanging]]:
    """Jobs of which one rank stops, all at the same time: most of it is waiting."""
    started = {}
    for name, (layout, fault, _, _) in CASES.items():
        job = make_job(tmp_path_factory.mktemp(name) / "job", LAYOUTS[layout], timeout=TIMEOUT_SECONDS)
        stop = Fault(fault.moment, fault.rank, fault.call, fault.delay, signal.SIGSTOP)
        started[name] = Hanging(job, job.start(prepare=stop), stop)
    yield started
    for case in started.values():
        for process in case.ranks.processes:
            process.kill()


@pytest.mark.parametrize("name", CASES)
def test_the_others_end_and_say_what_they_waited_for(hanging: dict[str, Hanging], name: str) -> None:
    _, _, said, newest = CASES[name]
    case = hanging[name]
    case.ranks.processes[0].join(120)
    assert case.ranks.processes[0].exitcode == 1
    assert case.ranks.processes[1].exitcode is None
    assert_one_error(case.ranks, "rank 0: error: ", said, "ended or did not answer")
    if newest:
        assert f"Timed out waiting {TIMEOUT_SECONDS}000ms" in case.ranks.output()
        assert_whole(case.job, newest)


def test_every_group_of_every_library_has_our_timeout() -> None:
    sizes = ParallelConfig(pipeline_parallel_size=2, timeout_seconds=77)
    timeouts = run_ranks(2, timeouts_with_an_engine, parallel=sizes)
    assert [set(found) for found in timeouts] == [{timedelta(seconds=77)}] * 2
    assert min(map(len, timeouts)) > 10  # megatron-core's and DeepSpeed's


def timeouts_with_an_engine(topology: Topology) -> list[timedelta]:
    config = run_config(world_size=1)
    build(topology, config)
    groups = list(distributed_c10d._world.pg_map)
    return [group._get_backend(topology.device).options._timeout for group in groups]
