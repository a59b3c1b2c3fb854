"""One rank's part of a save: its files, written at once or in the background, and the index that joins all ranks'."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.checkpoint_files import FileRecord, Index, Piece


class Writing:
    """One rank's files of a save, written at once or in the background from copies."""

    def __init__(
        self,
        step: int,
        folder: Path,
        contents: dict[str, dict[str, Tensor]],
        pieces: dict[str, tuple[int, int]],
        values: dict[str, Any],
        *,
        in_background: bool,
    ) -> None:
        self.step, self.folder, self.pieces, self.values = step, folder, pieces, values
        # Copies, also of what is on the CPU already, if training goes on while they are written.
        copies = {
            name: {key: tensor.detach().to("cpu", copy=in_background) for key, tensor in tensors.items()}
            for name, tensors in contents.items()
        }
        pool = ThreadPoolExecutor(1)
        self._written = pool.submit(
            lambda: [files.write_tensors(folder, name, tensors) for name, tensors in copies.items()]
        )
        pool.shutdown(wait=not in_background)

    @property
    def is_done(self) -> bool:
        return self._written.done()

    def result(self) -> list[FileRecord]:
        """The files, once written. Raises what went wrong while writing."""
        return self._written.result()


def index_of(
    writing: Writing,
    records: list[FileRecord],
    parts: list[dict[str, tuple[int, int]]],
    shapes: dict[str, tuple[int, ...]],
) -> Index:
    """Of a save that all ranks have written.

    Args:
        records: all files.
        parts: by rank, start and number of elements of each key that it has written.
        shapes: of the logical tensors.
    """
    pieces: dict[str, list[Piece]] = {}
    for rank, part in enumerate(parts):
        for key, (start, numel) in part.items():
            pieces.setdefault(key, []).append(Piece(files.rank_file(rank), start, numel))
    return Index(writing.step, shapes, pieces, writing.values, records)
