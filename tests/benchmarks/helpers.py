"""Small real runs of benchmarks."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

from tests.ranks import start_process

FIELDS = {"name", "value", "goal", "ideal", "ok", "hardware", "commit", "versions", "command"}


def run_benchmark(name: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows that `python -m benchmarks.<name>` writes, each with every field; names are unique."""
    path = folder / "rows.json"
    process = start_process(_main, name, [*arguments, "--json", str(path)])
    process.join(240)
    assert process.exitcode in (0, 1), f"exit code {process.exitcode}"  # 1: a goal is missed
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    assert all(row.keys() >= FIELDS for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        if row["value"] is None:
            assert row["reason"] and row["ok"] is None
        else:
            better = row["value"] >= row["goal"] if row["better"] == "higher" else row["value"] <= row["goal"]
            assert row["ok"] is better
    return rows


def _main(name: str, arguments: list[str]) -> None:
    os._exit(importlib.import_module(f"benchmarks.{name}").main(arguments))
