"""Our model and Hugging Face's on the same random weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssd_megatron.config.schema import ModelConfig
from ssd_megatron.model.init import named_normal
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology
from tests.small_engine import run_config


def random_model(topology: Topology, settings: dict[str, Any]) -> tuple[LanguageModel, ModelConfig]:
    """A small model in which every parameter is random, also norms and biases."""
    section = run_config(**settings).ssd_megatron
    model = LanguageModel(section, "torch", topology).eval()
    with torch.no_grad():
        for name, parameter in model.logical_parameters().items():
            mean = float(name.endswith("norm.weight"))
            parameter.copy_(mean + 0.1 * named_normal(name, tuple(parameter.shape), 3))
    return model, section.model


def logical_tensors(model: LanguageModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.logical_parameters().items()}


def load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of `model` has a value in `tensors`, and the other way round."""
    model.load_state_dict(dict(tensors), strict=True)
    model.eval()


def used_rows(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """All but routers, with zeros where the vocabulary is padded."""
    kept = {name: tensor.clone() for name, tensor in tensors.items() if not name.endswith("router.weight")}
    for name in {"embedding.word.weight", "head.weight", "head.bias"} & kept.keys():
        kept[name][model.vocab_size :] = 0
    return kept
