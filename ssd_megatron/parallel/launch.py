"""Who started this process, as which of how many, and where rank 0 listens: before any process group exists.

`deepspeed` and `torchrun` set the variables that torch reads. srun and MPI launchers set their own, and `join_launch`
adds torch's. A process without any of them is a job of one.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from ssd_megatron.errors import ConfigError

# Names of rank, world size, local rank and local world size: torchrun's (deepspeed calls the last one LOCAL_SIZE), and
# MPI's. MPI is looked for before SLURM: inside a SLURM job mpirun starts its helpers by srun, and the ranks inherit the
# helpers' SLURM variables.
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
)
# A port for rank 0, below those that systems hand out to whoever asks for any.
FIRST_PORT, PORTS, STEPS_OF_A_JOB = 15_000, 16_384, 16

_added: dict[str, str] = {}  # what join_launch has put into os.environ, and no launcher


@dataclass(frozen=True)
class Launch:
    """Who started this process.

    Attributes:
        launcher: "torch" (deepspeed or torchrun), "mpirun", "srun", or None: a person or a script.
        rank, world_size: in the whole job.
        local_rank, local_world_size: on this host.
    """

    launcher: str | None
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def find_launch(environment: Mapping[str, str]) -> Launch:
    """Read the launcher's variables.

    Only srun sets SLURM_STEP_NUM_TASKS; a batch script and the shell of salloc have SLURM_PROCID and SLURM_NTASKS too,
    and are one process.

    Raises:
        ConfigError: RANK and WORLD_SIZE are set for several processes, and LOCAL_RANK is not.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        if "LOCAL_RANK" not in environment and int(environment["WORLD_SIZE"]) > 1:
            raise ConfigError(
                f"LOCAL_RANK is missing: RANK ({environment['RANK']}) and WORLD_SIZE ({environment['WORLD_SIZE']}) are "
                "set, so it must be this process's number on its host, from 0"
            )
        local_world_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "1"))
        numbers = (environment["RANK"], environment["WORLD_SIZE"], environment.get("LOCAL_RANK", "0"), local_world_size)
        return Launch("torch", *map(int, numbers))
    for names in MPI_VARIABLES:
        if all(name in environment for name in names):
            return Launch("mpirun", *(int(environment[name]) for name in names))
    if "SLURM_STEP_NUM_TASKS" in environment:
        rank, size, local_rank = (
            int(environment[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        )
        return Launch("srun", rank, size, local_rank, len(environment["SLURM_GTIDS"].split(",")))
    return Launch(None, 0, 1, 0, 1)


def world_size_of_launch() -> int:
    """Number of processes that the launcher started. Raises ConfigError as find_launch does."""
    return _launch_of_this_process().world_size


def rank_of_launch() -> int:
    """Number of this process among them. Raises ConfigError as find_launch does."""
    return _launch_of_this_process().rank


def require_one_process(tool: str) -> None:
    """Raises ConfigError if the launcher started more processes than the one in which a tool works, and as find_launch
    does."""
    size = world_size_of_launch()
    if size > 1:
        raise ConfigError(f"the number of processes ({size}) must be 1 for {tool}: start it with plain python")


def join_launch() -> bool:
    """Give torch.distributed the variables it reads: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT. A launcher's ranks keep MASTER_ADDR and MASTER_PORT that are set. Every job of a process finds the
    launcher that the first one found. Collective under mpirun.

    Returns:
        whether a launcher started this process.

    Raises:
        ConfigError: as find_launch; the first node of a SLURM step has no address; mpi4py speaks with another MPI than
            the one that started this process.
    """
    launch = _launch_of_this_process()
    if launch.launcher == "torch":
        os.environ["LOCAL_RANK"] = str(launch.local_rank)
        return True
    _added.update(_meeting_point(launch))
    numbers = (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size)
    _added.update(zip(TORCH_VARIABLES, map(str, numbers), strict=True))
    os.environ.update(_added)
    return launch.launcher is not None


def first_host(node_list: str) -> str:
    """First host of a SLURM node list: `gpu[012-015,020]-ib,login1` begins with `gpu012-ib`."""
    unfolded = re.sub(r"\[(\w+)[^\]]*\]", r"\1", node_list)
    return unfolded.partition(",")[0]


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port that follows from the numbers of job and step, so that all ranks know it and jobs on one host differ."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return FIRST_PORT + (STEPS_OF_A_JOB * job + step) % PORTS


def _launch_of_this_process() -> Launch:
    if any(os.environ.get(name) != _added.get(name) for name in ("RANK", "WORLD_SIZE")):
        return find_launch(os.environ)  # a launcher's, even where one has the value that ours had
    return find_launch({name: value for name, value in os.environ.items() if name not in TORCH_VARIABLES})


def _meeting_point(launch: Launch) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT: where rank 0 listens."""
    if launch.launcher is None:
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    if len(given) == 2:
        return given
    if launch.launcher == "mpirun":
        return _ask_over_mpi(launch) | given
    address = given.get("MASTER_ADDR") or _address_of_first_node(launch)
    return {"MASTER_ADDR": address, "MASTER_PORT": str(slurm_port(os.environ))} | given


def _address_of_first_node(launch: Launch) -> str:
    if launch.local_world_size == launch.world_size:
        return "127.0.0.1"
    host = first_host(os.environ["SLURM_STEP_NODELIST"])
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:  # torch would look for it for half an hour
        raise ConfigError(
            f"{host}, the first node of the SLURM step, has no address on {socket.gethostname()} ({error.strerror}): "
            "set MASTER_ADDR to an address of that node before srun"
        ) from error
    return host


def _ask_over_mpi(launch: Launch) -> dict[str, str]:
    """DeepSpeed's discovery over mpi4py: rank 0 tells the others its first address, and a free port."""
    import mpi4py

    mpi4py.rc.finalize = False  # a rank that fails must not wait in MPI's finalization for those that wait for it
    from deepspeed.comm.comm import mpi_discovery
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_size() != launch.world_size:
        raise ConfigError(
            f"mpirun started {launch.world_size} processes and mpi4py finds {MPI.COMM_WORLD.Get_size()}: it has loaded "
            f"{MPI.Get_library_version().partition(',')[0]}, not the MPI of this mpirun. Put that one's libmpi first "
            "on LD_LIBRARY_PATH, or do without: mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=<port>"
        )
    mpi_discovery(distributed_port=MPI.COMM_WORLD.bcast(_free_port()), verbose=False)
    MPI.Finalize()
    return {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])
