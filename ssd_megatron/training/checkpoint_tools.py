"""What one does with a checkpoint outside of a run: look at it, verify it, make one file of it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssd_megatron.errors import DataError
from ssd_megatron.files import open_atomically
from ssd_megatron.parallel.zero import MASTER
from ssd_megatron.switching.schedule import Decision, phases_until
from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.checkpoint_files import CheckpointError, Index, key_of

MEGABYTE = 1_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means: a folder of one, or the newest in a run_dir.

    Raises:
        DataError: there is none.
    """
    for root in (path / "checkpoints", path):
        found = files.checkpoints(root)
        if found:
            return found[0]
    if (path / files.INDEX).exists() or (path.is_dir() and files.FOLDER in path.name):
        return path
    what = "has no checkpoint" if path.is_dir() else "is no folder"
    raise DataError(f"{path} {what}: give a run_dir, or one of the folders {files.FOLDER}* in its checkpoints/")


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, one line each: files that are missing, of another size or checksum;
    elements that no file or more than one holds; files that hold something else than the index says."""
    try:
        index = files.read_index(folder)
    except CheckpointError as error:
        return [str(error)]
    damages = files.index_damages(index) + files.damages(folder, index, 0, 1)
    return damages or [*_content_damages(folder, index), *_identity_damages(folder, index)]


def consolidate(folder: Path, out: Path, kind: str = MASTER, dtype: torch.dtype = torch.float32) -> int:
    """Write one safetensors file with every logical tensor by its name and shape, and the banks' `neuron_ids`.

    Neurons lie as in the checkpoint: position i of a bank is neuron neuron_ids[i]. Metadata: step, kind, and the run's
    settings as JSON. `out` appears once it is complete. Tensors are read and written one after the other, small ones
    together, so that memory is a few times that of the largest.

    Args:
        kind: one of KINDS.
        dtype: of the values, torch.float32 or torch.bfloat16; neuron_ids are int64.
    Returns:
        bytes written.
    Raises:
        CheckpointError: the checkpoint is damaged.
        OSError: `out` cannot be written.
    """
    damages = verify(folder)
    if damages:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(damages)}")
    index = files.read_index(folder)
    if kind not in index.kinds:
        raise CheckpointError(f"{folder} holds no {kind}, only {', '.join(index.kinds)}")
    shared = files.read_tensors(folder, files.SHARED)
    identities = {name: ids for name, ids in shared.items() if name.endswith(files.NEURON_IDS)}
    # Identities first: then every tensor begins at a multiple of its element size.
    entries = {name: (torch.int64, tuple(ids.shape)) for name, ids in identities.items()}
    entries |= {name: (dtype, shape) for name, shape in index.shapes.items()}
    settings = json.dumps(index.values["identity"])
    header = _header(entries, {"format": "pt", "step": str(index.step), "kind": kind, "config": settings})
    with open_atomically(out) as file:
        file.write(header)
        for ids in identities.values():
            file.write(_bytes(ids))
        for names in _turns(index):
            _copy(folder, index, [key_of(name, kind) for name in names], file, dtype)
        return file.tell()


def describe(folder: Path) -> list[Table]:
    """What a checkpoint holds, for people.

    Raises:
        CheckpointError: its index cannot be read.
    """
    index = files.read_index(folder)
    return [_overview(folder, index), _layers(index), _tensors(index), _files(index)]


def _content_damages(folder: Path, index: Index) -> Iterator[str]:
    """Files whose tensors are not those of the index."""
    expected: dict[str, dict[str, list[int]]] = {record.name: {} for record in index.files}
    for key, pieces in index.pieces.items():
        for piece in pieces:
            expected[piece.file][key] = [piece.numel]
    for name, shapes in expected.items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                keys: list[str] = list(file.keys())
                found = {key: file.get_slice(key).get_shape() for key in keys if files.is_key(key)}
        except (OSError, SafetensorError) as error:
            yield f"{name} cannot be read: {error}"
            continue
        for key in sorted(shapes.keys() | found.keys()):
            if shapes.get(key) != found.get(key):
                yield f"{name} has {found.get(key, 'no')} elements of {key}, {files.INDEX} {shapes.get(key, 'none')}"


def _identity_damages(folder: Path, index: Index) -> Iterator[str]:
    """Banks whose neurons are not all there."""
    shared = files.read_tensors(folder, files.SHARED)
    for name, neurons in _banks(index).items():
        ids = shared.get(f"{name}{files.NEURON_IDS}")
        if ids is None or not torch.equal(ids.sort().values, torch.arange(neurons)):
            yield f"{files.SHARED} does not have each neuron of {name}.bank once"


def _banks(index: Index) -> dict[str, int]:
    """Neurons by the name of their network."""
    end = ".bank.w_in"
    return {name.removesuffix(end): shape[0] for name, shape in index.shapes.items() if name.endswith(end)}


def _turns(index: Index) -> Iterator[list[str]]:
    """Tensors in order, as many at a time as have together no more elements than the largest."""
    largest = max(math.prod(shape) for shape in index.shapes.values())
    turn: list[str] = []
    room = largest
    for name, shape in index.shapes.items():
        if math.prod(shape) > room:
            yield turn
            turn, room = [], largest
        turn.append(name)
        room -= math.prod(shape)
    yield turn


def _copy(folder: Path, index: Index, keys: list[str], file: IO[bytes], dtype: torch.dtype) -> None:
    """Append whole tensors to a file."""
    numels = [sum(piece.numel for piece in index.pieces[key]) for key in keys]
    targets = {key: (0, torch.empty(numel)) for key, numel in zip(keys, numels, strict=True)}
    files.read_intervals(folder, index, targets)
    for _, values in targets.values():
        file.write(_bytes(values.to(dtype)))


def _header(entries: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Beginning of a safetensors file: the length of what follows, and JSON that says what lies where."""
    described: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, (dtype, shape) in entries.items():
        stop = start + math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().data


def _overview(folder: Path, index: Index) -> Table:
    values = index.values
    coordinator, settings = values["coordinator"], values["identity"]
    layout = ", ".join(f"{name} {size}" for name, size in values["layout"].items())
    size = sum(record.size for record in index.files) / MEGABYTE
    parameters = sum(math.prod(shape) for shape in index.shapes.values())
    experts = f"{settings['ssd.num_experts']} experts per layer, top_k {_numbers(coordinator['top_k'])}"
    rows = {
        "step": f"{index.step} of {settings['training.train_steps']}",
        "mode": coordinator["mode"],
        "phases": _phases(index),
        "saved on": f"{layout} ({len(index.files) - 1} ranks)",
        "partition": experts if coordinator["has_partition"] else "none yet: no switch to sparse so far",
        "parameters": f"{parameters:,}",
        "size": f"{size:,.1f} MB in {len(index.files)} files",
        "Adam steps": _pairs(values["adam_steps"]),
        "learning rates": _pairs(values["learning_rates"]),
        **{f"counter {name}": f"{value:g}" for name, value in values["counters"].items()},
    }
    table = Table("what", "value", title=str(folder), title_justify="left")
    for what, value in rows.items():
        table.add_row(what, str(value))
    return table


def _layers(index: Index) -> Table:
    coordinator, settings = index.values["coordinator"], index.values["identity"]
    table = Table("network", "neurons", "experts", "neurons per expert", "top_k", title="Layers", title_justify="left")
    for (name, neurons), top_k in zip(_banks(index).items(), coordinator["top_k"], strict=True):
        experts = settings["ssd.num_experts"]
        table.add_row(name, str(neurons), str(experts), str(neurons // experts), str(top_k))
    return table


def _tensors(index: Index) -> Table:
    table = Table(
        "tensor", "shape", "MB", "files", title=f"Tensors: {', '.join(index.kinds)}, fp32", title_justify="left"
    )
    for name, shape in index.shapes.items():
        size = len(index.kinds) * math.prod(shape) * torch.float32.itemsize / MEGABYTE
        pieces = index.pieces.get(key_of(name, MASTER), [])
        table.add_row(name, " x ".join(map(str, shape)), f"{size:,.3f}", str(len(pieces)))
    return table


def _files(index: Index) -> Table:
    table = Table("file", "MB", "SHA-256", title="Files", title_justify="left")
    for record in index.files:
        table.add_row(record.name, f"{record.size / MEGABYTE:,.3f}", record.sha256)
    return table


def _phases(index: Index) -> str:
    """Phases up to the checkpoint's step."""
    decisions = [Decision(**decision) for decision in index.values["coordinator"]["schedule"]["decisions"]]
    return ", ".join(f"{p.mode} {p.start_step}-{p.end_step}" for p in phases_until(decisions, index.step))


def _numbers(values: list[int]) -> str:
    """One number if all are alike."""
    return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))


def _pairs(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
