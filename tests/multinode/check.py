"""`deepspeed --hostfile` over two hosts, 2 x 2 ranks: a run with switches, with the losses of one process; and what
becomes of the ranks when the connection to a host is cut.

    make test-multinode    (python -m tests.multinode.check)

Needs root, Debian's openssh-server, openssh-client, pdsh, iproute2 and util-linux, and a kernel with network
namespaces; some minutes on 2 cores. The hosts (tests/multinode/hosts.py) are namespaces on this machine with addresses
and sshd of their own, and are gone afterwards, whatever happens. They share the machine's files, as hosts share a
cluster's.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.launched import (
    ENVIRONMENT,
    ROOT,
    SCRIPT,
    TOLERANCE,
    assert_same_losses,
    config_without_dropout,
    real_corpus,
    require,
    search_path,
    train_alone,
    wait_until,
)
from tests.multinode.hosts import HOSTS, TwoHosts
from tests.small_run import Corpus, curve, write_config

PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
FIRST, SECOND = HOSTS
RANKS_PER_HOST = 2


class Launcher:
    """Starts `deepspeed --hostfile` on the first host."""

    def __init__(self, hosts: TwoHosts, folder: Path) -> None:
        self._hosts, self._folder = hosts, folder
        self._hostfile = folder / "hostfile"
        self._hostfile.write_text("".join(f"{name} slots={RANKS_PER_HOST}\n" for name in HOSTS))

    def start(self, config: dict[str, Any], name: str) -> subprocess.Popen[bytes]:
        file = write_config(config, self._folder / f"{name}.json")
        # DeepSpeed hands variables that begin with PYTHON to the hosts, and OMP_NUM_THREADS not.
        words = ("deepspeed", f"--hostfile={self._hostfile}", f"--master_addr={HOSTS[FIRST]}", str(SCRIPT))
        command = self._hosts.command(FIRST, *words, "--ds_config", str(file))
        environment = os.environ | ENVIRONMENT | {"PATH": search_path()}
        with self.log(name).open("wb") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def ranks(self) -> list[int]:
        """Numbers of the ranks that run, on both hosts."""
        return [pid for host in HOSTS for pid, words in self._hosts.processes(host) if "--local_rank=" in words]

    def connection(self) -> int:
        """Number of the ssh on the first host that holds the second host's ranks."""
        (ssh,) = (pid for pid, words in self._hosts.processes(FIRST) if words.startswith("ssh ") and SECOND in words)
        return ssh


def check_losses(launcher: Launcher, folder: Path, corpus: Corpus) -> None:
    alone = train_alone(config_without_dropout(corpus, folder / "alone"), folder / "alone.json")
    deepspeed = launcher.start(config_without_dropout(corpus, folder / "two_hosts"), "two_hosts")
    assert deepspeed.wait(600) == 0, launcher.log("two_hosts").read_text()
    assert_same_losses(folder / "two_hosts", alone, TOLERANCE)


def check_connection(launcher: Launcher, folder: Path, corpus: Corpus) -> None:
    """The connection to the second host is killed: its ranks have lost their launcher, and all save and end."""
    config = config_without_dropout(corpus, folder / "cut")
    config["ssd_megatron"]["training"] |= {"train_steps": 3000, "eval_interval": 1000}
    deepspeed = launcher.start(config, "cut")
    log = launcher.log("cut")
    wait_until(lambda: "step 3/3000" in log.read_text(), log.read_text)
    assert len(launcher.ranks()) == len(HOSTS) * RANKS_PER_HOST
    os.kill(launcher.connection(), signal.SIGKILL)
    wait_until(lambda: not launcher.ranks(), lambda: f"ranks outlive the connection: {log.read_text()}")
    deepspeed.wait(60)
    (saved,) = (folder / "cut" / "checkpoints").glob("step_*")
    assert int(saved.name.removeprefix("step_")) == curve(folder / "cut")[-1][0]
    print(f"connection cut: {saved.name} saved, all ranks ended", flush=True)


def main() -> int:
    require(PACKAGES, root=True)
    with tempfile.TemporaryDirectory(prefix="ssd-hosts-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        corpus = real_corpus(folder)
        with TwoHosts(folder) as hosts:
            launcher = Launcher(hosts, folder)
            check_losses(launcher, folder, corpus)
            check_connection(launcher, folder, corpus)
    print("passed: deepspeed --hostfile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
