"""Write what runs have done into one HTML file to look at, also of runs that are still running:
python tools/report.py RUN_DIR [RUN_DIR ...] [--out FILE.html]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssd_megatron.files import write_atomically
from ssd_megatron.reporting.page import render
from ssd_megatron.reporting.run import read_runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 not written, 2 a folder holds no run that has started."""
    parser = argparse.ArgumentParser(
        description="Write a self-contained HTML report of one run, or of several compared."
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--out", metavar="FILE.html", type=Path, help="(default: report.html in the first RUN_DIR)")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.run_dirs[0] / "report.html"
    # After the arguments: importing torch and DeepSpeed takes seconds.
    from ssd_megatron.training.exit_status import exit_status

    return exit_status(lambda: _report(arguments.run_dirs, out))


def _report(run_dirs: Sequence[Path], out: Path) -> None:
    write_atomically(out, render(read_runs(run_dirs)).encode())
    print(out)


if __name__ == "__main__":
    sys.exit(main())
