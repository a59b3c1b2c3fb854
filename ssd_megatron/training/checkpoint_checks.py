"""Whether a checkpoint is one of this run: made with the same settings, and with exactly the tensors of its model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssd_megatron.errors import ConfigError
from ssd_megatron.training.checkpoint_files import CheckpointError

NAMES_SHOWN = 5


def check_identity(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError with every setting that is not what it was, and both values."""
    changed = [
        f"{field} was {saved.get(field)!r} and is {now.get(field)!r}"
        for field in sorted(saved.keys() | now.keys())
        if saved.get(field) != now.get(field)
    ]
    if changed:
        raise ConfigError(
            f"{folder} was made with other settings: {'; '.join(changed)}. "
            "Use the settings it was made with, or another run_dir"
        )


def check_tensors(folder: Path, saved: Mapping[str, Sequence[int]], model: Mapping[str, Sequence[int]]) -> None:
    """Raises CheckpointError with the tensors of the model that are missing or have another shape, and those saved that
    the model has no use for; arguments are shapes by name."""
    differing = {
        "missing": [name for name in model if name not in saved],
        "unused": [name for name in saved if name not in model],
        "of another shape": [
            f"{name} ({list(saved[name])} instead of {list(model[name])})"
            for name in model
            if name in saved and saved[name] != model[name]
        ],
    }
    found = [f"{what}: {listed(names)}" for what, names in differing.items() if names]
    if found:
        raise CheckpointError(f"{folder} does not hold the tensors of this model; {'; '.join(found)}")


def listed(names: list[str]) -> str:
    """The first few of many names."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
