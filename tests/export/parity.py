"""Our model and Hugging Face's on the same random weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.model.init import named_normal
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.saved_model import is_router
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
    """All but the routers'."""
    parameters = model.logical_parameters()
    return {name: parameter.detach() for name, parameter in parameters.items() if not is_router(name)}


def load(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of `model` has a value in `tensors`, or is tied to one that has, and the other way round."""
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    assert not unexpected and set(missing) <= set(model.all_tied_weights_keys)
    model.eval()


def used_rows(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """With zeros where the vocabulary is padded."""
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in {"embedding.word.weight", "head.weight", "head.bias"} & kept.keys():
        kept[name][model.vocab_size :] = 0
    return kept
