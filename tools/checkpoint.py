"""Look at a checkpoint, verify it, or make one safetensors file of it.

    python tools/checkpoint.py inspect DIR
    python tools/checkpoint.py verify DIR
    python tools/checkpoint.py consolidate DIR --out model.safetensors [--kind master] [--dtype bf16]

DIR is a run_dir, of which the newest checkpoint is taken, or the folder of one checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ssd_megatron.parallel.zero import KINDS, MASTER
from ssd_megatron.training.checkpoint_tools import DTYPES, consolidate, describe, find_checkpoint, verify
from ssd_megatron.training.exit_status import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done and whole, 1 damaged or not written, 2 no such checkpoint."""
    arguments = _parse(argv)
    damages: list[str] = []
    return exit_status(lambda: damages.extend(_work(arguments))) or int(bool(damages))


def _work(arguments: argparse.Namespace) -> list[str]:
    """Returns the damages that were looked for and found."""
    folder = find_checkpoint(arguments.dir)
    if arguments.command == "verify":
        damages = verify(folder)
        print("\n".join(damages) or f"{folder} is whole")
        return damages
    if arguments.command == "inspect":
        console = Console()
        for table in describe(folder):
            console.print(table)
    else:
        size = consolidate(folder, arguments.out, arguments.kind, DTYPES[arguments.dtype])
        print(f"{arguments.out}: {size / 1e6:,.1f} MB, {arguments.kind} as {arguments.dtype} of {folder}")
    return []


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("inspect", "step, mode, layout, partition, tensors with shapes and sizes, counters, checksums"),
        ("verify", "check sizes, checksums and that every element is there once; a line for each damage"),
        ("consolidate", "write one safetensors file with the logical tensors"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("dir", metavar="DIR", type=Path, help="a run_dir, or the folder of one checkpoint")
    command.add_argument("--out", type=Path, required=True, help="file to write; it appears once it is complete")
    command.add_argument("--kind", choices=KINDS, default=MASTER, help="what of each tensor (default: its fp32 master)")
    command.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the values (default: fp32)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
