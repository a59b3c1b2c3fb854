"""Before any process group: whatever can refuse a start refuses it on all ranks alike, and at once."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_megatron.config.load import RunConfig, load_config
from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.data.tokenizers import Tokenizer
from ssd_megatron.errors import ConfigError
from ssd_megatron.parallel.device import detect_hardware, local_device
from ssd_megatron.parallel.launch import rank_of_launch, world_size_of_launch
from ssd_megatron.parallel.meeting import Meeting
from ssd_megatron.training.job import check_run_data
from ssd_megatron.training.run_folder import RunFolder, code_digest, package_versions

SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class Job:
    """A run that all ranks can start, its folder locked."""

    meeting: Meeting
    config: RunConfig
    folder: RunFolder
    tokenizer: Tokenizer


def tell(text: str) -> None:
    """Say something to the user, once for all ranks."""
    if rank_of_launch() == 0:
        print(text, file=sys.stderr, flush=True)


def read_config(ds_config: Path, overrides: Sequence[str], world_size: int | None = None) -> RunConfig | ConfigError:
    """The configuration as this rank reads it, or why it has none, which is for all ranks to know (`prepare_job`).

    Args:
        overrides: "path=value", as after --set.
        world_size: processes of the job; None: as many as were launched.
    """
    try:
        world_size = world_size or world_size_of_launch()
        return load_config(ds_config, overrides, world_size=world_size, hardware=detect_hardware())
    except ConfigError as error:
        return error


def prepare_job(read: RunConfig | ConfigError) -> Job:
    """See that every rank has the same configuration, code and run folder, and the data; lock the folder (collective).

    Args:
        read: this rank's configuration, or why it has none.
    Raises:
        ConfigError: the same on every rank, if one of them cannot start, or not like the others.
        CollectiveError: a rank did not come in time.
    """
    sizes = ParallelConfig() if isinstance(read, ConfigError) else read.ssd_megatron.parallel
    meeting = Meeting(sizes.timeout_seconds)
    config = meeting.together("reading the configuration", lambda: _unless_refused(read))
    check_alike(meeting, alike_on_all_ranks(config))
    folder = RunFolder(config.ssd_megatron.run_dir)
    mark = meeting.together("locking run_dir", lambda: folder.create_and_lock() if meeting.rank == 0 else "")
    mark_of_first = meeting.gather("sharing run_dir", mark)[0]
    meeting.together("finding run_dir", lambda: folder.check_is_shared(mark_of_first))
    return Job(meeting, config, folder, _check_data(meeting, config))


def _check_data(meeting: Meeting, config: RunConfig) -> Tokenizer:
    """Rank 0 reads the corpora, and keeps what it has seen in the cache, before the others look (collective)."""

    def check() -> Tokenizer:
        return check_run_data(config, tell, meeting.at_work)

    checked = meeting.together("checking the data on rank 0", lambda: check() if meeting.rank == 0 else None)
    return meeting.together("checking the data", lambda: check() if checked is None else checked)


def alike_on_all_ranks(config: RunConfig) -> dict[str, Any]:
    """What must be the same on every rank, by name; ready for JSON."""
    versions = {f"version of {package}": number for package, number in package_versions().items()}
    return config.flat() | {"code of ssd_megatron": code_digest(), "device": local_device().type} | versions


def check_alike(meeting: Meeting, mine: dict[str, Any]) -> None:
    """Compare what should be the same on every rank (collective).

    Raises:
        ConfigError: the same on every rank, with what differs from rank 0.
    """
    text = json.dumps(mine, sort_keys=True)
    if len(set(meeting.gather("comparing the ranks", hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    first = json.loads(meeting.gather("what rank 0 has", text if meeting.rank == 0 else "")[0])
    names = sorted(name for name in mine.keys() | first.keys() if mine.get(name) != first.get(name))
    meeting.together("what differs", lambda: _refuse_differences(names, mine, first))


def _refuse_differences(names: list[str], mine: dict[str, Any], first: dict[str, Any]) -> None:
    if names:
        shown = [f"{name} is {mine.get(name)!r}, on rank 0 {first.get(name)!r}" for name in names[:SHOWN_DIFFERENCES]]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        raise ConfigError(f"{', '.join(shown)}{more}: give every rank the same ds.json, code and packages")


def _unless_refused(read: RunConfig | ConfigError) -> RunConfig:
    if isinstance(read, ConfigError):
        raise read
    return read
