"""How a tool that works on checkpoints ends."""

import sys
from collections.abc import Callable

from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.training.checkpoint_files import CheckpointError


def exit_status(work: Callable[[], object]) -> int:
    """Do the work; returns 0 if it is done, 2 if something else must be asked for, 1 if something is damaged or could
    not be written. What is wrong is said in one line."""
    try:
        work()
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
