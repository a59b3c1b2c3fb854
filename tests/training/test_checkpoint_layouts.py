"""Checkpoints of several ranks: one of them cannot write or read its part, all end alike; random numbers after a change
of layout."""

import ctypes
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.model.language_model import ffn_names
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.coordinator import Coordinator
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.schedule import Schedule
from ssd_megatron.switching.statistics import ProbeBatch
from ssd_megatron.training.checkpoint import Checkpointer, Trained
from ssd_megatron.training.checkpoint_files import checkpoints
from ssd_megatron.training.checkpoint_tools import verify
from tests.layouts import Layout, oracle_config, run_layout
from tests.ranks import free_port, run_ranks, start_process
from tests.small_engine import build, random_batch, run_config
from tests.small_run import _main, write_config

LAYOUT = Layout(tensor=2, pipeline=2)
TROUBLED = 3  # the last of four ranks: second tensor rank of the last stage
NEWNS, BIND, READ_ONLY, REMOUNT, RECURSIVE, PRIVATE = 0x20000, 4096, 1, 32, 16384, 1 << 18

Trouble = Callable[[Path], None]


def full_disk(_checkpoints: Path) -> None:
    """No file of this process can grow beyond 40 kB: writing ends as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def read_only(checkpoints: Path) -> None:
    """This process alone sees the folder as on a file system that is mounted read-only."""
    folder = str(checkpoints).encode()
    mount_for_this_process((folder, folder, None, BIND), (None, folder, None, BIND | REMOUNT | READ_ONLY))


def not_there(checkpoints: Path) -> None:
    """This process alone sees an empty folder, as on a node that has not mounted the shared one."""
    mount_for_this_process((b"tmpfs", str(checkpoints).encode(), b"tmpfs", 0))


def mount_for_this_process(*mounts: tuple[bytes | None, bytes, bytes | None, int]) -> None:
    """Raises OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.unshare(NEWNS)
    for source, target, kind, flags in ((None, b"/", None, RECURSIVE | PRIVATE), *mounts):
        failed = failed or libc.mount(source, target, kind, flags, None)
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def rank_main(rank: int, port: int, arguments: list[str], output: Path, trouble: Trouble, folder: Path) -> None:
    if rank == TROUBLED:
        trouble(folder)
    _main(rank, LAYOUT.ranks, port, arguments, output)


def end_of_ranks(config: Path, trouble: Trouble, folder: Path) -> tuple[list[int | None], list[str]]:
    """Exit status and output of the ranks of a job of which one is in trouble."""
    outputs = [config.with_suffix(f".{rank}.log") for rank in range(LAYOUT.ranks)]
    port, arguments = free_port(), ["--ds_config", str(config)]
    processes = [
        start_process(rank_main, rank, port, arguments, output, trouble, folder) for rank, output in enumerate(outputs)
    ]
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes], [output.read_text() for output in outputs]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was stopped after 2 of 5 steps, and its settings."""
    folder = tmp_path_factory.mktemp("troubled")
    config = oracle_config(folder, [(1, "dense")], 5)
    config["ssd_megatron"]["checkpoint"] = {"interval": 2, "keep_last": 1}
    return run_layout(folder, LAYOUT, config, "ssd_megatron.training.stop_after_step=2"), config


def run_in_trouble(
    trained: tuple[Path, dict[str, Any]], folder: Path, trouble: Trouble, *, async_save: bool = False
) -> list[str]:
    """Go on with a copy of the run while one rank is in trouble; all ranks must fail, and leave the checkpoint of
    before, and no other. Returns their outputs."""
    run_dir, config = trained
    root = Path(shutil.copytree(run_dir, folder / "run")) / "checkpoints"
    if trouble is not full_disk:
        probe = start_process(trouble, root)
        probe.join()
        if probe.exitcode != 0:
            pytest.skip("mount namespaces are not allowed here")
    config = LAYOUT.apply(config)
    config["ssd_megatron"] |= {"run_dir": str(root.parent)}
    config["ssd_megatron"]["checkpoint"] = {"interval": 2, "keep_last": 1, "async_save": async_save}
    codes, outputs = end_of_ranks(write_config(config, folder / "run.json"), trouble, root)
    assert codes == [1] * LAYOUT.ranks, "".join(outputs)
    assert [entry.name for entry in checkpoints(root)] == ["step_00000002"]
    assert verify(checkpoints(root)[0]) == []
    return outputs


@pytest.mark.parametrize(
    ("trouble", "async_save", "said"),
    [(full_disk, False, "File too large"), (full_disk, True, "File too large"), (read_only, False, "Read-only file")],
)
def test_a_rank_that_cannot_write_ends_all_alike(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, trouble: Trouble, async_save: bool, said: str
) -> None:
    for output in run_in_trouble(trained, tmp_path, trouble, async_save=async_save):
        root = tmp_path / "run" / "checkpoints"
        assert f"error: a checkpoint could not be written to {root}: rank {TROUBLED}: " in output
        assert said in output and output.count("could not be written") == 1


def test_a_rank_that_does_not_see_the_folder_ends_all_alike(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for output in run_in_trouble(trained, tmp_path, not_there):
        assert "step_00000002, but rank 3: " in output and "index.json cannot be read" in output
        assert "All ranks need the same run_dir, on a file system that their nodes share" in output


def random_numbers(topology: Topology, root: Path) -> list[float]:
    """What a rank draws after it has saved (if there is no checkpoint yet) or restored."""
    config = run_config(topology.data.size)
    section = config.ssd_megatron
    torch.manual_seed(section.seed + topology.data.rank)
    model, engine = build(topology, config)
    probe = ProbeBatch([random_batch(config, 0)], engine.mean_loss, topology)
    networks = Networks(ffn_names(section.model.total_layers), model.ffns, topology)
    coordinator = Coordinator(section.ssd, networks, engine.state, probe, Schedule(section.ssd, 9), section.seed)
    trained = Trained(engine, model, coordinator, None, {})
    checkpointer = Checkpointer(root, trained, topology, keep_last=None, async_save=False, tell=print)
    if checkpointer.restore_newest() is None:
        checkpointer.save(1, {})
    return torch.rand(3).tolist()


def test_tensor_parallel_ranks_draw_alike_after_another_layout(tmp_path: Path) -> None:
    """They drop out the same of what all of them have; other ranks have other samples and drop out others."""
    [saved] = run_ranks(1, random_numbers, tmp_path)
    assert run_ranks(1, random_numbers, tmp_path) == [saved]
    drawn = run_ranks(4, random_numbers, tmp_path, parallel=ParallelConfig(tensor_parallel_size=2))
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]
    assert len({str(numbers) for numbers in (saved, *drawn)}) == 3
