"""Checkpoints to folders that transformers reads, and back."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from ssd_megatron.config.schema import ModelConfig, SSDConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.export import llama, opt, ssd
from ssd_megatron.export.hf_folder import SHARD_BYTES, read_json, read_tensors, write_json, write_tensors
from ssd_megatron.export.hf_tokenizer import find_tokenizer, write_tokenizer
from ssd_megatron.export.model_card import model_card
from ssd_megatron.files import write_atomically
from ssd_megatron.training.saved_model import SavedModel, Settings, is_router, write_model

ExportMode = Literal["dense", "sparse"]
STOCK = {"OPT": opt, "Llama": llama}
MODELING = "modeling_ssd.py"
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Exported:
    """What becomes of a model: config.json and tensors by their new names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def export_model(
    saved: SavedModel,
    folder: Path,
    mode: ExportMode,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a folder that transformers loads; dense as OPT or Llama, sparse with its own modeling file.

    Args:
        tokenizer: instead of the one that the model was trained with.
    Returns:
        what it was written as, in words.
    Raises:
        ConfigError: the model cannot be exported so, or the folder is not empty.
        CheckpointError: the checkpoint is damaged.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give a folder that is not there yet")
    if saved.settings.model.family != "gpt":
        raise ConfigError(f"model.family ({saved.settings.model.family}) cannot be exported: only gpt can")
    if mode == "sparse" and not saved.settings.has_experts:
        raise ConfigError(f"{saved.folder} is of a model that never formed experts: export it with --mode dense")
    exported = _exported(saved, mode)
    folder.mkdir(parents=True, exist_ok=True)
    model, dtype_name = saved.settings.model, str(dtype).removeprefix("torch.")
    config = exported.config | {"dtype": dtype_name, "bos_token_id": None, "pad_token_id": None, "eos_token_id": None}
    generation: dict[str, Any] = {}
    tokenizer = tokenizer or saved.settings.tokenizer
    tokens = model.vocab_size
    if tokenizer is not None:
        eod, size = write_tokenizer(tokenizer, folder, model.seq_length)
        config["eos_token_id"] = generation["eos_token_id"] = generation["pad_token_id"] = eod
        tokens = min(tokens, size)
    if tokens < model.padded_vocab_size:  # padding of the vocabulary is nothing to generate
        generation["suppress_tokens"] = list(range(tokens, model.padded_vocab_size))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    if mode == "sparse":
        shutil.copyfile(Path(__file__).with_name(MODELING), folder / MODELING)
    write_tensors(folder, {name: tensor.to(dtype) for name, tensor in exported.tensors.items()}, shard_bytes)
    write_atomically(folder / "README.md", model_card(saved, mode).encode())
    return f"{config['architectures'][0]}, {dtype_name}"


def import_model(folder: Path, root: Path, tokenizer: Path | None = None) -> Path:
    """Write a checkpoint of a transformers model's weights into `root`; returns its folder.

    Raises:
        DataError: the folder is not one of a transformers model with safetensors.
        ConfigError: the model has no equivalent here, or `root` is not empty.
    """
    if root.exists() and any(root.iterdir()):
        raise ConfigError(f"{root} is not empty: give a folder that is not there yet")
    config, found = read_json(folder / "config.json"), read_tensors(folder)
    kinds = {module.MODEL_TYPE: module for module in (opt, llama, ssd)}
    kind = kinds.get(config.get("model_type", ""))
    if kind is None:
        raise ConfigError(f"model_type ({config.get('model_type')}) cannot be imported: {', '.join(kinds)} can")
    try:
        model = ModelConfig.model_validate(kind.settings_of(config) | _vocabulary(config["vocab_size"]))
        settings = _settings(config, model, tokenizer or find_tokenizer(folder))
    except KeyError as error:
        raise ConfigError(f"{folder / 'config.json'} has no {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{folder / 'config.json'} has sizes that cannot be: {error}") from error
    if model.tie_embeddings:
        # Some folders have the tied head twice.
        head = found.pop("lm_head.weight", None)
        words = next(tensor for name, tensor in found.items() if name.endswith("embed_tokens.weight"))
        if head is not None and not head.equal(words):
            raise ConfigError("lm_head.weight differs from the embedding that config.json says it is tied to")
    return write_model(root, settings, kind.from_hf(found, model).items())


def _exported(saved: SavedModel, mode: ExportMode) -> Exported:
    model = saved.settings.model
    if mode == "sparse":
        return Exported(ssd.config_of(saved.settings), ssd.to_hf(_tensors(saved, saved.shapes), model))
    conflicts = {name: module.conflicts(model) for name, module in STOCK.items()}
    for name, module in STOCK.items():
        if not conflicts[name]:
            dense = [tensor for tensor in saved.shapes if not is_router(tensor)]
            return Exported(module.config_of(model), module.to_hf(_tensors(saved, dense), model))
    needs = "; ".join(f"{name} needs {', '.join(found)}" for name, found in conflicts.items())
    has = {entry.split()[0] for found in conflicts.values() for entry in found}
    shown = ", ".join(f"model.{field} ({getattr(model, field)})" for field in sorted(has))
    remedy = "use --mode sparse, which takes every setting" if saved.settings.has_experts else "train with those"
    raise ConfigError(f"{shown} together are no stock model of transformers: {needs}. Nearest that works: {remedy}")


def _tensors(saved: SavedModel, names: Mapping[str, object] | list[str]) -> dict[str, Tensor]:
    return {name: saved.tensor(name) for name in names}


def _vocabulary(size: int) -> dict[str, int]:
    """No padding where there was none: the imported model has exactly these logits."""
    return {"vocab_size": size, "make_vocab_size_divisible_by": gcd(size, VOCABULARY_MULTIPLE)}


def _settings(config: Mapping[str, Any], model: ModelConfig, tokenizer: Path | None) -> Settings:
    if config["model_type"] == ssd.MODEL_TYPE:
        numbers = {"num_experts": config["num_experts"], "router_update": config["router_update"]}
        return Settings(model, SSDConfig(**numbers), list(config["experts_per_token"]), True, tokenizer)
    defaults = SSDConfig()
    return Settings(model, defaults, [defaults.top_k] * model.num_layers, False, tokenizer)
