"""How a tool that works on checkpoints ends."""

import sys
from collections.abc import Callable

from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.parallel.collectives import CollectiveError
from ssd_megatron.parallel.launch import rank_of_launch, world_size_of_launch
from ssd_megatron.training.checkpoint_files import CheckpointError


def exit_status(work: Callable[[], object]) -> int:
    """Do the work; returns 0 if it is done, 2 if something else must be asked for, 1 if something is damaged or could
    not be written. What is wrong is said in one line, by each of several processes that finds it."""
    try:
        work()
    except (ConfigError, DataError) as error:
        _say(error)
        return 2
    except (CheckpointError, CollectiveError, OSError) as error:
        _say(error)
        return 1
    return 0


def _say(error: Exception) -> None:
    print(f"error{_who()}: {error}", file=sys.stderr)


def _who() -> str:
    """Which of several processes speaks, if it can know."""
    try:
        return f" (rank {rank_of_launch()})" if world_size_of_launch() > 1 else ""
    except ConfigError:
        return ""
