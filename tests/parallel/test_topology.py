"""Joining a job leaves nothing behind on the machine."""

import os
import subprocess
import sys
from pathlib import Path

from tests.ranks import free_port, rank_environment

JOIN = """
import os
from ssd_megatron.parallel.topology import initialize_topology
initialize_topology()
os._exit(9)  # as one that is killed: nothing is cleaned up
"""


def test_joining_compiles_nothing_and_leaves_no_shared_memory(tmp_path: Path) -> None:
    """A build that is killed would leave a lock behind on which every later job waits."""
    builds = tmp_path / "builds"
    port = free_port()
    environment = os.environ | rank_environment(0, 1, port) | {"TORCH_EXTENSIONS_DIR": str(builds)}
    ended = subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 9, ended.stderr
    assert not builds.exists()
    assert not [file for file in Path("/dev/shm").glob("*") if str(port) in file.name]
