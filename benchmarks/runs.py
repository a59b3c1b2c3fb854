"""Real training runs as processes of their own, resumed where they stopped and not made twice."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ssd_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


class Unfinished(Exception):
    """A run has stopped before its end; it goes on where it stopped."""


def make_embedded_corpus(family: str = "gpt") -> None:
    """The corpus and tokenizer that every machine can make; at once if they are there."""
    _make_corpus(embedded_corpus(family), [] if family == "gpt" else ["--reserve", family])


def make_machine_corpus() -> str:
    """The same of all text of this machine, for larger models; returns its folder."""
    folder = "data/machine"
    _make_corpus(folder, ["--machine"])
    return folder


def _make_corpus(folder: str, options: list[str]) -> None:
    subprocess.run([sys.executable, "tools/embedded_corpus.py", "--out", folder, *options], cwd=ROOT, check=True)


def embedded_corpus(family: str) -> str:
    """Its folder; the tokenizers of BERT and T5 reserve tokens."""
    return "data/embedded" if family == "gpt" else f"data/embedded-{family}"


def is_finished(run_dir: Path) -> bool:
    path = run_dir / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def finish_run(config: dict[str, Any], threads: int, until: float = math.inf) -> dict[str, Any]:
    """Run, or resume, or take the finished run of a ds.json whose ssd_megatron.run_dir is absolute.

    Args:
        until: when to stop it, by time.monotonic.

    Returns:
        what its summary.json says.
    Raises:
        Unfinished: it was stopped, here or by somebody else.
        CalledProcessError: it failed; what it said is in console.log in its folder.
        ConfigError: the folder has a run of other settings.
    """
    run_dir = Path(config["ssd_megatron"]["run_dir"])
    config_path, content = run_dir.with_name(f"{run_dir.name}.json"), json.dumps(config, indent=2)
    if config_path.exists() and config_path.read_text() != content:
        raise ConfigError(f"{run_dir} has a run of other settings (as {config_path} says): give another --out")
    if not is_finished(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        config_path.write_text(content)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        with (run_dir / "console.log").open("a") as log:
            command = [sys.executable, str(ROOT / "pretrain_ssd.py"), "--ds_config", str(config_path)]
            _run(command, environment, log, until)
    if not is_finished(run_dir):
        raise Unfinished(f"{run_dir} was stopped: the same command goes on with it")
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


@contextmanager
def runs_at_once(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Workers for so many runs at the same time; what is still waiting is left out when something fails."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run(command: list[str], environment: dict[str, str], log: TextIO, until: float) -> None:
    """As subprocess.run with `check`, but asks to stop at `until`."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    stopped = 0
    try:
        status = process.wait(None if until == math.inf else max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        status, stopped = process.wait(), -signal.SIGTERM  # that is how it ends if it had not begun yet
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status not in (0, stopped):
        raise subprocess.CalledProcessError(status, command)
