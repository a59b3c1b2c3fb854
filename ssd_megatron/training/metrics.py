"""metrics.jsonl: the numbers of a run, one JSON object a line.

Every line has `step` (the first step is 1) and `kind`:

| kind   | further keys                                                                                              |
|--------|-----------------------------------------------------------------------------------------------------------|
| train  | loss, grad_norm, lr, mode, tokens_per_second, seconds, flops, flops_dense (cumulative), skipped,    |
|        | loss_scale, peak_memory (bytes of rank 0 so far; on a GPU its tensors, on a CPU its process); every step  |
| eval   | loss_dense, loss_sparse (null before the first partition), seconds                                        |
| save   | seconds for which a checkpoint held training up                                                           |
| check  | similarity, similarity_layers, overlap (null at the first check), active_fraction (per layer), stable,    |
|        | seconds                                                                                                   |
| switch | from, to, seconds, seconds_{statistics, cluster, transfer, verify}, bytes_moved, loss_before,             |
|        | loss_after, loss_sparse, reason, similarity, top_k (these two by layer), imbalance_before,                |
|        | imbalance_after (as below, of the probe batch; null back to dense and where one rank has all experts)     |
| load   | expert_load: per layer, tokens of the busiest expert over the mean; home_load: per layer, tokens of each  |
|        | of the tensor x expert parallel ranks that share the experts; of the step's last microbatch               |
| placement | experts moved to other ranks inside a sparse phase: seconds, bytes_moved, imbalance_before,        |
|        | imbalance_after (tokens of the busiest of the ranks that share experts over the mean, worst layer)        |
| mask   | an update of sparse weights' masks: update (its number), share (of the live blocks pruned and regrown),   |
|        | live, ever (shares of the weights that live, and that ever did), regrown_pruned (share of those regrown   |
|        | at the update before; null at the first), seconds                                                         |
| resume | checkpoint                                                                                                |
| fault  | what                                                                                                      |

`flops_dense` is what the same steps would have cost had all been dense, weights too. A number that is not finite is
null, and `<name>_text` says which one it was, so every line is valid JSON.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssd_megatron.errors import DataError
from ssd_megatron.files import write_atomically
from ssd_megatron.switching.schedule import PhaseSpan

FILE_NAME = "metrics.jsonl"

Record = dict[str, Any]


class MetricsLog:
    """Appends to run_dir/metrics.jsonl. One process of a run has one."""

    def __init__(self, run_dir: Path, last_step: int) -> None:
        """Open the log of a run that goes on after `last_step` (0: a new run).

        Lines of later steps, which will be trained again, and a torn last line are dropped.

        Raises:
            DataError: a line before the last one cannot be read.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        if path.exists():
            kept = [line for line, record in _lines(path) if record["step"] <= last_step]
            write_atomically(path, b"".join(line + b"\n" for line in kept))
        # Line buffering: what was written survives this process, whatever ends it.
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record. Values are numbers, strings, None, or lists and dicts of them."""
        record: Record = {"step": step, "kind": kind}
        for name, value in values.items():
            record[name] = _replace_non_finite(value, as_text=False)
            text = _replace_non_finite(value, as_text=True)
            if text != record[name]:
                record[f"{name}_text"] = text
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Return when all records are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close. The log cannot be written afterwards."""
        self.flush()
        self._file.close()


def read_metrics(run_dir: Path) -> list[Record]:
    """Read all records of a run, which may still be running: a torn last line is left out.

    Raises:
        DataError: there is no metrics.jsonl, or a line before the last one cannot be read.
    """
    path = run_dir / FILE_NAME
    if not path.exists():
        raise DataError(f"{run_dir} has no {FILE_NAME}: give the run_dir of a run that has started")
    return [record for _, record in _lines(path)]


def phases_of(records: Sequence[Record]) -> list[PhaseSpan]:
    """Find the phases of a run from its train records."""
    phases: list[PhaseSpan] = []
    for record in records:
        if record["kind"] != "train":
            continue
        if phases and phases[-1].mode == record["mode"]:
            phases[-1] = PhaseSpan(phases[-1].start_step, record["step"], record["mode"])
        else:
            phases.append(PhaseSpan(record["step"], record["step"], record["mode"]))
    return phases


def _lines(path: Path) -> list[tuple[bytes, Record]]:
    """All whole lines of the file with their records."""
    # A write ends with the newline: what follows the last one is a write that was cut short.
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = []
    for number, line in enumerate(whole.splitlines(), start=1):
        record = _parse(line)
        if record is None:
            raise DataError(f"{path} line {number} is not a metrics record: remove the line, which says {line[:80]!r}")
        lines.append((line, record))
    return lines


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return record if isinstance(record, dict) and {"step", "kind"} <= record.keys() else None


def _replace_non_finite(value: Any, as_text: bool) -> Any:
    """Put None, or the number's text, in place of nan, inf and -inf."""
    if isinstance(value, dict):
        return {name: _replace_non_finite(item, as_text) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item, as_text) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value) if as_text else None
    return value
