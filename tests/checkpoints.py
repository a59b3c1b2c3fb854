"""Checkpoints as tests compare them: whatever wrote them, neurons by identity."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ssd_megatron.parallel.zero import KINDS, MASTER
from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.checkpoint_tools import consolidate, verify

NEURON_IDS = "neuron_ids"


def model_by_identity(folder: Path, out: Path, kind: str = MASTER) -> dict[str, Tensor]:
    """All logical tensors, consolidated into `out`: banks by the identity of their neurons, and routers by the first
    neuron of their experts."""
    consolidate(folder, out, kind)
    model, identity = load_file(out), files.read_index(folder).values["identity"]
    for bank, ids in [(n.removesuffix(NEURON_IDS), model.pop(n)) for n in list(model) if n.endswith(NEURON_IDS)]:
        for name in model:
            if name.startswith(bank) and not name.endswith("b_out"):
                model[name] = model[name][ids.argsort()]
        if identity["ssd.router"] not in ("centroid", "switch"):
            continue  # it knows experts by number, or has no weights
        first_ids = ids.view(identity["ssd.num_experts"], -1).min(1).values
        for name in (name for name in model if name.startswith(bank.replace(".bank.", ".router."))):
            model[name] = model[name][first_ids.argsort()]
    return model


def assert_written_once(folder: Path, ranks: int) -> None:
    """Every rank has written its part, and all parts together have every element once."""
    assert verify(folder) == []
    index = files.read_index(folder)
    parts = {files.rank_file(rank): load_file(folder / files.rank_file(rank)) for rank in range(ranks)}
    elements = [sum(t.numel() for key, t in part.items() if files.is_key(key)) for part in parts.values()]
    assert min(elements) > 0.25 * sum(elements) / ranks
    times = {
        files.key_of(name, kind): torch.zeros(shape, dtype=torch.int64).flatten()
        for name, shape in index.shapes.items()
        for kind in KINDS
    }
    assert sum(elements) == sum(t.numel() for t in times.values())
    for key, pieces in index.pieces.items():
        for piece in pieces:
            assert parts[piece.file][key].numel() == piece.numel
            times[key][piece.start : piece.start + piece.numel] += 1
    assert all(bool((count == 1).all()) for count in times.values())


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change index.json as a writer would have that was wrong: its checksum is that of what it says."""
    path = folder / files.INDEX
    index = json.loads(path.read_text())
    del index["sha256"]
    change(index)
    path.write_text(json.dumps(index | {"sha256": files.index_digest(index)}))
