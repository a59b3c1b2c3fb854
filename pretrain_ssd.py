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

from ssd_megatron.config.load import load_config
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
    parser.add_argument("--local_rank", type=int, default=None, help="given by the deepspeed launcher")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank. Returns its exit status."""
    arguments = parse_arguments(argv)
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    # After the arguments: importing torch and DeepSpeed takes seconds.
    from ssd_megatron.parallel.device import detect_hardware
    from ssd_megatron.parallel.launch import rank_of_launch, world_size_of_launch
    from ssd_megatron.parallel.topology import initialize_topology, leave_topology
    from ssd_megatron.switching.switch import SwitchError
    from ssd_megatron.training.checkpoint_files import CheckpointError
    from ssd_megatron.training.dry_run import print_dry_run
    from ssd_megatron.training.job import check_run_data, run_job
    from ssd_megatron.training.run_folder import RunFolder
    from ssd_megatron.training.trainer import TrainingError

    rank = rank_of_launch()
    is_first = rank == 0

    def tell(text: str) -> None:
        if is_first:
            print(text, file=sys.stderr, flush=True)

    try:
        overrides = [assignment for group in arguments.set for assignment in group]
        config = load_config(
            arguments.ds_config, overrides, world_size=world_size_of_launch(), hardware=detect_hardware()
        )
    except ConfigError as error:
        tell(f"error: {error}")  # the same on every rank
        return EXIT_UNUSABLE
    if arguments.dry_run:
        if is_first:
            print_dry_run(config)
        return EXIT_OK
    try:
        folder = RunFolder(config.ssd_megatron.run_dir)
        if is_first:
            folder.create_and_lock()
        tokenizer = check_run_data(config, tell)
        run_job(config, folder, tokenizer, initialize_topology())
        leave_topology()
    except (ConfigError, DataError) as error:
        print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
        return EXIT_UNUSABLE
    except (SwitchError, CheckpointError, TrainingError, OSError) as error:  # OSError: a full disk, a removed folder
        print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
