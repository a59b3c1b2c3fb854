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

from ssd_megatron.config.fields import Section
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.data.spans import first_decoder_token
from ssd_megatron.errors import ConfigError
from ssd_megatron.export import bert, llama, opt, ssd, t5
from ssd_megatron.export.hf_folder import SHARD_BYTES, read_json, read_tensors, write_json, write_tensors
from ssd_megatron.export.hf_tokenizer import find_tokenizer, write_tokenizer
from ssd_megatron.export.model_card import model_card
from ssd_megatron.export.settings import unmet
from ssd_megatron.files import new_folder, require_empty, write_atomically
from ssd_megatron.training.saved_model import SavedModel, Settings, is_router, open_tokenizer, write_model

ExportMode = Literal["dense", "sparse"]
STOCK = {"gpt": {"OPT": opt, "Llama": llama}, "bert": {"BERT": bert}, "t5": {"T5": t5}}
# What modeling_ssd.py has.
SPARSE_MODEL = {"family": "gpt", "norm_position": "pre"}
SPARSE_SSD = {"router": ssd.ROUTERS, "balance_bias": False, "routing_granularity": 1}
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
    """Write a folder that transformers loads: dense as OPT, Llama, BERT or T5; sparse GPTs with their modeling file.

    Args:
        tokenizer: instead of the one that the model was trained with.
    Returns:
        what it was written as, in words.
    Raises:
        ConfigError: the model cannot be exported so, is a classifier, or the folder is not empty.
        CheckpointError: the checkpoint is damaged.
    """
    if saved.settings.classification is not None:
        raise ConfigError(
            f"{saved.folder} is of a classifier, which no class of transformers computes as it does: export the model "
            "that it was fine-tuned from"
        )
    dtype_name = str(dtype).removeprefix("torch.")
    with new_folder(folder) as made:
        exported = _sparse(saved) if mode == "sparse" else _dense(saved)
        config = exported.config | {"dtype": dtype_name}
        generation = _write_tokenizer(saved, tokenizer, made, config)
        write_json(made / "config.json", config)
        if saved.settings.model.family != "bert":
            write_json(made / "generation_config.json", generation)
        if mode == "sparse":
            shutil.copyfile(Path(__file__).with_name(MODELING), made / MODELING)
        write_tensors(made, {name: tensor.to(dtype) for name, tensor in exported.tensors.items()}, shard_bytes)
        write_atomically(made / "README.md", model_card(saved, mode).encode())
    return f"{config['architectures'][0]}, {dtype_name}"


def import_model(folder: Path, root: Path, tokenizer: Path | None = None) -> Path:
    """Write a checkpoint of a transformers model's weights into `root`; returns its folder.

    Raises:
        DataError: the folder is not one of a transformers model with safetensors.
        ConfigError: the model has no equivalent here, or `root` is not empty.
    """
    require_empty(root)
    config, found = read_json(folder / "config.json"), read_tensors(folder)
    kinds = {module.MODEL_TYPE: module for module in (opt, llama, bert, t5, ssd)}
    kind = kinds.get(config.get("model_type", ""))
    if kind is None:
        raise ConfigError(f"model_type ({config.get('model_type')}) cannot be imported: {', '.join(kinds)} can")
    try:
        model = ModelConfig.model_validate(kind.settings_of(config, found) | _vocabulary(config["vocab_size"]))
        settings = _settings(config, model, tokenizer or find_tokenizer(folder))
    except KeyError as error:
        raise ConfigError(f"{folder / 'config.json'} has no {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{folder / 'config.json'} has sizes that cannot be: {error}") from error
    return write_model(root, settings, kind.from_hf(found, model).items())


