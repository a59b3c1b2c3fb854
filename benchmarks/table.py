"""What benchmarks have in common at the end: a table of rows with their goals, and the same rows as JSON."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rich.console
import torch
from rich.table import Table

from benchmarks.row import Missing, Row
from ssd_megatron.parallel.device import IS_CUDA, detect_hardware
from ssd_megatron.training.run_folder import versions

COMMIT = os.environ.get("COMMIT", "unknown")  # for a copy of the files without their repository


def parser_for(description: str | None, *, quick: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments that benchmarks share; `quick`: this one has a short form."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file as well")
    if quick:
        parser.add_argument("--quick", action="store_true", help="small shapes, few turns: under a minute on 2 cores")
    return parser


def report(title: str, rows: Iterable[Row | Missing], json_path: Path | None) -> bool:
    """Show rows while they are measured and as a table at the end, and keep them in a file that grows with them.

    Returns:
        whether something was measured, and all of it has met its goals.
    """
    console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    seen: list[Row | Missing] = []
    for row in rows:
        seen.append(row)
        print(f"{len(seen)}: {row.name}", file=sys.stderr, flush=True)
        if json_path is not None:
            json_path.write_text(json.dumps(records(seen), indent=1) + "\n")
    console.print(f"{hardware()}, commit {versions().get('git_commit', COMMIT)}")
    console.print(table(title, seen))
    measured = [row for row in seen if isinstance(row, Row)]
    met = [row for row in measured if row.ok]
    console.print(f"{len(met)} of {len(measured)} goals met, {len(seen) - len(measured)} not measured here")
    return len(met) == len(measured) > 0


def records(rows: Iterable[Row | Missing]) -> list[dict[str, Any]]:
    """Rows as JSON values, each complete: where, with what and how it was measured."""
    installed = versions()
    where = {
        "hardware": hardware(),
        "commit": installed.pop("git_commit", COMMIT),
        "versions": installed,
        "command": command(),
    }
    return [_record(row) | where for row in rows]


def table(title: str, rows: Iterable[Row | Missing]) -> Table:
    shown = Table("measurement", "value", "goal", "ideal", "", "details", title=title)
    for row in rows:
        if isinstance(row, Missing):
            shown.add_row(row.name, "-", "", "", "not here", row.reason)
            continue
        details = ", ".join(f"{name} {_number(value)}" for name, value in row.details.items())
        sign, verdict = ">=" if row.at_least else "<=", "met" if row.ok else "missed"
        shown.add_row(row.name, f"{row.value:.3f}", f"{sign} {row.goal:g}", _number(row.ideal), verdict, details)
    return shown


def hardware() -> str:
    """The machine in words."""
    cores = len(os.sched_getaffinity(0))
    cpu = f"{torch.get_num_threads()} threads on {cores} cores"
    if not IS_CUDA:
        return f"{detect_hardware().name}, {cpu}"
    memory = torch.cuda.get_device_properties().total_memory / 2**30
    return f"{detect_hardware().name}, {memory:.0f} GiB, CUDA {torch.version.cuda}; host: {cpu}"


def command() -> str:
    """How this process was started, as one would type it."""
    main = sys.modules["__main__"].__spec__
    start = ["python", "-m", main.name] if main is not None else ["python", Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


def _record(row: Row | Missing) -> dict[str, Any]:
    if isinstance(row, Missing):
        return {"name": row.name, "value": None, "goal": None, "ideal": None, "ok": None, "reason": row.reason}
    return {
        "name": row.name,
        "value": row.value,
        "goal": row.goal,
        "ideal": row.ideal,
        "ok": row.ok,
        "better": "higher" if row.at_least else "lower",
        "details": dict(row.details),
    }


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
