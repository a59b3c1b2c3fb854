"""Who started this process, and as which of how many: read from the launcher's environment before any process group."""

import os
import socket

from ssd_megatron.errors import ConfigError

# Variables that say how many processes these launchers started.
OTHER_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "an MPI launcher", "SLURM_STEP_NUM_TASKS": "srun"}


def world_size_of_launch() -> int:
    """Number of processes that the launcher started, before any process group exists.

    Raises:
        ConfigError: several were started by a launcher that does not give torch's variables.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    for variable, launcher in OTHER_LAUNCHERS.items():
        if int(os.environ.get(variable, "1")) > 1:
            raise ConfigError(
                f"{launcher} started {os.environ[variable]} processes without RANK and WORLD_SIZE ({variable} is set): "
                "it is not supported yet; start with deepspeed or torchrun"
            )
    return 1


def join_launch() -> bool:
    """Give torch.distributed the variables it reads. Returns whether a launcher started this process."""
    if "RANK" in os.environ:
        return True
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    return False


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
