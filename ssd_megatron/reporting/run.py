"""What the folder of a run holds, and the axes over which its numbers can be drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssd_megatron.errors import DataError
from ssd_megatron.training.metrics import Record, read_metrics
from ssd_megatron.training.run_folder import read_written
from ssd_megatron.training.series import of_kind, smoothed, values_of

AXES = {
    "step": "step",
    "tokens": "tokens",
    "flops": "training FLOPs",
    "seconds": "seconds of steps and all between them",
}


@dataclass(frozen=True)
class Run:
    """A run as it stands; it may be going on.

    Attributes:
        name: what it is called beside others.
        config, versions, summary: of the files of these names; None before the run has written them.
    """

    name: str
    records: list[Record]
    config: Mapping[str, Any] | None
    versions: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None

    def of(self, kind: str) -> list[Record]:
        return of_kind(self.records, kind)

    @cached_property
    def train(self) -> list[Record]:
        return self.of("train")

    @cached_property
    def spent(self) -> "Spent":
        return Spent.of(self.records)

    @property
    def flops_saved(self) -> np.ndarray:
        """Share of the FLOPs that all steps up to each one would have taken, had they been dense."""
        saved: np.ndarray = 1 - values_of(self.train, "flops") / values_of(self.train, "flops_dense")
        return saved

    @property
    def speeds(self) -> dict[str, np.ndarray]:
        """Tokens per second by mode, smoothed over steps of the same mode; nan where the run was in the other."""
        speeds = values_of(self.train, "tokens_per_second")
        is_sparse = np.array([record["mode"] == "sparse" for record in self.train])
        modes = {"dense": ~is_sparse, "sparse": is_sparse}
        return {
            mode: np.where(mine, smoothed(np.where(mine, speeds, np.nan)), np.nan)
            for mode, mine in modes.items()
            if mine.any()
        }

    @property
    def last_step(self) -> int:
        return int(self.train[-1]["step"])

    @property
    def train_steps(self) -> int | None:
        """Steps that the run will have when it is finished, where that is known."""
        return None if self.config is None else int(self.config["ssd_megatron"]["training"]["train_steps"])

    @property
    def status(self) -> str:
        """`finished` or `stopped`, as its summary says; else it is running, or was ended from outside."""
        is_current = self.summary is not None and self.summary["steps"] == self.last_step
        return str(self.summary["status"]) if self.summary is not None and is_current else "not ended"


@dataclass(frozen=True)
class Spent:
    """What a run had spent after each of its steps; one number per train record, under the names of AXES.

    Attributes:
        saved_seconds: how much longer it would have taken had every step been dense: what sparse steps take less than
            the median dense step, less the checks and switches. NaN if no step was dense.
    """

    axes: dict[str, np.ndarray]
    saved_seconds: np.ndarray

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Spent":
        train = of_kind(records, "train")
        seconds = values_of(train, "seconds")
        is_sparse = np.array([record["mode"] == "sparse" for record in train])
        dense_step = np.median(seconds[~is_sparse]) if (~is_sparse).any() else np.nan
        between = _seconds_between(records)
        extra = _seconds_between([record for record in records if record["kind"] not in ("eval", "save")])
        return cls(
            axes={
                "step": values_of(train, "step"),
                "tokens": np.cumsum(np.rint(values_of(train, "tokens_per_second") * seconds)),
                "flops": values_of(train, "flops"),
                "seconds": np.cumsum(seconds + between),
            },
            saved_seconds=np.cumsum(np.where(is_sparse, dense_step - seconds, 0.0) - extra),
        )

    def at(self, steps: np.ndarray) -> dict[str, np.ndarray]:
        """Where numbers of these steps stand on each axis."""
        index = np.searchsorted(self.axes["step"], steps, side="right") - 1
        return {name: values[index.clip(0)] for name, values in self.axes.items()}


def read_run(run_dir: Path, name: str) -> Run:
    """Read the folder of a run, which may still be running.

    Raises:
        DataError: the run has no step yet, or its metrics cannot be read.
    """
    records = read_metrics(run_dir)
    if not of_kind(records, "train"):
        raise DataError(f"{run_dir} has no training step in its metrics.jsonl yet: ask for its report when it has")
    config, versions, summary = (read_written(run_dir / f"{part}.json") for part in ("config", "versions", "summary"))
    return Run(name, records, config, versions, summary)


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Read several, each named by its folder, or by its whole path where folders have the same name.

    Raises:
        DataError: see `read_run`.
    """
    names = [run_dir.resolve().name for run_dir in run_dirs]
    unique = len(set(names)) == len(names)
    return [read_run(run_dir, name if unique else str(run_dir)) for run_dir, name in zip(run_dirs, names, strict=True)]


def _seconds_between(records: Sequence[Record]) -> np.ndarray:
    """Seconds of records between steps, such as checks and switches, before each train record; what follows the last
    counts with it."""
    between: list[float] = []
    waiting = 0.0
    for record in records:
        if record["kind"] == "train":
            between.append(waiting)
            waiting = 0.0
        else:
            waiting += record.get("seconds") or 0.0
    between[-1] += waiting
    return np.array(between)
