"""Two "hosts" on one machine: namespaces of network, processes, mounts and host name, joined by a bridge, each with an
sshd.

What happens on a host stays there: its processes see each other only (a `pkill` ends nobody else's); /etc/hosts and
ssh's configuration are its own. Whatever was set up is gone when the block ends, also after a failure.
"""

import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.launched import search_path, wait_until

HOSTS = {"ssd-host1": "10.77.0.1", "ssd-host2": "10.77.0.2"}
BRIDGE = "ssd-bridge"
SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin prohibit-password
PidFile none
StrictModes no
UsePAM no
"""
SSH = """
Host *
  IdentityFile {folder}/user_key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
# Runs as the first process of a host; when it ends, the kernel ends all others.
INIT = """
set -e
mount --make-rprivate /
hostname {name}
ip link set lo up
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mkdir -p /run/sshd
exec $(command -v sshd) -D -e -f {folder}/sshd_config
"""


class TwoHosts:
    """Sets the hosts up on entry and takes them down on exit.

    Args:
        folder: where keys and configuration lie; removed by whoever made it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._inits: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self._write_files()
            self._join_networks()
            for name in HOSTS:
                self._boot(name)
            for name in HOSTS:
                wait_until(lambda name=name: self._answers(name), self.said, 30)
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._take_down()

    def command(self, host: str, *words: str) -> list[str]:
        """A command that runs inside a host, without ssh, as a child of this process."""
        shell = self._children(self._inits[host].pid)[0]
        return ["nsenter", f"--target={shell}", "--mount", "--uts", "--net", "--pid", *words]

    def processes(self, host: str) -> list[tuple[int, str]]:
        """Number (as seen from here) and command line of every process of a host but sshd's first."""
        namespace = os.readlink(f"/proc/{self._children(self._inits[host].pid)[0]}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == namespace:
                    found.append((int(entry.name), (entry / "cmdline").read_text().replace("\0", " ")))
            except OSError:  # it ended meanwhile
                continue
        return found

    def said(self) -> str:
        return "\n".join(path.read_text()[-1000:] for path in self._folder.glob("*.sshd.log"))

    def _write_files(self) -> None:
        for key in ("host_key", "user_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / key))
        (self._folder / "sshd_config").write_text(SSHD.format(folder=self._folder))
        (self._folder / "ssh_config").write_text(SSH.format(folder=self._folder))
        names = "".join(f"{address} {name}\n" for name, address in HOSTS.items())
        (self._folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")

    def _join_networks(self) -> None:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        for number, (name, address) in enumerate(HOSTS.items(), start=1):
            run("ip", "netns", "add", name)
            run("ip", "link", "add", link(number), "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", link(number), "master", BRIDGE, "up")
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")

    def _boot(self, name: str) -> None:
        namespaces = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts")
        with (self._folder / f"{name}.sshd.log").open("wb") as log:
            self._inits[name] = subprocess.Popen(
                ["ip", "netns", "exec", name, *namespaces, "sh", "-c", INIT.format(name=name, folder=self._folder)],
                env=os.environ | {"PATH": search_path()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _answers(self, name: str) -> bool:
        assert self._inits[name].poll() is None, self.said()
        if not self._children(self._inits[name].pid):
            return False
        probe = self.command(name, "ssh", name, "true")
        return subprocess.run(probe, capture_output=True, check=False, env=environment()).returncode == 0

    def _children(self, pid: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def _take_down(self) -> None:
        for init in self._inits.values():
            init.kill()  # `unshare --kill-child`: the host ends with it
            init.wait(30)
        # The links by name: a namespace that was deleted keeps its own until its last socket is closed.
        links = [BRIDGE, *(link(number) for number in range(1, len(HOSTS) + 1))]
        for command in [("netns", "delete", name) for name in HOSTS] + [("link", "delete", name) for name in links]:
            subprocess.run(["ip", *command], capture_output=True, check=False, env=environment())


def link(number: int) -> str:
    """The end of a host's cable that is plugged into the bridge."""
    return f"ssd-veth{number}"


def environment() -> dict[str, str]:
    return os.environ | {"PATH": search_path()}


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
