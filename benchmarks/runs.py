"""Real training runs as processes of their own, resumed where they stopped and not made twice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ssd_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def make_embedded_corpus(family: str = "gpt") -> None:
    """The corpus and tokenizer that every machine can make; at once if they are there."""
    reserve = [] if family == "gpt" else ["--reserve", family]
    command = [sys.executable, "tools/embedded_corpus.py", "--out", embedded_corpus(family), *reserve]
    subprocess.run(command, cwd=ROOT, check=True)


def embedded_corpus(family: str) -> str:
    """Its folder; the tokenizers of BERT and T5 reserve tokens."""
    return "data/embedded" if family == "gpt" else f"data/embedded-{family}"


def is_finished(run_dir: Path) -> bool:
    path = run_dir / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def finish_run(config: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run, or resume, or take the finished run of a ds.json whose ssd_megatron.run_dir is absolute.

    Returns:
        what its summary.json says.
    Raises:
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
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary
