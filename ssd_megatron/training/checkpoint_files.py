"""Checkpoints on disk: safetensors files and one index.json, complete or not there at all. No pickle.

    checkpoints/step_00000100/
        index.json              what it holds, where, every file's size and SHA-256, and its own; written last
        shared.safetensors      tensors that all ranks have alike
        rank_00000.safetensors  what rank 0 owns, intervals of flattened logical tensors, and its RNG

A checkpoint is written under a temporary name and renamed once every file is on the disk. It does not depend on who
wrote it: an interval of a logical tensor is read from whichever files hold its parts.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssd_megatron.files import sha256_of
from ssd_megatron.parallel.zero import KINDS

FORMAT_VERSION = 2
INDEX = "index.json"
SHARED = "shared.safetensors"
NEURON_IDS = ".bank.neuron_ids"  # after a network's name, its key in SHARED
FOLDER, TEMPORARY, DAMAGED = "step_", ".tmp-step_", "damaged-"
_NAME = re.compile(rf"{FOLDER}\d{{8,}}")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none can be read."""


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint as it was written."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a flattened logical tensor lie in `file` under the tensor's key."""

    file: str
    start: int
    numel: int


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds: `pieces` by key (see `key_of`), `values` ready for JSON, `files` with checksums."""

    step: int
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, list[Piece]]
    values: dict[str, Any]
    files: list[FileRecord]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What there is of each logical tensor: all of KINDS, or of a model that was imported the master alone."""
        return tuple(self.values.get("kinds", KINDS))


def key_of(name: str, kind: str) -> str:
    """Key of one kind (master, exp_avg, exp_avg_sq) of a logical tensor."""
    return f"{name}|{kind}"


def is_key(key: str) -> bool:
    """Whether a tensor of a file is a piece of a logical tensor."""
    return "|" in key


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def folder_name(step: int) -> str:
    return f"{FOLDER}{step:08d}"


def temporary_folder(root: Path, step: int) -> Path:
    return root / f"{TEMPORARY}{step:08d}"


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write one file and return once it is on the disk."""
    path = folder / name
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    _sync(path)
    return FileRecord(name, path.stat().st_size, sha256_of(path))


def commit(root: Path, index: Index) -> Path:
    """Write the index into the temporary folder of its step and give the folder its name."""
    temporary = temporary_folder(root, index.step)
    content = {"format_version": FORMAT_VERSION, **asdict(index)}
    (temporary / INDEX).write_text(json.dumps(content | {"sha256": index_digest(content)}, indent=1))
    _sync(temporary / INDEX)
    _sync(temporary)
    final = root / folder_name(index.step)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(root)
    return final


def checkpoints(root: Path) -> list[Path]:
    """Folders of checkpoints under `root`, newest first, whether they can be read or not.

    Only those with the names that saves give: a copy under a name of its own is the user's.
    """
    return sorted((folder for folder in root.glob(f"{FOLDER}*") if _NAME.fullmatch(folder.name)), reverse=True)


def remove_old(root: Path, step: int, keep_last: int | None) -> None:
    """Delete checkpoints beyond the newest `keep_last` up to that of `step`, and what an interrupted save left."""
    for left_over in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left_over)
    if keep_last is not None:
        up_to_step = [folder for folder in checkpoints(root) if folder.name <= folder_name(step)]
        for folder in up_to_step[keep_last:]:
            shutil.rmtree(folder)


def set_aside(folder: Path) -> None:
    """Take a damaged checkpoint out of the way, but keep it."""
    aside = folder.with_name(f"{DAMAGED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def read_index(folder: Path) -> Index:
    """Raises CheckpointError if the index is missing, damaged or of another format."""
    path = folder / INDEX
    try:
        raw = json.loads(path.read_text())
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format {version}; this version reads format {FORMAT_VERSION}")
        if raw.pop("sha256") != index_digest(raw):
            raise CheckpointError(f"{path} does not have its checksum")
        return Index(
            step=raw["step"],
            shapes={name: tuple(shape) for name, shape in raw["shapes"].items()},
            pieces={key: [Piece(**piece) for piece in pieces] for key, pieces in raw["pieces"].items()},
            values=raw["values"],
            files=[FileRecord(**record) for record in raw["files"]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def index_damages(index: Index) -> list[str]:
    """Tensors of which the files do not hold every element exactly once, one line each."""
    numels = {key_of(name, kind): math.prod(shape) for name, shape in index.shapes.items() for kind in index.kinds}
    known = {record.name for record in index.files}
    found = []
    for key in sorted(numels.keys() | index.pieces.keys()):
        pieces = sorted(index.pieces.get(key, []), key=lambda piece: piece.start)
        unknown = sorted({piece.file for piece in pieces} - known)
        if key not in numels:
            found.append(f"{INDEX} has pieces of {key} without its shape")
        elif unknown:
            found.append(f"{INDEX} has pieces of {key} in {', '.join(unknown)}, which it does not list")
        else:
            found += [f"{INDEX}: {key}: {what}" for what in _uncovered(pieces, numels[key])]
    return found


def _uncovered(pieces: list[Piece], numel: int) -> list[str]:
    """Elements that are not in exactly one of the pieces, which are ordered by their start."""
    found, covered = [], 0
    for piece in [*pieces, Piece("", numel, 0)]:
        if piece.start > covered:
            found.append(f"elements {covered} to {piece.start - 1} are in no file")
        elif piece.start < covered:
            found.append(f"elements {piece.start} to {covered - 1} are there twice or too many")
        covered = max(covered, piece.start + piece.numel)
    return found


def damages(folder: Path, index: Index, rank: int, ranks: int) -> list[str]:
    """What is wrong with the files that `rank` checks (every `ranks`-th), one line each."""
    lines = (_damage(folder / record.name, record) for record in index.files[rank::ranks])
    return [line for line in lines if line is not None]


def _damage(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{record.name} has {size} bytes instead of {record.size}"
        return None if sha256_of(path) == record.sha256 else f"{record.name} does not have its checksum"
    except FileNotFoundError:
        return f"{record.name} is missing"
    except OSError as error:
        return f"{record.name} cannot be read: {error}"


def read_tensors(folder: Path, name: str, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The tensors of one file whose key is wanted."""
    with safe_open(folder / name, framework="pt") as file:
        keys: list[str] = list(file.keys())
        return {key: file.get_tensor(key) for key in keys if wanted(key)}


def read_interval(folder: Path, index: Index, key: str, start: int, numel: int) -> Tensor:
    """Elements [start, start + numel) of a flattened logical tensor, fp32.

    Raises:
        CheckpointError: the checkpoint does not hold all of them.
    """
    values = torch.empty(numel)
    read_intervals(folder, index, {key: (start, values)})
    return values


def read_intervals(folder: Path, index: Index, targets: Mapping[str, tuple[int, Tensor]]) -> None:
    """Fill tensors with intervals of flattened logical tensors, from all files that hold parts of them.

    Each file is opened once, one at a time, and only what is needed of it is read.

    Args:
        targets: by key, the position of the first element and the flat tensor to fill.
    Raises:
        CheckpointError: the checkpoint does not hold all of the elements.
    """
    wanted: dict[str, list[tuple[str, slice, Tensor]]] = {}  # by file: key, part of the piece there, where it goes
    for key, (start, values) in targets.items():
        stop, found = start + values.numel(), 0
        for piece in index.pieces.get(key, []):
            first, last = max(start, piece.start), min(stop, piece.start + piece.numel)
            if first < last:
                part = slice(first - piece.start, last - piece.start)
                wanted.setdefault(piece.file, []).append((key, part, values[first - start : last - start]))
                found += last - first
        if found != values.numel():
            raise CheckpointError(f"{folder} holds {found} of {values.numel()} elements of {key} from {start} on")
    for name, parts in wanted.items():
        with safe_open(folder / name, framework="pt") as file:
            for key, part, values in parts:
                values.copy_(file.get_slice(key)[part])


def index_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of values as they come back from JSON, whatever the order of their names."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
