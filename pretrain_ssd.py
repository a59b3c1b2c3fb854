"""Pre-train a language model with switchable sparse-dense learning.

    deepspeed pretrain_ssd.py --ds_config examples/quickstart/ds.json

also under torchrun, srun and mpirun, and as one process with plain python. Exit status: 0 finished, or saved and
stopped on request; 2 the configuration or the data cannot be used; 1 anything else.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ssd_megatron.errors import ConfigError, DataError

EXIT_OK, EXIT_FAILED, EXIT_UNUSABLE = 0, 1, 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pre-train a language model with switchable sparse-dense learning.",
        epilog="Example: deepspeed pretrain_ssd.py --ds_config ds.json --set ssd_megatron.training.train_steps=50",
    )
    parser.add_argument("--ds_config", type=Path, required=True, help='DeepSpeed config with a section "ssd_megatron"')
    parser.add_argument(
        "--set", action="append", nargs="+", default=[], metavar="PATH=VALUE", help="override a value of the config"
    )
    parser.add_argument("--dry_run", action="store_true", help="print config, sizes, memory and FLOPs, and exit")
    parser.add_argument("--world_size", type=int, default=None, help="with --dry_run: processes of the job")
    parser.add_argument("--rank", type=int, default=None, help="with --dry_run: rehearse this one of them")
    parser.add_argument("--local_rank", type=int, default=None, help="given by the deepspeed launcher")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and (arguments.world_size, arguments.rank) != (None, None):
        parser.error("--world_size and --rank belong to --dry_run: a launcher sets them for a run")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank. Returns its exit status."""
    arguments = parse_arguments(argv)
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    # After the arguments: importing torch and DeepSpeed takes seconds.
    from ssd_megatron.parallel.collectives import CollectiveError
    from ssd_megatron.parallel.launch import rank_of_launch
    from ssd_megatron.parallel.topology import leave_topology
    from ssd_megatron.switching.switch import SwitchError
    from ssd_megatron.training.checkpoint_files import CheckpointError
    from ssd_megatron.training.dry_run import print_dry_run
    from ssd_megatron.training.rehearsal import print_rehearsal, rehearse
    from ssd_megatron.training.run import run
    from ssd_megatron.training.start import prepare_job, read_config, tell
    from ssd_megatron.training.trainer import TrainingError

    try:
        rank = rank_of_launch()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_UNUSABLE
    overrides = [assignment for group in arguments.set for assignment in group]
    config = read_config(arguments.ds_config, overrides, arguments.world_size)
    if arguments.dry_run:
        if isinstance(config, ConfigError):
            tell(f"error: {config}")
            return EXIT_UNUSABLE
        if rank == 0:
            try:
                rehearsal = None if arguments.rank is None else rehearse(config, arguments.rank)
            except ConfigError as error:
                tell(f"error: {error}")
                return EXIT_UNUSABLE
            print_dry_run(config)
            if rehearsal is not None:
                print_rehearsal(rehearsal)
        return EXIT_OK
    try:
        job = prepare_job(config)
    except ConfigError as error:
        tell(f"error: {error}")  # the same on every rank
        return EXIT_UNUSABLE
    except CollectiveError as error:
        print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    try:
        run(job)
        leave_topology()
    except (ConfigError, DataError) as error:
        print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
        return EXIT_UNUSABLE
    except (SwitchError, CheckpointError, TrainingError, CollectiveError) as error:
        print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except OSError as error:  # a full disk, a removed folder; not every error names the file
        where = f"ssd_megatron.run_dir is {job.folder.path}"
        print(f"rank {rank}: error: {error} ({where})", file=sys.stderr, flush=True)
        return EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
