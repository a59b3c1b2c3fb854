"""What the checks of real launchers (tests/mpi, tests/multinode, tests/slurm) have in common.

They need packages and rights that a test run cannot count on, so each is a command of its own: it names what is missing
and exits with 2; 1 says that a check failed, 0 that all passed.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.small_run import Corpus, curve, make_corpus, records, small_config, write_config

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "pretrain_ssd.py"
# What ranks started by any of the launchers need; one thread, so that sums come in one order.
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
# Losses of another number of ranks: sums in another order.
TOLERANCE = 1e-4


def require(packages: Mapping[str, str], *, root: bool) -> None:
    """Begin a check: exit with 2 unless every command is there, by the name of the Debian package that has it.

    From here on SIGTERM ends the check as Ctrl-C does: after everything is taken down.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    missing = sorted(
        {package for command, package in packages.items() if shutil.which(command, path=search_path()) is None}
    )
    if missing:
        print(f"missing: apt-get install --no-install-recommends {' '.join(missing)}", file=sys.stderr)
        sys.exit(2)
    if root and os.geteuid() != 0:
        print("this check needs root", file=sys.stderr)
        sys.exit(2)


def search_path() -> str:
    """PATH with the folders of daemons."""
    return f"{ENVIRONMENT['PATH']}:/usr/sbin:/sbin"


def real_corpus(folder: Path) -> Corpus:
    return make_corpus(folder, sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60])


def config_without_dropout(corpus: Corpus, run_dir: Path) -> dict[str, Any]:
    """The small run with random partitions: one that any number of ranks trains to the same losses."""
    config = small_config(corpus, run_dir)
    config["ssd_megatron"]["model"]["dropout"] = 0.0
    config["ssd_megatron"]["ssd"]["partition"] = "random"
    config["ssd_megatron"]["logging"]["log_interval"] = 1
    return config


def train_alone(config: dict[str, Any], file: Path) -> Path:
    """Train as one process of plain python; returns the run folder."""
    command = [sys.executable, str(SCRIPT), "--ds_config", str(write_config(config, file))]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(config["ssd_megatron"]["run_dir"])


def assert_same_losses(run_dir: Path, reference: Path, tolerance: float, *, steps: int | None = None) -> None:
    """Every step once, the same switches, and losses and gradient norms within a relative tolerance (0: the same bits).

    Args:
        steps: how many of the first are compared, if not all.
    """
    mine, expected = curve(run_dir)[:steps], curve(reference)[:steps]
    assert [step for step, _, _ in mine] == [step for step, _, _ in expected]
    last_step = mine[-1][0]
    switches = [(record["step"], record["to"]) for record in records(run_dir, "switch") if record["step"] <= last_step]
    assert switches == [(record["step"], record["to"]) for record in records(reference, "switch")]
    assert "sparse" in dict(switches).values()
    pairs = [pair for a, b in zip(mine, expected, strict=True) for pair in zip(a[1:], b[1:], strict=True)]
    worst = max(abs(value / other - 1) for value, other in pairs)
    assert worst <= tolerance, f"losses and gradient norms differ by {worst:.1e}"
    phases = ", ".join(f"{mode} at {step}" for step, mode in switches)
    print(f"{run_dir.name}: {len(mine)} steps ({phases}) equal to {worst:.1e}", flush=True)


def wait_until(condition: Callable[[], bool], message: Callable[[], str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message()
        time.sleep(0.2)
