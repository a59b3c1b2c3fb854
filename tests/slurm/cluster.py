"""A SLURM cluster on one machine: its own munged, slurmctld and two slurmd ("nodes" n1 and n2), all in one folder.

Nothing of the system's is read or written: own munge key and socket, own slurm.conf, free ports. Two partitions: jobs
of `high` take the nodes from jobs of `low`, which get a signal and GRACE_SECONDS.
"""

import os
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.launched import search_path, wait_until
from tests.ranks import free_port

GRACE_SECONDS = 60
NODES = ("n1", "n2")
CONF = """
ClusterName=ssd
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={controller_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=30
MinJobAge=3600
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=low Nodes=n1,n2 Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=n1,n2 State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"


class SlurmCluster:
    """Starts the daemons on entry, ends them and their jobs on exit.

    Args:
        folder: where everything lies; removed by whoever made it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}

    def __enter__(self) -> Self:
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(NODE.format(name=name, host=host, port=free_port()) for name in NODES)
        (self._folder / "slurm.conf").write_text(
            CONF.format(folder=self._folder, host=host, controller_port=free_port(), nodes=nodes, grace=GRACE_SECONDS)
        )
        (self._folder / "state").mkdir()
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = {name: f"--{name}-file={self._folder}/munge.{name}" for name in ("key", "log", "pid", "seed")}
        try:
            self._start("munged", "--foreground", f"--socket={self._folder}/munge.socket", *munge.values())
            wait_until(lambda: (self._folder / "munge.socket").exists(), self._said)
            self._start("slurmctld", "-D")
            for name in NODES:
                (self._folder / f"spool_{name}").mkdir()
                self._start("slurmd", "-D", "-N", name)
            wait_until(lambda: self.run("sinfo", "--noheader", "-o", "%T %D", "-p", "low") == "idle 2", self._said)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def run(self, *command: str, **variables: str) -> str:
        """What a SLURM command prints.

        Raises:
            AssertionError: it failed, with what it said.
        """
        done = subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def send_usr1(self, job: str) -> None:
        """Send SIGUSR1 to the ranks of a job. The status of scancel says nothing: it repeats itself and then complains
        that the job is gone."""
        subprocess.run(["scancel", "--signal=USR1", job], env=self.environment, check=False, timeout=60)

    def state(self, job: str) -> str:
        """State of a job, such as PENDING, RUNNING, COMPLETED."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def _start(self, *command: str) -> None:
        log = (self._folder / f"{command[0]}.out").open("ab")
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        )

    def _said(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1000:]}" for path in self._folder.glob("*.out"))

    def _stop(self) -> None:
        if len(self._daemons) > 2:
            subprocess.run(["scancel", "--full", "-u", "root"], env=self.environment, check=False, timeout=60)
            end = time.monotonic() + 40
            while subprocess.run(["squeue", "-h"], env=self.environment, capture_output=True, check=False).stdout:
                if time.monotonic() > end:
                    break
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(30)
