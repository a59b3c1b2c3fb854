"""Redraw the plots of runs, also of one that is still running: python tools/plot_run.py RUN_DIR [RUN_DIR ...]"""

import argparse
import sys
from pathlib import Path

from ssd_megatron.training.plots import draw_run


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Draw the plots of runs into their plots/ folders, from metrics.jsonl."
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="folder of a run")
    run_dirs = parser.parse_args().run_dirs
    # After the arguments: importing torch and DeepSpeed takes seconds.
    from ssd_megatron.training.exit_status import exit_status

    return exit_status(lambda: _plot(run_dirs))


def _plot(run_dirs: list[Path]) -> None:
    for run_dir in run_dirs:
        for path in draw_run(run_dir):
            print(path)


if __name__ == "__main__":
    sys.exit(main())
