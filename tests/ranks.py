"""Real ranks for tests: processes forked from one that has already imported torch, DeepSpeed and megatron-core.

results = run_ranks(2, my_function, argument)   # my_function(topology, argument) on each rank, results by rank
"""

import multiprocessing
import os
import pickle
import random
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ssd_megatron.config.schema import ParallelConfig

PRELOADED = [
    "ssd_megatron.training.job",
    "ssd_megatron.training.dry_run",
    "deepspeed.runtime.pipe.engine",
    "pretrain_ssd",
]
TIMEOUT_SECONDS = 240


class RankError(AssertionError):
    """A rank raised, or ended without a result."""


def forkserver() -> multiprocessing.context.ForkServerContext:
    """The context whose server process has the package imported; started once per test run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, parallel: ParallelConfig | None = None
) -> list[Any]:
    """Run `function(topology, *arguments)` on `world_size` gloo ranks and return their results by rank.

    Args:
        parallel: sizes of the model-parallel groups; data parallel only without it.
    """
    context = forkserver()
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=_rank, args=(pipes[rank][1], rank, world_size, port, parallel, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        return [
            _receive(pipe[0], process, rank) for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True))
        ]
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def start_process(function: Callable[..., Any], *arguments: Any) -> multiprocessing.context.ForkServerProcess:
    """Start one process that runs `function` and may be killed; its exit code is the process's."""
    process = forkserver().Process(target=function, args=arguments)
    process.start()
    return process


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to outgoing connections at any moment."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _rank(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    parallel: ParallelConfig | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    from ssd_megatron.parallel.topology import initialize_topology, leave_topology

    os.environ.update(rank_environment(rank, world_size, port))
    torch.set_num_threads(1)
    try:
        topology = initialize_topology(parallel)
        result = function(topology, *arguments)
        leave_topology()
        _send(pipe, (True, result))
    except BaseException:
        _send(pipe, (False, traceback.format_exc()))
        raise


def _send(pipe: Connection, answer: tuple[bool, Any]) -> None:
    """By value: `Connection.send` would send tensors as shared memory, which ends with this process."""
    pipe.send_bytes(pickle.dumps(answer))


def _receive(pipe: Connection, process: Any, rank: int) -> Any:
    waited = 0.0
    while not pipe.poll(0.2):
        waited += 0.2
        if not process.is_alive() and not pipe.poll(0):
            raise RankError(f"rank {rank} ended with exit code {process.exitcode} and no result")
        if waited > TIMEOUT_SECONDS:
            raise RankError(f"rank {rank} gave no result in {TIMEOUT_SECONDS} s")
    fine, result = pickle.loads(pipe.recv_bytes())
    if not fine:
        raise RankError(f"rank {rank}:\n{result}")
    return result