def _sparse(saved: SavedModel) -> Exported:
    model, routing = saved.settings.model, saved.settings.ssd
    if not saved.settings.has_experts:
        raise ConfigError(f"{saved.folder} is of a model that never formed experts: export it with --mode dense")
    lacking = _shown("model", model, unmet(model, **SPARSE_MODEL))
    lacking += _shown("ssd", routing, unmet(routing, **SPARSE_SSD))
    if lacking:
        raise ConfigError(f"{', '.join(lacking)} cannot be exported sparse: export the model with --mode dense")
    tensors = _tensors(saved, saved.shapes)
    if routing.router == "mlp":
        tensors |= ssd.mixes_by_position(saved)
    return Exported(ssd.config_of(saved.settings), ssd.to_hf(tensors, model))


def _dense(saved: SavedModel) -> Exported:
    model = saved.settings.model
    stock = STOCK[model.family]
    conflicts = {name: module.conflicts(model) for name, module in stock.items()}
    for name, module in stock.items():
        if not conflicts[name]:
            dense = [tensor for tensor in saved.shapes if not is_router(tensor)]
            return Exported(module.config_of(model), module.to_hf(_tensors(saved, dense), model))
    needs = "; ".join(f"{name} needs {', '.join(found)}" for name, found in conflicts.items())
    shown = ", ".join(_shown("model", model, [entry for found in conflicts.values() for entry in found]))
    goes_sparse = saved.settings.has_experts and not unmet(model, **SPARSE_MODEL)
    remedy = "use --mode sparse, which takes any mixture" if goes_sparse else "train with those"
    raise ConfigError(f"{shown}: no stock model of transformers has that; {needs}. Nearest that works: {remedy}")


def _shown(name: str, section: Section, conflicts: list[str]) -> list[str]:
    """Fields with their values."""
    fields = sorted({entry.split()[0] for entry in conflicts})
    return [f"{name}.{field} ({getattr(section, field)})" for field in fields]


def _write_tokenizer(saved: SavedModel, tokenizer: Path | None, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write the tokenizer, the one that is given or the model's, if there is one, and its ids into `config`; returns
    what generation_config.json has."""
    model = saved.settings.model
    config |= dict.fromkeys(("bos_token_id", "pad_token_id", "eos_token_id"))
    generation: dict[str, Any] = {}
    tokens = model.vocab_size
    if tokenizer is not None or saved.settings.tokenizer is not None:
        known, path = open_tokenizer(saved, tokenizer)
        eod, size = write_tokenizer(known, path, folder, model, was_trained_here=saved.data is not None)
        config["eos_token_id"] = generation["eos_token_id"] = generation["pad_token_id"] = eod
        if model.family == "t5":
            config["pad_token_id"], config["decoder_start_token_id"] = eod, first_decoder_token(model, eod)
        tokens = min(tokens, size)
    if model.family == "t5":
        if config["decoder_start_token_id"] is None:
            raise ConfigError(
                "model.decoder_start_token (None) is the tokenizer's end of document, and none is known: give one with "
                "--tokenizer"
            )
        generation["decoder_start_token_id"] = config["decoder_start_token_id"]
    if tokens < config["vocab_size"]:  # what stands for no text is nothing to generate
        generation["suppress_tokens"] = list(range(tokens, config["vocab_size"]))
    return generation


def _tensors(saved: SavedModel, names: Mapping[str, object] | list[str]) -> dict[str, Tensor]:
    return {name: saved.tensor(name) for name in names}


def _vocabulary(size: int) -> dict[str, int]:
    """No padding where there was none: the imported model has exactly these logits."""
    return {"vocab_size": size, "make_vocab_size_divisible_by": gcd(size, VOCABULARY_MULTIPLE)}


def _settings(config: Mapping[str, Any], model: ModelConfig, tokenizer: Path | None) -> Settings:
    if config["model_type"] == ssd.MODEL_TYPE:
        routing = {name: config[name] for name in ("num_experts", "router", "router_update")}
        return Settings(model, SSDConfig(**routing), list(config["experts_per_token"]), True, tokenizer)
    whole = SSDConfig(num_experts=1, top_k=1)  # none formed yet: networks of any size are one
    return Settings(model, whole, [1] * model.total_layers, False, tokenizer)
