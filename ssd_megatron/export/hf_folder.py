"""Folders as transformers reads them: config.json, safetensors in one or several files. No pickle, either way."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssd_megatron.errors import DataError
from ssd_megatron.files import write_atomically

MODEL_FILE = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# Values that older versions of transformers saved with Llama and BERT, though they follow from the config.
DERIVED = (".rotary_emb.inv_freq", ".embeddings.position_ids")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Raises DataError if there is no such file, or none of JSON."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path.parent} has no {path.name}: give the folder of a transformers model") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    return values


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """One file, or several with an index where they have more than `shard_bytes` together."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / MODEL_FILE, metadata={"format": "pt"})
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    write_json(folder / MODEL_INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors by name, but for those that follow from the config.

    Raises:
        DataError: there are no safetensors, or a file is missing or damaged.
    """
    if (folder / MODEL_INDEX).exists():
        names = sorted(set(read_json(folder / MODEL_INDEX)["weight_map"].values()))
    else:
        names = [MODEL_FILE]
    found: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.exists():
            raise DataError(
                f"{path} does not exist: only safetensors are read; transformers' save_pretrained writes them"
            )
        try:
            found |= load_file(path)
        except SafetensorError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    return {name: tensor for name, tensor in found.items() if not name.endswith(DERIVED)}
