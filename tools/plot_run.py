"""Redraw the plots of runs, also of one that is still running: python tools/plot_run.py RUN_DIR [RUN_DIR ...]"""

import argparse
import sys
from pathlib import Path

from ssd_megatron.errors import DataError
from ssd_megatron.training.plots import draw_run


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Draw the plots of runs into their plots/ folders, from metrics.jsonl."
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="folder of a run")
    for run_dir in parser.parse_args().run_dirs:
        try:
            paths = draw_run(run_dir)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for path in paths:
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
