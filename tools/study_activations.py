"""How the neurons of a run fired over its training, measured at its checkpoints: pictures and tables.

Needs the run's data, of which it takes the probe samples; checkpoint.keep_last null keeps all checkpoints of a run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = "example:\n  python tools/study_activations.py runs/quickstart --out activations\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 a checkpoint is damaged, 2 there is nothing to study."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="folder to write into (default: activations in RUN_DIR)")
    parser.add_argument("--samples", type=int, help="probe samples (default: as the run, at least 4,096 tokens)")
    arguments = parser.parse_args(argv)
    # After the arguments: importing torch and DeepSpeed takes seconds.
    from ssd_megatron.training.exit_status import exit_status

    return exit_status(lambda: _study(arguments))


def _study(arguments: argparse.Namespace) -> None:
    from rich.progress import track

    from ssd_megatron.parallel.launch import require_one_process
    from ssd_megatron.parallel.topology import initialize_topology, leave_topology
    from ssd_megatron.study.activations import Look, look
    from ssd_megatron.study.pictures import write_study
    from ssd_megatron.study.subject import find_checkpoints, prepare
    from ssd_megatron.training.metrics import read_metrics

    require_one_process("tools/study_activations.py")
    folders, records = find_checkpoints(arguments.run_dir), read_metrics(arguments.run_dir)
    subject = prepare(arguments.run_dir, initialize_topology(), arguments.samples)
    looks: list[Look] = []
    for folder in track(folders, "checkpoints"):
        looks.append(look(subject, subject.load(folder), looks[-1] if looks else None))
    leave_topology()
    ssd = subject.config.ssd_megatron.ssd
    out = arguments.out or arguments.run_dir / "activations"
    for path in write_study(out, looks, records, chance=ssd.top_k / ssd.num_experts):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
