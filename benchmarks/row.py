"""One line of a benchmark's table, and the table."""

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement; `ideal` is what nothing could beat, or for ratios what the exact method gives."""

    name: str
    value: float
    goal: float
    ideal: float

    @property
    def ok(self) -> bool:
        return self.value <= self.goal


def commit() -> str:
    """That of the working tree; where only a copy of the files is, that in the environment's COMMIT."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return found or os.environ.get("COMMIT", "unknown")


def publish(rows: Iterable[Row], hardware: str, path: Path | None) -> list[Row]:
    """Print rows as they come, and write them to a JSON file, which is complete after each."""
    found: list[Row] = []
    of_commit = commit()
    print(f"{hardware}, commit {of_commit}")
    for row in rows:
        print(
            f"{_short(row.value)}  goal {_short(row.goal)} {'met   ' if row.ok else 'missed'}  {row.name}", flush=True
        )
        found.append(row)
        if path is not None:
            written = [{**asdict(row), "ok": row.ok, "hardware": hardware, "commit": of_commit} for row in found]
            path.write_text(json.dumps(written, indent=2) + "\n")
    return found


def _short(value: float) -> str:
    return f"{value:6.2f}" if value == 0 or abs(value) >= 0.01 else f"{value:6.0e}"
