"""A run in one call, for Python: what pretrain_ssd.py does for the command line."""

import signal
from collections.abc import Sequence
from pathlib import Path

from ssd_megatron.parallel.topology import initialize_topology, leave_topology
from ssd_megatron.training.job import run_job
from ssd_megatron.training.signals import SIGNALS
from ssd_megatron.training.start import Job, prepare_job, read_config


def train(ds_config: Path | str, overrides: Sequence[str] = ()) -> Path:
    """Train as configured, from the run's newest checkpoint if there is one (collective over the ranks of a launcher).

    To be called in the main thread: signals stop the run. All processes of a launcher call it, or one process alone.

    Args:
        ds_config: a DeepSpeed config with a section "ssd_megatron".
        overrides: "path=value", as after --set.
    Returns:
        the run's folder, once the run is finished or has saved and stopped on request.
    Raises:
        ConfigError, DataError: the configuration or the data cannot be used.
        TrainingError, SwitchError, CheckpointError, CollectiveError: the run cannot go on.
    """
    job = prepare_job(read_config(Path(ds_config), overrides))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        run(job)
    finally:  # this process goes on, and may start another job
        leave_topology()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return job.folder.path


def run(job: Job) -> None:
    """Train a job whose ranks have met, in groups that the caller has to leave (collective). Raises as run_job."""
    run_job(job.config, job.folder, job.tokenizer, initialize_topology(job.config.ssd_megatron.parallel, job.meeting))
