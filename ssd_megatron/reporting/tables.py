"""What a report says in words and numbers: facts, switches, events, and settings that differ between runs."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssd_megatron.config.load import flatten
from ssd_megatron.reporting.run import Run
from ssd_megatron.training.console import format_loss, format_seconds, short_number

_MODES = ("dense", "sparse")
_NO_EVENTS = {"train", "eval", "save", "check", "load", "switch"}
_SWITCH_PARTS = ("statistics", "cluster", "transfer", "verify")


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]


def facts(run: Run) -> list[tuple[str, str]]:
    """What one wants to know first: name and value."""
    last, spent = run.train[-1], run.spent
    evals = run.of("eval")
    steps = f"{run.last_step:,}" if run.train_steps is None else f"{run.last_step:,} of {run.train_steps:,}"
    found = [("status", run.status), ("steps", steps)]
    found += [(f"validation loss, {mode}", format_loss(evals[-1][f"loss_{mode}"])) for mode in _MODES if evals]
    saved = 1 - last["flops"] / last["flops_dense"]
    found += [("FLOPs", short_number(last["flops"])), ("FLOPs saved", f"{saved:.1%}")]
    found += [("time", format_seconds(float(spent.axes["seconds"][-1])))]
    time_saved = _time_saved(run)
    if time_saved is not None:
        found.append(("time saved", f"{time_saved:.1%}"))
    found.append(("tokens", short_number(float(spent.axes["tokens"][-1]))))
    for mode in _MODES:
        speeds = [record["tokens_per_second"] for record in run.train if record["mode"] == mode]
        if speeds:
            found.append((f"tokens/s, {mode}", short_number(statistics.median(speeds))))
    memory = last.get("peak_memory")
    if memory is not None:
        found.append(("peak memory", f"{short_number(memory)}B"))
    return found


def switch_table(run: Run) -> Table | None:
    """Each switch with the seconds of its parts; None if there was none."""
    switches = run.of("switch")
    if not switches:
        return None
    header = ["step", "switch", "reason", "seconds", *_SWITCH_PARTS, "other", "moved", "dense loss before -> after"]
    header += ["sparse loss", "similarity", "experts by layer", "imbalance"]
    return Table("Switches", header, [_switch_row(switch) for switch in switches])


def event_table(run: Run) -> Table | None:
    """Whatever else the run has recorded: faults, resumes, experts that moved; None if nothing."""
    rows = [
        [f"{record['step']:,}", record["kind"], ", ".join(f"{name} {_shown(value)}" for name, value in _rest(record))]
        for record in run.records
        if record["kind"] not in _NO_EVENTS
    ]
    return Table("Events", ["step", "event", ""], rows) if rows else None


def comparison_table(runs: Sequence[Run]) -> Table:
    """The facts of several runs beside each other."""
    found = [dict(facts(run)) for run in runs]
    names = list(dict.fromkeys(name for run in found for name in run))
    return Table(
        "Results", ["", *(run.name for run in runs)], [[n, *(run.get(n, "-") for run in found)] for n in names]
    )


def difference_table(runs: Sequence[Run]) -> Table | None:
    """Settings and versions that are not the same in all runs, by dotted path; None if there are none."""
    settings = [_settings(run) for run in runs]
    paths = sorted({path for run in settings for path in run})
    rows = [[path, *(run.get(path, "-") for run in settings)] for path in paths]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return Table("What was set differently", ["setting", *(run.name for run in runs)], rows) if rows else None


def _settings(run: Run) -> dict[str, str]:
    tree = dict(run.config or {}) | {"versions": run.versions or {}}
    return {path: json.dumps(value) for path, value in flatten(tree).items() if not isinstance(value, dict)}


def _time_saved(run: Run) -> float | None:
    """None where no step was sparse, or none was dense to compare with."""
    saved, spent = float(run.spent.saved_seconds[-1]), float(run.spent.axes["seconds"][-1])
    if all(record["mode"] == "dense" for record in run.train) or saved != saved:
        return None
    return saved / (spent + saved)


def _switch_row(switch: Mapping[str, Any]) -> list[str]:
    parts = [switch[f"seconds_{part}"] for part in _SWITCH_PARTS]
    seconds = [switch["seconds"], *parts, switch["seconds"] - sum(parts)]
    similarity, imbalance = switch["similarity"], (switch["imbalance_before"], switch["imbalance_after"])
    return [
        f"{switch['step']:,}",
        f"{switch['from']} -> {switch['to']}",
        switch["reason"],
        *(f"{value:.3f}" for value in seconds),
        f"{short_number(switch['bytes_moved'])}B",
        f"{format_loss(switch['loss_before'])} -> {format_loss(switch['loss_after'])}",
        format_loss(switch["loss_sparse"]),
        f"{statistics.fmean(similarity):.3f}" if similarity else "-",
        " ".join(map(str, switch["top_k"])),
        " -> ".join(f"{value:.2f}" for value in imbalance if value is not None) or "-",
    ]


def _rest(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in record.items() if name not in ("step", "kind")]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
