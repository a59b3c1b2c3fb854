"""examples/slurm on a real SLURM: submitted, killed, preempted, queued again, finished, with the losses of one process.

    make test-slurm        (python -m tests.slurm.check)

Needs root and Debian's slurm-wlm and munge; some minutes on 2 cores. The cluster (tests/slurm/cluster.py) lies in a
temporary folder with keys and ports of its own, and is gone afterwards, whatever happens. The templates are submitted
as they are; options of sbatch and its environment make them small.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from tests.launched import (
    ENVIRONMENT,
    ROOT,
    TOLERANCE,
    assert_same_losses,
    config_without_dropout,
    real_corpus,
    require,
    train_alone,
    wait_until,
)
from tests.slurm.cluster import SlurmCluster
from tests.small_run import Corpus, records, write_config

PACKAGES = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
SMALL = ("--ntasks-per-node=1", "--cpus-per-task=1", "--time=60", "--overcommit")
# Node names n1 and n2 have no address; "none" takes back the template's GPUs.
VARIABLES = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "SBATCH_GRES": "none"}
# Long enough to be met in the middle: dense, sparse, dense. One process trains the first of them.
STEPS, STEPS_ALONE = 200, 30
PHASES = [{"start_step": step, "mode": mode} for step, mode in ((1, "dense"), (5, "sparse"), (150, "dense"))]


class Jobs:
    """Submits templates for one run each."""

    def __init__(self, cluster: SlurmCluster, folder: Path, corpus: Corpus) -> None:
        self._cluster, self._folder, self._corpus = cluster, folder, corpus

    def config(self, name: str, **training: int) -> dict[str, Any]:
        config = config_without_dropout(self._corpus, self._folder / name)
        config["ssd_megatron"]["ssd"] |= {"phases": PHASES, "check_interval": 100}
        config["ssd_megatron"]["training"] |= {"train_steps": STEPS, "eval_interval": STEPS} | training
        config["ssd_megatron"]["checkpoint"] = {"interval": 25, "keep_last": 2}
        return config

    def submit(self, template: str, name: str, *options: str, **training: int) -> str:
        """Submit a template for a run of its own. Returns the job's number."""
        file = write_config(self.config(name, **training), self._folder / f"{name}.json")
        return self._cluster.run(
            *("sbatch", "--parsable", *SMALL, *options, f"--chdir={ROOT}", f"--output={self._folder}/{name}.log"),
            str(ROOT / "examples" / "slurm" / template),
            **VARIABLES,
            DS_CONFIG=str(file),
        )

    def wait(self, job: str, state: str, name: str) -> None:
        wait_until(
            lambda: self._cluster.state(job) == state, lambda: f"{self._cluster.state(job)}: {self.log(name)}", 180
        )

    def wait_for_step(self, step: int, name: str) -> None:
        wait_until(lambda: self._step(name) >= step, lambda: f"step {step} was not trained: {self.log(name)}")

    def log(self, name: str) -> str:
        path = self._folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def _step(self, name: str) -> int:
        log = self.log(name)
        return max((int(part.split("/")[0]) for part in log.split("step ") if f"/{STEPS}" in part[:12]), default=0)


def check(cluster: SlurmCluster, folder: Path) -> None:
    jobs = Jobs(cluster, folder, real_corpus(folder))
    alone = train_alone(jobs.config("alone", stop_after_step=STEPS_ALONE), folder / "alone.json")
    job = jobs.submit("single_node.sbatch", "single_node", "--ntasks-per-node=2", stop_after_step=STEPS_ALONE)
    jobs.wait(job, "COMPLETED", "single_node")
    assert_same_losses(folder / "single_node", alone, TOLERANCE)
    jobs.wait(jobs.submit("multi_node.sbatch", "undisturbed"), "COMPLETED", "undisturbed")
    assert_same_losses(folder / "undisturbed", alone, TOLERANCE, steps=STEPS_ALONE)
    check_requeue(cluster, jobs, folder)
    check_array(cluster, jobs, folder)


def check_requeue(cluster: SlurmCluster, jobs: Jobs, folder: Path) -> None:
    """A job of a partition with more priority takes both nodes while the run is in its sparse phase."""
    job = jobs.submit("requeue.sbatch", "preempted")
    jobs.wait_for_step(20, "preempted")
    urgent = cluster.run("sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "-o/dev/null", "--wrap", "sleep 3")
    jobs.wait(job, "PENDING", "preempted")
    assert "saved and stopped by signal SIGUSR1" in jobs.log("preempted"), jobs.log("preempted")
    jobs.wait(urgent, "COMPLETED", "preempted")
    jobs.wait(job, "COMPLETED", "preempted")
    assert cluster.field(job, "Restarts") == "1"
    assert len(records(folder / "preempted", "resume")) == 1
    assert_same_losses(folder / "preempted", folder / "undisturbed", 0)


def check_array(cluster: SlurmCluster, jobs: Jobs, folder: Path) -> None:
    """The first job of the chain loses a rank to kill -9, the second is asked to save and end, the third finishes."""
    job = jobs.submit("array.sbatch", "array", "--array=1-3%1", "--open-mode=append")
    jobs.wait_for_step(40, "array")
    ranks = [process for process in psutil.process_iter() if is_rank_of(process, folder / "array.json")]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    jobs.wait(f"{job}_1", "FAILED", "array")
    wait_until(lambda: "resuming after step" in jobs.log("array"), lambda: jobs.log("array"))
    jobs.wait_for_step(90, "array")
    cluster.send_usr1(f"{job}_2")
    for task in (2, 3):
        jobs.wait(f"{job}_{task}", "COMPLETED", "array")
    assert "saved and stopped by signal SIGUSR1" in jobs.log("array")
    assert_same_losses(folder / "array", folder / "undisturbed", 0)


def is_rank_of(process: psutil.Process, config: Path) -> bool:
    try:
        return str(config) in process.cmdline() and "SLURM_STEP_ID" in process.environ() and process.name() != "srun"
    except psutil.Error:  # it ended meanwhile
        return False


def main() -> int:
    require(PACKAGES, root=True)
    with tempfile.TemporaryDirectory(prefix="ssd-slurm-") as name:
        folder = Path(name)
        os.chmod(folder, 0o755)  # munge's clients reach its socket
        with SlurmCluster(folder) as cluster:
            check(cluster, folder)
    print("passed: examples/slurm")
    return 0


if __name__ == "__main__":
    sys.exit(main())
