"""What a model's networks get to see: their inputs on training data, kept in one file each.

Shapes: T tokens, H hidden.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from ssd_megatron.moefication.task import Task
from ssd_megatron.switching.statistics import observed

DONE = "observed"  # a file that is there once all inputs are


class _Inputs:
    """Takes the first `tokens` inputs of one network into a file [T, H] float32 that other processes map."""

    def __init__(self, path: Path, tokens: int, hidden: int) -> None:
        self._rows: np.memmap[Any, np.dtype[np.float32]] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            path, mode="w+", dtype=np.float32, shape=(tokens, hidden)
        )
        self._path = path
        self.seen = 0

    def __call__(self, x_TH: Tensor, _pre_TF: Tensor) -> None:
        new = x_TH[: len(self._rows) - self.seen].float().cpu().numpy()
        self._rows[self.seen : self.seen + len(new)] = new
        self.seen += len(new)

    @property
    def is_full(self) -> bool:
        return self.seen == len(self._rows)

    def close(self) -> None:
        """Leave the file with no more rows than were seen."""
        if not self.is_full:
            np.save(self._path, np.array(self._rows[: self.seen]))
        else:
            self._rows.flush()


@torch.no_grad()
def observe(task: Task, folder: Path, tokens: int, progress: Progress) -> list[Path]:
    """Run training data through the dense model, once, until every network has seen `tokens` of them.

    Returns:
        a file for each network, [T, H] float32, T at most `tokens`, for `read_inputs`; it is there already if this was
        done before.
    """
    paths = [folder / f"inputs_{number}.npy" for number in range(len(task.ffns))]
    if (folder / DONE).exists():
        return paths
    hidden = next(iter(task.ffns.values())).settings.hidden_size
    files = {name: _Inputs(path, tokens, hidden) for name, path in zip(task.ffns, paths, strict=True)}
    bar = progress.add_task("observing", total=tokens)
    with ExitStack() as within:
        within.enter_context(observed(task.ffns, files))
        for batch in task.one_pass():
            task.forward_backward(batch)
            progress.update(bar, completed=min(file.seen for file in files.values()))
            if all(file.is_full for file in files.values()):
                break
    for file in files.values():
        file.close()
    (folder / DONE).touch()
    return paths


def read_inputs(path: Path) -> Tensor:
    """[T, H] float32."""
    return torch.from_numpy(np.load(path, mmap_mode="r").copy())
