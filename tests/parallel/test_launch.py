"""Launchers' variables: whose they are, what follows from them for torch.distributed, and where rank 0 listens."""

import os
from types import ModuleType

import pytest

from ssd_megatron.errors import ConfigError
from ssd_megatron.parallel import launch as module
from ssd_megatron.parallel.launch import (
    Launch,
    find_launch,
    first_host,
    join_launch,
    rank_of_launch,
    slurm_port,
    world_size_of_launch,
)
from tests.ranks import rank_environment
from tools import finetune, moefy, study_activations

# As seen in a job of 2 nodes with 2 tasks each.
SLURM_BATCH_SCRIPT = {
    "SLURM_JOB_ID": "71",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_JOB_NODELIST": "localhost,node[2-3]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
SRUN_TASK = SLURM_BATCH_SCRIPT | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_GTIDS": "2,3",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "localhost,node2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What os.environ is during the test: empty at first, in a process that has not joined any launch."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(module, "_added", {})
    return variables


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, Launch(None, 0, 1, 0, 1)),
        (TORCHRUN, Launch("torch", 1, 2, 1, 2)),
        (DEEPSPEED, Launch("torch", 3, 4, 1, 2)),
        (OPEN_MPI, Launch("mpirun", 5, 8, 1, 4)),
        (MPICH, Launch("mpirun", 5, 8, 1, 4)),
        (SRUN_TASK, Launch("srun", 3, 4, 1, 2)),
        (SLURM_BATCH_SCRIPT, Launch(None, 0, 1, 0, 1)),
        (SRUN_TASK | {"PMI_RANK": "3", "PMI_SIZE": "4"}, Launch("srun", 3, 4, 1, 2)),  # srun --mpi=pmi2
        (SRUN_TASK | OPEN_MPI, Launch("mpirun", 5, 8, 1, 4)),  # mpirun in a batch script
        (SRUN_TASK | TORCHRUN, Launch("torch", 1, 2, 1, 2)),  # srun torchrun
        (SRUN_TASK | {"WORLD_SIZE": "4"}, Launch("srun", 3, 4, 1, 2)),  # exported by the batch script
    ],
)
def test_who_launched(variables: dict[str, str], launch: Launch) -> None:
    assert find_launch(variables) == launch


def test_several_torch_ranks_need_a_local_rank(environment: dict[str, str]) -> None:
    environment.update({"RANK": "3", "WORLD_SIZE": "4"})
    for asked in (join_launch, rank_of_launch, world_size_of_launch):
        with pytest.raises(ConfigError, match=r"LOCAL_RANK is missing: RANK \(3\) and WORLD_SIZE \(4\) are set"):
            asked()


def test_variables_set_after_a_job_of_one_are_a_launchers(environment: dict[str, str]) -> None:
    assert join_launch() is False and world_size_of_launch() == 1
    environment["LOCAL_RANK"] = "1"
    assert join_launch() is False  # nobody has said of how many
    environment.update({"RANK": "0", "WORLD_SIZE": "2"})  # RANK as it was
    assert world_size_of_launch() == 2
    del environment["LOCAL_RANK"]
    with pytest.raises(ConfigError, match="LOCAL_RANK is missing"):
        join_launch()


def test_a_single_torch_rank_is_the_first_on_its_host(environment: dict[str, str]) -> None:
    environment.update({"RANK": "0", "WORLD_SIZE": "1"})
    assert join_launch() is True
    assert environment["LOCAL_RANK"] == "0"


def test_srun_gives_torch_its_variables(environment: dict[str, str]) -> None:
    environment.update(SRUN_TASK)
    assert world_size_of_launch() == 4
    assert join_launch() is True
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("localhost", "16137")


@pytest.mark.parametrize("variables", [SRUN_TASK, OPEN_MPI])
def test_a_given_meeting_point_stays(environment: dict[str, str], variables: dict[str, str]) -> None:
    environment.update(variables, MASTER_ADDR="10.1.2.3", MASTER_PORT="4711")
    assert join_launch() is True
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.1.2.3", "4711")


def test_a_given_port_goes_with_the_address_found(environment: dict[str, str]) -> None:
    environment.update(SRUN_TASK, MASTER_PORT="4711")
    join_launch()
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("localhost", "4711")


def test_a_given_address_goes_with_the_port_found(environment: dict[str, str]) -> None:
    environment.update(SRUN_TASK, MASTER_ADDR="10.1.2.3", SLURM_STEP_NODELIST="no-such-host.invalid")
    join_launch()
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.1.2.3", "16137")


def test_a_step_on_one_host_needs_no_name(environment: dict[str, str]) -> None:
    environment.update(SRUN_TASK, SLURM_GTIDS="0,1,2,3", SLURM_STEP_NODELIST="no-such-host.invalid")
    join_launch()
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_a_first_node_without_address_is_named(environment: dict[str, str]) -> None:
    environment.update(SRUN_TASK, SLURM_STEP_NODELIST="no-such-host[7-8].invalid")
    with pytest.raises(ConfigError, match=r"no-such-host7\.invalid, the first node of the SLURM step, has no address"):
        join_launch()


def test_one_process_meets_nobody_elsewhere(environment: dict[str, str]) -> None:
    """A batch script may export MASTER_ADDR for its steps and run plain python too."""
    environment.update(SLURM_BATCH_SCRIPT, MASTER_ADDR="10.1.2.3", MASTER_PORT="4711")
    assert join_launch() is False
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert environment["MASTER_PORT"] != "4711"


@pytest.mark.parametrize(
    ("variables", "launched", "rank"),
    [({}, False, 0), (SLURM_BATCH_SCRIPT, False, 0), (TORCHRUN, True, 1), (SRUN_TASK, True, 3)],
)
def test_later_jobs_of_a_process_find_the_launcher_of_the_first(
    environment: dict[str, str], variables: dict[str, str], launched: bool, rank: int
) -> None:
    environment.update(variables)
    for _ in range(3):
        assert (join_launch(), rank_of_launch()) == (launched, rank)
        assert environment["RANK"] == str(rank)


def test_later_jobs_under_mpirun_do_not_ask_mpi(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment.update(OPEN_MPI)
    answers = iter([{"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "4711"}])
    monkeypatch.setattr(module, "_ask_over_mpi", lambda _: next(answers))
    for _ in range(2):
        assert join_launch() is True
        assert (environment["RANK"], environment["MASTER_PORT"]) == ("5", "4711")


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node7", "node7"),
        ("n[1-2]", "n1"),
        ("gpu[012-015,020]-ib,login1", "gpu012-ib"),
        ("login1,gpu[012-015]", "login1"),
        ("rack[3,5]node[08-11],rack9node1", "rack3node08"),
        ("a-b.c[10]", "a-b.c10"),
    ],
)
def test_first_host_of_a_slurm_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_slurm_ports_differ_between_jobs_and_steps_and_are_nobodys() -> None:
    ports = [
        slurm_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(4_000_000, 4_001_000)
        for step in range(16)
    ]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 15_000 and max(ports) < 32_768


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        (finetune, ["--evaluate", "tuned", "--dev", "dev.tsv"]),
        (moefy, ["--from", "run", "--to", "moefied"]),
        (study_activations, ["run"]),
    ],
)
def test_tools_of_one_process_refuse_several(
    tool: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in rank_environment(1, 2, 4711).items():
        monkeypatch.setenv(name, value)
    assert tool.main(arguments) == 2
    name = f"tools/{tool.__name__.split('.')[-1]}.py"
    message = f"error (rank 1): the number of processes (2) must be 1 for {name}: start it with plain python\n"
    assert capsys.readouterr().err == message
